from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files

import pytest
from plan_factory import (
    BF16,
    COMPILE,
    make_bare_plan,
    make_crowded_plan,
    make_device,
    make_lost_plan,
    make_measurement,
    make_plan,
    won_trials,
)

from kernel_pytorch.core.types import Candidate, Mode, Status, Step, Trial
from kernel_pytorch.report.charts import chart_data
from kernel_pytorch.report.html import write_html

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'{{ 7 * 7 }}"


VOID = {"meta", "link", "br", "path", "rect", "circle", "img"}


class Outline(HTMLParser):
    """What a page holds: its elements with their attributes, its text, and its scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "script":
            self.scripts.append((dict(attributes), ""))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            attributes, text = self.scripts[-1]
            self.scripts[-1] = attributes, text + data
        elif not self.open or self.open[-1] != "style":
            self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    @property
    def charts(self) -> list[str]:
        return [a["data-chart"] for a in self.all("div") if "data-chart" in a]

    @property
    def data(self) -> dict:
        return json.loads(next(text for attributes, text in self.scripts if attributes.get("id") == "chart-data"))


def render(plan, tmp_path) -> Outline:
    write_html(plan, tmp_path / "report.html")
    return Outline((tmp_path / "report.html").read_text("utf-8"))


@pytest.mark.parametrize("plan", [make_plan(), make_lost_plan(), make_bare_plan(), make_crowded_plan()])
def test_every_plan_gives_a_small_well_formed_page_that_loads_nothing(plan, tmp_path):
    page = render(plan, tmp_path)
    assert page.open == []
    assert (tmp_path / "report.html").stat().st_size < 2_000_000
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    for _, attributes in page.elements:
        for name in ("src", "href", "data", "action", "poster"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), attributes
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert set(page.charts) == set(page.data) == set(chart_data(plan))


def test_charts_have_a_name_for_screen_readers_and_a_table_with_the_same_figures(tmp_path):
    page = render(make_plan(), tmp_path)
    drawn = [a for a in page.all("div") if "data-chart" in a]
    assert len(drawn) == 8
    assert all(a["role"] == "img" and len(a["aria-label"] or "") > 20 for a in drawn)
    tables = len(page.all("table"))
    assert tables >= len(drawn)
    for figure in ("109 ms", "8.2e-2", "71 %", "at 240 FLOP per byte", "84.0 ms", "98.0 MiB", "3.40x"):
        assert figure in page.text


def test_the_page_tells_the_whole_story(tmp_path):
    text = render(make_plan(), tmp_path).text
    for expected in (
        "2.84x faster",
        "95 % interval 2.79 to 2.89, error 1.1e-2 of 2.0e-2 allowed.",
        "paid back after 134 calls",
        "died by signal 11 (segmentation fault)",
        "graph break at examples/minilm.py:42: print()",
        "All 4 that were measured alone stayed under their bound.",
        "the budget of 240 s was spent",
        "only NVIDIA GPUs from Ampere on have TF32",
        "kpt optimize examples/minilm.py:workload -o out/minilm",
        "kpt apply out/minilm examples/minilm.py:workload",
        "kpt eject out/minilm examples/minilm.py:workload",
        "neither time nor error was measured: quantize(int8_dynamic) + compile(default); aot_inductor",
        "yes: the contract suite has run",
        "foreign load percent 3.10",
        "memory format of outputs",
    ):
        assert expected in text


def test_nothing_won(tmp_path):
    page = render(make_lost_plan(), tmp_path)
    assert "The unmodified model is kept" in page.text
    assert "Keeping the original is a result too" in page.text
    assert "kpt apply" not in page.text
    assert {"ladder", "layers"}.isdisjoint(page.charts)
    assert {p["kind"] for p in page.data["trials"]["points"]} == {"unmodified", "ok"}


def test_failures_only_and_no_figures_at_all(tmp_path):
    page = render(make_bare_plan(), tmp_path)
    assert page.charts == []
    for expected in (
        "not implemented for 'BFloat16'",
        "no result within 180 s",
        "treat its figures with care",
        "TARGET",
    ):
        assert expected in page.text


def test_names_are_text_wherever_they_appear(tmp_path):
    step = Step("dtype", {"dtype": EVIL})
    chosen = replace(
        won_trials()[-1], candidate=Candidate((step, COMPILE)), layers_ms={EVIL: (2.0, 1.0)}, reason=EVIL, notes=(EVIL,)
    )
    plan = make_plan(name=EVIL, trials=(*won_trials()[:3], chosen), chosen=chosen, command=f"kpt optimize {EVIL!r}")
    plan = replace(plan, device=replace(plan.device, name=EVIL))
    page = render(plan, tmp_path)
    assert len(page.scripts) == len(render(make_plan(), tmp_path).scripts) == 4
    assert page.all("img") == []
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert "{{ 7 * 7 }}" in page.text
    assert EVIL in page.data["layers"]["names"]


def test_only_the_pages_own_scripts_may_run(tmp_path):
    page = render(make_plan(), tmp_path)
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert "default-src 'none'" in policy
    allowed = set(re.findall(r"'sha256-([^']+)'", policy))
    code = [text for attributes, text in page.scripts if "type" not in attributes]
    assert {base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in code} == allowed


def test_the_bundled_library_is_the_published_file():
    vendor = files("kernel_pytorch.report") / "vendor"
    told = json.loads((vendor / "echarts.version.json").read_text("utf-8"))
    assert hashlib.sha256((vendor / "echarts.common.min.js").read_bytes()).hexdigest() == told["sha256"]
    assert "Apache License" in (vendor / "echarts.LICENSE").read_text("utf-8")


def test_trials_chart_places_what_has_no_number():
    points = {p["label"]: p for p in chart_data(make_crowded_plan())["trials"]["points"]}
    chart = chart_data(make_crowded_plan())["trials"]
    assert points["dtype(float16)"]["error"] == chart["top"]
    assert points["threads(intra=2)"]["error"] == chart["floor"]
    assert points["quantize(int8_weight_only)"]["ms"] is None
    assert chart["slower"] is True
    assert chart["budget"] == 2e-2
    assert chart["floor"] < chart["budget"] < chart["top"]
    numbers = [p["number"] for p in chart["points"]]
    assert numbers == sorted(set(numbers))


def test_roofline_shares_a_roof_between_formats_of_one_speed():
    peaks = {"float32": 67e12, "bfloat16": 989e12, "float16": 990e12, "float8_e4m3fn": 1979e12}
    device = replace(make_device(), peak_flops=peaks, bandwidth_bytes_per_s=3.35e12)
    chart = chart_data(make_plan(device=device))["roofline"]
    assert [r["dtype"] for r in chart["roofs"]] == ["float32", "bfloat16, float16", "float8_e4m3fn"]
    unmodified, chosen = chart["points"][:2]
    assert chosen["y"] / unmodified["y"] == pytest.approx(2.84)
    assert chosen["x"] == unmodified["x"]
    assert chart["x"][0] < min(p["x"] for p in chart["points"]) < chart["x"][1]
    assert chart["y"][0] < min(p["y"] for p in chart["points"]) < max(peaks.values()) < chart["y"][1]


def test_training_speaks_of_steps(tmp_path):
    text = render(make_plan(mode=Mode.TRAINING), tmp_path).text
    assert "Time per training step" in text
    assert "paid back after 134 training steps" in text


def test_steps_that_share_a_bar_are_said(tmp_path):
    chosen = Trial(Candidate((BF16, COMPILE)), Status.OK, measurement=make_measurement(2.5), phase="confirm")
    text = render(make_plan(trials=(chosen,), chosen=chosen), tmp_path).text
    assert "Steps that share a bar were not measured one by one" in text
    assert "holds no comparison for the chosen candidate" in text
    assert "Steps that share a bar" not in render(make_plan(), tmp_path).text


def test_writing_replaces_the_file_and_leaves_it_alone_where_it_cannot(tmp_path):
    target = tmp_path / "report.html"
    target.write_text("old")
    write_html(make_plan(), target)
    assert "2.84x" in target.read_text("utf-8")
    with pytest.raises(OSError, match="absent"):
        write_html(make_plan(), tmp_path / "absent" / "report.html")


def luminance(colour: str) -> float:
    channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [0, 1])
def test_every_colour_of_text_and_of_bars_is_readable_on_its_ground(theme):
    css = (files("kernel_pytorch.report") / "templates" / "report.css").read_text("utf-8")
    block = css.split(":root")[theme + 1].split("}")[0]
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})\b", block))
    pairs = [(name, "card") for name in ("ink", "muted", "chosen", "base", "ok", "wrong", "failed", "slow")]
    pairs += [("ink", "page"), ("muted", "page"), ("good-ink", "good-fill"), ("bad-ink", "bad-fill"), ("ink", "soft")]
    for front, ground in pairs:
        low, high = sorted((luminance(colours[front]), luminance(colours[ground])))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (front, ground)
