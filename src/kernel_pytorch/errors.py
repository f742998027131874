"""Errors the package raises for what a caller gave it; each message says what was wrong and how to mend it."""

from __future__ import annotations

__all__ = [
    "CandidateError",
    "InputsError",
    "KptError",
    "ModelError",
    "OutputDirectoryError",
    "PlanError",
    "TargetError",
]


class KptError(ValueError):
    """Base of everything a caller can cause: the command line prints the message as one line and exits 2.

    Attributes:
        fix: What the user can do about it, a command where there is one; empty where nothing is known.
        user_traceback: The formatted traceback of the *user's* code, where their code raised; else empty.
    """

    def __init__(self, message: str, *, fix: str = "", user_traceback: str = "") -> None:
        super().__init__(message)
        self.fix = fix
        self.user_traceback = user_traceback


class TargetError(KptError):
    """A `TARGET` was not found, not importable, or its factory raised."""


class InputsError(KptError):
    """The example inputs do not fit the model."""


class ModelError(KptError):
    """The unmodified model gives NaN, is not callable, or cannot be read."""


class PlanError(KptError):
    """A plan is corrupted, of a newer schema, or for another model or device."""


class OutputDirectoryError(KptError):
    """The output directory is not writable, or another search holds it."""


class CandidateError(KptError):
    """A step names an unknown transform or parameter, or cannot be applied to this program."""
