"""Noise for `guard_power.py`: what two sides that take turns see, from models and from recorded A/A series.

A design is `design(generator, pairs)` and returns the times of base and head where nothing was changed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from interval_coverage import Noise, ar1, bursts, gaussian, linear_drift, lognormal_tails, spikes
from scipy.signal import lfilter

__all__ = [
    "APART",
    "SIMULATED",
    "Array",
    "Design",
    "adjacent",
    "apart",
    "noisier",
    "read_series",
    "resampled",
    "unrelated",
    "windows",
]

Array = npt.NDArray[np.float64]
Design = Callable[[np.random.Generator, int], tuple[Array, Array]]

SAMPLES = Path(__file__).parent / "data" / "h100_aa_samples.json"
NAMES = {
    "train_llama_h4096_L4_bs2_s2048": "training step",
    "train_llama_h768_L12_bs8_s512_launchbound": "launch-bound step",
}


def read_series() -> dict[str, Array]:
    """Return the recorded A/A series (GPU event times) by a short name."""
    series = json.loads(SAMPLES.read_text(encoding="utf-8"))["series"]
    return {NAMES[name]: np.array(rows)[:, 0] for name, rows in series.items()}


def adjacent(noise: Noise, *, order: str = "coin") -> Design:
    """Let two sides share one stream of noise by taking turns.

    Args:
        noise: Factors of consecutive samples.
        order: `coin` (ABBA or BAAB, as the sampler does) or `ABAB` (as people alternate by hand).
    """

    def draw(g: np.random.Generator, pairs: int) -> tuple[Array, Array]:
        stream = noise(g, 2 * pairs).reshape(-1, 2).copy()
        if order == "coin":
            first = np.repeat(g.random((pairs + 1) // 2) < 0.5, 2)[:pairs]
            swapped = first ^ (np.arange(pairs) % 2 == 1)
            stream[swapped] = stream[swapped, ::-1]
        return stream[:, 0], stream[:, 1]

    return draw


def unrelated(noise: Noise) -> Design:
    """Give each side its own stream: pairs that were never side by side, although they are called so."""
    return lambda g, pairs: (noise(g, pairs), noise(g, pairs))


def resampled(series: Array, length: int) -> Noise:
    """Resample a recorded series in blocks, so that its dependence survives."""

    def draw(g: np.random.Generator, n: int) -> Array:
        starts = g.integers(0, len(series) - length + 1, size=n // length + 1)
        return np.concatenate([series[s : s + length] for s in starts])[:n]

    return draw


def windows(series: Array) -> Noise:
    """Return the recorded series as it is, from a random sample on, and from its beginning again at its end."""

    def draw(g: np.random.Generator, n: int) -> Array:
        return np.roll(series, -int(g.integers(len(series))))[np.arange(n) % len(series)]

    return draw


def student(cv: float, freedom: float = 3.0) -> Noise:
    """Heavy symmetric tails with a coefficient of variation of `cv`."""
    scale = cv / np.sqrt(freedom / (freedom - 2.0))
    return lambda g, n: np.exp(scale * g.standard_t(freedom, n))


def tails(cv: float) -> Noise:
    """Long right tail: a constant and a lognormal part that makes all of the variation."""
    scale = cv / np.sqrt(np.exp(2.0) - np.exp(1.0))
    return lambda g, n: 1.0 + scale * g.lognormal(0.0, 1.0, n)


def own_ar1(phi: float, sd: float) -> Noise:
    """Levels that wander with a memory of `1 / (1 - phi)` samples, and nothing else."""

    def draw(g: np.random.Generator, n: int) -> Array:
        start = np.array([phi * g.standard_normal() * sd])
        logs, _ = lfilter([1.0], [1.0, -phi], g.standard_normal(n) * sd * np.sqrt(1.0 - phi * phi), zi=start)
        return np.exp(logs)

    return draw


SIMULATED: dict[str, tuple[float | None, Design]] = {
    "Gaussian, CV 0.5 %": (0.005, adjacent(gaussian(0.005))),
    "Gaussian, CV 1 %": (0.01, adjacent(gaussian(0.01))),
    "Gaussian, CV 2 %": (0.02, adjacent(gaussian(0.02))),
    "Gaussian, CV 4 %": (0.04, adjacent(gaussian(0.04))),
    "heavy tails (Student, 3 degrees), CV 2 %": (0.02, adjacent(student(0.02))),
    "heavy tails (Student, 3 degrees), CV 4 %": (0.04, adjacent(student(0.04))),
    "long right tail (lognormal), CV 2 %": (0.02, adjacent(tails(0.02))),
    "long right tail (lognormal), CV 4 %": (0.04, adjacent(tails(0.04))),
    "1 % and a tail of slow steps": (None, adjacent(lognormal_tails)),
    "1 % and spikes of 50 %, one in 20": (None, adjacent(spikes)),
    "1 % on a level that wanders by 5 % (AR 0.9)": (None, adjacent(ar1(0.9, 0.05))),
    "1 % on a level that wanders by 5 % (AR 0.99)": (None, adjacent(ar1(0.99, 0.05))),
    "1 % on a linear drift of 30 %": (None, adjacent(linear_drift)),
    "1.5 % and a load that comes and goes": (None, adjacent(bursts)),
    "each side wanders alone by 2 % (AR 0.6)": (None, unrelated(own_ar1(0.6, 0.02))),
}
"""By name: the coefficient of variation of one sample where it is that simple, and the design."""


def noisier(g: np.random.Generator, pairs: int) -> tuple[Array, Array]:
    """Return sides of one centre whose head is three times as noisy."""
    return np.exp(0.01 * g.standard_normal(pairs)), np.exp(0.03 * g.standard_normal(pairs))


def apart(level: Callable[[np.random.Generator, int], Array], *, gap: int = 0) -> Design:
    """Take one stretch of a device's time for the base and a later one for the head.

    Args:
        level: Factors of consecutive samples.
        gap: Samples between the two that nobody took.
    """

    def draw(g: np.random.Generator, samples: int) -> tuple[Array, Array]:
        stream = level(g, 2 * samples + gap)
        return stream[:samples], stream[samples + gap :]

    return draw


def walk(cv: float, step: float) -> Noise:
    """A level that goes its way in random steps, under white noise."""
    return lambda g, n: np.exp(np.cumsum(step * g.standard_normal(n)) + cv * g.standard_normal(n))


APART: dict[str, Design] = {
    "white noise, CV 0.5 %": apart(gaussian(0.005)),
    "white noise, CV 2 %": apart(gaussian(0.02)),
    "linear drift of 30 % over both": apart(linear_drift),
    "random walk, 0.2 % a sample": apart(walk(0.01, 0.002)),
    "random walk, 1 % a sample": apart(walk(0.01, 0.01)),
    "level that wanders by 5 % (AR 0.99)": apart(ar1(0.99, 0.05)),
    "load that comes and goes": apart(bursts),
}
