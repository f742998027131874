"""One training step as one call, which on CUDA replays the whole step as one graph.

    step = kp.TrainStep(model, loss, optimizer, clip_norm=1.0, scheduler=scheduler)
    for batch in loader:
        value = step(batch)

The first calls of each batch shape run as usual; then the step is recorded (forward, loss, backward, clipping, update)
and replayed. So the trajectory is that of the plain loop, to rounding: nothing is run twice, and nothing is put back.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from kernel_pytorch.errors import CandidateError
from kernel_pytorch.transforms.cuda_graph import Pointers, Recorder, Unrecordable, no_graphs_on, signature

__all__ = ["TrainStep"]

log = logging.getLogger(__name__)

_WARM_UPS = 3
_MOST_KINDS = 32
_TENSOR_LR = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)


class TrainStep:
    """A whole training step: forward, loss, backward, clipping, optimizer, schedule, gradients cleared.

    On CUDA the step is recorded as a CUDA graph for each batch shape after three usual steps of that shape. While it
    is recorded the optimizer is made capturable (`capturable=True`; SGD runs its fused kernel) and its learning rate
    is read from the device, so schedulers, and assignments to `group["lr"]`, keep working. Any other change of the
    optimizer's groups, of `requires_grad` or of a module's mode, and any parameter, buffer or optimizer state that is
    replaced (`load_state_dict` of an optimizer, `model.to`), is noticed and recorded anew.

    Python code in the model and the loss runs while recording only: what depends on a step counter or prints a value
    belongs outside, or use `graph=False`. Where a step cannot be recorded (the host waits for the device, random
    numbers of the host, hooks on the optimizer, an optimizer that counts in Python), it goes on uncaptured, `reason`
    says why, and a warning is logged once.

    Args:
        model: The model, in training mode; may have a plan applied (`kp.prepare`).
        loss: `loss(model, batch) -> scalar tensor`; runs the model's forward.
        optimizer: Over the model's parameters; must not need a closure.
        accumulate: Batches per update: the loss is divided by it, and every `accumulate`-th call updates.
        clip_norm: Largest norm of all gradients together (`torch.nn.utils.clip_grad_norm_`); `None` does not clip.
        scheduler: Stepped once after each update; one that needs a metric is not accepted.
        graph: Whether to record on CUDA; otherwise every step runs as usual.

    Attributes:
        reason: Why steps run uncaptured; empty while they are, or will be, replayed.
        grad_norm: Norm of the gradients before clipping at the last update, a 0-d tensor; `None` without `clip_norm`.
        updates: Optimizer updates so far.

    Raises:
        ValueError: An argument that cannot be used.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], torch.Tensor],
        optimizer: torch.optim.Optimizer,
        *,
        accumulate: int = 1,
        clip_norm: float | None = None,
        scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
        graph: bool = True,
    ) -> None:
        if accumulate < 1:
            raise ValueError(f"accumulate must be 1 or more, got {accumulate}")
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"clip_norm must be positive, got {clip_norm}")
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise ValueError("ReduceLROnPlateau steps on a metric that only your loop knows: step it there")  # noqa: TRY004
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError("LBFGS needs a closure, which a step does not have")  # noqa: TRY004
        self.model = model
        self.loss = loss
        self.optimizer = optimizer
        self.accumulate = accumulate
        self.clip_norm = clip_norm
        self.scheduler = scheduler
        self.reason = (no_graphs_on(model) or _unrecordable(model, optimizer)) if graph else "graph=False"
        self.grad_norm: torch.Tensor | None = None
        self.updates = 0
        self._pending = 0
        self._make: Callable[[torch.device], Any] = Recorder
        self._recorder: Any = None
        self._pointers: Pointers | None = None
        self._rates: list[torch.Tensor | None] = []
        self._written: list[float | None] = []
        self._seen: dict[tuple[Any, ...], int] = {}
        self._recorded: dict[tuple[Any, ...], tuple[list[torch.Tensor], Callable[[], Any]]] = {}
        self._grads: list[tuple[nn.Parameter, torch.Tensor]] = []
        self._counters_moved = False

    def __call__(self, batch: Any) -> torch.Tensor:
        """Run one step on a batch and return its loss, detached (0-d, on the device, not divided by `accumulate`).

        Args:
            batch: What `loss` takes: a tensor, or tensors in tuples, lists and dicts.
        """
        updates = self._pending + 1 == self.accumulate
        if self.reason:
            value, norm = self._run(batch, updates=updates)
        else:
            value, norm = self._graphed(batch, updates=updates)
        self._pending = 0 if updates else self._pending + 1
        if updates:
            self._after_update(norm)
        return value

    def flush(self) -> None:
        """Update with the gradients of fewer batches than `accumulate`, at the end of an epoch, say; else do nothing.

        Their sum stays divided by `accumulate`, as in a loop that updates after the last batch.
        """
        if self._pending:
            with self._capturing_optimizer():
                norm = self._update()
            self._pending = 0
            self._after_update(norm)

    @property
    def recordings(self) -> int:
        """How many graphs there are: one for each batch shape, and with `accumulate` one more of each."""
        return len(self._recorded)

    def release(self) -> None:
        """Free the graphs, and give the optimizer back as it was (step counters on the host where they were)."""
        self._recorded.clear()
        self._seen.clear()
        self._grads.clear()
        self._pointers = self._recorder = None
        if self._counters_moved:
            for group in self.optimizer.param_groups:
                if not (group.get("capturable") or group.get("fused")):
                    self._place_counters(group["params"], torch.device("cpu"))
        self._counters_moved = False
        self._rates.clear()

    def _run(self, batch: Any, *, updates: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        value = self.loss(self.model, batch)
        if value.numel() != 1:
            raise ValueError(f"loss(model, batch) must return a scalar, got shape {tuple(value.shape)}")
        value = value.reshape(())
        (value / self.accumulate if self.accumulate > 1 else value).backward()  # type: ignore[no-untyped-call]
        return value.detach(), self._update() if updates else None

    def _update(self) -> torch.Tensor | None:
        norm = None
        if self.clip_norm is not None:
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()
        # Graphs of several batches add into the same gradients, so those stay where they are.
        self.optimizer.zero_grad(set_to_none=not self._grads)
        return norm

    def _after_update(self, norm: torch.Tensor | None) -> None:
        self.updates += 1
        self.grad_norm = norm
        if self.scheduler is not None:
            self.scheduler.step()

    def _graphed(self, batch: Any, *, updates: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Replay the recording of this kind of step; until there is one, run it, and then record it."""
        leaves, spec = pytree.tree_flatten(batch)
        try:
            key = self._key(leaves, spec, updates=updates)
            if self._pointers is not None and self._pointers.moved():
                log.info("parameters or optimizer state were replaced: the step is recorded again")
                self._recorded.clear()
                self._seen.clear()
                self._pointers = self._recorder = None
            if key not in self._recorded and self._seen.get(key, 0) >= _WARM_UPS:
                self._recorded[key] = self._record(leaves, spec, updates=updates)
        except (CandidateError, torch.OutOfMemoryError) as error:
            self._fall_out(str(error).splitlines()[0])
            return self._run(batch, updates=updates)
        if key in self._recorded:
            return self._replay(key, leaves)
        return self._warm_up(key, batch, updates=updates)

    def _key(self, leaves: list[Any], spec: Any, *, updates: bool) -> tuple[Any, ...]:
        device = next(self.model.parameters()).device
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor) and leaf.device != device:
                raise CandidateError(f"a tensor of the batch is on {leaf.device}: move it to {device} before the step")
        modes = tuple([m.training for m in self.model.modules()])
        wanted = tuple([p.requires_grad for p in self.model.parameters()])
        key = (updates, signature(leaves, spec), modes, wanted, _frozen_settings(self.optimizer))
        if key not in self._seen and len(self._seen) >= _MOST_KINDS:
            raise CandidateError(
                f"there were {_MOST_KINDS} kinds of steps already: batch shapes, or settings that a graph freezes "
                "(of the optimizer's groups, modes of modules), keep changing"
            )
        return key

    def _warm_up(self, key: tuple[Any, ...], batch: Any, *, updates: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run a real step where recording will run, the last time looking for what cannot be recorded."""
        if self._recorder is None:
            self._recorder = self._make(next(self.model.parameters()).device)
            self._move_counters()
        self._keep_gradients()

        def run() -> tuple[torch.Tensor, torch.Tensor | None]:
            return self._run(batch, updates=updates)

        seen = self._seen[key] = self._seen.get(key, 0) + 1
        with self._capturing_optimizer():
            if seen < _WARM_UPS:
                out: tuple[torch.Tensor, torch.Tensor | None] = self._recorder.warm_up(run)
                return out
            before = _host_state(self.optimizer)
            out, reason = self._recorder.inspect(run)
            if not reason and updates:  # while the settings of this context hold, for they are numbers too
                reason = _counted_on_host(self.optimizer, before)
        if reason:
            self._fall_out(reason)
        return out

    def _record(self, leaves: list[Any], spec: Any, *, updates: bool) -> tuple[list[torch.Tensor], Callable[[], Any]]:
        copies = [torch.empty_like(x).copy_(x) if isinstance(x, torch.Tensor) else x for x in leaves]
        self._keep_gradients()
        gradients = [(p, p.grad) for p in self.model.parameters()]
        self._pointers = Pointers(self.model, self.optimizer)

        def run() -> tuple[torch.Tensor, torch.Tensor | None]:
            return self._run(pytree.tree_unflatten(copies, spec), updates=updates)

        try:
            with self._capturing_optimizer():
                replay = self._recorder.capture(run)
        except (CandidateError, torch.OutOfMemoryError):
            for parameter, gradient in gradients:
                parameter.grad = gradient
            raise
        return [x for x in copies if isinstance(x, torch.Tensor)], replay

    def _replay(self, key: tuple[Any, ...], leaves: list[Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
        static, replay = self._recorded[key]
        for held, given in zip(static, [x for x in leaves if isinstance(x, torch.Tensor)], strict=True):
            held.copy_(given)
        self._keep_gradients()
        self._write_rates()
        value, norm = replay()
        return value.clone(), None if norm is None else norm.clone()

    def _keep_gradients(self) -> None:
        """Where several batches make an update, put the gradients that the graphs add into in their place."""
        if self.accumulate == 1:
            return
        known = {id(p) for p, _ in self._grads}
        for parameter in self.model.parameters():
            if id(parameter) not in known and parameter.grad is not None:
                self._grads.append((parameter, parameter.grad))
        for parameter, held in self._grads:
            if parameter.grad is not held:
                held.zero_() if parameter.grad is None else held.copy_(parameter.grad)
                parameter.grad = held

    @contextmanager
    def _capturing_optimizer(self) -> Iterator[None]:
        """Make the optimizer capturable, with learning rates read from the device, for one step."""
        if self.reason:
            yield
            return
        optimizer = self.optimizer
        before = [dict(group) for group in optimizer.param_groups]
        told = getattr(optimizer, "_warned_capturable_if_run_uncaptured", None)
        self._write_rates()
        for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
            if "capturable" in group:
                group["capturable"] = True
            if type(optimizer) is torch.optim.SGD:
                group["fused"], group["foreach"] = True, False
            if rate is not None:
                group["lr"] = rate
        optimizer._warned_capturable_if_run_uncaptured = True  # noqa: SLF001
        try:
            yield
        finally:
            for group, held in zip(optimizer.param_groups, before, strict=True):
                for name in ("capturable", "fused", "foreach", "lr"):
                    if name in held:
                        group[name] = held[name]
            if told is None:
                del optimizer._warned_capturable_if_run_uncaptured  # noqa: SLF001

    def _write_rates(self) -> None:
        """Bring the learning rates on the device up to date with the optimizer's groups."""
        groups = self.optimizer.param_groups
        if len(self._rates) != len(groups):
            device = next(self.model.parameters()).device
            able = type(self.optimizer) in _TENSOR_LR
            self._rates = [
                torch.full((), float("nan"), device=device) if able and not _on_device(group["lr"]) else None
                for group in groups
            ]
            self._written = [None] * len(groups)
        for i, (group, rate) in enumerate(zip(groups, self._rates, strict=True)):
            if rate is not None and (value := float(group["lr"])) != self._written[i]:
                rate.fill_(value)
                self._written[i] = value

    def _move_counters(self) -> None:
        """Move step counters to the device, where capturable optimizers look for them."""
        groups = self.optimizer.param_groups
        if all("capturable" in group for group in groups):
            self._counters_moved = True
            for group in groups:
                self._place_counters(group["params"], next(self.model.parameters()).device)

    def _place_counters(self, parameters: list[nn.Parameter], device: torch.device) -> None:
        for parameter in parameters:
            state = self.optimizer.state.get(parameter, {})
            if isinstance(state.get("step"), torch.Tensor) and state["step"].device != device:
                state["step"] = state["step"].to(device, torch.float32)

    def _fall_out(self, reason: str) -> None:
        log.warning("the training step runs without a CUDA graph: %s", reason)
        self.release()
        self.reason = reason


def _unrecordable(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    if any(isinstance(m, DistributedDataParallel) for m in model.modules()):
        return "DistributedDataParallel reduces gradients from Python"
    if any(type(p).__name__ == "DTensor" for p in model.parameters()):
        return "parameters are distributed (DTensor)"
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:  # noqa: SLF001
        return "the optimizer has step hooks, which a replay would not run"
    # What `ship` puts in the slot of a module with a plan holds the plan's program.
    plan = getattr(model._compiled_call_impl, "program", None)  # noqa: SLF001
    for mark in getattr(plan, "holds", ()):
        if isinstance(mark, Unrecordable):
            return f"the plan has {mark.step}: {mark.reason}"
    if any(group.get("differentiable") for group in optimizer.param_groups):
        return "the optimizer is differentiable"
    return ""


def _on_device(rate: Any) -> bool:
    return isinstance(rate, torch.Tensor) and rate.device.type != "cpu"


def _frozen_settings(optimizer: torch.optim.Optimizer) -> tuple[Any, ...]:
    """Return what a recording freezes of the optimizer's groups; a learning rate on the device is not among it."""
    live = type(optimizer) in _TENSOR_LR
    groups = []
    for group in optimizer.param_groups:
        named = [(k, v) for k, v in group.items() if k != "params" and not (k == "lr" and live)]
        groups.append((len(group["params"]), *[(k, _plain(v)) for k, v in named]))
    return tuple(groups)


def _plain(value: Any) -> Any:
    return id(value) if isinstance(value, torch.Tensor) else repr(value) if isinstance(value, list | dict) else value


def _host_state(optimizer: torch.optim.Optimizer) -> dict[tuple[Any, ...], Any]:
    """Return the numbers that an optimizer keeps on the host: a recording would not move them on."""
    found: dict[tuple[Any, ...], Any] = {}
    for i, group in enumerate(optimizer.param_groups):
        found |= {(f"group {i}", k): v for k, v in group.items() if isinstance(v, bool | int | float)}
    for i, state in enumerate(optimizer.state.values()):
        found |= {(f"state {i}", k): v for k, v in state.items() if isinstance(v, bool | int | float)}
    own = {k: v for k, v in vars(optimizer).items() if not k.startswith("_")}
    return found | {("attribute", k): v for k, v in own.items() if isinstance(v, bool | int | float)}


def _counted_on_host(optimizer: torch.optim.Optimizer, before: dict[tuple[Any, ...], Any]) -> str:
    """Return which state of the optimizer a replay would leave behind; empty if none."""
    kind = type(optimizer).__name__
    now = _host_state(optimizer)
    moved = next((name for name, value in now.items() if name in before and before[name] != value), None)
    if moved is not None:
        return f"{kind} counts in Python ({moved[0]}: {moved[1]}), which a graph would freeze"
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.device != parameter.device:
                return f"{kind} keeps {name!r} on {value.device}, where a graph does not reach"
    return ""
