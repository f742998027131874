"""Simulates how often the intervals of `measure.stats` cover the truth, and what a search decides with them.

    python benchmarks/interval_coverage.py -o benchmarks/results/simulation/interval_coverage.json

Noise is drawn for single samples in the order in which `measure.sampler` takes them (ABBA) and paired afterwards.
Recorded A/A series of an H100 (`results/nvidia-sm_90-1/aa_samples.json`) are resampled in blocks beside the models.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.signal import lfilter

from kernel_pytorch.core.types import Ratio
from kernel_pytorch.measure import sampler, stats

Noise = Callable[[np.random.Generator, int], np.ndarray]
"""`noise(generator, samples)` returns multiplicative factors of consecutive samples."""

Series = tuple[tuple[float, ...], tuple[float, ...]]

AA_SAMPLES = Path(__file__).parent / "results" / "nvidia-sm_90-1" / "aa_samples.json"
PAIRS = (8, 10, 15, 20, 30, 50, 100, 200)
TRUE_RATIO = 1.05


def gaussian(cv: float) -> Noise:
    return lambda g, n: np.maximum(0.2, 1.0 + cv * g.standard_normal(n))


def lognormal_tails(g: np.random.Generator, n: int) -> np.ndarray:
    return np.exp(0.01 * g.standard_normal(n)) + g.lognormal(-4.5, 1.2, n)


def spikes(g: np.random.Generator, n: int) -> np.ndarray:
    return (1.0 + 0.01 * g.standard_normal(n)) * np.where(g.random(n) < 0.05, 1.5, 1.0)


def ar1(phi: float, sd: float) -> Noise:
    def draw(g: np.random.Generator, n: int) -> np.ndarray:
        start = np.array([phi * g.standard_normal() * sd])
        x, _ = lfilter([1.0], [1.0, -phi], g.standard_normal(n) * sd * np.sqrt(1.0 - phi * phi), zi=start)
        return np.exp(x + 0.01 * g.standard_normal(n))

    return draw


def linear_drift(g: np.random.Generator, n: int) -> np.ndarray:
    return (1.0 + 0.01 * g.standard_normal(n)) * np.linspace(1.0, 1.3, n)


def bursts(g: np.random.Generator, n: int) -> np.ndarray:
    """Competing load that comes for about 12 samples and goes for about 30, and takes 15 to 60 % when there."""
    factor, i = np.ones(n), int(g.integers(0, 30))
    while i < n:
        length = int(g.geometric(1 / 12))
        factor[i : i + length] = 1.0 + g.uniform(0.15, 0.6)
        i += length + int(g.geometric(1 / 30))
    jitter = np.where(factor > 1.0, 0.08, 0.015)
    return factor * np.exp(jitter * g.standard_normal(n))


def blocks_of(series: np.ndarray, length: int = 20) -> Noise:
    """Resample a recorded series in blocks, so that its dependence survives."""
    relative = series / np.median(series)

    def draw(g: np.random.Generator, n: int) -> np.ndarray:
        starts = g.integers(0, len(relative) - length, size=n // length + 1)
        return np.concatenate([relative[s : s + length] for s in starts])[:n]

    return draw


def abba(noise: np.ndarray, ratio: float, g: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return baseline and candidate times of consecutive samples, taken in the sampler's order."""
    pairs = noise.reshape(-1, 2).copy()
    first = np.repeat(g.random((len(pairs) + 1) // 2) < 0.5, 2)[: len(pairs)]
    swapped = first ^ (np.arange(len(pairs)) % 2 == 1)
    pairs[swapped] = pairs[swapped, ::-1]
    return pairs[:, 0] * ratio, pairs[:, 1]


def coverage(noise: Noise, pairs: int, repeats: int, seed: int) -> dict[str, float]:
    """Return the share of repeats whose 95 % interval covers the truth, and the median width of the interval."""
    g = np.random.default_rng((seed, pairs))
    hits, widths = 0, []
    for _ in range(repeats):
        baseline, candidate = abba(noise(g, 2 * pairs), TRUE_RATIO, g)
        ratio = stats.paired_ratio(baseline.tolist(), candidate.tolist())
        hits += ratio.low <= TRUE_RATIO <= ratio.high
        widths.append(ratio.high / ratio.low - 1.0)
    return {"coverage": hits / repeats, "median_width": round(float(np.median(widths)), 5)}


def search(noise: Noise, speedups: list[float], min_gain: float, seed: int) -> tuple[int | None, int]:
    """Run one search over candidates of known speed as `measure.stats` prescribes it.

    Returns:
        The index of the candidate chosen (`None`: the unmodified model is kept), and how many pairs it took.
    """
    g = np.random.default_rng(seed)
    spent = 0

    def measure(speedup: float, stop: Callable[[Ratio], bool] | None, least: int, most: int) -> Series:
        nonlocal spent
        stream = iter(noise(g, 2 * most + 4).tolist())
        series = sampler.collect(
            lambda i: next(stream) / (speedup if i else 1.0),
            min_pairs=least,
            max_pairs=most,
            confidence=stats.SCREEN_CONFIDENCE,
            stop=stop,
            seed=int(g.integers(1 << 30)),
        )
        spent += len(series[0])
        return series

    contenders = []
    for index, speedup in enumerate(speedups):
        series = measure(speedup, stats.screen_stop(min_gain), 8, 120)
        ratio = stats.paired_ratio(*series)
        if stats.is_win(ratio, min_gain):
            contenders.append((ratio.value, index, stats.confirm_pairs(ratio, len(series[0]))))
    for _, index, pairs in sorted(contenders, reverse=True):
        if stats.confirmed(*measure(speedups[index], None, pairs, pairs), min_gain):
            return index, spent
    return None, spent


def decisions(noise: Noise, searches: int, candidates: int = 12) -> dict[str, float]:
    """Return how often identity candidates leave the model unmodified, and how often a 5 % win among them is found."""
    kept = found = pairs = 0
    for seed in range(searches):
        chosen, spent = search(noise, [1.0] * candidates, 0.02, seed)
        kept += chosen is None
        pairs += spent
        planted = [1.0] * candidates
        planted[seed % candidates] = 1.05
        found += search(noise, planted, 0.02, 10_000 + seed)[0] == seed % candidates
    return {
        "searches": searches,
        "identity_kept": kept,
        "planted_5_percent_found": found,
        "pairs_per_identity_search": round(pairs / searches, 1),
    }


MODELS: dict[str, Noise] = {
    "gaussian, CV 1 %": gaussian(0.01),
    "gaussian, CV 2 %": gaussian(0.02),
    "gaussian, CV 4 %": gaussian(0.04),
    "lognormal tails": lognormal_tails,
    "spikes of 50 %, p = 0.05": spikes,
    "AR(1) 0.9, sd 5 %": ar1(0.9, 0.05),
    "AR(1) 0.99, sd 5 %": ar1(0.99, 0.05),
    "linear drift of 30 %": linear_drift,
    "load that comes and goes": bursts,
}


def recorded() -> dict[str, Noise]:
    """Return noise resampled from the A/A series of a real device."""
    series = json.loads(AA_SAMPLES.read_text(encoding="utf-8"))["series"]
    return {f"A/A {name}": blocks_of(np.array(rows)[:, 0]) for name, rows in series.items()}


def one_drifts(phi: float, pairs: int, repeats: int) -> float:
    """Return the coverage where the log ratios of neighbouring pairs are correlated, as when one function drifts."""
    g = np.random.default_rng(pairs)
    hits = 0
    for _ in range(repeats):
        steps = g.standard_normal(pairs) * 0.02 * np.sqrt(1.0 - phi * phi)
        logs, _ = lfilter([1.0], [1.0, -phi], steps, zi=np.array([phi * g.standard_normal() * 0.02]))
        ratio = stats.paired_ratio(np.exp(logs).tolist(), [1.0] * pairs)
        hits += ratio.low <= 1.0 <= ratio.high
    return hits / repeats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--searches", type=int, default=50)
    options = parser.parse_args()
    models = {**MODELS, **recorded()}
    began = time.monotonic()
    table = {
        name: {str(n): coverage(noise, n, options.repeats, seed) for n in PAIRS}
        for seed, (name, noise) in enumerate(models.items())
    }
    outcome = {
        "what": "simulation of kernel_pytorch.measure.stats; no device is timed",
        "true_ratio": TRUE_RATIO,
        "confidence": 0.95,
        "repeats_per_cell": options.repeats,
        "min_gain": 0.02,
        "candidates_per_search": 12,
        "coverage_by_noise_and_pairs": table,
        "lowest_coverage": min(c["coverage"] for row in table.values() for c in row.values()),
        "coverage_by_correlation_of_pairs": {
            str(phi): {str(n): one_drifts(phi, n, options.repeats) for n in PAIRS} for phi in (0.3, 0.5)
        },
        "search_decisions": {name: decisions(noise, options.searches) for name, noise in models.items()},
        "environment": {"python": platform.python_version(), "numpy": np.__version__},
        "seconds": round(time.monotonic() - began, 1),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(outcome, indent=1) + "\n", encoding="utf-8")
    print(f"lowest coverage {outcome['lowest_coverage']:.3f}; wrote {options.output}")


if __name__ == "__main__":
    main()
