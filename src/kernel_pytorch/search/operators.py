"""What the operators of a model do: their class, their floating-point operations and the bytes they move."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

__all__ = ["VIEWS", "Work", "WorkCounter", "kind_of"]

VIEWS = frozenset(
    "view reshape _reshape_alias _unsafe_view t transpose permute expand expand_as unsqueeze squeeze select slice narrow "
    "split split_with_sizes chunk unbind unflatten flatten as_strided alias detach detach_ lift_fresh view_as "
    "movedim swapaxes numpy_T mT mH diagonal unfold real imag view_as_real view_as_complex resolve_conj resolve_neg "
    "linear matmul to empty empty_like empty_strided new_empty new_empty_strided result_type is_same_size "
    "conv1d conv2d conv3d convolution _convolution scaled_dot_product_attention layer_norm batch_norm group_norm "
    "_batch_norm_impl_index dropout contiguous item is_nonzero set_ resize_ sym_size lift record_stream".split()
)
"""Operators that move no data themselves: views, allocations, and those that only call others. Their time is the
dispatcher's, so it counts as overhead."""

_KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("attention", ("scaled_dot_product", "flash_attention", "efficient_attention", "flex_attention")),
    ("normalization", ("layer_norm", "batch_norm", "group_norm", "instance_norm", "rms_norm", "local_response")),
    ("convolution", ("conv", "thnn_conv", "slow_conv", "col2im", "im2col")),
    (
        "matmul",
        ("mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot", "vdot", "_scaled_mm", "_int_mm", "mkldnn_linear",
         "_linear_pointwise", "linear", "einsum", "addbmm", "addr", "outer", "lstm", "gru", "rnn", "_mkldnn_rnn",
         "linear_dynamic", "linear_prepack", "weight_int4pack", "weight_int8pack", "_weight_int"),
    ),
    ("embedding", ("embedding", "index_select", "gather", "index", "take", "scatter", "index_put", "index_add")),
    ("optimizer", ("_fused_adam", "_fused_sgd", "_fused_adagrad")),
    (
        "reduction",
        ("sum", "mean", "amax", "amin", "max", "min", "argmax", "argmin", "softmax", "logsumexp", "var", "std", "norm",
         "cumsum", "cumprod", "prod", "all", "any", "topk", "sort", "nll_loss", "pool", "cross_entropy", "bincount",
         "mse_loss", "linalg_vector_norm", "native_dropout_backward", "count_nonzero", "histc", "unique"),
    ),
    (
        "copy",
        ("copy", "clone", "cat", "stack", "fill", "zero", "zeros", "ones", "full", "repeat", "pad", "constant_pad_nd",
         "roll", "flip", "_to_copy", "arange", "rand", "randn", "randint", "bernoulli", "normal", "uniform",
         "scalar_tensor", "eye", "tril", "triu", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones",
         "new_full", "pixel_shuffle", "channel_shuffle", "upsample", "reflection_pad", "replication_pad", "slice_backward",
         "select_backward", "split_copy"),
    ),
)
_ANYWHERE = ("attention", "normalization", "convolution")
_ELEMENTWISE = frozenset(
    "add sub rsub mul div pow sqrt rsqrt exp expm1 log log1p log2 sin cos tan tanh sigmoid relu gelu silu hardtanh "
    "hardswish hardsigmoid mish elu leaky_relu softplus erf erfc neg abs sign clamp clamp_min clamp_max where maximum "
    "minimum eq ne lt le gt ge logical_and logical_or logical_not bitwise_and bitwise_or bitwise_not masked_fill "
    "floor ceil round trunc fmod remainder reciprocal square lerp addcmul addcdiv threshold threshold_backward isnan "
    "isfinite isinf native_dropout glu prelu celu selu softsign hardshrink softshrink floor_divide true_divide atan2 "
    "sgn angle polar complex nan_to_num log_sigmoid_forward logit xlogy cosh sinh asin acos atan".split()
)


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


@dataclass(slots=True)
class Work:
    """What the operators of one class did.

    Attributes:
        calls: Calls of operators that move data.
        bytes: Bytes of their inputs and outputs, each call alone.
        flops: Floating-point operations by dtype of the first floating-point input.
    """

    calls: int = 0
    bytes: float = 0.0
    flops: collections.Counter[str] = field(default_factory=collections.Counter)


class WorkCounter(TorchDispatchMode):
    """Counts calls, bytes and floating-point operations by class in one pass.

    Attributes:
        work: By class.
        uncounted: Operators of the class `matmul`, `attention` or `convolution` with no formula for their operations.
        looked_up: Bytes read from tensors of which only some rows are read, by storage.
        read_whole: Storages that some operator read whole.
    """

    def __init__(self) -> None:
        super().__init__()
        self.work: dict[str, Work] = collections.defaultdict(Work)
        self.uncounted: collections.Counter[str] = collections.Counter()
        self.looked_up: collections.Counter[int] = collections.Counter()
        self.read_whole: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and add what it did."""
        del types
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = str(func.overloadpacket)
        operator = name.partition(".")[2]
        kind = kind_of(name)
        if func.is_view or (kind == "overhead" and func.overloadpacket not in flop_registry):
            return result
        if kind == "overhead":
            kind = "convolution"
        inputs = _plain_tensors((args, kwargs))
        outputs = _plain_tensors(result)
        work = self.work[kind]
        work.calls += 1
        written = sum(map(_bytes, outputs))
        if operator in ("embedding", "index_select", "gather", "index") and inputs:
            self.looked_up[storage_of(inputs[0])] += written
            work.bytes += written + sum(map(_bytes, inputs[1:])) + written
        else:
            self.read_whole.update(map(storage_of, inputs))
            work.bytes += written + sum(map(_bytes, inputs))
        flops = _flops(func, args, kwargs, result)
        if flops is None and kind in ("matmul", "attention", "convolution"):
            self.uncounted[operator] += 1
        dtype = next((t.dtype for t in inputs if t.is_floating_point() or t.is_complex() or t.dtype is torch.int8), None)
        if flops and dtype is not None:
            work.flops[str(dtype).removeprefix("torch.")] += flops
        return result


def storage_of(tensor: torch.Tensor) -> int:
    """Return an identity of the memory a tensor lies in, shared by its views."""
    return int(tensor.untyped_storage()._cdata)  # noqa: SLF001


def _plain_tensors(tree: Any) -> list[torch.Tensor]:
    return [
        leaf
        for leaf in pytree.tree_leaves(tree)
        if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided and type(leaf) in (torch.Tensor, torch.nn.Parameter)
    ]


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> float | None:
    packet = func.overloadpacket
    formula = _EXTRA.get(str(packet)) or flop_registry.get(packet)
    if formula is None:
        return None
    if str(packet) in _EXTRA:
        return float(formula(*args, **kwargs))
    return float(formula(*args, **kwargs, out_val=result))


def _attention_on_cpu(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_on_cpu_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape))


def _int_mm(one: Any, two: Any, *_: Any, **__: Any) -> int:
    return 2 * int(one.shape[0]) * int(one.shape[1]) * int(two.shape[1])


def _addbmm(_: Any, one: Any, two: Any, **__: Any) -> int:
    return 2 * math.prod(one.shape) * int(two.shape[2])


def _mv(matrix: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(matrix.shape)


_EXTRA: dict[str, Callable[..., int]] = {
    "aten._scaled_dot_product_flash_attention_for_cpu": _attention_on_cpu,
    "aten._scaled_dot_product_flash_attention_for_cpu_backward": _attention_on_cpu_backward,
    "aten._int_mm": _int_mm,
    "aten.addbmm": _addbmm,
    "aten.mv": _mv,
    "aten.dot": _mv,
}
"""What torch.utils.flop_counter has no formula for, in its convention: a multiply-add is two operations."""


def least_bytes(tensors: Iterable[torch.Tensor], counter: WorkCounter) -> float:
    """Return the least bytes that reading tensors takes: of a table only the rows looked up, of one not used none."""
    total = 0.0
    for tensor in tensors:
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided:
            continue
        storage = storage_of(tensor)
        if storage in counter.read_whole:
            total += _bytes(tensor)
        else:
            total += min(_bytes(tensor), counter.looked_up[storage])
    return total
