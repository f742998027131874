"""The kinds of values that options of `kpt` take, and a group that answers an unknown verb with the nearest ones."""

from __future__ import annotations

import difflib
from typing import Any

import click

__all__ = ["Above", "Budget", "Share", "Verbs"]


class Verbs(click.Group):
    """Commands in the order of use; an unknown one is answered with the nearest names."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  click's signature
        """Return the names as they were defined."""
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command of the first argument."""
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            near = difflib.get_close_matches(args[0], list(self.commands), n=2, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"one of: {', '.join(self.commands)}"
            raise click.UsageError(f"no command {args[0]!r}; {hint}", ctx)
        return super().resolve_command(ctx, args)


class Budget(click.ParamType[Any]):
    """Seconds, or a name; `by_device`: the name itself is returned, for its seconds depend on the device."""

    name = "budget"

    def __init__(self, *, by_device: bool = False) -> None:
        self.by_device = by_device

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str | float:
        """Return seconds, or the name where they depend on the device."""
        from kernel_pytorch.core.config import BUDGETS_S

        if value in BUDGETS_S:
            return str(value) if self.by_device else BUDGETS_S[value]
        try:
            seconds = float(value)
        except ValueError:
            seconds = -1.0
        if not 0.0 < seconds < float("inf"):
            self.fail(f"{value!r} is neither {', '.join(BUDGETS_S)} nor a positive number of seconds", param, ctx)
        return seconds


class Above(click.ParamType[float]):
    """A finite float above zero (or from zero on)."""

    name = "number"

    def __init__(self, *, zero: bool = False, below: float = float("inf")) -> None:
        self.zero = zero
        self.below = below

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number, or fail with the range that was expected."""
        try:
            number = float(value)
        except ValueError:
            self.fail(f"{value!r} is not a number", param, ctx)
        if not (number >= 0.0 if self.zero else number > 0.0) or not number < self.below:
            low = "from 0" if self.zero else "above 0"
            high = f" and below {self.below:g}" if self.below < float("inf") else " and finite"
            self.fail(f"{value} must be {low}{high}", param, ctx)
        return number


class Share(click.ParamType[float]):
    """A float from 0 to 1."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number, or fail with the range that was expected."""
        try:
            number = float(value)
        except ValueError:
            self.fail(f"{value!r} is not a number", param, ctx)
        if not 0.0 <= number <= 1.0:
            self.fail(f"{value} must be from 0 to 1", param, ctx)
        return number
