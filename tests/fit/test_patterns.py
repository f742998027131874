"""Which sets of memory patterns a search compiles, and which it takes; the compiler's answers are made up."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from kernel_pytorch.backends.tpu.topology import parse_topology
from kernel_pytorch.core.types import Candidate, Mode, Step
from kernel_pytorch.errors import KptError
from kernel_pytorch.fit import patterns
from kernel_pytorch.fit.build import Build
from kernel_pytorch.fit.patterns import Searched, search_patterns
from kernel_pytorch.fit.survey import Option, Survey

FLOPS = 1000
PEAKS = {"": 9, "few": 6, "some": 4, "more": 3, "most": 2}
"""By what is recomputed: the more, the smaller."""
loop_takes = {"more": 0}
"""What a loop takes beyond blocks written out."""
holes: dict[int, int] = {}
"""What the compiler sets aside beyond a peak, by the peak."""


def step(name: str) -> Step:
    return Step("recompute", {"block": "Block", "keep": name, "plain": 1})


OPTIONS = tuple(
    Option(Candidate((step(name),)), FLOPS + 20 * (i + 1), 0) for i, name in enumerate(("few", "some", "more", "most"))
)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Candidate]:
    """What the compiler was asked, the unmodified step first."""
    seen: list[Candidate] = []

    def fit(build: Build, topology: object, *, name: str) -> SimpleNamespace:
        del topology, name
        seen.append(build.candidate)
        params = {s.transform: s.params for s in build.candidate.steps}
        loop = params.pop("scan_layers", None)
        params |= {} if loop is None else {"recompute": loop}
        peak = PEAKS[str(params["recompute"]["keep"])] if params else PEAKS[""]
        if params.get("shard", {}).get("windows") is False:
            peak -= 3
        peak += 0 if loop is None else loop_takes["more"]
        flops = FLOPS + 20 * list(PEAKS).index(str(params["recompute"]["keep"]) if params else "")
        return SimpleNamespace(fits=True, peak_bytes=peak, assigned_bytes=peak + holes.get(peak, 0), flops=flops)

    monkeypatch.setattr(patterns, "fit_tpu", fit)
    monkeypatch.setattr(patterns, "call_on_device", lambda *_: Survey(FLOPS, OPTIONS, (), "Block"))
    return seen


LOOPED = tuple(replace(o, loop=Candidate((replace(o.candidate.steps[0], transform="scan_layers"),))) for o in OPTIONS)


def search(memory: int | None, topology: str = "v5e:1") -> Searched:
    build = Build("unused", Mode.TRAINING)
    return search_patterns(build, parse_topology(topology), memory_bytes=memory)


def kept(searched: Searched) -> str:
    assert searched.chosen is not None
    return str(searched.chosen.candidate.steps[0].params["keep"])


def test_the_cheapest_set_that_reaches_the_goal_is_taken(asked: list[Candidate]) -> None:
    found = search(4)
    assert kept(found) == "some"
    assert found.chosen.extra_flops == pytest.approx(40 / FLOPS)  # type: ignore[union-attr]
    assert kept(search(3)) == "more"
    assert kept(search(2)) == "most"
    assert search(9).chosen.candidate == Candidate()  # type: ignore[union-attr]
    assert asked[-1] == Candidate()


def test_what_the_compiler_sets_aside_counts_where_it_is_more_than_the_peak(
    asked: list[Candidate], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kept(search(4)) == "some"
    monkeypatch.setitem(holes, 4, 1)
    assert kept(search(4)) == "more"


def test_what_no_set_reaches_is_told(asked: list[Candidate]) -> None:
    found = search(1)
    assert found.chosen is None
    assert len(asked) == len(found.tried) == 2


def test_on_a_slice_products_are_left_whole_where_their_windows_take_too_much(asked: list[Candidate]) -> None:
    found = search(2, "v5e:4x4")
    assert kept(found) == "most"
    assert not any("windows" in candidate.steps[-1].params for candidate in asked[1:])
    asked.clear()
    found = search(1, "v5e:4x4")
    assert kept(found) == "some", "the cheapest of these too"
    assert found.chosen.candidate.steps[-1] == Step(  # type: ignore[union-attr]
        "shard", {"parameters": "sharded", "rows": "Block", "windows": False}
    )
    assert [str(c.steps[0].params["keep"]) for c in asked[1:]] == ["most", "most", "some", "few"]


@pytest.mark.parametrize(("more", "taken"), [(-1, "scan_layers"), (0, "recompute"), (1, "recompute")])
@pytest.mark.parametrize("memory", [4, None])
def test_the_best_set_is_compiled_as_one_loop_too_and_taken_where_it_is_smaller(
    asked: list[Candidate], monkeypatch: pytest.MonkeyPatch, more: int, taken: str, memory: int | None
) -> None:
    monkeypatch.setattr(patterns, "call_on_device", lambda *_: Survey(FLOPS, LOOPED, (), "Block"))
    monkeypatch.setitem(loop_takes, "more", more)
    found = search(memory)
    assert [c.steps[0].transform for c in asked[1:]].count("scan_layers") == 1
    assert found.chosen is not None
    assert found.chosen.candidate.steps[0].transform == taken
    assert found.chosen.candidate.steps[0].params == asked[-1].steps[0].params


def test_where_no_set_fits_the_smallest_is_tried_as_one_loop(
    asked: list[Candidate], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patterns, "call_on_device", lambda *_: Survey(FLOPS, LOOPED, (), "Block"))
    monkeypatch.setitem(loop_takes, "more", -1)
    found = search(1)
    assert [c.steps[0].transform for c in asked[1:]] == ["recompute", "scan_layers"]
    assert found.chosen is not None
    assert found.chosen.candidate == LOOPED[-1].loop


def test_a_negative_allowance_is_refused(asked: list[Candidate]) -> None:
    with pytest.raises(KptError, match="0 or more"):
        search_patterns(Build("unused"), parse_topology("v5e:1"), max_extra_flops=-0.1)
    assert asked == []
