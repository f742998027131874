"""Descriptions: a hash of structure alone, sizes and operators; and models that nothing can be compared with."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch
from torch import nn

from kernel_pytorch.core.describe import check_model, describe, fingerprint, make_optimizer, training_loss
from kernel_pytorch.core.program import state_digest
from kernel_pytorch.core.types import Mode, TensorSignature
from kernel_pytorch.core.workload import Call, Case, Workload, as_workload
from kernel_pytorch.errors import InputsError, ModelError


class Block(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.first = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x):
        return self.norm(self.first(x))


class Net(nn.Module):
    def __init__(self, blocks=3, width=4, tie=False):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, width)
        if tie:
            self.head.weight = self.blocks[0].first.weight

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def described(model, *args, mode=Mode.INFERENCE, **fields):
    workload = dataclasses.replace(as_workload((model, args)), **fields)
    return describe(workload, model, {"main": workload.call("main", 0)}, mode)


def checked(model, *args, mode=Mode.INFERENCE, **fields):
    workload = dataclasses.replace(as_workload((model, args)), **fields)
    return check_model(workload, model, {"main": workload.call("main", 0)}, mode)


def cast(model):
    model.head.half()
    return model


def grow(model):
    model.blocks.append(Block())
    return model


def more_buffers(model):
    model.register_buffer("extra", torch.zeros(2))
    return model


def rename(model):
    model.tail = model.head
    del model.head
    return model


def swap_class(model):
    model.blocks[1].norm = nn.SyncBatchNorm(4)
    return model


def untie_bias(model):
    model.blocks[1].first.bias = model.blocks[0].first.bias
    return model


@pytest.mark.parametrize("change", [cast, grow, more_buffers, rename, swap_class, untie_bias])
def test_fingerprint_changes_with_structure(change):
    assert fingerprint(change(Net())) != fingerprint(Net())


def test_fingerprint_changes_with_width_and_ties_and_not_with_values_or_mode():
    torch.manual_seed(0)
    first = fingerprint(Net())
    assert first == fingerprint(Net().eval())
    assert first != fingerprint(Net(width=5))
    assert first != fingerprint(Net(tie=True))
    assert fingerprint(Net(tie=True)) == fingerprint(Net(tie=True))
    assert len(first) == 64


def test_fingerprint_of_shared_and_absent_modules_and_lazy_parameters():
    shared = nn.Linear(2, 2)
    assert fingerprint(nn.Sequential(shared, shared)) != fingerprint(nn.Sequential(shared, nn.Linear(2, 2)))
    assert fingerprint(nn.LazyLinear(3)) != fingerprint(nn.LazyLinear(3, bias=False))
    model = nn.Sequential(nn.Linear(2, 2))
    model.register_module("nothing", None)
    model.register_parameter("none", None)
    assert len(fingerprint(model)) == 64


def test_fingerprint_is_the_same_in_another_process():
    code = (
        "from torch import nn\n"
        "from kernel_pytorch.core.describe import fingerprint\n"
        "print(fingerprint(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == fingerprint(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))


def test_describe_counts_sizes_ties_blocks_and_operators():
    model = Net(tie=True).eval()
    spec = described(model, torch.ones(2, 4), name="net")
    assert spec.name == "net"
    assert spec.parameters == 3 * (16 + 4 + 8) + 4
    assert spec.parameter_bytes == 4 * spec.parameters
    assert spec.buffer_bytes == 3 * (2 * 4 * 4 + 8)
    assert spec.dtypes == ("float32",)
    assert spec.modules == {"BatchNorm1d": 3, "Block": 3, "Linear": 4, "ModuleList": 1, "Net": 1}
    assert spec.blocks == {"Block": 3}
    assert spec.operators["aten.addmm"] == 4
    assert spec.operators["aten.native_batch_norm"] == 3
    assert not any("backward" in name for name in spec.operators)
    assert spec.signatures == {"main": (TensorSignature((2, 4), "float32"),)}
    assert spec.weights == {"main": 1.0}
    assert spec.devices == ("cpu",)
    assert spec.in_memory
    assert spec.fingerprint == fingerprint(model)


def test_dtypes_are_ordered_by_bytes():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.small = nn.Parameter(torch.ones(3, dtype=torch.float64))
            self.large = nn.Parameter(torch.ones(100, dtype=torch.bfloat16))
            self.ints = nn.Parameter(torch.ones(1000, dtype=torch.int64), requires_grad=False)

        def forward(self, x):
            return x * self.small.sum() * self.large.sum()

    assert described(Mixed(), torch.ones(2)).dtypes == ("bfloat16", "float64")


def test_blocks_need_one_structure_and_more_than_a_leaf():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(Block(2), Block(2)), nn.ReLU(), nn.ReLU()).eval()
    assert described(model, torch.ones(3, 2)).blocks == {"Block": 2}
    mixed = nn.Sequential(Block(2), nn.Sequential(nn.Linear(2, 3), Block(3)))
    assert described(mixed.eval(), torch.ones(3, 2)).blocks == {}


def test_describing_training_counts_the_backward_and_leaves_the_model_alone():
    model = Net()
    before = state_digest(model)
    generator = torch.get_rng_state()
    spec = described(model, torch.ones(3, 4), mode=Mode.TRAINING, loss=lambda m, batch: m(batch[0]).square().mean())
    assert spec.mode is Mode.TRAINING
    assert spec.operators["aten.native_batch_norm_backward"] == 3
    assert state_digest(model) == before
    assert torch.equal(torch.get_rng_state(), generator)


def test_describing_inference_leaves_a_model_that_writes_its_buffers_alone():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(()))
            self.seen = []

        def forward(self, x):
            self.count += 1
            self.seen.append(x)
            return x + self.count

    model = Writes()
    described(model, torch.ones(2))
    assert checked(model, torch.ones(2)) == 0.0
    assert float(model.count) == 0.0
    assert model.seen == []


def test_the_inputs_are_drawn_outside_the_count():
    model = nn.Linear(2, 1)
    workload = Workload(
        model=lambda: model,
        inputs={"a": Case(lambda seed: torch.randn(3, 2), 3.0), "b": Case(lambda seed: torch.randn(5, 2), 1.0)},
        loss=lambda m, batch: m(batch).mean(),
        target="pkg:factory",
    )
    calls = {case: workload.call(case, 0) for case in workload.cases}
    spec = describe(workload, model, calls, Mode.TRAINING)
    assert "aten.randn" not in spec.operators
    assert spec.weights == {"a": 0.75, "b": 0.25}
    assert spec.signatures["b"] == (TensorSignature((5, 2), "float32"),)
    assert not spec.in_memory


def test_inputs_that_do_not_fit_show_the_users_own_traceback():
    for run in (described, checked):
        with pytest.raises(InputsError, match="case 'main': RuntimeError") as caught:
            run(nn.Linear(3, 3), torch.ones(2, 4))
        assert "F.linear(input, self.weight, self.bias)" in caught.value.user_traceback
        assert "core/describe.py" not in caught.value.user_traceback.partition("F.linear")[0]
        assert caught.value.fix


def test_a_model_that_refuses_to_be_watched_is_described_without_operators():
    class Refuses(nn.Module):
        def forward(self, x):
            if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
                raise RuntimeError("not under a mode")
            return x + 1

    assert described(Refuses(), torch.ones(2)).operators == {}


class Noisy(nn.Module):
    def forward(self, x):
        return x * (1 + 1e-3 * torch.rand((), generator=torch.Generator().manual_seed(int(next(SEEDS)))))


SEEDS = iter(range(1000))


def test_check_model_measures_the_models_own_noise():
    assert checked(nn.Linear(4, 4).eval(), torch.ones(2, 4)) == 0.0
    assert 0.0 < checked(Noisy(), torch.ones(4, 4)) < 1e-3


def test_a_model_that_writes_to_its_inputs_sees_fresh_ones():
    class Writes(nn.Module):
        def forward(self, x):
            return x.add_(1.0).square()

    example = torch.ones(3)
    assert checked(Writes(), example) == 0.0
    assert torch.equal(example, torch.ones(3))
    model = nn.Linear(3, 1)
    workload = Workload(model=lambda: model, inputs=lambda: example, loss=lambda m, batch: m(batch.add_(1.0)).mean())
    assert check_model(workload, model, {}, Mode.TRAINING, {"main": example}) == 0.0
    assert torch.equal(example, torch.ones(3))


def test_dropout_is_deterministic_from_one_seed():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    loss = lambda m, batch: m(batch[0]).square().mean()  # noqa: E731
    assert checked(model, torch.ones(8, 4), mode=Mode.TRAINING, loss=loss) == 0.0


@dataclasses.dataclass
class Output:
    good: torch.Tensor
    bad: torch.Tensor


class Bad(nn.Module):
    def __init__(self, value, wrap):
        super().__init__()
        self.value, self.wrap = value, wrap

    def forward(self, x):
        return self.wrap(x, x * self.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("wrap", "path"),
    [
        (lambda good, bad: (good, [bad]), r"output\[1\]\[0\]"),
        (lambda good, bad: {"good": good, "bad": bad}, r"output\['bad'\]"),
        (Output, r"output\.bad"),
    ],
)
def test_outputs_that_are_not_finite_are_refused_by_name(value, wrap, path):
    with pytest.raises(ModelError, match=f"{path} has 4 NaN or infinite values"):
        checked(Bad(value, wrap), torch.ones(4))


def test_a_gradient_that_is_not_finite_is_refused():
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    with pytest.raises(ModelError, match="NaN or infinite"):
        checked(model, torch.ones(2, 2), mode=Mode.TRAINING, loss=lambda m, batch: m(batch[0]).sqrt().sum())


class HasLoss(nn.Module):
    def __init__(self, output):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.output = output

    def forward(self, x):
        return self.output(self.weight * x.sum())


@pytest.mark.parametrize(
    "output",
    [lambda v: v, lambda v: v.reshape(1), lambda v: {"loss": v}, lambda v: type("Out", (), {"loss": v})()],
)
def test_the_default_loss_is_what_the_model_returns(output):
    loss = training_loss(Workload(model=lambda: None, inputs=lambda: None))
    value = loss(HasLoss(output), {"x": torch.ones(3)})
    assert value.shape == ()
    assert float(value.detach()) == 3.0


@pytest.mark.parametrize(
    ("output", "got"),
    [
        (lambda v: v.expand(3), r"a tensor of shape \(3,\)"),
        (lambda v: {"logits": v}, "dict"),
        (lambda v: None, "NoneType"),
    ],
)
def test_a_model_without_a_loss_says_what_to_give(output, got):
    loss = training_loss(Workload(model=lambda: None, inputs=lambda: None))
    with pytest.raises(InputsError, match=f"training needs a loss: the model returned {got}") as caught:
        loss(HasLoss(output), torch.ones(3))
    assert "Workload(loss=" in caught.value.fix


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda m, b: m(*b), "expected a scalar tensor"),
        (lambda m, b: 3.0, "returned float"),
        (lambda m, b: m(*b).detach().mean(), "does not depend on any parameter"),
    ],
)
def test_a_loss_that_is_none_is_refused(loss, message):
    with pytest.raises(InputsError, match=message):
        described(nn.Linear(2, 2), torch.ones(3, 2), mode=Mode.TRAINING, loss=loss)


def test_the_optimizer_is_the_users_or_adamw():
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    plain = make_optimizer(Workload(model=lambda: model, inputs=lambda: None), model.parameters())
    assert isinstance(plain, torch.optim.AdamW)
    assert plain.defaults["lr"] == 1e-3
    assert [p.shape for group in plain.param_groups for p in group["params"]] == [(2, 2)]
    own = Workload(model=lambda: model, inputs=lambda: None, optimizer=lambda ps: torch.optim.SGD(ps, lr=0.5))
    assert isinstance(make_optimizer(own, model.parameters()), torch.optim.SGD)
    model.weight.requires_grad_(False)
    with pytest.raises(ModelError, match="nothing to train"):
        make_optimizer(Workload(model=lambda: model, inputs=lambda: None), model.parameters())


def test_calls_on_kwargs():
    class Keyword(nn.Module):
        def forward(self, *, x):
            return x.sum()

    workload = Workload(model=Keyword, inputs=lambda: {"x": torch.ones(2)})
    spec = describe(workload, Keyword(), {"main": Call((), {"x": torch.ones(2)})}, Mode.INFERENCE)
    assert spec.parameters == 0
    assert spec.dtypes == ()
    assert spec.operators == {"aten.sum": 1}
