"""Parameter shapes shared by tests and benchmarks, awkward ones among them."""

from __future__ import annotations

import math

__all__ = ["AWKWARD", "many_small", "transformer"]

AWKWARD: tuple[tuple[int, ...], ...] = ((1,), (7,), (0,), (64, 33), (3, 5, 7), (2049,), (), (4096,), (3, 2048))
"""One element, odd sizes, empty, no dimension, one over a block, and exactly one and three blocks."""


def transformer(
    layers: int, *, hidden: int = 4096, inner: int = 14336, kv: int = 1024, vocab: int = 0
) -> list[tuple[int, ...]]:
    """Return the parameter shapes of a Llama-like decoder; the defaults are Llama-3-8B's, without its vocabulary."""
    layer: list[tuple[int, ...]] = [
        (hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden),
        (inner, hidden), (inner, hidden), (hidden, inner), (hidden,), (hidden,),
    ]  # fmt: skip
    ends: list[tuple[int, ...]] = [(vocab, hidden), (vocab, hidden)] if vocab else []
    return [*layer * layers, *ends, (hidden,)]


def many_small(elements: int) -> list[tuple[int, ...]]:
    """Return about `elements` elements in tensors of 1 to 65,536, as norms, biases and adapters have."""
    sizes = (1, 17, 768, 4096, 16384, 65536)
    each = max(1, math.ceil(elements / sum(sizes)))
    return [(size,) for size in sizes for _ in range(each)]
