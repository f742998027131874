"""Files of pytest-benchmark 5.3 and asv 0.6, as those tools wrote them, and damaged ones."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from kernel_pytorch.core.types import Ratio, Verdict
from kernel_pytorch.guard.importers import compare_results, is_results, read_results
from kernel_pytorch.guard.saved import ResultsError, as_comparison, read_comparisons
from kernel_pytorch.guard.types import Comparison
from kernel_pytorch.report.comparison import as_json
from kernel_pytorch.validation.regression import judge_series

from .compared import HOSTILE, comparison, passing

DATA = Path(__file__).parent / "data"
BENCHMARK = DATA / "pytest_benchmark_base.json"
ASV = DATA / "asv_samples.json"


def written(tmp_path: Path, data: Any, name: str = "results.json") -> Path:
    path = tmp_path / name
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def stored(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_pytest_benchmark_rounds_in_milliseconds_with_what_they_ran_on() -> None:
    results = read_results(BENCHMARK)
    assert results.source == "pytest-benchmark"
    assert list(results.benchmarks) == [
        "test_b.py::test_fast", "test_b.py::test_sort[10]", "test_b.py::test_sort[1000]",
    ]  # fmt: skip
    raw = stored(BENCHMARK)["benchmarks"][2]["stats"]
    seen = results.benchmarks["test_b.py::test_sort[1000]"]
    assert len(seen.samples_ms) == 50
    assert not seen.summary
    assert seen.samples_ms == pytest.approx([s * 1e3 for s in raw["data"]])
    assert sorted(seen.samples_ms)[24] <= raw["median"] * 1e3 <= sorted(seen.samples_ms)[25]
    assert results.facts.revision == stored(BENCHMARK)["commit_info"]["id"]
    assert results.facts.software["python"] == "3.11.7"
    assert results.facts.software["machine"] == "runner"
    assert results.created.endswith("+00:00")


def test_pytest_benchmark_without_rounds_is_a_summary() -> None:
    results = read_results(DATA / "pytest_benchmark_summary.json")
    assert all(t.summary and len(t.samples_ms) == 1 for t in results.benchmarks.values())
    assert len(results.benchmarks) == 3


def test_asv_times_with_their_parameters_and_nothing_else() -> None:
    results = read_results(ASV)
    assert results.source == "asv"
    assert list(results.benchmarks) == [
        "suite.Suite.time_sort(10, 'a')", "suite.Suite.time_sort(10, 'b')", "suite.Suite.time_sort(100, 'a')",
        "suite.Suite.time_sort(100, 'b')", "suite.time_sum",
    ]  # fmt: skip
    assert results.left_out == {
        "suite.peakmem_list": "no time", "suite.time_broken": "it failed", "suite.track_size": "no time",
    }  # fmt: skip
    third = stored(ASV)["results"]["suite.Suite.time_sort"][11][2]
    assert results.benchmarks["suite.Suite.time_sort(100, 'a')"].samples_ms == pytest.approx([s * 1e3 for s in third])
    assert results.facts.revision == stored(ASV)["commit_hash"]
    assert results.created == "2026-11-22T23:29:33+00:00", "when it ran, not when its commit was made"


def test_asv_without_samples_is_a_summary() -> None:
    results = read_results(DATA / "asv_summary.json")
    assert results.benchmarks["suite.time_sum"].summary
    assert results.benchmarks["suite.time_sum"].samples_ms == pytest.approx((8.279900066554545e-3,))


def test_asv_skipped_combinations_are_left_out_with_the_reason(tmp_path: Path) -> None:
    data = stored(ASV)
    data["results"]["suite.Suite.time_sort"][0][:2] = [None, float("nan")]
    results = read_results(written(tmp_path, data))
    assert results.left_out["suite.Suite.time_sort(10, 'a')"] == "it failed"
    assert results.left_out["suite.Suite.time_sort(10, 'b')"] == "it was skipped"
    assert "suite.Suite.time_sort(100, 'b')" in results.benchmarks


def test_benchmarks_are_judged_as_series_that_were_not_taken_side_by_side() -> None:
    found = compare_results(BENCHMARK, DATA / "pytest_benchmark_head.json")
    assert [c.name for c in found] == list(read_results(BENCHMARK).benchmarks)
    for c in found:
        assert not c.paired
        assert c.change is not None
        assert len(c.base_samples_ms) >= 50
        assert c.base.revision != c.head.revision
        judged = judge_series(c.base_samples_ms, c.head_samples_ms, max_slowdown=0.03)
        assert (c.verdict, c.reason, c.change) == (judged.verdict, judged.reason, judged.change)
        assert "side by side" in c.reason
    assert compare_results(BENCHMARK, DATA / "pytest_benchmark_head.json") == found, "ids are of the content"
    assert len({c.id for c in found}) == len(found)


def test_a_change_beyond_any_drift_is_decided(tmp_path: Path) -> None:
    data, steady = stored(BENCHMARK), [1e-3 + i % 5 * 1e-6 for i in range(80)]
    data["benchmarks"][0]["stats"]["data"] = steady
    base = written(tmp_path, data, "base.json")
    data["benchmarks"][0]["stats"]["data"] = [3 * s for s in steady]
    slow, *_ = compare_results(base, written(tmp_path, data, "head.json"))
    assert slow.verdict is Verdict.FAIL
    assert slow.change.value == pytest.approx(3, rel=1e-3)
    fast, *_ = compare_results(tmp_path / "head.json", base)
    assert fast.verdict is Verdict.PASS


def test_summaries_are_not_judged() -> None:
    found = compare_results(ASV, DATA / "asv_summary.json")
    assert {c.verdict for c in found} == {Verdict.INCONCLUSIVE}
    assert "asv run --record-samples" in found[0].reason
    assert found[0].change.low == 0.0
    found = compare_results(DATA / "pytest_benchmark_summary.json", BENCHMARK)
    assert "--benchmark-save-data" in found[0].reason


def test_what_only_one_file_has_is_told(tmp_path: Path) -> None:
    data = stored(ASV)
    data["results"]["suite.time_sum"] = [None, []]
    gone = data["results"].pop("suite.Suite.time_sort")
    data["results"]["suite.time_new"] = copy.deepcopy(gone)
    data["results"]["suite.time_kept"] = gone
    base = stored(ASV)
    base["results"]["suite.time_kept"] = gone
    found = {c.name: c for c in compare_results(written(tmp_path, base, "a.json"), written(tmp_path, data, "b.json"))}
    assert found["suite.time_sum"].reason == f"{tmp_path / 'b.json'} has no time of it: it failed"
    assert "b.json has no time of it: it is not there" in found["suite.Suite.time_sort(10, 'a')"].reason
    assert "a.json has no time of it: it is not there" in found["suite.time_new(10, 'a')"].reason
    assert found["suite.time_new(10, 'a')"].base_samples_ms == ()
    assert {c.verdict for c in found.values()} == {Verdict.INCONCLUSIVE}


def test_another_machine_is_told(tmp_path: Path) -> None:
    data = stored(BENCHMARK)
    data["machine_info"]["node"] = "other"
    found = compare_results(BENCHMARK, written(tmp_path, data))
    assert all("taken on different machines: machine runner and other" in c.notes for c in found)


def test_files_without_a_name_in_common_are_refused() -> None:
    with pytest.raises(ResultsError, match=r"pytest-benchmark, for example 'test_b.py::test_fast'.*asv.*in common"):
        compare_results(BENCHMARK, ASV)


def damaged(where: str, value: Any) -> dict[str, Any]:
    data = stored(ASV if where.startswith("asv") else BENCHMARK)
    _, *keys, last = (part.replace("@", ".") for part in where.split("."))
    place: Any = data
    for key in keys:
        place = place[int(key)] if isinstance(place, list) else place[key]
    if value is ...:
        del place[last]
    else:
        place[int(last) if isinstance(place, list) else last] = value
    return data


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ([1, 2], "holds no results"),
        ({"benchmarks": []}, "holds no results"),
        (damaged("pb.benchmarks", {}), r"`benchmarks` is an object, expected an array"),
        (damaged("pb.benchmarks.1", 3), r"benchmarks\[1\] is a number, expected an object"),
        (damaged("pb.benchmarks.1.fullname", ...), r"benchmarks\[1\]: `fullname` is missing, expected a string"),
        (damaged("pb.benchmarks.1.fullname", "test_b.py::test_fast"), r"there is a 'test_b.py::test_fast' already"),
        (damaged("pb.benchmarks.1.stats", None), r"`stats` is null, expected an object"),
        (damaged("pb.benchmarks.1.stats.data", "abc"), r"`stats.data` is a string, expected an array"),
        (damaged("pb.benchmarks.1.stats.data", [1, -1]), r"`stats.data` has -1 at 1, expected a positive number"),
        (damaged("pb.benchmarks.1.stats.data", [1, float("nan")]), r"`stats.data` has nan at 1"),
        (damaged("pb.benchmarks.1.stats.data", [True]), r"`stats.data` has True at 0"),
        (damaged("pb.machine_info", []), r"`machine_info` is an array, expected an object"),
        (damaged("pb.datetime", "yesterday"), r"does not say when it was measured: 'yesterday'"),
        (damaged("asv.version", 1), r"results of asv of version 1, expected one of"),
        (damaged("asv.results", []), r"`results` is an array, expected an object"),
        (damaged("asv.result_columns", ...), r"`result_columns` is missing"),
        (damaged("asv.results.suite@time_sum", 1), r"results\['suite.time_sum'\] is a number, expected an array"),
        (damaged("asv.results.suite@Suite@time_sort.1", [["10"]]), r"4 results for 1 combinations"),
        (damaged("asv.results.suite@time_sum.0", 3), r"`result` or `params` is no array"),
        (damaged("asv.results.suite@time_sum.11.0", [0.0]), r"`samples` has 0.0 at 0"),
    ],
)
def test_damaged_files_say_where(tmp_path: Path, data: Any, reason: str) -> None:
    path = written(tmp_path, data)
    with pytest.raises(ResultsError, match=reason) as raised:
        read_results(path)
    assert "results.json" in str(raised.value)


def test_files_that_cannot_be_read_say_why(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="no file"):
        read_results(tmp_path / "none.json")
    with pytest.raises(ResultsError, match="cannot be read"):
        read_results(tmp_path)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ResultsError, match="is not JSON"):
        read_results(tmp_path / "binary.json")


def test_which_files_are_results() -> None:
    assert is_results(stored(ASV))
    assert is_results(stored(BENCHMARK))
    assert not is_results(as_json(comparison()))
    assert not is_results([1.0, 2.0])


def test_comparisons_come_back_as_they_were(tmp_path: Path) -> None:
    for one in (comparison(), passing(), comparison(name=HOSTILE, change=Ratio(1.0, 0.0, float("inf")))):
        again = as_comparison(json.loads(json.dumps(as_json(one), allow_nan=False)))
        assert again == one
        assert isinstance(again, Comparison)
    path = written(tmp_path, as_json(passing()))
    assert read_comparisons(path) == (passing(),)
    both = {"schema_version": 1, "comparisons": [as_json(passing()), as_json(comparison())]}
    assert read_comparisons(written(tmp_path, both)) == (passing(), comparison())
    assert read_comparisons(written(tmp_path, [as_json(passing())])) == (passing(),)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"schema_version": 2}, "schema version 2, this kernel_pytorch reads up to 1"),
        ({"schema_version": None}, "is no comparison"),
        ({"verdict": "MAYBE"}, "corrupted at verdict"),
        ({"base": {"label": 3}}, "corrupted at base.label"),
        ({"base_samples_ms": ["x"]}, "corrupted at base_samples_ms.0"),
        ({"culprits": [3]}, "corrupted at culprits.0"),
    ],
)
def test_damaged_comparisons_say_where(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ResultsError, match=reason):
        read_comparisons(written(tmp_path, {**as_json(passing()), **changes}))
