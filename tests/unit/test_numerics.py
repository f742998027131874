from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kernel_pytorch.core.config import KernelPyTorchConfig
from kernel_pytorch.core.program import begin, clone_model, ship
from kernel_pytorch.core.types import Candidate, Gate, Mode, NumericsReport, Step
from kernel_pytorch.core.workload import Workload, as_workload
from kernel_pytorch.errors import CandidateError, ModelError
from kernel_pytorch.validation.numerics import Subject, judge


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.heads = heads
        self.scale = (width // heads) ** -0.5

    def forward(self, x, mask):
        b, n, w = x.shape
        q, k, v = (p(x).view(b, n, self.heads, -1).transpose(1, 2) for p in (self.query, self.key, self.value))
        scores = (q @ k.transpose(-1, -2)) * self.scale
        scores = scores.masked_fill(mask[:, None, None] == 0, torch.finfo(scores.dtype).min)
        return self.out((scores.float().softmax(-1).type_as(v) @ v).transpose(1, 2).reshape(b, n, w))


class Bert(nn.Module):
    """Post-norm encoder with biases of 0 and gammas of 1, and a hard-coded cast to float32."""

    def __init__(self, width: int = 32, layers: int = 2) -> None:
        super().__init__()
        self.words = nn.Embedding(50, width)
        self.positions = nn.Embedding(64, width)
        self.layers = nn.ModuleList()
        for _ in range(layers):
            parts = {
                "attention": Attention(width, 4),
                "norm1": nn.LayerNorm(width),
                "up": nn.Linear(width, 2 * width),
                "down": nn.Linear(2 * width, width),
                "norm2": nn.LayerNorm(width),
            }
            self.layers.append(nn.ModuleDict(parts))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, input_ids, attention_mask):
        x = self.words(input_ids) + self.positions(torch.arange(input_ids.shape[1]))
        for layer in self.layers:
            x = layer["norm1"](x + layer["attention"](x, attention_mask))
            x = layer["norm2"](x + layer["down"](F.gelu(layer["up"](x))))
        return {"last_hidden_state": x, "pooled": x.mean(1)}


def bert_inputs(seed: int):
    ids = torch.randint(1, 50, (5, 9))
    mask = torch.ones(5, 9, dtype=torch.long)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(x + self.bn2(self.conv2(x)))
        return self.head(x.mean((2, 3)))


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(6, 12, batch_first=True)
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        out, hidden = self.gru(x)
        logits = self.head(out)
        return logits, logits.argmax(-1), hidden


class TiedLM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.mix = nn.Linear(16, 16)
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.mix(self.embed(ids))))


class DropoutMLP(nn.Module):
    def __init__(self, p: float = 0.2) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Dropout(p), nn.Linear(64, 3))

    def forward(self, x):
        return self.net(x)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any]]] = {
    "bert": (Bert, bert_inputs),
    "conv": (ConvNet, lambda seed: torch.randn(4, 3, 8, 8)),
    "gru": (Tagger, lambda seed: torch.randn(4, 7, 6)),
    "tied": (TiedLM, lambda seed: torch.randint(0, 40, (3, 8))),
    "mlp": (DropoutMLP, lambda seed: torch.randn(6, 10)),
}


@dataclass
class Change:
    """A step of the tests: what it does to a program, and whether it is structural."""

    name: str
    do: Callable[[Any], None]
    low: str = ""


def bf16() -> Change:
    def do(program):
        inner = program.call
        program.model.to(torch.bfloat16)

        def call(*args, **kwargs):
            low = torch.utils._pytree.tree_map(
                lambda t: t.bfloat16() if isinstance(t, torch.Tensor) and t.is_floating_point() else t, (args, kwargs)
            )
            return torch.utils._pytree.tree_map(
                lambda t: t.float() if isinstance(t, torch.Tensor) and t.is_floating_point() else t,
                inner(*low[0], **low[1]),
            )

        program.call = call

    return Change("dtype", do, "bfloat16")


def judged(
    name: str,
    *changes: Change,
    level: str = "standard",
    mode: Mode = Mode.INFERENCE,
    memo=None,
    seed: int = 0,
    workload: Workload | None = None,
    **config: Any,
) -> NumericsReport:
    make, inputs = MODELS.get(name, (None, None))
    torch.manual_seed(1)
    workload = workload or Workload(model=make, inputs=inputs)
    settings = KernelPyTorchConfig(mode=mode, seed=seed, **config)
    reference = workload.model().train(mode is Mode.TRAINING)
    by_name = {c.name: c for c in changes}

    def build(model, candidate, calls):
        program = begin(model, mode, calls)
        for step in candidate.steps:
            by_name[step.transform].do(program)
        return program

    candidate = Candidate(tuple(Step(c.name, {"to": c.low} if c.low else {}) for c in changes))
    calls = {case: workload.call(case, 0) for case in workload.cases}
    program = build(clone_model(reference), candidate, calls)
    ship(program, None)
    return judge(
        Subject(
            workload=workload,
            candidate=candidate,
            config=settings,
            reference=reference,
            program=program,
            build=build,
            place=lambda x: x,
            structural=lambda s: not by_name[s.transform].low,
            memo_dir=memo,
        ),
        level=level,
    )


def wrap(name: str, change: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Change:
    def do(program):
        program.call = change(program.call)

    return Change(name, do)


def gate_of(report: NumericsReport) -> Gate:
    assert not report.passed, [(c.name, c.error, c.budget, c.case) for c in report.checks]
    assert report.worst is not None
    return report.worst.gate


def nothing() -> Change:
    return Change("nothing", lambda program: None)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_faithful_step_passes_near_exactly(name, tmp_path):
    report = judged(name, nothing(), memo=tmp_path)
    assert report.passed, report.worst
    structure = [c for c in report.checks if c.gate is Gate.STRUCTURE]
    assert len(structure) >= 4
    assert max(c.error for c in structure) < 1e-12
    assert report.cosine > 0.999999


@pytest.mark.parametrize("name", sorted(MODELS))
def test_plain_bf16_passes_within_twice_its_own_cost(name):
    report = judged(name, bf16(), max_error=0.2)
    assert report.passed, report.worst
    assert 0 < report.max_rel_error <= report.budget <= 0.5


def test_a_hidden_bias_is_found_although_it_is_zero():
    def drop(program):
        linear = program.model.layers[1]["up"]
        linear.forward = lambda x: F.linear(x, linear.weight)

    report = judged("bert", Change("drop_bias", drop))
    assert gate_of(report) is Gate.STRUCTURE
    assert report.diverged_at == "layers.1.up"


def test_a_layer_norm_eps_ten_times_too_large_is_found_behind_bf16():
    def eps(program):
        program.model.layers[0]["norm1"].eps *= 10

    assert gate_of(judged("bert", Change("eps", eps), bf16())) is Gate.STRUCTURE


def test_a_softmax_scale_off_by_a_percent_is_found_behind_bf16():
    def scale(program):
        program.model.layers[0]["attention"].scale *= 1.01

    report = judged("bert", Change("scale", scale), bf16())
    assert gate_of(report) is Gate.STRUCTURE
    assert report.diverged_at.startswith("layers.0.attention")


def test_an_error_at_another_length_only_is_found():
    def short(inner):
        def call(input_ids, attention_mask):
            out = inner(input_ids=input_ids, attention_mask=attention_mask)
            return {k: v * (1.01 if input_ids.shape[1] > 9 else 1.0) for k, v in out.items()}

        return call

    report = judged("bert", wrap("longer", short))
    assert gate_of(report) is Gate.STRUCTURE
    assert "length" in report.worst.case


def test_an_error_at_another_batch_size_only_is_found():
    def other(inner):
        return lambda x: inner(x) * (1.0 if x.shape[0] == 6 else 1.001)

    assert gate_of(judged("mlp", wrap("batch", other))) is Gate.STRUCTURE


def test_an_output_that_becomes_nan_at_the_third_call_is_found():
    def third(inner):
        count = [0]

        def call(x):
            count[0] += 1
            return inner(x) * (math.nan if count[0] == 3 else 1.0)

        return call

    report = judged("mlp", wrap("third", third), level="quick")
    assert gate_of(report) is Gate.CONTRACT
    assert "NaN" in report.worst.detail
    assert "call 3" in report.worst.detail


def test_an_output_overwritten_by_the_next_call_is_found():
    def alias(inner):
        held = {}

        def call(x):
            out = inner(x)
            if out.shape in held:
                return held[out.shape].copy_(out)
            held[out.shape] = out
            return out

        return call

    report = judged("mlp", wrap("alias", alias))
    assert gate_of(report) is Gate.CONTRACT
    assert any(c.name == "output kept" and not c.passed for c in report.checks)


def test_an_input_mutated_in_place_is_found():
    report = judged("mlp", wrap("mutate", lambda inner: lambda x: inner(x.mul_(1.0).add_(1e-3)) * 1.0))
    assert gate_of(report) is Gate.CONTRACT
    assert any(c.name == "inputs" and not c.passed for c in report.checks)


def test_changed_dtype_structure_and_batch_order_are_found():
    assert gate_of(judged("mlp", wrap("half", lambda inner: lambda x: inner(x).half()))) is Gate.CONTRACT
    tuples = wrap("tuple", lambda inner: lambda **k: tuple(inner(**k).values()))
    assert gate_of(judged("bert", tuples)) is Gate.CONTRACT
    assert gate_of(judged("mlp", wrap("flip", lambda inner: lambda x: inner(x).flip(0)))) is Gate.STRUCTURE


def test_untied_weights_are_found():
    def untie(program):
        program.model.head.weight = nn.Parameter(program.model.head.weight.detach().clone())

    report = judged("tied", Change("untie", untie))
    assert gate_of(report) is Gate.CONTRACT
    assert report.worst.name == "ties"


def test_a_module_in_the_wrong_mode_is_found():
    report = judged("mlp", Change("train", lambda program: program.model.net[2].train()))
    assert any(c.name == "modes" and not c.passed for c in report.checks)


def test_verdicts_and_oracles_are_kept_between_trials(tmp_path, monkeypatch):
    first = judged("bert", nothing(), memo=tmp_path)
    files = sorted(tmp_path.glob("*.pt"))
    assert files
    import kernel_pytorch.validation.structure as structure

    def never(*_args, **_kwargs):
        raise AssertionError("judged again")

    monkeypatch.setattr(structure._Trial, "run", never)
    second = judged("bert", nothing(), memo=tmp_path)
    assert sorted(tmp_path.glob("*.pt")) == files
    structural = [[c for c in r.checks if c.gate is Gate.STRUCTURE] for r in (first, second)]
    assert structural[0] == structural[1]


def test_as_workload_of_a_model_in_memory_is_left_alone():
    model = DropoutMLP().eval()
    before = copy.deepcopy(model.state_dict())
    report = judged("", nothing(), workload=as_workload((model, torch.randn(4, 10))))
    assert report.passed
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model._compiled_call_impl is None


def lm_loss(model, batch):
    return F.cross_entropy(model(batch).flatten(0, 1), batch.flatten())


def mlp_loss(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


TRAINING = {
    "tied": Workload(model=TiedLM, inputs=MODELS["tied"][1], loss=lm_loss),
    "conv": Workload(
        model=ConvNet,
        inputs=lambda seed: (torch.randn(4, 3, 8, 8), torch.randint(0, 5, (4,))),
        loss=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
    ),
    "mlp": Workload(model=DropoutMLP, inputs=lambda seed: (torch.randn(8, 10), torch.randn(8, 3)), loss=mlp_loss),
}


def autocast() -> Change:
    def do(program):
        inner = program.call

        def call(*args, **kwargs):
            with torch.autocast("cpu", torch.bfloat16):
                return inner(*args, **kwargs).float()

        program.call = call

    return Change("dtype", do, "bfloat16")


@pytest.mark.parametrize("name", sorted(TRAINING))
@pytest.mark.parametrize("make", [nothing, autocast])
def test_training_a_faithful_step_passes(name, make):
    report = judged("", make(), workload=TRAINING[name], mode=Mode.TRAINING, max_error=0.1)
    assert report.passed, report.worst
    assert any(c.name == "loss curve" for c in report.checks)
    assert any(c.name.startswith("grad ") and c.gate is Gate.TRAINING for c in report.checks)


class _WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.01


def test_a_wrong_gradient_behind_a_correct_forward_is_found():
    def wrong(program):
        mix = program.model.mix
        inner = mix.forward
        mix.forward = lambda x: _WrongBackward.apply(inner(x))

    for extra in ([], [autocast()]):
        steps = [Change("wrong", wrong), *extra]
        report = judged("", *steps, workload=TRAINING["tied"], mode=Mode.TRAINING, max_error=0.1)
        assert gate_of(report) is Gate.STRUCTURE
        assert report.worst.name.startswith("grad")


def test_deterministic_dropout_and_another_rate_are_found():
    def fixed(program):
        drop = program.model.net[2]
        drop.forward = lambda x: x * (torch.arange(x.shape[-1]) % 5 > 0) / 0.8

    def rate(program):
        program.model.net[2].p = 0.5

    def off(program):
        program.model.net[2] = nn.Identity()

    for name, do in (("fixed", fixed), ("rate", rate), ("off", off)):
        report = judged("", Change(name, do), workload=TRAINING["mlp"], mode=Mode.TRAINING)
        assert gate_of(report) is Gate.CONTRACT, name
        assert report.worst.name.startswith("random"), name


def test_statistics_that_are_no_longer_updated_are_found():
    def frozen(program):
        bn = program.model.bn1
        bn.forward = lambda x: F.batch_norm(x, None, None, bn.weight, bn.bias, training=True, eps=bn.eps)

    report = judged("", Change("frozen", frozen), workload=TRAINING["conv"], mode=Mode.TRAINING)
    assert gate_of(report) is Gate.CONTRACT
    assert "bn1" in report.worst.name


def test_statistics_of_a_candidate_that_was_called_before_start_from_the_references():
    def called(program):
        with torch.no_grad():
            program.model(torch.randn(4, 3, 8, 8) * 5 + 3)

    report = judged("", Change("called", called), workload=TRAINING["conv"], mode=Mode.TRAINING, level="quick")
    assert [c for c in report.checks if c.name.startswith("buffer")]
    assert report.passed, report.worst


def test_an_optimizer_that_drifts_over_the_steps_is_found():
    class Drifting(torch.optim.AdamW):
        def step(self, closure=None):
            super().step(closure)
            for group in self.param_groups:
                group["lr"] *= 1.2

    def drift(program):
        program.optimizer = Drifting(program.model.parameters(), lr=1e-3)

    report = judged("", Change("drift", drift), workload=TRAINING["tied"], mode=Mode.TRAINING)
    assert gate_of(report) is Gate.TRAINING
    assert report.worst.name == "update"


def test_the_users_own_accuracy_is_the_budget_where_given():
    def agreement(model):
        torch.manual_seed(3)
        x = torch.randn(64, 10)
        return float((model(x).argmax(-1) == 1).float().mean())

    worse = wrap("worse", lambda inner: lambda x: inner(x) + torch.tensor([0.0, -0.05, 0.0]))
    worse.low = "int8"
    for tolerance, passes in ((1.0, True), (0.0, False)):
        workload = Workload(
            model=DropoutMLP, inputs=lambda seed: torch.randn(6, 10), evaluate=agreement, evaluate_tolerance=tolerance
        )
        report = judged("", worse, workload=workload)
        assert report.passed is passes
        assert [c.passed for c in report.checks if c.name == "evaluate"] == [passes]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", ["int8_dynamic", "int8_weight_only", "int4_weight_only"])
def test_a_quantised_linear_is_checked_on_its_own_operands(scheme, dtype):
    pytest.importorskip("torchao.quantization")
    from kernel_pytorch.transforms.quantize import _failure, configuration, quantize_linears
    from kernel_pytorch.validation.kernel import kernel_checks

    if failure := _failure(scheme, "cpu"):
        pytest.skip(failure)

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(128, 256), nn.Linear(256, 128)

        def forward(self, x):
            return self.down(F.relu(self.up(x)))

    def quantised(model: nn.Module) -> Any:
        copied: Any = clone_model(model).to(dtype)
        quantize_linears([copied.up, copied.down], configuration(scheme, "cpu"))
        return copied

    def failed(model: nn.Module) -> list[str]:
        return [c.name for c in kernel_checks(model, reference, call, Mode.INFERENCE) if not c.passed]

    reference = Wide().eval()
    with torch.no_grad():
        reference.up.weight[5] *= 0.01  # rows far from the others, and an element far from its row
        reference.up.weight[7, 3] = 4.0
    activations = torch.randn(16, 128)
    activations[:, 11] *= 60
    call = Workload(model=Wide, inputs=lambda seed: activations).call("main", 0)
    good = quantised(reference)
    checks = kernel_checks(good, reference, call, Mode.INFERENCE)
    inputs = {"up.input", "down.input"} if scheme == "int8_dynamic" else set()
    assert {c.name for c in checks} == {"up.weight", "up", "down.weight", "down"} | inputs
    assert all(c.passed and c.gate is Gate.KERNEL for c in checks), checks
    assert max(c.error for c in checks if c.name in ("up", "down")) < 0.5
    scaled = clone_model(reference)
    with torch.no_grad():
        scaled.up.weight[3] *= 1.1 if scheme != "int4_weight_only" else 1.5
    assert failed(quantised(scaled)) == ["up.weight"]
    dropped = clone_model(good)
    dropped.up.bias = None
    assert failed(dropped) == ["up"]
    if scheme != "int4_weight_only":  # whose scales are packed
        swapped = clone_model(good)
        swapped.up.weight.scale[[3, 4]] = swapped.up.weight.scale[[5, 3]]
        assert failed(swapped) == ["up.weight"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_kernel_that_computes_with_other_scales_than_it_stores_is_seen():
    pytest.importorskip("torchao.quantization")
    from kernel_pytorch.transforms.quantize import configuration, quantize_linears
    from kernel_pytorch.validation.kernel import kernel_checks

    reference = nn.Sequential(nn.Linear(64, 128)).eval()
    call = Workload(model=nn.Identity, inputs=lambda seed: torch.randn(16, 64)).call("main", 0)
    candidate: Any = clone_model(reference)
    quantize_linears([candidate[0]], configuration("int8_dynamic", "cpu"))
    factor = torch.ones(128)
    factor[3] = 1.001
    candidate[0].register_forward_hook(lambda module, args, out: out * factor)
    checks = kernel_checks(candidate, reference, call, Mode.INFERENCE)
    assert [c.name for c in checks if not c.passed] == ["0"]


class Bag(nn.Module):
    """Offsets must increase from 0: most values that a variation draws for them are refused."""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.out = nn.EmbeddingBag(50, 8, mode="sum"), nn.Linear(8, 3)

    def forward(self, ids, offsets):
        return self.out(self.bag(ids, offsets))


def test_inputs_of_ours_that_the_model_refuses_are_not_held_against_it():
    ids = torch.randint(0, 50, (20,))
    workload = as_workload((Bag().eval(), (ids, torch.tensor([0, 5, 9, 14]))))
    report = judged("", wrap("same", lambda inner: inner), workload=workload)
    assert report.passed, report.worst
    wrong = judged("", wrap("scaled", lambda inner: lambda *a: inner(*a) * 1.001), workload=workload)
    assert not wrong.passed


class Checksum(nn.Module):
    """Takes one set of ids only."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 8)

    def forward(self, ids):
        if int(ids.sum()) != 50 * 49 // 2:
            raise ValueError("other ids")
        return self.words(ids)


def test_a_model_that_refuses_every_variation_is_judged_on_its_own_inputs():
    workload = as_workload((Checksum().eval(), torch.randperm(50).view(5, 10)))
    report = judged("", wrap("same", lambda inner: inner), workload=workload, level="quick")
    assert report.passed, report.worst
    assert any("other values than the workload's own inputs" in why for why in report.unchecked)


def test_float_inputs_of_a_convolution_are_lifted():
    workload = as_workload((nn.Conv1d(3, 4, 3).eval(), torch.randn(2, 3, 16)))
    assert not judged("", workload=workload).unchecked


def test_inputs_of_the_workload_that_the_model_refuses_are_the_models_error():
    workload = Workload(model=Bag, inputs=lambda seed: (torch.arange(20), torch.tensor([3, 1, 9])))
    with pytest.raises(ModelError, match="the unmodified model raises at call 1"):
        judged("", workload=workload)


class Refuses64:
    """A step that packs fp32 weights: it refuses others, as oneDNN does."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    def __call__(self, program) -> None:
        linears = [m for m in program.model.modules() if isinstance(m, nn.Linear)]
        if any(m.weight.dtype is not torch.float32 for m in linears):
            raise CandidateError("pack: only float32 weights")
        halves = [(m, (m.weight * self.factor).chunk(2, 1)) for m in linears]
        for m, (left, right) in halves:
            m.forward = (
                lambda x, m=m, left=left, right=right: (  # type: ignore[method-assign]
                    F.linear(x[..., : left.shape[1]], left, m.bias) + F.linear(x[..., left.shape[1] :], right)
                )
            )


@pytest.mark.parametrize(("factor", "passes"), [(1.0, True), (1.0 + 3e-5, False)])
def test_a_step_that_refuses_fp64_is_judged_in_fp32(factor, passes):
    report = judged("bert", Change("pack", Refuses64(factor)))
    assert report.passed is passes, report.worst
    assert any("only float32 weights" in why for why in report.unchecked)
    kept = [c for c in report.checks if c.gate is Gate.STRUCTURE]
    assert kept
    assert all(1e-6 <= c.budget <= 1e-4 for c in kept if c.budget)


def test_few_samples_of_a_large_batch_are_computed_in_fp64_and_the_others_are_still_compared(monkeypatch):
    from kernel_pytorch.validation import oracle

    sizes: list[int] = []
    lifted = oracle.Oracle._lifted

    def counted(self, call, seed):
        sizes.append(len(call.args[0]))
        return lifted(self, call, seed)

    monkeypatch.setattr(oracle.Oracle, "_lifted", counted)

    def inputs(seed: int):
        return torch.randn(16, 12, generator=torch.Generator().manual_seed(seed))

    class Rows(nn.Module):
        def __init__(self, *, mixing: bool = False) -> None:
            super().__init__()
            self.out, self.mixing = nn.Linear(12, 8), mixing

        def forward(self, x):
            y = self.out(x)
            return y - y.mean(0) if self.mixing else y

    workload = Workload(model=Rows, inputs=inputs)
    assert judged("", workload=workload).passed
    assert set(sizes) == {4}

    def spoil(inner):
        def call(x):
            y = inner(x).clone()
            y[7] *= 1.01  # none of the four
            return y

        return call

    wrong = judged("", wrap("row", spoil), workload=workload, level="quick")
    assert gate_of(wrong) is Gate.PRECISION
    sizes.clear()
    assert judged("", workload=Workload(model=lambda: Rows(mixing=True), inputs=inputs)).passed
    assert set(sizes) == {16}


def test_the_error_is_told_where_an_earlier_gate_failed():
    def scaled(inner):
        return lambda *a, **k: torch.utils._pytree.tree_map(lambda t: t * 1.001, inner(*a, **k))

    report = judged("bert", wrap("scaled", scaled))
    assert gate_of(report) is Gate.STRUCTURE
    assert report.max_rel_error == pytest.approx(1e-3, rel=0.05)
