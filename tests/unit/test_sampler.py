"""The sampler against functions of known speed on a machine whose clock is simulated, and against the real clock."""

from __future__ import annotations

import contextlib
import gc
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from kernel_pytorch.core.types import Ratio
from kernel_pytorch.measure.sampler import ForeignLoad, collect, compare


class Clockwork:
    """A device on which a function takes as long as it says, by a factor that changes with time."""

    vendor = "cpu"
    verified = True

    def __init__(self, factor: Callable[[int], float] = lambda i: 1.0) -> None:
        self.factor = factor
        self.elapsed_ms = 0.0
        self.timed: list[str] = []
        self.exclusive_now = False
        self.gc_seen: set[bool] = set()

    def run(self, name: str, ms: float) -> None:
        self.elapsed_ms += ms * self.factor(len(self.timed))
        self.last = name
        self.gc_seen.add(gc.isenabled())

    def function(self, name: str, ms: float) -> Callable[[], None]:
        return lambda: self.run(name, ms)

    def time_ms(self, fn: Callable[[], Any]) -> float:
        assert self.exclusive_now
        before = self.elapsed_ms
        fn()
        self.timed.append(self.last)
        return self.elapsed_ms - before

    def peak_bytes(self, fn: Callable[[], Any]) -> int | None:
        fn()
        return {"a": 100, "b": 70}[self.last]

    def telemetry(self) -> Mapping[str, float]:
        return {"sm_clock_mhz": 1700.0}

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        self.exclusive_now = True
        yield
        self.exclusive_now = False


class WallClock(Clockwork):
    def time_ms(self, fn: Callable[[], Any]) -> float:
        began = time.perf_counter()
        fn()
        return (time.perf_counter() - began) * 1e3

    def peak_bytes(self, fn: Callable[[], Any]) -> int | None:
        return None


def test_it_reports_ratio_samples_peaks_and_telemetry() -> None:
    device = Clockwork()
    measured = compare(
        device, device.function("a", 30.0), device.function("b", 20.0), max_seconds=60, min_pairs=8, max_pairs=12
    )
    assert measured.ratio.value == pytest.approx(1.5)
    assert measured.ratio.confidence == 0.95
    assert measured.baseline_samples_ms == (30.0,) * 12
    assert measured.samples_ms == (20.0,) * 12
    assert (measured.baseline_peak_bytes, measured.peak_bytes) == (100, 70)
    assert measured.telemetry["sm_clock_mhz"] == 1700.0
    assert measured.telemetry["calls_per_sample"] == 1.0
    assert measured.compile_seconds == 0.0
    assert not device.exclusive_now


def test_blocks_are_abba_or_baab_so_that_linear_drift_cancels() -> None:
    order: list[int] = []

    def sample(i: int) -> float:
        order.append(i)
        return 100.0 + len(order)

    baseline, candidate = collect(sample, min_pairs=8, max_pairs=40, confidence=0.95)
    blocks = {tuple(order[i : i + 4]) for i in range(0, len(order), 4)}
    assert blocks == {(0, 1, 1, 0), (1, 0, 0, 1)}
    assert len(baseline) == len(candidate) == 40
    assert sum(baseline) == sum(candidate)


def test_interference_with_a_period_of_four_samples_does_not_bias() -> None:
    count = 0

    def sample(i: int) -> float:
        nonlocal count
        count += 1
        return 12.0 if count % 4 in (0, 1) else 10.0  # with plain ABBA: always the baseline's

    baseline, candidate = collect(sample, min_pairs=8, max_pairs=200, confidence=0.95)
    assert 0.97 < sum(baseline) / sum(candidate) < 1.03


def test_strong_drift_leaves_the_ratio() -> None:
    device = Clockwork(lambda i: 1.0 + 0.05 * i)
    measured = compare(
        device, device.function("a", 10.5), device.function("b", 10.0), max_seconds=60, min_pairs=20, max_pairs=40
    )
    assert max(measured.samples_ms) > 3 * min(measured.samples_ms)
    assert measured.ratio.low <= 1.05 <= measured.ratio.high
    assert measured.ratio.value == pytest.approx(1.05, abs=0.01)


def test_stop_is_asked_from_min_pairs_on_at_growing_distances() -> None:
    looks: list[Ratio] = []

    def stop(ratio: Ratio) -> bool:
        looks.append(ratio)
        return len(looks) == 3

    times = collect(lambda i: 1.0 + i, min_pairs=8, max_pairs=200, confidence=0.99, stop=stop)
    assert len(times[0]) == 18  # looks at 8, 12 and 18
    assert {r.confidence for r in looks} == {0.99}


def test_the_time_limit_goes_before_the_number_of_pairs() -> None:
    device = WallClock()
    began = time.monotonic()
    measured = compare(device, lambda: time.sleep(0.05), lambda: time.sleep(0.05), max_seconds=0.5, min_pairs=50)
    assert time.monotonic() - began < 3.0
    assert 2 <= len(measured.samples_ms) < 50
    slow = compare(device, lambda: time.sleep(0.1), lambda: time.sleep(0.1), max_seconds=0.01)
    assert len(slow.samples_ms) == 2


def test_a_short_function_is_timed_many_calls_at_once() -> None:
    device = Clockwork()
    measured = compare(device, device.function("a", 0.01), device.function("b", 0.5), max_seconds=60, max_pairs=8)
    assert measured.telemetry["baseline_calls_per_sample"] == 500
    assert measured.telemetry["calls_per_sample"] == 10
    assert measured.baseline_samples_ms == pytest.approx([0.01] * 8)
    assert measured.ratio.value == pytest.approx(0.02)


def test_times_of_zero_are_no_error() -> None:
    device = Clockwork()
    both = compare(device, device.function("a", 0.0), device.function("b", 0.0), max_seconds=60, max_pairs=8)
    assert both.ratio.value == 1.0
    one = compare(device, device.function("a", 9.0), device.function("b", 0.0), max_seconds=60, max_pairs=8)
    assert one.ratio.value > 1000
    assert math.isfinite(one.ratio.value)


def test_warm_up_goes_on_until_neither_gets_faster_and_is_not_counted() -> None:
    device = Clockwork(lambda i: max(1.0, 6.0 - 0.5 * i))
    measured = compare(device, device.function("a", 10.0), device.function("b", 10.0), max_seconds=60, max_pairs=8)
    assert measured.samples_ms == (10.0,) * 8
    assert measured.baseline_samples_ms == (10.0,) * 8
    assert measured.telemetry["warm_up_calls"] >= 10


def test_garbage_collection_is_off_within_a_sample_and_back_on_afterwards() -> None:
    device = Clockwork()
    device.peak_bytes = lambda fn: None  # type: ignore[method-assign]
    compare(device, device.function("a", 9.0), device.function("b", 9.0), max_seconds=60, max_pairs=8)
    assert device.gc_seen == {False}
    assert gc.isenabled()


def test_what_a_function_raises_comes_out_and_leaves_no_trace() -> None:
    device = Clockwork()
    with pytest.raises(ZeroDivisionError):
        compare(device, device.function("a", 9.0), lambda: 1 // 0, max_seconds=60)
    assert gc.isenabled()


def spin(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_own_work_and_that_of_children_is_not_foreign() -> None:
    # Other work on this machine comes and goes, so what is asserted is what is booked as our own.
    before = ForeignLoad.now()
    spin(0.4)
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.4: pass"], check=True)
    after = ForeignLoad.now()
    assert 0.75 <= after.own - before.own <= 2.0
    assert after.busy - before.busy >= 0.7


def test_foreign_load_is_told() -> None:
    orphan = "import os,time\nif os.fork(): os._exit(0)\nend=time.time()+2.5\nwhile time.time()<end: pass"
    subprocess.run([sys.executable, "-c", orphan], check=True)
    measured = compare(WallClock(), lambda: time.sleep(0.02), lambda: time.sleep(0.02), max_seconds=1.0, max_pairs=16)
    assert measured.telemetry["foreign_load_cores"] > 0.3


def test_real_functions_on_the_real_clock() -> None:
    measured = compare(
        WallClock(), lambda: sum(range(60_000)), lambda: sum(range(30_000)), max_seconds=3.0, min_pairs=20, max_pairs=60
    )
    assert measured.ratio.low <= 2.1, "the interval lies above the truth"
    assert measured.ratio.high >= 1.9, "the interval lies below the truth"
    assert measured.ratio.low <= measured.ratio.value <= measured.ratio.high
    assert measured.median_ms < measured.baseline_median_ms
    assert measured.telemetry["calls_per_sample"] > 1
