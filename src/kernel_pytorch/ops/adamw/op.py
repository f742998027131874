"""The tables that one launch over many tensors reads, kept between steps and refreshed with what changed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

__all__ = ["CHUNK", "Entry", "Hyper", "Tables", "update"]

CHUNK = 2048
"""Elements of a program: small ones, for programs that run at once then touch neighbouring memory. H200, ms a step:
1.02e9 parameters in bf16, chunks of 2,048 3.394, of 4,096 3.416, of 8,192 3.456, of 32,768 3.545 (a copy of as many
bytes 3.327); 0.44e9 in fp32 2.893, 2.932, 2.970, 3.023 (2.840). Four warps: 3.400 and 2.953."""


@dataclass(frozen=True, slots=True)
class Hyper:
    """Hyper-parameters of a group; `lr` may be a tensor on the device, which is read there at every step."""

    lr: float | torch.Tensor
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    maximize: bool = False
    decoupled: bool = True

    def row(self) -> list[float]:
        """Return what the kernel takes, in fp64; 0.0 in place of a learning rate that is on the device."""
        beta1, beta2 = self.betas
        lr = 0.0 if self.on_device else float(self.lr)
        logs = [math.log2(b) if b else -math.inf for b in self.betas]
        flags = float(self.decoupled) + 2.0 * self.maximize
        return [lr, *logs, 1.0 - beta1, beta2, self.eps, self.weight_decay, flags]

    @property
    def on_device(self) -> bool:
        """Whether the learning rate is a tensor that is not in host memory."""
        return isinstance(self.lr, torch.Tensor) and self.lr.device.type != "cpu"


@dataclass(frozen=True, slots=True)
class Entry:
    """One parameter of a step, with its state, its group's number, and optionally an fp32 master copy."""

    param: torch.Tensor
    grad: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    step: torch.Tensor
    group: int = 0
    master: torch.Tensor | None = None

    @property
    def kind(self) -> tuple[object, ...]:
        """What must agree among the tensors of one launch."""
        tensors = (self.param, self.grad, self.exp_avg, self.exp_avg_sq)
        return (self.param.device, *(x.dtype for x in tensors), self.master is not None)


@dataclass(slots=True)
class _Table:
    """Device memory of one launch. Pinned host blocks come from PyTorch's allocator, which keeps them until copied."""

    layout: tuple[int, ...]
    words: list[int]
    buffer: torch.Tensor
    chunks: torch.Tensor
    coefficients: torch.Tensor
    chunk: int
    spare: torch.Tensor | None


@dataclass(slots=True)
class Tables:
    """What is kept between the steps of one optimizer: a table for each combination of device and dtypes.

    Addresses are read at every step, as gradients get new ones after `zero_grad(set_to_none=True)` and states after
    `load_state_dict`; they are copied to the device, without waiting, only where one changed. Under CUDA graph capture
    the table of the captured addresses becomes part of the graph and is kept, and so must be the tensors; take one
    step before the capture.
    """

    by_kind: dict[tuple[object, ...], _Table] = field(default_factory=dict)
    captured: list[tuple[torch.Tensor, ...]] = field(default_factory=list)
    checked: tuple[tuple[object, ...], object] = ((), None)
    """What `api.step` has found fit, and the tensors, kept so that no other gets the identity of one."""


def update(
    entries: Sequence[Entry],
    hypers: Sequence[Hyper],
    tables: Tables,
    *,
    chunk: int = CHUNK,
    block: int | None = None,
    num_warps: int = 8,
) -> None:
    """Update parameters and states in place, with two launches for each combination of device and dtypes.

    Args:
        entries: Valid ones (see `api.unsupported`); empty tensors are left out, but for their steps.
        hypers: By group number.
        tables: Kept by the caller between steps.
        chunk: Elements of a program, once a table; at least `block`.
        block: Elements that it updates in one go; `None` takes 16 bytes a thread of the narrowest dtype.
        num_warps: Warps a program.
    """
    from kernel_pytorch.ops.adamw import adamw_kernel

    kinds: dict[tuple[object, ...], list[Entry]] = {}
    for entry in entries:
        kinds.setdefault(entry.kind, []).append(entry)
    for kind, some in kinds.items():
        param = some[0]
        dtypes = (param.param.dtype, param.grad.dtype, param.exp_avg.dtype, param.exp_avg_sq.dtype)
        uniform = len({dtype.itemsize for dtype in dtypes}) == 1 and param.master is None
        width = block or 32 * num_warps * (8 if uniform else 4)
        words = _words(some, hypers)
        table = _table(tables, kind, some, words, chunk=max(chunk, width))
        rows = len(some) * adamw_kernel.FIELDS
        hyper = table.buffer[rows:].view(torch.float64).view(-1, adamw_kernel.HYPER)
        for i, one in enumerate(hypers):
            if one.on_device and isinstance(one.lr, torch.Tensor):
                hyper[i, 0].copy_(one.lr.reshape(()))
        adamw_kernel.launch(
            table.buffer[:rows].view(-1, adamw_kernel.FIELDS), hyper, table.coefficients, table.chunks[0],
            table.chunks[1], dtypes, master=param.master is not None, chunk=table.chunk, block=width,
            num_warps=num_warps,
        )  # fmt: skip
    written = [x for e in entries for x in (e.param, e.exp_avg, e.exp_avg_sq, e.step, e.master) if x is not None]
    torch.autograd.graph.increment_version(written)


def _words(entries: Sequence[Entry], hypers: Sequence[Hyper]) -> list[int]:
    words: list[int] = []
    for e in entries:
        master = 0 if e.master is None else e.master.data_ptr()
        words += (
            e.param.data_ptr(), e.grad.data_ptr(), e.exp_avg.data_ptr(), e.exp_avg_sq.data_ptr(),
            master, e.step.data_ptr(), e.param.numel(), e.group,
        )  # fmt: skip
    rows = torch.tensor([h.row() for h in hypers], dtype=torch.float64)
    words += rows.view(torch.int64).flatten().tolist()
    return words


def _host(words: Iterable[int], device: torch.device) -> torch.Tensor:
    host = torch.tensor(words, dtype=torch.int64)
    return host.pin_memory() if device.type == "cuda" else host


def _table(
    tables: Tables,
    kind: tuple[object, ...],
    entries: Sequence[Entry],
    words: list[int],
    *,
    chunk: int,
) -> _Table:
    device = entries[0].param.device
    layout = (len(words), *(e.param.numel() for e in entries))
    table = tables.by_kind.get(kind)
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if table is None or table.layout != layout:
        if capturing:
            raise RuntimeError(
                "AdamW builds its tables at the first step with a set of gradients, which cannot be captured in a "
                "CUDA graph: take one step before the capture"
            )
        table = tables.by_kind[kind] = _build(layout, entries, words, chunk)
    elif capturing:
        if table.spare is None:
            raise RuntimeError("a step was captured already: take one more step before capturing again")
        table.spare.copy_(torch.tensor(words, dtype=torch.int64))
        buffer = torch.empty_like(table.buffer)
        buffer.copy_(table.spare, non_blocking=True)
        captured = _Table(layout, words, buffer, table.chunks, torch.empty_like(table.coefficients), table.chunk, None)
        tables.captured.append((table.spare, buffer, captured.coefficients, table.chunks))
        table.spare = None
        return captured
    elif table.words != words:
        table.buffer.copy_(_host(words, device), non_blocking=True)
        table.words = words
    if table.spare is None:
        table.spare = _host(words, device)
    return table


def _build(layout: tuple[int, ...], entries: Sequence[Entry], words: list[int], chunk: int) -> _Table:
    """Build the table; its chunks on the device: a billion parameters have half a million, which take 4 MB.

    On the host they would take 32 ms for 2.8e9 parameters, at each step whose set of gradients is another.
    """
    from kernel_pytorch.ops.adamw.adamw_kernel import COEFFICIENTS

    device = entries[0].param.device
    counts = torch.tensor([-(-size // chunk) for size in layout[1:]])
    total = int(counts.sum())
    first = torch.cumsum(counts, 0) - counts
    per_tensor = torch.stack((torch.arange(len(counts)), first)).to(device, torch.int32)
    chunks = torch.repeat_interleave(per_tensor, counts.to(device), dim=1, output_size=total)
    chunks[1].neg_().add_(torch.arange(total, dtype=torch.int32, device=device))
    return _Table(
        layout,
        words,
        _host(words, device).to(device),
        chunks,
        torch.empty(len(entries), COEFFICIENTS, dtype=torch.float32, device=device),
        chunk,
        None,
    )
