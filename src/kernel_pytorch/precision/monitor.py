"""Watch a training in FP8: what casts lose, layer by layer, and layers that leave bounds fall back, never silently.

    monitor = kp.precision.Monitor(model, every=16, write_to="float8.csv")
    for batch in data:
        ...
        optimizer.step()
        monitor.step()

One step in `every` is counted, on the device, and read once: the other steps cost a switch that casts look at and a
copy of each factor. On a GPU nobody waits for the counts: they are copied while the training goes on, and read by the
first call of `step` that finds them there, at the latest when the next step is counted. A CUDA graph holds what its
capture saw: capture a counted step, or count eagerly.
"""

from __future__ import annotations

import csv
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from kernel_pytorch.errors import InputsError, ModelError
from kernel_pytorch.ops.float8_cast.counting import COLUMNS, Column, switch
from kernel_pytorch.precision.fallback import fall_back
from kernel_pytorch.precision.site import OPERANDS
from kernel_pytorch.precision.state import named_sites

__all__ = ["DEFAULT_BOUNDS", "Bounds", "Float8FallbackWarning", "Monitor", "Reading"]


class Float8FallbackWarning(UserWarning):
    """A layer left its bounds and runs in its own format from now on."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Shares of an operand's elements that a layer may lose before it falls back.

    Attributes:
        saturated: Beyond the format's range: a delayed scale that lags behind.
        flushed: Rounded to zero: values that span more than the format's range. Gradients after a ReLU are zero
            already and do not count.
        not_finite: NaN and infinity, in the operand itself.
        patience: Counted steps in a row that must be out of bounds.
    """

    saturated: float = 1e-3
    flushed: float = 0.25
    not_finite: float = 0.0
    patience: int = 2

    def broken(self, reading: Reading) -> str:
        """Return what a reading breaks, in words; empty where it is within bounds."""
        for what, share, bound in (
            ("saturated", reading.saturated, self.saturated),
            ("became zero", reading.flushed, self.flushed),
            ("not finite", reading.not_finite, self.not_finite),
        ):
            if share > bound:
                return f"{share:.2%} of the {reading.operand} {what} (bound {bound:.2%})"
        return ""


DEFAULT_BOUNDS = Bounds()


@dataclass(frozen=True, slots=True)
class Reading:
    """What the casts of one operand of a site lost in a counted step.

    Attributes:
        step: Optimizer steps before it.
        layer: Path of the site's first layer.
        operand: `input`, `weight` or `gradient`.
        elements: That were counted, of a large matrix rows that lie evenly apart; 0 where the operand was not cast, as
            a weight that has not changed.
        saturated: Share of elements.
        flushed: Share of elements that were not zero and became it. Of what a fused gated MLP writes in FP8 at once,
            saturated are those at the limit, and flushed all zeros.
        not_finite: Share of elements.
        amax: Largest finite magnitude of what was counted.
    """

    step: int
    layer: str
    operand: str
    elements: int
    saturated: float
    flushed: float
    not_finite: float
    amax: float


class Monitor:
    """Counts, writes and decides, for one model.

    Args:
        model: In FP8. Make the monitor before the model is compiled, or it is compiled again.
        every: One step in so many is counted.
        bounds: Of what a layer may lose; `None` lets no layer fall back.
        write_to: A file that ends in `.csv`, or a directory for TensorBoard (needs `tensorboard`).
        on_reading: Called with each reading.

    Attributes:
        readings: Of the last counted step; on a GPU of the last one whose counts have arrived.
        history: Largest magnitudes by layer and operand, `(step, amax)`, of all counted steps.
        fallen: Layers that fell back, with the reason.

    Raises:
        ModelError: No layer of the model runs in FP8.
        InputsError: `every` is below 1, or TensorBoard is asked for and absent.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int = 16,
        bounds: Bounds | None = DEFAULT_BOUNDS,
        write_to: str | Path | None = None,
        on_reading: Callable[[Reading], None] | None = None,
    ) -> None:
        sites = named_sites(model)
        if not sites:
            raise ModelError("no layer of the model runs in FP8", fix="kp.precision.convert(model)")
        if every < 1:
            raise InputsError(f"every is the number of steps of which one is counted, at least 1, got {every}")
        self._model, self._every, self._bounds, self._on_reading = model, every, bounds, on_reading
        self._sites = {name: site for name, (site, _) in sites.items()}
        device = next(iter(self._sites.values())).layers[0].weight.device
        self._counters = torch.zeros((len(sites), len(OPERANDS), COLUMNS), dtype=torch.float64, device=device)
        for site, counters in zip(self._sites.values(), self._counters, strict=True):
            site.counters = dict(zip(OPERANDS, counters, strict=True))
        self._write, self._close = _writer(write_to)
        self._steps = 0
        self._broken: dict[str, int] = {}
        self._copied: tuple[int, torch.Tensor, torch.cuda.Event] | None = None
        self.readings: list[Reading] = []
        self.history: dict[tuple[str, str], list[tuple[int, float]]] = {}
        self.fallen: dict[str, str] = {}
        switch(self._counters, on=True)

    def step(self) -> None:
        """Say that an optimizer step ended: a counted one is read, and the next one counted or not.

        Warns:
            Float8FallbackWarning: A layer fell back.
        """
        counted = self._steps % self._every == 0
        self._look(wait=counted)
        if counted:
            self._copy()
        self._steps += 1
        switch(self._counters, on=self._steps % self._every == 0)

    def close(self) -> None:
        """Stop counting, read what was counted, and end what is written."""
        switch(self._counters, on=False)
        self._look(wait=True)
        for site in self._sites.values():
            site.counters = {}
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _copy(self) -> None:
        """Take the counts from the device: at once on a CPU, behind what a GPU has yet to do otherwise."""
        if not self._counters.is_cuda:
            values = self._counters.tolist()
            self._counters.zero_()
            self._read(self._steps, values)
            return
        there = torch.empty(self._counters.shape, dtype=torch.float64, pin_memory=True)
        there.copy_(self._counters, non_blocking=True)
        self._counters.zero_()
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(torch.cuda.current_stream(self._counters.device))
        self._copied = (self._steps, there, done)

    def _look(self, *, wait: bool) -> None:
        """Read counts that were copied, where they are there; `wait` for them."""
        if self._copied is None:
            return
        step, there, done = self._copied
        if wait:
            done.synchronize()
        if wait or done.query():  # type: ignore[no-untyped-call]
            self._copied = None
            self._read(step, there.tolist())

    def _read(self, step: int, values: list[list[list[float]]]) -> None:
        self.readings = []
        for name, by_operand in zip(self._sites, values, strict=True):
            for operand, counted in zip(OPERANDS, by_operand, strict=True):
                elements = int(counted[Column.ELEMENTS])
                shares = [counted[c] / max(elements, 1) for c in (Column.SATURATED, Column.FLUSHED, Column.NOT_FINITE)]
                amax = counted[Column.AMAX]
                self.readings.append(Reading(step, name, operand, elements, shares[0], shares[1], shares[2], amax))
        for reading in self.readings:
            if reading.elements:
                self.history.setdefault((reading.layer, reading.operand), []).append((reading.step, reading.amax))
                self._write(reading)
                if self._on_reading is not None:
                    self._on_reading(reading)
        if self._bounds is not None:
            self._judge(self._bounds, step)

    def _judge(self, bounds: Bounds, step: int) -> None:
        found: dict[str, str] = {}
        for reading in self.readings:
            if reading.elements and (what := bounds.broken(reading)):
                found.setdefault(reading.layer, what)
        self._broken = {layer: self._broken.get(layer, 0) + 1 for layer in found}
        for layer, what in found.items():
            if self._broken[layer] < bounds.patience or layer in self.fallen:
                continue
            reason = f"fell back at step {step}: {what}, {bounds.patience} counted steps in a row"
            paths = fall_back(self._model, layer, reason)
            self.fallen |= dict.fromkeys(paths, reason)
            warnings.warn(f"{', '.join(paths)}: {reason}", Float8FallbackWarning, stacklevel=5)


def _writer(where: str | Path | None) -> tuple[Callable[[Reading], None], Callable[[], None]]:
    """Return what writes a reading, and what ends it."""
    if where is None:
        return (lambda _: None), (lambda: None)
    path = Path(where)
    if path.suffix == ".csv":
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w", newline="", encoding="utf-8", buffering=1)
        fields = [field for field in Reading.__dataclass_fields__]  # noqa: C416
        rows = csv.writer(file)
        rows.writerow(fields)
        return (lambda reading: rows.writerow([getattr(reading, field) for field in fields])), file.close
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputsError(
            f"{where} is a directory for TensorBoard, which is not installed ({error})",
            fix="pip install tensorboard, or a file that ends in .csv",
        ) from error
    board: Any = SummaryWriter(str(path))

    def write(reading: Reading) -> None:
        for what in ("saturated", "flushed", "not_finite", "amax"):
            board.add_scalar(f"float8/{reading.layer}/{reading.operand}/{what}", getattr(reading, what), reading.step)

    return write, board.close
