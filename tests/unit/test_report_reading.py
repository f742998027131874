from __future__ import annotations

from dataclasses import replace

from plan_factory import (
    BF16,
    COMPILE,
    INT8,
    THREADS,
    make_bare_plan,
    make_lost_plan,
    make_measurement,
    make_numerics,
    make_plan,
    make_prediction,
    won_trials,
)

from kernel_pytorch.core.types import Candidate, Check, Gate, NumericsReport, Status, Step, Trial
from kernel_pytorch.report import reading


def test_steps_are_shortened_only_where_the_word_says_it_all():
    assert reading.short_step(BF16) == "dtype(bfloat16)"
    assert reading.short_step(THREADS) == "threads(intra=2)"
    step = Step("compile", {"mode": "max-autotune", "dynamic": True, "regional": False, "scale": 1.5})
    assert reading.short_step(step) == "compile(dynamic, max-autotune, regional=False, scale=1.5)"
    assert reading.short(Candidate()) == "unmodified"


def test_rank_puts_the_chosen_first_and_the_confirmation_in_place_of_the_screening():
    plan = make_plan()
    ranked = reading.rank(plan)
    assert ranked[0] is plan.chosen
    assert ranked[0].phase == "confirm"
    assert len({t.candidate for t in ranked}) == len(ranked) == len({t.candidate for t in plan.evidence})
    usable = [t.measurement.ratio.value for t in ranked[1:] if t.status is Status.OK]
    assert usable == sorted(usable, reverse=True)
    first_bad = next(i for i, t in enumerate(ranked) if t.status is not Status.OK)
    assert all(t.status is not Status.OK for t in ranked[first_bad:])


def test_headline_of_a_win_states_interval_and_error():
    plan = make_plan()
    assert reading.headline(plan) == "2.84x faster"
    assert reading.sentence(plan) == "95 % interval 2.79 to 2.89, error 1.1e-2 of 2.0e-2 allowed"


def test_headline_where_nothing_won_names_the_best_loser():
    plan = make_lost_plan()
    assert reading.headline(plan) == "The unmodified model is kept"
    assert "compile(default), measured 1.00x [0.99, 1.02]" in reading.sentence(plan)
    assert "ran to the end" in reading.sentence(make_bare_plan())
    empty = make_bare_plan()
    empty = replace(empty, evidence=empty.evidence[:1])
    assert "no candidate could be tried" in reading.sentence(empty)


def test_missing_numerics_are_said():
    chosen = replace(won_trials()[-1], numerics=None)
    assert "numerics were not compared" in reading.sentence(make_plan(trials=(chosen,), chosen=chosen))


def test_why_prefers_the_recorded_reason_and_else_reads_the_figures():
    plan = make_plan()
    by_label = {reading.short(t.candidate): reading.why(plan, t) for t in reading.rank(plan)}
    assert by_label["aot_inductor"] == "no result within 180 s"
    assert by_label["threads(intra=2)"] == "slower than the unmodified model"
    assert by_label["compile(default)"] == "no measurable difference from the unmodified model"
    assert by_label["dtype(bfloat16)"].endswith("behind the winner (2.84x)")
    failed = Check("grad fc.weight", Gate.TRAINING, 0.3, 1e-3)
    wrong = Trial(Candidate((INT8,)), Status.WRONG, numerics=make_numerics(1e-3, failed=failed))
    assert reading.why(plan, wrong) == "grad fc.weight: error 3.0e-1, 1.0e-3 allowed"
    assert reading.why(plan, Trial(Candidate((INT8,)), Status.FAILED)) == "failed: no reason was recorded"


def test_error_is_that_of_the_precision_gate_or_unknown():
    assert reading.measured_error(Trial(Candidate(), Status.OK, numerics=make_numerics(1e-3))) == (1e-3, 2e-2)
    structure_only = NumericsReport((Check("output", Gate.STRUCTURE, 1.0, 1e-9),))
    assert reading.measured_error(Trial(Candidate(), Status.WRONG, numerics=structure_only)) is None


def test_ladder_goes_through_measured_prefixes_and_times_them_against_one_baseline():
    plan = make_plan()
    rungs = reading.ladder(plan)
    assert [r.added for r in rungs] == [(), (BF16,), (COMPILE,)]
    baseline = plan.chosen.measurement.baseline_median_ms
    assert [r.ms for r in rungs] == [baseline, baseline / 2.37, baseline / 2.84]


def test_ladder_invents_no_bar_for_what_was_not_measured():
    steps = (BF16, THREADS, COMPILE)
    chosen = Trial(Candidate(steps), Status.OK, measurement=make_measurement(3.0))
    wrong = Trial(Candidate((BF16,)), Status.WRONG, measurement=make_measurement(2.0))
    alone = Trial(Candidate((THREADS,)), Status.OK, measurement=make_measurement(1.1))
    plan = make_plan(trials=(wrong, alone, chosen), chosen=chosen)
    assert [r.added for r in reading.ladder(plan)] == [(), (THREADS,), (BF16, COMPILE)]
    assert reading.ladder(make_lost_plan()) == []


def test_ceilings_are_compared_with_the_step_alone_and_a_broken_one_shows():
    plan = make_plan()
    rows = {c.label: c for c in reading.ceilings(plan)}
    assert rows["dtype(bfloat16)"].kept is True
    assert rows["quantize(int8_weight_only)"].kept is None
    too_low = replace(make_prediction(), ceilings={str(BF16): 1.5})
    (broken,) = reading.ceilings(replace(plan, prediction=too_low))
    assert broken.kept is False


def test_layers_come_from_the_screening_where_the_confirmation_has_none():
    trials = (*won_trials()[:-1], replace(won_trials()[-1], layers_ms={}))
    assert reading.layers(make_plan(trials=trials))["encoder"] == (240.0, 84.0)
    assert reading.layers(make_lost_plan()) == {}


def test_next_commands_take_target_and_directory_from_the_command():
    plan = make_plan(command="kpt optimize --mode training --resume 'my dir/m.py:f' --budget=60 -o out/x")
    commands = [c for _, c in reading.next_commands(plan, "elsewhere")]
    assert "kpt apply out/x 'my dir/m.py:f'" in commands
    assert "kpt eject out/x 'my dir/m.py:f'" in commands
    unknown = [c for _, c in reading.next_commands(make_bare_plan(), "some where")]
    assert "kpt optimize TARGET --budget thorough -o 'some where'" in unknown
    assert not any("apply" in c for c in unknown)


def test_untried_are_grouped_by_reason():
    assert reading.untried_by_reason(make_plan())[0] == (
        "the budget of 240 s was spent",
        ["dtype(bfloat16) + aot_inductor"],
    )
