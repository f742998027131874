"""The class of an operator by its name: what limits it, and so what can make it faster."""

from __future__ import annotations

import re

__all__ = ["kind_of"]

_ONLY_CALL_OTHERS = """
view reshape _reshape_alias _unsafe_view t transpose permute expand expand_as unsqueeze squeeze select slice narrow
split split_with_sizes chunk unbind unflatten flatten as_strided alias detach detach_ lift lift_fresh view_as movedim
swapaxes numpy_T mT mH diagonal unfold real imag view_as_real view_as_complex resolve_conj resolve_neg result_type
empty empty_like empty_strided new_empty new_empty_strided set_ resize_ sym_size is_same_size item is_nonzero
linear matmul to conv1d conv2d conv3d convolution _convolution scaled_dot_product_attention layer_norm batch_norm
group_norm _batch_norm_impl_index dropout contiguous record_stream
"""
_OVERHEAD = frozenset(_ONLY_CALL_OTHERS.split())
"""Views, allocations, and what only calls other operators: no data move, and the time is the dispatcher's."""

_ANYWHERE = (
    ("attention", "scaled_dot_product flash_attention efficient_attention flex_attention"),
    ("normalization", "layer_norm batch_norm group_norm instance_norm rms_norm local_response"),
    ("convolution", "convolution conv1d conv2d conv3d conv_ col2im im2col"),
    ("matmul", "rnn lstm gru"),
    ("optimizer", "_fused_adam _fused_sgd _fused_adagrad"),
)
"""Parts of names that decide by themselves, in this order."""

_WHOLE = {
    "matmul": "mm bmm addmm baddbmm addbmm mv addmv dot vdot scaled_mm scaled_grouped_mm grouped_mm int_mm addr outer",
    "embedding": "index gather take take_along_dim",
    "copy": "copy to_copy clone cat stack fill zero zeros ones full repeat pad constant_pad_nd roll flip arange eye "
    "rand randn randint bernoulli normal uniform exponential random scalar_tensor tril triu zeros_like ones_like "
    "full_like rand_like randn_like new_zeros new_ones new_full pixel_shuffle pixel_unshuffle channel_shuffle "
    "slice_backward select_backward unfold_backward local_scalar_dense",
    "reduction": "sum mean amax amin max min argmax argmin aminmax softmax log_softmax softmax_backward_data "
    "log_softmax_backward_data logsumexp var std var_mean std_mean norm linalg_vector_norm cumsum cumprod cummax "
    "prod all any topk sort argsort nll_loss bincount count_nonzero histc mode median kthvalue",
    "elementwise": "add sub rsub mul div pow sqrt rsqrt exp exp2 expm1 log log1p log2 log10 sin cos tan tanh sinh cosh "
    "asin acos atan atan2 sigmoid relu relu6 gelu silu hardtanh hardswish hardsigmoid mish elu leaky_relu softplus "
    "prelu celu selu softsign hardshrink softshrink glu log_sigmoid logit erf erfc erfinv neg abs sign sgn clamp "
    "clamp_min clamp_max where maximum minimum fmax fmin eq ne lt le gt ge logical_and logical_or logical_xor "
    "logical_not bitwise_and bitwise_or bitwise_xor bitwise_not masked_fill floor ceil round trunc frac fmod remainder "
    "floor_divide true_divide reciprocal square lerp addcmul addcdiv threshold isnan isfinite isinf nan_to_num "
    "native_dropout angle polar complex conj_physical xlogy heaviside hypot native_dropout mse_loss smooth_l1_loss",
}
_KIND_BY_NAME = {name: kind for kind, names in _WHOLE.items() for name in names.split()}

_AT_START = (
    ("embedding", "embedding index_ scatter masked_scatter masked_select nonzero"),
    ("matmul", "linear mkldnn_linear qlinear weight_int einsum"),
    ("copy", "upsample reflection_pad replication_pad split_copy"),
    ("reduction", "max_pool avg_pool adaptive_ fractional_max linalg_vector nll_loss cross_entropy unique cdist"),
)
"""Beginnings of names, leading underscores apart."""

_WRAPPING = re.compile(r"^_?foreach_|^_+|_+$|(_dense)?_backward$|_forward$")


def kind_of(name: str) -> str:
    """Return the class of an operator, as `OperatorShare.kind` names it.

    Args:
        name: `aten::addmm`, `aten.addmm` or `aten.addmm.default`; in-place, backward and foreach forms belong to their
            operator's class.
    """
    operator = name.replace("::", ".").partition(".")[2].partition(".")[0]
    if operator in _OVERHEAD:
        return "overhead"
    for kind, parts in _ANYWHERE:
        if any(part in operator for part in parts.split()):
            return kind
    stem = operator
    while stem not in _KIND_BY_NAME and (shorter := _WRAPPING.sub("", stem, count=1)) != stem:
        stem = shorter
    if stem in _KIND_BY_NAME:
        return _KIND_BY_NAME[stem]
    for kind, starts in _AT_START:
        if stem.startswith(tuple(starts.split())):
            return kind
    return "matmul" if re.search(r"(^|_)(mm|gemm|linear)(_|$)", stem) else "other"
