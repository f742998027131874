"""Culprits: what a performance engineer would name, in that order; from facts made up, and from models slowed down."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernel_pytorch.backends.cpu.manager import CpuHardwareManager
from kernel_pytorch.core.types import Ratio, Verdict
from kernel_pytorch.guard.circumstances import Slowdown
from kernel_pytorch.guard.culprit import find_culprits
from kernel_pytorch.guard.kernel_moves import compare_profiles
from kernel_pytorch.guard.profile import OUTSIDE, kernels_ms, profile_in_turns
from kernel_pytorch.guard.types import Comparison, Culprit, SideFacts
from kernel_pytorch.guard.versions import software_changes
from kernel_pytorch.measure.sampler import collect
from kernel_pytorch.measure.stats import paired_ratio
from tests.guard.repositories import Repository

SOFTWARE = {"torch": "2.12.1", "triton": "3.7.0", "cudnn": "91002", "driver": "580.65", "python": "3.12.3"}
GEMM = "nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_TNT"
GPU = {
    GEMM: 6.0,
    "nvjet_hsh_64x64_64x8_h_bz_NNT": 1.0,
    "flash_fwd_kernel<bf16>": 2.0,
    "triton_poi_fused_add_mul_3": 1.0,
    "triton_red_fused_native_layer_norm_7": 0.5,
    "Memcpy HtoD (Pageable -> Device)": 0.3,
}


def compared(
    base: Mapping[str, Any] | None = None,
    head: Mapping[str, Any] | None = None,
    *,
    change: float = 1.10,
    base_ms: float = 12.0,
    verdict: Verdict = Verdict.FAIL,
) -> Comparison:
    common: dict[str, Any] = {"software": SOFTWARE, "device_key": "nvidia-sm_90-1"}
    return Comparison(
        kind="compare",
        name="model",
        verdict=verdict,
        reason="",
        max_slowdown=0.03,
        base=SideFacts("base", **{**common, **(base or {})}),
        head=SideFacts("head", **{**common, **(head or {})}),
        created="2026-01-01T00:00:00",
        id="1",
        change=Ratio(change, change - 0.005, change + 0.005),
        base_samples_ms=(base_ms,) * 20,
        head_samples_ms=(base_ms * change,) * 20,
    )


def named(culprits: tuple[Culprit, ...]) -> str:
    return "\n".join(f"{c.kind}: {c.what}" for c in culprits)


def slower(**times: float) -> dict[str, Any]:
    """Return facts whose profile has these times besides; a time of 0 takes a kernel out."""
    return {"kernels_ms": {name: ms for name, ms in {**GPU, **times}.items() if ms}}


# Kernels.


def test_the_kernel_that_moved_comes_first_with_time_and_share() -> None:
    found = find_culprits(compared({"kernels_ms": GPU}, slower(**{GEMM: 7.1})))
    assert found[0].kind == "kernels"
    assert GEMM in found[0].what
    assert "+1.10 ms" in found[0].what
    assert found[0].share == pytest.approx(1.1 / 1.2, abs=0.01)
    assert found[0].evidence["delta_ms"] == pytest.approx(1.1)
    assert found[0].evidence["class"] == "matmul"
    assert len(found) == 1, named(found)


def test_several_kernels_in_the_order_of_their_time() -> None:
    head = slower(**{GEMM: 6.3, "flash_fwd_kernel<bf16>": 2.8, "Memcpy HtoD (Pageable -> Device)": 0.4})
    found = find_culprits(compared({"kernels_ms": GPU}, head))
    assert ["flash_fwd" in found[0].what, GEMM in found[1].what, "Memcpy" in found[2].what] == [True] * 3
    assert sum(c.share or 0.0 for c in found) <= 1.0 + 1e-9


def test_inductor_s_numbers_are_no_change() -> None:
    renumbered = {name.replace("_3", "_11").replace("norm_7", "norm_2"): ms for name, ms in GPU.items()}
    found = find_culprits(compared({"kernels_ms": GPU}, {"kernels_ms": renumbered}))
    assert "triton" not in named(found)


@pytest.mark.parametrize(
    "instead",
    [
        {"fmha_cutlassF_bf16_aligned_64x64_rf_sm80": 3.2},
        {
            "aten::_scaled_dot_product_attention_math > nvjet_hsh_64x64_h_bz_NNT": 1.6,
            "aten::_scaled_dot_product_attention_math > softmax_warp_forward<bf16>": 1.6,
        },
        {"nvjet_hsh_96x64_64x8_h_bz_NNT": 1.5, "softmax_warp_forward<f32>": 1.0, "masked_fill_kernel": 0.0},
    ],
)
def test_flash_attention_that_another_replaced(instead: dict[str, float]) -> None:
    head = slower(**{"flash_fwd_kernel<bf16>": 0.0, **instead})
    gained = sum(instead.values()) - 2.0
    found = find_culprits(compared({"kernels_ms": GPU}, head, change=1.0 + gained / 12.0))
    assert "flash_fwd_kernel<bf16> replaced by" in found[0].what
    assert found[0].evidence["delta_ms"] == pytest.approx(gained)
    assert found[0].share == pytest.approx(1.0)
    assert found[0].evidence["class"] == "attention"
    assert len([c for c in found if c.kind == "kernels"]) == 1, named(found)


def test_products_that_other_tiles_replaced_count_together() -> None:
    head = slower(**{GEMM: 0.0, "nvjet_hsh_192x192_64x3_2x1_v_bz_coopB_TNT": 7.0})
    found = find_culprits(compared({"kernels_ms": GPU}, head))
    assert f"{GEMM} replaced by nvjet_hsh_192x192" in found[0].what
    assert found[0].evidence["delta_ms"] == pytest.approx(1.0)


def test_work_that_went_to_another_product_is_not_counted_twice() -> None:
    head = slower(**{GEMM: 0.0, "nvjet_hsh_64x64_64x8_h_bz_NNT": 7.9})
    found = find_culprits(compared({"kernels_ms": GPU}, head, change=1.08))
    assert found[0].evidence["delta_ms"] == pytest.approx(0.9), "7.9 less 6.0 and 1.0"


def test_compiled_code_that_fell_back_to_single_operators() -> None:
    head = slower(
        **{
            "triton_poi_fused_add_mul_3": 0.0,
            "triton_red_fused_native_layer_norm_7": 0.0,
            "vectorized_elementwise_kernel<CUDAFunctor_add, bf16>": 1.2,
            "vectorized_layer_norm_kernel<bf16>": 0.9,
        }
    )
    found = find_culprits(compared({"kernels_ms": GPU}, head, change=1.05))
    assert "triton_poi_fused_add_mul" in found[0].what
    assert "replaced by" in found[0].what
    assert found[0].evidence["delta_ms"] == pytest.approx(0.6)


def test_unrelated_elementwise_kernels_do_not_replace_each_other() -> None:
    base = {**GPU, "threshold_kernel_impl": 0.5}
    head = {**GPU, "vectorized_elementwise_kernel<CUDAFunctor_add, f32>": 1.0}
    moves = compare_profiles(base, head)
    assert [move.what for move in moves.slower] == ["vectorized_elementwise_kernel<CUDAFunctor_add, f32> new"]


def test_a_dtype_that_changed_names_both() -> None:
    before, after = (f"vectorized_elementwise_kernel<CUDAFunctor_add, {d}>" for d in ("bf16", "f32"))
    moves = compare_profiles({**GPU, before: 1.0}, {**GPU, after: 2.0})
    assert moves.slower[0].what == f"{before} replaced by {after}"
    assert moves.slower[0].delta_ms == pytest.approx(1.0)


def test_many_kernels_of_a_class_are_one_culprit() -> None:
    base = {f"nvjet_hsh_{i}x64_TNT": 1.0 for i in range(64, 70)} | {f"triton_poi_fused_{i}x": 1.0 for i in "abcdefghij"}
    head = {name: ms * (1.2 if name.startswith("nvjet") else 1.0) for name, ms in base.items()}
    found = find_culprits(compared({"kernels_ms": base}, {"kernels_ms": head}))
    assert "6 kernels of class matmul slower" in found[0].what
    assert found[0].evidence["delta_ms"] == pytest.approx(1.2)


def test_what_some_kernels_gained_does_not_inflate_the_others() -> None:
    head = slower(**{GEMM: 9.0, "flash_fwd_kernel<bf16>": 0.2})
    found = find_culprits(compared({"kernels_ms": GPU}, head))
    assert found[0].share == pytest.approx(1.0)
    assert "flash" not in named(found)


def test_noise_between_profiles_is_no_culprit() -> None:
    wobble = [1.03, 0.98, 1.02, 0.97, 1.04, 0.99]
    head = {name: ms * factor for (name, ms), factor in zip(GPU.items(), wobble, strict=True)}
    head["nvjet_hsh_64x64_64x8_h_bz_NNT"] = 2.0
    moves = compare_profiles(GPU, head)
    assert [move.names for move in moves.slower] == [("nvjet_hsh_64x64_64x8_h_bz_NNT",)]


# Between kernels, and all of them.


def test_time_between_kernels_where_the_kernels_do_not_explain_it() -> None:
    found = find_culprits(compared({"kernels_ms": GPU}, slower(**{GEMM: 6.1})))
    assert found[0].kind == "idle"
    assert "between kernels" in found[0].what
    assert found[0].evidence["delta_ms"] == pytest.approx(1.1)
    assert found[0].evidence["base_ms"] == pytest.approx(12.0 - sum(GPU.values()))


def test_a_lower_clock_explains_kernels_that_are_slower_alike() -> None:
    base = {"kernels_ms": GPU, "telemetry": {"sm_clock_mhz": 1980.0, "power_watts": 650.0, "throttle_reasons": 0.0}}
    head = {
        "kernels_ms": {name: ms * 1.11 for name, ms in GPU.items()},
        "telemetry": {"sm_clock_mhz": 1785.0, "power_watts": 690.0, "throttle_reasons": 4.0},
    }
    found = find_culprits(compared(base, head))
    assert found[0].kind == "clocks"
    assert "SM clock 1980 -> 1785 MHz (power cap)" in found[0].what
    assert found[0].share == pytest.approx(1.0)
    assert found[0].evidence["head_power_watts"] == 690.0
    assert "all kernels slower alike, by 11.0 %" in found[1].what
    assert GEMM not in named(found)


def test_a_lower_clock_does_not_explain_one_kernel() -> None:
    base = {"kernels_ms": GPU, "telemetry": {"sm_clock_mhz": 1980.0}}
    head = {**slower(**{GEMM: 7.2}), "telemetry": {"sm_clock_mhz": 1920.0}}
    found = find_culprits(compared(base, head))
    assert GEMM in found[0].what
    assert found[1].kind == "clocks"
    assert "explains 31 %" in found[1].what


@pytest.mark.parametrize(
    ("base", "head"),
    [
        ({"sm_clock_mhz": 1785.0}, {"sm_clock_mhz": 1980.0}),
        ({"sm_clock_mhz": 1980.0}, {"sm_clock_mhz": 1965.0}),
        ({"clock_mhz": 3000.0}, {"clock_mhz": 2950.0}),
        ({"power_watts": 650.0}, {"power_watts": 400.0}),
        ({"temperature_celsius": 50.0}, {"temperature_celsius": 75.0}),
        ({"throttle_reasons": 4.0}, {"throttle_reasons": 0.0}),
        ({"throttle_reasons": 0.0}, {"throttle_reasons": 1.0}),
        ({"foreign_load_cores": 2.0}, {"foreign_load_cores": 0.0}),
        ({"foreign_load_cores": 0.5}, {"foreign_load_cores": 0.5}),
        ({"load_1min": 1.0}, {"load_1min": 2.0}),
        ({"warm_up_calls": 4.0}, {"warm_up_calls": 8.0}),
    ],
)
def test_what_does_not_slow_it_is_no_culprit(base: dict[str, float], head: dict[str, float]) -> None:
    found = find_culprits(compared({"telemetry": base}, {"telemetry": head}))
    assert [c.kind for c in found] == ["unknown"]


def test_throttling_without_a_lower_clock_seen_is_told() -> None:
    found = find_culprits(compared({"telemetry": {"throttle_reasons": 0.0}}, {"telemetry": {"throttle_reasons": 96.0}}))
    assert found[0].kind == "clocks"
    assert "thermal slowdown and thermal slowdown by hardware" in found[0].what


def test_foreign_load_on_head_alone() -> None:
    found = find_culprits(
        compared({"telemetry": {"foreign_load_cores": 0.1}}, {"telemetry": {"foreign_load_cores": 1.4}})
    )
    assert found[0].kind == "load"
    assert "0.1 -> 1.4 cores" in found[0].what


def test_recompilations_and_graph_breaks_where_they_were_told() -> None:
    base = {"kernels_ms": GPU, "telemetry": {"recompilations": 0.0, "graph_breaks": 1.0}}
    head = {"kernels_ms": GPU, "telemetry": {"recompilations": 12.0, "graph_breaks": 3.0}}
    found = find_culprits(compared(base, head))
    kinds = [c.kind for c in found]
    assert kinds == ["idle", "recompilation", "recompilation"]
    assert "recompilations while it was timed 0 -> 12" in found[1].what
    assert "graph breaks 1 -> 3" in found[2].what


# Memory.


def test_memory_near_the_capacity_and_the_allocator_s_retries() -> None:
    gib = 1 << 30
    base = {"peak_bytes": 60 * gib}
    head = {"peak_bytes": 76 * gib, "telemetry": {"memory_total_bytes": 80.0 * gib, "allocator_retries": 9.0}}
    found = find_culprits(compared(base, head))
    assert found[0].kind == "memory"
    assert "60.00 GiB -> 76.00 GiB" in found[0].what
    assert "95 % of the device's" in found[0].what
    assert "retry 0 -> 9 times" in found[0].what


def test_memory_that_grew_is_a_hint_after_all_else() -> None:
    base = {"kernels_ms": GPU, "peak_bytes": 1 << 30}
    head = {**slower(**{GEMM: 7.2}), "peak_bytes": 3 << 30, "software": {**SOFTWARE, "triton": "3.7.1"}}
    found = find_culprits(compared(base, head))
    assert [c.kind for c in found] == ["kernels", "software", "memory"]


@pytest.mark.parametrize(("old", "new"), [(1 << 30, (1 << 30) + 1000), (3 << 30, 1 << 30), (None, 1 << 30)])
def test_memory_that_did_not_grow_is_no_culprit(old: int | None, new: int) -> None:
    assert [c.kind for c in find_culprits(compared({"peak_bytes": old}, {"peak_bytes": new}))] == ["unknown"]


# Software and devices.


def test_versions_most_likely_first() -> None:
    head = {"software": {**SOFTWARE, "torch": "2.13.0", "driver": "590.10", "numpy": "2.1", "python": "3.13.0"}}
    found = find_culprits(compared({}, head))
    assert [c.what.partition(" ")[0] for c in found] == ["torch", "driver", "python", "numpy"]
    assert found[0].what == "torch 2.12.1 -> 2.13.0"
    assert found[3].what == "numpy absent -> 2.1"
    assert found[0].evidence == {"base_torch": "2.12.1", "head_torch": "2.13.0"}


@pytest.mark.parametrize(
    ("kernel", "library"),
    [
        ("sm90_xmma_fprop_implicit_gemm_bf16", "cudnn"),
        ("triton_poi_fused_add", "triton"),
        ("flash_fwd_kernel<bf16>", "flash-attn"),
    ],
)
def test_the_library_whose_kernels_moved_comes_before_the_others(kernel: str, library: str) -> None:
    versions = {"cudnn": "1", "triton": "1", "flash-attn": "1", "cuda": "13.0"}
    base = {"kernels_ms": {**GPU, kernel: 2.0}, "software": versions}
    head = {"kernels_ms": {**GPU, kernel: 3.2}, "software": dict.fromkeys(versions, "2")}
    found = find_culprits(compared(base, head))
    assert found[0].kind == "kernels"
    assert found[1].what.startswith(library), named(found)


def test_the_kernels_come_before_the_torch_that_changed_them() -> None:
    head = {**slower(**{"flash_fwd_kernel<bf16>": 0.0, "fmha_cutlassF_bf16_sm80": 3.2})}
    head["software"] = {**SOFTWARE, "torch": "2.13.0", "numpy": "2.1"}
    found = find_culprits(compared({"kernels_ms": GPU}, head))
    assert [c.kind for c in found] == ["kernels", "software", "software"]
    assert found[1].what.startswith("torch")


def test_environment_and_settings() -> None:
    base = {"software": {**SOFTWARE, "env:OMP_NUM_THREADS": "8", "setting:float32_matmul_precision": "high"}}
    head = {"software": {**SOFTWARE, "env:OMP_NUM_THREADS": "1", "numpy": "2"}}
    found = find_culprits(compared(base, head))
    assert [c.what for c in found] == [
        "OMP_NUM_THREADS 8 -> 1",
        "float32_matmul_precision high -> unset",
        "numpy absent -> 2",
    ]


def test_many_packages_are_summed_up() -> None:
    head = {"software": {**SOFTWARE, **{f"package-{i}": "2" for i in range(20)}, "torch": "2.13.0"}}
    found = find_culprits(compared({}, head))
    assert len(found) == 7
    assert found[-1].what.startswith("15 other versions: ")
    assert len(found[-1].evidence) == 30


def test_another_device_comes_first() -> None:
    found = find_culprits(compared({"kernels_ms": GPU}, {**slower(**{GEMM: 7.2}), "device_key": "nvidia-sm_80-1"}))
    assert found[0].kind == "device"
    assert found[0].what == "device nvidia-sm_90-1 -> nvidia-sm_80-1"


def test_software_changes_alone() -> None:
    base, head = SideFacts("plan", software={"torch": "2.12"}), SideFacts("now", software={"torch": "2.13"})
    assert [c.what for c in software_changes(base, head)] == ["torch 2.12 -> 2.13"]
    assert software_changes(base, base) == ()


# Revisions.


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    made = Repository(tmp_path / "repo")
    made.commit("start", model_py="x = 1\n", README_md="hello\n")
    return made


def test_commits_whose_lines_speak_of_what_moved_come_first(repository: Repository) -> None:
    base = repository.commit("base", model_py="x = 2\n")
    wanted = repository.commit("Attend without a kernel", model_py="y = softmax(q @ k)  # attention\n")
    repository.commit("Say more", README_md="hello, attention\n")
    repository.commit("Load data", data_py="batch = 4\n")
    head = repository.git("rev-parse", "HEAD")
    moved = slower(**{"flash_fwd_kernel<bf16>": 3.2})
    found = find_culprits(
        compared({"kernels_ms": GPU, "revision": base}, {**moved, "revision": head}), repo=repository.path
    )
    kinds = [c.kind for c in found]
    assert kinds == ["kernels", "revision", "revision", "revision"]
    assert wanted == found[1].evidence["commit"]
    assert f"commit {wanted[:10]} Ada Byron" in found[1].what
    assert "Attend without a kernel (model.py)" in found[1].what
    assert "Load data" in found[2].what
    assert found[3].what.startswith("1 more commits"), "the document"


def test_a_single_commit_comes_before_minor_kernels(repository: Repository) -> None:
    base = repository.git("rev-parse", "HEAD")
    head = repository.commit("One change", model_py="x = 3\n")
    found = find_culprits(compared({"revision": base}, {"revision": head}), repo=repository.path)
    assert found[0].kind == "revision"
    assert len(found) == 1
    assert "One change" in found[0].what


def test_requirements_in_a_commit_belong_to_software(repository: Repository) -> None:
    base = repository.git("rev-parse", "HEAD")
    repository.commit("Rename", model_py="x = 4\n")
    pinned = repository.commit("Newer torch", requirements_txt="torch==2.13.0\n")
    sides = {"revision": base}, {"revision": pinned, "software": {**SOFTWARE, "torch": "2.13.0"}}
    found = find_culprits(compared(*sides), repo=repository.path)
    revisions = [c for c in found if c.kind == "revision"]
    assert revisions[0].evidence["commit"] == pinned


def test_changes_that_no_commit_holds(repository: Repository) -> None:
    head = repository.git("rev-parse", "HEAD")
    (repository.path / "model.py").write_text("x = 5\n")
    found = find_culprits(compared({"revision": head}, {"revision": head, "dirty": True}), repo=repository.path)
    assert found[0].what == "changes that no commit holds on head: model.py"


def test_the_same_checkout_with_changes_on_both_sides_is_no_difference(repository: Repository) -> None:
    facts = {"revision": repository.git("rev-parse", "HEAD"), "dirty": True}
    assert [c.kind for c in find_culprits(compared(facts, facts), repo=repository.path)] == ["unknown"]


def test_commits_that_head_lacks(repository: Repository) -> None:
    repository.git("switch", "-q", "-c", "old")
    old = repository.commit("on old", a_py="1")
    repository.git("switch", "-q", "main")
    mended = repository.commit("make it fast", b_py="1")
    found = find_culprits(compared({"revision": mended}, {"revision": old}), repo=repository.path)
    assert "on old" in found[0].what
    assert found[1].what.startswith("1 commits of base that head does not have")
    assert "make it fast" in found[1].what


def test_revisions_of_another_repository_are_still_named(repository: Repository, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    found = find_culprits(compared({"revision": "a" * 40}, {"revision": "b" * 40}), repo=elsewhere)
    assert found[0].what.startswith(f"revision {'a' * 10} -> {'b' * 10}; its commits could not be read")


def test_the_same_revision_is_no_culprit(repository: Repository) -> None:
    head = repository.git("rev-parse", "HEAD")
    found = find_culprits(compared({"revision": head}, {"revision": head}), repo=repository.path)
    assert [c.kind for c in found] == ["unknown"]


# Nothing.


def test_where_nothing_differs_it_says_so() -> None:
    facts = {"kernels_ms": GPU, "telemetry": {"sm_clock_mhz": 1980.0}, "revision": "a" * 40, "peak_bytes": 100}
    found = find_culprits(compared(facts, facts, change=1.04, base_ms=0.1))
    assert [c.kind for c in found if c.kind != "idle"] in ([], ["unknown"])
    found = find_culprits(compared({"peak_bytes": 100}, {"peak_bytes": 100}))
    assert len(found) == 1
    assert found[0].kind == "unknown"
    assert found[0].what == (
        "nothing that was recorded differs between the sides beyond noise: software, memory; "
        "not recorded: revision, clocks and load, kernels"
    )


def test_series_from_elsewhere_tell_nothing() -> None:
    facts: dict[str, Any] = {"software": {}, "device_key": ""}
    found = find_culprits(compared(facts, facts))
    assert [c.what for c in found] == ["nothing is known of the two sides but their samples"]


@pytest.mark.parametrize("verdict", [Verdict.PASS, Verdict.INCONCLUSIVE])
def test_what_did_not_fail_has_no_culprit(verdict: Verdict) -> None:
    head = {"software": {**SOFTWARE, "torch": "2.13.0"}}
    assert find_culprits(compared({}, head, verdict=verdict)) == ()


@pytest.mark.parametrize("verdict", [Verdict.STALE, Verdict.WRONG])
def test_what_is_not_about_time_names_the_software(verdict: Verdict) -> None:
    head = {"software": {**SOFTWARE, "torch": "2.13.0"}, "telemetry": {"foreign_load_cores": 5.0}}
    found = find_culprits(compared({}, head, verdict=verdict))
    assert found[0].what == "torch 2.12.1 -> 2.13.0"
    assert find_culprits(compared(verdict=verdict)) == ()


def test_the_share_of_classes_is_one_at_most() -> None:
    assert Slowdown(shares={"matmul": 0.8, "attention": 0.5}).share("matmul", "attention") == 1.0
    assert Slowdown().share("matmul") == 0.0


# Real models on the CPU, one of each pair slowed down.


class Block(torch.nn.Module):
    def __init__(self, slowed_by: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = torch.nn.LayerNorm(128)
        self.qkv, self.out = torch.nn.Linear(128, 384), torch.nn.Linear(128, 128)
        self.up, self.down = torch.nn.Linear(128, 256), torch.nn.Linear(256, 128)
        self.slowed_by = slowed_by

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        query, key, value = self.qkv(self.norm(x)).view(batch, length, 3, 4, 32).permute(2, 0, 3, 1, 4)
        with sdpa_kernel(SDPBackend.MATH if self.slowed_by == "attention" else SDPBackend.FLASH_ATTENTION):
            attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        hidden = F.gelu(self.up(x))
        if self.slowed_by == "operator":
            for _ in range(8):
                hidden = torch.erfc(hidden)
        if self.slowed_by == "copy":
            for _ in range(24):
                hidden = hidden.double().float()
        if self.slowed_by == "python":
            _busy(400_000)
        return x + self.down(hidden)


def _busy(rounds: int) -> int:
    return sum(i & 1 for i in range(rounds))


def real(slowed_by: str, *, training: bool = False) -> tuple[Culprit, ...]:
    """Return the culprits of a comparison of a block with one that is slowed down, taken in turns on this machine."""
    manager = CpuHardwareManager()
    inputs = torch.randn(1, 1024, 128)

    def call_of(model: torch.nn.Module) -> Callable[[], Any]:
        def call() -> None:
            with torch.set_grad_enabled(training):
                loss = model(inputs).square().mean()
            if training:
                loss.backward()
                model.zero_grad()

        return call

    calls = call_of(Block()), call_of(Block(slowed_by))
    for call in (*calls, *calls):
        call()
    times: tuple[tuple[float, ...], ...] = ((), ())
    for _ in range(8):  # as the guard does: until it is certain
        more = collect(lambda i: manager.time_ms(calls[i]), min_pairs=16, max_pairs=16, confidence=0.95)
        times = tuple(old + new for old, new in zip(times, more, strict=True))
        if paired_ratio(times[1], times[0], confidence=0.99).low > 1.0:
            break
    profiles = profile_in_turns(
        *(functools.partial(kernels_ms, call, manager, max_seconds=0.0) for call in calls), rounds=4
    )
    facts = [
        SideFacts(label, software=SOFTWARE, device_key=manager.spec.key, kernels_ms=profile)
        for label, profile in zip(("base", "head"), profiles, strict=True)
    ]
    change = paired_ratio(times[1], times[0])
    return find_culprits(
        Comparison("compare", "block", Verdict.FAIL, "", 0.03, *facts, "", "1", change, times[0], times[1])
    )


@pytest.mark.serial
@pytest.mark.parametrize(
    ("slowed_by", "training", "expected"),
    [
        ("attention", False, "aten::_scaled_dot_product_attention_math"),
        ("attention", True, "aten::_scaled_dot_product_attention_math (and backward)"),
        ("operator", False, "aten::erfc new"),
        ("copy", False, "aten::_to_copy new"),
        ("python", False, "outside all operators"),
    ],
)
def test_the_real_reason_is_first(slowed_by: str, training: bool, expected: str) -> None:
    found = real(slowed_by, training=training)
    assert expected in found[0].what, named(found)
    assert found[0].share is not None
    assert found[0].share > 0.1


def test_profiles_of_a_cpu_are_in_milliseconds_of_the_call_without_profiler() -> None:
    base = {"aten::addmm": 4.0, "aten::gelu": 1.0, OUTSIDE: 1.0}
    head = {**base, "aten::gelu": 2.0}
    moves = compare_profiles(base, head, base_ms=3.0, head_ms=3.5)
    assert moves.slower[0].delta_ms == pytest.approx(0.5)
    assert (moves.base_ms, moves.head_ms) == (pytest.approx(3.0), pytest.approx(3.5))
    busy = compare_profiles(base, head, base_ms=9.0, head_ms=7.0)
    assert busy.head_ms == pytest.approx(7.0), "no more than was seen"
    assert compare_profiles(base, head).slower[0].delta_ms == pytest.approx(1.0)


def test_a_gpu_s_kernels_are_not_scaled() -> None:
    assert compare_profiles(GPU, GPU, base_ms=20.0, head_ms=30.0).base_ms == pytest.approx(sum(GPU.values()))
