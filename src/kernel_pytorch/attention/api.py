# mypy: disable-error-code="untyped-decorator"
# ruff: noqa: PLR0917
"""Attention as SDPA defines it, computed by whichever implementation was measured to be the fastest.

In `torch.compile` nothing is measured: the choice is looked up while tracing, by a function that Dynamo runs as a
constant (`torch._dynamo.assume_constant_result`), and the graph holds the chosen operator. Choose before compiling: by
a first eager call, or by `choose(shape, device, backward=...)`. Where batch or lengths are dynamic the graph is guarded
by the class of shapes, so that it is traced anew only where another choice may hold.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernel_pytorch.attention import choice
from kernel_pytorch.attention.choice import choose, known_choice
from kernel_pytorch.attention.probe import does_not_fit, indexed, unsupported
from kernel_pytorch.attention.registry import implementation, implementations
from kernel_pytorch.attention.types import (
    Alignment,
    AttentionError,
    AttentionShape,
    Bound,
    Choice,
    Window,
    visible_band,
)

__all__ = ["attention", "attention_varlen", "choose", "implementations", "unsupported"]

_checked: set[tuple[str, str, torch.device, bool]] = set()


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    alignment: Alignment = "upper_left",
    window: Window | None = None,
    softcap: float = 0.0,
    impl: str | None = None,
) -> Tensor:
    """Compute scaled dot-product attention, `softmax(scale * q k^T) v` per head.

    Args:
        query: `[batch, heads, q_len, head_dim]`, any strides.
        key: `[batch, kv_heads, kv_len, head_dim]`.
        value: `[batch, kv_heads, kv_len, value_dim]`.
        attn_mask: Boolean (true: takes part) or added to the scores; broadcasts to `[batch, heads, q_len, kv_len]`.
        dropout_p: Probability at which a weight is dropped; applied whenever above 0, as SDPA does.
        is_causal: Whether query `i` sees no key after its own place.
        scale: Factor of the scores; `head_dim ** -0.5` by default.
        enable_gqa: Whether groups of query heads may share a key head.
        alignment: Where the diagonal of causality and window lies if `q_len != kv_len`: `upper_left` as SDPA's
            `is_causal`, or `lower_right`, where the last query sees the last key, as for a cache.
        window: `(left, right)` tokens around its place that a query sees; `None` in a place is unlimited.
        softcap: Scores `s` become `softcap * tanh(s / softcap)`; 0 leaves them.
        impl: Name of an implementation, which runs or raises; by default the fastest that applies.

    Returns:
        `[batch, heads, q_len, value_dim]` in the query's dtype; a query that sees no key gives zeros.

    Raises:
        AttentionError: The arguments do not fit each other, or the named implementation cannot compute them, with the
            reason; inside `torch.compile` also where no choice was made yet.
    """
    if torch.compiler.is_compiling():
        query, key, value = _autocast(query, key, value)
        name, left, right, alignment, kv_len = _prepare(
            query, key, value, attn_mask, (dropout_p, softcap), (is_causal, enable_gqa), (alignment, window), impl
        )
        if kv_len is not None:
            key, value = key[:, :, :kv_len], value[:, :, :kv_len]
        return implementation(name).call(
            query,
            key,
            value,
            attn_mask=attn_mask,
            dropout_p=dropout_p,
            scale=scale,
            left=left,
            right=right,
            alignment=alignment,
            softcap=softcap,
        )
    if torch._C._is_any_autocast_enabled():  # noqa: SLF001 - asking for the device's type takes ten times as long
        query, key, value = _autocast(query, key, value)
    # What was asked before is neither checked nor reduced again: the host's time is all that a short call takes.
    asked = (
        query.shape,
        key.shape,
        value.shape,
        query.dtype,
        key.dtype,
        value.dtype,
        query.device,
        key.get_device(),
        value.get_device(),
        torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad),
        attn_mask is None,
        dropout_p,
        is_causal,
        enable_gqa,
        alignment,
        window if window is None else tuple(window),
        softcap,
        impl,
    )
    ready = _ready.get(asked)
    if ready is None:
        prepared = _prepare(
            query, key, value, attn_mask, (dropout_p, softcap), (is_causal, enable_gqa), (alignment, window), impl
        )
        ready = _bounded(_ready)[asked] = _bind(prepared, query, key, dropout_p, softcap)
    call, kv_len = ready
    if kv_len is not None:
        key, value = key[:, :, :kv_len], value[:, :, :kv_len]
    return call(query, key, value, attn_mask, scale)


_Prepared = tuple[str, int | None, int | None, Alignment, int | None]
"""Who computes it, the band, its alignment, and how many keys matter where not all do."""

_Ready = tuple[Bound, int | None]

_ready: dict[tuple[Any, ...], _Ready] = {}
_MOST_READY = 4096


def _bounded(table: dict[Any, Any]) -> dict[Any, Any]:
    """Return a table, emptied where it is full: lengths that change at every call must not fill the memory."""
    if len(table) >= _MOST_READY:
        table.clear()
    return table


def _prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    floats: tuple[float, float],
    flags: tuple[bool, bool],
    band: tuple[Alignment, Window | None],
    impl: str | None,
) -> _Prepared:
    """Check the arguments, reduce the band and choose."""
    (dropout_p, softcap), (is_causal, enable_gqa), (alignment, window) = floats, flags, band
    _check(query, key, value, attn_mask, is_causal=is_causal, enable_gqa=enable_gqa, dropout_p=dropout_p)
    _check_band(alignment, window, softcap)
    q_len, kv_len = query.shape[2], key.shape[2]
    fewer: int | None = None
    if attn_mask is None:
        left, right, seen, alignment = visible_band(
            q_len, kv_len, is_causal=is_causal, window=window, alignment=alignment
        )
        if seen != kv_len:
            fewer = kv_len = seen
    else:
        left, right = window if window is not None else (None, None)
    name = _name(
        impl,
        query,
        key,
        value,
        (query.shape[0], q_len, kv_len),
        (left, right, alignment),
        (softcap, dropout_p),
        mask=attn_mask is not None,
        packed=False,
    )
    return name, left, right, alignment, fewer


def _bind(prepared: _Prepared, query: Tensor, key: Tensor, dropout_p: float, softcap: float) -> _Ready:
    """Return the call of an implementation with all that is decided."""
    name, left, right, alignment, kv_len = prepared
    one = implementation(name)
    gqa = query.shape[1] != key.shape[1]
    if one.bind is not None:
        bound = one.bind(query, dropout_p=dropout_p, left=left, right=right, alignment=alignment, enable_gqa=gqa)
        if bound is not None:
            return bound, kv_len

    def call(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, scale: float | None) -> Tensor:
        return one.call(
            q,
            k,
            v,
            attn_mask=attn_mask,
            dropout_p=dropout_p,
            scale=scale,
            left=left,
            right=right,
            alignment=alignment,
            softcap=softcap,
        )

    return call, kv_len


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    window: Window | None = None,
    softcap: float = 0.0,
    impl: str | None = None,
) -> Tensor:
    """Compute attention of documents that lie one after another without padding, each by itself.

    Args:
        query: `[total_q, heads, head_dim]`.
        key: `[total_k, kv_heads, head_dim]`; `kv_heads` divides `heads`.
        value: `[total_k, kv_heads, head_dim]`.
        cu_seqlens_q: Where documents begin and the last ends: int32 `[documents + 1]`, from 0 to `total_q`.
        cu_seqlens_k: Likewise for keys.
        max_q: Queries of the longest document, or more.
        max_k: Its keys, or more.
        is_causal: Whether a query sees no key after its place; the last query of a document sees its last key.
        scale: Factor of the scores; `head_dim ** -0.5` by default.
        window: `(left, right)` tokens around its place that a query sees; `None` in a place is unlimited.
        softcap: Scores `s` become `softcap * tanh(s / softcap)`; 0 leaves them.
        impl: Name of an implementation, which runs or raises; by default the fastest that applies.

    Returns:
        `[total_q, heads, head_dim]`.

    Raises:
        AttentionError: As for `attention`.
    """
    query, key, value = _autocast(query, key, value)
    if not (query.dim() == key.dim() == value.dim() == 3):
        raise AttentionError(
            f"packed documents are [total_tokens, heads, head_dim], got {query.dim()}, {key.dim()} and "
            f"{value.dim()} dimensions",
            fix="flatten batch and tokens, or call attention()",
        )
    _check_heads(query, key, value, enable_gqa=True)
    _check_band("lower_right", window, softcap)
    for what, offsets in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if offsets.dtype != torch.int32 or offsets.dim() != 1 or offsets.shape[0] < 2:
            raise AttentionError(f"{what} must be int32 [documents + 1], got {offsets.dtype} {tuple(offsets.shape)}")
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise AttentionError(f"{cu_seqlens_q.shape[0] - 1} documents of queries, {cu_seqlens_k.shape[0] - 1} of keys")
    left, right = window if window is not None else (None, None)
    if is_causal:
        right = 0 if right is None else min(right, 0)
    name = _name(
        impl,
        query.transpose(0, 1),
        key.transpose(0, 1),
        value.transpose(0, 1),
        (cu_seqlens_q.shape[0] - 1, max_q, max_k),
        (left, right, "lower_right"),
        (softcap, 0.0),
        mask=False,
        packed=True,
    )
    call = implementation(name).call_varlen
    assert call is not None
    return call(
        query,
        key,
        value,
        cu_seqlens_q,
        cu_seqlens_k,
        max_q,
        max_k,
        scale=scale,
        left=left,
        right=right,
        softcap=softcap,
    )


def _name(
    impl: str | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sizes: tuple[int, int, int],
    band: tuple[int | None, int | None, Alignment],
    floats: tuple[float, float],
    *,
    mask: bool,
    packed: bool,
) -> str:
    """Return the name of the implementation to run for `[..., heads, tokens, head_dim]`."""
    tracing = torch.compiler.is_compiling()
    heads = (query.shape[-3], key.shape[-3], query.shape[-1], value.shape[-1])
    if tracing:
        sizes = _class_sizes(*sizes)
        floats = (1.0 if floats[0] > 0.0 else 0.0, 0.5 if floats[1] > 0.0 else 0.0)
        heads = (_exact(heads[0]), _exact(heads[1]), _exact(heads[2]), _exact(heads[3]))
    wants_grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    question = (impl, sizes, heads, query.dtype, band, floats, mask, packed, query.device, wants_grad)
    return _look_up(question) if tracing else _ask(question)


def _class_sizes(batch: int, q_len: int, kv_len: int) -> tuple[int, int, int]:
    """Return constants that stand for the class of these sizes, which Dynamo guards where they are dynamic."""
    q_class, kv_class = _class_size(q_len), _class_size(kv_len)
    if q_class == kv_class and q_len != kv_len:
        kv_class -= 1
    return _class_size(batch), q_class, kv_class


def _class_size(size: int) -> int:
    rounded = 1
    while rounded < size:
        rounded *= 2
    return rounded


def _exact(size: int) -> int:
    """Return a size as a constant, one guarded bit after the other."""
    found, step = 0, _class_size(size)
    while step > 0:
        if found + step <= size:
            found += step
        step //= 2
    return found


_Question = tuple[
    str | None,
    tuple[int, int, int],
    tuple[int, int, int, int],
    torch.dtype,
    tuple[int | None, int | None, Alignment],
    tuple[float, float],
    bool,
    bool,
    torch.device,
    bool,
]

_answers: dict[_Question, str] = {}


def forget() -> None:
    """Forget the answers and choices that this process keeps; files stay."""
    _ready.clear()
    _answers.clear()
    _checked.clear()
    choice.forget()


@torch._dynamo.assume_constant_result  # noqa: SLF001 - public by torch.compiler, where its type is lost
def _look_up(question: _Question) -> str:
    return _answer(question, tracing=True)


def _ask(question: _Question) -> str:
    answer = _answers.get(question)
    if answer is None:
        answer = _bounded(_answers)[question] = _answer(question, tracing=False)
    return answer


def _answer(question: _Question, *, tracing: bool) -> str:
    impl, sizes, head_sizes, dtype, band, floats, mask, packed, device, backward = question
    batch, q_len, kv_len = sizes
    heads, kv_heads, head_dim, value_dim = head_sizes
    left, right, alignment = band
    shape = AttentionShape(
        batch,
        heads,
        kv_heads,
        q_len,
        kv_len,
        head_dim,
        dtype,
        window=None if left is None and right is None else (left, right),
        softcap=floats[0],
        alignment=alignment,
        dropout=floats[1],
        value_dim=value_dim,
        mask=mask,
        packed=packed,
    ).canonical()
    device = indexed(device)
    if impl is None:
        return _fastest(shape, device, backward=backward, tracing=tracing)
    if not backward:
        # A model that trains by a combination is evaluated, too.
        impl = implementation(impl).forward or impl
    key = (impl, shape.shape_class(), device, backward)
    if key in _checked:
        return impl
    skip = does_not_fit(implementation(impl), shape, device, backward=backward)
    if skip is None and not tracing:
        skip = unsupported(impl, shape, device, backward=backward)
    if skip is not None:
        raise AttentionError(f"impl={impl!r} cannot compute this: {skip.reason}", fix=skip.fix)
    if not tracing:
        _checked.add(key)
    return impl


def _fastest(shape: AttentionShape, device: torch.device, *, backward: bool, tracing: bool) -> str:
    if not tracing:
        return choose(shape, device, backward=backward).impl
    known: Choice | None = known_choice(shape, device, backward=backward)
    if known is None:
        raise AttentionError(
            f"no implementation of attention was chosen yet for {shape.shape_class()} on {device}, and torch.compile "
            "does not measure",
            fix="run it once without torch.compile, call kernel_pytorch.attention.choose() first, or name impl=",
        )
    return known.compiled


def _autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cast as autocast does for SDPA."""
    kind = query.device.type
    if not torch.is_autocast_enabled(kind):
        return query, key, value
    dtype = torch.get_autocast_dtype(kind)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    *,
    is_causal: bool,
    enable_gqa: bool,
    dropout_p: float,
) -> None:
    if not (query.dim() == key.dim() == value.dim() == 4):
        raise AttentionError(
            f"query, key and value are [batch, heads, tokens, head_dim], got {query.dim()}, {key.dim()} and "
            f"{value.dim()} dimensions",
            fix="add or flatten dimensions; attention_varlen() takes packed documents",
        )
    if not (query.shape[0] == key.shape[0] == value.shape[0]):
        raise AttentionError(f"batch sizes differ: {query.shape[0]}, {key.shape[0]}, {value.shape[0]}")
    _check_heads(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), enable_gqa=enable_gqa)
    if attn_mask is not None and is_causal:
        raise AttentionError(
            "attn_mask and is_causal exclude each other", fix="put causality into the mask, or drop it"
        )
    if not 0.0 <= dropout_p < 1.0:
        raise AttentionError(f"dropout_p is a probability below 1, got {dropout_p}")


def _check_heads(query: Tensor, key: Tensor, value: Tensor, *, enable_gqa: bool) -> None:
    """Check `[..., tokens, heads, head_dim]`."""
    if not (query.dtype == key.dtype == value.dtype) or not query.dtype.is_floating_point:
        raise AttentionError(
            f"query, key and value have one floating dtype, got {query.dtype}, {key.dtype}, {value.dtype}"
        )
    if not (query.device == key.device == value.device):
        raise AttentionError(f"query, key and value are on {query.device}, {key.device} and {value.device}")
    if query.shape[-1] != key.shape[-1]:
        raise AttentionError(f"query heads have size {query.shape[-1]}, key heads {key.shape[-1]}")
    if key.shape[:-1] != value.shape[:-1]:
        raise AttentionError(f"key and value differ in tokens or heads: {tuple(key.shape)}, {tuple(value.shape)}")
    heads, kv_heads = query.shape[-2], key.shape[-2]
    if heads != kv_heads and not enable_gqa:
        raise AttentionError(
            f"{heads} query heads and {kv_heads} key heads", fix="enable_gqa=True, if groups share a key head"
        )
    if kv_heads == 0 or heads % kv_heads:
        raise AttentionError(f"{kv_heads} key heads do not divide {heads} query heads")


def _check_band(alignment: Alignment, window: Window | None, softcap: float) -> None:
    if alignment not in ("upper_left", "lower_right"):
        raise AttentionError(f"alignment is 'upper_left' or 'lower_right', got {alignment!r}")
    if softcap < 0.0:
        raise AttentionError(f"softcap is 0 or above, got {softcap}")
    if window is not None and any(side is not None and side < 0 for side in window):
        raise AttentionError(f"window is (left, right) tokens of 0 or more, or None for no limit; got {window}")
