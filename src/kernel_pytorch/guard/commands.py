"""A side that is a command: any program that prints times in milliseconds, one number a line, on its standard output.

Every invocation is one turn; the median of what it prints is one sample, or each line one (`Side.per_line`). The first
invocation of each side is not counted: it is the one that reads from disk and fills caches. What the command says on
its standard error is its own business; a line on standard output that is not one number is an error, since a sample
that was lost in prose would be lost silently.
"""

from __future__ import annotations

import math
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import replace

from kernel_pytorch.errors import KptError
from kernel_pytorch.guard.environments import find_python, look_at
from kernel_pytorch.guard.processes import SideFailed, end_tree, how_it_ended, start
from kernel_pytorch.guard.side_by_side import Limits, Side
from kernel_pytorch.guard.types import SideFacts

__all__ = ["CommandError", "CommandRunner", "parse_times"]

_TAIL_LINES = 12
_HANG_FACTOR = 20.0
_QUOTED = 120


class CommandError(KptError):
    """A command does not print what it should."""


def parse_times(output: str, what: str) -> tuple[float, ...]:
    """Return the times that a command printed.

    Args:
        output: Its standard output; empty lines do not count.
        what: The command, for the message.

    Raises:
        CommandError: No line, or one that is not a positive, finite number.
    """
    times = []
    for number, line in enumerate(output.splitlines(), 1):
        text = line.strip()
        if not text:
            continue
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0.0 < value < math.inf:
            shown = text if len(text) <= _QUOTED else text[:_QUOTED] + "..."
            raise CommandError(
                f"{what} printed {shown!r} (line {number}), which is not a time in milliseconds",
                fix="print one positive number a line on standard output, and everything else on standard error",
            )
        times.append(value)
    if not times:
        raise CommandError(f"{what} printed no time", fix="print one number of milliseconds a line on standard output")
    return tuple(times)


class CommandRunner:
    """One side with a command.

    Args:
        side: The side.
    """

    def __init__(self, side: Side) -> None:
        assert side.command is not None
        self.side = side if side.python is None else replace(side, python=find_python(side.python))
        self._command = side.command
        self._software: dict[str, str] = {}
        self._lines = 0
        self._limit_s = 0.0
        self._longest_s = 0.0
        self._process: subprocess.Popen[bytes] | None = None

    def load(self, limits: Limits) -> None:
        """Invoke it once; this invocation does not count.

        Raises:
            KptError: It cannot be started, or prints no times.
            SideFailed: It fails or hangs.
        """
        self._limit_s = limits.hang
        if self.side.python is not None:
            self._software = dict(look_at(self.side.python, self.side.environment).software)
        self._lines = len(self._invoke(limits.loading))

    def sample(self) -> Sequence[float]:
        """Invoke it once; return the median of what it printed, or all of it.

        Raises:
            SideFailed: It failed, hung, or printed something else than times this time.
        """
        try:
            times = self._invoke(self._limit)
        except CommandError as error:
            raise SideFailed(str(error)) from error
        if self.side.per_line and len(times) != self._lines:
            raise SideFailed(f"{self._what} printed {len(times)} times, {self._lines} before")
        return times if self.side.per_line else (statistics.median(times),)

    def facts(self) -> SideFacts:
        """Return what is known of a command: where it came from."""
        return SideFacts(
            label=self.side.label,
            revision=self.side.revision,
            dirty=self.side.dirty,
            python=self.side.python or "",
            software=self._software,
        )

    def close(self) -> None:
        """End an invocation that still runs."""
        if self._process is not None:
            end_tree(self._process)
            self._process = None

    @property
    def lines(self) -> int:
        """How many times the first invocation printed."""
        return self._lines

    @property
    def _limit(self) -> float:
        return max(self._limit_s, _HANG_FACTOR * self._longest_s)

    @property
    def _what(self) -> str:
        return f"{self.side.label}: {self._command[0]}"

    def _invoke(self, limit_s: float) -> tuple[float, ...]:
        began = time.monotonic()
        self._process = process = start(self._command, directory=self.side.directory, environment=self.side.environment)
        try:
            out, err = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired as error:
            end_tree(process)
            tail = _tail(process.communicate()[1])
            raise SideFailed(f"{self._what} did not end within {limit_s:.0f} s", tail) from error
        finally:
            end_tree(process)
            self._process = None
        self._longest_s = max(self._longest_s, time.monotonic() - began)
        if process.returncode:
            raise SideFailed(f"{self._what} {how_it_ended(process.returncode)}", _tail(err))
        return parse_times(out.decode(errors="replace"), self._what)


def _tail(said: bytes | None) -> str:
    return "\n".join((said or b"").decode(errors="replace").strip().splitlines()[-_TAIL_LINES:])
