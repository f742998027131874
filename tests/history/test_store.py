"""What a history holds: the same in SQLite and in PostgreSQL."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from kernel_pytorch.core.types import Ratio, Verdict
from kernel_pytorch.guard.history import History, HistoryError, codec, open_history
from kernel_pytorch.guard.types import Comparison, Culprit, SideFacts
from tests.history.made import START, make_run


def test_a_run_comes_back_as_it_was(url):
    history = History(url)
    run = make_run()
    receipt = history.record(run)
    assert (receipt.stored, receipt.waiting, receipt.message) == (True, 0, "")
    assert History(url).runs() == [run]
    assert history.waiting() == []


def test_a_run_without_samples_comes_back(url):
    run = Comparison("check", "m", Verdict.INCONCLUSIVE, "the worker crashed", 0.03, SideFacts("a"), SideFacts("b"),
                     "2026-11-22T10:00:00Z", "x")  # fmt: skip
    History(url).record(run)
    assert History(url).runs() == [run]


def test_texts_that_databases_dislike_come_back(url):
    nasty = "'; DROP TABLE kpt_runs; --\0 % %s \ud800 \N{ROCKET} \x1b[31m"
    evidence = {"share": math.inf, "text": nasty}
    run = make_run(name=nasty, reason=nasty, id="id " + nasty, notes=(nasty,), command=nasty,
                   culprits=(Culprit("k", nasty, math.inf, evidence),))  # fmt: skip
    history = History(url)
    assert history.record(run).message == ""
    history.record(run)
    assert history.runs() == [run]
    assert history.runs(nasty) == [run]
    assert history.run(run.id) == run


def test_numbers_that_are_none_come_back(url):
    run = make_run(change=Ratio(math.nan, -math.inf, math.inf), base_samples_ms=(math.nan, math.inf))
    history = History(url)
    assert history.record(run).message == ""
    (found,) = history.runs()
    assert math.isnan(found.change.value)
    assert (found.change.low, found.change.high) == (-math.inf, math.inf)
    assert math.isnan(found.base_samples_ms[0])


def test_the_same_id_is_stored_once_and_the_first_stays(url):
    history = History(url)
    history.record(make_run(seconds=1.0))
    history.record(make_run(seconds=2.0))
    assert [run.seconds for run in history.runs()] == [1.0]


def test_runs_are_chosen_by_name_time_and_number(url):
    history = History(url)
    for number in (3, 0, 2, 1):
        history.record(make_run(number, name="a" if number % 2 else "b"))
    ids = lambda runs: [int(run.id[-6:]) for run in runs]  # noqa: E731
    assert ids(history.runs()) == [0, 1, 2, 3]
    assert ids(history.runs("a")) == [1, 3]
    assert ids(history.runs(limit=2)) == [2, 3]
    assert ids(history.runs("b", limit=1)) == [2]
    assert ids(history.runs(since=START + timedelta(days=2))) == [2, 3]
    assert ids(history.runs(since="2026-09-03")) == [2, 3]
    assert ids(history.runs(since="2026-09-03T14:00:00+01:00")) == [3]
    assert history.names() == ["a", "b"]
    assert history.runs("nobody") == []


def test_times_in_other_zones_sort_as_moments(url):
    history = History(url)
    history.record(make_run(1, created="2026-09-01T12:00:00+02:00"))
    history.record(make_run(2, created="2026-09-01T11:00:00Z"))
    assert [run.id for run in history.runs()] == ["run-000001", "run-000002"]


def test_a_run_is_found_by_the_beginning_of_its_id(url):
    history = History(url)
    for number in (1, 2, 20):
        history.record(make_run(number, id=f"{number}%_"))
    assert history.run("20") == make_run(20, id="20%_")
    assert history.run("2%_") == make_run(2, id="2%_")
    with pytest.raises(HistoryError, match="more than one"):
        history.run("2")
    for unknown in ("9", "%", "", "1%_x"):
        with pytest.raises(HistoryError, match="no run"):
            history.run(unknown)


def test_old_runs_are_pruned_and_what_any_rule_keeps_stays(url):
    history = History(url)
    now = datetime.now(UTC)
    for days in range(6):
        for name in ("a", "b"):
            created = (now - timedelta(days=days, minutes=1)).isoformat(timespec="seconds")
            history.record(make_run(days, id=f"{name}{days}", name=name, created=created))
    history.record(make_run(id="c9", name="c", created=(now - timedelta(days=9)).isoformat(timespec="seconds")))
    assert history.prune(keep_days=3, keep_runs=1) == 6
    assert sorted(run.id for run in history.runs()) == ["a0", "a1", "a2", "b0", "b1", "b2", "c9"]
    assert history.prune(keep_runs=2) == 2
    assert sorted(run.id for run in history.runs()) == ["a0", "a1", "b0", "b1", "c9"]
    assert history.prune(keep_days=30) == 0
    assert history.prune(keep_days=0) == 5
    assert history.runs() == []


def test_pruning_gives_the_disk_back(tmp_path):
    history = History(str(tmp_path / "h.sqlite"))
    for number in range(20):
        history.record(make_run(number, head_samples_ms=tuple(float(i) for i in range(5000))))
    before = (tmp_path / "h.sqlite").stat().st_size
    history.prune(keep_runs=1)
    assert (tmp_path / "h.sqlite").stat().st_size < before / 5


@pytest.mark.parametrize("arguments", [{}, {"keep_days": -1}, {"keep_runs": -1}, {"keep_days": math.nan}])
def test_pruning_needs_a_rule(arguments, tmp_path):
    with pytest.raises(HistoryError):
        History(str(tmp_path / "h.sqlite")).prune(**arguments)


def test_json_export_holds_everything(url):
    history = History(url)
    assert history.export("json") == "[]\n"
    runs = [make_run(number) for number in range(3)]
    for run in runs:
        history.record(run)
    found = json.loads(history.export("json"))
    assert [codec.from_plain(values) for values in found] == runs


def test_csv_export_has_one_line_a_run(url):
    history = History(url)
    runs = [
        make_run(),
        make_run(1, name='with "quotes", and\nlines', change=None, base_samples_ms=(), head_samples_ms=()),
    ]
    for run in runs:
        history.record(run)
    lines = list(csv.DictReader(io.StringIO(history.export("csv"), newline="")))
    assert [line["name"] for line in lines] == [run.name for run in runs]
    first, second = lines
    assert (first["change"], first["base_ms"], first["head_ms"]) == ("1.01", "10.125", "10.2")
    assert (first["head_samples"], first["head_dirty"], first["base_dirty"]) == ("3", "true", "false")
    assert first["head_software"] == "torch=2.12.1; python=3.11.7"
    assert (second["change"], second["head_ms"], second["head_samples"]) == ("", "", "0")


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(HistoryError, match="xml"):
        History(str(tmp_path / "h.sqlite")).export("xml")


@pytest.mark.parametrize(("arguments", "match"), [({"limit": 0}, "limit"), ({"since": "yesterday"}, "not a date")])
def test_bad_questions_are_refused(arguments, match, tmp_path):
    with pytest.raises(HistoryError, match=match):
        History(str(tmp_path / "h.sqlite")).runs(**arguments)


def test_a_created_that_is_no_time_costs_no_run(url):
    history = History(url)
    receipt = history.record(make_run(created="yesterday"))
    assert not receipt.stored
    assert "yesterday" in receipt.message
    receipt = history.record(make_run(1))
    assert receipt.stored
    (kept,) = history.waiting()
    assert receipt.message.endswith(f"it stays in {kept}")
    assert receipt.fix == f"rm {kept} gives it up"
    assert history.runs() == [make_run(1)]


def test_where_a_history_is(tmp_path, monkeypatch, state):
    assert History().address.path == state / "history.sqlite"
    monkeypatch.setenv("KPT_HISTORY", str(tmp_path / "from environment.db"))
    assert History().address.path == tmp_path / "from environment.db"
    assert History(f"sqlite:///{tmp_path}/a%20b.db").address.path == tmp_path / "a b.db"
    monkeypatch.chdir(tmp_path)
    assert History("sqlite:///c.db").address.path == tmp_path / "c.db"
    monkeypatch.setenv("KPT_HISTORY", "none")
    assert open_history() is None
    assert open_history("d.db").address.path == tmp_path / "d.db"
    with pytest.raises(HistoryError, match="no history"):
        History()


def test_odd_file_names_are_files(tmp_path):
    path = tmp_path / "a?b%20c #d.sqlite"
    History(str(path)).record(make_run())
    assert path.exists()
    assert History(str(path)).runs() == [make_run()]


@pytest.mark.parametrize(
    "text",
    ["mysql://u:secret@h/d", "sqlite://", "sqlite:///", "sqlite:///x?mode=ro", "postgresql://u:secret@h",
     "postgresql://u:secret@h:port/d", "postgresql://u:secret@[h/d"],
)  # fmt: skip
def test_an_address_that_is_none_is_refused_without_its_password(text):
    with pytest.raises(HistoryError) as caught:
        History(text)
    assert caught.value.fix
    assert "secret" not in f"{caught.value} {caught.value.fix}"


def test_a_password_is_neither_shown_nor_part_of_the_identity():
    first = History("postgres://me:s3cret@db.example:5433/perf?sslmode=require&password=s3cret").address
    second = History("postgresql://me:other@db.example:5433/perf?sslmode=require").address
    assert first.shown == second.shown == "postgresql://me@db.example:5433/perf?sslmode=require"
    assert first.key == second.key
    assert "s3cret" in first.url
    assert first.url.startswith("postgresql+psycopg://")


def test_runs_of_a_newer_version_are_read():
    values = codec.to_plain(make_run()) | {"a_new_field": 1}
    assert codec.from_plain(values) == make_run()


@pytest.mark.parametrize(
    "text", ["", "[]", "null", '{"kind": 1}', '{"culprits": 3}', '{"culprits": [1]}', "[" * 100_000]
)
def test_what_is_no_run_is_refused(text):
    with pytest.raises(HistoryError):
        codec.loads(text)


def test_a_run_survives_text(tmp_path):
    run = make_run()
    assert codec.loads(codec.dumps(run)) == run
    assert codec.loads(codec.dumps(replace(run, change=None))).change is None
