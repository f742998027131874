"""Probing and choosing: what is measured, what is kept, and what makes it be measured again."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kernel_pytorch.attention import AttentionError, AttentionShape, api, choice, choose, probe, registry, unsupported
from kernel_pytorch.attention.reference import attend
from kernel_pytorch.attention.types import Implementation
from kernel_pytorch.core.types import Numerics, Skip
from kernel_pytorch.measure.choices import cache_directory

SHAPE = AttentionShape(2, 2, 2, 24, 24, 8, torch.float32, is_causal=True)


def fake(name, call, *, rank=0, numerics=Numerics.REORDERED, fits=lambda *_, **__: None):
    return Implementation(name, "a test's", fits, call, rank=rank, numerics=numerics)


@pytest.fixture
def only(monkeypatch):
    """Replace all implementations."""

    def put(*implementations):
        monkeypatch.setattr(registry, "_ALL", {one.name: one for one in implementations})

    return put


def slow(*args, **kwargs):
    time.sleep(0.05)
    return attend(*args, **kwargs)


def upper_left_whatever_is_asked(*args, **kwargs):
    return attend(*args, **{**kwargs, "alignment": "upper_left"})


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):
        return attend(q, k, v, right=0)

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("mha_bwd: this build does not support backward\nfile.cpp:12")


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        return attend(q, k, v, right=0)

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            inputs = [t.detach().requires_grad_() for t in ctx.saved_tensors]
            dq, dk, dv = torch.autograd.grad(attend(*inputs, right=0), inputs, grad)
        return dq, dk * 1.1, dv


def test_the_fastest_is_chosen_and_kept(only):
    only(fake("slow", slow), fake("quick", attend))
    first = choose(SHAPE, "cpu", backward=False)
    assert (first.impl, first.compiled, first.measured) == ("quick", "quick", True)
    assert first.device_ms["quick"] < first.device_ms["slow"]
    api.forget()
    again = choose(SHAPE, "cpu", backward=False)
    assert (again.impl, again.measured) == ("quick", False)
    assert again.device_ms == first.device_ms
    assert again.shape_class == first.shape_class


def test_what_was_chosen_is_used(only):
    only(fake("slow", slow), fake("quick", lambda *a, **k: attend(*a, **k) * 1.0))
    q = torch.randn(2, 2, 24, 8)
    api.attention(q, q, q, is_causal=True)
    assert list(api._answers.values()) == ["quick"]


def test_directions_and_classes_are_apart(only):
    only(fake("slow", slow), fake("quick", attend))
    assert choose(SHAPE, "cpu", backward=False).measured
    assert choose(SHAPE, "cpu", backward=True).measured
    assert not choose(replace(SHAPE, q_len=30, kv_len=30), "cpu", backward=True).measured
    assert choose(replace(SHAPE, q_len=33, kv_len=33), "cpu", backward=True).measured
    assert choose(replace(SHAPE, is_causal=False), "cpu", backward=True).measured


def test_deleted_or_damaged_cache_is_measured_again(only, tmp_path, caplog):
    only(fake("slow", slow), fake("quick", attend))
    choose(SHAPE, "cpu", backward=False)
    (file,) = (tmp_path / "cache" / "attention").glob("*.json")
    file.unlink()
    api.forget()
    assert choose(SHAPE, "cpu", backward=False).measured
    for damage in ('{"version": 2, "choi', '{"version": 2}', '{"version": 2, "choices": {"x": {}}}', "[]"):
        file.write_text(damage)
        api.forget()
        assert choose(SHAPE, "cpu", backward=False).measured
    assert "damaged" in caplog.text
    api.forget()
    assert not choose(SHAPE, "cpu", backward=False).measured


def test_a_new_version_is_measured_again(only, monkeypatch):
    only(fake("slow", slow), fake("quick", attend))
    choose(SHAPE, "cpu", backward=False)
    have = choice.software(torch.device("cpu"))
    assert have["torch"] == torch.__version__
    monkeypatch.setattr(choice, "software", lambda _: {**have, "flash-attn-4": "5.0"})
    api.forget()
    assert choose(SHAPE, "cpu", backward=False).measured
    monkeypatch.setattr(choice, "software", lambda _: have)
    api.forget()
    assert not choose(SHAPE, "cpu", backward=False).measured


def test_a_package_that_is_mended_is_tried_again(only):
    broken = fake("fast", attend, fits=lambda *_, **__: Skip("fast does not import: OSError: libfast.so"))
    only(broken, fake("slow", slow))
    assert choose(SHAPE, "cpu", backward=False).impl == "slow"
    api.forget()
    only(fake("fast", attend), fake("slow", slow))
    assert choose(SHAPE, "cpu", backward=False).impl == "fast"


def test_a_stored_choice_that_is_gone_is_measured_again(only):
    only(fake("slow", slow), fake("gone", attend))
    assert choose(SHAPE, "cpu", backward=False).impl == "gone"
    only(fake("slow", slow), fake("here", attend))
    api.forget()
    found = choose(SHAPE, "cpu", backward=False)
    assert (found.impl, found.measured) == ("here", True)


def test_an_unwritable_cache_costs_no_answer(only, monkeypatch, tmp_path, caplog):
    only(fake("slow", slow), fake("quick", attend))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KERNEL_PYTORCH_CACHE", str(tmp_path / "file"))
    assert choose(SHAPE, "cpu", backward=False).impl == "quick"
    assert "cannot keep" in caplog.text


@pytest.mark.slow
def test_two_processes_write_one_file(tmp_path):
    code = (
        "import sys, torch\n"
        "from kernel_pytorch.attention import AttentionShape, choose\n"
        "for n in map(int, sys.argv[1:]):\n"
        "    choose(AttentionShape(1, n, n, 8, 8, 8, torch.float32), 'cpu', backward=False)\n"
    )
    runs = [
        subprocess.Popen([sys.executable, "-W", "ignore", "-c", code, *map(str, range(start, start + 6))])
        for start in (1, 7)
    ]
    assert [run.wait(120) for run in runs] == [0, 0]
    (file,) = (tmp_path / "cache" / "attention").glob("*.json")
    assert len(json.loads(file.read_text())["choices"]) == 12
    assert {p.suffix for p in file.parent.iterdir()} == {".json", ".lock"}


def test_lower_precision_is_never_chosen_and_runs_by_name(only):
    coarse = fake(
        "coarse",
        lambda q, k, v, **kw: attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), **kw).to(q.dtype),
        rank=-1,
        numerics=Numerics.LOWER_PRECISION,
    )
    only(fake("slow", slow), coarse)
    found = choose(SHAPE, "cpu", backward=False)
    assert found.impl == "slow"
    assert "lower precision" in found.skipped["coarse"].reason
    q = torch.randn(2, 2, 24, 8)
    assert not torch.equal(api.attention(q, q, q, impl="coarse"), api.attention(q, q, q, impl="slow"))


def test_a_costly_one_takes_part_only_alone(only):
    def unfit(*_, **__):
        return Skip("no window")

    only(fake("costly", attend, rank=1), fake("slow", slow))
    assert choose(SHAPE, "cpu", backward=False).impl == "slow"
    only(fake("costly", attend, rank=1), fake("slow", slow, fits=unfit))
    api.forget()
    assert choose(replace(SHAPE, window=(3, 3)), "cpu", backward=False).impl == "costly"


def test_nothing_applies(only):
    only(fake("none", attend, fits=lambda *_, **__: Skip("not today")))
    with pytest.raises(AttentionError, match=r"nothing computes .* none: not today"):
        choose(SHAPE, "cpu", backward=False)


def test_a_build_without_backward_is_found_by_running_it(only):
    only(fake("fa3", lambda q, k, v, **_: NoBackward.apply(q, k, v)), fake("slow", slow))
    assert unsupported("fa3", SHAPE, "cpu", backward=False) is None
    skip = unsupported("fa3", SHAPE, "cpu", backward=True)
    assert "does not support backward" in skip.reason
    assert "file.cpp" not in skip.reason
    assert choose(SHAPE, "cpu", backward=True).impl == "slow"
    q = torch.randn(2, 2, 24, 8, requires_grad=True)
    with pytest.raises(AttentionError, match="does not support backward"):
        api.attention(q, q, q, is_causal=True, impl="fa3")
    with torch.no_grad():
        api.attention(q, q, q, is_causal=True, impl="fa3")


def test_a_wrong_diagonal_is_found_by_its_result(only):
    only(fake("askew", upper_left_whatever_is_asked))
    asked = replace(SHAPE, kv_len=40, alignment="lower_right")
    assert "is wrong" in unsupported("askew", asked, "cpu", backward=False).reason
    assert unsupported("askew", SHAPE, "cpu", backward=False) is None


def test_a_wrong_gradient_is_found_by_its_result(only):
    only(fake("askew", lambda q, k, v, **_: WrongGradient.apply(q, k, v)))
    assert unsupported("askew", SHAPE, "cpu", backward=False) is None
    skip = unsupported("askew", SHAPE, "cpu", backward=True)
    assert "relative error 0.1 in the gradient of k" in skip.reason


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_wrong(only, value):
    def spoilt(*args, **kwargs):
        out = attend(*args, **kwargs)
        out[0, 0, 5, 0] = value
        return out

    only(fake("spoilt", spoilt))
    assert "is wrong" in unsupported("spoilt", SHAPE, "cpu", backward=False).reason


def test_probing_runs_once_and_leaves_the_random_state(only):
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        torch.rand(3)
        return attend(*args, **kwargs)

    only(fake("counted", counted))
    state = torch.get_rng_state()
    for _ in range(3):
        assert unsupported("counted", SHAPE, "cpu", backward=True) is None
    assert len(calls) == 1
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_the_definition_passes_its_own_probe(packed, backward):
    shape = AttentionShape(3, 6, 2, 40, 40, 8, torch.bfloat16, is_causal=True, packed=packed, alignment="lower_right")
    assert unsupported("math", shape, "cpu", backward=backward) is None
    assert probe._known


def test_cache_directory(monkeypatch, tmp_path):
    assert cache_directory() == tmp_path / "cache"
    monkeypatch.delenv("KERNEL_PYTORCH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache_directory() == tmp_path / "kernel_pytorch"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_directory() == Path.home() / "Library" / "Caches" / "kernel_pytorch"


def test_classes_of_shapes():
    name = AttentionShape(3, 32, 8, 3000, 3000, 128, is_causal=True).shape_class()
    assert name == "bfloat16 b4 h32:8 d128:128 s4096 causal"
    # One token on a cache sees all of it; keys beyond the last query of an upper-left mask are seen by none.
    assert AttentionShape(1, 2, 2, 1, 50, 8, is_causal=True, alignment="lower_right").shape_class().endswith("full")
    assert "s32 causal" in AttentionShape(1, 2, 2, 20, 50, 8, is_causal=True).shape_class()
    windowed = AttentionShape(1, 2, 2, 64, 80, 8, window=(8, None), alignment="lower_right", softcap=3.0, dropout=0.1)
    assert windowed.shape_class() == "bfloat16 b1 h2:2 d8:8 q64 kv128 full window 8: lower_right softcap dropout"


@pytest.mark.parametrize("compiled", [False, True])
def test_a_combination_asked_for_by_name_computes_calls_without_gradients_too(only, compiled):
    def needs_gradients(shape, device, *, backward):
        return None if backward else Skip("without gradients this is the other")

    both = replace(fake("one+two", attend, fits=needs_gradients), forward="one")
    only(fake("one", attend), both)
    q, k, v = (torch.randn(SHAPE.batch, SHAPE.heads, SHAPE.q_len, SHAPE.head_dim) for _ in range(3))

    def run(q):
        return api.attention(q, k, v, is_causal=True, impl="one+two")

    call = torch.compile(run, backend="eager", fullgraph=True) if compiled else run
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.allclose(call(q), want, atol=1e-5)
    learnt = q.clone().requires_grad_()
    call(learnt).sum().backward()
    assert learnt.grad is not None
    with torch.no_grad():
        assert torch.allclose(call(learnt), want, atol=1e-5)
