"""Runs for tests of the history."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from kernel_pytorch.core.types import Ratio, Verdict
from kernel_pytorch.guard.types import Comparison, Culprit, SideFacts

START = datetime(2026, 9, 1, 12, tzinfo=UTC)


def make_run(number: int = 0, **fields: Any) -> Comparison:
    """Return the run of day `number` with every field filled."""
    software = {"torch": "2.12.1", "python": "3.11.7"}
    base = SideFacts("base", revision="b" * 40, python="/usr/bin/python", software=software, device_key="cpu-x86-2")
    head = SideFacts(
        "head", revision=f"{number:040x}", dirty=True, python="/usr/bin/python", software=software,
        device_key="cpu-x86-2", fingerprint="f" * 16, telemetry={"clock_mhz": 1980.0},
        kernels_ms={"aten::mm": 4.25}, peak_bytes=123456789,
    )  # fmt: skip
    values: dict[str, Any] = {
        "kind": "compare",
        "name": "training step",
        "verdict": Verdict.PASS,
        "reason": "not slower than 3 %",
        "max_slowdown": 0.03,
        "base": base,
        "head": head,
        "created": (START + timedelta(days=number)).isoformat(timespec="seconds"),
        "id": f"run-{number:06d}",
        "change": Ratio(1.01, 0.99, 1.02),
        "base_samples_ms": (10.0, 10.25, 10.125),
        "head_samples_ms": (10.1, 10.2, 10.3),
        "notes": ("noisier", "über 3 %"),
        "culprits": (Culprit("software", "torch 2.12.1 -> 2.13.0", 0.6, {"ms": 1.5, "version": "2.13"}),),
        "command": "kpt compare --base main --head HEAD",
        "seconds": 12.5,
    }
    return Comparison(**(values | fields))


def make_series(values_ms: Sequence[float], **fields: Any) -> list[Comparison]:
    """Return one run a day whose head takes these times; base stays at 10 ms."""
    return [
        make_run(number, head_samples_ms=(v, v, v), change=Ratio(v / 10, v / 10 * 0.99, v / 10 * 1.01), **fields)
        for number, v in enumerate(values_ms)
    ]
