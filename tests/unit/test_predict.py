"""Predictions: where time goes, what is counted, and ceilings that no implementation breaks."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from kernel_pytorch.backends import manager_for
from kernel_pytorch.core.describe import describe
from kernel_pytorch.core.program import state_digest
from kernel_pytorch.core.types import Candidate, DeviceSpec, Mode, Numerics, Step
from kernel_pytorch.core.workload import Case, as_workload
from kernel_pytorch.search.kinds import kind_of
from kernel_pytorch.search.operators import WorkCounter, least_bytes
from kernel_pytorch.search.predict import predict
from kernel_pytorch.search.roofline import FASTEST, Roofline

KINDS = {
    "matmul",
    "attention",
    "convolution",
    "normalization",
    "elementwise",
    "reduction",
    "embedding",
    "copy",
    "optimizer",
    "other",
    "overhead",
}
DEVICE = DeviceSpec(
    vendor="cpu",
    name="planted",
    arch="planted",
    memory_bytes=1 << 30,
    num_devices=1,
    features=(),
    peak_flops={"float32": 1e9, "bfloat16": 4e9, "int8": 8e9},
    bandwidth_bytes_per_s=1e9,
    software={},
)


@dataclasses.dataclass
class Planted:
    """A transform that says what the test wants."""

    name: str
    numerics: Numerics
    bound: float

    def ceiling(self, step, prediction, device):
        assert prediction.baseline_ms > 0
        return self.bound


COMPILE = Planted("compile", Numerics.REORDERED, 1.5)
DTYPE = Planted("dtype", Numerics.LOWER_PRECISION, math.inf)
QUANTIZE = Planted("quantize", Numerics.LOWER_PRECISION, math.inf)
USELESS = Planted("useless", Numerics.EXACT, 1.001)
HALF = Planted("half", Numerics.EXACT, 2.0)
BF16 = Step("dtype", {"to": "bfloat16"})


class Slow:
    """A manager whose clock says what the test wants."""

    vendor = "cpu"

    def __init__(self, ms, others=0.0):
        self.ms = ms
        self.others = others

    def telemetry(self):
        return {"cpu_others_percent": self.others}

    def place(self, tree):
        return tree

    def synchronize(self):
        pass

    def time_ms(self, fn):
        fn()
        return self.ms


def predicted(model, example, *, mode=Mode.INFERENCE, device=DEVICE, manager=None, steps=(), **fields):
    workload = dataclasses.replace(as_workload((model, example)), **fields)
    calls = {case: workload.call(case, 0) for case in workload.cases}
    spec = describe(workload, model, calls, mode)
    transforms = (COMPILE, DTYPE, QUANTIZE, USELESS, HALF)
    manager = manager or manager_for("cpu")
    return predict(workload, model, calls, spec, device, manager, transforms, [Candidate(tuple(s)) for s in steps])


def by_kind(prediction):
    return {share.kind: share for share in prediction.shares}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::addmm", "matmul"),
        ("aten.mm.default", "matmul"),
        ("aten::_int_mm", "matmul"),
        ("aten::mkldnn_rnn_layer", "matmul"),
        ("onednn::qlinear_pointwise", "matmul"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("aten::mkldnn_convolution", "convolution"),
        ("aten::convolution_backward", "convolution"),
        ("aten::native_layer_norm_backward", "normalization"),
        ("aten::_fused_rms_norm", "normalization"),
        ("aten::gelu_backward", "elementwise"),
        ("aten::add_", "elementwise"),
        ("aten::_foreach_mul_", "elementwise"),
        ("aten::native_dropout_backward", "elementwise"),
        ("aten::masked_fill", "elementwise"),
        ("aten::_log_softmax", "reduction"),
        ("aten::max_pool2d_with_indices_backward", "reduction"),
        ("aten::nll_loss_forward", "reduction"),
        ("aten::embedding_dense_backward", "embedding"),
        ("aten::index_put_", "embedding"),
        ("aten::scatter_add", "embedding"),
        ("aten::_to_copy", "copy"),
        ("aten::copy_", "copy"),
        ("aten::cat", "copy"),
        ("aten::_fused_adamw_", "optimizer"),
        ("aten::transpose", "overhead"),
        ("aten::linear", "overhead"),
        ("aten::empty_strided", "overhead"),
        ("aten::fft_r2c", "other"),
    ],
)
def test_kind_of_operator(name, kind):
    assert kind_of(name) == kind
    assert kind in KINDS


def test_flops_and_bytes_of_a_linear_are_counted_exactly():
    prediction = predicted(nn.Linear(64, 32).eval(), torch.ones(16, 64))
    assert prediction.flops == 2 * 16 * 64 * 32
    assert prediction.bytes == 4 * (64 * 32 + 32 + 16 * 64 + 16 * 32)
    matmul = by_kind(prediction)["matmul"]
    assert (matmul.calls, matmul.flops) == (1, prediction.flops)
    assert matmul.bytes == prediction.bytes


@pytest.mark.parametrize(
    ("model", "shape", "flops"),
    [
        (nn.Conv2d(3, 8, 3, bias=False), (2, 3, 10, 10), 2 * 2 * 8 * 8 * 8 * 27),
        (nn.Conv1d(4, 4, 3, groups=4), (1, 4, 12), 2 * 4 * 10 * 3),
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), (5, 3, 4), 2 * 5 * 12 * 3),
        (nn.ReLU(), (5, 5), 0),
    ],
)
def test_flops_of_other_layers(model, shape, flops):
    assert predicted(model.eval(), torch.ones(shape)).flops == flops


class Attend(nn.Module):
    def forward(self, q):
        return functional.scaled_dot_product_attention(q, q, q)


def test_attention_on_a_cpu_is_counted_like_its_two_products():
    prediction = predicted(Attend(), torch.randn(2, 4, 32, 16))
    assert prediction.flops == 2 * (2 * 2 * 4 * 32 * 32 * 16)
    assert by_kind(prediction)["attention"].flops == prediction.flops


def test_shares_are_known_kinds_that_sum_to_one_and_the_products_lead_where_they_must():
    model = nn.Sequential(nn.Linear(512, 512), nn.GELU(), nn.LayerNorm(512), nn.Linear(512, 512)).eval()
    prediction = predicted(model, torch.randn(256, 512), device=manager_for("cpu").spec)
    assert {share.kind for share in prediction.shares} <= KINDS
    assert sum(share.time_share for share in prediction.shares) == pytest.approx(1.0)
    assert prediction.shares[0].kind == "matmul"
    times = [share.time_share for share in prediction.shares]
    assert times == sorted(times, reverse=True)
    assert 0 < prediction.floor_ms <= prediction.baseline_ms


def test_the_floor_is_the_larger_of_compute_and_memory(monkeypatch):
    monkeypatch.setattr("kernel_pytorch.search.predict.cache_bytes", lambda device: 0)
    compute = predicted(nn.Linear(64, 64, bias=False), torch.ones(64, 64), manager=Slow(100.0))
    assert compute.floor_ms == pytest.approx(1e3 * 2 * 64**3 / 1e9)
    memory = predicted(nn.Linear(64, 64, bias=False), torch.ones(1, 64), manager=Slow(100.0))
    assert memory.floor_ms == pytest.approx(1e3 * 4 * (64 * 64 + 128) / 1e9)
    assert predicted(nn.Linear(64, 64), torch.ones(64, 64), manager=Slow(1e-3)).floor_ms == 1e-3


def test_bytes_of_a_table_are_those_of_the_rows_looked_up_and_unused_weights_cost_nothing():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(10_000, 8)
            self.unused = nn.Linear(1000, 1000)

        def forward(self, ids):
            return self.table(ids)

    prediction = predicted(Table(), torch.arange(6))
    assert prediction.bytes == 6 * 8 * 4 + 6 * 8 + 6 * 8 * 4
    tied = nn.Embedding(50, 8)
    counter = WorkCounter()
    with counter, torch.no_grad():
        functional.linear(tied(torch.arange(3)), tied.weight)
    assert least_bytes([tied.weight], counter) == 50 * 8 * 4


def test_what_the_cache_holds_is_no_memory_floor():
    roofline = Roofline(DEVICE, {}, 2e6, 1_000_000)
    assert roofline.memory_s() == pytest.approx(1e-3)
    assert roofline.memory_s(0.5) == 0.0


def test_roofline_by_precision():
    roofline = Roofline(DEVICE, {"float32": 8e9, "bfloat16": 4e9}, 0.0, 0)
    assert roofline.compute_s() == pytest.approx(9.0)
    assert roofline.compute_s("bfloat16") == pytest.approx(3.0)
    assert roofline.compute_s(FASTEST) == pytest.approx(1.5)
    unknown = Roofline(dataclasses.replace(DEVICE, peak_flops={}, bandwidth_bytes_per_s=0.0), {"float32": 1.0}, 1.0, 0)
    assert unknown.floor_s() == 0.0


def test_ceilings_are_the_steps_own_bounded_by_the_floor_at_the_candidates_precision(monkeypatch):
    monkeypatch.setattr("kernel_pytorch.search.predict.cache_bytes", lambda device: 0)
    compute_ms = 1e3 * 2 * 64**3 / 1e9
    ceilings = predicted(
        nn.Linear(64, 64, bias=False),
        torch.ones(64, 64),
        manager=Slow(2 * compute_ms),
        steps=[(), (BF16,), (Step("compile"),), (BF16, Step("compile")), (Step("quantize", {"bits": 4}),)],
    ).ceilings
    assert ceilings["compile"] == 1.5
    assert ceilings["dtype(to=bfloat16)"] == pytest.approx(1.25 * 8)
    assert ceilings["dtype(to=bfloat16) + compile"] == pytest.approx(1.25 * 8)
    assert ceilings["quantize(bits=4)"] == pytest.approx(1.25 * 16)
    assert "unmodified" not in ceilings


def test_steps_together_may_save_what_each_saves_alone_which_is_more_than_the_product():
    steps = [(Step("compile"), Step("half"))]
    ceilings = predicted(nn.Linear(8, 8), torch.ones(2, 8), manager=Slow(1e3), steps=steps).ceilings
    assert ceilings["compile"] == pytest.approx(1.5)
    assert ceilings["half"] == pytest.approx(2.0)
    assert ceilings["compile + half"] == pytest.approx(1 / (1 - 1 / 3 - 1 / 2)), "a third of the time and half of it"


def test_a_model_at_its_floor_cannot_be_made_faster_at_its_own_precision(monkeypatch):
    monkeypatch.setattr("kernel_pytorch.search.predict.cache_bytes", lambda device: 0)
    prediction = predicted(
        nn.Linear(64, 64, bias=False),
        torch.ones(64, 64),
        manager=Slow(1e3 * 2 * 64**3 / 1e9),
        steps=[(Step("compile"), Step("useless"))],
    )
    assert prediction.ceilings["compile + useless"] == pytest.approx(1.25)
    assert prediction.ceilings["useless"] == pytest.approx(1.001)
    assert "cannot gain 2 %: useless" in prediction.notes


def test_the_mixed_case_is_the_mean_by_weight():
    model = nn.Linear(8, 8, bias=False)
    cases = {"small": Case(lambda: torch.ones(1, 8), 3.0), "large": Case(lambda: torch.ones(100, 8), 1.0)}
    assert predicted(model, None, inputs=cases).flops == 2 * 64 * (0.75 * 1 + 0.25 * 100)


def test_training_counts_backward_and_optimizer_and_leaves_the_model_alone():
    model = nn.Sequential(nn.Linear(32, 32, bias=False), nn.ReLU(), nn.Linear(32, 4, bias=False))
    before = state_digest(model)
    prediction = predicted(
        model,
        None,
        mode=Mode.TRAINING,
        inputs=lambda: (torch.randn(16, 32), torch.randint(0, 4, (16,))),
        loss=lambda m, batch: functional.cross_entropy(m(batch[0]), batch[1]),
    )
    assert state_digest(model) == before
    first, last = 2 * 16 * 32 * 32, 2 * 16 * 32 * 4
    assert prediction.flops == 2 * first + 3 * last, "the first layer needs no gradient of its input"
    optimizer = by_kind(prediction)["optimizer"]
    assert optimizer.time_share > 0
    assert optimizer.calls >= 10, "what AdamW does to two parameters"
    assert optimizer.bytes > 0
    assert sum(share.time_share for share in prediction.shares) == pytest.approx(1.0)
    weights = 4 * (32 * 32 + 32 * 4)
    assert prediction.bytes >= 6 * weights


def test_notes_say_what_limits():
    def at(ms, model, x):
        return predicted(model, x, manager=Slow(ms)).notes

    class Python(nn.Module):
        def forward(self, x):
            total = 0
            for i in range(300_000):
                total += i
            return x + 1

    assert any(note.startswith("overhead-bound") for note in at(50.0, Python(), torch.ones(2)))
    products = at(1.0, nn.Linear(512, 512), torch.randn(512, 512))
    assert any(note.startswith("compute-bound") for note in products)
    moves = at(1e3, nn.Softmax(-1), torch.randn(512, 2048))
    assert any("memory-bound" in note and "reduction" in note for note in moves)
    assert any(note.startswith("quantising weights cannot help much: 0%") for note in moves)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor:UserWarning")
def test_operators_without_a_formula_are_told():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1).eval()
    notes = predicted(encoder, torch.randn(3, 4, 16)).notes
    assert any("_transformer_encoder_layer_fwd" in note and "not counted" in note for note in notes)
    assert not any("not counted" in note for note in predicted(nn.Linear(4, 4), torch.ones(2, 4)).notes)


def test_a_recurrent_layer_is_counted_on_a_cpu():
    prediction = predicted(nn.LSTM(8, 16).eval(), torch.randn(5, 2, 8))
    assert prediction.flops == 2 * 5 * 2 * (4 * 16 * 8 + 4 * 16 * 16)


def test_a_model_that_writes_to_its_inputs_does_not_change_the_examples():
    class Writes(nn.Module):
        def forward(self, x):
            return x.add_(1.0)

    example = torch.zeros(3)
    predicted(Writes(), example)
    assert torch.equal(example, torch.zeros(3))


def test_foreign_load_is_told():
    def told(others):
        notes = predicted(nn.Linear(4, 4), torch.ones(2, 4), manager=Slow(10.0, others)).notes
        return [note for note in notes if "other processes took" in note]

    assert told(40.0) == ["other processes took 40 % of the CPU meanwhile: these times and ceilings are too high"]
    assert told(5.0) == []


def test_odd_models_are_predicted():
    class Odd(nn.Module):
        def forward(self, x):
            spectrum = torch.fft.rfft(x).abs()
            kept = spectrum[spectrum > 0]
            return {"n": len(kept), "best": kept.argmax(), "sparse": torch.eye(3).to_sparse()}

    prediction = predicted(Odd(), torch.randn(4, 16))
    assert prediction.flops == 0
    assert sum(share.time_share for share in prediction.shares) == pytest.approx(1.0)
