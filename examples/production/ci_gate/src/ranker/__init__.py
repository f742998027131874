"""Scores passages for a question."""

from ranker.model import PADDING, Ranker

__all__ = ["PADDING", "Ranker"]
