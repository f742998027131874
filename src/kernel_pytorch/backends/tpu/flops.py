"""Floating-point operations of a traced graph by PyTorch's own formulas (`torch.utils.flop_counter`)."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import flop_registry

__all__ = ["count_flops", "counted_as"]


def count_flops(graph: fx.GraphModule) -> dict[str, int]:
    """Return floating-point operations by operator (`aten.mm`); a multiply-add is two, element-wise work is none.

    The body of a loop (`scan`) counts as often as it runs.

    Args:
        graph: Nodes carry their fake value in `meta["val"]`, as `make_fx` leaves it.
    """
    counts: Counter[str] = Counter()
    for node in graph.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is torch.ops.higher_order.scan:
            # Its body runs for every slice of what is stacked; a compiler counts it once.
            body, _, stacked = node.args[:3]
            steps = len(_value(stacked[0]))
            counts.update({k: n * steps for k, n in count_flops(getattr(graph, str(body.target))).items()})
            continue
        packet = getattr(node.target, "overloadpacket", None)
        formula = flop_registry.get(counted_as(packet))
        if formula is None:
            continue
        args, kwargs = pytree.tree_map(_value, (node.args, dict(node.kwargs)))
        counts[str(packet)] += int(formula(*args, **kwargs, out_val=node.meta.get("val")))
    return dict(counts)


def counted_as(packet: Any) -> Any:
    """Return the operator whose formula counts one: attention is attention on the CPU and outside PyTorch too."""
    aten = torch.ops.aten
    same = {
        aten._scaled_dot_product_fused_attention_overrideable: aten._scaled_dot_product_cudnn_attention,  # noqa: SLF001
        aten._scaled_dot_product_fused_attention_overrideable_backward:  # noqa: SLF001
            aten._scaled_dot_product_cudnn_attention_backward,  # noqa: SLF001
        aten._scaled_dot_product_flash_attention_for_cpu: aten._scaled_dot_product_flash_attention,  # noqa: SLF001
        aten._scaled_dot_product_flash_attention_for_cpu_backward:  # noqa: SLF001
            aten._scaled_dot_product_flash_attention_backward,  # noqa: SLF001
    }  # fmt: skip
    return same.get(packet, packet)


def _value(leaf: Any) -> Any:
    return leaf.meta.get("val") if isinstance(leaf, fx.Node) else leaf
