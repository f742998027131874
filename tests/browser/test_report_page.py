"""The report in a real browser: it draws, it says nothing on the console, and both themes are themes."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from kernel_pytorch.report.html import write_html
from tests.unit.plan_factory import make_bare_plan, make_crowded_plan, make_lost_plan, make_plan

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium or chrome on the PATH"),
]


def browse(page: Path, profile: Path, *, query: str = "", flags: tuple[str, ...] = ()) -> tuple[str, list[str]]:
    """Return the page's elements after its scripts have run, and what it wrote to the console."""
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
        "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile}", "--window-size=1280,2000",
        "--enable-logging=stderr", "--v=0", *flags, "--dump-dom", f"{page.as_uri()}{query}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def append(page: Path, text: str, element: str) -> None:
    """Put an element at the end of a page's body; the bundled library has a `</body>` in a string of its own."""
    body, end = text.rsplit("</body>", 1)
    page.write_text(f"{body}{element}</body>{end}", "utf-8")


def drawn(dom: str) -> int:
    return int(re.search(r'<html[^>]*data-drawn="(\d+)"', dom).group(1))


def theme(dom: str) -> str:
    return re.search(r'<html[^>]*data-theme="(\w+)"', dom).group(1)


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "report.html"
    write_html(make_plan(), path)
    return path


@pytest.mark.parametrize(
    ("plan", "charts"), [(make_plan(), 8), (make_lost_plan(), 6), (make_bare_plan(), 0), (make_crowded_plan(), 8)]
)
def test_every_chart_is_drawn_and_the_console_stays_silent(plan, charts, tmp_path):
    path = tmp_path / "report.html"
    write_html(plan, path)
    dom, console = browse(path, tmp_path / "profile")
    assert console == []
    assert drawn(dom) == charts
    assert dom.count('data-chart="') == charts
    assert dom.count("<svg") - dom.count('<svg viewbox="0 0 14 14"') - dom.count('<svg viewBox="0 0 14 14"') == charts
    assert "<canvas" not in dom


def test_the_charts_show_the_plans_figures(page, tmp_path):
    dom, _ = browse(page, tmp_path / "profile")
    labels = re.findall(r"<text[^>]*>([^<]*)</text>", dom)
    for expected in (
        "109 ms   2.37x [2.33, 2.42]",
        "error budget 2.0e-2",
        "median 90.5 ms",
        "bfloat16  840 GFLOP/s",
        "71 %",
    ):
        assert expected in labels


def test_a_small_budget_is_still_a_line(tmp_path):
    path = tmp_path / "report.html"
    plan = make_plan()
    write_html(replace(plan, config={**plan.config, "max_error": 3e-4}), path)
    dom, _ = browse(path, tmp_path / "profile")
    assert "error budget 3.0e-4" in re.findall(r"<text[^>]*>([^<]*)</text>", dom)


def test_both_themes_paint_the_charts_differently(page, tmp_path):
    light, quiet_light = browse(page, tmp_path / "a", query="?theme=light")
    dark, quiet_dark = browse(page, tmp_path / "b", query="?theme=dark")
    assert (theme(light), theme(dark)) == ("light", "dark")
    assert (quiet_light, quiet_dark) == ([], [])
    assert drawn(light) == drawn(dark) == 8
    paint = [set(re.findall(r'fill="(#[0-9a-f]{6})"', dom)) for dom in (light, dark)]
    assert "#0b62c4" in paint[0] - paint[1]
    assert "#5fb0ff" in paint[1] - paint[0]


def test_the_system_decides_where_nobody_asked(page, tmp_path):
    flags = ("--blink-settings=preferredColorScheme=0",)
    assert theme(browse(page, tmp_path / "a", flags=flags)[0]) == "dark"
    assert theme(browse(page, tmp_path / "b")[0]) == "light"


def test_the_toggle_changes_the_theme_and_redraws(page, tmp_path):
    text = page.read_text("utf-8")
    policy = re.search(r'<meta http-equiv="Content-Security-Policy"[^>]*>', text).group(0)
    append(page, text.replace(policy, ""), '<script>document.getElementById("theme").click()</script>')
    dom, console = browse(page, tmp_path / "profile", query="?theme=light")
    assert console == []
    assert theme(dom) == "dark"
    assert 'fill="#5fb0ff"' in dom
    assert ">Light theme</button>" in dom


def test_a_hostile_name_is_shown_and_not_run(tmp_path):
    path = tmp_path / "report.html"
    name = "<script>document.title='pwned'</script><img src=x onerror=\"document.title='pwned'\">"
    write_html(make_plan(name=name), path)
    dom, console = browse(path, tmp_path / "profile")
    assert console == []
    assert "pwned" in re.search(r"<title>(.*?)</title>", dom).group(1)
    assert "<title>pwned" not in dom
    assert drawn(dom) == 8


def test_the_policy_stops_a_script_that_is_not_the_pages_own(page, tmp_path):
    append(page, page.read_text("utf-8"), "<script>document.title = 'pwned'</script>")
    dom, console = browse(page, tmp_path / "profile")
    assert "<title>pwned" not in dom
    assert drawn(dom) == 8
    assert len(console) == 1
    assert "Content Security Policy" in console[0]
