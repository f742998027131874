"""The report: one self-contained HTML file that opens offline."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from kernel_pytorch.core.types import Plan
from kernel_pytorch.report.page import page

__all__ = ["write_html"]


def write_html(plan: Plan, path: Path) -> None:
    """Write a plan's report as one HTML file, replacing it in one step where it exists.

    Raises:
        OSError: The file cannot be written.
    """
    path = Path(path)
    text = page(plan, directory=str(path.parent))
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise
