# mypy: disable-error-code="no-untyped-call"
# ruff: noqa: PLR0917
"""One PyTorch operator for the FlashAttention packages, so that `torch.compile` runs them without a graph break.

The forward of one package may go with the backward of another: both keep the scores' natural log-sum-exp per row in
float32, `[batch, heads, q_len]` or packed `[heads, total_q]` (Dao, arXiv:2307.08691). Kernels are looked up by name
when the operator runs; importing this file imports no package.

Layout here is the packages': `[batch, tokens, heads, head_dim]`, packed `[total_tokens, heads, head_dim]`. Diagonals
end in the lower right corner, and bounds of -1 are none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kernel_pytorch.attention.types import Alignment, Call, VarlenCall

__all__ = ["BACKWARD", "FORWARD", "Problem", "aligned", "calls"]


class Problem(NamedTuple):
    """What a kernel is told beside its tensors.

    Attributes:
        cu_q: Where packed documents begin and the last ends, int32; `None`: a dense batch.
        cu_k: Likewise for keys.
        max_q: Queries of the longest document.
        max_k: Keys of the longest document.
        scale: Factor of the scores.
        left: Keys seen before the diagonal; -1: all.
        right: Keys seen after it; -1: all.
        softcap: Scores become `softcap * tanh(s / softcap)`; 0: not.
    """

    cu_q: Tensor | None
    cu_k: Tensor | None
    max_q: int
    max_k: int
    scale: float
    left: int
    right: int
    softcap: float

    @property
    def causal(self) -> bool:
        """Whether the band is all keys up to the diagonal."""
        return self.left < 0 and self.right == 0


FORWARD: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {}
"""By name: `(q, k, v, problem) -> out, log_sum_exp`."""

BACKWARD: dict[str, Callable[..., tuple[Tensor, Tensor, Tensor]]] = {}
"""By name: `(grad, q, k, v, out, log_sum_exp, problem) -> dq, dk, dv`."""

_FORWARD_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? cu_q, Tensor? cu_k, SymInt max_q, SymInt max_k, float scale, "
    "SymInt left, SymInt right, float softcap, str forward, str backward"
)

_library = torch.library.Library("kernel_pytorch", "FRAGMENT")
_library.define(f"flash_attention({_FORWARD_ARGUMENTS}) -> (Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,))
_library.define(
    "flash_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? cu_q, "
    "Tensor? cu_k, SymInt max_q, SymInt max_k, float scale, SymInt left, SymInt right, float softcap, str backward)"
    " -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def aligned(tensor: Tensor) -> Tensor:
    """Return the tensor, copied where the packages' bulk loads cannot read it in place.

    They need a contiguous last dimension, and the start and all other strides at multiples of 16 bytes.
    """
    item = 16 // tensor.element_size()
    *steps, last = tensor.stride()
    if last == 1 and tensor.data_ptr() % 16 == 0:
        for step, size in zip(steps, tensor.shape, strict=False):
            if step % item and size > 1:
                break
        else:
            return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _given(tensor: Tensor) -> Tensor:
    # Detached: DLPack, by which the packages take tensors, refuses those that require a gradient.
    return aligned(tensor.detach() if tensor.requires_grad else tensor)


def _forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *problem, forward, _ = rest
    if q.is_cuda and q.get_device() != torch.cuda.current_device():
        with torch.cuda.device_of(q):
            return FORWARD[forward](_given(q), _given(k), _given(v), Problem(*problem))
    return FORWARD[forward](_given(q), _given(k), _given(v), Problem(*problem))


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    del k
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    if cu_q is None:
        batch, tokens, heads = q.shape[:3]
        return out, q.new_empty((batch, heads, tokens), dtype=torch.float32)
    return out, q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


def _backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    lse, *problem, backward = rest
    with torch.cuda.device_of(q):
        tensors = [_given(tensor) for tensor in (grad, q, k, v, out)]
        dq, dk, dv = BACKWARD[backward](*tensors, lse, Problem(*problem))
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


def _backward_fake(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    del grad
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_q, cu_k, *ctx.numbers, _forward_name, ctx.backward_name = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, cu_q, cu_k)


def _differentiate(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 10
    if grad is None:
        return (None, None, None, *nothing)
    q, k, v, out, lse, cu_q, cu_k = ctx.saved_tensors
    grads = torch.ops.kernel_pytorch.flash_attention_backward(
        grad, q, k, v, out, lse, cu_q, cu_k, *ctx.numbers, ctx.backward_name
    )
    return (*grads, *nothing)


_library.impl("flash_attention", _forward, "CompositeExplicitAutograd")
_library.impl("flash_attention_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("kernel_pytorch::flash_attention", _forward_fake, lib=_library)
torch.library.register_fake("kernel_pytorch::flash_attention_backward", _backward_fake, lib=_library)
torch.library.register_autograd("kernel_pytorch::flash_attention", _differentiate, setup_context=_save, lib=_library)


class _Attend(torch.autograd.Function):
    """The operator without the dispatcher, for eager code: that and its autograd take longer than short kernels."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, *rest: Any) -> Any:
        """Compute the output."""
        out, lse = _forward(q, k, v, cu_q, cu_k, *rest)
        *ctx.numbers, _, ctx.backward_name = rest
        ctx.save_for_backward(q, k, v, out, lse, cu_q, cu_k)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Compute the gradients, by the operator: who traces a backward pass sees it."""
        grads = torch.ops.kernel_pytorch.flash_attention_backward(
            grad, *ctx.saved_tensors, *ctx.numbers, ctx.backward_name
        )
        return (*grads, *(None,) * 10)


def _is_plain(*tensors: Tensor) -> bool:
    """Return whether nobody watches or transforms what is called: then the dispatcher would add time alone."""
    return (
        not torch.compiler.is_compiling()
        and all(type(tensor) is Tensor or type(tensor) is nn.Parameter for tensor in tensors)
        and torch._C._len_torch_dispatch_stack() == 0  # noqa: SLF001
        and not torch._C._are_functorch_transforms_active()  # noqa: SLF001
        and not torch._C._is_tracing()  # noqa: SLF001
        and not torch.autograd.profiler._is_profiler_enabled  # noqa: SLF001
    )


def _attend(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    result: Tensor
    if not _is_plain(q, k, v):
        result, _ = torch.ops.kernel_pytorch.flash_attention(q, k, v, *rest)
    elif torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        result = _Attend.apply(q, k, v, *rest)
    else:
        result, _ = _forward(q, k, v, *rest)
    return result


def _bound(tokens: int | None) -> int:
    return -1 if tokens is None else tokens


def calls(forward: str, backward: str) -> tuple[Call, VarlenCall]:
    """Return attention, dense and packed, by the forward of one package, differentiated by the backward of another.

    Args:
        forward: Name in `FORWARD`.
        backward: Name in `BACKWARD`; looked up when gradients are asked for.
    """

    def dense(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        attn_mask: Tensor | None,
        dropout_p: float,
        scale: float | None,
        left: int | None,
        right: int | None,
        alignment: Alignment,
        softcap: float,
    ) -> Tensor:
        del alignment
        assert attn_mask is None
        assert dropout_p == 0.0
        return _attend(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            None,
            None,
            query.shape[2],
            key.shape[2],
            query.shape[-1] ** -0.5 if scale is None else scale,
            _bound(left),
            _bound(right),
            softcap,
            forward,
            backward,
        ).transpose(1, 2)

    def packed(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float | None,
        left: int | None,
        right: int | None,
        softcap: float,
    ) -> Tensor:
        return _attend(
            query,
            key,
            value,
            cu_seqlens_q,
            cu_seqlens_k,
            max_q,
            max_k,
            query.shape[-1] ** -0.5 if scale is None else scale,
            _bound(left),
            _bound(right),
            softcap,
            forward,
            backward,
        )

    return dense, packed
