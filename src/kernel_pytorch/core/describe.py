"""Describe a workload before anything is tried: its structure's hash, its sizes, its operators, its own sanity."""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import hashlib
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from kernel_pytorch.core.program import clone_call, clone_model, model_loss, signatures_of
from kernel_pytorch.core.types import Mode, WorkloadSpec
from kernel_pytorch.core.workload import Call, Workload
from kernel_pytorch.errors import InputsError, KptError, ModelError

__all__ = [
    "check_model",
    "describe",
    "fingerprint",
    "make_optimizer",
    "private_copy",
    "repeated_blocks",
    "training_loss",
]


def fingerprint(model: nn.Module) -> str:
    """Return the SHA-256 of a model's structure, the same in every process and on every device.

    It covers module classes by qualified name (without their file, which differs between `__main__` and an import),
    the tree, and name, shape, dtype and ties of parameters and buffers; not values, and not the mode.
    """
    digest = hashlib.sha256()
    first: dict[int, str] = {}

    def visit(module: nn.Module, path: str) -> None:
        tied = first.setdefault(id(module), path)
        digest.update(f"module {path} {type(module).__qualname__}\n".encode())
        if tied != path:
            digest.update(f"shared {path} {tied}\n".encode())
            return
        own = (*module._parameters.items(), *module._buffers.items())  # noqa: SLF001
        for name, tensor in own:
            full = f"{path}.{name}"
            if tensor is None:
                digest.update(f"none {full}\n".encode())
                continue
            what = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
            shape = "lazy" if is_lazy(tensor) else "x".join(map(str, tensor.shape))
            digest.update(f"{what} {full} [{shape}] {tensor.dtype}\n".encode())
            same = first.setdefault(id(tensor), full)
            if same != full:
                digest.update(f"tied {full} {same}\n".encode())
        for name, child in module._modules.items():  # noqa: SLF001
            if child is not None:
                visit(child, f"{path}.{name}")

    visit(model, "")
    return digest.hexdigest()


def describe(
    workload: Workload,
    model: nn.Module,
    calls: Mapping[str, Call],
    mode: Mode,
    batches: Mapping[str, Any] | None = None,
) -> WorkloadSpec:
    """Return what a transform may know of a workload; runs its first case once, in training with the backward.

    Args:
        workload: The workload; its loss is used in training.
        model: The unmodified model, left as it is: a copy that shares the parameters runs.
        calls: Example calls by case, on the model's device.
        mode: Inference or training.
        batches: What the loss takes, by case; drawn from the workload with seed 0 where absent.

    Raises:
        InputsError: The model raises on the inputs, with the user's traceback, or the loss is no scalar.
    """
    case = next(iter(workload.cases))
    counter = _CountOperators()
    try:
        _run(workload, private_copy(model, mode), case, calls, mode, batches, watch=counter)
    except InputsError:
        # What refuses a dispatch mode but runs without one has operators that cannot be counted.
        _run(workload, private_copy(model, mode), case, calls, mode, batches)
    parameters = list(model.parameters())
    sizes: collections.Counter[str] = collections.Counter()
    for parameter in parameters:
        if parameter.is_floating_point():
            sizes[str(parameter.dtype).removeprefix("torch.")] += _bytes(parameter)
    devices = {t.device.type for t in (*parameters, *model.buffers())}
    return WorkloadSpec(
        name=workload.name or type(model).__name__,
        fingerprint=fingerprint(model),
        mode=mode,
        signatures={name: signatures_of(call) for name, call in calls.items()},
        weights=dict(workload.weights),
        parameters=sum(p.numel() for p in parameters),
        parameter_bytes=sum(map(_bytes, parameters)),
        buffer_bytes=sum(map(_bytes, model.buffers())),
        dtypes=tuple(dtype for dtype, _ in sizes.most_common()),
        modules=dict(sorted(collections.Counter(type(m).__name__ for m in model.modules()).items())),
        blocks=repeated_blocks(model),
        operators=dict(sorted(counter.calls.items())),
        devices=tuple(sorted(devices)) or ("cpu",),
        in_memory=not workload.target,
    )


def check_model(
    workload: Workload,
    model: nn.Module,
    calls: Mapping[str, Call],
    mode: Mode,
    batches: Mapping[str, Any] | None = None,
) -> float:
    """Run the unmodified model twice on each case, from the same seed, and return its own relative error.

    Returns:
        The largest relative error of a row of an output between the two runs; 0.0 for a deterministic model.

    Raises:
        InputsError: The model raises on the inputs, with the user's traceback.
        ModelError: An output is NaN or infinite.
    """
    noise = 0.0
    for case in workload.cases:
        one, two = (_run(workload, private_copy(model, mode), case, calls, mode, batches) for _ in range(2))
        for (path, first), (_, second) in zip(_tensors(one), _tensors(two), strict=False):
            if first.is_floating_point() or first.is_complex():
                bad = int((~torch.isfinite(first)).sum())
                if bad:
                    raise ModelError(
                        f"the unmodified model's output {path} has {bad} NaN or infinite values (case {case!r}); "
                        "there is nothing to compare a candidate with",
                        fix="give example inputs that the model is meant for, and check its weights",
                    )
            noise = max(noise, _relative_error(first, second))
    return noise


def private_copy(model: nn.Module, mode: Mode) -> nn.Module:
    """Return a copy in the given mode that shares the parameters and owns the rest: running it changes no buffer.

    Raises:
        ModelError: The model cannot be copied, with the reason.
    """
    memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    try:
        clone = copy.deepcopy(model, memo)
    except Exception:  # noqa: BLE001  a module's own __deepcopy__ may raise anything; the full copy tells why
        clone = clone_model(model)
    return clone.train(mode is Mode.TRAINING)


def training_loss(workload: Workload) -> Callable[[Any, Any], torch.Tensor]:
    """Return `loss(model, batch) -> scalar tensor`: the workload's own, else the loss that the model returns."""
    return workload.loss or model_loss


def make_optimizer(workload: Workload, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the workload's optimizer over the parameters, or AdamW with a learning rate of 1e-3.

    Raises:
        ModelError: No parameter requires a gradient.
    """
    parameters = list(parameters)
    if workload.optimizer is not None:
        return workload.optimizer(parameters)
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    if not trainable:
        raise ModelError("no parameter of the model requires a gradient: there is nothing to train")
    return torch.optim.AdamW(trainable, lr=1e-3)


class _CountOperators(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Counts aten operators by name without overload (`aten.addmm`)."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        self.calls[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


def _run(  # noqa: PLR0917  the arguments of `describe`
    workload: Workload,
    model: nn.Module,
    case: str,
    calls: Mapping[str, Call],
    mode: Mode,
    batches: Mapping[str, Any] | None,
    *,
    watch: TorchDispatchMode | None = None,
) -> Any:
    """Run one case from a fixed seed; in training, return the loss with its gradients."""
    call, batch = Call(), None
    if mode is Mode.INFERENCE:
        call = clone_call(calls[case])  # a model may write to its inputs
    else:
        batch = workload.batch(case, 0) if batches is None else clone_call(Call((batches[case],))).args[0]
    devices = [t.device for t in model.parameters() if t.device.type == "cuda"][:1]
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        try:
            with watch or contextlib.nullcontext():
                if mode is Mode.INFERENCE:
                    with torch.no_grad():
                        return model(*call.args, **call.kwargs)
                return _loss_and_gradients(training_loss(workload), model, batch)
        except KptError:
            raise
        except Exception as error:  # the user's model may raise anything
            raise InputsError(
                f"the model raises on the example inputs of case {case!r}: {type(error).__name__}: {error}",
                fix="call model(*args, **kwargs) with them yourself; they must fit the model's signature",
                user_traceback="".join(traceback.format_exception(error.with_traceback(_users_part(error)))),
            ) from error


def _users_part(error: Exception) -> TracebackType | None:
    """Return the traceback from the first frame outside this file on."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    return trace


def _loss_and_gradients(loss: Callable[[Any, Any], Any], model: nn.Module, batch: Any) -> tuple[Any, ...]:
    value = loss(model, batch)
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise InputsError(f"loss(model, batch) returned {got}; expected a scalar tensor", fix="reduce it, e.g. .mean()")
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not value.requires_grad:
        raise InputsError(
            "the loss does not depend on any parameter that requires a gradient",
            fix="check for .detach(), torch.no_grad() or frozen parameters",
        )
    return value.detach(), *torch.autograd.grad(value.reshape(()), trainable, allow_unused=True)


def _tensors(value: Any, path: str = "output") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensor leaves of an output by path; looks into dataclasses and mappings that pytree does not know."""
    for key, leaf in pytree.tree_leaves_with_path(value):
        here = path + pytree.keystr(key)
        if isinstance(leaf, torch.Tensor):
            yield here, leaf
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            for field in dataclasses.fields(leaf):
                yield from _tensors(getattr(leaf, field.name, None), f"{here}.{field.name}")
        elif isinstance(leaf, Mapping):
            for name in leaf:
                yield from _tensors(leaf[name], f"{here}[{name!r}]")


def _relative_error(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Return the relative error of the worst row; for what is not a float, the share of elements that differ."""
    if reference.shape != other.shape:
        return float("inf")
    if reference.numel() == 0:
        return 0.0
    if not reference.is_floating_point() and not reference.is_complex():
        return float((reference != other).double().mean())
    wide = torch.complex128 if reference.is_complex() else torch.float64
    rows = reference.shape[0] if reference.dim() > 1 else 1
    one, two = (t.detach().to(wide).reshape(rows, -1) for t in (reference, other))
    norms = one.norm(dim=1)
    floor = max(float(one.norm()) / rows**0.5 * 1e-3, 1e-30)
    return float(((one - two).norm(dim=1) / norms.clamp_min(floor)).max())


def repeated_blocks(model: nn.Module) -> dict[str, int]:
    """Return how often each class repeats with one structure under one ModuleList or Sequential; leaves are none."""
    found: collections.Counter[str] = collections.Counter()
    for parent in model.modules():
        if not isinstance(parent, nn.ModuleList | nn.Sequential):
            continue
        alike = collections.Counter(
            (type(child).__name__, fingerprint(child)) for child in parent if next(child.children(), None) is not None
        )
        for (name, _), count in alike.items():
            if count > 1:
                found[name] = max(found[name], count)
    return dict(sorted(found.items()))


def _bytes(tensor: torch.Tensor) -> int:
    return 0 if is_lazy(tensor) else tensor.numel() * tensor.element_size()
