"""Update all parameters of Adam or AdamW in one Triton launch, at the speed of memory (`ops/adamw`)."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim.adam import adam

from kernel_pytorch._triton.launch import cannot_run
from kernel_pytorch.core.protocols import Program
from kernel_pytorch.core.types import DeviceSpec, Mode, Numerics, Prediction, Skip, Step, WorkloadSpec
from kernel_pytorch.errors import CandidateError
from kernel_pytorch.ops.adamw.api import FLOATS, Tables, unsupported
from kernel_pytorch.ops.adamw.op import Entry, Hyper, update
from kernel_pytorch.transforms.ceilings import bounded

__all__ = ["AdamW", "AdamWStep"]

_MASTER = "master"
_VENDORS = ("nvidia", "amd")


class AdamW:
    """One launch for `torch.optim.Adam` and `AdamW`; the optimizer stays the same object with the same state."""

    name = "adamw"
    summary = "update all parameters of AdamW in one Triton launch"
    group = "optimizer"
    numerics = Numerics.REORDERED
    modes = frozenset({Mode.TRAINING})
    compiles = False

    def probe(self, device: DeviceSpec) -> Skip | None:
        """Triton runs on NVIDIA and AMD GPUs."""
        if device.vendor not in _VENDORS:
            return Skip(f"the kernel runs on GPUs of {' and '.join(_VENDORS)}, not on {device.vendor}")
        return cannot_run()

    def propose(self, workload: WorkloadSpec, device: DeviceSpec) -> Sequence[Step] | Skip:
        """One step; which optimizer there is shows when it is applied."""
        if workload.mode is not Mode.TRAINING:
            return Skip("an optimizer runs in training only")
        skip = self.probe(device)
        if skip is not None:
            return skip
        known = {str(dtype).removeprefix("torch.") for dtype in FLOATS}
        if not known & set(workload.dtypes):
            return Skip(f"it updates parameters of {', '.join(sorted(known))}; the model has {workload.dtypes}")
        return [Step(self.name)]

    def ceiling(self, step: Step, prediction: Prediction, device: DeviceSpec) -> float:
        """The update may cost nothing, and so may the overhead of its many small calls."""
        del step, device
        return bounded(prediction, {"optimizer": 0.0, "overhead": 0.0})

    def apply(self, program: Program, step: Step) -> Program:
        """Put the step on the optimizer; `undo` takes it off and leaves the state as PyTorch keeps it.

        With `master_weights=True` parameters of bf16 and fp16 get an fp32 copy in the optimizer's state, under
        `master`, which is what is updated; each parameter is then its rounded copy.
        """
        unknown = set(step.params) - {"master_weights"}
        if unknown:
            raise CandidateError(f"unknown parameters {sorted(unknown)} of {step}; it takes master_weights")
        optimizer = program.optimizer
        reason = _unfit(optimizer)
        if optimizer is None or reason:
            raise CandidateError(f"{step}: {reason}")
        taken = AdamWStep(optimizer, master_weights=bool(step.params.get("master_weights", False)))
        program.undo.append(taken.remove)
        program.holds.append(taken)
        return program

    def source(self, step: Step) -> str:
        """It has none: the kernel is Triton code of this package, and PyTorch has no function that does the same.

        Raises:
            CandidateError: Always, with what to use instead.
        """
        raise CandidateError(
            f"{step} cannot be written as plain PyTorch: its kernel is part of kernel_pytorch",
            fix="optimise with `fused_optimizer` in its place, or keep using the plan with kernel_pytorch",
        )


def _unfit(optimizer: torch.optim.Optimizer | None) -> str:
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
        return f"{type(optimizer).__name__} is not torch.optim.Adam or torch.optim.AdamW"
    assert optimizer is not None
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if all(p.dtype is torch.float64 for p in parameters):
        return ""  # A model lifted to fp64 for validation: PyTorch's own step, by the rule that AdamWStep states.
    reasons = [cannot_run(p) or (None if p.dtype in FLOATS else Skip(f"a parameter is {p.dtype}")) for p in parameters]
    if any(group["amsgrad"] or group["differentiable"] for group in optimizer.param_groups):
        return "amsgrad and differentiable are not supported"
    first = next((r for r in reasons if r is not None), None)
    return first.reason if first is not None and all(reasons) else ""


class AdamWStep:
    """The step of one optimizer, in the place of its `step`: same object, state, hooks, groups and closure.

    What the kernel cannot update takes PyTorch's own step, by rule and at every step: parameters that are not fp32,
    bf16 or fp16 (fp64, to which validation lifts a model), complex or sharded ones or ones with gaps, groups with
    `amsgrad` or `differentiable`, and whole steps under a `GradScaler` that leaves unscaling to the optimizer.
    `taken` counts the parameters of the last step that the kernel updated.

    The step counts are moved to the parameters' device in fp32, as `fused=True` keeps them, also after
    `load_state_dict`. The version counters of what is written go up, as with any in-place operation.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, master_weights: bool = False) -> None:
        self.optimizer = optimizer
        self.master_weights = master_weights
        self.tables = Tables()
        self.taken = 0
        self._known: dict[torch.Tensor, tuple[tuple[Any, ...], bool]] = {}
        self._versions: dict[torch.Tensor, int] = {}
        self._active = True
        self._stashed: dict[int, torch.Tensor] = {}
        self._hooks: list[Any] = []
        if master_weights:
            self._hooks = [
                optimizer.register_load_state_dict_pre_hook(self._stash_masters),
                optimizer.register_load_state_dict_post_hook(self._put_masters),
            ]
        self._before: Callable[..., Any] | None = vars(optimizer).get("step")
        self._step = types.MethodType(self._function(optimizer.step), optimizer)
        optimizer.step = self._step  # type: ignore[method-assign]

    def _function(self, before: Callable[..., Any]) -> Callable[..., Any]:
        hooked = type(self.optimizer).profile_hook_step(self._run)

        def step(optimizer: Any, closure: Callable[[], Any] | None = None) -> Any:
            optimizer._opt_called = True  # noqa: SLF001  What a learning-rate scheduler's own wrapper notes.
            if not self._active or self._scaled():
                return type(optimizer).step(optimizer, closure)
            return hooked(optimizer, closure)

        if hasattr(before, "_wrapped_by_lr_sched"):
            step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # noqa: SLF001
        return step

    def _scaled(self) -> bool:
        return any(getattr(self.optimizer, name, None) is not None for name in ("grad_scale", "found_inf"))

    def remove(self) -> None:
        """Give the optimizer its own step back, and the step counts the place where PyTorch keeps them."""
        self._active = False
        if vars(self.optimizer).get("step") is self._step:
            if self._before is None:
                del self.optimizer.step
            else:
                self.optimizer.step = self._before  # type: ignore[method-assign]
        for hook in self._hooks:
            hook.remove()
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                state = self.optimizer.state.get(parameter, {})
                state.pop(_MASTER, None)
                if "step" in state and not (group.get("fused") or group.get("capturable")):
                    state["step"] = state["step"].cpu()

    @torch.no_grad()
    def _run(self, optimizer: Any, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        entries: list[Entry] = []
        hypers: list[Hyper] = []
        for group in optimizer.param_groups:
            lists: tuple[list[torch.Tensor], ...] = ([], [], [], [], [], [])
            has_complex = optimizer._init_group(group, *lists)  # noqa: SLF001
            rest = self._take(group, lists, len(hypers), entries)
            hypers.append(_hyper(group))
            if rest[0]:
                _own_step(group, rest, has_complex=has_complex)
        self.taken = len(entries)
        if entries:
            update(entries, hypers, self.tables)
            if self.master_weights:
                self._versions = {e.param: e.param._version for e in entries}  # noqa: SLF001
        return loss

    def _take(
        self, group: dict[str, Any], lists: tuple[list[torch.Tensor], ...], number: int, entries: list[Entry]
    ) -> tuple[list[torch.Tensor], ...]:
        """Append what the kernel updates to `entries` and return the lists of what it does not."""
        if group["amsgrad"] or group["differentiable"]:
            return lists
        rest: tuple[list[torch.Tensor], ...] = ([], [], [], [], [], [])
        for param, grad, exp_avg, exp_avg_sq, count in zip(*lists[:4], lists[5], strict=True):
            state = self.optimizer.state[param]
            flat, step = _like(grad, param), count
            if param.dtype in FLOATS and (count.device != param.device or count.dtype is not torch.float32):
                step = count.to(param.device, torch.float32)
            if not self._fits(param, flat, exp_avg, exp_avg_sq, step):
                for one, value in zip(rest, (param, grad, exp_avg, exp_avg_sq, None, count), strict=True):
                    if value is not None:
                        one.append(value)
                continue
            state["step"] = step
            entries.append(Entry(param, flat, exp_avg, exp_avg_sq, step, number, self._master(param, state)))
        return rest

    def _fits(self, param: torch.Tensor, grad: torch.Tensor, *state: torch.Tensor) -> bool:
        """Ask the kernel once for each combination of tensors; asking every time would take 10 us a parameter."""
        key = (
            *map(id, state),
            param.dtype,
            param.data_ptr() == 0,
            grad.dtype,
            grad.stride(),
            type(grad),
            param.stride(),
        )
        known = self._known.get(param)
        if known is None or known[0][0] != key:
            fits = unsupported(param, grad, *state) is None
            known = self._known[param] = ((key, state), fits)
        return known[1]

    def _master(self, param: torch.Tensor, state: dict[str, Any]) -> torch.Tensor | None:
        if not self.master_weights or param.dtype is torch.float32:
            return None
        changed = self._versions.get(param, param._version) != param._version  # noqa: SLF001
        if _MASTER not in state or changed:
            state[_MASTER] = param.detach().to(torch.float32, copy=True)
        master: torch.Tensor = state[_MASTER]
        return master

    def _stash_masters(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        """Keep the loaded copies: PyTorch rounds every state to the dtype of its parameter."""
        del optimizer
        self._stashed = {i: s[_MASTER] for i, s in state_dict["state"].items() if _MASTER in s}

    def _put_masters(self, optimizer: torch.optim.Optimizer) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for i, master in self._stashed.items():
            param = parameters[i]
            optimizer.state[param][_MASTER] = master.to(param.device, torch.float32, copy=True)
            self._versions[param] = param._version  # noqa: SLF001
        self._stashed = {}


def _like(grad: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
    """Return the gradient in the memory format of the parameter, where that is all they differ in."""
    if grad.stride() == param.stride() or type(grad) is not torch.Tensor or grad.shape != param.shape:
        return grad
    return torch.empty_like(param, dtype=grad.dtype).copy_(grad)


def _hyper(group: dict[str, Any]) -> Hyper:
    beta1, beta2 = group["betas"]
    return Hyper(
        group["lr"], (float(beta1), float(beta2)), float(group["eps"]), float(group["weight_decay"]),
        group["maximize"], group["decoupled_weight_decay"],
    )  # fmt: skip


def _own_step(group: dict[str, Any], lists: tuple[list[torch.Tensor], ...], *, has_complex: bool) -> None:
    params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, counts = lists
    beta1, beta2 = group["betas"]
    flags = ("amsgrad", "lr", "weight_decay", "eps", "maximize", "foreach", "capturable", "differentiable", "fused")
    adam(
        params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, counts,
        has_complex=has_complex, beta1=beta1, beta2=beta2, decoupled_weight_decay=group["decoupled_weight_decay"],
        **{flag: group[flag] for flag in flags},
    )  # fmt: skip
