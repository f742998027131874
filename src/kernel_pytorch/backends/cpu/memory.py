"""The most resident memory a piece of work took: the kernel's own high-water mark, else polling."""

from __future__ import annotations

import ctypes
import gc
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

__all__ = ["peak_bytes"]

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_POLL_S = 0.0005


def peak_bytes(fn: Callable[[], Any]) -> int:
    """Run `fn` once and return how far resident memory rose above what was held before, in bytes.

    Linux resets `VmHWM` when 5 is written to /proc/self/clear_refs (proc(5)); where that is not permitted or
    there is no such file, a thread polls. What the allocator kept for itself from earlier work goes back to the
    kernel first (malloc_trim(3)), or work that takes it again would seem to take nothing.
    """
    gc.collect()
    _return_free_memory()
    if _reset_high_water():
        held = _status_bytes("VmRSS")
        fn()
        return max(0, _status_bytes("VmHWM") - held)
    return _polled(fn)


def _return_free_memory() -> None:
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return  # not glibc


def _reset_high_water() -> bool:
    try:
        _CLEAR_REFS.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _status_bytes(field: str) -> int:
    match = re.search(rf"^{field}:\s*(\d+) kB", _STATUS.read_text(encoding="ascii"), re.MULTILINE)
    assert match is not None, field
    return int(match[1]) * 1024


def _polled(fn: Callable[[], Any]) -> int:
    process = psutil.Process()
    before = int(process.memory_info().rss)
    peak = before
    done = threading.Event()

    def poll() -> None:
        nonlocal peak
        while not done.wait(_POLL_S):
            peak = max(peak, int(process.memory_info().rss))

    thread = threading.Thread(target=poll, name="peak-bytes", daemon=True)
    thread.start()
    try:
        fn()
        peak = max(peak, int(process.memory_info().rss))
    finally:
        done.set()
        thread.join()
    return max(0, peak - before)
