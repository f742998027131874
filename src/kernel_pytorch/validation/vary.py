"""Other inputs and other parameters on which a structural step must compute the same as the unmodified model.

Nothing is known of a model but its example inputs, so a variation is a guess; the reference decides whether it is a
valid call. On a freshly initialised model biases are 0 and gammas 1, and dropping them all is bit-identical: hence the
perturbed state.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from kernel_pytorch.core.workload import Call

__all__ = [
    "batch_size",
    "nudged",
    "perturb",
    "redrawn",
    "resized",
    "rows_of",
    "sequence_length",
    "variations",
    "zero_dropout",
]

_FEW = 3
"""Integer or buffer tensors with at most this many distinct values are masks, not data."""

_PERIOD = 16_381
_NUDGE = 1e-6
_SHORT = 8
"""Length of the rows of a call with more samples than the workload's, whose fp64 run would else cost the most."""


def perturb(model: nn.Module, seed: int) -> None:
    """Move every floating-point parameter and buffer of the state away from special values, in place.

    Matrices move by a tenth of their scale, vectors also by an absolute 0.1 (so that biases of 0 and gammas of 1 become
    visible); positive buffers (running variances) stay positive; constant masks stay as they are.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = {id(p) for p in model.parameters()}
    seen: set[int] = set()
    for tensor in model.state_dict(keep_vars=True).values():
        if not isinstance(tensor, torch.Tensor) or id(tensor) in seen or not _is_plain_float(tensor):
            continue
        seen.add(id(tensor))
        with torch.no_grad():
            value = tensor.detach()
            noise = _noise_like(value, generator)
            if id(tensor) in parameters:
                value.copy_(_moved(value, noise))
            elif not _is_mask(value):
                value.copy_(value * torch.exp(0.2 * noise) if bool((value > 0).all()) else _moved(value, noise))


def _noise_like(value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return normal noise like a tensor; repeated with a prime period, for drawing tens of millions takes a second."""
    count = value.numel()
    drawn = torch.randn(min(count, _PERIOD), generator=generator, dtype=torch.float64).to(value)
    return drawn.repeat(-(-count // _PERIOD))[:count].view(value.shape)


def nudged(model: nn.Module) -> nn.Module:
    """Move parameters by 1e-6, or as far as their format resolves, in place."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point():
                size = max(_NUDGE, torch.finfo(p.dtype).eps / 4)
                p.mul_(1 + size * _noise_like(p, generator))
    return model


def _moved(value: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    scale = float(value.double().square().mean().sqrt())
    if value.dim() >= 2:
        columns = value[0].numel()
        return value + noise * (0.1 * scale if scale else 0.5 / columns**0.5)
    return value + noise * (0.1 * scale + 0.1)


def _is_plain_float(tensor: torch.Tensor) -> bool:
    plain = type(tensor) in (torch.Tensor, nn.Parameter, nn.Buffer)
    return plain and tensor.is_floating_point() and tensor.layout is torch.strided and tensor.numel() > 0


def _is_mask(value: torch.Tensor) -> bool:
    if not bool(value.isfinite().all()) or value.abs().max() > 1e30:
        return True
    head = value.flatten()[:65536]
    distinct = int(head.cpu().unique().numel())  # type: ignore[no-untyped-call]
    return 1 < distinct <= _FEW and value.numel() > 2 * distinct


def _is_ordered(value: torch.Tensor) -> bool:
    """Return whether integers ascend in one dimension: offsets and positions, which mean something else reordered."""
    if value.dim() != 1 or value.numel() <= 2 or value.dtype == torch.bool:
        return False
    return bool((value[1:] >= value[:-1]).all())


def zero_dropout(model: nn.Module) -> None:
    """Set every dropout probability of a model to zero, in place: those of modules, and float attributes so named."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):  # noqa: SLF001
            module.p = 0.0
            continue
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and 0.0 < value < 1.0 and ("drop" in name):
                setattr(module, name, 0.0)


def redrawn(call: Call, seed: int) -> Call:
    """Return a call with other values of the same kind.

    Floats get the same mean and deviation by jitter inside the range seen; integers
    with more than a few distinct values are drawn from the values seen in the tensor; masks are permuted by row.
    """
    generator = torch.Generator().manual_seed(seed)
    rows: dict[int, torch.Tensor] = {}

    def fresh(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.is_nested or leaf.layout is not torch.strided or not leaf.numel():
            return leaf
        plain = leaf.detach()
        if plain.is_floating_point() or plain.is_complex():
            noise = torch.randn(plain.shape, generator=generator, dtype=torch.float32)
            if plain.is_floating_point() and (_is_mask(plain) or plain.numel() == 1):
                return leaf
            scale = plain.std() if plain.numel() > 1 else plain.abs().mean()
            near = plain + 0.3 * scale * noise.to(plain.device).to(plain.dtype)
            if plain.is_floating_point():
                near = near.clamp(plain.min(), plain.max())
            return near.requires_grad_(leaf.requires_grad)
        if plain.dim() == 0 or _is_ordered(plain):
            return leaf
        # On the host: torch_tpu 0.2.0's own corrupts memory over a CPU plugin.
        values = plain.cpu().unique().to(plain.device)  # type: ignore[no-untyped-call]
        if values.numel() > _FEW and plain.dim() > 1:
            first = plain[:, :1]
            pick = torch.randint(values.numel(), plain.shape, generator=generator)
            out = values[pick.to(plain.device)]
            if bool((first == first.flatten()[0]).all()):
                out[:, :1] = first
            return out
        order = rows.setdefault(plain.shape[0], torch.randperm(plain.shape[0], generator=generator))
        return plain[order.to(plain.device)].clone()

    args, kwargs = pytree.tree_map(fresh, (call.args, dict(call.kwargs)))
    return Call(args, kwargs)


def _tensors(call: Call) -> list[torch.Tensor]:
    leaves = pytree.tree_leaves((call.args, dict(call.kwargs)))
    return [x for x in leaves if isinstance(x, torch.Tensor) and not x.is_nested and x.layout is torch.strided]


def batch_size(call: Call) -> int:
    """Return the commonest first dimension of the tensors of a call; 0 where there is none.

    Also 0 where integers of another shape look like indices into that dimension (the edges of a graph into its nodes):
    with fewer entries they would point outside, which on a GPU ends the process.
    """
    tensors = _tensors(call)
    sizes = Counter(x.shape[0] for x in tensors if x.dim() >= 1)
    size = sizes.most_common(1)[0][0] if sizes else 0
    return 0 if any(_indexes(x, size) for x in tensors) else size


def _indexes(tensor: torch.Tensor, size: int) -> bool:
    """Return whether a tensor looks like indices into another one's first dimension of a size above one."""
    whole = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
    if size <= 1 or not whole or not tensor.dim() or not tensor.numel() or tensor.shape[0] == size:
        return False
    return 1 < int(tensor.max()) < size


def sequence_length(call: Call) -> tuple[int, bool]:
    """Return the size that looks like a sequence length, and whether it is an image side instead."""
    tensors = _tensors(call)
    tokens = Counter(x.shape[1] for x in tensors if x.dim() >= 2 and not x.is_floating_point() and not x.is_complex())
    if tokens:
        return tokens.most_common(1)[0][0], False
    frames = Counter(x.shape[1] for x in tensors if x.dim() == 3)
    if frames:
        return frames.most_common(1)[0][0], False
    sides = Counter(x.shape[-1] for x in tensors if x.dim() >= 4)
    return (sides.most_common(1)[0][0], True) if sides else (0, False)


def _resize(tensor: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    have = tensor.shape[dim]
    if size <= have:
        return tensor.narrow(dim, 0, size)
    index = torch.arange(size, device=tensor.device) % have
    return tensor.index_select(dim, index)


def rows_of(call: Call, rows: list[int]) -> Call:
    """Return a call with some samples of its batch."""
    size = batch_size(call)

    def pick(leaf: Any) -> Any:
        plain = isinstance(leaf, torch.Tensor) and not leaf.is_nested and leaf.layout is torch.strided
        if not plain or not leaf.dim() or leaf.shape[0] != size:
            return leaf
        return leaf.detach()[rows].requires_grad_(leaf.requires_grad)

    args, kwargs = pytree.tree_map(pick, (call.args, dict(call.kwargs)))
    return Call(args, kwargs)


def resized(call: Call, *, batch: int | None = None, length: int | None = None) -> Call:
    """Return a call with another batch size and sequence length (image side), cut or repeated; history dropped."""
    old_batch = batch_size(call)
    old_length, image = sequence_length(call)

    def fit(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.is_nested or leaf.layout is not torch.strided:
            return leaf
        out = leaf.detach()
        if batch is not None and out.dim() >= 1 and out.shape[0] == old_batch:
            out = _resize(out, 0, batch)
        if length is not None and old_length:
            first = 2 if image else 1
            dims = range(first, out.dim())
            if out.is_floating_point() and not image:
                dims = range(1, min(2, out.dim()))
            for dim in dims:
                if out.shape[dim] == old_length:
                    out = _resize(out, dim, length)
        return out.clone(memory_format=torch.preserve_format).requires_grad_(leaf.requires_grad)

    args, kwargs = pytree.tree_map(fit, (call.args, dict(call.kwargs)))
    return Call(args, kwargs)


def variations(level: str, seed: int, call: Call) -> list[tuple[str, Call]]:
    """Return named variations of a call: values, batch sizes, lengths; small, for they run in fp64.

    Args:
        level: `quick`, `standard` or `strict`.
        seed: Of the values.
        call: An example call at the workload's own shapes.
    """
    batch = batch_size(call)
    length, _ = sequence_length(call)
    tokens = any(x.dim() >= 2 and not x.is_floating_point() for x in _tensors(call))
    shapes: dict[str, tuple[int | None, int | None]] = {}
    if batch > 1:
        shapes["2 rows"] = (2, None)
        half = max(1, length // 2)
        short = min(half, _SHORT) if tokens else half
        shapes[f"batch {batch + 1}, length {short}"] = (batch + 1, short if length else None)
        if short != half:
            shapes[f"batch 3, length {half}"] = (3, half)
        shapes["1 row"] = (1, None)
    else:
        shapes["own shape"] = (None, None)
        if batch == 1:
            shapes["batch 3"] = (3, None)
    if length > 1:
        small = min(batch, 2) or None
        shapes[f"length {length + 3}"] = (small, length + 3)
        shapes[f"length {length - 1}"] = (small, length - 1)
    if level == "strict":
        shapes[f"batch {2 * batch}"] = (2 * batch, max(1, length // 4) if length else None)
        if length > 1:
            shapes[f"length {2 * length}"] = (1 if batch else None, 2 * length)
    if level == "quick":
        shapes = dict(list(shapes.items())[:2])
    make: Callable[[int | None, int | None], Call] = lambda b, n: resized(call, batch=b, length=n)  # noqa: E731
    return [(name, redrawn(make(b, n), seed + i)) for i, (name, (b, n)) in enumerate(shapes.items())]
