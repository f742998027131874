# ruff: noqa: PLR0917
"""Compute the loss of a causal language model from its logits without fp32 copies (`ops/linear_cross_entropy`).

The logits stay: they are part of what such a model returns, and a plan does not change that. A training loop that
needs the loss alone saves them as well with `ops.linear_cross_entropy.causal_lm_loss(model, input_ids, labels)`, or
by a plan with `chunked`: in compiled code the loss is computed from what the head read, chunk by chunk of rows, and
where the loss alone is compiled (`compile(scope=loss)`) nothing reads the logits any more and the compiler drops
them. A head that an earlier step runs in FP8 (`float8(head=True)`) stays in FP8 there (`precision/head.py`), where it
has one scale a tensor; with scales by row its logits stay whole.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from kernel_pytorch._triton.launch import cannot_run
from kernel_pytorch.core.protocols import Program
from kernel_pytorch.core.types import DeviceSpec, Mode, Numerics, Prediction, Skip, Step, WorkloadSpec
from kernel_pytorch.errors import CandidateError
from kernel_pytorch.ops.linear_cross_entropy.api import Reduction, cross_entropy, linear_cross_entropy, unsupported
from kernel_pytorch.precision.head import float8_head_loss, unchunked
from kernel_pytorch.precision.site import site_of
from kernel_pytorch.transforms.ceilings import bounded

__all__ = ["LossHead", "next_token_loss"]

_IGNORED = -100
_VENDORS = ("nvidia", "amd")
_SLOT = "_loss_function"
_MADE = "_loss_head_made"


def next_token_loss(
    logits: torch.Tensor,
    labels: torch.Tensor | None,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = _IGNORED,
    shift_labels: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Return the loss that Hugging Face calls `ForCausalLMLoss`: the mean cross-entropy of the next token.

    Args:
        logits: `[batch, sequence, vocab_size]`.
        labels: `[batch, sequence]`, shifted here; or `None`, with `shift_labels`.
        vocab_size: Columns of `logits`.
        num_items_in_batch: Divide the sum by it instead of taking the mean.
        ignore_index: Label without loss.
        shift_labels: `[batch, sequence]`, shifted already.
        kwargs: What the model hands to every loss, and this one does not use either.
    """
    del kwargs
    rows, targets = logits.reshape(-1, vocab_size), _targets(logits, labels, ignore_index, shift_labels)
    if num_items_in_batch is None:
        return cross_entropy(rows, targets, ignore_index=ignore_index)
    return cross_entropy(rows, targets, ignore_index=ignore_index, reduction="sum") / num_items_in_batch


def _targets(
    like: torch.Tensor, labels: torch.Tensor | None, ignore_index: int, shift_labels: torch.Tensor | None
) -> torch.Tensor:
    if shift_labels is None:
        assert labels is not None
        shift_labels = functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    return shift_labels.reshape(-1).to(like.device)


class LossHead:
    """Put `next_token_loss` in the place of a model's `loss_function`, where that is the same function.

    `chunked=True`: compiled code computes the loss from what the head read, without logits, where the model names a
    head that allows it; a note tells where not.
    """

    name = "loss_head"
    summary = "compute the loss of a causal language model without fp32 copies of its logits"
    group = "loss"
    numerics = Numerics.REORDERED
    modes = frozenset({Mode.TRAINING})
    compiles = False

    def probe(self, device: DeviceSpec) -> Skip | None:
        """Triton runs on NVIDIA and AMD GPUs."""
        if device.vendor not in _VENDORS:
            return Skip(f"the kernel runs on GPUs of {' and '.join(_VENDORS)}, not on {device.vendor}")
        return cannot_run()

    def propose(self, workload: WorkloadSpec, device: DeviceSpec) -> Sequence[Step] | Skip:
        """One step; whether the model has such a loss shows when it is applied."""
        if workload.mode is not Mode.TRAINING:
            return Skip("a loss is computed in training only")
        skip = self.probe(device)
        if skip is not None:
            return skip
        if not any("nll_loss" in name or "cross_entropy" in name for name in workload.operators):
            return Skip("the workload computes no cross-entropy")
        return [Step(self.name, {"chunked": True}), Step(self.name)]

    def ceiling(self, step: Step, prediction: Prediction, device: DeviceSpec) -> float:
        """The softmax, the casts of logits and what surrounds them may cost nothing."""
        del step, device
        return bounded(prediction, dict.fromkeys(("reduction", "elementwise", "copy", "other", "overhead"), 0.0))

    def apply(self, program: Program, step: Step) -> Program:
        """Swap the model's `loss_function`, after comparing both on random logits; `undo` puts it back."""
        model, given = program.model, vars(program.model).get(_SLOT)
        own = getattr(model, "loss_function", None)
        reason = _differs(model, own)
        loss = _Loss(own)
        if not reason and step.params.get("chunked", False):
            whole = _note_head(model, loss)
            program.notes += [f"logits stay whole: {whole}"] if whole else []
        if not reason:
            reason = _put(model, loss, given)
        if reason:
            _forget_head(loss)
            raise CandidateError(
                f"{step}: {reason}",
                fix="call kernel_pytorch.ops.linear_cross_entropy from the training loss of your own",
            )
        program.undo.append(lambda: _take_back(model, given))
        program.undo.append(lambda: _forget_head(loss))
        return program

    def source(self, step: Step) -> str:
        """It has none: the kernel is Triton code of this package.

        Raises:
            CandidateError: Always.
        """
        raise CandidateError(
            f"{step} cannot be written as plain PyTorch: its kernel is part of kernel_pytorch",
            fix="keep using the plan with kernel_pytorch, or optimise without loss_head",
        )


def _put(model: nn.Module, loss: _Loss, given: Any) -> str:
    setattr(model, _SLOT, loss)
    if getattr(model, "loss_function", None) is loss:
        return ""
    _take_back(model, given)
    return f"{type(model).__name__} does not look for its loss in `{_SLOT}`"


def _take_back(model: nn.Module, given: Any) -> None:
    if given is None:
        delattr(model, _SLOT)
    else:
        setattr(model, _SLOT, given)


class _Loss:
    """The kernel where it runs; by rule the model's own function for what it does not take: fp64 and other devices."""

    def __init__(self, own: Any) -> None:
        self.own = own
        self.head: nn.Linear | None = None

    def __call__(self, logits: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        hidden = None if self.head is None else _read(self.head, logits)
        if unsupported(logits) is not None:
            loss: torch.Tensor = self.own(logits, *args, **kwargs)
            return loss
        if hidden is not None and self.head is not None and not _unchunked(self.head):
            return _chunked_loss(self.head, hidden, *args, **kwargs)
        return next_token_loss(logits, *args, **kwargs)


@dataclass(slots=True)
class _Made:
    """What a head computed last, and from what, until its loss asks; and the `forward` that an earlier step gave it."""

    own: Callable[[torch.Tensor], torch.Tensor] | None = None
    logits: torch.Tensor | None = None
    hidden: torch.Tensor | None = None


def _chunked_loss(
    head: nn.Linear,
    hidden: torch.Tensor,
    labels: torch.Tensor | None,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = _IGNORED,
    shift_labels: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Return `next_token_loss` of the logits that the head makes of `hidden`, `[batch, sequence, width]`."""
    del kwargs, vocab_size
    rows, targets = hidden.reshape(-1, hidden.shape[-1]), _targets(hidden, labels, ignore_index, shift_labels)
    reduction: Reduction = "mean" if num_items_in_batch is None else "sum"
    site = site_of(head)
    if site is not None:
        total = float8_head_loss(rows, site, targets, ignore_index=ignore_index, reduction=reduction)
    else:
        total = linear_cross_entropy(
            rows, head.weight, targets, bias=head.bias, ignore_index=ignore_index, reduction=reduction
        )
    return total if num_items_in_batch is None else total / num_items_in_batch


def _note_head(model: nn.Module, loss: _Loss) -> str:
    """Let the layer that makes the logits note what it reads; return why that cannot be, or an empty string."""
    ask = getattr(model, "get_output_embeddings", None)
    head = ask() if callable(ask) else None
    if type(head) is not nn.Linear:
        return f"{type(model).__name__} does not name a linear layer that makes its logits"
    reason = _unchunked(head)
    if reason:
        return f"the layer that makes the logits runs in FP8, and its loss would not: {reason}"
    setattr(head, _MADE, _Made(vars(head).get("forward")))
    head.forward = types.MethodType(forward, head)  # type: ignore[method-assign]
    loss.head = head
    return ""


def _unchunked(head: nn.Linear) -> str:
    site = site_of(head)
    return "" if site is None else unchunked(site)


def _forget_head(loss: _Loss) -> None:
    if loss.head is not None:
        made: _Made = vars(loss.head).pop(_MADE)
        # A layer that fell back from FP8 has its own forward again, and keeps it.
        if vars(loss.head).pop("forward", None) is not None and made.own is not None:
            loss.head.forward = made.own  # type: ignore[method-assign, assignment]
        loss.head = None


def forward(self: nn.Linear, input: torch.Tensor) -> torch.Tensor:
    """Make the logits, and note of what. Named as what it replaces: unpickling then finds the class's own."""
    made: _Made = getattr(self, _MADE)
    logits = functional.linear(input, self.weight, self.bias) if made.own is None else made.own(input)
    if torch.compiler.is_compiling():
        made.logits, made.hidden = logits, input
    return logits


def _read(head: nn.Linear, logits: torch.Tensor) -> torch.Tensor | None:
    """Return what a head made these logits of; `None` where they are others, or in eager code."""
    if not torch.compiler.is_compiling():
        return None
    made: _Made = getattr(head, _MADE)
    given, hidden = made.logits, made.hidden
    made.logits = made.hidden = None
    return hidden if given is logits else None


def _differs(model: nn.Module, own: Callable[..., Any] | None) -> str:
    """Return why the model's loss is not the one we have; empty where both agree on random logits in fp64."""
    if not callable(own) or not hasattr(type(model), "loss_function") or isinstance(own, _Loss):
        return f"{type(model).__name__} has no `loss_function` of its own that could be swapped"
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 11, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 11, (2, 5), generator=generator)
    labels[0, 2] = _IGNORED
    for extra in ({}, {"num_items_in_batch": 3}, {"shift_labels": labels.flip(0)}):
        try:
            theirs = own(logits=logits, labels=labels, vocab_size=11, **extra)
        except (TypeError, ValueError, AttributeError, RuntimeError, KeyError) as error:
            return f"the loss of {type(model).__name__} is another: it raises {type(error).__name__}: {error}"
        ours = next_token_loss(logits=logits, labels=labels, vocab_size=11, **extra)
        if not isinstance(theirs, torch.Tensor) or not torch.allclose(theirs.double(), ours, rtol=1e-6):
            return f"the loss of {type(model).__name__} is not the mean cross-entropy of the next token"
    return ""
