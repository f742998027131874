"""Every run of the guard, kept: a database, a local spool for when it is away, change points, retention and export."""

from kernel_pytorch.guard.history.changes import ChangePoint, changes
from kernel_pytorch.guard.history.errors import HistoryError
from kernel_pytorch.guard.history.store import History, Receipt, open_history

__all__ = ["ChangePoint", "History", "HistoryError", "Receipt", "changes", "open_history"]
