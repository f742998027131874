"""Recomputed blocks have the gradients of plain ones, whatever they keep, and keep less."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from kernel_pytorch.advanced_memory.recompute import Recomputed, recompute
from kernel_pytorch.advanced_memory.recompute_blocks import RecomputeBlocks
from kernel_pytorch.advanced_memory.twice import Results
from kernel_pytorch.backends.tpu.steps import trace_step
from kernel_pytorch.core.program import begin, restore, ship
from kernel_pytorch.core.types import Mode, Step
from kernel_pytorch.errors import CandidateError


class Block(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.drop = nn.Dropout(dropout)

    def forward(self, x, *, shift=None):
        q, k, v = self.qkv(x).view(2, 5, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(2, 5, 16)
        x = x + self.drop(self.out(y).relu_())
        return {"x": x if shift is None else x + shift, "unused": y, "name": "block"}


@pytest.fixture
def block():
    torch.manual_seed(0)
    return Block(0.3)


def run(call, module, x, shift):
    for tensor in (x, shift, *module.parameters()):
        tensor.grad = None
    torch.manual_seed(1)
    result = call(x, shift=shift)
    result["x"].square().sum().backward()
    assert result["name"] == "block"
    return [result["x"].detach(), x.grad, shift.grad, *(p.grad for p in module.parameters())]


KEEPS = [(), ("attention:0",), ("product:0",), ("product:1", "attention:0"), ("product:9",)]


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("keep", KEEPS)
def test_values_and_gradients_are_the_plain_ones_bit_for_bit(block, keep, spread):
    x, shift = torch.randn(2, 5, 16, requires_grad=True), torch.randn(16, requires_grad=True)
    plain = run(block, block, x, shift)
    again = run(Recomputed(block, keep, spread=spread), block, x, shift)
    for one, two in zip(plain, again, strict=True):
        assert torch.equal(one, two)


def test_random_numbers_are_kept_and_the_generator_moves_as_before(block):
    x = torch.randn(2, 5, 16, requires_grad=True)
    torch.manual_seed(1)
    block(x)["x"].sum().backward()
    after = torch.rand(1)
    torch.manual_seed(1)
    recompute(block, (), x)["x"].sum().backward()
    assert torch.equal(after, torch.rand(1))


def saved_bytes(call) -> int:
    sizes = {}

    def pack(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = call()
    del result
    return sum(sizes.values())


def test_less_is_kept_and_what_is_named_is_kept_as_well():
    block, x = Block(), torch.randn(2, 5, 16, requires_grad=True)
    inputs = 4 * (x.numel() + sum(p.numel() for p in block.parameters()))
    nothing = saved_bytes(lambda: recompute(block, (), x))
    attention = saved_bytes(lambda: recompute(block, ("attention:0",), x))
    assert nothing == inputs
    assert inputs < attention < saved_bytes(lambda: block(x))


def test_autocast_holds_in_the_second_computation_too(block):
    x, shift = torch.randn(2, 5, 16, requires_grad=True), torch.randn(16, requires_grad=True)

    def under(call):
        def cast(*args, **kwargs):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return call(*args, **kwargs)

        return cast

    plain = run(under(block), block, x, shift)
    again = run(under(lambda *a, **k: recompute(block, (), *a, **k)), block, x, shift)
    for one, two in zip(plain, again, strict=True):
        assert torch.equal(one, two)


def test_weights_cast_by_the_step_are_cast_again_rather_than_kept():
    block, x = Block(), torch.randn(2, 5, 16, requires_grad=True, dtype=torch.bfloat16)

    def step(call):
        cast = {name: p.to(torch.bfloat16) for name, p in block.named_parameters()}
        return torch.func.functional_call(Caller(block, call), {f"block.{n}": t for n, t in cast.items()}, (x,))

    def gradients(call):
        block.zero_grad()
        step(call)["x"].float().square().sum().backward()
        return [p.grad for p in block.parameters()]

    plain = gradients(lambda *a: block(*a))
    again = gradients(lambda *a: recompute(block, (), *a))
    assert all(torch.equal(one, two) for one, two in zip(plain, again, strict=True))
    masters = {p.untyped_storage().data_ptr() for p in block.parameters()}
    kept = set()

    def pack(tensor):
        kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        step(lambda *a: recompute(block, (), *a))
    assert masters <= kept


class Caller(nn.Module):
    def __init__(self, block, call) -> None:
        super().__init__()
        self.block = block
        self.call = call

    def forward(self, *args):
        return self.call(*args)


def test_without_gradients_nothing_is_wrapped(block):
    block.eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        assert torch.equal(recompute(block, (), x)["x"], block(x)["x"])


def test_results_are_named_by_kind_in_order():
    names = []

    def visit(name, op, args, kwargs, run):
        names.append(name)
        return run()

    block, x = Block(0.5), torch.randn(2, 5, 16)
    with Results(visit):
        block(x)
    assert names == ["product:0", "attention:0", "product:1", "random:0"]


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)["x"]
        return x


def program(model):
    return begin(model, Mode.TRAINING, {}, loss=lambda m, x: m(x).square().mean())


@pytest.mark.parametrize("plain", [0, 1])
def test_the_transform_routes_all_but_the_last_blocks_and_is_undone(plain):
    model, x = Stack(), torch.randn(2, 5, 16)
    model(x).square().mean().backward()
    want = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    done = RecomputeBlocks().apply(program(model), Step("recompute", {"block": "Block", "keep": "", "plain": plain}))
    routed = [b._compiled_call_impl is not None for b in model.blocks]
    assert routed == [True] * (3 - plain) + [False] * plain
    ship(done, model)
    model(x).square().mean().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), want, strict=True))
    restore(model)
    assert not any(b._compiled_call_impl is not None for b in model.blocks)


@pytest.mark.parametrize(("block", "said"), [("Nothing", "no module of class"), ("Stack", "is the model itself")])
def test_blocks_that_are_none_are_refused(block, said):
    with pytest.raises(CandidateError, match=said):
        RecomputeBlocks().apply(program(Stack()), Step("recompute", {"block": block, "keep": "", "plain": 0}))


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x):
        return self.norm(x)


def test_a_module_that_writes_its_buffers_is_refused_in_training_and_runs_in_evaluation():
    module, x = Normed(), torch.randn(4, 8, requires_grad=True)
    with pytest.raises(CandidateError, match="would write them twice"):
        recompute(module, (), x)
    assert torch.equal(recompute(module.eval(), (), x), module(x))


def test_a_traced_step_refuses_it_too():
    model = nn.Sequential(nn.Sequential(Normed(), nn.Linear(8, 8)), nn.Sequential(Normed(), nn.Linear(8, 8)))
    done = RecomputeBlocks().apply(program(model), Step("recompute", {"block": "Normed", "keep": "", "plain": 0}))
    with pytest.raises(CandidateError, match="would write them twice"):
        trace_step(done, torch.randn(4, 8), device="cpu")
