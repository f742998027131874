# ruff: noqa: PLR0917
"""One AdamW step over many tensors, at the speed of memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kernel_pytorch._triton.launch import cannot_run
from kernel_pytorch.core.types import Skip
from kernel_pytorch.errors import InputsError
from kernel_pytorch.ops.adamw import reference
from kernel_pytorch.ops.adamw.op import Entry, Hyper, Tables, update

__all__ = ["FLOATS", "Tables", "step", "unsupported"]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def unsupported(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    step: torch.Tensor,
    master: torch.Tensor | None = None,
) -> Skip | None:
    """Return why the kernel cannot update this parameter; `None` where it can.

    It needs plain tensors of fp32, bf16 or fp16 that fill their memory without gaps, all in one memory format, a step
    that is one fp32 number on the parameter's device, and a master copy, if any, in fp32.
    """
    tensors = [param, grad, exp_avg, exp_avg_sq, *([] if master is None else [master])]
    odd = [x for x in tensors if type(x) not in (torch.Tensor, torch.nn.Parameter) or x.layout is not torch.strided]
    wrong = [x.dtype for x in tensors if x.dtype not in FLOATS]
    reason = cannot_run(*tensors, step)
    if odd:
        reason = Skip(f"it needs plain tensors, got a {type(odd[0]).__name__} of layout {odd[0].layout}")
    elif wrong:
        reason = Skip(f"it takes fp32, bf16 and fp16, got {wrong[0]}")
    elif any((x.shape, x.stride(), x.device) != (param.shape, param.stride(), param.device) for x in tensors):
        reason = Skip("parameter, gradient and states differ in shape, strides or device")
    elif not _fills_memory(param):
        reason = Skip("the parameter does not fill its memory without gaps", "parameter.data = parameter.contiguous()")
    elif step.numel() != 1 or step.dtype is not torch.float32 or step.device != param.device:
        reason = Skip("the step count must be one fp32 number on the parameter's device", "as with fused=True")
    elif master is not None and master.dtype is not torch.float32:
        reason = Skip(f"a master copy must be fp32, got {master.dtype}")
    return reason


_Row = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]


def _first_reason(rows: Sequence[_Row], tables: Tables | None) -> Skip | None:
    """Ask of each row, but not again of tensors that `tables` has been asked of: 10 us a row each step."""
    known = (
        *((id(p), p.stride(), id(m), id(v), id(t), id(w)) for p, _, m, v, t, w in rows),
        *((type(g), g.dtype, g.stride(), g.shape, g.device) for _, g, *_ in rows),
    )
    if tables is not None and tables.checked[0] == known:
        return None
    reason = next((r for r in (unsupported(*row) for row in rows) if r is not None), None)
    if tables is not None and reason is None:
        tables.checked = known, rows
    return reason


def _fills_memory(x: torch.Tensor) -> bool:
    expected = 1
    for stride, size in sorted((stride, size) for size, stride in zip(x.shape, x.stride(), strict=True) if size != 1):
        if stride != expected:
            return x.numel() == 0
        expected *= size
    return True


@torch.no_grad()
def step(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    steps: Sequence[torch.Tensor],
    *,
    lr: float | torch.Tensor = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    maximize: bool = False,
    decoupled: bool = True,
    masters: Sequence[torch.Tensor] | None = None,
    tables: Tables | None = None,
    impl: str | None = None,
) -> None:
    """Take one step in place, as `torch.optim.AdamW` does, in two launches for each combination of dtypes.

    The arithmetic is fp32, with coefficients from fp64, and each result is rounded once, to nearest even. It moves
    14 bytes a parameter where all is bf16 and 28 where all is fp32. Not traceable by `torch.compile`.

    Args:
        params: Parameters, of any shapes; fp32, bf16 or fp16 (each tensor fills its memory without gaps).
        grads: Their gradients, in the same memory format; left as they are.
        exp_avgs: First moments.
        exp_avg_sqs: Second moments.
        steps: Number of steps taken before, one fp32 number each on the parameter's device; counted up.
        lr: Learning rate; a tensor on the device is read there, without waiting for it.
        betas: Decay rates of both moments, in `[0, 1)`.
        eps: Added to the root of the second moment.
        weight_decay: Decay of the weights.
        maximize: Climb instead of descend.
        decoupled: Whether decay acts on the weights (AdamW) or through the gradient (Adam).
        masters: fp32 copies of the parameters that are updated in their place; a parameter is then the rounded copy.
        tables: Keeps what the kernel needs between steps; without it, it is built and copied anew at each call.
        impl: `triton`, `reference`, or `None`: the kernel where it can run on all tensors, else the definition.

    Raises:
        InputsError: Lists of different lengths, hyper-parameters out of range, an unknown `impl`, or one that cannot
            run, with the reason.
        RuntimeError: The first step with these tensors is being captured in a CUDA graph.
    """
    lists = (params, grads, exp_avgs, exp_avg_sqs, steps)
    if len({len(x) for x in lists}) != 1 or (masters is not None and len(masters) != len(params)):
        raise InputsError(f"all lists need one entry a parameter, got {[len(x) for x in lists]}")
    if not all(0.0 <= b < 1.0 for b in betas):
        raise InputsError(f"betas must be in [0, 1), got {betas}")
    if eps < 0 or weight_decay < 0:
        raise InputsError(f"eps and weight_decay must not be negative, got {eps} and {weight_decay}")
    if impl not in (None, "triton", "reference"):
        raise InputsError(f"unknown impl {impl!r}; expected triton or reference")
    copies: Sequence[torch.Tensor | None] = masters if masters is not None else [None] * len(params)
    rows = list(zip(*lists, copies, strict=True))
    reason = None if impl == "reference" else _first_reason(rows, tables)
    if impl == "triton" and reason is not None:
        raise InputsError(f"the kernel cannot run: {reason.reason}")
    if impl == "reference" or reason is not None:
        targets = params if masters is None else masters
        reference.step(
            targets, grads, exp_avgs, exp_avg_sqs, steps,
            lr=float(lr), betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize, decoupled=decoupled,
        )  # fmt: skip
        if masters is not None:
            for param, master in zip(params, masters, strict=True):
                param.copy_(master)
        return
    if not rows:
        return
    hyper = Hyper(lr, betas, eps, weight_decay, maximize, decoupled)
    entries = [Entry(p, g, m, v, t, master=w) for p, g, m, v, t, w in rows]
    update(entries, [hyper], Tables() if tables is None else tables)
