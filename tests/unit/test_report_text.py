from __future__ import annotations

import io

import pytest
from plan_factory import (
    make_bare_plan,
    make_crowded_plan,
    make_device,
    make_lost_plan,
    make_numerics,
    make_plan,
    make_prediction,
    make_spec,
)
from rich.console import Console

from kernel_pytorch.core.types import Check, Gate, NumericsReport, Skip
from kernel_pytorch.report.text import render_device, render_numerics, render_plan, render_prediction


def shown(render, *args, width=80, **console) -> str:
    stream = io.StringIO()
    render(*args, Console(file=stream, width=width, **console))
    return stream.getvalue()


@pytest.mark.parametrize("width", [60, 80, 140])
@pytest.mark.parametrize("plan", [make_plan(), make_lost_plan(), make_bare_plan(), make_crowded_plan()])
def test_no_line_is_wider_than_the_terminal_and_a_pipe_gets_no_escapes(plan, width):
    text = shown(render_plan, plan, width=width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert "\x1b" not in text


def test_the_closing_table_tells_what_won_what_lost_and_why():
    text = shown(render_plan, make_plan(), width=100)
    first = text.splitlines()[0]
    assert first == "2.84x faster: 95 % interval 2.79 to 2.89, error 1.1e-2 of 2.0e-2 allowed"
    for expected in (
        "176 MiB -> 98.0 MiB",
        "22.4 s, paid back after 134 calls",
        "2.37x [2.33, 2.42]",
        "107,730 calls",
        "quantize(int8_dynamic) (wrong): error 8.2e-2 is above the 2.0e-2 allowed",
        "died by signal 11",
        "the budget of 240 s was spent",
        "fix: run on such a GPU",
    ):
        assert expected in text
    starred = [line for line in text.splitlines() if line.startswith("*")]
    assert len(starred) == 1
    assert "dtype(bfloat16) +" in starred[0]


def test_a_narrow_terminal_keeps_the_figures_whole():
    text = shown(render_plan, make_plan(), width=80)
    assert "2.84x [2.79, 2.89]" in text
    assert "Pays after" not in text


def test_colour_only_where_asked(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert "\x1b[" in shown(render_plan, make_plan(), force_terminal=True)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[3" not in shown(render_plan, make_plan(), force_terminal=True)


def test_names_are_never_markup():
    text = shown(render_plan, make_plan(name="[bold]x[/nonsense]"))
    assert "[bold]x[/nonsense]" in text


def test_unverified_hardware_is_said():
    assert "not verified" in shown(render_plan, make_plan(verified=False))
    assert "not verified" not in shown(render_plan, make_plan(verified=True))


def test_device_shows_what_can_run_and_the_fix_for_what_cannot():
    rows = [
        ("dtype", "lower precision inside", None),
        ("aot_inductor", "a package", Skip("no C++ compiler was found", "apt-get install g++")),
    ]
    text = shown(render_device, make_device(), rows)
    assert "1 of 2 can run here" in text
    assert "no C++ compiler was found" in text
    assert "fix: apt-get install g++" in text
    assert "840 GFLOP/s (measured)" in text
    assert "24.0 GB/s (measured)" in text


def test_prediction_answers_the_question_first():
    text = shown(render_prediction, make_spec(), make_prediction(), make_plan().skipped)
    assert text.splitlines()[0] == "Will it help all-MiniLM-L6-v2? at most 4.40x from any single step"
    assert "106 ms: nothing at the model's own precision can be faster" in text
    bars = {line.split()[0]: line.count("█") for line in text.splitlines() if "█" in line}
    assert bars["matmul"] == 21
    assert bars["attention"] == 3
    assert text.index("quantize(int8_dynamic)") < text.index("dtype(bfloat16)") < text.index("threads(intra=2)")


def test_prediction_bars_on_a_terminal_without_unicode():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    render_prediction(make_spec(), make_prediction(), (), Console(file=stream, width=80))
    stream.seek(0)
    assert "#####" in stream.read()


def test_numerics_of_a_pass_and_of_a_failure():
    assert shown(render_numerics, make_numerics(1e-2)).startswith(
        "same function: all 4 checks are inside their budgets"
    )
    failed = Check("grad fc.weight", Gate.TRAINING, 0.3, 1e-3, "gradient is off by 30 %", "batch 3")
    text = shown(render_numerics, make_numerics(1e-3, failed=failed))
    assert text.startswith("not the same function: 1 of 5 checks failed; gradient is off by 30 %")
    assert text.index("FAIL") < text.index("ok ")
    assert "grad fc.weight @ batch 3" in text


def test_numerics_without_checks_are_undecided_and_many_are_cut():
    assert shown(render_numerics, NumericsReport(())).startswith("undecided")
    many = NumericsReport(tuple(Check(f"output[{i}]", Gate.PRECISION, 1e-3, 2e-2) for i in range(50)))
    text = shown(render_numerics, many)
    assert "and 30 more checks" in text
    assert "output[49]" not in text
