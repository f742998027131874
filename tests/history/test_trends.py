"""The page of trends: what it says, and that a real browser draws it."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from kernel_pytorch.core.types import Ratio, Verdict
from kernel_pytorch.guard.history import ChangePoint
from kernel_pytorch.report.trends import trends_page, write_trends
from tests.history.made import make_run, make_series

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
SHIFT = ChangePoint(
    name="training step", metric="ms", device="cpu-x86-2", run_id="run-000005", previous_id="run-000004",
    created="2026-09-06T12:00:00+00:00", revision="5", before=10.0, after=12.0, change=1.2, p_value=1e-9,
    differences=("torch 2.12.1 -> 2.13.0",),
)  # fmt: skip
HOSTILE = "</script><script>document.title='pwned'</script><img src=x onerror=\"document.title='pwned'\">"


def page(runs, shifts=(), **arguments) -> str:
    return trends_page(runs, list(shifts), source="sqlite:////h.sqlite", **arguments)


def charts(text: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="chart-data">(.*?)</script>', text, re.S).group(1))


def words(text: str) -> str:
    """Return what people read: without the head, scripts and marks."""
    body = text.split("<main>", 1)[1].split("</main>", 1)[0]
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body)).replace("&lt;", "<").replace("&gt;", ">")


def stepped() -> list:
    return make_series([10.0] * 5 + [12.0] * 5)


def test_an_empty_history_says_how_to_begin():
    text = words(page([], notes=["3 runs wait on the local disk"]))
    assert "No runs yet" in text
    assert "kpt compare" in text
    assert "3 runs wait on the local disk" in text
    assert charts(page([])) == {}


def test_a_single_run_is_drawn_and_called_one():
    text = page([make_run()])
    assert "One run so far" in words(text)
    (chart,) = charts(text).values()
    assert len(chart["points"]) == 1
    assert chart["points"][0]["head"] == 10.2


def test_a_change_point_is_told_with_what_differs():
    text = page(stepped(), [SHIFT])
    said = words(text)
    assert "time 10.0 ms → 12.0 ms (+20.0 %)" in said
    assert "torch 2.12.1 -> 2.13.0" in said
    (chart,) = charts(text).values()
    assert [s["at"] for s in chart["shifts"]] == [5]
    assert chart["levels"] == [10.0] * 5 + [12.0] * 5


def test_change_points_of_others_and_of_runs_not_shown_are_left_out():
    others = [replace(SHIFT, name="another"), replace(SHIFT, device="gpu"), replace(SHIFT, run_id="gone")]
    (chart,) = charts(page(stepped(), others)).values()
    assert chart["shifts"] == []
    assert set(chart["levels"]) == {None}


def test_series_are_apart_by_name_and_device_and_the_worst_comes_first():
    gpu = make_run(1, id="g")
    gpu = replace(gpu, head=replace(gpu.head, device_key="nvidia"))
    bad = make_run(2, id="b", name="the bad one", verdict=Verdict.FAIL)
    text = page([make_run(), gpu, bad])
    titles = re.findall(r"<h2>(.*?)</h2>", text)
    assert titles == ["Where things stand", "the bad one", "training step", "training step"]
    assert "1 of 3 fail now" in words(text)


@pytest.mark.parametrize(
    ("verdict", "headline"),
    [(Verdict.PASS, "Not slower than allowed"), (Verdict.FAIL, "It fails now"), (Verdict.WRONG, "It fails now"),
     (Verdict.STALE, "Not decided"), (Verdict.INCONCLUSIVE, "Not decided")],
)  # fmt: skip
def test_the_headline_is_of_the_latest_run(verdict, headline):
    text = words(page([make_run(0, verdict=Verdict.FAIL), make_run(1, verdict=verdict)]))
    assert headline in text
    assert str(verdict) in text


def test_runs_without_times_have_no_chart():
    run = make_run(change=None, base_samples_ms=(), head_samples_ms=(), verdict=Verdict.INCONCLUSIVE)
    text = page([run])
    assert charts(text) == {}
    assert "nothing to draw" in words(text)


def test_figures_that_are_none_or_endless_are_valid_json():
    odd = [
        make_run(0, change=Ratio(math.nan, math.nan, math.nan), head_samples_ms=(math.nan, math.inf)),
        make_run(1, change=Ratio(1.0, -math.inf, math.inf)),
        make_run(2, change=Ratio(math.inf, 1.0, math.inf)),
    ]
    text = page(odd)
    (chart,) = charts(text).values()
    assert "NaN" not in json.dumps(chart)
    assert "Infinity" not in json.dumps(chart)
    assert [(p["low"], p["change"], p["high"]) for p in chart["points"]] == [
        (None, None, None), (-100.0, 0.0, 900.0), (None, None, None),
    ]  # fmt: skip


def test_a_long_history_is_cut_and_says_so():
    text = page([make_run(n) for n in range(1005)])
    (chart,) = charts(text).values()
    assert len(chart["points"]) == 1000
    assert chart["points"][-1]["id"] == "run-001004"
    assert "newest 1000" in words(text)


def test_hostile_names_are_text():
    run = make_run(name=HOSTILE, reason=HOSTILE, id=HOSTILE)
    run = replace(run, head=replace(run.head, device_key=HOSTILE, revision=HOSTILE, software={HOSTILE: HOSTILE}))
    text = page(
        [run, replace(run, id="2")], [replace(SHIFT, name=HOSTILE, device=HOSTILE, run_id="2")], notes=[HOSTILE]
    )
    assert "<img" not in text.split("<main>", 1)[1].split("<script", 1)[0]
    assert text.count("<script") == page([make_run()]).count("<script")


def test_the_file_is_replaced_in_one_step(tmp_path):
    path = tmp_path / "trends.html"
    path.write_text("old")
    write_trends(stepped(), [], path, source="x")
    assert path.read_text("utf-8").startswith("<!doctype html>")
    assert [p.name for p in tmp_path.iterdir() if "trends" in p.name] == ["trends.html"]
    with pytest.raises(OSError, match="No such file"):
        write_trends([], [], tmp_path / "missing" / "trends.html", source="x")


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium or chrome on the PATH")
class TestBrowser:
    def browse(self, path: Path, profile: Path, query: str = "") -> tuple[str, list[str]]:
        command = [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--disable-dev-shm-usage", "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile}",
            "--window-size=1280,2000", "--enable-logging=stderr", "--v=0", "--dump-dom", f"{path.as_uri()}{query}",
        ]  # fmt: skip
        # Its sockets lie in TMPDIR, and the name of one may have 107 characters.
        short = {**os.environ, "TMPDIR": "/tmp"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=short)
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    def test_charts_are_drawn_in_both_themes_and_the_console_stays_silent(self, tmp_path):
        path = tmp_path / "trends.html"
        runs = [
            *stepped(), make_run(40, id="one", name="one run"),
            make_run(41, id="none", name="never timed", change=None, base_samples_ms=(), head_samples_ms=()),
            *(make_run(50 + n, id=f"m{n}", name=HOSTILE) for n in range(120)),
        ]  # fmt: skip
        runs[3] = replace(runs[3], verdict=Verdict.STALE, change=None, head_samples_ms=(), base_samples_ms=())
        write_trends(runs, [SHIFT], path, source="x")
        light, quiet = self.browse(path, tmp_path / "a", "?theme=light")
        dark, quiet_too = self.browse(path, tmp_path / "b", "?theme=dark")
        assert (quiet, quiet_too) == ([], [])
        for dom in (light, dark):
            assert re.search(r'<html[^>]*data-drawn="3"', dom)
            labels = re.findall(r"<text[^>]*>([^<]*)</text>", dom)
            assert "+20.0 %" in labels
            assert "2026-09-01" in labels
            assert "<title>pwned" not in dom
        paint = [set(re.findall(r'(?:fill|stroke)="(#[0-9a-f]{6})"', dom)) for dom in (light, dark)]
        assert "#0b62c4" in paint[0] - paint[1]
        assert "#5fb0ff" in paint[1] - paint[0]

    def test_an_empty_page_says_nothing_on_the_console(self, tmp_path):
        path = tmp_path / "trends.html"
        write_trends([], [], path, source="x")
        dom, console = self.browse(path, tmp_path / "profile")
        assert console == []
        assert re.search(r'<html[^>]*data-drawn="0"', dom)
