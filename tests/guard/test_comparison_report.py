"""One comparison in every format, and what hostile names can do in each of them: nothing."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

import pytest
from markdown_it import MarkdownIt
from rich.console import Console

from kernel_pytorch.core.types import Ratio, Verdict
from kernel_pytorch.guard.types import Culprit, SideFacts
from kernel_pytorch.report.compared import change, fails, headline, one_line, summary
from kernel_pytorch.report.comparison import (
    as_json,
    as_junit,
    as_markdown,
    as_prometheus,
    as_quotation,
    as_text,
    render_comparison,
)

from .compared import HOSTILE, comparison, passing

UNTIMED = {"verdict": Verdict.INCONCLUSIVE, "change": None, "base_samples_ms": (), "head_samples_ms": ()}


def hostile() -> object:
    facts = {"revision": HOSTILE, "software": {HOSTILE: HOSTILE}, "python": HOSTILE}
    return comparison(
        name=HOSTILE, reason=HOSTILE, notes=(HOSTILE,), command=HOSTILE, id=HOSTILE, kind=HOSTILE,
        culprits=(Culprit(HOSTILE, HOSTILE, 0.5),), base=SideFacts(HOSTILE, **facts), head=SideFacts("head"),
    )  # fmt: skip


def test_text_has_verdict_sides_culprit_and_command() -> None:
    assert as_text(comparison()) == (
        "FAIL  resnet step: 11.2 % slower, 3.0 % allowed\n"
        "slower by 11.2 % (10.1 % to 12.4 %), 3 % are allowed\n"
        "                         base         head\n"
        "──────────────────────────────────────────────────────────────────────\n"
        "median time              10.0 ms      11.1 ms\n"
        "samples (side by side)   3            3\n"
        "revision                 aaaaaaaaaa   bbbbbbbbbb + uncommitted changes\n"
        "torch                    2.12.1       2.13.0\n"
        "change, 99 %                          +11.2 % [+10.1 %, +12.4 %]\n"
        "Most likely\n"
        "  - software: torch 2.12.1 -> 2.13.0 (61 % of the slowdown)\n"
        "Notes\n"
        "  - head is noisier: CV 4 % over 1 %\n"
        "again: kpt compare model.py:workload --base aaaa --head bbbb\n"
    )


def test_shares_are_told_once_and_of_many_culprits_the_first() -> None:
    told = Culprit("kernels", "gemm: +0.7 ms (61 % of the slowdown)", 0.61)
    text = as_text(comparison(culprits=(told, *[Culprit("software", f"package {i}") for i in range(7)])))
    assert text.count("61 %") == 1
    assert "  - software: package 3\n  - and 3 more\n" in text


def test_what_is_the_same_on_both_sides_is_not_shown() -> None:
    text = as_text(comparison())
    assert "torch" in text
    assert "3.11.9" not in text


def test_text_without_colour_says_as_much() -> None:
    console = Console(width=100, color_system="truecolor", force_terminal=True, highlight=False)
    with console.capture() as captured:
        render_comparison(comparison(), console)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", captured.get())
    assert [line.rstrip() for line in plain.splitlines()] == as_text(comparison()).splitlines()


@pytest.mark.parametrize("width", [40, 80, 200])
def test_text_of_any_width_keeps_the_figures(width: int) -> None:
    flat = re.sub(r"\s+", " ", as_text(comparison(), width=width))
    for figure in ("11.2 % slower", "FAIL", "2.12.1", "61 %", "noisier"):
        assert figure in flat


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        (Ratio(1.112, 1.101, 1.124), "11.2 % slower, 3.0 % allowed"),
        (Ratio(0.8, 0.79, 0.81), "20.0 % faster, 3.0 % allowed"),
        (Ratio(1.01, 0.99, 1.02), "1.0 % slower, within the noise, 3.0 % allowed"),
        (None, "not timed, 3.0 % allowed"),
    ],
)
def test_headline(ratio: Ratio | None, words: str) -> None:
    assert headline(comparison(change=ratio)) == words


def test_change_of_few_samples_is_bounded() -> None:
    assert change(Ratio(1.0, 0.0, math.inf)) == "+0.0 % [-100.0 %, > +1000 %]"
    assert change(None) == "-"


def test_summary_counts_the_worst_first() -> None:
    assert summary([passing(), comparison(), passing()]) == "1 FAIL, 2 PASS"
    assert summary([]) == "nothing compared"


@pytest.mark.parametrize("verdict", list(Verdict))
def test_only_what_passed_or_may_be_undecided_is_green(verdict: Verdict) -> None:
    assert fails(verdict) == (verdict not in (Verdict.PASS, Verdict.INCONCLUSIVE))
    assert fails(verdict, inconclusive="fail") == (verdict is not Verdict.PASS)


def test_json_is_plain_and_complete() -> None:
    data = json.loads(json.dumps(as_json(comparison(change=Ratio(1.0, 0.0, math.inf))), allow_nan=False))
    assert data["schema_version"] == 1
    assert data["verdict"] == "FAIL"
    assert data["change"] == {"value": 1.0, "low": 0.0, "high": None, "confidence": 0.95}
    assert data["base_samples_ms"] == [10.0, 10.2, 9.8]
    assert data["head"]["dirty"] is True
    assert data["culprits"] == [
        {"kind": "software", "what": "torch 2.12.1 -> 2.13.0", "share": 0.61, "evidence": {"ms": 0.7}}
    ]
    names = set(type(comparison()).__dataclass_fields__)
    assert set(data) == names | {"schema_version"}


def cells(line: str) -> list[str]:
    """Return the cells of a row as GitHub splits them: at bars that no backslash escapes."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]


def test_markdown_is_one_table_and_details_of_what_failed() -> None:
    text = as_markdown([comparison(), passing()])
    lines = text.splitlines()
    assert lines[0] == "### Performance: 1 FAIL, 1 PASS"
    table = lines[2:6]
    assert cells(table[2]) == ["❌ FAIL", "`resnet step`", "+11.2 % [+10.1 %, +12.4 %]", "3.0 %", "10.0 ms", "11.1 ms"]
    assert cells(table[3])[:2] == ["✅ PASS", "`bert`"]
    assert text.count("<details") == text.count("</details>") == 1
    assert "software: torch 2.12.1 -&gt; 2.13.0 (61 % of the slowdown)" in text
    assert "Again: `kpt compare model.py:workload --base aaaa --head bbbb`" in text


class Rendered(HTMLParser):
    """What a Markdown renderer makes of a comment: its tags, and its text outside of code."""

    def __init__(self, markdown: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.comments: list[str] = []
        self.feed(MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(markdown))

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        self.open.remove(tag)

    def handle_data(self, data: str) -> None:
        if "code" not in self.open:
            self.text += data

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)


def test_markdown_of_hostile_names_is_inert() -> None:
    text = as_markdown([hostile()], title=HOSTILE)
    shown, plain = Rendered(text), Rendered(as_markdown([comparison()]))
    assert set(shown.tags) <= set(plain.tags), "no element that an ordinary comment has not"
    assert shown.tags.count("details") == shown.tags.count("summary") == shown.tags.count("h3") == 1
    assert shown.tags.count("table") == 2
    assert shown.comments == []
    assert shown.open == []
    assert "<script>alert(1)</script>" in shown.text, "it is shown as what it is"
    assert not re.search(r"[@#](?=\w)", shown.text), "no mention, no reference"
    assert not re.search(r"(?i)https?://|\bwww\.|\bGH-", shown.text), "no link"
    for invisible in "\x1b\x00\u202e":
        assert invisible not in text
    for line in text.splitlines():
        if line.startswith("| ❌"):
            assert len(cells(line)) == 6


def test_code_spans_are_closed_by_nothing_inside() -> None:
    text = as_markdown([passing(name="a ``` b `"), passing(name="`"), passing(name="")])
    rows = [cells(line)[1] for line in text.splitlines() if line.startswith("| ✅")]
    assert rows == ["```` a ``` b ` ````", "`` ` ``", "-"]


def test_quotations_are_closed_by_nothing_inside() -> None:
    shown = Rendered(as_quotation(f"first\n````\n</code></pre>\n{HOSTILE}\n"))
    assert shown.tags == ["pre", "code"]
    assert shown.text == "\n"
    assert as_quotation("x" * 9000).count("x") <= 4000


def test_a_comment_fits_into_a_comment() -> None:
    many = [comparison(name=f"test {i} " + "x" * 150, notes=("n" * 400,) * 3) for i in range(200)]
    text = as_markdown(many)
    assert len(text) < 65_536
    assert text.count("<details") == text.count("</details>") > 0
    assert re.search(r"Details of \d+ more are in the artefacts", text)
    assert len(as_markdown([comparison(name="y" * 190)] * 1000)) < 65_536


def test_junit_counts_and_shows_reasons() -> None:
    undecided = comparison(**UNTIMED, reason="the worker died", name="gpt", id="89")
    suite = ET.fromstring(as_junit([comparison(), passing(), undecided]))[0]
    assert {k: suite.get(k) for k in ("tests", "failures", "errors", "skipped")} == {
        "tests": "3", "failures": "1", "errors": "0", "skipped": "1",
    }  # fmt: skip
    failed, passed, skipped = suite.findall("testcase")
    assert failed.get("name") == "resnet step"
    assert failed.find("failure").get("message").startswith("FAIL: slower by 11.2 %")
    assert "torch 2.12.1 -> 2.13.0" in failed.find("failure").text
    assert passed.find("failure") is None
    assert skipped.find("skipped").get("message") == "INCONCLUSIVE: the worker died"
    properties = {p.get("name"): p.get("value") for p in failed.iter("property")}
    assert properties["kpt.change"] == "1.112"
    strict = ET.fromstring(as_junit([undecided], inconclusive="fail"))[0]
    assert (strict.get("failures"), strict.get("skipped")) == ("1", "0")


def test_junit_of_hostile_names_is_well_formed_and_says_them() -> None:
    suite = ET.fromstring(as_junit([hostile(), comparison(name="\ud800\ufffe")]))[0]
    name = suite[0].get("name")
    assert "<script>alert(1)</script>" in name
    assert "\x00" not in name
    assert len(suite) == 2


def test_prometheus_reads_back() -> None:
    parser = pytest.importorskip("prometheus_client.parser", reason="pip install 'kernel-pytorch[serve]'")
    families = {f.name: f for f in parser.text_string_to_metric_families(as_prometheus([comparison(), passing()]))}
    verdicts = {(s.labels["name"], s.labels["verdict"]): s.value for s in families["kpt_verdict"].samples}
    assert verdicts["resnet step", "FAIL"] == 1
    assert verdicts["resnet step", "PASS"] == 0
    assert sum(verdicts.values()) == 2
    bounds = {s.labels["bound"]: s.value for s in families["kpt_change_ratio"].samples if s.labels["name"] == "bert"}
    assert bounds == {"value": 0.999, "low": 0.99, "high": 1.01}
    times = {s.labels["side"]: s.value for s in families["kpt_time_seconds"].samples if s.labels["name"] == "bert"}
    assert times == {"base": pytest.approx(0.010), "head": pytest.approx(0.0111)}
    assert families["kpt_timestamp_seconds"].samples[0].value == 1777863721
    assert all(f.documentation for f in families.values())


def test_prometheus_of_hostile_names_reads_back_unchanged() -> None:
    parser = pytest.importorskip("prometheus_client.parser", reason="pip install 'kernel-pytorch[serve]'")
    name = 'a"b\\c\nd}e{f,g="h"\\n'
    families = list(parser.text_string_to_metric_families(as_prometheus([comparison(name=name)])))
    assert {s.labels["name"] for f in families for s in f.samples} == {name}
    assert list(parser.text_string_to_metric_families(as_prometheus([hostile()])))


def test_prometheus_has_each_series_once_the_latest() -> None:
    old = passing(created="2026-05-03T00:00:00+00:00")
    new = comparison(name="bert", created="2026-05-04T00:00:00+00:00")
    for order in ([old, new], [new, old]):
        lines = [line for line in as_prometheus(order).splitlines() if not line.startswith("#")]
        assert len({line.rpartition(" ")[0] for line in lines}) == len(lines)
        assert 'kpt_verdict{kind="compare",name="bert",verdict="FAIL"} 1.0' in lines
    assert as_prometheus([]) == ""


def test_prometheus_leaves_out_what_was_not_timed() -> None:
    text = as_prometheus([comparison(**UNTIMED)])
    assert "kpt_time_seconds" not in text
    assert "kpt_change_ratio" not in text
    assert "NaN" not in text
    assert "+Inf" in as_prometheus([comparison(change=Ratio(1.0, 0.0, math.inf))])


def test_one_line_is_what_it_says() -> None:
    shown = one_line(HOSTILE)
    assert shown.isprintable()
    assert "red | new" in shown
    assert one_line("x" * 600) == "x" * 497 + "..."
