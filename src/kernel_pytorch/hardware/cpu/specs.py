"""Peak rates of a CPU: measured, since no document knows the clock under load or the share of a virtual machine."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["Rates", "cache_directory", "peak_rates"]

_GEMM = 1024
_COPY_BYTES = 128 << 20
_BUDGET_S = {"float32": 0.3, "bfloat16": 0.3, "int8": 0.2}


@dataclass(frozen=True, slots=True)
class Rates:
    """Peak rates: operations a second by dtype name, and bytes a second."""

    flops: dict[str, float]
    bandwidth_bytes_per_s: float


def cache_directory() -> Path:
    """Return where measurements are kept between processes: `$XDG_CACHE_HOME/kernel_pytorch`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kernel_pytorch"


def peak_rates(key: str, cores: int) -> Rates:
    """Return the rates of this CPU, from an earlier measurement where there is one.

    A peak is what the machine can do at best, so the best of all measurements is kept: one taken while other
    processes were at work (`quiet` false) is measured again at the next call.

    Args:
        key: What the rates depend on: CPU, instruction set, cores, torch version.
        cores: Threads to measure with.
    """
    path = cache_directory() / "cpu_rates.json"
    known, quiet = _load(path, key)
    if known is not None and quiet:
        return known
    started = time.perf_counter(), _busy_seconds()
    rates = _measure(cores)
    elapsed, busy = time.perf_counter() - started[0], _busy_seconds() - started[1]
    own = elapsed * cores
    quiet = busy - own < 0.1 * elapsed * (os.cpu_count() or 1)
    if known is not None:
        flops = {dtype: max(rate, known.flops.get(dtype, 0.0)) for dtype, rate in rates.flops.items()}
        rates = Rates(flops, max(rates.bandwidth_bytes_per_s, known.bandwidth_bytes_per_s))
    _store(path, key, rates, quiet=quiet)
    return rates


def _measure(cores: int) -> Rates:
    threads = torch.get_num_threads()
    torch.set_num_threads(cores)
    try:
        flops = {dtype: 2.0 * _GEMM**3 / seconds for dtype, seconds in _gemm_seconds()}
        source = torch.ones(_COPY_BYTES // 4)
        target = torch.empty_like(source)
        copy_s = _best_seconds(lambda: target.copy_(source), 0.2)
    finally:
        torch.set_num_threads(threads)
    return Rates(flops, 2.0 * _COPY_BYTES / copy_s)


def _gemm_seconds() -> list[tuple[str, float]]:
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(_GEMM, _GEMM, generator=generator)
    whole = torch.randint(-8, 8, (_GEMM, _GEMM), dtype=torch.int8, generator=generator)
    brain = dense.to(torch.bfloat16)
    jobs: dict[str, Callable[[], Any]] = {
        "float32": lambda: torch.mm(dense, dense),
        "bfloat16": lambda: torch.mm(brain, brain),
        "int8": lambda: torch._int_mm(whole, whole),  # noqa: SLF001
    }
    with torch.no_grad():
        return [(dtype, _best_seconds(job, _BUDGET_S[dtype])) for dtype, job in jobs.items()]


def _best_seconds(job: Callable[[], Any], budget_s: float) -> float:
    """Return the shortest of up to 20 runs that fit in the budget, the first (which packs and compiles) apart."""
    start = time.perf_counter()
    job()
    best = time.perf_counter() - start
    for _ in range(20):
        begin = time.perf_counter()
        if begin - start > budget_s:
            break
        job()
        best = min(best, time.perf_counter() - begin)
    return best


def _busy_seconds() -> float:
    """Return the seconds of CPU time that all processes of the machine have used."""
    import psutil

    times = psutil.cpu_times()
    return float(times.user + times.system + getattr(times, "steal", 0.0))


def _load(path: Path, key: str) -> tuple[Rates | None, bool]:
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))[key]
        flops = {str(dtype): float(rate) for dtype, rate in entry["flops"].items()}
        rates = Rates(flops, float(entry["bandwidth_bytes_per_s"]))
        quiet = bool(entry["quiet"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None, False
    sane = all(rate > 0 for rate in (*rates.flops.values(), rates.bandwidth_bytes_per_s))
    return (rates, quiet) if sane and set(_BUDGET_S) == set(flops) else (None, False)


def _store(path: Path, key: str, rates: Rates, *, quiet: bool) -> None:
    """Add an entry atomically; a cache directory that cannot be written costs only the next measurement."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        entries = {}
    if not isinstance(entries, dict):
        entries = {}
    entries[key] = {"flops": rates.flops, "bandwidth_bytes_per_s": rates.bandwidth_bytes_per_s, "quiet": quiet}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            json.dump(entries, file, indent=1)
        Path(file.name).replace(path)
    except OSError:
        return
