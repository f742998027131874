"""The loss of a causal language model of Hugging Face's interface, from its hidden states, without its logits.

The forward of such a model returns logits, so a plan cannot leave them out without changing what the model returns; a
training loop that only needs the loss can, by calling this in place of `model(...).loss`.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from kernel_pytorch.errors import ModelError
from kernel_pytorch.ops.linear_cross_entropy.api import Implementation, linear_cross_entropy
from kernel_pytorch.ops.linear_cross_entropy.reference import cross_entropy_reference

__all__ = ["causal_lm_loss"]

_IGNORED = -100
_SIZE = 50.0
"""Of the logits a model is probed with: large, so that a cap or a factor on them shows."""
_CLOSE = 2e-2
_softcaps: weakref.WeakKeyDictionary[nn.Module, float] = weakref.WeakKeyDictionary()


def causal_lm_loss(
    model: nn.Module,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    *,
    num_items_in_batch: int | torch.Tensor | None = None,
    chunk: int | None = None,
    impl: Implementation | None = None,
    **inputs: Any,
) -> torch.Tensor:
    """Return what `model(input_ids, labels=labels, **inputs).loss` is, by `linear_cross_entropy`.

    The model's base (`model.base_model`) runs, and its head (`model.get_output_embeddings()`, an `nn.Linear`) only
    lends its weight. The first call with a model probes it with two tokens: that the head gets the base's output, that
    its logits are returned as they are or capped by `config.final_logit_softcapping`, and that the loss is the mean
    cross-entropy of the next token. Hooks on the model itself and on its head do not run, nor does a plan applied to
    the model as a whole; what is applied to its blocks does.

    Args:
        model: A model such as `LlamaForCausalLM`.
        input_ids: `[batch, sequence]`.
        labels: `[batch, sequence]`; -100 where there is no loss. Each position predicts the next one's label.
        num_items_in_batch: Divide the sum of losses by it, for gradient accumulation, instead of taking the mean.
        chunk: As of `linear_cross_entropy`.
        impl: As of `linear_cross_entropy`.
        inputs: What else the model takes: `attention_mask`, `position_ids`, ...

    Raises:
        ModelError: The model has another interface, or does more than this to its logits or loss, with what it is.
    """
    base, head = _parts(model)
    softcap = _softcaps.get(model)
    if softcap is None:
        softcap = _softcaps[model] = _probe(model, base, head, input_ids)
    hidden = base(input_ids=input_ids, **inputs)[0]
    shifted = functional.pad(labels, (0, 1), value=_IGNORED)[..., 1:]
    loss = linear_cross_entropy(
        hidden, head.weight, shifted, bias=head.bias, softcap=softcap, chunk=chunk, impl=impl,
        reduction="mean" if num_items_in_batch is None else "sum",
    )  # fmt: skip
    return loss if num_items_in_batch is None else loss / num_items_in_batch


def _parts(model: nn.Module) -> tuple[nn.Module, nn.Linear]:
    base = getattr(model, "base_model", None)
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    if not isinstance(base, nn.Module) or base is model or type(head) is not nn.Linear:
        raise ModelError(
            f"{type(model).__name__} has no `base_model` and plain nn.Linear of `get_output_embeddings()`",
            fix="call linear_cross_entropy(hidden, head.weight, labels) in your own loss",
        )
    return base, head


@torch.no_grad()
def _probe(model: nn.Module, base: nn.Module, head: nn.Linear, input_ids: torch.Tensor) -> float:
    """Run the model on two tokens with logits of our own in the place of its head's, and return its softcap."""
    ids = input_ids[:1, :2]
    seen: list[torch.Tensor] = []
    generator = torch.Generator().manual_seed(0)
    known = torch.randn(1, ids.shape[1], head.out_features, generator=generator) * _SIZE
    known = known.to(head.weight.device, head.weight.dtype)

    def replace(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        del module
        seen.append(args[0])
        return known.to(output.dtype)

    handle = head.register_forward_hook(replace)
    with torch.random.fork_rng():
        try:
            torch.manual_seed(0)
            out = model(input_ids=ids, labels=ids)
        finally:
            handle.remove()
        torch.manual_seed(0)
        hidden = base(input_ids=ids)[0]
    softcap = float(getattr(getattr(model, "config", None), "final_logit_softcapping", None) or 0.0)
    capped = softcap * torch.tanh(known / softcap) if softcap else known
    want = cross_entropy_reference(known[0, :-1].float(), ids[0, 1:], softcap=softcap)
    problem = ""
    if len(seen) != 1 or _off(seen[0], hidden):
        problem = "its head does not get what its base returns"
    elif _off(out.logits, capped):
        problem = "it does more to its logits than final_logit_softcapping"
    elif _off(out.loss, want):
        problem = "its loss is not the mean cross-entropy of the next token"
    if problem:
        raise ModelError(f"causal_lm_loss does not fit {type(model).__name__}: {problem}")
    return softcap


def _off(got: torch.Tensor, want: torch.Tensor) -> bool:
    if got.shape != want.shape:
        return True
    return not bool((got.float() - want.float()).norm() <= _CLOSE * want.float().norm())
