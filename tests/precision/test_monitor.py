"""The monitor counts what casts lose, exactly; layers that leave their bounds fall back and say so."""

from __future__ import annotations

import csv
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

import kernel_pytorch as kp
from kernel_pytorch.errors import InputsError, ModelError
from kernel_pytorch.ops.float8_cast import E4M3, E5M2, counting
from kernel_pytorch.ops.float8_cast.counting import COLUMNS, count_op, switch
from kernel_pytorch.ops.float8_cast.reference import quantise
from kernel_pytorch.precision.monitor import Bounds, Float8FallbackWarning, Monitor, Reading
from kernel_pytorch.precision.recipes import RECIPES
from kernel_pytorch.precision.site import site_of

from .models import batches, block


def counted(x: torch.Tensor, inverse: torch.Tensor, form: torch.dtype) -> list[float]:
    counters = torch.zeros(COLUMNS, dtype=torch.float64)
    switch(counters, on=True)
    assert torch.equal(count_op([x], inverse, form, counters), inverse)
    switch(counters, on=False)
    count_op([x], inverse, form, counters)
    return counters.tolist()


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("form", [E4M3, E5M2])
def test_counts_are_what_the_cast_does(form, by_row) -> None:
    """Counted values are those whose FP8 is the limit though they are beyond it, or zero though they are not."""
    torch.manual_seed(0)
    x = torch.randn(5000, 16) * torch.logspace(-12, 6, 5000)[:, None]
    x[0, 0], x[1, :3] = 0.0, torch.tensor([float("nan"), float("inf"), -float("inf")])
    inverse = torch.full((len(x), 1) if by_row else (1,), 0.25)
    if by_row:
        inverse[::3] = 1.0
    small = quantise(x, 1 / inverse, form).float()
    finite = x.isfinite()
    limit = torch.finfo(form).max
    beyond = (x.abs() / inverse > limit) & finite
    assert torch.equal(small.abs()[beyond], torch.full((int(beyond.sum()),), limit))
    want = [
        x.numel(),
        int(beyond.sum()),
        int(((small == 0) & (x != 0) & finite).sum()),
        3,
        float(x[finite].abs().max()),
    ]
    assert counted(x, inverse, form) == want
    assert want[1] > 100
    assert want[2] > 100


@pytest.mark.parametrize("by_row", [False, True])
def test_of_a_large_matrix_rows_evenly_apart_are_counted(by_row, monkeypatch) -> None:
    monkeypatch.setattr(counting, "_AT_MOST", 160)
    x = torch.ones(100, 16)
    x[::10] = 1000.0
    inverse = torch.ones((100, 1) if by_row else (1,))
    if by_row:
        inverse[20] = 1000.0
    assert counted(x, inverse, E4M3) == [160, 160 - 16 * by_row, 0, 0, 1000.0]


def test_half_of_the_least_number_becomes_zero() -> None:
    for form, least in ((E4M3, 2.0**-9), (E5M2, 2.0**-16)):
        x = torch.tensor([[least, least / 2, least * 0.51, -least / 2, 0.0]])
        assert counted(x, torch.ones(1), form)[:3] == [5, 0, 2]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("recipe", list(RECIPES))
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Dynamo's
def test_one_step_in_so_many_is_counted(recipe, compiled) -> None:
    model = block(recipe)
    found: list[Reading] = []
    with Monitor(model, every=2, on_reading=found.append) as monitor:
        if compiled:
            model.compile(backend="aot_eager")
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for x, target in batches(4):
            nn.functional.mse_loss(model(x.requires_grad_()), target).backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.step()
    assert {reading.step for reading in found} == {0, 2}
    last = {(r.layer, r.operand): r for r in found if r.step == 2}
    assert last["query", "input"].elements == 6 * 32
    assert last["query", "weight"].elements == 2 * 32 * 32  # of query and key
    assert last["out", "gradient"].elements == 6 * 32
    assert last["mlp.gate", "gradient"].elements == 6 * 2 * 48  # of gate and up
    assert last["out", "gradient"].amax > 0
    assert monitor.history["out", "gradient"][1] == (2, last["out", "gradient"].amax)
    assert site_of(model.out).counters == {}


def test_watching_changes_no_result() -> None:
    losses = []
    for watched in (False, True):
        model = block("tensorwise_delayed")
        monitor = Monitor(model, every=2) if watched else None
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        history = []
        for x, target in batches(5):
            loss = nn.functional.mse_loss(model(x), target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            history.append(float(loss.detach()))
            if monitor is not None:
                monitor.step()
        losses.append(history)
    assert losses[0] == losses[1]


def spiky(patience: int, steps: int) -> tuple[nn.Module, Monitor, list[warnings.WarningMessage]]:
    """Train where each input is ten times the one before: a delayed scale lags, and inputs saturate."""
    model = block("tensorwise_delayed")
    monitor = Monitor(model, every=1, bounds=Bounds(patience=patience))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for i in range(steps):
            x = batches(1)[0][0] * 10.0**i
            model.out(x).square().mean().backward()
            monitor.step()
    monitor.close()
    return model, monitor, told


def test_a_layer_out_of_bounds_falls_back_and_says_so() -> None:
    model, monitor, told = spiky(patience=2, steps=4)
    assert site_of(model.out) is None
    assert site_of(model.query) is not None
    assert list(monitor.fallen) == ["out"]
    assert [w.category for w in told] == [Float8FallbackWarning]
    assert "out: fell back at step 2" in str(told[0].message)
    assert "saturated (bound 0.10%)" in str(told[0].message)
    report = {layer.path: layer for layer in kp.precision.report(model).layers}
    assert report["out"].recipe == ""
    assert "fell back at step 2" in report["out"].reason
    assert "fell back at step 2" in str(kp.precision.report(model))


def test_patience_and_no_bounds_keep_a_layer() -> None:
    model, monitor, told = spiky(patience=9, steps=4)
    assert site_of(model.out) is not None
    assert not monitor.fallen
    assert not told
    assert max(r.saturated for r in monitor.readings if r.layer == "out") > 0.1


def test_what_is_not_finite_is_told_apart_from_what_saturates() -> None:
    reading = Reading(0, "out", "gradient", 100, 0.0, 0.0, 0.01, 1.0)
    assert "1.00% of the gradient not finite" in Bounds().broken(reading)
    assert Bounds(not_finite=0.02).broken(reading) == ""
    assert "became zero" in Bounds().broken(replace(reading, flushed=0.5, not_finite=0.0))


def test_csv(tmp_path) -> None:
    model = block("tensorwise_current")
    path = tmp_path / "deep" / "float8.csv"
    with Monitor(model, write_to=path) as monitor:
        x, target = batches(1)[0]
        nn.functional.mse_loss(model(x), target).backward()
        monitor.step()
        rows = list(csv.DictReader(path.read_text().splitlines()))
        assert {r["layer"] for r in rows} == {"query", "mlp.gate", "mlp.down", "out"}
        for row, reading in zip(rows, [r for r in monitor.readings if r.elements], strict=True):
            assert float(row["amax"]) == reading.amax
            assert int(row["elements"]) == reading.elements


def test_tensorboard(tmp_path) -> None:
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = block("tensorwise_current")
    with Monitor(model, write_to=tmp_path / "runs") as monitor:
        x, target = batches(1)[0]
        nn.functional.mse_loss(model(x), target).backward()
        monitor.step()
    events = EventAccumulator(str(tmp_path / "runs"))
    events.Reload()
    want = next(r for r in monitor.readings if r.layer == "out" and r.operand == "input")
    assert events.Scalars("float8/out/input/amax")[0].value == pytest.approx(want.amax)


class Copying:
    """Counts on their way from a GPU: there once somebody waits, or says so."""

    def __init__(self, *, there: bool = False) -> None:
        self.there, self.waited = there, 0

    def query(self) -> bool:
        return self.there

    def synchronize(self) -> None:
        self.waited += 1


def test_nobody_waits_for_counts_until_the_next_step_is_counted() -> None:
    found: list[Reading] = []
    monitor = Monitor(block("tensorwise_current"), every=3, bounds=None, on_reading=found.append)
    monitor.step()
    found.clear()
    counts = torch.ones_like(monitor._counters)
    late = Copying()
    monitor._copied = (0, counts, late)
    monitor.step()
    assert not found
    monitor.step()
    assert (found, late.waited) == ([], 0)
    monitor.step()  # this one was counted: what it counts may not mix with what is on its way
    assert late.waited == 1
    assert {r.step for r in found} == {0}
    found.clear()
    monitor._copied = (3, counts, Copying(there=True))
    monitor.step()
    assert {r.step for r in found} == {3}
    found.clear()
    last = Copying()
    monitor._copied = (3, counts, last)
    monitor.close()
    assert last.waited == 1
    assert found


def test_what_cannot_be_watched_is_told() -> None:
    with pytest.raises(ModelError, match="no layer of the model runs in FP8"):
        Monitor(nn.Linear(16, 16))
    with pytest.raises(InputsError, match="at least 1, got 0"):
        Monitor(block("tensorwise_current"), every=0)
