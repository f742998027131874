"""A traced step computes what PyTorch computes: its graph is run on real tensors and held against an eager step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernel_pytorch.backends.tpu.steps import Role, StepGraph, TraceError, trace_step
from kernel_pytorch.core.program import begin
from kernel_pytorch.core.protocols import Program
from kernel_pytorch.core.types import Mode
from kernel_pytorch.core.workload import Call


class Net(nn.Module):
    """Tied weights, a buffer that changes, a frozen parameter, and a parameter that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.norm = nn.BatchNorm1d(8)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.frozen = nn.Linear(8, 8)
        self.frozen.requires_grad_(requires_grad=False)
        self.idle = nn.Parameter(torch.ones(3))
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.frozen(self.body(self.norm(self.embed(ids).mean(1)))))


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    ids, target = batch
    return nn.functional.cross_entropy(model(ids), target)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True, weight_decay=0.1),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.5),
}


def program(optimizer: Callable[[Any], torch.optim.Optimizer]) -> Program:
    torch.manual_seed(0)
    model = Net().train()
    trained = [p for p in model.parameters() if p.requires_grad]
    return begin(model, Mode.TRAINING, {}, optimizer=optimizer(trained), loss=loss)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 11, (6, 5), generator=generator), torch.randint(0, 11, (6,), generator=generator)


def values(step: StepGraph, taken: Program, fed: Any) -> list[torch.Tensor]:
    """Return the arguments of the graph out of a program in whatever state it is."""
    state = dict(taken.model.named_parameters()) | dict(taken.model.named_buffers())
    assert taken.optimizer is not None
    found = []
    for argument in step.arguments:
        if argument.role is Role.BATCH:
            found.append(fed[int(argument.name.removeprefix("batch."))])
        elif argument.role is Role.OPTIMIZER:
            name, _, key = argument.name.rpartition(".")
            found.append(taken.optimizer.state[state[name]][key].detach().clone())
        else:
            found.append(state[argument.name].detach().clone())
    return found


def eager_step(taken: Program, fed: Any) -> torch.Tensor:
    assert taken.optimizer is not None
    taken.optimizer.zero_grad(set_to_none=True)
    value = loss(taken.model, fed)
    value.backward()
    taken.optimizer.step()
    return value.detach()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_is_the_eager_step(name: str) -> None:
    taken, fed = program(OPTIMIZERS[name]), batch()
    for group in taken.optimizer.param_groups:  # type: ignore[union-attr]
        group["foreach"] = False
    step = trace_step(taken, fed, device="cpu")
    eager_step(taken, fed)  # the first step makes the optimizer's state
    before = values(step, taken, fed)
    results = step.graph(*before)
    want = eager_step(taken, fed)
    torch.testing.assert_close(results[-1], want, rtol=1e-6, atol=1e-7)
    after = values(step, taken, fed)
    changed = 0
    for argument, new in zip(step.arguments, after, strict=True):
        if argument.output is not None:
            torch.testing.assert_close(results[argument.output], new, rtol=1e-5, atol=1e-6, msg=argument.name)
            changed += 1
    assert changed == sum(a.donated for a in step.arguments) > 5


def test_state_that_changes_is_donated_and_the_rest_is_not() -> None:
    step = trace_step(program(OPTIMIZERS["AdamW"]), batch(), device="cpu")
    named = {a.name: a for a in step.arguments}
    assert named["embed.weight"].donated
    assert "out.weight" not in named  # tied: one argument
    assert named["norm.running_mean"].role is Role.BUFFER
    assert named["norm.running_mean"].donated
    assert not named["frozen.weight"].donated
    assert named["embed.weight.exp_avg"].role is Role.OPTIMIZER
    assert not any(name.startswith("idle") for name in named)  # nothing reads it
    outputs = [a.output for a in step.arguments if a.donated]
    assert sorted(outputs) == list(range(len(outputs)))


def test_a_program_is_left_as_it_was() -> None:
    taken = program(OPTIMIZERS["AdamW"])
    before = {name: (id(p), p.detach().clone(), p.requires_grad) for name, p in taken.model.named_parameters()}
    groups = [dict(g) for g in taken.optimizer.param_groups]  # type: ignore[union-attr]
    trace_step(taken, batch(), device="cpu")
    for name, parameter in taken.model.named_parameters():
        identity, value, wants = before[name]
        assert id(parameter) == identity
        assert torch.equal(parameter, value)
        assert parameter.requires_grad == wants
        assert parameter.grad is None
    assert [dict(g) for g in taken.optimizer.param_groups] == groups  # type: ignore[union-attr]
    assert len(taken.optimizer.state) == 0  # type: ignore[union-attr]


@pytest.mark.parametrize("layer", [nn.GRU(8, 4), nn.utils.parametrizations.weight_norm(nn.Linear(8, 4))])
def test_weights_that_a_layer_reads_by_another_way_are_trained(layer: nn.Module) -> None:
    def squares(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        result = model(x)
        return (result[0] if isinstance(result, tuple) else result).square().mean()

    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    taken, fed = begin(layer, Mode.TRAINING, {}, optimizer=optimizer, loss=squares), torch.randn(3, 2, 8)
    step = trace_step(taken, fed, device="cpu")
    assert {a.name for a in step.arguments if a.donated} == {name for name, _ in layer.named_parameters()}
    state = dict(layer.named_parameters())
    results = step.graph(*(fed if a.role is Role.BATCH else state[a.name].detach().clone() for a in step.arguments))
    squares(layer, fed).backward()
    optimizer.step()
    for argument in step.arguments:
        if argument.output is not None:
            torch.testing.assert_close(results[argument.output], state[argument.name].detach(), msg=argument.name)
    optimizer.zero_grad()


def test_operations_are_counted_by_pytorchs_formulas() -> None:
    model = nn.Linear(32, 16, bias=False)
    taken = begin(
        model,
        Mode.TRAINING,
        {},
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        loss=lambda m, x: m(x).square().mean(),
    )
    step = trace_step(taken, torch.randn(4, 32), device="cpu")
    one = 2 * 4 * 32 * 16
    assert step.flops == 2 * one  # the product, and its weight's gradient; the input needs none
    inference = trace_step(begin(model, Mode.INFERENCE, {}), torch.randn(4, 32), device="cpu")
    assert inference.flops == one


def test_nodes_know_their_module_forward_and_backward() -> None:
    step = trace_step(program(OPTIMIZERS["momentum"]), batch(), device="cpu")
    where = set(step.modules.values())
    assert {"norm", "body.0", "body.1", "frozen", "norm (backward)", "body.0 (backward)", "optimizer SGD"} <= where
    products = {name: module for name, module in step.modules.items() if name.startswith(("mm", "addmm"))}
    assert sum("(backward)" in module for module in products.values()) >= 3
    assert all(module for module in products.values())


def test_a_model_on_meta_is_traced() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(65536, 65536), nn.Linear(65536, 65536))  # 34 GB, were it there
    taken = begin(
        model,
        Mode.TRAINING,
        {},
        optimizer=torch.optim.AdamW(model.parameters()),
        loss=lambda m, x: m(x).square().mean(),
    )
    step = trace_step(taken, torch.empty(2, 65536), device="cpu")
    assert step.state_bytes > 3 * 2 * 4 * 65536**2


def test_control_flow_on_values_is_told_with_its_module() -> None:
    class Branching(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if bool(x.sum() > 0) else -x

    taken = begin(nn.Sequential(nn.Linear(4, 4), Branching()), Mode.INFERENCE, {})
    with pytest.raises(TraceError, match="1 reads a value on the host"):
        trace_step(taken, torch.randn(2, 4), device="cpu")


def test_shapes_that_depend_on_values_offer_buckets() -> None:
    class Picks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[x > 0].sum()

    with pytest.raises(TraceError, match="Picks returns depends on values") as caught:
        trace_step(begin(Picks(), Mode.INFERENCE, {}), torch.randn(2, 4), device="cpu")
    assert "bucket" in caught.value.fix


def test_an_optimizer_that_reads_values_on_the_host_is_named() -> None:
    with pytest.raises(TraceError, match="optimizer Adafactor reads a value on the host"):
        trace_step(program(lambda p: torch.optim.Adafactor(p, lr=1e-2)), batch(), device="cpu")


def test_an_optimizer_with_a_closure_is_refused() -> None:
    with pytest.raises(TraceError, match="LBFGS"):
        trace_step(program(lambda p: torch.optim.LBFGS(p)), batch(), device="cpu")


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Linear(16, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(self.queries(x), x, x, is_causal=True)


def test_operations_of_attention_are_counted_on_the_cpu() -> None:
    model, x = Attends(), torch.randn(2, 3, 32, 16)
    project, product = 2 * (2 * 3 * 32) * 16 * 16, 2 * (2 * 3) * 32 * 32 * 16
    assert trace_step(begin(model, Mode.INFERENCE, {}), x, device="cpu").flops == project + 2 * product
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    training = begin(model, Mode.TRAINING, {}, optimizer=optimizer, loss=lambda m, given: m(given).square().mean())
    # The kernel's backward makes the scores again: five products. The inputs need no gradient of the projection.
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        assert trace_step(training, x, device="cpu").flops == 2 * project + 7 * product


@pytest.mark.parametrize("mode", [Mode.INFERENCE, Mode.TRAINING])
def test_inputs_of_a_call_are_arguments_of_the_step_and_no_constants(mode: Mode) -> None:
    model = nn.Linear(4, 3).train(mode is Mode.TRAINING)
    call = Call((torch.ones(5, 4),))
    given = {"loss": lambda m, batch: m(*batch.args).square().mean(), "optimizer": torch.optim.SGD(model.parameters())}
    traced = trace_step(begin(model, mode, {}, **(given if mode is Mode.TRAINING else {})), call, device="cpu")
    assert [a.shape for a in traced.arguments if a.role is Role.BATCH] == [(5, 4)]
