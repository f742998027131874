"""Which layers of a model FP8 is for, and why the others keep their format."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from kernel_pytorch.ops.float8_cast.layout import ALIGNED

__all__ = ["Verdict", "output_head", "verdicts"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a linear layer may run in FP8.

    Attributes:
        path: Where the layer is in the model.
        layer: The layer.
        reason: Why it keeps its format; empty where it may run in FP8.
        head: Whether it makes the model's logits.
    """

    path: str
    layer: nn.Linear
    reason: str = ""
    head: bool = False


def output_head(model: nn.Module) -> set[int]:
    """Return the ids of the layers that make logits.

    They are what `get_output_embeddings()` says, what shares its weight with an embedding, and the model's last linear
    layer where it maps an embedding's width to its number of words.
    """
    get = getattr(model, "get_output_embeddings", None)
    said = get() if callable(get) else None
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    heads = {id(m) for m in layers if m is said or any(m.weight is t.weight for t in tables)}
    if layers and any((t.num_embeddings, t.embedding_dim) == tuple(layers[-1].weight.shape) for t in tables):
        heads.add(id(layers[-1]))
    return heads


def verdicts(model: nn.Module, *, allow_head: bool = False, exclude: Collection[str] = ()) -> Iterator[Verdict]:
    """Yield the verdict on every linear layer of a model, in the order of its modules.

    Args:
        model: It is not changed.
        allow_head: Whether the layer that makes logits may run in FP8.
        exclude: Paths, or parts of paths, that keep their format.
    """
    heads = output_head(model)
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            head = id(layer) in heads
            yield Verdict(path, layer, _reason(path, layer, head=head and not allow_head, exclude=exclude), head)


def _reason(path: str, layer: nn.Linear, *, head: bool, exclude: Collection[str]) -> str:
    weight = layer.weight
    rules = (
        (any(part and part in path for part in exclude), "excluded by the caller"),
        (type(layer).forward is not nn.Linear.forward, f"a {type(layer).__name__} computes more than nn.Linear"),
        ("forward" in vars(layer), "its forward has been replaced already"),
        (type(weight) not in (nn.Parameter, torch.Tensor), f"its weight is a {type(weight).__name__}"),
        (weight.dtype not in _DTYPES, f"its weight is {weight.dtype}"),
        (head, "it makes the logits, whose gradients have long tails; nvidia.allow_float8_lm_head allows it"),
        (
            bool(layer.in_features % ALIGNED or layer.out_features % ALIGNED),
            f"{ALIGNED} does not divide its sizes, {layer.in_features} to {layer.out_features}",
        ),
    )
    return next((reason for applies, reason in rules if applies), "")
