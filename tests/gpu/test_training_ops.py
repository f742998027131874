"""AdamW and the losses on a GPU: against fp64, beside PyTorch's own, under CUDA graphs and torch.compile."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed")

from kernel_pytorch.core.program import begin, restore, ship
from kernel_pytorch.core.types import Mode, Step
from kernel_pytorch.core.workload import Call
from kernel_pytorch.ops import adamw
from kernel_pytorch.ops.adamw import reference
from kernel_pytorch.ops.adamw.shapes import AWKWARD
from kernel_pytorch.ops.linear_cross_entropy import cross_entropy, linear_cross_entropy
from kernel_pytorch.transforms.adamw import AdamW
from kernel_pytorch.transforms.loss_head import LossHead

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")
BF16, FP32 = torch.bfloat16, torch.float32
HYPER = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.detach().double() - want.detach()).norm() / want.detach().norm().clamp_min(1e-30))


def state(dtype: torch.dtype, shapes=(*AWKWARD, (1000, 3333), (4096, 1024))) -> list[list[torch.Tensor]]:
    torch.manual_seed(0)
    params = [torch.randn(s, device=GPU).to(dtype) for s in shapes]
    return [
        params,
        *([torch.zeros_like(p) for p in params] for _ in range(2)),
        [torch.zeros((), device=GPU) for _ in params],
    ]


def flat(lists: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    return [x for some in lists[:3] for x in some]


def gradients(params: list[torch.Tensor], step: int) -> list[torch.Tensor]:
    torch.manual_seed(100 + step)
    return [torch.randn_like(p) * 10.0 ** (i % 5 - 3) for i, p in enumerate(params)]


def test_fp32_keeps_to_fp64_over_twenty_steps() -> None:
    mine = state(FP32)
    wide = [[x.double() for x in xs] for xs in mine[:3]] + [[s.clone() for s in mine[3]]]
    tables = adamw.Tables()
    for i in range(20):
        grads = gradients(mine[0], i)
        adamw.step(mine[0], grads, *mine[1:], **HYPER, tables=tables, impl="triton")
        reference.step(wide[0], [g.double() for g in grads], *wide[1:], **HYPER)
    for got, want in zip(flat(mine), flat(wide), strict=True):
        assert not want.numel() or error(got, want) < 1e-6


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_each_step_rounds_to_nearest_even(dtype: torch.dtype) -> None:
    mine, tables, off, total = state(dtype), adamw.Tables(), 0, 0
    for i in range(5):
        wanted = [[x.clone() for x in xs] for xs in mine]
        grads = gradients(mine[0], i)
        reference.step(wanted[0], grads, *wanted[1:], **HYPER)
        adamw.step(mine[0], grads, *mine[1:], **HYPER, tables=tables, impl="triton")
        for got, want in zip(flat(mine), flat(wanted), strict=True):
            assert torch.allclose(got, want, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
            off, total = off + int((got != want).sum()), total + got.numel()
    assert off <= total * 1e-3


def net(dtype: torch.dtype = FP32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 1023), nn.GELU(), nn.LayerNorm(1023), nn.Linear(1023, 7)).to(GPU, dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for i in steps:
        torch.manual_seed(i)
        x = torch.randn(32, 64, device=GPU, dtype=next(model.parameters()).dtype)
        optimizer.zero_grad(set_to_none=True)
        model(x).float().square().mean().backward()
        optimizer.step()


def apply(model: nn.Module, optimizer: torch.optim.Optimizer, **params: bool) -> nn.Module:
    program = begin(model, Mode.TRAINING, {"main": Call((torch.ones(1, 64, device=GPU),))}, optimizer=optimizer)
    return ship(AdamW().apply(program, Step("adamw", params)), model)


@pytest.mark.parametrize("flags", [{}, {"fused": True}, {"lr": torch.tensor(1e-2, device=GPU), "fused": True}])
def test_a_transformed_optimizer_trains_as_pytorchs_and_resumes(flags: dict[str, object]) -> None:
    plain, model = net(), net()
    own, mine = (torch.optim.AdamW(m.parameters(), **{"lr": 1e-2, **flags}) for m in (plain, model))
    shipped = apply(model, mine)
    train(plain, own, range(10))
    train(shipped, mine, range(10))
    saved = copy.deepcopy(mine.state_dict())
    mine.load_state_dict(copy.deepcopy(saved))
    train(plain, own, range(10, 15))
    train(shipped, mine, range(10, 15))
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.allclose(p, q, atol=2e-5, rtol=1e-4)
    restore(shipped)
    train(plain, own, range(15, 18))
    train(model, mine, range(15, 18))
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.allclose(p, q, atol=2e-5, rtol=1e-4)


def test_steps_do_not_wait_for_the_gpu() -> None:
    model = net(BF16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    shipped = apply(model, optimizer)
    train(shipped, optimizer, range(2))
    shipped(torch.randn(32, 64, device=GPU, dtype=BF16)).float().square().mean().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_in_a_cuda_graph_reads_what_is_there_at_each_replay() -> None:
    mine = state(FP32, shapes=((4097,), (64, 33)))
    wide = [[x.double() for x in xs] for xs in mine[:3]] + [[s.clone() for s in mine[3]]]
    grads, tables, lr = gradients(mine[0], 0), adamw.Tables(), torch.tensor(1e-2, device=GPU)
    hyper = {**HYPER, "lr": lr}
    adamw.step(mine[0], grads, *mine[1:], **hyper, tables=tables, impl="triton")
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        adamw.step(mine[0], grads, *mine[1:], **hyper, tables=tables, impl="triton")
    reference.step(wide[0], [g.double() for g in grads], *wide[1:], **{**HYPER, "lr": 1e-2})
    for i in range(1, 5):
        for held, fresh in zip(grads, gradients(mine[0], i), strict=True):
            held.copy_(fresh)
        lr.fill_(1e-2 / i)
        if i == 3:
            others = [g.clone() for g in grads]
            adamw.step(mine[0], others, *mine[1:], **hyper, tables=tables, impl="triton")
        else:
            graph.replay()
        reference.step(wide[0], [g.double() for g in grads], *wide[1:], **{**HYPER, "lr": float(lr)})
    for got, want in zip(mine[0], wide[0], strict=True):
        assert error(got, want) < 1e-6
    assert float(mine[3][0]) == 5.0


def test_a_first_step_in_a_cuda_graph_is_refused() -> None:
    mine = state(FP32, shapes=((64,),))
    grads = gradients(mine[0], 0)
    adamw.step(mine[0], grads, *mine[1:], impl="triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="one step before"), torch.cuda.graph(graph):  # noqa: PT012
        grads[0].mul_(1.0)  # an empty graph would warn
        adamw.step(mine[0], grads, *mine[1:], impl="triton")


@pytest.mark.parametrize("columns", [50257, 32000])
@pytest.mark.parametrize(("dtype", "budget"), [(BF16, 2e-2), (torch.float16, 5e-3), (FP32, 3e-3)])
def test_linear_cross_entropy_keeps_to_fp64(dtype: torch.dtype, budget: float, columns: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(1000, 256, device=GPU).to(dtype).requires_grad_()
    weight = (torch.randn(columns, 256, device=GPU) / 16).to(dtype).requires_grad_()
    labels = torch.randint(0, columns, (1000,), device=GPU)
    labels[::7] = -100
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    want = F.cross_entropy(exact[0] @ exact[1].T, labels)
    want.backward()
    for chunk in (1000, 300, 64):
        hidden.grad = weight.grad = None
        got = linear_cross_entropy(hidden, weight, labels, chunk=chunk, impl="triton")
        (got * 0.5).backward()
        assert abs(got.item() - want.item()) < 2e-3
        assert error(2 * hidden.grad, exact[0].grad) < budget
        assert error(2 * weight.grad, exact[1].grad) < budget
    got = cross_entropy(hidden @ weight.T, labels, impl="triton")
    got.backward()
    assert abs(got.item() - want.item()) < 2e-3


def test_linear_cross_entropy_does_not_wait_for_the_gpu_and_saves_memory() -> None:
    hidden = torch.randn(8192, 512, device=GPU, dtype=BF16, requires_grad=True)
    weight = torch.randn(32000, 512, device=GPU, dtype=BF16, requires_grad=True)
    labels = torch.randint(0, 32000, (8192,), device=GPU)

    def step(loss) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        torch.autograd.grad(loss(), (hidden, weight))
        return torch.cuda.max_memory_allocated() - held

    ours = lambda: linear_cross_entropy(hidden, weight, labels, chunk=2048, impl="triton")  # noqa: E731
    step(ours)
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(ours(), (hidden, weight))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    plain = step(lambda: F.cross_entropy((hidden @ weight.T).float(), labels))
    assert step(ours) < plain / 4


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_losses_are_the_same() -> None:
    hidden = torch.randn(256, 64, device=GPU, requires_grad=True)
    weight = torch.randn(1000, 64, device=GPU, requires_grad=True)
    labels = torch.randint(0, 1000, (256,), device=GPU)

    def loss(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(h, w, labels, impl="triton") * 2 + cross_entropy(h @ w.T, labels, impl="triton")

    want = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(hidden, weight), (hidden, weight))
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, atol=1e-5, rtol=1e-3)


def test_loss_head_on_a_hugging_face_model() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=1000, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2
    )
    plain = transformers.LlamaForCausalLM(config).to(GPU, BF16)
    model = copy.deepcopy(plain)
    ids = torch.randint(0, 1000, (2, 64), device=GPU)
    batch = {"input_ids": ids, "labels": ids}
    shipped = ship(LossHead().apply(begin(model, Mode.TRAINING, {"main": Call((), batch)}), Step("loss_head")), model)
    want, got = plain(**batch), shipped(**batch)
    assert torch.equal(want.logits, got.logits)
    assert abs(want.loss.item() - got.loss.item()) < 1e-4
    want.loss.backward()
    got.loss.backward()
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        assert error(q.grad, p.grad.double()) < 2e-2
    restore(shipped)
