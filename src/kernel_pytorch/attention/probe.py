# mypy: disable-error-code="no-untyped-call"
"""Whether an implementation computes a shape here: asked by running it, forward and backward, and by its result.

A version tells little: one published FlashAttention-3 build raises in backward, and a kernel that ends a diagonal in
the other corner runs without complaint.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernel_pytorch.attention import reference
from kernel_pytorch.attention.registry import implementation
from kernel_pytorch.attention.types import AttentionShape, Implementation
from kernel_pytorch.core.types import Numerics, Skip

__all__ = ["Case", "does_not_fit", "indexed", "make_case", "relative_errors", "unsupported"]

_ROWS = 64
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""Relative error above which a result is another function, not rounding; bfloat16's own is below 1e-2."""
_LOWER_PRECISION = 0.15

_known: dict[tuple[str, AttentionShape, torch.device, bool], Skip | None] = {}


@dataclass(frozen=True, slots=True)
class Case:
    """Random inputs of a shape, laid out as a model's projections leave them."""

    shape: AttentionShape
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    offsets_q: Tensor | None
    offsets_k: Tensor | None

    def run(self, one: Implementation) -> Tensor:
        """Compute it by an implementation."""
        shape = self.shape
        left, right = shape.window or (None, 0 if shape.is_causal else None)
        if shape.packed:
            assert one.call_varlen is not None
            return one.call_varlen(
                self.query,
                self.key,
                self.value,
                self.offsets_q,
                self.offsets_k,
                shape.q_len,
                shape.kv_len,
                scale=None,
                left=left,
                right=right,
                softcap=shape.softcap,
            )
        return one.call(
            self.query,
            self.key,
            self.value,
            attn_mask=self.mask,
            dropout_p=shape.dropout,
            scale=None,
            left=left,
            right=right,
            alignment=shape.alignment,
            softcap=shape.softcap,
        )

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key and value."""
        return self.query, self.key, self.value


def make_case(shape: AttentionShape, device: torch.device, *, backward: bool, seed: int = 0) -> Case:
    """Return normally distributed inputs of a shape; the caller's random state is left alone.

    Args:
        shape: Canonical.
        device: Where.
        backward: Whether they require gradients.
        seed: Of the numbers.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def numbers(tokens: int, heads: int, size: int) -> Tensor:
        dtype = torch.float32 if shape.dtype not in (torch.float64, torch.float16, torch.bfloat16) else shape.dtype
        drawn = torch.randn(shape.batch, tokens, heads, size, generator=generator, device=device, dtype=dtype)
        drawn = drawn.to(shape.dtype)
        laid_out = drawn.flatten(0, 1) if shape.packed else drawn.transpose(1, 2)
        return laid_out.detach().requires_grad_(backward)

    mask = offsets_q = offsets_k = None
    if shape.mask:
        mask = torch.rand(shape.q_len, shape.kv_len, generator=generator, device=device) < 0.75
        mask[:, 0] = True
        mask = mask[None, None]
    if shape.packed:
        starts = torch.arange(shape.batch + 1, device=device, dtype=torch.int32)
        offsets_q, offsets_k = starts * shape.q_len, starts * shape.kv_len
    return Case(
        shape,
        numbers(shape.q_len, shape.heads, shape.head_dim),
        numbers(shape.kv_len, shape.kv_heads, shape.head_dim),
        numbers(shape.kv_len, shape.kv_heads, shape.value_dim or shape.head_dim),
        mask,
        offsets_q,
        offsets_k,
    )


def unsupported(impl: str, shape: AttentionShape, device: torch.device | str, *, backward: bool) -> Skip | None:
    """Return why an implementation does not compute a shape here; `None` where it does.

    Runs it once, forward and where asked backward, on random inputs of this very shape, and compares a sample of the
    rows with the definition. The answer is kept for the life of the process.

    Args:
        impl: Name of an implementation.
        shape: What to compute.
        device: Where; `cuda` means the current GPU.
        backward: Whether gradients are needed.

    Raises:
        AttentionError: There is no such implementation.
    """
    one, device, shape = implementation(impl), indexed(device), shape.canonical()
    key = (impl, shape, device, backward)
    if key not in _known:
        _known[key] = does_not_fit(one, shape, device, backward=backward) or _tried(one, shape, device, backward)
    return _known[key]


def forget() -> None:
    """Forget what was tried in this process."""
    _known.clear()


def does_not_fit(one: Implementation, shape: AttentionShape, device: torch.device, *, backward: bool) -> Skip | None:
    """Return why an implementation does not compute a canonical shape by its definition; runs nothing on the device."""
    if shape.packed and one.call_varlen is None:
        return Skip(f"{one.name} has no packed documents", "pad them, or impl='fa4', 'flash' or 'math'")
    return one.fits(shape, device, backward=backward)


def indexed(device: torch.device | str) -> torch.device:
    """Return the device with its number, so that `cuda` and `cuda:0` are the same."""
    found = torch.device(device)
    lacks_number = found.type == "cuda" and str(found) == "cuda"
    return torch.device("cuda", torch.cuda.current_device()) if lacks_number else found


def _tried(one: Implementation, shape: AttentionShape, device: torch.device, backward: bool) -> Skip | None:  # noqa: FBT001
    try:
        errors = relative_errors(
            make_case(shape, device, backward=backward), lambda case: case.run(one), backward=backward
        )
    except Exception as reason:  # noqa: BLE001 - a foreign kernel may raise anything; it is the answer
        text = str(reason).strip().splitlines()
        return Skip(f"{one.name} raised {type(reason).__name__} at {shape}: {text[0] if text else ''}")
    allowed = _LOWER_PRECISION if one.numerics is Numerics.LOWER_PRECISION else _TOLERANCE[shape.dtype]
    for what, error in errors.items():
        if not error <= allowed:
            return Skip(
                f"{one.name} is wrong at {shape}: relative error {error:.2g} in {what}, expected <= {allowed:g}"
            )
    return None


def relative_errors(
    case: Case, run: Callable[[Case], Tensor], *, backward: bool, exact: bool = False
) -> dict[str, float]:
    """Return the relative errors of an output and of its gradients against the definition, on a sample of the rows.

    The gradient of the output is zero outside the sampled rows, so that the definition needs these rows alone to know
    all gradients. An output that is not finite has error NaN; with dropout nothing is compared.

    Args:
        case: The inputs.
        run: Computes the output from them.
        backward: Whether to look at gradients.
        exact: Whether the definition computes in float64, not in float32.
    """
    shape, device = case.shape, case.query.device
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.set_grad_enabled(backward),
        torch.autocast(device.type, enabled=False),
    ):
        out = run(case)
        if not bool(out.isfinite().all()):
            return {"the output": float("nan")}
        if shape.dropout > 0.0:
            if backward:
                torch.autograd.grad(out, case.inputs(), torch.randn_like(out))
            return {}
        return _compare(case, out, backward=backward, exact=exact)


def _compare(case: Case, out: Tensor, *, backward: bool, exact: bool) -> dict[str, float]:
    shape = case.shape
    documents, heads, kv_heads, rows = _sample(shape, out.device)

    def by_document(tensor: Tensor, tokens: int) -> Tensor:
        return tensor.unflatten(0, (shape.batch, tokens)).transpose(1, 2) if shape.packed else tensor

    def picked(tensor: Tensor, tokens: int, which: Tensor) -> Tensor:
        return by_document(tensor, tokens)[documents][:, which]

    roles = ((shape.q_len, heads), (shape.kv_len, kv_heads), (shape.kv_len, kv_heads))
    small = [picked(tensor.detach(), *role) for tensor, role in zip(case.inputs(), roles, strict=True)]
    small = [(tensor.double() if exact else tensor).requires_grad_(backward) for tensor in small]
    left, right = shape.window or (None, 0 if shape.is_causal else None)
    band: dict[str, Any] = {"left": left, "right": right, "softcap": shape.softcap}
    band["alignment"] = "lower_right" if shape.packed else shape.alignment
    got = picked(out.detach(), shape.q_len, heads)[:, :, rows]
    if case.mask is None:
        want = reference.attend(small[0], small[1], small[2], rows=rows, **band)
    else:
        want = reference.attend(small[0], small[1], small[2], attn_mask=case.mask, **band)[:, :, rows]
    errors = {"the output": _relative(got, want)}
    if backward:
        weight = torch.randn_like(got)
        # In the output's own layout, as it comes in a model: what is compiled for this call may be kept for that one.
        gradient = torch.zeros_like(out)
        by_document(gradient, shape.q_len)[documents[:, None, None], heads[:, None], rows] = weight
        gradients = torch.autograd.grad(out, case.inputs(), gradient)
        expected = torch.autograd.grad(want, small, weight.to(want.dtype))
        for name, gradient, role, right_one in zip("qkv", gradients, roles, expected, strict=True):
            errors[f"the gradient of {name}"] = _relative(picked(gradient, *role), right_one)
    return errors


def _sample(shape: AttentionShape, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return indices of documents, query heads, their key heads, and rows: the first, the last and some between."""
    ends = sorted({0, shape.kv_heads - 1})
    groups = shape.heads // shape.kv_heads
    heads = [kv * groups + (groups - 1 if kv else 0) for kv in ends]
    rows = torch.linspace(0, shape.q_len - 1, min(_ROWS, shape.q_len)).long().unique()
    documents = sorted({0, shape.batch - 1})
    return (
        torch.tensor(documents, device=device),
        torch.tensor(heads, device=device),
        torch.tensor(ends, device=device),
        rows.to(device),
    )


def _relative(got: Tensor, want: Tensor) -> float:
    got, want = got.detach().double(), want.detach().double()
    size = float(want.norm())
    difference = float((got - want).norm())
    return difference / size if size > 0.0 else difference
