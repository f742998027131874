"""Where the time of the unmodified model goes, by class of operators."""

from __future__ import annotations

import collections
import os
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

from kernel_pytorch.core.types import DeviceSpec
from kernel_pytorch.hardware.tpu import specs
from kernel_pytorch.search.kinds import kind_of
from kernel_pytorch.search.operators import WorkCounter

__all__ = ["estimated_shares", "time_shares"]

_STEP = "kernel_pytorch_step"


def time_shares(step: Callable[[], Any], synchronize: Callable[[], None], vendor: str) -> dict[str, float]:
    """Run a step once under the profiler and return the share of its time by class of operators; they sum to one.

    On a CPU an operator's own time is without what it calls. On a GPU the kernels' time counts for the operator
    that launched them, and what the wall time has beyond them is overhead.
    """
    on_gpu = vendor != "cpu"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else torch tells of each start and stop on stderr
    synchronize()
    with profile(activities=activities, acc_events=True) as recorded, record_function(_STEP):
        step()
        synchronize()
    events = list(recorded.events() or [])
    whole_us = next(event.cpu_time_total for event in events if event.name == _STEP)
    time_us: collections.Counter[str] = collections.Counter()
    for event in events:
        library, _, name = event.name.partition("::")
        if not name or library == "autograd":
            continue
        own_us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        kind = _kind(event)
        if kind != "overhead" or on_gpu:
            time_us[kind] += max(0.0, own_us)
    busy_us = sum(time_us.values())
    total_us = max(whole_us, busy_us)
    if total_us <= 0:
        return {"overhead": 1.0}
    shares = {kind: us / total_us for kind, us in time_us.items() if us > 0}
    shares["overhead"] = shares.get("overhead", 0.0) + (total_us - busy_us) / total_us
    return shares


def estimated_shares(counter: WorkCounter, device: DeviceSpec) -> dict[str, float]:
    """Return shares of the time by class of operators, estimated from what was counted; they sum to one.

    For a TPU: operators are recorded and run later, so no profiler tells their times. A class takes as long as its
    operations or its bytes take at the chip's rates; an emulated one has those of v5e. No share is overhead: it would
    be what is left of a time that the estimates, which are least times, say too little about.
    """
    stand_in = specs.CHIPS["v5e"]
    rate = device.peak_flops.get("bfloat16", stand_in.bf16_flops)
    bandwidth = device.bandwidth_bytes_per_s or stand_in.bandwidth_bytes_per_s
    seconds = {
        kind: max(sum(work.flops.values()) / rate, work.bytes / bandwidth) for kind, work in counter.work.items()
    }
    total = sum(seconds.values())
    return {kind: s / total for kind, s in seconds.items() if s > 0} if total > 0 else {"overhead": 1.0}


def _kind(event: Any) -> str:
    """Return the class of the outermost operator an event is part of: the bias that `addmm` copies is matmul."""
    kind, inside = kind_of(event.name), event.cpu_parent
    while inside is not None:
        if inside.name.startswith("Optimizer.step"):
            return "optimizer"
        if "::" in inside.name and not inside.name.startswith("autograd::"):
            outer = kind_of(inside.name)
            kind = outer if outer not in ("overhead", "other") else kind
        inside = inside.cpu_parent
    return kind
