"""What the operators of a model do: their calls, their floating-point operations and the bytes they move."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode

from kernel_pytorch.search.kinds import kind_of

__all__ = ["Work", "WorkCounter", "least_bytes", "storage_of"]

_sdpa_flops: Callable[..., int] = flop_counter.sdpa_flop_count
_sdpa_backward_flops: Callable[..., int] = flop_counter.sdpa_backward_flop_count


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
    flops: dict[str, float] = field(default_factory=dict)


class WorkCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Counts calls, bytes and floating-point operations by class in one pass.

    Attributes:
        work: By class.
        uncounted: Operators of the class `matmul`, `attention` or `convolution` with no formula for their operations.
        looked_up: Bytes read from tensors of which only some rows are read, by storage.
        read_whole: Storages that some operator read whole.
        section: While it is not empty, all work belongs to this class.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.work: dict[str, Work] = collections.defaultdict(Work)
        self.uncounted: collections.Counter[str] = collections.Counter()
        self.looked_up: collections.Counter[int] = collections.Counter()
        self.read_whole: set[int] = set()
        self.section = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and add what it did."""
        del types
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = str(func.overloadpacket)
        operator = name.partition(".")[2]
        kind = kind_of(name)
        if func.is_view or (kind == "overhead" and not _has_formula(func)):
            return result
        if kind == "overhead":  # elsewhere these only call others
            kind = "matmul" if operator == "linear" else "convolution"
        inputs = _plain_tensors((args, kwargs))
        outputs = _plain_tensors(result)
        work = self.work[self.section or kind]
        work.calls += 1
        written = sum(map(_bytes, outputs))
        if operator in ("embedding", "index_select", "gather", "index") and inputs:
            self.looked_up[storage_of(inputs[0])] += written
            work.bytes += written + sum(map(_bytes, inputs[1:])) + written
        else:
            self.read_whole.update(map(storage_of, inputs))
            work.bytes += written + sum(map(_bytes, inputs))
        flops = _flops(func, args, kwargs, result)
        if flops is None and (kind in ("matmul", "attention", "convolution") or operator in _FUSED_LAYERS):
            self.uncounted[operator] += 1
        if flops:
            dtype = _dtype(inputs)
            work.flops[dtype] = work.flops.get(dtype, 0.0) + flops
        return result


def storage_of(tensor: torch.Tensor) -> int:
    """Return an identity of the memory a tensor lies in, shared by its views."""
    return int(tensor.untyped_storage()._cdata)  # noqa: SLF001


def _plain_tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if _plain(leaf)]


def _plain(leaf: Any) -> bool:
    """Return whether a leaf is a tensor whose bytes are its elements: no subclass, not sparse."""
    return type(leaf) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer) and leaf.layout is torch.strided


def _dtype(inputs: Iterable[torch.Tensor]) -> str:
    """Return the name of the dtype that an operator computes in."""
    found = (t.dtype for t in inputs if t.is_floating_point() or t.is_complex() or t.dtype is torch.int8)
    return str(next(found, torch.float32)).removeprefix("torch.")


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _has_formula(func: Any) -> bool:
    return func.overloadpacket in flop_counter.flop_registry or str(func.overloadpacket) in _EXTRA


def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> float | None:
    packet = func.overloadpacket
    formula = _EXTRA.get(str(packet)) or flop_counter.flop_registry.get(packet)
    if formula is None:
        return None
    if str(packet) in _EXTRA:
        return float(formula(*args, **kwargs))
    try:
        return float(formula(*args, **kwargs, out_val=result))
    except AssertionError:  # formulas of older releases do not know grouped heads
        return None


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return _sdpa_flops(query.shape, *_as_many_heads(query, key, value))


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return _sdpa_backward_flops(grad.shape, query.shape, *_as_many_heads(query, key, value))


def _as_many_heads(query: Any, *others: Any) -> list[tuple[int, ...]]:
    """Return the shapes of keys and values with a head for each of the query's, as grouped ones are used."""
    return [(other.shape[0], query.shape[1], *other.shape[2:]) for other in others]


def _linear(one: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * int(one.numel()) * int(weight.shape[0])


def _linear_backward(one: Any, grad: Any, weight: Any, wanted: Any, **__: Any) -> int:
    del grad
    return _linear(one, weight) * sum(map(bool, wanted[:2]))


def _int_mm(one: Any, two: Any, *_: Any, **__: Any) -> int:
    return 2 * int(one.shape[0]) * int(one.shape[1]) * int(two.shape[1])


def _addbmm(_: Any, one: Any, two: Any, **__: Any) -> int:
    return 2 * int(math.prod(one.shape)) * int(two.shape[2])


def _mv(matrix: Any, *_: Any, **__: Any) -> int:
    return 2 * int(math.prod(matrix.shape))


def _grouped_mm(one: Any, two: Any, *_: Any, **__: Any) -> int:
    groups = int(one.shape[0]) if one.dim() == two.dim() == 3 else 1
    return 2 * groups * int(one.shape[-2]) * int(one.shape[-1]) * int(two.shape[-1])


def _recurrent_layer(steps: Any, to_hidden: Any, hidden_to_hidden: Any, *_: Any, **__: Any) -> int:
    return 2 * int(steps.shape[0]) * int(steps.shape[1]) * int(to_hidden.numel() + hidden_to_hidden.numel())


def _recurrent_layer_backward(*args: Any, **__: Any) -> int:
    return 2 * _recurrent_layer(*args)


_FUSED_LAYERS = ("_transformer_encoder_layer_fwd", "_native_multi_head_attention")
"""Whole layers in one operator, of several classes at once."""

_EXTRA: dict[str, Callable[..., int]] = {
    "aten._scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten._scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    "aten._scaled_dot_product_fused_attention_overrideable": _attention,
    "aten._scaled_dot_product_fused_attention_overrideable_backward": _attention_backward,
    "aten.linear": _linear,
    "aten.linear_backward": _linear_backward,
    "aten._int_mm": _int_mm,
    "aten._grouped_mm": _grouped_mm,
    "aten.mkldnn_rnn_layer": _recurrent_layer,
    "aten.mkldnn_rnn_layer_backward": _recurrent_layer_backward,
    "aten.addbmm": _addbmm,
    "aten.mv": _mv,
    "aten.dot": _mv,
}
"""What torch.utils.flop_counter has no formula for, in its convention: a multiply-add is two operations. The first two
are attention, and `linear` an operator of its own, on devices outside PyTorch (TorchTPU)."""


def least_bytes(tensors: Iterable[torch.Tensor], counter: WorkCounter) -> float:
    """Return the least bytes that reading tensors takes: of a table only the rows looked up, of one not used none."""
    total = 0.0
    for tensor in tensors:
        if not _plain(tensor):
            continue
        storage = storage_of(tensor)
        if storage in counter.read_whole:
            total += _bytes(tensor)
        else:
            total += min(_bytes(tensor), counter.looked_up[storage])
    return total
