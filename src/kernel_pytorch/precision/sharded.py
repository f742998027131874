# mypy: disable-error-code="no-untyped-call"
"""Weights of FP8 layers under FSDP2, which cast before they are gathered: half the bytes of bfloat16 on the wire.

    kp.precision.convert(model, "tensorwise_current")
    kp.precision.shard_weights(model)
    for block in model.blocks: fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters())
    kp.precision.follow_weights(model, optimizer)

The parameters keep their names and stay in their own format, sharded; only what FSDP gathers is FP8, with one scale a
site by the largest magnitude over all ranks, which one all-reduce finds for all layers after each optimizer step. The
extension points are those of PyTorch (`fsdp_pre_all_gather`, `fsdp_post_all_gather` of a parameter's tensor subclass).
Run on CPUs with gloo; on GPUs and with NCCL it has not been run yet.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed, nn
from torch.utils import _pytree as pytree

from kernel_pytorch.core.versions import count_fused_updates
from kernel_pytorch.errors import InputsError, ModelError
from kernel_pytorch.ops.float8_cast.reference import quantise, scale_reference
from kernel_pytorch.precision.gathered import GatheredWeight
from kernel_pytorch.precision.mlp import MLP_SLOT, restore_mlp
from kernel_pytorch.precision.site import Site
from kernel_pytorch.precision.state import named_sites

__all__ = ["ShardedWeight", "follow_weights", "shard_weights"]

aten = torch.ops.aten
_STAY = {
    aten.empty_like.default, aten.new_zeros.default, aten.slice.Tensor, aten.copy_.default, aten.view.default,
    aten.as_strided.default, aten._to_copy.default, aten._pin_memory.default, aten.split.Tensor,  # noqa: SLF001
    aten.clone.default, aten.detach.default,
}  # fmt: skip
"""What FSDP does with a parameter before it gathers it; results stay weights of this kind."""


class ShardedWeight(torch.Tensor):
    """A weight, or a shard of one, in its own format, that is cast when FSDP gathers it.

    Args:
        plain: The values.
        kind: The format of FP8.
        shared: Of all weights of a site: `scale` of the values as they are, and the versions that it was found for.
    """

    @staticmethod
    def __new__(  # noqa: D102
        cls: type[ShardedWeight], plain: torch.Tensor, kind: torch.dtype, shared: dict[str, Any]
    ) -> ShardedWeight:
        del kind, shared
        return torch.Tensor._make_wrapper_subclass(  # noqa: SLF001
            cls, plain.size(), strides=plain.stride(), storage_offset=plain.storage_offset(), dtype=plain.dtype,
            layout=plain.layout, device=plain.device, pin_memory=plain.is_pinned(), requires_grad=plain.requires_grad,
        )  # fmt: skip

    def __init__(self, plain: torch.Tensor, kind: torch.dtype, shared: dict[str, Any]) -> None:
        self.plain, self.kind, self.shared = plain, kind, shared

    def __repr__(self) -> str:  # type: ignore[override]
        return f"ShardedWeight({self.plain!r}, {self.kind})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Run an operator on the values; the few that FSDP needs give weights of this kind."""
        del types
        one = next(x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, ShardedWeight))
        plain = pytree.tree_map_only(ShardedWeight, lambda x: x.plain, (args, kwargs or {}))
        out = func(*plain[0], **plain[1])
        if func is aten.copy_.default:
            return args[0]
        if func not in _STAY:
            return out
        return pytree.tree_map_only(torch.Tensor, lambda x: cls(x, one.kind, one.shared), out)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        """Return the names of the inner tensors, and the rest."""
        return ["plain"], (self.kind, self.shared)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], rest: Any, size: Any, stride: Any) -> ShardedWeight:
        """Make the weight again of its inner tensors."""
        del size, stride
        return ShardedWeight(inner["plain"], *rest)

    def fsdp_pre_all_gather(
        self, mesh: Any, outer_size: Any, outer_stride: Any, module: Any, mp_policy: Any
    ) -> tuple[tuple[torch.Tensor, ...], Any]:
        """Return the shard in FP8 as bytes, and what turns them back.

        Raises:
            ModelError: The weight changed since its scale was found.
        """
        del mesh, outer_size, outer_stride, mp_policy
        scale = self.shared.get("scale")
        if scale is None or self.shared["versions"].get(id(module)) != module.weight._version:  # noqa: SLF001
            raise ModelError(
                "a weight changed since the scale of its cast was found",
                fix="kp.precision.follow_weights(model, optimizer), and follow_weights(model) after other changes",
            )
        small = quantise(self.plain, scale, self.kind)
        return (small.view(torch.uint8),), (scale.reciprocal(), self.kind)

    def fsdp_post_all_gather(
        self,
        all_gather_outputs: tuple[torch.Tensor, ...],
        metadata: Any,
        param_dtype: torch.dtype,
        *,
        out: torch.Tensor | None = None,
    ) -> Any:
        """Return the whole weight as layers in FP8 take it."""
        (data,), (inverse, kind) = all_gather_outputs, metadata
        if out is not None:
            held = out.data if isinstance(out, nn.Parameter) else out
            assert isinstance(held, GatheredWeight)
            # The gathering before a backward brings what the forward saved: no new version, as FSDP's own copies.
            with torch.autograd._unsafe_preserve_version_counter(held.back):  # type: ignore[attr-defined]  # noqa: SLF001
                held.back.copy_(inverse)
            return None
        return GatheredWeight(data, inverse, kind, param_dtype), (data,)


def shard_weights(model: nn.Module) -> None:
    """Let FSDP2 gather the weights of a model's FP8 layers in FP8; before `fully_shard`, in place.

    Gated MLPs that are one come apart into their layers.

    Args:
        model: Converted by a tensorwise recipe whose products are all in FP8; others keep gathering their own format.

    Raises:
        ModelError: No layer runs by such a recipe.
    """
    for module in model.modules():
        if MLP_SLOT in vars(module):
            restore_mlp(module)
    sites = [site for site, _ in named_sites(model).values() if _fits(site)]
    if not sites:
        raise ModelError(
            "no layer runs by a tensorwise recipe", fix='kp.precision.convert(model, "tensorwise_current")'
        )
    for site in sites:
        shared: dict[str, Any] = {"power_of_2": site.recipe.power_of_2}
        for layer in site.layers:
            learns = layer.weight.requires_grad
            wrapped = ShardedWeight(layer.weight.detach(), site.recipe.dtype("weight"), shared)
            layer.weight = nn.Parameter(wrapped, requires_grad=learns)


def _fits(site: Site) -> bool:
    recipe = site.recipe
    whole = recipe.forward.float8 and recipe.input_gradient.float8
    return whole and not recipe.by_row and all(type(m.weight) is nn.Parameter for m in site.layers)


def follow_weights(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Find the scales of all sharded weights as they are now, and with an optimizer again after each of its steps.

    One all-reduce for all layers. Without an optimizer call it after each change of the weights.

    Raises:
        InputsError: The model has no sharded weights of this kind: `shard_weights`, then `fully_shard`.
    """
    groups: dict[int, tuple[dict[str, Any], list[tuple[nn.Module, ShardedWeight]]]] = {}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        local = getattr(weight, "_local_tensor", weight)
        if isinstance(local, ShardedWeight):
            groups.setdefault(id(local.shared), (local.shared, []))[1].append((module, local))
    if not groups:
        raise InputsError("no weight is sharded in FP8", fix="kp.precision.shard_weights(model), then fully_shard")

    @torch.no_grad()
    def find(*_told: Any) -> None:
        found = []
        for _, members in groups.values():
            plain = [local.plain for _, local in members]
            sizes = [p.abs().amax().float() if p.numel() else p.new_zeros(()).float() for p in plain]
            found.append(torch.stack(sizes).amax())
        most = torch.stack(found)
        if distributed.is_initialized():
            distributed.all_reduce(most, op=distributed.ReduceOp.MAX)
        for amax, (shared, members) in zip(most, groups.values(), strict=True):
            shared["scale"] = scale_reference(amax, members[0][1].kind, power_of_2=shared["power_of_2"])
            # Of the parameters that FSDP registered: what an optimizer changes through them gives no shard a version.
            count_fused_updates()
            shared["versions"] = {id(module): module.weight._version for module, _ in members}  # noqa: SLF001

    find()
    if optimizer is not None:
        optimizer.register_step_post_hook(find)
