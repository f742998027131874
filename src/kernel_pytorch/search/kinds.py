"""The class of an operator by its name: what limits it, and so what can make it faster."""

from __future__ import annotations

__all__ = ["VIEWS", "kind_of"]

_VIEW_NAMES = """
view reshape _reshape_alias _unsafe_view t transpose permute expand expand_as unsqueeze squeeze select slice
narrow  split split_with_sizes chunk unbind unflatten flatten as_strided alias detach detach_ lift_fresh
view_as  movedim swapaxes numpy_T mT mH diagonal unfold real imag view_as_real view_as_complex resolve_conj
resolve_neg  linear matmul to empty empty_like empty_strided new_empty new_empty_strided result_type
is_same_size  conv1d conv2d conv3d convolution _convolution scaled_dot_product_attention layer_norm batch_norm
group_norm  _batch_norm_impl_index dropout contiguous item is_nonzero set_ resize_ sym_size lift record_stream
"""
VIEWS = frozenset(_VIEW_NAMES.split())
"""Operators that move no data themselves: views, allocations, and those that only call others. Their time is the
dispatcher's, so it counts as overhead."""

_KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("attention", ("scaled_dot_product", "flash_attention", "efficient_attention", "flex_attention")),
    ("normalization", ("layer_norm", "batch_norm", "group_norm", "instance_norm", "rms_norm", "local_response")),
    ("convolution", ("conv", "thnn_conv", "slow_conv", "col2im", "im2col")),
    (
        "matmul",
        (
            "mm",
            "bmm",
            "addmm",
            "baddbmm",
            "mv",
            "addmv",
            "dot",
            "vdot",
            "_scaled_mm",
            "_int_mm",
            "mkldnn_linear",
            "_linear_pointwise",
            "linear",
            "einsum",
            "addbmm",
            "addr",
            "outer",
            "lstm",
            "gru",
            "rnn",
            "_mkldnn_rnn",
            "linear_dynamic",
            "linear_prepack",
            "weight_int4pack",
            "weight_int8pack",
            "_weight_int",
        ),
    ),
    ("embedding", ("embedding", "index_select", "gather", "index", "take", "scatter", "index_put", "index_add")),
    ("optimizer", ("_fused_adam", "_fused_sgd", "_fused_adagrad")),
    (
        "reduction",
        (
            "sum",
            "mean",
            "amax",
            "amin",
            "max",
            "min",
            "argmax",
            "argmin",
            "softmax",
            "logsumexp",
            "var",
            "std",
            "norm",
            "cumsum",
            "cumprod",
            "prod",
            "all",
            "any",
            "topk",
            "sort",
            "nll_loss",
            "pool",
            "cross_entropy",
            "bincount",
            "mse_loss",
            "linalg_vector_norm",
            "count_nonzero",
            "histc",
            "unique",
        ),
    ),
    (
        "copy",
        (
            "copy",
            "clone",
            "cat",
            "stack",
            "fill",
            "zero",
            "zeros",
            "ones",
            "full",
            "repeat",
            "pad",
            "constant_pad_nd",
            "roll",
            "flip",
            "_to_copy",
            "arange",
            "rand",
            "randn",
            "randint",
            "bernoulli",
            "normal",
            "uniform",
            "scalar_tensor",
            "eye",
            "tril",
            "triu",
            "zeros_like",
            "ones_like",
            "full_like",
            "new_zeros",
            "new_ones",
            "new_full",
            "pixel_shuffle",
            "channel_shuffle",
            "upsample",
            "reflection_pad",
            "replication_pad",
            "slice_backward",
            "select_backward",
            "split_copy",
        ),
    ),
)
_ANYWHERE = ("attention", "normalization", "convolution")
_ELEMENTWISE_NAMES = """
add sub rsub mul div pow sqrt rsqrt exp expm1 log log1p log2 sin cos tan tanh sigmoid relu gelu silu hardtanh
hardswish hardsigmoid mish elu leaky_relu softplus erf erfc neg abs sign clamp clamp_min clamp_max where
maximum  minimum eq ne lt le gt ge logical_and logical_or logical_not bitwise_and bitwise_or bitwise_not
masked_fill  floor ceil round trunc fmod remainder reciprocal square lerp addcmul addcdiv threshold
threshold_backward isnan  isfinite isinf native_dropout glu prelu celu selu softsign hardshrink softshrink
floor_divide true_divide atan2  sgn angle polar complex nan_to_num log_sigmoid_forward logit xlogy cosh sinh
asin acos atan
"""
_ELEMENTWISE = frozenset(_ELEMENTWISE_NAMES.split())


def kind_of(name: str) -> str:
    """Return the class of an operator, as `OperatorShare.kind` names it.

    Args:
        name: `aten::addmm`, `aten.addmm` or `aten.addmm.default`; in-place and backward forms belong to their kind.
    """
    library, _, rest = name.replace("::", ".").partition(".")
    operator = rest.partition(".")[0]
    if operator in VIEWS:
        return "overhead"
    plain = operator.removeprefix("_foreach_").rstrip("_")
    for kind, names in _KINDS:
        if kind in _ANYWHERE and any(part in plain for part in names):
            return kind
        stems = {plain, plain.removesuffix("_backward"), plain.removesuffix("_backward_data"), plain.removeprefix("_")}
        stems |= {stem.removeprefix("_").removesuffix("_backward").removesuffix("_dense") for stem in tuple(stems)}
        if stems & set(names) or any(plain.startswith(part) and len(part) > 4 for part in names):
            return kind
    stem = plain.removesuffix("_backward").removeprefix("_")
    if stem in _ELEMENTWISE or plain in _ELEMENTWISE:
        return "elementwise"
    if library not in ("aten", "prims") and any(part in operator for part in ("mm", "linear", "gemm")):
        return "matmul"
    return "reduction" if any(part in plain for part in ("softmax", "pool", "loss", "norm")) else "other"
