"""Stand-ins for the FlashAttention packages: their functions' signatures, computed in plain PyTorch."""

from __future__ import annotations

import torch

from kernel_pytorch.attention.reference import visible

CPU = torch.device("cpu")


def forward(q, k, v, scale, left, right, softcap):
    """Return the output `[b, s, h, d]` and the log-sum-exp `[b, h, s]` of `[b, s, h, d]`, diagonals lower right."""
    groups = q.shape[2] // k.shape[2]
    q, k, v = (t.transpose(1, 2).float() for t in (q, k, v))
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(-1, -2) * scale
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    seen = visible(q.shape[2], k.shape[2], left=left, right=right, alignment="lower_right", device=CPU)
    scores = scores if seen is None else scores.masked_fill(~seen, float("-inf"))
    lse = scores.logsumexp(-1)
    return (torch.softmax(scores, -1) @ v).transpose(1, 2), lse


def backward(grad, q, k, v, out, lse, scale, left, right, softcap):
    """Return the gradients from output and log-sum-exp alone, as the kernels do."""
    dtype, groups = q.dtype, q.shape[2] // k.shape[2]
    grad, q, k, v, out = (t.transpose(1, 2).float() for t in (grad, q, k, v, out))
    kk, vv = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    raw = q @ kk.transpose(-1, -2) * scale
    scores = softcap * torch.tanh(raw / softcap) if softcap else raw
    weights = torch.exp(scores - lse[..., None])
    seen = visible(q.shape[2], k.shape[2], left=left, right=right, alignment="lower_right", device=CPU)
    weights = weights if seen is None else weights.masked_fill(~seen, 0.0)
    d_weights = grad @ vv.transpose(-1, -2)
    d_scores = weights * (d_weights - (grad * out).sum(-1, keepdim=True))
    if softcap:
        d_scores = d_scores * (1.0 - torch.tanh(raw / softcap) ** 2)
    dq, dk, dv = d_scores @ kk * scale, d_scores.transpose(-1, -2) @ q * scale, weights.transpose(-1, -2) @ grad
    shape = (k.shape[0], k.shape[1], groups, *k.shape[2:])
    return tuple(t.transpose(1, 2).to(dtype) for t in (dq, dk.view(shape).sum(2), dv.view(shape).sum(2)))


def by_document(function, q_like, k_like, cu_q, cu_k):
    """Call `function` for each document and return its results, in order."""
    for n in range(len(cu_q) - 1):
        rows, keys = slice(cu_q[n], cu_q[n + 1]), slice(cu_k[n], cu_k[n + 1])
        yield function([t[rows][None] for t in q_like], [t[keys][None] for t in k_like], rows)


class Interface:
    """`flash_attn.cute.interface` of flash-attn-4 4.0.0b36: the arguments that are used, by their names there."""

    def __init__(self):
        self.calls = []

    def _flash_attn_fwd(
        self,
        q,
        k,
        v,
        qv=None,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        seqused_q=None,
        seqused_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        *,
        softmax_scale=None,
        causal=False,
        softcap=None,
        window_size_left=None,
        window_size_right=None,
        return_lse=False,
    ):
        self.calls.append("forward")
        assert return_lse
        assert all(t.stride(-1) == 1 for t in (q, k, v))
        band = (window_size_left, 0 if causal else window_size_right)
        if cu_seqlens_q is None:
            out, lse = forward(q, k, v, softmax_scale, *band, softcap)
            return out.to(q.dtype).contiguous(), lse.contiguous(), None, None, None
        assert max_seqlen_q >= cu_seqlens_q.diff().max()
        assert max_seqlen_k >= cu_seqlens_k.diff().max()
        parts = list(
            by_document(
                lambda qs, ks, _: forward(*qs, *ks, softmax_scale, *band, softcap),
                [q],
                [k, v],
                cu_seqlens_q,
                cu_seqlens_k,
            )
        )
        return (
            torch.cat([o[0] for o, _ in parts]).to(q.dtype),
            torch.cat([n[0] for _, n in parts], -1),
            None,
            None,
            None,
        )

    def _flash_attn_bwd(
        self,
        q,
        k,
        v,
        out,
        dout,
        lse,
        softmax_scale=None,
        causal=False,
        softcap=0.0,
        window_size_left=None,
        window_size_right=None,
        *,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
    ):
        self.calls.append("backward")
        band = (window_size_left, 0 if causal else window_size_right)
        assert lse.dtype == torch.float32
        if cu_seqlens_q is None:
            assert lse.shape == (q.shape[0], q.shape[2], q.shape[1])
            return backward(dout, q, k, v, out, lse, softmax_scale, *band, softcap)
        assert lse.shape == (q.shape[1], q.shape[0])

        def one(qs, ks, rows):
            (grad, query, output), (key, value) = qs, ks
            return backward(grad, query, key, value, output, lse[None, :, rows], softmax_scale, *band, softcap)

        parts = by_document(one, [dout, q, out], [k, v], cu_seqlens_q, cu_seqlens_k)
        return tuple(torch.cat([t[0] for t in which]) for which in zip(*parts, strict=True))


class Hopper:
    """The operators `flash_attn_3::fwd` and `::bwd`, arguments as in the binary's schema; no backward in this build."""

    def __init__(self):
        self.calls = []

    def fwd(
        self,
        q,
        k,
        v,
        *,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        softmax_scale=None,
        is_causal=False,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        num_splits=0,
    ):
        self.calls.append(f"forward splits={num_splits}")
        assert cu_seqlens_q is None
        assert cu_seqlens_k is None
        assert max_seqlen_q is None
        assert max_seqlen_k is None
        dtype = q.dtype
        if q_descale is not None:
            assert q_descale.shape == k_descale.shape == v_descale.shape == (q.shape[0], k.shape[2])
            groups = q.shape[2] // k.shape[2]
            q = q.float() * q_descale.repeat_interleave(groups, 1)[:, None, :, None]
            k, v = k.float() * k_descale[:, None, :, None], v.float() * v_descale[:, None, :, None]
            dtype = torch.bfloat16
        left, right = (None if n < 0 else n for n in (window_size_left, window_size_right))
        out, lse = forward(q, k, v, softmax_scale, left, 0 if is_causal else right, softcap)
        return out.to(dtype).contiguous(), lse.contiguous(), None, None

    def bwd(self, *tensors, **options):
        raise RuntimeError("This flash attention build does not support backward.")
