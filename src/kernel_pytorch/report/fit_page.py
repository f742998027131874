"""An answer of `kpt fit` as an HTML page that loads nothing else, and the bar of memory that reports share with it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from kernel_pytorch.fit.outcome import Fit, How
from kernel_pytorch.report import figures
from kernel_pytorch.report.fit import headline, largest_buffers

__all__ = ["fit_styles", "memory_bar", "write_fit_page"]

_HUES = {"parameters": "chosen", "optimizer": "failed", "buffers": "base", "batch": "slow", "temporaries": "ok"}
_SHOWN = 20
_HOW = {
    How.COMPILED: "What the compiler of the device assigned for one device; compiled here, without the device.",
    How.MEASURED: "Measured on the device.",
    How.ESTIMATED: "Estimated from the traced graph, as eager PyTorch would hold it.",
}


def write_fit_page(fit: Fit, path: Path) -> None:
    """Write an answer as one HTML file.

    Raises:
        OSError: The file cannot be written.
    """
    style = (files("kernel_pytorch.report") / "templates" / "report.css").read_text("utf-8")
    text = (
        _environment()
        .get_template("fit.html.j2")
        .render(
            style=Markup(style) + fit_styles(),  # noqa: S704  the package's own files
            headline=headline(fit),
            name=fit.name,
            mode=fit.mode.value,
            place=fit.place,
            **_context(fit),
        )
    )
    path.write_text(text, encoding="utf-8")


def fit_styles() -> Markup:
    """Return the style of the bar, and of what stands around it."""
    return Markup((files("kernel_pytorch.report") / "templates" / "fit.css").read_text("utf-8"))  # noqa: S704


def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("kernel_pytorch.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def memory_bar(parts: Mapping[str, int], *, capacity_bytes: int, whole_bytes: int = 0, hue: str = "") -> dict[str, Any]:
    """Return what the template `membar.html.j2` draws: parts side by side, and a line where the device's memory ends.

    Args:
        parts: Bytes by what they are.
        capacity_bytes: Of one device; 0 where it is not known.
        whole_bytes: What the bar's full width stands for, at least; bars below each other share it.
        hue: Colour of parts that have none of their own.
    """
    whole = max(capacity_bytes, sum(parts.values()), whole_bytes, 1)
    drawn = [
        {"name": name, "size": figures.size(size), "width": round(100 * size / whole, 3), "hue": _HUES.get(name, hue)}
        for name, size in parts.items()
    ]
    return {
        "parts": drawn,
        "label": ", ".join(f"{part['name']} {part['size']}" for part in drawn),
        "limit": round(100 * capacity_bytes / whole, 3) if capacity_bytes else None,
        "capacity": figures.size(capacity_bytes),
    }


def _context(fit: Fit) -> dict[str, Any]:
    return {
        "title": "Does it fit",
        "caption": _HOW[fit.how],
        "bar": memory_bar(fit.parts, capacity_bytes=fit.capacity_bytes, whole_bytes=fit.needed_bytes),
        "message": fit.message,
        "cards": _cards(fit),
        "modules": [
            {"module": m.module, "size": figures.size(m.bytes), "buffers": m.buffers} for m in fit.modules[:_SHOWN]
        ],
        "buffers": [
            {
                "size": figures.size(b.bytes),
                "shape": b.shape,
                "made": f"{b.name} (argument)" if b.kind == "argument" else b.source or b.name,
            }
            for b in largest_buffers(fit)[:_SHOWN]
        ],
        "notes": fit.notes,
    }


def _cards(fit: Fit) -> list[dict[str, str]]:
    device = (
        "of one device" if fit.chips > 1 else f"of {figures.size(fit.capacity_bytes)}" if fit.capacity_bytes else ""
    )
    peak = fit.peak_bytes or fit.needed_bytes
    cards = [{"title": "Peak memory", "value": figures.size(peak) if peak else "unknown", "note": device}]
    if fit.flops:
        cards.append({"title": "Work", "value": figures.count(fit.flops, "FLOP"), "note": "by PyTorch's own formulas"})
    if fit.bytes_accessed:
        cards.append({"title": "Memory accessed", "value": figures.size(fit.bytes_accessed), "note": "in one step"})
    if fit.collectives:
        kinds = ", ".join(fit.collectives)
        cards.append({"title": "Collectives", "value": figures.size(sum(fit.collectives.values())), "note": kinds})
    if (prediction := fit.prediction) is not None:
        note = f"{prediction.label}; bound by {prediction.bound}, MFU at most {figures.percent(prediction.mfu)}"
        cards.append({"title": "Step time", "value": figures.seconds(prediction.step_s), "note": note})
    return cards
