"""Compare two trees of outputs: types, shapes, dtypes and finiteness first, then the error of the worst row.

A tree is flattened into paths (`output.last_hidden_state`, `output[0]["mask"]`), so that the reference's outputs can be
stored as plain tensors and every finding names the place.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from kernel_pytorch.core.types import Check, Gate

__all__ = ["Error", "Flat", "compare_values", "flatten", "same_bits", "structure_checks", "tensor_error"]

_SENTINEL = 1e30
"""Larger magnitudes are masks (`finfo.min`), not values: they must agree in sign, not in size."""
_CHUNK_ELEMENTS = 1 << 22
_CHUNK_ON_DEVICE = 1 << 26


@dataclass(slots=True)
class Flat:
    """A tree as paths.

    Attributes:
        kinds: Type of every node by path, in order of traversal.
        tensors: Tensor leaves, detached.
        scalars: Other leaves.
        requires_grad: Whether a tensor leaf carries gradients.
        opaque: Paths of objects of foreign classes (a key-value cache): their tensors are compared by value, their
            dtype is theirs.
    """

    kinds: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    scalars: dict[str, bool | int | float | str | None] = field(default_factory=dict)
    requires_grad: dict[str, bool] = field(default_factory=dict)
    opaque: list[str] = field(default_factory=list)

    def frozen(self) -> Flat:
        """Return a copy whose tensors no later call can change."""
        return dataclasses.replace(self, tensors={k: v.clone() for k, v in self.tensors.items()})

    def has_nan(self) -> str:
        """Return the path of the first tensor that holds NaN; empty where none does."""
        return next((path for path, value in self.tensors.items() if _has_nan(value)), "")

    def as_dict(self) -> dict[str, Any]:
        """Return plain values that `torch.load(weights_only=True)` reads back."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


@dataclass(frozen=True, slots=True)
class Error:
    """How far one tensor is from the oracle's.

    Attributes:
        row: Relative error of the worst row, `inf` where finiteness differs; for integers the share that differs.
        cosine: Smallest cosine similarity of a row; 1.0 for integers.
        discrete: Whether the tensor holds integers or booleans.
        count: Elements.
    """

    row: float
    cosine: float = 1.0
    discrete: bool = False
    count: int = 0


def _type_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def _children(value: Any) -> list[tuple[str, Any]] | None:
    if isinstance(value, Mapping):
        return [(f"[{k!r}]" if not isinstance(k, str) else f".{k}", v) for k, v in value.items()]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return [(f".{k}", getattr(value, k)) for k in value._fields]
    if isinstance(value, tuple | list):
        return [(f"[{i}]", v) for i, v in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(f".{f.name}", getattr(value, f.name, None)) for f in dataclasses.fields(value)]
    return None


def _add_tensor(flat: Flat, path: str, value: torch.Tensor) -> None:
    if value.is_nested:
        flat.kinds[path] = f"nested[{value.size(0)}]"
        for i, part in enumerate(value.unbind()):
            _add_tensor(flat, f"{path}[{i}]", part)
        return
    flat.kinds[path] = "sparse tensor" if value.layout is not torch.strided else "tensor"
    flat.requires_grad[path] = value.requires_grad
    plain = value.detach()
    flat.tensors[path] = plain if plain.layout is torch.strided else plain.to_dense()


def _walk(flat: Flat, path: str, value: Any, seen: set[int]) -> None:
    if isinstance(value, torch.Tensor):
        _add_tensor(flat, path, value)
        return
    if value is None or isinstance(value, bool | int | float | str):
        flat.kinds[path] = _type_name(value)
        flat.scalars[path] = value if type(value) in (bool, int, float, str, type(None)) else str(value)
        return
    children = _children(value)
    if children is not None:
        flat.kinds[path] = f"{_type_name(value)}({', '.join(k for k, _ in children)})"
    elif hasattr(value, "__array__") and hasattr(value, "dtype"):
        flat.kinds[path] = f"array {value.dtype}"
        flat.tensors[path] = torch.as_tensor(value)
        return
    else:
        flat.kinds[path] = _type_name(value)
        if id(value) in seen or callable(value) or not hasattr(value, "__dict__"):
            return
        seen.add(id(value))
        flat.opaque.append(path)
        children = [(f".{k}", v) for k, v in vars(value).items() if _holds_values(v)]
    for suffix, child in children:
        _walk(flat, path + suffix, child, seen)


def _holds_values(value: Any) -> bool:
    return isinstance(value, torch.Tensor | list | tuple | dict) or (
        hasattr(value, "__dict__") and not callable(value) and not isinstance(value, torch.nn.Module)
    )


def flatten(tree: Any, root: str = "output") -> Flat:
    """Return a tree of containers, tensors and plain values as paths.

    Args:
        tree: What a model returned: tensors in dicts, tuples, lists, namedtuples, dataclasses, `ModelOutput` ...
        root: First part of every path.
    """
    flat = Flat()
    _walk(flat, root, tree, set())
    return flat


def same_bits(a: Flat, b: Flat) -> bool:
    """Return whether two trees of one structure hold the same values; NaN equals nothing."""
    return (
        a.kinds == b.kinds
        and a.scalars == b.scalars
        and all(a.tensors[k].shape == v.shape and torch.equal(a.tensors[k], v) for k, v in b.tensors.items())
    )


def _fail(name: str, detail: str, case: str, gate: Gate) -> Check:
    return Check(name, gate, math.inf, 0.0, detail, case)


def structure_checks(
    candidate: Flat, reference: Flat, *, case: str = "", gate: Gate = Gate.CONTRACT, lifted: bool = False
) -> list[Check]:
    """Compare everything but the values: types, keys, shapes, dtypes, devices, gradients, plain values.

    Args:
        candidate: What the candidate returned.
        reference: What the unmodified model returned.
        case: Goes into the checks.
        gate: Goes into the checks.
        lifted: Whether both ran at another precision than they ship, so that floats may differ in dtype.

    Returns:
        One passing check, or the findings.
    """
    bad: list[Check] = []
    for path, kind in reference.kinds.items():
        got = candidate.kinds.get(path)
        if got is None:
            return [_fail(f"structure {path}", f"{path} is missing; the reference gives {kind}", case, gate)]
        if got != kind:
            return [_fail(f"structure {path}", f"{path} is {got}; the reference gives {kind}", case, gate)]
    extra = [path for path in candidate.kinds if path not in reference.kinds]
    if extra:
        return [_fail(f"structure {extra[0]}", f"{extra[0]} is not in the reference's output", case, gate)]
    for path in reference.tensors:
        bad += _tensor_findings(path, candidate, reference, case, gate, lifted=lifted)
    for path, value in reference.scalars.items():
        got_value = candidate.scalars[path]
        if isinstance(value, float) and isinstance(got_value, float):
            same = value == got_value or math.isclose(value, got_value, rel_tol=0.1) or value != value  # noqa: PLR0124
        else:
            same = value == got_value
        if not same:
            bad.append(_fail(f"value {path}", f"{path} is {got_value!r}; the reference gives {value!r}", case, gate))
    return bad or [Check("structure output", gate, 0.0, 0.0, "", case)]


def _tensor_findings(
    path: str, candidate: Flat, reference: Flat, case: str, gate: Gate, *, lifted: bool
) -> list[Check]:
    got, want = candidate.tensors[path], reference.tensors[path]
    bad = []
    if got.shape != want.shape:
        detail = f"{path} has shape {tuple(got.shape)}; the reference {tuple(want.shape)}"
        return [_fail(f"shape {path}", detail, case, gate)]
    floats = want.dtype.is_floating_point and got.dtype.is_floating_point
    inside_opaque = any(path.startswith(o) for o in reference.opaque)
    if got.dtype != want.dtype and not (floats and (lifted or inside_opaque)):
        bad.append(_fail(f"dtype {path}", f"{path} is {got.dtype}; the reference gives {want.dtype}", case, gate))
    if got.device.type != want.device.type and reference.requires_grad:
        bad.append(_fail(f"device {path}", f"{path} is on {got.device}; the reference on {want.device}", case, gate))
    grad, want_grad = candidate.requires_grad.get(path), reference.requires_grad.get(path)
    if grad != want_grad:
        detail = f"{path}.requires_grad is {grad}; the reference {want_grad}"
        bad.append(_fail(f"requires_grad {path}", detail, case, gate))
    if _has_nan(got) and not _has_nan(want):
        bad.append(_fail(f"finite {path}", f"{path} holds NaN; the reference is finite", case, gate))
    elif _has_inf(got) and not _has_inf(want):
        bad.append(_fail(f"finite {path}", f"{path} holds infinities; the reference is finite", case, gate))
    return bad


def _has_nan(tensor: torch.Tensor) -> bool:
    return bool(tensor.isnan().any()) if tensor.is_floating_point() or tensor.is_complex() else False


def _has_inf(tensor: torch.Tensor) -> bool:
    return bool(tensor.isinf().any()) if tensor.is_floating_point() or tensor.is_complex() else False


def tensor_error(got: torch.Tensor, want: torch.Tensor, *, samples: bool = False) -> Error:
    """Return how far a tensor is from the oracle's.

    A row is the last dimension (of samples: all but the first); tensors of fewer than two dimensions are one row. A
    row's error is
    `||got - want|| / max(||want||, f * rms row norm)`: the floor keeps rows near zero from counting as wrong, and
    `f = max(0.1, min(1, 2 / sqrt(n)))` grows for short rows, whose norms scatter by `1 / sqrt(n)`.

    Args:
        got: The candidate's tensor.
        want: The oracle's, of the same shape.
        samples: Take everything under one index of the first dimension as a row. Rounding has heavy tails over single
            tokens (bf16 MiniLM: a median of 1.2e-2, and 8.5e-2 for the worst of 20,000), not over sequences.
    """
    if not (want.is_floating_point() or want.is_complex()):
        count = max(want.numel(), 1)
        flips = int((got.to(want.device) != want).sum()) if want.numel() else 0
        return Error(flips / count, discrete=True, count=want.numel())
    if not want.numel():
        return Error(0.0)
    if got.dtype == want.dtype and got.device == want.device and torch.equal(got, want):
        return Error(0.0, count=want.numel())
    if got.is_complex() or want.is_complex():
        wide = torch.complex128
        got, want = (torch.view_as_real(t.detach().to(wide).resolve_conj()).flatten(-2) for t in (got, want))
    got, want = got.detach().to(want.device), want.detach()
    columns = want.numel() if want.dim() < 2 else want.numel() // len(want) if samples else want.shape[-1]
    got, want = got.reshape(-1, columns), want.reshape(-1, columns)
    chunk = _CHUNK_ELEMENTS if want.device.type == "cpu" else _CHUNK_ON_DEVICE
    rows_at_once = max(1, chunk // columns)
    parts = [
        _row_norms(g.double(), w.double())
        for g, w in zip(torch.split(got, rows_at_once), torch.split(want, rows_at_once), strict=True)
    ]
    if any(p is None for p in parts):
        return Error(math.inf, 0.0, count=want.numel())
    difference, norm, other, dot = (torch.cat(p) for p in zip(*[p for p in parts if p is not None], strict=True))
    scale = norm.square().mean().sqrt()
    if scale == 0:
        return Error(0.0 if not difference.any() else math.inf, 1.0 if not other.any() else 0.0, count=want.numel())
    fraction = max(0.1, min(1.0, 2.0 / math.sqrt(columns)))
    errors = difference / torch.clamp(norm, min=float(scale) * fraction)
    big = norm > scale * fraction
    cosine = torch.where(big, dot / (norm * other).clamp(min=1e-300), torch.ones_like(dot))
    return Error(float(errors.max()), float(cosine.min().clamp(max=1.0)), count=want.numel())


def _row_norms(
    got: torch.Tensor, want: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Return norms of difference, oracle and candidate, and their dot product, by row; `None` if masks disagree."""
    masked = ~want.isfinite() | (want.abs() > _SENTINEL)
    if masked.any():
        agree = (got == want) | (got.isnan() & want.isnan()) | ((got.abs() > _SENTINEL) & (got.sign() == want.sign()))
        if not bool(agree[masked].all()):
            return None
        got, want = got.masked_fill(masked, 0.0), want.masked_fill(masked, 0.0)
    if not bool(got.isfinite().all()):
        return None
    return (got - want).norm(dim=1), want.norm(dim=1), got.norm(dim=1), (got * want).sum(dim=1)


def compare_values(candidate: Flat, oracle: Flat, *, samples: bool = False) -> dict[str, Error]:
    """Return the error of every tensor and float that both trees have, by path (see `tensor_error`)."""
    found = {
        path: tensor_error(candidate.tensors[path], want, samples=samples)
        for path, want in oracle.tensors.items()
        if path in candidate.tensors and candidate.tensors[path].shape == want.shape
    }
    for path, value in oracle.scalars.items():
        got = candidate.scalars.get(path)
        if isinstance(value, float) and isinstance(got, float):
            found[path] = tensor_error(torch.tensor(got, dtype=torch.float64), torch.tensor(value, dtype=torch.float64))
    return found
