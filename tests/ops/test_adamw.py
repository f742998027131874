"""AdamW: the definition is PyTorch's, and the kernels keep to fp64 over many steps, on awkward tensors."""

from __future__ import annotations

import re

import pytest
import torch

from kernel_pytorch.core.types import Skip
from kernel_pytorch.ops import adamw
from kernel_pytorch.ops.adamw import reference
from kernel_pytorch.ops.adamw.shapes import AWKWARD, many_small, transformer

from .conftest import run_interpreted

HYPER = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


def test_kernels_under_the_interpreter() -> None:
    run_interpreted(__file__)


class Set:
    """Parameters with their states and, at each step, fresh gradients of very different sizes."""

    def __init__(self, shapes=AWKWARD, dtype=FP32, states=None, device="cpu") -> None:
        generator = torch.Generator().manual_seed(1)
        self.params = [torch.randn(s, generator=generator).to(dtype).to(device) for s in shapes]
        self.exp_avgs = [torch.zeros_like(p, dtype=states or dtype) for p in self.params]
        self.exp_avg_sqs = [torch.zeros_like(p, dtype=states or dtype) for p in self.params]
        self.steps = [torch.zeros((), device=device) for _ in self.params]

    def grads(self, step: int, dtype=None) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(100 + step)
        scales = torch.logspace(-4, 1, len(self.params))
        return [
            (torch.randn(p.shape, generator=generator) * scale).to(dtype or p.dtype).to(p.device)
            for p, scale in zip(self.params, scales.tolist(), strict=True)
        ]

    def clone(self, dtype=None) -> Set:
        other = Set.__new__(Set)
        for name in ("params", "exp_avgs", "exp_avg_sqs", "steps"):
            target = None if name == "steps" else dtype
            setattr(other, name, [x.to(target or x.dtype, copy=True) for x in getattr(self, name)])
        return other

    @property
    def lists(self) -> tuple[list[torch.Tensor], ...]:
        return self.exp_avgs, self.exp_avg_sqs, self.steps

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [*self.params, *self.exp_avgs, *self.exp_avg_sqs]


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    if not want.numel():
        return 0.0
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-300))


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_the_definition_is_that_of_pytorch(kind: type[torch.optim.Adam], maximize: bool) -> None:
    mine, theirs = Set(dtype=FP64), Set(dtype=FP64)
    optimizer = kind([torch.nn.Parameter(p) for p in theirs.params], **HYPER, maximize=maximize, foreach=False)
    for i in range(20):
        grads = mine.grads(i)
        for p, g in zip(optimizer.param_groups[0]["params"], grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
        reference.step(mine.params, grads, *mine.lists, **HYPER, maximize=maximize, decoupled=kind is torch.optim.AdamW)
    for p, q in zip(mine.params, optimizer.param_groups[0]["params"], strict=True):
        assert error(p, q.detach()) < 1e-14


def test_a_named_implementation_does_not_fall_back() -> None:
    mine = Set()
    reason = adamw.unsupported(mine.params[0], *(x[0] for x in (mine.grads(0), *mine.lists)))
    assert isinstance(reason, Skip)
    with pytest.raises(ValueError, match="cuda"):
        adamw.step(mine.params, mine.grads(0), *mine.lists, impl="triton")
    with pytest.raises(ValueError, match="unknown impl"):
        adamw.step(mine.params, mine.grads(0), *mine.lists, impl="cuda")


@pytest.mark.parametrize(
    ("changed", "words"),
    [({"betas": (1.0, 0.9)}, "betas"), ({"eps": -1.0}, "eps"), ({"weight_decay": -0.1}, "weight_decay")],
)
def test_hyper_parameters_out_of_range_are_told(changed: dict[str, object], words: str) -> None:
    mine = Set()
    with pytest.raises(ValueError, match=words):
        adamw.step(mine.params, mine.grads(0), *mine.lists, **{**HYPER, **changed})
    with pytest.raises(ValueError, match="one entry a parameter"):
        adamw.step(mine.params, mine.grads(0)[1:], *mine.lists)


def test_without_a_gpu_the_definition_runs_and_masters_are_what_is_updated() -> None:
    mine = Set(dtype=BF16)
    masters = [p.float() for p in mine.params]
    adamw.step(mine.params, mine.grads(0), *mine.lists, masters=masters, **HYPER)
    for p, master in zip(mine.params, masters, strict=True):
        assert torch.equal(p, master.to(BF16))
    assert any(not torch.equal(p.float(), master) for p, master in zip(mine.params, masters, strict=True))


def test_shapes_of_the_benchmarks() -> None:
    llama = transformer(32, vocab=128256)
    assert sum(torch.Size(s).numel() for s in llama) == 8_030_261_248
    small = many_small(1_000_000)
    assert 1_000_000 <= sum(s[0] for s in small) < 1_100_000


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize(("weight_decay", "maximize"), [(0.1, False), (0.0, True)])
def test_twenty_steps_keep_to_fp64(interpreter: None, decoupled: bool, weight_decay: float, maximize: bool) -> None:
    mine = Set()
    wide = mine.clone(FP64)
    hyper = {**HYPER, "weight_decay": weight_decay, "maximize": maximize, "decoupled": decoupled}
    tables = adamw.Tables()
    for i in range(20):
        lr = 3e-3 * (i + 1) / 20
        adamw.step(mine.params, mine.grads(i), *mine.lists, **{**hyper, "lr": lr}, tables=tables, impl="triton")
        reference.step(wide.params, [g.double() for g in mine.grads(i)], *wide.lists, **{**hyper, "lr": lr})
    assert [float(s) for s in mine.steps] == [20.0] * len(mine.steps)
    for got, want in zip(mine.tensors, wide.tensors, strict=True):
        assert error(got, want) < 1e-6


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round as the interpreter does: it cuts bf16, which GPUs round to nearest even (see the test of PTX)."""
    return (x.view(torch.int32) & -65536).view(FP32).to(BF16) if dtype is BF16 else x.to(dtype)


@pytest.mark.parametrize(("dtype", "states", "grads"), [(BF16, BF16, BF16), (BF16, FP32, FP32), (torch.float16,) * 3])
def test_each_step_rounds_once(interpreter: None, dtype: torch.dtype, states: torch.dtype, grads: torch.dtype) -> None:
    """Against the definition in fp32 from the same stored state: equal but where fp32 noise decides."""
    mine = Set(dtype=dtype, states=states)
    tables, off, total = adamw.Tables(), 0, 0
    for i in range(5):
        wanted = mine.clone(FP32)
        reference.step(wanted.params, mine.grads(i, grads), *wanted.lists, **HYPER)
        adamw.step(mine.params, mine.grads(i, grads), *mine.lists, **HYPER, tables=tables, impl="triton")
        for got, exact in zip(mine.tensors, wanted.tensors, strict=True):
            want = rounded(exact, got.dtype)
            assert torch.allclose(got.float(), want.float(), rtol=2 * torch.finfo(got.dtype).eps, atol=1e-6)
            if got.dtype is not FP32:
                off, total = off + int((got != want).sum()), total + got.numel()
    assert off <= total * 1e-3


@pytest.mark.parametrize(("label", "accesses"), [("bf16", 7), ("fp32", 14)])
def test_machine_code_has_wide_accesses_and_rounds_to_nearest(label: str, accesses: int) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from kernel_pytorch._triton.targets import TARGETS, compile_case
    from kernel_pytorch.ops.adamw.adamw_kernel import COMPILE_CASES

    case = next(c for c in COMPILE_CASES if c.label == label)
    ptx = compile_case(case, next(t for t in TARGETS if t.name == "sm_90")).asm["ptx"]
    assert len(re.findall(r"(?:ld|st)\.global\S*\.v4\.b32", ptx)) == accesses
    assert set(re.findall(r"cvt\.(\w+)\.bf16(?:x2)?\.f32", ptx)) <= {"rn"}


def test_first_step_has_exact_bias_correction(interpreter: None) -> None:
    """In fp32 `1 - 0.999` is off by 5e-5, and so would be every first step."""
    mine = Set(shapes=((4096,),))
    before = mine.params[0].double()
    grad = torch.full((4096,), 0.37)
    adamw.step(mine.params, [grad], *mine.lists, lr=1.0, betas=(0.9, 0.9999), eps=0.0, weight_decay=0.0, impl="triton")
    assert error(before - mine.params[0].double(), torch.ones(4096)) < 1e-6


def test_master_copies(interpreter: None) -> None:
    mine = Set(dtype=BF16)
    masters = [p.float() for p in mine.params]
    wide, tables = mine.clone(FP64), adamw.Tables()
    mine.exp_avgs, mine.exp_avg_sqs = ([torch.zeros_like(m) for m in masters] for _ in range(2))
    for i in range(20):
        grads = mine.grads(i)
        adamw.step(mine.params, grads, *mine.lists, masters=masters, **HYPER, tables=tables, impl="triton")
        reference.step(wide.params, [g.double() for g in grads], *wide.lists, **HYPER)
    for p, master, want in zip(mine.params, masters, wide.params, strict=True):
        assert torch.equal(p, rounded(master, BF16))
        assert error(master, want) < 1e-6


def test_misaligned_and_permuted_tensors(interpreter: None) -> None:
    storage = torch.randn(5000)
    params = [storage[1:4501].view(45, 100), torch.randn(6, 8, 5, 5).to(memory_format=torch.channels_last)]
    guards = storage[:1].clone(), storage[4501:].clone()
    wide = [p.double() for p in params]
    mine = (
        [torch.zeros_like(p) for p in params],
        [torch.zeros_like(p) for p in params],
        [torch.zeros(()) for _ in params],
    )
    theirs = [torch.zeros_like(p) for p in wide], [torch.zeros_like(p) for p in wide], [torch.zeros(()) for _ in params]
    for _ in range(3):
        grads = [torch.randn_like(p) for p in params]
        adamw.step(params, grads, *mine, **HYPER, impl="triton")
        reference.step(wide, [g.double() for g in grads], *theirs, **HYPER)
    assert all(error(p, q) < 1e-6 for p, q in zip(params, wide, strict=True))
    assert torch.equal(storage[:1], guards[0])
    assert torch.equal(storage[4501:], guards[1])


def test_tables_follow_new_addresses_new_sets_and_a_learning_rate_in_a_tensor(interpreter: None) -> None:
    mine, tables = Set(), adamw.Tables()
    wide, kept = mine.clone(FP64), []
    lr = torch.tensor(1e-2)
    for i in range(6):
        grads = mine.grads(i)
        kept.append(grads)  # so that each step's gradients have other addresses
        some = slice(0, 4) if i == 3 else slice(None)
        if i == 4:
            mine.exp_avgs = [x.clone() for x in mine.exp_avgs]
        lr.mul_(0.5)
        chosen = [x[some] for x in (mine.params, grads, *mine.lists)]
        adamw.step(*chosen, **{**HYPER, "lr": lr}, tables=tables, impl="triton")
        exact = [x[some] for x in (wide.params, [g.double() for g in grads], *wide.lists)]
        reference.step(*exact, **{**HYPER, "lr": float(lr)})
    for got, want in zip(mine.params, wide.params, strict=True):
        assert error(got, want) < 1e-6
    assert len(tables.by_kind) == 1


def test_writes_raise_the_version_counters(interpreter: None) -> None:
    mine = Set(shapes=((8,),))
    before = [x._version for x in (*mine.tensors, *mine.steps)]
    adamw.step(mine.params, mine.grads(0), *mine.lists, impl="triton")
    assert all(x._version > v for x, v in zip((*mine.tensors, *mine.steps), before, strict=True))


def test_the_chunks_are_listed_once_a_set_of_gradients(interpreter: None) -> None:
    mine, tables, kept = Set(), adamw.Tables(), []
    for i in range(3):
        some = slice(None) if i < 2 else slice(5, None)
        chosen = [x[some] for x in (mine.params, mine.grads(i), *mine.lists)]
        adamw.step(*chosen, **HYPER, tables=tables, impl="triton")
        kept.append(next(iter(tables.by_kind.values())).chunks)
    assert kept[1] is kept[0]
    wanted = [[t, n] for t, p in enumerate(mine.params) for n in range(-(-p.numel() // 2048))]
    assert kept[0].T.tolist() == wanted
    assert kept[2].T.tolist() == [[t - 5, n] for t, n in wanted if t >= 5]


@pytest.mark.parametrize("chunk", [256, 512])
def test_any_chunk(interpreter: None, chunk: int) -> None:
    from kernel_pytorch.ops.adamw.op import Entry, Hyper, update

    mine = Set()
    wide, grads = mine.clone(FP64), mine.grads(0)
    entries = [Entry(*row) for row in zip(mine.params, grads, *mine.lists, strict=True)]
    update(entries, [Hyper(**HYPER)], adamw.Tables(), chunk=chunk, block=256, num_warps=1)
    reference.step(wide.params, [g.double() for g in grads], *wide.lists, **HYPER)
    assert all(error(p, q) < 1e-6 for p, q in zip(mine.params, wide.params, strict=True))


def test_what_the_kernel_cannot_take_is_told(interpreter: None) -> None:
    def why(param: torch.Tensor, **changed: torch.Tensor) -> str:
        given = {
            "grad": torch.ones_like(param),
            "exp_avg": torch.ones_like(param),
            "exp_avg_sq": torch.ones_like(param),
        }
        reason = adamw.unsupported(param, **{**given, "step": torch.zeros(()), **changed})
        return "" if reason is None else reason.reason

    p = torch.ones(4, 6)
    assert why(p) == ""
    assert why(p[:, :0]) == ""
    assert "fp32, bf16" in why(p.double())
    assert "differ" in why(p, grad=torch.ones(6, 4).T)
    assert "without gaps" in why(p[:, ::2], **dict.fromkeys(("grad", "exp_avg", "exp_avg_sq"), p[:, ::2]))
    assert "step count" in why(p, step=torch.zeros((), dtype=FP64))
    assert "master" in why(p, master=p.bfloat16())
