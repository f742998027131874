"""What is asked (`AttentionShape`), who can answer (`Implementation`), and who was chosen (`Choice`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from kernel_pytorch.core.types import Numerics, Skip
from kernel_pytorch.errors import KptError

__all__ = [
    "Alignment",
    "AttentionError",
    "AttentionShape",
    "Choice",
    "Implementation",
    "Window",
    "visible_band",
]

Alignment = Literal["upper_left", "lower_right"]
Window = tuple[int | None, int | None]


class AttentionError(KptError):
    """The arguments fit no attention, or the implementation that was named cannot compute it."""


def visible_band(
    q_len: int, kv_len: int, *, is_causal: bool, window: Window | None, alignment: Alignment
) -> tuple[int | None, int | None, int, Alignment]:
    """Reduce causality, window and alignment to the band of keys that a query sees.

    Query `i` sees key `j` where `i + d - left <= j <= i + d + right`, with `d = kv_len - q_len` for `lower_right` and 0
    for `upper_left`. A bound that hides no key is dropped, and so are keys that no query sees, so that calls which
    compute the same thing look the same: one token that attends to a cache is not causal, and a causal upper-left mask
    over more keys than queries is a square one.

    Returns:
        `(left, right, kv_len, alignment)`: the bounds (`None`: none), how many keys matter (the first ones), and the
        alignment (`upper_left` where both are the same).
    """
    left, right = window if window is not None else (None, None)
    if is_causal:
        right = 0 if right is None else min(right, 0)
    if right is not None and alignment == "upper_left":
        kv_len = min(kv_len, q_len + right)
    offset = kv_len - q_len if alignment == "lower_right" else 0
    if right is not None and offset + right >= kv_len - 1:
        right = None
    if left is not None and q_len - 1 + offset - left <= 0:
        left = None
    if kv_len == q_len or (left is None and right is None):
        alignment = "upper_left"
    return left, right, kv_len, alignment


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """One attention, without its numbers.

    Attributes:
        batch: Sequences; for packed documents their number.
        heads: Query heads.
        kv_heads: Key and value heads; divides `heads`.
        q_len: Query tokens of a sequence; for packed documents of the longest.
        kv_len: Key tokens, likewise.
        head_dim: Size of a head of queries and keys.
        dtype: Of queries, keys and values.
        is_causal: Whether a query sees no key after its own place.
        window: `(left, right)` tokens around its place that a query sees; `None` in a place is unlimited.
        softcap: Scores `s` become `softcap * tanh(s / softcap)`; 0 leaves them.
        alignment: Where the diagonal of causality and window lies if `q_len != kv_len`.
        dropout: Probability at which a weight is dropped.
        value_dim: Size of a head of values; 0: that of the keys.
        mask: Whether there is an explicit mask.
        packed: Whether documents lie one after another without padding (`attention_varlen`).
    """

    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    dtype: torch.dtype = torch.bfloat16
    is_causal: bool = False
    window: Window | None = None
    softcap: float = 0.0
    alignment: Alignment = "upper_left"
    dropout: float = 0.0
    value_dim: int = 0
    mask: bool = False
    packed: bool = False

    def canonical(self) -> AttentionShape:
        """Return the shape that computes the same thing and is written in one way."""
        if self.packed:  # the lengths are bounds only, so nothing can be concluded from them
            left, right = self.window or (None, None)
            right = (0 if right is None else min(right, 0)) if self.is_causal else right
            kv_len, alignment = self.kv_len, self.alignment
        else:
            left, right, kv_len, alignment = visible_band(
                self.q_len, self.kv_len, is_causal=self.is_causal, window=self.window, alignment=self.alignment
            )
        causal = left is None and right == 0
        return replace(
            self,
            kv_len=kv_len,
            is_causal=causal,
            window=None if causal or (left is None and right is None) else (left, right),
            alignment=alignment,
            value_dim=0 if self.value_dim == self.head_dim else self.value_dim,
        )

    def shape_class(self) -> str:
        """Return the name of the class of shapes that share a choice.

        Batch and lengths are rounded up to powers of two, of softcap and dropout only the presence counts; whatever
        else decides which implementation applies is exact.
        """
        one = self.canonical()
        lengths = f"q{_power_of_two(one.q_len)} kv{_power_of_two(one.kv_len)}"
        if one.q_len == one.kv_len:
            lengths = f"s{_power_of_two(one.q_len)}"
        parts = [
            str(one.dtype).removeprefix("torch."),
            f"b{_power_of_two(one.batch)} h{one.heads}:{one.kv_heads} d{one.head_dim}:{one.value_dim or one.head_dim}",
            lengths,
            "causal" if one.is_causal else "full",
        ]
        if one.window is not None:
            parts.append("window {}:{}".format(*("" if w is None else w for w in one.window)))
        if one.alignment != "upper_left":
            parts.append(one.alignment)
        parts += [name for name in ("softcap", "dropout", "mask", "packed") if getattr(one, name)]
        return " ".join(parts)


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


Call = Callable[..., torch.Tensor]
"""`(query, key, value, *, attn_mask, dropout_p, scale, left, right, alignment, softcap)`; tensors as `attention` takes
them, the band as `visible_band` returns it."""

VarlenCall = Callable[..., torch.Tensor]
"""`(query, key, value, cu_seqlens_q, cu_seqlens_k, max_q, max_k, *, scale, left, right, softcap)`."""

Bound = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, float | None], torch.Tensor]
"""`(query, key, value, attn_mask, scale)`: a `Call` whose other arguments are decided."""

Fits = Callable[..., Skip | None]
"""`(shape, device, *, backward)`."""


@dataclass(frozen=True)  # without slots: Dynamo reads `call` while it traces
class Implementation:
    """One way to compute attention.

    Attributes:
        name: As `impl=` takes it.
        summary: One line for people.
        fits: Whether it is installed and computes a (canonical) shape by its definition, on a device, forward alone or
            with backward; runs nothing on the device.
        call: Computes it.
        call_varlen: Computes packed documents; `None`: it cannot.
        numerics: What it may do to the numbers.
        rank: `impl=None` considers the applicable ones of the lowest rank only; a rank below 0 is never chosen.
        packages: Distributions whose versions decide what it does.
        forward: Whose forward this one has, where it adds a backward; asked for by name without gradients, that one
            computes it.
        bind: Takes a query and what is decided for all calls like it (`dropout_p`, `left`, `right`, `alignment`,
            `enable_gqa`) and returns a quicker `call` for them, or `None`.
    """

    name: str
    summary: str
    fits: Fits
    call: Call
    call_varlen: VarlenCall | None = None
    numerics: Numerics = Numerics.REORDERED
    rank: int = 0
    packages: tuple[str, ...] = ()
    forward: str = ""
    bind: Callable[..., Bound | None] | None = None


BROKEN = "does not import"
"""Part of the reason of an implementation whose package is installed and broken."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Which implementation is fastest, and what was measured.

    Attributes:
        impl: The fastest when called from Python, by the time of calls back to back.
        compiled: The fastest inside `torch.compile`, where only the device's time counts.
        device_ms: Median time on the device by implementation, milliseconds, forward alone or with backward.
        host_ms: Median time until the work was queued; empty on a CPU.
        skipped: Why the others did not take part.
        shape_class: What was asked.
        measured: Whether it was measured by this call, not read from the cache.
        eager_ms: Median time of a call among calls back to back; empty where the host cannot show.
    """

    impl: str
    compiled: str
    device_ms: Mapping[str, float]
    host_ms: Mapping[str, float] = field(default_factory=dict)
    skipped: Mapping[str, Skip] = field(default_factory=dict)
    shape_class: str = ""
    measured: bool = False
    eager_ms: Mapping[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return what the cache stores."""
        return {
            "impl": self.impl,
            "compiled": self.compiled,
            "device_ms": dict(self.device_ms),
            "host_ms": dict(self.host_ms),
            "eager_ms": dict(self.eager_ms),
            "skipped": {name: [skip.reason, skip.fix] for name, skip in self.skipped.items()},
        }
