from __future__ import annotations

import io

import pytest
from plan_factory import won_trials
from rich.console import Console

from kernel_pytorch.core.types import Candidate, Event, Status, Trial
from kernel_pytorch.report.progress import live


def tell(hear) -> None:
    hear(Event("detected", "Intel Xeon", elapsed_s=0.1, budget_s=240.0))
    for index, trial in enumerate(won_trials()):
        hear(Event("trial_started", candidate=trial.candidate, elapsed_s=float(index), budget_s=240.0))
        hear(Event("trial_finished", trial=trial, elapsed_s=index + 0.5, budget_s=240.0))
    hear(Event("chosen", "dtype + compile", trial=won_trials()[1]))


class DyingStream(io.StringIO):
    def __init__(self, error: Exception, after: int) -> None:
        super().__init__()
        self.error, self.left = error, after

    def write(self, text: str) -> int:
        self.left -= 1
        if self.left < 0:
            raise self.error
        return super().write(text)


def test_a_pipe_gets_one_plain_line_per_event():
    stream = io.StringIO()
    with live(Console(file=stream, width=40)) as hear:
        tell(hear)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2 + 2 * len(won_trials())
    assert "\x1b" not in stream.getvalue()
    assert lines[0] == "[    0.1 s] Intel Xeon"
    assert "[    1.5 s] ok dtype(bfloat16): 2.37x [2.33, 2.42], error 1.3e-2" in lines
    assert "[    9.5 s] timeout aot_inductor: no result within 180 s" in lines
    assert lines[-1] == f"[{len(won_trials()) - 0.5:7.1f} s] chosen: dtype(bfloat16)"


def test_a_terminal_gets_a_display_that_disappears_when_the_search_ends():
    stream = io.StringIO()
    with live(Console(file=stream, width=80, force_terminal=True, color_system=None)) as hear:
        tell(hear)
    text = stream.getvalue()
    assert "2.37x [2.33, 2.42]" in text
    assert "of 4 min 00 s" in text
    assert text.rstrip("\n").endswith("\x1b[2K")


def test_an_interrupted_search_leaves_what_it_had_found():
    stream = io.StringIO()

    def interrupted() -> None:
        with live(Console(file=stream, width=80, force_terminal=True, color_system=None)) as hear:
            tell(hear)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    left = stream.getvalue().split("\x1b[2K")[-1]
    assert "2.84x [2.79, 2.89]" in left
    assert "timeout" in left


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize("error", [BrokenPipeError("gone"), OSError(5, "hung up"), ValueError("I/O on closed file")])
def test_a_dead_console_never_reaches_the_search(error, after, terminal):
    stream = DyingStream(error, after)
    heard = []
    with live(Console(file=stream, width=80, force_terminal=terminal)) as hear:
        tell(hear)
        heard.append("all")
    assert heard == ["all"]
    assert stream.left < 0


def test_a_name_that_the_stream_cannot_encode_is_no_error():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with live(Console(file=stream, width=80)) as hear:
        hear(Event("note", "modèle"))
        hear(Event("trial_finished", trial=Trial(Candidate(), Status.OK)))


def test_the_console_gets_its_own_stream_back():
    stream = io.StringIO()
    console = Console(file=stream)
    with live(console) as hear:
        hear(Event("note", "hello [red]not markup[/]"))
    assert console.file is stream
    assert "hello [red]not markup[/]" in stream.getvalue()


def test_disabled_shows_nothing():
    stream = io.StringIO()
    with live(Console(file=stream), enabled=False) as hear:
        tell(hear)
    assert stream.getvalue() == ""
