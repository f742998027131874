"""A search, told while it runs: a live display on a terminal, one log line per event in a pipe."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import IO, Any, cast

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.errors import ConsoleError
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from kernel_pytorch.core.types import Event, Listener, Status, Trial
from kernel_pytorch.report import figures, reading
from kernel_pytorch.report.text import styled_status

__all__ = ["live"]

_DEAD_CONSOLE = (OSError, ValueError, ConsoleError)
"""What a closed terminal, a broken pipe or a stream without the needed encoding raise."""

_SHOWN_TRIALS = 12


@contextmanager
def live(console: Console, enabled: bool = True) -> Iterator[Listener]:  # noqa: FBT001, FBT002
    """Yield a listener that shows a search on `console`, which should be the one of stderr.

    On a terminal it is a live display, elsewhere one line per event. A console that dies (closed pipe, hung-up
    terminal) silences the display and never reaches the search.

    Args:
        console: Where to show it.
        enabled: False yields a listener that shows nothing.
    """
    if not enabled:
        yield _ignore
        return
    stream = console.file
    console.file = cast("IO[str]", _Surviving(stream))
    try:
        if console.is_terminal and not console.is_dumb_terminal:
            with _shown(console, _Board()) as listener:
                yield listener
        else:
            yield _guarded(_Lines(console).hear)
    finally:
        console.file = stream


@contextmanager
def _shown(console: Console, board: _Board) -> Iterator[Listener]:
    done = False
    try:
        # Standard output is data, so only what others write to standard error is drawn above the display.
        with Live(board, console=console, refresh_per_second=8, redirect_stdout=False, transient=True):
            yield _guarded(board.hear)
        done = True
    finally:
        # The closing table tells it all again; an interrupted search leaves what it had found so far.
        if not done and board.trials:
            _quietly(lambda: console.print(board.table(len(board.trials))))


class _Surviving:
    """A text stream that swallows everything once the one underneath has died."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._dead = False

    def write(self, text: str) -> int:
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, action: Callable[[], object]) -> None:
        if self._dead:
            return
        try:
            action()
        except (OSError, ValueError):
            self._dead = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Board:
    """What the live display shows; rich draws it eight times a second."""

    def __init__(self) -> None:
        self.trials: list[Trial] = []
        self.budget_s = 0.0
        self.began = time.monotonic()
        self.spinner = Spinner("dots", text=Text("looking at the machine"))

    def hear(self, event: Event) -> None:
        self.budget_s = event.budget_s or self.budget_s
        self.began = min(self.began, time.monotonic() - event.elapsed_s)
        if event.kind == "trial_started" and event.candidate is not None:
            self.spinner.update(text=Text.assemble("trying ", (reading.short(event.candidate), "bold")))
        elif event.kind == "trial_finished" and event.trial is not None:
            self.trials.append(event.trial)
            self.spinner.update(text=Text("choosing what to try next"))
        elif event.message:
            self.spinner.update(text=Text(event.message))

    def table(self, most: int) -> Table:
        """Return the latest finished trials, the newest last."""
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
        table.add_column(overflow="ellipsis", no_wrap=True)
        for trial in self.trials[-most:]:
            error = reading.measured_error(trial)
            speed = figures.interval(trial.measurement.ratio) if trial.measurement else "-"
            table.add_row(
                styled_status(trial.status),
                Text(speed),
                Text(figures.error(error[0]) if error else "-"),
                Text(reading.short(trial.candidate), style="dim" if not trial.candidate.steps else ""),
            )
        return table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        most = min(_SHOWN_TRIALS, max(1, console.height - 5))
        parts: list[Any] = [self.table(most)] if self.trials else []
        if len(self.trials) > most:
            parts.insert(0, Text(f"{len(self.trials) - most} earlier trials, and", style="dim"))
        parts.append(self.spinner)
        if self.budget_s:
            elapsed_s = time.monotonic() - self.began
            bar = Table.grid(padding=(0, 1))
            bar.add_row(
                ProgressBar(total=self.budget_s, completed=min(elapsed_s, self.budget_s), width=30),
                Text(f"{figures.seconds(elapsed_s)} of {figures.seconds(self.budget_s)}", style="dim"),
            )
            parts.append(bar)
        yield Group(*parts)


class _Lines:
    """What a pipe or a file gets: one line per event."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.elapsed_s = 0.0

    def hear(self, event: Event) -> None:
        self.elapsed_s = max(self.elapsed_s, event.elapsed_s)  # not every event has a time
        line = Text(f"[{self.elapsed_s:7.1f} s] ")
        if event.kind == "trial_finished" and event.trial is not None:
            line.append_text(_finished(event.trial))
        elif event.kind == "trial_started" and event.candidate is not None:
            line.append(f"trying {reading.short(event.candidate)}")
        elif event.kind == "chosen":
            line.append(f"chosen: {reading.short(event.trial.candidate) if event.trial else event.message}")
        else:
            line.append(event.message or event.kind)
        self.console.print(line, soft_wrap=True)


def _finished(trial: Trial) -> Text:
    error = reading.measured_error(trial)
    line = styled_status(trial.status)
    line.append(f" {reading.short(trial.candidate)}")
    line.append(f": {figures.interval(trial.measurement.ratio)}" if trial.measurement else "")
    if trial.status is Status.OK:
        return line.append(f", error {figures.error(error[0])}" if error else "")
    return line.append(f": {trial.reason}" if trial.reason else "")


def _guarded(hear: Callable[[Event], None]) -> Listener:
    def listener(event: Event) -> None:
        _quietly(lambda: hear(event))

    return listener


def _quietly(action: Callable[[], None]) -> None:
    try:
        action()
    except _DEAD_CONSOLE:
        return


def _ignore(_: Event) -> None:
    """Show nothing."""
