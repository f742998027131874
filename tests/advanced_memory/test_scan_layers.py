"""Blocks in a loop have the losses and gradients of plain ones, hold less, and refuse what is no loop."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from kernel_pytorch.advanced_memory.scan_layers import ScanLayers
from kernel_pytorch.backends.tpu.steps import trace_step
from kernel_pytorch.core.blocks import runs_of
from kernel_pytorch.core.program import begin, restore, ship
from kernel_pytorch.core.types import DeviceSpec, Mode, Skip, Step, WorkloadSpec
from kernel_pytorch.errors import CandidateError

LAYERS = 4
scan = torch.ops.higher_order.scan


class Block(nn.Module):
    def __init__(self, number: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        self.number = number
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16, bias=False)
        self.drop = nn.Dropout(dropout)
        self.register_buffer("scale", torch.tensor(0.5 + number))

    def forward(self, x, shift=None, *, flag=True):
        q, k, v = self.qkv(x).view(2, 5, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(2, 5, 16)
        x = x + self.drop(self.out(y).relu_()) * self.scale
        return x if shift is None else x + shift


class Stack(nn.Module):
    def __init__(self, make=Block, layers: int = LAYERS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(make(i) for i in range(layers))
        self.shift = nn.Parameter(torch.randn(16))

    def forward(self, x):
        for block in self.blocks:
            x = block(x, self.shift)
        return x


def loss(model, x):
    return model(x).square().mean()


def scanned(model, **params):
    step = Step("scan_layers", {"block": "Block", "keep": "", "plain": 0, **params})
    program = ScanLayers().apply(begin(model, Mode.TRAINING, {}, loss=loss), step)
    return program, ship(program, model)


def gradients(model, x):
    model.zero_grad()
    value = loss(model, x)
    value.backward()
    return [value.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("plain", [0, 1])
@pytest.mark.parametrize("keep", ["", "attention:0", "product:1,attention:0"])
def test_losses_and_gradients_are_the_plain_ones(keep, plain):
    model, x = Stack(), torch.randn(2, 5, 16)
    want = gradients(model, x)
    _, model = scanned(model, keep=keep, plain=plain)
    got = gradients(model, x)
    names = ["loss", *(name for name, _ in model.named_parameters())]
    for name, one, two in zip(names, want, got, strict=True):
        if name == "shift":  # what all blocks share: its gradient is a sum over blocks
            torch.testing.assert_close(one, two)
        else:
            assert torch.equal(one, two), name
    restore(model)
    assert not any(b._compiled_call_impl is not None for b in model.blocks)


def test_four_steps_of_an_optimizer_have_the_plain_losses():
    losses = []
    for change in (lambda m: m, lambda m: scanned(m)[1]):
        model = change(Stack())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        torch.manual_seed(1)
        told = []
        for _ in range(4):
            value = loss(model, torch.randn(2, 5, 16))
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            told.append(value.item())
        losses.append(told)
    assert losses[0] == losses[1]
    assert losses[0][0] != losses[0][-1]


def test_the_traced_step_has_two_loops_and_all_their_operations():
    x = torch.randn(2, 5, 16)
    model = Stack()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    plain = trace_step(begin(model, Mode.TRAINING, {}, optimizer=optimizer, loss=loss), x, device="cpu")
    program, _ = scanned(model)
    program.optimizer = optimizer
    step = trace_step(program, x, device="cpu")
    assert len(step.graph.graph.find_nodes(op="call_function", target=scan)) == 2
    again = 2 * 2 * 5 * 16 * 48 + 2 * 2 * 5 * 16 * 16  # the two products of a block
    attention = 2 * 2 * 2 * 2 * 5 * 5 * 8
    # The input's own gradient is not asked for of a plain first block.
    assert plain.flops + LAYERS * (again + attention) <= step.flops
    assert step.flops <= plain.flops + LAYERS * (again + attention) + again


def test_the_traced_step_computes_what_the_plain_one_does():
    model, x = Stack(), torch.randn(2, 5, 16)
    want = gradients(model, x)
    program, _ = scanned(model)
    program.optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    step = trace_step(program, x, device="cpu")
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    given = [x if a.name.startswith("batch") else state[a.name].detach().clone() for a in step.arguments]
    *after, value = step.graph(*given)
    assert torch.allclose(value, want[0], rtol=1e-6)
    changed = [a for a in step.arguments if a.output is not None]
    grads = dict(zip((n for n, _ in model.named_parameters()), want[1:], strict=True))
    assert {a.name for a in changed} == set(grads)
    for argument in changed:
        new = after[argument.output]
        assert torch.allclose(state[argument.name] - new, grads[argument.name], atol=1e-6), argument.name


def test_between_forward_and_backward_less_is_held():
    def held(model):
        sizes = {}

        def pack(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            value = model(x)
        del value
        return sum(sizes.values())

    model, x = Stack(), torch.randn(2, 5, 16)
    parameters = 4 * sum(p.numel() for p in model.parameters())
    before = held(model)
    after = held(scanned(model)[1])
    assert after <= parameters + 4 * x.numel() * LAYERS < before


class Cached(Stack):
    """As transformers models with `use_cache`: each block appends to an object that all are given."""

    def forward(self, x):
        seen = Seen()
        for block in self.blocks:
            x = block(x, self.shift, flag=seen)
        return x


class Seen:
    """What blocks have seen."""

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []


class Appends(Block):
    def forward(self, x, shift=None, *, flag=None):
        flag.tensors.append(x)
        return super().forward(x, shift)


class InTuple(Block):
    def forward(self, x, shift=None):
        return (super().forward(x, shift),)


class Sums(Stack):
    def forward(self, x):
        total = 0
        for block in self.blocks:
            x = block(x)
            total = total + x
        return total


class Turns(Stack):
    def forward(self, x):
        for block in list(self.blocks)[::-1]:
            x = block(x)
        return x


class Shifts(Stack):
    def forward(self, x):
        for i, block in enumerate(self.blocks):
            x = block(x, self.shift * i)
        return x


class Draws(Block):
    def __init__(self, number) -> None:
        super().__init__(number, dropout=0.5)


class Differs(Block):
    def forward(self, x, shift=None):
        return super().forward(x, shift) * (1.0 + self.number)


class Wider(Block):
    def forward(self, x, shift=None):
        return super().forward(x, shift).double()


class Pair(Block):
    def forward(self, x, shift=None):
        return super().forward(x, shift), x


class Writes(Block):
    def forward(self, x, shift=None):
        self.scale.add_(1.0)
        return super().forward(x, shift)


REFUSED = {
    "what lies between": (Sums, Block, "uses what lies between two blocks"),
    "another order": (Turns, Block, "uses what lies between two blocks"),
    "another argument": (Shifts, Block, "block 1 is called with something else"),
    "random numbers": (Stack, Draws, "draws random numbers"),
    "another function": (Stack, Differs, r"block 1 computes something else than the first: 1.0 and 2.0 are given to"),
    "an object": (Cached, Appends, "given a Seen, which they may write"),
    "another dtype": (Stack, Wider, "one tensor like the one it takes"),
    "two results": (Stack, Pair, "one tensor like the one it takes"),
    "buffers": (Stack, Writes, "writes its buffers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_loop_is_refused(case):
    kind, block, said = REFUSED[case]
    program, _ = scanned(kind(block), block=block.__name__)
    with pytest.raises(CandidateError, match=said):
        trace_step(program, torch.randn(2, 5, 16), device="cpu")


def test_blocks_with_hooks_are_refused():
    model = Stack()
    model.blocks[2].qkv.register_forward_hook(lambda *_: None)
    _, model = scanned(model)
    with pytest.raises(CandidateError, match="hooks"):
        model(torch.randn(2, 5, 16))


def test_a_block_that_only_has_another_number_is_in_the_loop_and_results_keep_their_structure():
    class Unpacks(Stack):
        def forward(self, x):
            for block in self.blocks:
                (x,) = block(x, self.shift)
            return x

    model, x = Unpacks(InTuple), torch.randn(2, 5, 16)
    want = gradients(model, x)
    _, model = scanned(model, block="InTuple")
    for one, two in zip(want, gradients(model, x), strict=True):
        assert torch.equal(one, two)


def test_without_gradients_blocks_run_plainly():
    model, x = Stack().eval(), torch.randn(2, 5, 16)
    with torch.no_grad():
        want = model(x)
        model = scanned(model.train())[1].eval()
        assert torch.equal(model(x), want)


def test_runs_are_of_one_structure_and_one_container():
    model = nn.Module()
    model.first = nn.Sequential(Block(), Block(), nn.Linear(16, 16), Block())
    model.second = nn.ModuleList([Block(), Block(), Block()])
    model.second[2].out = nn.Linear(16, 16)
    assert [len(run) for run in runs_of(model, "Block")] == [2, 2]
    shared = Block()
    assert runs_of(nn.ModuleList([shared, shared]), "Block") == []


def device(vendor):
    return DeviceSpec(
        vendor=vendor, name=vendor, arch=vendor, memory_bytes=1, num_devices=1, features=frozenset(), peak_flops={},
        bandwidth_bytes_per_s=1.0, software={},
    )  # fmt: skip


def workload(mode=Mode.TRAINING, **parts):
    empty = {
        "name": "w", "fingerprint": "", "signatures": {}, "weights": {}, "parameters": 1, "parameter_bytes": 4,
        "buffer_bytes": 0, "dtypes": ("float32",), "modules": {}, "blocks": {}, "operators": {}, "devices": ("cpu",),
    }  # fmt: skip
    return WorkloadSpec(mode=mode, **{**empty, **parts})


def test_it_is_proposed_for_blocks_that_repeat_and_says_why_where_it_is_not():
    propose, tpu = ScanLayers().propose, device("tpu")
    blocks = {"Block": LAYERS}
    assert propose(workload(blocks=blocks), tpu) == [Step("scan_layers", {"block": "Block", "keep": "", "plain": 0})]
    for given, where, said in [
        (workload(blocks=blocks), device("cpu"), "has none"),
        (workload(Mode.INFERENCE, blocks=blocks), tpu, "inference"),
        (workload(), tpu, "repeats"),
        (workload(blocks=blocks, operators={"aten.native_dropout": 2}), tpu, "random numbers"),
    ]:
        skip = propose(given, where)
        assert isinstance(skip, Skip)
        assert said in skip.reason


def test_what_cannot_be_applied_or_written_out_is_told():
    with pytest.raises(CandidateError, match="no 2 modules of class 'Nothing'"):
        scanned(Stack(), block="Nothing")
    with pytest.raises(CandidateError, match="plain PyTorch"):
        ScanLayers().source(Step("scan_layers", {"block": "Block"}))
