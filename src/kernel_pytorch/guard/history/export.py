"""A history as text for other programs."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kernel_pytorch.guard.history import codec
from kernel_pytorch.guard.types import Comparison, SideFacts

__all__ = ["FORMATS", "as_csv", "as_json"]

_COLUMNS = (
    "id", "created", "kind", "name", "verdict", "reason", "max_slowdown",
    "change", "change_low", "change_high", "confidence", "base_ms", "head_ms", "base_samples", "head_samples", "paired",
    "base_label", "base_revision", "base_dirty", "base_software", "base_peak_bytes",
    "head_label", "head_revision", "head_dirty", "head_software", "head_peak_bytes",
    "device", "fingerprint", "culprits", "notes", "seconds", "command",
)  # fmt: skip


def as_json(runs: Sequence[Comparison]) -> str:
    """Return runs with all their samples as a JSON array, one run a line."""
    return "[\n" + ",\n".join(map(codec.dumps, runs)) + "\n]\n" if runs else "[]\n"


def as_csv(runs: Sequence[Comparison]) -> str:
    """Return one line a run: medians in place of samples; lists are joined with `; `, versions are `name=version`."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(_line, runs))
    return text.getvalue()


FORMATS: Mapping[str, Callable[[Sequence[Comparison]], str]] = {"json": as_json, "csv": as_csv}


def _line(run: Comparison) -> dict[str, Any]:
    change = run.change
    return {
        "id": run.id,
        "created": run.created,
        "kind": run.kind,
        "name": run.name,
        "verdict": str(run.verdict),
        "reason": run.reason,
        "max_slowdown": run.max_slowdown,
        "change": change.value if change else "",
        "change_low": change.low if change else "",
        "change_high": change.high if change else "",
        "confidence": change.confidence if change else "",
        "base_ms": statistics.median(run.base_samples_ms) if run.base_samples_ms else "",
        "head_ms": statistics.median(run.head_samples_ms) if run.head_samples_ms else "",
        "base_samples": len(run.base_samples_ms),
        "head_samples": len(run.head_samples_ms),
        "paired": json.dumps(run.paired),
        **_side("base", run.base),
        **_side("head", run.head),
        "device": run.head.device_key or run.base.device_key,
        "fingerprint": run.head.fingerprint or run.base.fingerprint,
        "culprits": "; ".join(culprit.what for culprit in run.culprits),
        "notes": "; ".join(run.notes),
        "seconds": run.seconds,
        "command": run.command,
    }


def _side(name: str, side: SideFacts) -> dict[str, Any]:
    return {
        f"{name}_label": side.label,
        f"{name}_revision": side.revision,
        f"{name}_dirty": json.dumps(side.dirty),
        f"{name}_software": "; ".join(f"{k}={v}" for k, v in side.software.items()),
        f"{name}_peak_bytes": "" if side.peak_bytes is None else side.peak_bytes,
    }
