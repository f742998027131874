"""Learning in FP8 beside bf16: what makes a pair, how it is judged, and that runs can be stopped and joined."""

from __future__ import annotations

import json
import math
import sys
import threading
from dataclasses import replace

import pytest
import torch

from .loading import load

learning = load("float8_learning")
JOB = replace(learning.SMOKE, width=32, heads=2, layers=1, context=16, batch=2, steps=4, every=2, final_batches=3)


@pytest.fixture(scope="module")
def text():
    content = b"def f(x):\n    return x + 1\n" * 40
    parts = [torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in (content, content[::-1])]
    return learning.Text(*parts, {"digest": "of the test"})


def trained(variant, seed, text, *, job=JOB, late=lambda: False):
    return learning.train(job, variant, seed, text, late=late)


def run(variant, seed, final, **changed):
    made = {
        "variant": variant, "seed": seed, "complete": True, "diverged": False, "pairing": {"weights": seed},
        "final": final, "curve": [[2, 3.0], [4, final or 2.0]], "ms": 10.0, "seconds": 1.0, "losses": [],
    }  # fmt: skip
    return {**made, **changed}


def named(*runs):
    return {f"{r['variant']} seed {r['seed']}": r for r in runs}


def test_the_interval_is_the_one_computed_by_hand() -> None:
    found = learning.non_inferiority([0.001, 0.002, 0.003])
    assert found["mean"] == pytest.approx(0.002)
    assert found["upper"] == pytest.approx(0.002 + 2.919986 * 0.001 / math.sqrt(3), rel=1e-6)
    assert found["passed"]
    scattered = learning.non_inferiority([0.0, 0.004, 0.008])  # a mean under the margin is not enough
    assert scattered["upper"] == pytest.approx(0.004 + 2.919986 * 0.004 / math.sqrt(3), rel=1e-6)
    assert not scattered["passed"]
    assert learning.non_inferiority([-0.1]) == {
        "pairs": 1,
        "mean": -0.1,
        "upper": None,
        "margin": 0.005,
        "passed": False,
    }


def test_time_to_equal_loss_is_the_one_computed_by_hand() -> None:
    plain = run("bf16", 0, 2.0, curve=[[100, 4.0], [200, 3.0], [300, 2.0]], ms=10.0)
    other = run("rowwise", 0, 2.5, curve=[[100, 5.0], [200, 3.5], [300, 2.5]], ms=5.0)
    found = learning.time_to_equal_loss(plain, other)
    assert found == pytest.approx({"loss": 2.5, "bf16_seconds": 2.5, "seconds": 1.5, "ratio": 2.5 / 1.5})
    with pytest.raises(ValueError, match=r"never falls to 1\.9"):
        learning.reached(plain["curve"], 1.9)


def test_runs_of_a_seed_are_pairs_and_others_are_not(text) -> None:
    plain, again, other = trained("bf16", 3, text), trained("bf16", 3, text), trained("bf16", 4, text)
    assert plain["losses"] == again["losses"]
    assert plain["final"] == again["final"]
    assert plain["pairing"]["weights"] != other["pairing"]["weights"]
    assert plain["pairing"]["order"] != other["pairing"]["order"]
    for variant in learning.VARIANTS[1:]:
        small = trained(variant, 3, text)
        assert small["pairing"] == plain["pairing"]
        assert small["losses"] != plain["losses"], "the recipe did nothing"
        assert small["final"] == pytest.approx(plain["final"], rel=0.02)
        assert small["float8"]["kept"].keys() == (set() if variant.endswith("head") else {"head"})
        assert small["float8"]["layers"] == (5 if variant.endswith("head") else 4)
    with pytest.raises(ValueError, match="rowwise, seed 4: not a pair"):
        learning.summarise(named({**other, "variant": "bf16"}, {**plain, "variant": "rowwise", "seed": 4}))


def test_a_recipe_that_leaves_a_layer_out_is_an_error(text) -> None:
    with pytest.raises(ValueError, match="rowwise: the recipe is not on every linear layer"):
        trained("rowwise", 0, text, job=replace(JOB, width=40))


def test_the_loss_of_validation_is_that_of_all_its_batches(text) -> None:
    model, reader = learning.build(JOB, 0, "cpu"), learning.Reader(text.validation, JOB.context, "cpu")
    whole = learning.validation_loss(model, reader, JOB, 3)
    firsts = [learning.validation_loss(model, reader, JOB, n) * n for n in (1, 2, 3)]
    assert whole == pytest.approx(firsts[2] / 3)
    assert firsts[0] != firsts[1] - firsts[0]
    rows = reader(torch.tensor([0, 5]))
    assert rows.shape == (2, JOB.context + 1)
    assert torch.equal(rows[1], text.validation[5 : 6 + JOB.context].long())


def test_the_summary_is_of_pairs_that_are_complete() -> None:
    runs = [run("bf16", seed, 2.0, ms=12.0) for seed in range(3)]
    runs += [run("rowwise", 0, 2.004), run("rowwise", 1, 2.002), run("rowwise", 2, None, complete=False)]
    runs += [run("tensorwise_current", 0, 2.1), run("tensorwise_current", 1, None, diverged=True)]
    found = learning.summarise(named(*runs))
    assert found["rowwise"]["seeds"] == [0, 1]
    assert found["rowwise"]["differences"] == pytest.approx([0.002, 0.001])
    assert found["rowwise"]["speedup"] == pytest.approx(1.2)
    assert found["tensorwise_current"]["diverged"]
    assert not found["tensorwise_current"]["passed"]


def test_what_gets_late_is_told_to_be_incomplete(text) -> None:
    stopped = trained("bf16", 0, text, late=lambda: True)
    assert (stopped["complete"], len(stopped["losses"]), stopped["final"]) == (False, JOB.every, None)


def called(monkeypatch, path, *options):
    """Run the script with training replaced, and return what it trained."""
    trained = []

    def train(job, variant, seed, text, *, late):
        trained.append((variant, seed))
        return run(variant, seed, 2.0)

    monkeypatch.setattr(learning, "train", train)
    monkeypatch.setattr(sys, "argv", ["float8_learning.py", "-o", str(path), "--smoke", *options])
    learning.main()
    return trained


def test_what_is_there_is_not_run_again(monkeypatch, tmp_path, capsys, text) -> None:
    monkeypatch.setattr(learning, "read_text", lambda megabytes: text)
    path = tmp_path / "learning.json"
    assert called(monkeypatch, path, "--only", "bf16,rowwise", "--seed", "1") == [("bf16", 1), ("rowwise", 1)]
    assert called(monkeypatch, path, "--only", "rowwise,bf16") == [
        ("rowwise", 0), ("bf16", 0), ("rowwise", 2), ("bf16", 2),
    ]  # fmt: skip
    artefact = json.loads(path.read_text())
    assert artefact["summary"]["rowwise"]["seeds"] == [0, 1, 2]
    artefact["runs"]["rowwise seed 1"]["complete"] = False
    path.write_text(json.dumps(artefact))
    assert called(monkeypatch, path, "--only", "bf16,rowwise", "--deadline", "0.5") == []
    assert "would pass the deadline" in capsys.readouterr().out
    assert called(monkeypatch, path, "--only", "bf16,rowwise") == [("rowwise", 1)]
    with pytest.raises(SystemExit, match="is of another job"):
        called(monkeypatch, path, "--steps", "16")
    with pytest.raises(SystemExit, match="no such variant: row"):
        called(monkeypatch, path, "--only", "row")


def test_runs_of_several_processes_and_machines_come_together(monkeypatch, tmp_path) -> None:
    path, other, fresh = tmp_path / "one.json", tmp_path / "other.json", {"job": {"steps": 4}, "text": {"digest": "a"}}
    threads = [
        threading.Thread(target=learning.add, args=(path, fresh, named(run("bf16", seed, 2.0)))) for seed in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(learning.stored(path)["runs"]) == 8
    learning.add(other, fresh, named(run("rowwise", 3, 2.001)))
    monkeypatch.setattr(sys, "argv", ["float8_learning.py", "-o", str(path), "--merge", str(other)])
    learning.main()
    assert learning.stored(path)["summary"]["rowwise"]["seeds"] == [3]
    with pytest.raises(SystemExit, match="is of another text"):
        learning.add(path, {**fresh, "text": {"digest": "b"}}, {})


def test_runs_that_shared_a_gpu_have_times_of_those_that_did_not(monkeypatch, tmp_path) -> None:
    path, alone, fresh = tmp_path / "shared.json", tmp_path / "alone.json", {"job": {"steps": 4, "batch": 2}}
    text = {"text": {"digest": "a"}}
    learning.add(path, {**fresh, **text}, named(run("bf16", 0, 2.0, ms=90.0), run("rowwise", 0, 2.0, ms=99.0)))
    other = {"job": {"steps": 2, "batch": 2}, **text}
    learning.add(alone, other, named(run("bf16", 7, 3.0, ms=12.0), run("rowwise", 7, 3.0, ms=8.0)))
    monkeypatch.setattr(sys, "argv", ["float8_learning.py", "-o", str(path), "--timed", str(alone)])
    learning.main()
    assert learning.stored(path)["summary"]["rowwise"]["speedup"] == pytest.approx(1.5)
    assert learning.stored(path)["summary"]["rowwise"]["equal_loss"][0]["ratio"] == pytest.approx(1.5)
    # What comes later is told by the same times.
    learning.add(path, {**fresh, **text}, named(run("rowwise", 1, 2.0), run("bf16", 1, 2.0)))
    assert learning.stored(path)["summary"]["rowwise"]["ms"] == pytest.approx(8.0)
    other_job = tmp_path / "other.json"
    learning.add(other_job, {"job": {"steps": 4, "batch": 4}, **text}, named(run("bf16", 0, 2.0)))
    monkeypatch.setattr(sys, "argv", ["float8_learning.py", "-o", str(path), "--timed", str(other_job)])
    with pytest.raises(SystemExit, match="is of another job"):
        learning.main()


def test_no_file_is_both_for_training_and_for_validation() -> None:
    names = [f"python/module_{i}.py" for i in range(4000)]
    share = sum(map(learning.is_held_out, names)) / len(names)
    assert share == pytest.approx(1 / learning.HELD_OUT, abs=0.015)
    found = learning.read_text(0.3)
    told = found.told
    assert told["training_bytes"] == len(found.training) > 10 * JOB.context
    assert told["validation_bytes"] == len(found.validation) > 10 * JOB.context
    assert len(found.training) + len(found.validation) >= 3e5
    assert learning.read_text(0.3).told == told


def test_the_full_job_is_what_is_asked_for() -> None:
    job = learning.Job()
    with torch.device("meta"):
        model = learning.gpt_train.GPT(job.width, job.heads, job.layers, job.context)
    assert 9.5e7 < sum(p.numel() for p in model.parameters()) < 1.1e8
    assert job.steps >= 1000
    assert job.compiled
    rates = [learning.rate_of(step, job) for step in range(job.steps)]
    assert max(rates) == pytest.approx(job.rate)
    assert rates[0] == pytest.approx(job.rate / job.warmup)
    assert rates[-1] == pytest.approx(0.1 * job.rate, rel=0.01)
