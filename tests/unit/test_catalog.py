"""The catalog: every transform is whole, found by name, applied in order, and honest about where it does not apply."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

from kernel_pytorch.catalog import TRANSFORMS, apply_candidate, find
from kernel_pytorch.core.program import begin
from kernel_pytorch.core.protocols import Transform
from kernel_pytorch.core.types import (
    Candidate,
    DeviceSpec,
    Mode,
    Numerics,
    OperatorShare,
    Prediction,
    Skip,
    Step,
    TensorSignature,
    WorkloadSpec,
)
from kernel_pytorch.core.workload import Call
from kernel_pytorch.errors import CandidateError

CPU = DeviceSpec(
    vendor="cpu",
    name="a CPU",
    arch="x86_64",
    memory_bytes=1 << 33,
    num_devices=4,
    features=("avx512_bf16", "cxx_compiler"),
    peak_flops={"float32": 1e11, "bfloat16": 3e11},
    bandwidth_bytes_per_s=2e10,
    software={},
)
GPU = dataclasses.replace(
    CPU,
    vendor="nvidia",
    arch="sm_90",
    features=("cxx_compiler", "tf32"),
    peak_flops={"float32": 6e13, "bfloat16": 9e14},
)
BERT = WorkloadSpec(
    name="bert",
    fingerprint="f",
    mode=Mode.INFERENCE,
    signatures={"main": (TensorSignature((2, 8), "int64"),)},
    weights={"main": 1.0},
    parameters=10,
    parameter_bytes=40,
    buffer_bytes=0,
    dtypes=("float32",),
    modules={"Linear": 6, "BertSelfAttention": 3, "LayerNorm": 4},
    blocks={"BertLayer": 3},
    operators={"aten.linear": 6, "aten._scaled_dot_product_flash_attention_for_cpu": 3},
)
PREDICTION = Prediction(
    baseline_ms=100.0,
    floor_ms=40.0,
    flops=5e9,
    bytes=1e8,
    shares=(
        OperatorShare("matmul", 0.6, 6, 5e9, 1e8),
        OperatorShare("attention", 0.2, 3, 5e8, 1e7),
        OperatorShare("elementwise", 0.15, 20, 0.0, 1e8),
        OperatorShare("overhead", 0.05, 0, 0.0, 0.0),
    ),
    ceilings={},
)


def test_every_transform_is_whole_and_named_once() -> None:
    names = [t.name for t in TRANSFORMS]
    assert len(set(names)) == len(names)
    for transform in TRANSFORMS:
        assert isinstance(transform, Transform)
        assert transform.summary
        assert isinstance(transform.numerics, Numerics)
        assert transform.modes <= set(Mode)


def test_find_names_what_looks_alike() -> None:
    assert find("compile").name == "compile"
    with pytest.raises(CandidateError, match="compil") as caught:
        find("compil")
    assert "compile" in caught.value.fix


@pytest.mark.parametrize("device", [CPU, GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize("mode", list(Mode))
def test_proposals_are_steps_of_their_own_or_a_reason(device: DeviceSpec, mode: Mode) -> None:
    workload = dataclasses.replace(BERT, mode=mode)
    for transform in TRANSFORMS:
        if device is GPU and transform.name.startswith("quantize"):
            continue  # its probe runs on the device
        proposed = transform.propose(workload, device)
        if isinstance(proposed, Skip):
            assert proposed.reason
            continue
        assert proposed
        assert mode in transform.modes
        for step in proposed:
            assert step.transform == transform.name
            assert find(step.transform).group == transform.group
            bound = transform.ceiling(step, PREDICTION, device)
            assert bound >= 1.0 or device is CPU
            assert not math.isnan(bound)
            compile(plain(transform, step), "source", "exec")


def plain(transform: Transform, step: Step) -> str:
    """Return the step as source; where it has none, a comment of what to use instead, which there must be."""
    try:
        return transform.source(step)
    except CandidateError as error:
        return f"# {error.fix}" if error.fix else "no way out("


def test_proposals_follow_the_device_and_the_model() -> None:
    labels = {t.name: t.propose(BERT, CPU) for t in TRANSFORMS if not t.name.startswith("quantize")}
    assert labels["dtype"] == [
        Step("dtype", {"to": "bfloat16", "how": "cast"}),
        Step("dtype", {"to": "bfloat16", "how": "autocast"}),
    ]
    assert labels["attention"] == [Step("attention", {"backend": "math"})]
    assert labels["regional_compile"] == [Step("regional_compile", {"block": "BertLayer"})]
    assert isinstance(labels["channels_last"], Skip)
    assert isinstance(labels["fused_optimizer"], Skip)
    gpu = [str(s) for s in find("compile").propose(BERT, GPU)]
    assert "compile(mode=reduce-overhead)" in gpu
    assert Step("dtype", {"to": "tf32"}) in find("dtype").propose(BERT, GPU)
    training = dataclasses.replace(BERT, mode=Mode.TRAINING)
    assert find("dtype").propose(training, CPU) == [Step("dtype", {"to": "bfloat16", "how": "autocast"})]
    assert isinstance(find("prepack").propose(training, CPU), Skip)


def test_a_missing_compiler_is_told_with_its_fix() -> None:
    bare = dataclasses.replace(CPU, features=("avx512_bf16",))
    for name in ("compile", "regional_compile", "aoti"):
        skip = find(name).propose(BERT, bare)
        assert isinstance(skip, Skip)
        assert skip.fix == "apt-get install g++"


def test_a_missing_torchao_is_told_with_its_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    skip = find("quantize_int8_dynamic").probe(CPU)
    assert skip == Skip("torchao is not installed", fix="pip install torchao")


def test_float8_says_what_it_needs() -> None:
    pytest.importorskip("torchao")
    skip = find("quantize_float8_dynamic").probe(CPU)
    assert skip is not None
    assert "float8" in skip.reason


def test_ceilings_are_amdahl() -> None:
    compile_bound = find("compile").ceiling(Step("compile"), PREDICTION, CPU)
    # matmul needs 50 ms at the peak rate, attention 5 ms, the rest may vanish
    assert compile_bound == pytest.approx(1 / (0.5 + 0.05))
    cast = Step("dtype", {"to": "bfloat16", "how": "cast"})
    bound = find("dtype").ceiling(cast, PREDICTION, CPU)
    assert bound == pytest.approx(1 / (0.5 / 3 + 0.05 / 3 + 0.075 + 0.05))
    no_hardware = dataclasses.replace(CPU, features=(), peak_flops={"float32": 1e11, "bfloat16": 2e10})
    assert find("dtype").ceiling(cast, PREDICTION, no_hardware) < 1.3
    assert find("fused_optimizer").ceiling(Step("fused_optimizer"), PREDICTION, CPU) == pytest.approx(1 / 0.95)


def program(mode: Mode = Mode.INFERENCE):
    model = nn.Sequential(nn.Linear(4, 4))
    return begin(model.eval(), mode, {"main": Call((torch.ones(1, 4),))})


def test_candidates_are_applied_in_the_order_of_the_catalog() -> None:
    applied = apply_candidate(program(), Candidate((Step("threads", {"count": 1}), Step("prepack"))))
    assert len(applied.undo) == 1
    with torch.no_grad():
        assert applied.call(torch.ones(1, 4)).shape == (1, 4)


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ((Step("nothing"),), "no transform is called"),
        ((Step("prepack"), Step("int8_eager", {"scales": "channel"})), "more than one step of the group weights"),
        ((Step("compile", {"mode": "fast"}),), "unknown mode"),
        ((Step("dtype", {"to": "int3", "how": "cast"}),), "unknown step"),
        ((Step("threads", {"count": 0}),), "1 or more"),
        ((Step("attention", {"backend": "magic"}),), "unknown step"),
        ((Step("attention", {"implementation": "sdpa"}),), "not a Hugging Face model"),
        ((Step("int8_eager", {"scales": "none"}),), "unknown scales"),
        ((Step("regional_compile", {"block": "Nope"}),), "no module of class"),
        ((Step("fused_optimizer", {"implementation": "fused"}),), "not for inference"),
        ((Step("prepack"), Step("compile", {"mode": "default"})), "cannot follow prepack"),
        ((Step("int8_eager", {"scales": "channel"}), Step("aoti")), "cannot follow int8_eager"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(steps: tuple[Step, ...], words: str) -> None:
    with pytest.raises(CandidateError, match=words):
        apply_candidate(program(), Candidate(steps))


def test_training_keeps_its_parameters() -> None:
    with pytest.raises(CandidateError, match="use how=autocast"):
        apply_candidate(program(Mode.TRAINING), Candidate((Step("dtype", {"to": "bfloat16", "how": "cast"}),)))
    with pytest.raises(CandidateError, match="for inference"):
        apply_candidate(program(Mode.TRAINING), Candidate((Step("compile", {"freezing": True}),)))
