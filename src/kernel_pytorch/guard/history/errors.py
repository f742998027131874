"""What goes wrong with a history."""

from __future__ import annotations

from kernel_pytorch.errors import KptError

__all__ = ["HistoryError", "MissingPackageError", "RunError"]


class HistoryError(KptError):
    """The history cannot be opened, read or written, or does not hold what was asked for."""


class MissingPackageError(HistoryError):
    """An optional package that this part of the history needs is not installed."""


class RunError(HistoryError):
    """One run cannot be stored or read, while others can."""
