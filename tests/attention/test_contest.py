"""The decision, on times that are made up: what a busy host, a late compilation and ties may not do to it."""

from __future__ import annotations

import contextlib
import random
from types import SimpleNamespace

import pytest
import torch

from kernel_pytorch.attention import timing
from kernel_pytorch.attention.contest import decide, winner
from kernel_pytorch.attention.timing import Samples, Stopwatch, _settle


class Made:
    """A stopwatch of made-up times: `device` and `host` milliseconds by name, and what disturbs them."""

    def __init__(self, device, host, disturb=lambda name, call, ms: ms, seed=0):
        self.device, self.host, self.disturb = device, host, disturb
        self.names, self.crawling, self.has_host = list(device), {}, bool(host)
        self.random, self.calls = random.Random(seed), 0
        self.asked = []

    def _noisy(self, name, ms):
        self.calls += 1
        return self.disturb(name, self.calls, ms * self.random.uniform(0.995, 1.005))

    def in_turns(self, names, *, rounds, max_seconds, drop=False):
        self.asked.append(("single", tuple(names)))
        found = {name: Samples() for name in names}
        for _ in range(rounds):
            for name in names:
                found[name].device.append(self._noisy(name, self.device[name]))
                if self.host:
                    found[name].host.append(self._noisy(name, self.host[name]))
        return found

    def back_to_back(self, names, *, calls, rounds, max_seconds, drop=0.0):
        self.asked.append(("many", tuple(names)))
        found = {name: [] for name in names}
        for _ in range(rounds):
            for name in names:
                found[name].append(self._noisy(name, max(self.device[name], self.host[name])))
        return found


def test_the_fastest_on_the_device_and_from_python_are_two():
    found = decide(Made({"fa3": 0.10, "sdpa": 0.15, "flash": 0.2}, {"fa3": 0.3, "sdpa": 0.05, "flash": 0.06}))
    assert (found.compiled, found.eager) == ("fa3", "sdpa")
    assert found.eager_ms["sdpa"] == pytest.approx(0.15, rel=0.02)


def test_where_the_host_is_hidden_only_the_device_is_asked():
    clock = Made({"fa3": 10.0, "sdpa": 11.5}, {"fa3": 0.9, "sdpa": 0.2})
    found = decide(clock)
    assert (found.compiled, found.eager) == ("fa3", "fa3")
    assert all(kind == "single" for kind, _ in clock.asked)


def test_what_the_device_is_slow_at_may_win_from_python():
    found = decide(
        Made({"fa4": 0.03, "flash": 0.055, "sdpa": 0.10}, {"fa4": 0.14, "flash": 0.06, "sdpa": 0.17}),
    )
    assert (found.compiled, found.eager) == ("fa4", "flash")


@pytest.mark.parametrize("seed", range(20))
def test_ties_and_doubts_go_to_plain(seed):
    found = decide(
        Made({"cudnn": 0.3, "fa3": 0.2985, "sdpa": 0.3}, {"cudnn": 0.3, "fa3": 0.31, "sdpa": 0.3}, seed=seed)
    )
    assert (found.compiled, found.eager) == ("sdpa", "sdpa")


@pytest.mark.parametrize("seed", range(20))
def test_a_series_of_hiccups_does_not_decide(seed):
    """Half of the first series is twice as slow for all but one implementation."""

    def busy(name, call, ms):
        return ms * 2.0 if call <= 20 and name != "flash" else ms

    device = {"fa3": 0.24, "sdpa": 0.27, "flash": 0.40}
    found = decide(Made(device, {"fa3": 0.9, "sdpa": 0.25, "flash": 0.3}, busy, seed))
    assert (found.compiled, found.eager) == ("fa3", "sdpa")


@pytest.mark.parametrize("seed", range(20))
def test_single_outliers_do_not_decide(seed):
    source = random.Random(seed)

    def outlier(name, call, ms):
        return ms * 8.0 if source.random() < 0.15 else ms

    device = {"fa3": 0.24, "fa4": 0.245, "sdpa": 0.27, "efficient": 0.8}
    found = decide(Made(device, dict.fromkeys(device, 0.02), outlier, seed))
    assert found.compiled in ("fa3", "fa4")
    assert found.eager in ("fa3", "fa4")


def test_the_winner_needs_most_rounds():
    plain = [1.0] * 10
    assert winner({"sdpa": plain, "fa3": [0.97] * 10}, margin=0.015) == "fa3"
    assert winner({"sdpa": plain, "fa3": [0.99] * 10}, margin=0.015) == "sdpa"
    assert winner({"sdpa": plain, "fa3": [0.9] * 7 + [1.2] * 3}, margin=0.015) == "sdpa"
    assert winner({"fa4": plain, "fa3": [0.99] * 10}, margin=0.015) == "fa3"


class Stepping:
    """A clock that counts, in place of `Stopwatch`'s: milliseconds of a function are what it returns."""

    def __init__(self):
        self.order = []

    def warm_up(self, name, fn):
        return float(fn())

    def sample(self, name, fn, samples):
        self.order.append(name)
        samples.device.append(float(fn()))

    def back_to_back(self, fn, calls):
        return sum(float(fn()) for _ in range(calls)) / calls


@pytest.fixture
def stopwatch(monkeypatch):
    def make(**times):
        clock = Stepping()
        monkeypatch.setattr("kernel_pytorch.attention.timing._CpuClock", lambda: clock)
        watch = Stopwatch({name: (lambda ms=ms: ms) for name, ms in times.items()}, torch.device("cpu"))
        return watch, clock

    return make


def test_what_is_slow_by_the_host_alone_is_timed_and_what_crawls_is_not(stopwatch):
    watch, _ = stopwatch(sdpa=0.15, fa4=1.1, math=6.0)
    assert watch.names == ["sdpa", "fa4"]
    assert watch.crawling == {"math": 6.0}


def test_turns_change_and_the_hopeless_are_dropped(stopwatch):
    watch, clock = stopwatch(sdpa=1.0, fa3=0.9, efficient=2.0)
    samples = watch.in_turns(watch.names, rounds=6, drop=True)
    assert {name: len(one.device) for name, one in samples.items()} == {"sdpa": 6, "fa3": 6, "efficient": 3}
    assert clock.order[:6] == ["sdpa", "fa3", "efficient", "efficient", "fa3", "sdpa"]
    many = watch.back_to_back(["sdpa", "fa3", "efficient"], calls=3, rounds=5, drop=1.5)
    assert {name: len(times) for name, times in many.items()} == {"sdpa": 5, "fa3": 5, "efficient": 2}
    assert len(watch.in_turns(["sdpa"], rounds=9, max_seconds=0.0)["sdpa"].device) == 3


def test_settling_waits_for_a_late_compilation():
    times = iter([900.0, 40.0, 1.0, 0.9, 7.0])
    assert _settle(lambda: next(times)) == 0.9
    assert next(times) == 7.0


class Cuda:
    """What the clock asks of `torch.cuda`: the device is `ahead` where it began before the host had queued all."""

    def __init__(self, ahead):
        self.ahead, self.covers = iter(ahead), []

    def Event(self, *, enable_timing):
        cuda = self

        class Event:
            def record(self):
                assert enable_timing

            def query(self):
                return next(cuda.ahead)

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return 0.25 * len(cuda.covers)

        return Event()

    def _sleep(self, cycles):
        self.covers.append(cycles)

    def synchronize(self, device):
        pass

    def device(self, device):
        return contextlib.nullcontext()


@pytest.mark.parametrize(("ahead", "kept"), [([False], 0.25), ([True, False], 0.5), ([True] * 3, 0.75)])
def test_a_sample_that_the_device_began_early_is_taken_again(monkeypatch, ahead, kept):
    cuda = Cuda(ahead)
    monkeypatch.setattr(timing, "torch", SimpleNamespace(cuda=cuda, empty=torch.empty, int8=torch.int8))
    monkeypatch.setattr(timing, "detect", lambda _: None)
    monkeypatch.setattr(timing, "cache_bytes", lambda _: 0)
    clock = timing._CudaClock(torch.device("cpu"))
    ran = []
    assert clock.warm_up("fa4", lambda: ran.append(1)) >= 0.0
    samples = Samples()
    clock.sample("fa4", lambda: ran.append(1), samples)
    assert samples.device == [kept]
    assert len(samples.host) == 1
    assert len(cuda.covers) == len(ahead)
    assert all(longer >= 2 * shorter for shorter, longer in zip(cuda.covers, cuda.covers[1:], strict=False))
    before = len(ran)
    assert clock.back_to_back(lambda: ran.append(1), 20) >= 0.0
    assert len(ran) == before + 20
