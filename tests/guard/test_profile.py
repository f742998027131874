"""Profiles: what is recorded on the CPU, how a GPU's events are read, and names that stay the same."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernel_pytorch.backends.cpu.manager import CpuHardwareManager
from kernel_pytorch.guard import profile
from kernel_pytorch.guard.kernel_names import AUTOGRAD, COMPILED_CALLS, DISPATCH, class_of, condensed, short_name

FLASH_CPU = "aten::_scaled_dot_product_flash_attention_for_cpu"
MATH = "aten::_scaled_dot_product_attention_math"


@pytest.fixture(scope="module")
def manager() -> CpuHardwareManager:
    return CpuHardwareManager()


def profiled(call: Callable[[], Any], manager: CpuHardwareManager) -> dict[str, float]:
    call()
    return condensed(profile.kernels_ms(call, manager, max_calls=5, max_seconds=1.0))


@pytest.mark.serial
def test_operators_of_a_model_with_what_they_call(manager: CpuHardwareManager) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.GELU(), torch.nn.LayerNorm(256))
    inputs = torch.randn(512, 256)
    with torch.no_grad():
        found = profiled(lambda: model(inputs), manager)
    assert {"aten::addmm", "aten::gelu", "aten::native_layer_norm"} <= set(found)
    assert "aten::copy_" not in found, "the bias that addmm copies is addmm's"
    assert list(found.values()) == sorted(found.values(), reverse=True)
    began = time.perf_counter()
    for _ in range(20):
        model(inputs)
    per_call_ms = (time.perf_counter() - began) * 1e3 / 20
    assert 0.1 * per_call_ms < sum(found.values()) < 10.0 * per_call_ms, "milliseconds of one call"


@pytest.mark.parametrize(("backend", "operator"), [(SDPBackend.MATH, MATH), (SDPBackend.FLASH_ATTENTION, FLASH_CPU)])
def test_attention_is_one_thing_forward_and_backward(
    manager: CpuHardwareManager, backend: SDPBackend, operator: str
) -> None:
    query = torch.randn(2, 4, 128, 32, requires_grad=True)

    def step() -> None:
        with sdpa_kernel(backend):
            F.scaled_dot_product_attention(query, query, query).sum().backward()

    found = profiled(step, manager)
    assert {operator, f"{operator} backward"} <= set(found)
    assert "aten::bmm" not in found
    assert "aten::_softmax_backward_data" not in found
    assert found[f"{operator} backward"] > 0.0


def test_an_optimizer_s_operators_are_told_apart(manager: CpuHardwareManager) -> None:
    layer = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(layer.parameters(), foreach=False)

    def step() -> None:
        layer(torch.ones(8, 64)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    found = profiled(step, manager)
    assert "AdamW.step > aten::addcdiv_" in found
    assert all(class_of(name) == "optimizer" for name in found if name.startswith("AdamW.step"))
    assert AUTOGRAD in found


def test_compiled_code_is_one_graph(manager: CpuHardwareManager) -> None:
    events = [
        Event("Torch-Compiled Region: 0/0", 5.0),
        Event("CompiledFunction", 7.0, sequence_nr=4),
        Event("## Call CompiledFxGraph fr3nnotpkhegxovat3prghdtcixm33gs3vj6ppfnlw5lgdik2do3 ##", 40.0),
    ]
    events[1].cpu_parent, events[2].cpu_parent = events[0], events[1]
    inner = Event("aten::addmm", 60.0, cpu_parent=events[2])
    assert condensed(profile._on_cpu([*events, inner])) == {
        "aten::addmm": pytest.approx(0.06),
        "compiled graph": pytest.approx(0.04),
        COMPILED_CALLS: pytest.approx(0.012),
    }


def test_calls_are_few_where_one_is_long(manager: CpuHardwareManager) -> None:
    calls = 0

    def slow() -> None:
        nonlocal calls
        calls += 1
        time.sleep(0.02)
        torch.ones(4).add(1)

    profile.kernels_ms(slow, manager, min_calls=2, max_calls=50, max_seconds=0.0)
    assert calls == 3, "one to warm the profiler, two that count"


def test_garbage_collection_is_as_it_was(manager: CpuHardwareManager) -> None:
    import gc

    with pytest.raises(ZeroDivisionError):
        profile.kernels_ms(lambda: 1 // 0, manager)
    assert gc.isenabled()


# Events as torch's profiler gives them on a GPU.


@dataclass
class Range:
    start: float
    end: float


@dataclass
class Kernel:
    name: str
    duration: float


CPU = torch.autograd.DeviceType.CPU
GPU = torch.autograd.DeviceType.CUDA


@dataclass
class Event:
    name: str
    self_cpu_time_total: float = 0.0
    cpu_parent: Any = None
    sequence_nr: int = -1
    kernels: list[Kernel] = field(default_factory=list)
    device_type: Any = CPU
    is_user_annotation: bool = False
    time_range: Range = field(default_factory=lambda: Range(0.0, 0.0))


def on_gpu(name: str, start: float, end: float, *, annotation: bool = False) -> Event:
    return Event(name, device_type=GPU, time_range=Range(start, end), is_user_annotation=annotation)


def test_kernels_of_a_gpu_with_those_they_work_for() -> None:
    gemm, nested = "ampere_sgemm_128x64_nn", "void k<a<b<float> > >(int)"
    linear = Event("aten::linear")
    addmm = Event("aten::addmm", cpu_parent=linear, kernels=[Kernel(gemm, 40.0)])
    math = Event(MATH, sequence_nr=7)
    bmm = Event("aten::bmm", cpu_parent=math, sequence_nr=7, kernels=[Kernel(gemm, 25.0)])
    node = Event("BmmBackward0", sequence_nr=7)
    bmm_backward = Event("aten::bmm", cpu_parent=node, kernels=[Kernel(gemm, 30.0)])
    step = Event("Optimizer.step#AdamW.step", is_user_annotation=True)
    add = Event("aten::add_", cpu_parent=step, kernels=[Kernel(nested, 4.0)])
    device = [
        on_gpu("Optimizer.step#AdamW.step", 0.0, 999.0, annotation=True),
        on_gpu(gemm, 0.0, 40.0),
        on_gpu(gemm, 50.0, 75.0),
        on_gpu(gemm, 80.0, 110.0),
        on_gpu(nested, 120.0, 124.0),
        on_gpu("triton_poi_fused_add_mul_3", 130.0, 131.0),
    ]
    raw = profile._on_gpu([linear, addmm, math, bmm, node, bmm_backward, step, add, *device])
    assert condensed(raw) == {
        gemm: pytest.approx(0.040),
        f"{MATH} backward > {gemm}": pytest.approx(0.030),
        f"{MATH} > {gemm}": pytest.approx(0.025),
        "AdamW.step > k<f32>": pytest.approx(0.004),
        "triton_poi_fused_add_mul": pytest.approx(0.001),
    }


def test_time_of_kernels_that_overlap_is_shared() -> None:
    events = [on_gpu("a", 0.0, 10.0), on_gpu("b", 5.0, 10.0), on_gpu("c", 20.0, 21.0)]
    found = profile._on_gpu(events)
    assert found == {"a": pytest.approx(0.0075), "b": pytest.approx(0.0025), "c": pytest.approx(0.001)}
    assert sum(found.values()) == pytest.approx(0.011), "what the GPU was busy"


ADD = "at::native::CUDAFunctor_add<c10::BFloat16>"
FLASH = "Flash_fwd_kernel_traits<64, 128, 128, 4, false, false, cutlass::bfloat16_t>"
NAMES = [
    (
        (
            "void at::native::elementwise_kernel<128, 2, at::native::gpu_kernel_impl_nocast<at::native::"
            "direct_copy_kernel_cuda(at::TensorIteratorBase&)::{lambda()#3}::operator()() const::{lambda(float)#1}>"
            "(at::TensorIteratorBase&)::{lambda(int)#1}>(int, at::native::gpu_kernel_impl_nocast<float>)"
        ),
        "elementwise_kernel<direct_copy_kernel_cuda, f32>",
        "copy",
    ),
    (
        f"void at::native::vectorized_elementwise_kernel<4, {ADD}, std::array<char*, 3ul> >(int, {ADD})",
        "vectorized_elementwise_kernel<CUDAFunctor_add, bf16>",
        "elementwise",
    ),
    (f"void pytorch_flash::flash_fwd_kernel<{FLASH}, false, true>(Params)", "flash_fwd_kernel<bf16>", "attention"),
    (
        "void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<cutlass::bfloat16_t, float>>>(P)",
        "FlashAttnFwdSm90<bf16>",
        "attention",
    ),
    (
        "void cutlass::Kernel2<cutlass_80_s161616gemm_bf16_32x32_tn>(P)",
        "cutlass_80_s161616gemm_bf16_32x32_tn",
        "matmul",
    ),
    ("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_TNT", "nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_TNT", "matmul"),
    (
        "void (anonymous namespace)::softmax_warp_forward<float, float, 8>(int)",
        "softmax_warp_forward<f32>",
        "reduction",
    ),
    (
        (
            "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::TensorListMetadata<4>, "
            "at::native::FusedAdamMathFunctor<float, 4, (at::native::ADAM_MODE)1, false> >(int)"
        ),
        "multi_tensor_apply_kernel<FusedAdamMathFunctor, f32>",
        "optimizer",
    ),
    (
        (
            "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::func_wrapper_t<float, "
            "at::native::sum_functor<float, float, float>::{lambda(float, float)#1}>, unsigned int> >(int)"
        ),
        "reduce_kernel<sum_functor, f32>",
        "reduction",
    ),
    ("triton_red_fused_add_native_layer_norm_12", "triton_red_fused_add_native_layer_norm", "fused"),
    ("triton_poi_fused_mul_1d2d3de", "triton_poi_fused_mul", "fused"),
    ("triton_poi_fused__scaled_dot_product_flash_attention_0", None, "fused"),
    ("triton_tem_fused_mm_3", "triton_tem_fused_mm", "matmul"),
    ("triton_tem_fused_flex_attention_0", "triton_tem_fused_flex_attention", "attention"),
    ("graph_0_cpp_fused_gelu_2", "cpp_fused_gelu", "fused"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_knob_7_kernel0_0", None, "attention"),
    ("sm80_xmma_fprop_implicit_gemm_bf16bf16_nhwc_tilesize128x128", None, "convolution"),
    ("void cudnn::ops::nchwToNhwcKernel<__nv_bfloat16, float, false>(P)", "nchwToNhwcKernel<bf16>", "copy"),
    ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgs<4096ul>)", None, "communication"),
    ("Cijk_Ailk_Bljk_HHS_BH_MT128x128x32_SE_1LDSB0", None, "matmul"),
    ("Memcpy HtoD (Pageable -> Device)", "Memcpy HtoD (Pageable -> Device)", "copy"),
    ("_rms_norm_forward_kernel", "_rms_norm_forward_kernel", "normalization"),
    ("my_own_thing", "my_own_thing", "other"),
]


@pytest.mark.parametrize(("raw", "short", "kind"), NAMES)
def test_names_of_kernels(raw: str, short: str | None, kind: str) -> None:
    found = short_name(raw)
    assert short is None or found == short
    assert class_of(found) == kind
    assert class_of(raw) == kind
    assert short_name(found) == found


def test_inductor_s_numbers_and_hashes_do_not_make_another_kernel() -> None:
    one = condensed({"triton_poi_fused_add_3": 1.0, "triton_poi_fused_add_11": 2.0})
    assert one == {"triton_poi_fused_add": 3.0}
    assert short_name("my_kernel_0123456789abcdef0123") == short_name("my_kernel_fedcba98765432100123")


def test_condensing_twice_changes_nothing() -> None:
    raw = {
        "aten::linear > aten::addmm > aten::copy_": 1.0,
        f"{MATH} > aten::bmm": 1.0,
        f"aten::scaled_dot_product_attention backward > {MATH} backward > aten::bmm backward > aten::bmm": 1.0,
        "aten::mul backward > aten::mul": 1.0,
        "AdamW.step > aten::mul_ > aten::to > aten::_to_copy": 1.0,
        "AdamW.step > detach": 1.0,
        "AddmmBackward0": 1.0,
        "autograd::engine::evaluate_function: AddmmBackward0": 1.0,
        "aten::view": 1.0,
        "TorchDynamo Cache Lookup": 1.0,
        "mylib::fused > aten::empty": 1.0,
        **{name: 1.0 for name, _, _ in NAMES},
    }
    once = condensed(raw)
    assert condensed(once) == once
    assert once["aten::addmm"] == 1.0
    assert once[f"{MATH} backward"] == 1.0
    assert once["aten::mul"] == 1.0
    assert once["AdamW.step > aten::mul_"] == 1.0
    assert once[AUTOGRAD] == 2.0
    assert once[DISPATCH] == 1.0
    assert once["mylib::fused"] == 1.0


def test_long_names_are_cut_in_the_middle() -> None:
    name = "triton_red_fused_" + "add_" * 40 + "native_layer_norm"
    assert len(short_name(name)) <= 96
    assert short_name(name).startswith("triton_red_fused_")
    assert short_name(name).endswith("native_layer_norm")


def in_turns(base: list[dict[str, float]], head: list[dict[str, float]]) -> tuple[dict[str, float], dict[str, float]]:
    taken: list[str] = []

    def take(label: str, profiles: list[dict[str, float]]) -> dict[str, float]:
        taken.append(label)
        return profiles[taken.count(label) - 1]

    found = profile.profile_in_turns(lambda: take("A", base), lambda: take("B", head), rounds=len(base) // 2)
    assert "".join(taken) == "ABBA" * (len(base) // 2)
    return found


def test_profiles_in_turns_keep_what_moved_and_level_what_did_not() -> None:
    base = [{"moved": 1.0 + 0.02 * i, "noisy": 5.0 + (i % 2)} for i in range(4)]
    head = [{"moved": 1.2 + 0.02 * i, "noisy": 5.5 + (i % 3), "new": 0.4} for i in range(4)]
    assert in_turns(base, head) == ({"noisy": 5.0, "moved": 1.0}, {"noisy": 5.0, "moved": 1.2, "new": 0.4})


def test_what_is_in_few_profiles_only_is_there_by_chance() -> None:
    base: list[dict[str, float]] = [{"a": 1.0}, {"a": 1.0, "cleaning up": 3.0}, {"a": 1.0}, {"a": 1.0}]
    assert in_turns(base, [{"a": 1.0}] * 4) == ({"a": 1.0}, {"a": 1.0})
