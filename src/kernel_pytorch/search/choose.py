"""Which candidate to keep: the fastest that is right, confirmed on samples that did not choose it."""

from __future__ import annotations

from collections.abc import Iterable

from kernel_pytorch.core.types import Candidate, Ratio, Status, Trial
from kernel_pytorch.measure.stats import cautious, confirmed

__all__ = ["TIE", "finalists", "is_confirmed", "why_not"]

TIE = 0.99
"""Candidates within 1 % of the fastest tie with it, and the one with fewer steps is confirmed first."""


def finalists(trials: Iterable[Trial], min_gain: float, most: int = 3) -> list[Trial]:
    """Return what is worth confirming, in the order to try: the fastest, unless a simpler one ties with it.

    A screening that may be a win is enough here; the confirmation decides on fresh samples.
    """
    pool = [
        t
        for t in trials
        if t.status is Status.OK
        and t.candidate.steps
        and t.phase == "screen"
        and t.measurement is not None
        and _ratio(t).value >= 1.0 + min_gain / 2
    ]
    order: list[Trial] = []
    while pool and len(order) < most:
        top = max(cautious(_ratio(t)) for t in pool)
        tied = [t for t in pool if cautious(_ratio(t)) >= TIE * top]
        first = min(tied, key=lambda t: (len(t.candidate.steps), -cautious(_ratio(t))))
        order.append(first)
        pool.remove(first)
    return order


def is_confirmed(trial: Trial, min_gain: float) -> bool:
    """Whether fresh samples, of a number fixed before they were seen, show a gain of at least `min_gain`."""
    if trial.status is not Status.OK or trial.measurement is None:
        return False
    return confirmed(trial.measurement.baseline_samples_ms, trial.measurement.samples_ms, min_gain)


def why_not(trial: Trial, chosen: Candidate, min_gain: float, screened: Ratio | None = None) -> str:
    """Return in words why a trial was not chosen; empty for the chosen one.

    Args:
        trial: The trial.
        chosen: What was chosen; empty where the unmodified model is kept.
        min_gain: Smallest gain worth a changed model.
        screened: Ratio of the chosen candidate when it was screened, as the other trials were.
    """
    told = trial.candidate == chosen or trial.reason or not trial.candidate.steps
    if told or trial.status is not Status.OK or trial.measurement is None:
        return trial.reason
    ratio = trial.measurement.ratio
    if ratio.high < 1.0:
        return "slower than the unmodified model"
    if ratio.low <= 1.0 or ratio.value < 1.0 + min_gain:
        return f"no gain of {min_gain:.0%} or more that the noise allows to see"
    if not chosen.steps or screened is None:
        return "the gain was not confirmed on fresh samples"
    if cautious(ratio) >= TIE * cautious(screened):
        return "ties with the choice, which is simpler or was confirmed first"
    return f"{cautious(screened) / cautious(ratio) - 1.0:.0%} slower than the choice when both were screened"


def _ratio(trial: Trial) -> Ratio:
    assert trial.measurement is not None
    return trial.measurement.ratio
