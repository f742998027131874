"""The two protocols a newcomer implements, and the program that a transform turns into another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from kernel_pytorch.core.types import DeviceSpec, Mode, Numerics, Prediction, Skip, Step, WorkloadSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import nn

    from kernel_pytorch.core.workload import Call

__all__ = ["HardwareManager", "Program", "Transform"]


@dataclass(slots=True)
class Program:
    """What a transform turns into another: a model, how it is called, and for training its loss and optimizer.

    A transform may change `model` in place (the search hands it a copy), wrap `call`, replace `optimizer`, and
    must keep `state_dict` keys, the signature, and the structure and dtypes of the outputs.

    Attributes:
        model: The module; same class and `state_dict` keys throughout.
        call: Runs the forward: `call(*args, **kwargs)`. Starts as the module's own uncompiled call (hooks
            included); compile, casts and thread counts wrap it, in order of application.
        mode: Inference or training.
        calls: Example calls by case name, for what must trace or calibrate. Never modified.
        optimizer: In training; else `None`.
        loss: In training: `loss(model, batch) -> scalar tensor`; else `None`.
        fused_loss: Where a step made one function of model and loss, that function, of the signature of `loss`; a loop
            calls it by `kp.fused_loss`, and a trial times it.
        artifact_dir: Where a transform may write files that are deployed beside the plan; `None` during a search.
        trust_artifacts: Whether code in `artifact_dir` may be loaded.
        dynamic: Whether `call` accepts batch sizes and lengths other than those of `calls` by its own means; a step
            that specialises on shapes sets it to False.
        notes: What the report should tell: graph breaks, what was left out and why.
        undo: Called in reverse order by `restore`.
        holds: Objects that live as long as the program (the original model of a fallback, a loaded package).
    """

    model: nn.Module
    call: Callable[..., Any]
    mode: Mode
    calls: Mapping[str, Call]
    optimizer: torch.optim.Optimizer | None = None
    loss: Callable[[Any, Any], torch.Tensor] | None = None
    fused_loss: Callable[[Any, Any], torch.Tensor] | None = None
    artifact_dir: Path | None = None
    trust_artifacts: bool = False
    dynamic: bool = True
    notes: list[str] = field(default_factory=list)
    undo: list[Callable[[], None]] = field(default_factory=list)
    holds: list[Any] = field(default_factory=list)

    def step_loss(self, otherwise: Callable[[Any, Any], torch.Tensor]) -> Callable[[Any, Any], torch.Tensor]:
        """Return the loss that a training step runs: the fused one, else the program's, else `otherwise`."""
        return self.fused_loss or self.loss or otherwise


@runtime_checkable
class Transform(Protocol):
    """One optimisation: one file under `transforms/`, one entry in `catalog.py`.

    Attributes:
        name: Lower-case identifier, as plans store it.
        summary: One line: what it does.
        group: At most one step of a group is in a candidate (`precision`, `compile`, `layout`, `threads`, ...).
        numerics: What it may do to the numbers. `exact` and `reordered` steps are judged at high precision;
            `lower_precision` steps by the error of what ships.
        modes: The modes it is for.
        compiles: Whether applying it costs seconds of compilation, so that the search tries it late.

    A class may also say `pays_compiled = True` (what it does pays inside compiled code only: it is tried together with
    compilation first) or `compile_fuses = True` (compilation does the same: it is compiled without first).
    """

    name: str
    summary: str
    group: str
    numerics: Numerics
    modes: frozenset[Mode]
    compiles: bool

    def probe(self, device: DeviceSpec) -> Skip | None:
        """Return why it cannot run on this machine at all, with the fix; `None` where it can. Needs no model."""
        ...

    def propose(self, workload: WorkloadSpec, device: DeviceSpec) -> Sequence[Step] | Skip:
        """Return the steps worth considering for this workload, most promising first, or why there are none."""
        ...

    def ceiling(self, step: Step, prediction: Prediction, device: DeviceSpec) -> float:
        """Return an upper bound of the speed-up of this step alone (Amdahl's law); `inf` where none is known."""
        ...

    def apply(self, program: Program, step: Step) -> Program:
        """Apply the step; may mutate and return the same program.

        Raises:
            CandidateError: The step cannot be applied to this model, with the reason.
        """
        ...

    def source(self, step: Step) -> str:
        """Return the step as plain PyTorch source: statements over names `model` and `call`, without this package.

        The statements may import what they need, mutate `model`, and rebind `call` (a callable with the
        module's signature; it starts as `model._call_impl`). `kpt eject` strings them together.
        """
        ...


@runtime_checkable
class HardwareManager(Protocol):
    """How to run and time on one vendor's devices.

    Attributes:
        vendor: As in `DeviceSpec.vendor`.
        verified: Whether the contract suite (`tests/contracts`) has been run on real hardware.
    """

    vendor: str
    verified: bool

    @property
    def spec(self) -> DeviceSpec:
        """The device, detected once."""
        ...

    def place(self, tree: Any) -> Any:
        """Return a module or a tree of tensors on the device."""
        ...

    def synchronize(self) -> None:
        """Wait until all work queued on the device has finished."""
        ...

    def time_ms(self, fn: Callable[[], Any]) -> float:
        """Run `fn` once and return its time in milliseconds, device work included."""
        ...

    def peak_bytes(self, fn: Callable[[], Any]) -> int | None:
        """Run `fn` once and return the most memory allocated above what was held before; `None` if unknown."""
        ...

    def telemetry(self) -> Mapping[str, float]:
        """Return load, clocks, power and temperature by name with unit; empty where the device does not tell."""
        ...

    def exclusive(self) -> AbstractContextManager[None]:
        """Lock the device for a measurement among processes of this package."""
        ...
