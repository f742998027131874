"""From a model to a program and back: copy it, begin a program on it, ship the program as the user's own module.

A shipped module is the same class with the same `state_dict` keys. Its call is routed through the slot that
`nn.Module.compile` itself uses, which pickling and copying drop, so a copy is the plain module again.
"""

from __future__ import annotations

import copy
import logging
import zlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from kernel_pytorch.core.protocols import Program
from kernel_pytorch.core.types import Mode, TensorSignature
from kernel_pytorch.core.workload import Call, as_call
from kernel_pytorch.errors import InputsError, ModelError

__all__ = [
    "CallCounts",
    "begin",
    "call_counts",
    "clone_call",
    "clone_model",
    "fused_loss",
    "model_loss",
    "plain_call",
    "plain_tensors",
    "restore",
    "ship",
    "signatures_of",
    "state_bytes",
    "state_digest",
]

log = logging.getLogger(__name__)

_ON_DEVICE_BYTES = 1 << 20
_CHUNK_WORDS = 1 << 25
_SPREAD = 0x1E3779B97F4A7C14
"""Even, so that every factor is odd; the golden ratio's 64 bits spread neighbours far apart."""


def clone_model(model: nn.Module) -> nn.Module:
    """Return an independent copy with equal parameters, buffers, mode and ties.

    Tensors that autograd computed and that a module keeps (`weight_norm`'s weight, a cached activation), which
    `copy.deepcopy` refuses, are copied by value.

    Raises:
        ModelError: The model cannot be copied, with the reason.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise ModelError(
            f"the model cannot be copied: {type(error).__name__}: {error}",
            fix="pass a Workload whose `model` factory builds a fresh one",
        ) from error


def clone_call(call: Call) -> Call:
    """Return a call with the same values in tensors of its own (strides kept, history dropped)."""

    def fresh(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return copy.deepcopy(leaf)
        return leaf.detach().clone(memory_format=torch.preserve_format).requires_grad_(leaf.requires_grad)

    args, kwargs = pytree.tree_map(fresh, (call.args, dict(call.kwargs)))
    return Call(args, kwargs)


def plain_call(model: nn.Module) -> Callable[..., Any]:
    """Return the module's own uncompiled call, hooks included."""
    return model._call_impl  # noqa: SLF001


def begin(
    model: nn.Module,
    mode: Mode,
    calls: Mapping[str, Call],
    *,
    optimizer: torch.optim.Optimizer | None = None,
    loss: Callable[[Any, Any], torch.Tensor] | None = None,
) -> Program:
    """Return the program that runs the model as it is; transforms work on the model itself, so pass a copy."""
    return Program(model=model, call=plain_call(model), mode=mode, calls=calls, optimizer=optimizer, loss=loss)


@dataclass(slots=True)
class CallCounts:
    """Calls of a shipped module: those the plan covers, and those it does not (which run the original)."""

    inside: int = 0
    outside: int = 0
    last_outside: str = ""


def _key(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
    return (
        spec,
        *((tuple(x.shape), x.dtype, x.requires_grad) if isinstance(x, torch.Tensor) else _hashable(x) for x in leaves),
    )


def _hashable(leaf: Any) -> Any:
    return leaf if isinstance(leaf, bool | int | float | str | type(None)) else type(leaf)


def signatures_of(call: Call) -> tuple[TensorSignature, ...]:
    """Return shape and dtype of every tensor leaf of a call, in pytree order."""
    leaves = pytree.tree_leaves((call.args, dict(call.kwargs)))
    return tuple(
        TensorSignature(tuple(x.shape), str(x.dtype).removeprefix("torch."))
        for x in leaves
        if isinstance(x, torch.Tensor)
    )


class _Guarded:
    """Routes a call to the program where the plan covers it, else to the original; counts both."""

    def __init__(
        self,
        program: Program,
        original: Callable[..., Any] | None,
        signatures: Collection[tuple[TensorSignature, ...]] = (),
    ) -> None:
        self.program = program
        self.original = original
        self.counts = CallCounts()
        self.training = program.mode is Mode.TRAINING
        # In training a loss calls the model, with what it makes of a batch: no example of that call exists.
        fixed = not program.dynamic and not self.training
        self.known = {_key(c.args, c.kwargs) for c in program.calls.values()} if fixed and program.calls else None
        self.signatures = frozenset(signatures) if fixed and not program.calls else frozenset()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        why = self._outside(args, kwargs)
        if not why:
            self.counts.inside += 1
            return self.program.call(*args, **kwargs)
        if self.original is None:
            raise InputsError(f"call outside the plan: {why}", fix="optimise with this case in the workload")
        if not self.counts.outside:
            log.warning("call outside the plan runs the unmodified model: %s", why)
        self.counts.outside += 1
        self.counts.last_outside = why
        return self.original(*args, **kwargs)

    def mode_outside(self) -> str:
        """Return why no call is inside the plan now, whatever its inputs; empty where one may be."""
        if self.program.model.training != self.training:
            return f"the module is in {'train' if self.program.model.training else 'eval'} mode"
        if torch.is_grad_enabled() != self.training:
            return (
                "gradients are enabled; call it under torch.no_grad()"
                if not self.training
                else ("gradients are disabled in a training plan")
            )
        return ""

    def _outside(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        if why := self.mode_outside():
            return why
        unknown = self.known is not None and _key(args, kwargs) not in self.known
        if unknown or (self.signatures and signatures_of(Call(args, kwargs)) not in self.signatures):
            shapes = [tuple(x.shape) for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            return f"inputs of shape {shapes} were not in the workload"
        return ""


def ship(
    program: Program, original: nn.Module | None, signatures: Collection[tuple[TensorSignature, ...]] = ()
) -> nn.Module:
    """Install the program's call in its module and return the module.

    Args:
        program: The program; its `model` is changed in place.
        original: The unmodified model for calls outside the plan; may be the program's own model where no step
            changed it in place (training); `None` raises `InputsError` for such calls instead.
        signatures: What a program that specialises on shapes covers, where it has no example calls.

    Returns:
        `program.model`.
    """
    fallback = None if original is None else plain_call(original)
    model = program.model
    before = model._compiled_call_impl  # noqa: SLF001
    program.undo.append(lambda: setattr(model, "_compiled_call_impl", before))
    model._compiled_call_impl = _Guarded(program, fallback, signatures)  # noqa: SLF001
    return model


def _guard(model: nn.Module) -> _Guarded:
    guard = model._compiled_call_impl  # noqa: SLF001
    if not isinstance(guard, _Guarded):
        raise ModelError("no plan is applied to this model")
    return guard


def call_counts(model: nn.Module) -> CallCounts:
    """Return how many calls of a model with a plan the plan covered.

    Raises:
        ModelError: No plan is applied to it.
    """
    return _guard(model).counts


def model_loss(model: Any, batch: Any) -> torch.Tensor:
    """Return the loss that a model returns when it is called with a batch (`.loss`, `["loss"]`, or its output).

    Raises:
        InputsError: It returns none.
    """
    call = as_call(batch)
    output = model(*call.args, **call.kwargs)
    value = output
    if isinstance(output, Mapping):
        value = output.get("loss")
    elif not isinstance(output, torch.Tensor):
        value = getattr(output, "loss", None)
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.reshape(())
    got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(output).__name__
    raise InputsError(
        f"training needs a loss: the model returned {got}, which is no scalar and has none as `.loss` or ['loss']",
        fix="give Workload(loss=lambda model, batch: ...) (where a plan is applied, kp.prepare(loss=...)), or labels "
        "among the inputs where the model takes them",
    )


def fused_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    """Return the loss of a batch, by the one compiled function that a plan made of the model and the loss.

    What a model returns besides its loss (the logits of a language model, gigabytes) need not exist then. Where the
    plan has no such function, or the call is outside the plan (another mode, no gradients), the loss is called plainly.

    Args:
        model: A model with a training plan (`kp.prepare`).
        batch: What the loss takes.

    Returns:
        A scalar, with its history.

    Raises:
        ModelError: No plan is applied to the model.
    """
    guard = _guard(model)
    fused = guard.program.fused_loss
    if fused is None or guard.mode_outside():
        return (guard.program.loss or model_loss)(model, batch)
    guard.counts.inside += 1
    return fused(model, batch)


def restore(model: nn.Module) -> nn.Module:
    """Undo every step of the plan that is applied to a model, in place, and return the model.

    Raises:
        ModelError: No plan is applied to it.
    """
    program = _guard(model).program
    while program.undo:
        program.undo.pop()()
    return model


def plain_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return a tensor itself, or the plain tensors inside a wrapper subclass (a quantised weight, say)."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [inner for name in names for inner in plain_tensors(getattr(tensor, name))]


def state_bytes(model: nn.Module) -> int:
    """Return the bytes of parameters and buffers, storage shared by several counted once."""
    storages = {}
    for tensor in (*model.parameters(), *model.buffers()):
        for plain in plain_tensors(tensor):
            if not plain.is_meta and plain.layout is torch.strided:
                storage = plain.untyped_storage()
                storages[storage._cdata] = storage.nbytes()  # noqa: SLF001  a lazy tensor's has no address
    return sum(storages.values())


def _checksum(tensor: torch.Tensor) -> tuple[Any, ...]:
    if hasattr(tensor, "__tensor_flatten__"):
        inner = plain_tensors(tensor.detach())
        head: tuple[Any, ...] = (type(tensor).__qualname__, tuple(tensor.shape), str(tensor.dtype))
        return (*head, *(part for plain in inner for part in _plain_checksum(plain)))
    return _plain_checksum(tensor)


def _plain_checksum(tensor: torch.Tensor) -> tuple[Any, ...]:
    plain = tensor.detach()
    head = (tuple(plain.shape), str(plain.dtype), str(plain.device))
    if plain.layout is not torch.strided or plain.is_quantized or plain.is_meta or plain.numel() == 0:
        return head
    values = torch.view_as_real(plain.resolve_conj()) if plain.is_complex() else plain
    raw = values.contiguous().flatten().view(torch.uint8)
    if raw.device.type != "cpu" and raw.numel() > _ON_DEVICE_BYTES:
        return (*head, _sum_by_place(raw))
    return (*head, zlib.crc32(raw.cpu().numpy().data))


def _sum_by_place(raw: torch.Tensor) -> int:
    """Return a checksum of bytes where they lie: words times odd numbers that depend on their place, modulo 2^64.

    Any one changed word changes it, and so does a swap of two unequal words unless their difference times that of
    their factors is 0 modulo 2^64. Gigabytes would take seconds to reach the host.
    """
    whole = raw.numel() // 4 * 4
    words = raw[:whole].view(torch.int32)
    total = zlib.crc32(raw[whole:].cpu().numpy().data)
    for start in range(0, words.numel(), _CHUNK_WORDS):
        part = words[start : start + _CHUNK_WORDS].to(torch.int64)
        place = torch.arange(start, start + len(part), device=part.device) * _SPREAD + 1
        total = (total * 31 + int((part * place).sum())) % (1 << 64)
    return total


def state_digest(model: nn.Module) -> dict[str, Any]:
    """Return what must be the same before and after a search: values, gradients, modes and hooks by name."""
    digest: dict[str, Any] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        grad = getattr(tensor, "grad", None) if tensor.is_leaf else None
        digest[name] = (_checksum(tensor), None if grad is None else _checksum(grad), tensor.requires_grad)
    for name, module in model.named_modules():
        hooks = (len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))  # noqa: SLF001
        digest[f"module {name}"] = (module.training, hooks, type(module).__qualname__)
    return digest
