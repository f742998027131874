"""Load a server with concurrent clients and compare the plan with the unmodified model, in one run.

    python examples/production/serve_minilm/load.py --plan out/serve

Starts `server.py --compare` on this machine, checks first that both routes give the same embeddings, then loads them
in turn (plan, unmodified, unmodified, plan: slow drift hits both alike) and prints throughput and latencies. Bounded
in clients and in time, and only ever talks to the loopback interface.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import minilm  # noqa: E402
from server import ROUTE, UNMODIFIED_ROUTE  # noqa: E402

MIN_COSINE = 0.999


@dataclass
class Load:
    """What one route answered: a time for each block of the run, and the latencies of all of them."""

    answered: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    latencies_ms: list[float] = field(default_factory=list)
    refused: int = 0
    failed: int = 0

    def throughput(self) -> list[float]:
        """Return answers a second of each block."""
        return [n / s for n, s in zip(self.answered, self.seconds, strict=True)]

    def summary(self) -> dict[str, float]:
        """Return the figures people ask for."""
        if not self.latencies_ms:
            return {"refused": self.refused, "failed": self.failed}
        ordered = sorted(self.latencies_ms)
        at = {f"p{q}_ms": ordered[min(len(ordered) * q // 100, len(ordered) - 1)] for q in (50, 95, 99)}
        rate = statistics.median(self.throughput())
        return {"requests_per_s": rate, **at, "refused": self.refused, "failed": self.failed}


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def serving(arguments: list[str], *, start_s: float) -> Iterator[str]:
    """Run `server.py` with some arguments and yield its address; ends it with SIGTERM, as an orchestrator does.

    Raises:
        RuntimeError: It ended before it was ready, or was not ready in time.
    """
    port = free_port()
    command = [sys.executable, str(HERE / "server.py"), *arguments, "--port", str(port)]
    process = subprocess.Popen(command, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + start_s
        while True:
            if process.poll() is not None:
                raise RuntimeError(f"the server ended with exit code {process.returncode} before it was ready")
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/ready", timeout=1.0).status_code == httpx.codes.OK:
                    break
            if time.monotonic() > deadline:
                raise RuntimeError(f"the server was not ready within {start_s:.0f} s")
            time.sleep(0.1)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(45)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


async def worst_cosine(url: str, texts: list[str]) -> float:
    """Return the smallest cosine between what the two routes answer for the same text."""
    async with httpx.AsyncClient(base_url=url, timeout=30.0) as client:
        found = []
        for text in texts:
            answers = [await client.post(route, json={"text": text}) for route in (ROUTE, UNMODIFIED_ROUTE)]
            ours, theirs = (answer.raise_for_status().json()["embedding"] for answer in answers)
            found.append(sum(a * b for a, b in zip(ours, theirs, strict=True)))  # both have unit length
    return min(found)


async def block(url: str, route: str, *, clients: int, seconds: float, seed: int, into: Load) -> None:
    """Let some clients ask one after the other for some time; what is in flight at the end is waited for."""
    texts = random.Random(seed).sample(minilm.passages(), 256)
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=30.0, limits=limits) as client:
        started = time.perf_counter()
        end = started + seconds
        answered = 0

        async def ask(number: int) -> None:
            nonlocal answered
            turn = number
            while (sent := time.perf_counter()) < end:
                answer = await client.post(route, json={"text": texts[turn % len(texts)]})
                turn += clients
                if answer.status_code == httpx.codes.OK:
                    answered += 1
                    into.latencies_ms.append((time.perf_counter() - sent) * 1e3)
                elif answer.status_code == httpx.codes.SERVICE_UNAVAILABLE:
                    into.refused += 1
                    await asyncio.sleep(0.05)
                else:
                    into.failed += 1

        await asyncio.gather(*(ask(n) for n in range(clients)))
        into.seconds.append(time.perf_counter() - started)
        into.answered.append(answered)


def plan_calls(url: str) -> dict[str, float]:
    """Return from `/metrics` how many calls of the model the plan covered, and how many it did not."""
    lines = httpx.get(f"{url}/metrics").raise_for_status().text.splitlines()
    counted = (line for line in lines if line.startswith("embed_plan_calls_total{"))
    return {line.split('where="')[1].split('"')[0]: float(line.rsplit(" ", 1)[1]) for line in counted}


async def compare(url: str, *, clients: int, seconds: float, rounds: int) -> dict[str, Load]:
    """Load both routes in turn, a warm-up of both first."""
    for route in (ROUTE, UNMODIFIED_ROUTE):
        await block(url, route, clients=clients, seconds=min(seconds, 2.0), seed=0, into=Load())
    loads = {ROUTE: Load(), UNMODIFIED_ROUTE: Load()}
    for turn in range(rounds):
        for route in (ROUTE, UNMODIFIED_ROUTE, UNMODIFIED_ROUTE, ROUTE):
            await block(url, route, clients=clients, seconds=seconds, seed=turn + 1, into=loads[route])
    return loads


def bounded(low: float, high: float):
    """Return an argument parser for numbers in a range, so that a slip does not load a machine for hours."""

    def parse(text: str) -> float:
        value = float(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be from {low:g} to {high:g}, got {text}")
        return value

    return parse


def main(argv: list[str] | None = None) -> int:
    """Start the server, compare, print; exit 1 where the answers differ or a request failed."""
    parser = argparse.ArgumentParser(description="Compare a plan with the unmodified model behind one server.")
    parser.add_argument("--plan", required=True, help="directory that `kpt optimize -o` wrote")
    parser.add_argument("--workload", help="what the plan was made for; the server's own default where absent")
    parser.add_argument("--clients", type=bounded(1, 64), default=16)
    parser.add_argument("--seconds", type=bounded(0.2, 60), default=5.0, help="of one block")
    parser.add_argument("--rounds", type=bounded(1, 20), default=3, help="of four blocks: A B B A")
    parser.add_argument("--start-s", type=bounded(1, 600), default=300.0, help="what the server may take to be ready")
    parser.add_argument("--trust-artifacts", action="store_true")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args(argv)

    options = ["--plan", arguments.plan, "--compare"]
    options += ["--workload", arguments.workload] if arguments.workload else []
    options += ["--trust-artifacts"] if arguments.trust_artifacts else []
    with serving(options, start_s=arguments.start_s) as url:
        cosine = asyncio.run(worst_cosine(url, random.Random(0).sample(minilm.passages(), 8)))
        if cosine < MIN_COSINE:
            print(f"the routes differ: cosine {cosine:.5f} < {MIN_COSINE}; no times", file=sys.stderr)
            return 1
        print(f"answers agree: cosine >= {cosine:.6f}", file=sys.stderr)
        clients, rounds = int(arguments.clients), int(arguments.rounds)
        loads = asyncio.run(compare(url, clients=clients, seconds=arguments.seconds, rounds=rounds))
        calls = plan_calls(url)

    pairs = zip(*(loads[route].throughput() for route in (ROUTE, UNMODIFIED_ROUTE)), strict=True)
    ratios = [ours / theirs for ours, theirs in pairs]
    if any(load.failed or not all(load.answered) for load in loads.values()):
        print(f"requests failed: { {route: load.summary() for route, load in loads.items()} }", file=sys.stderr)
        return 1
    print(f"{'':10}{'requests/s':>12}{'p50 ms':>10}{'p95 ms':>10}{'p99 ms':>10}{'refused':>9}")
    for name, route in (("plan", ROUTE), ("unmodified", UNMODIFIED_ROUTE)):
        s = loads[route].summary()
        figures = f"{s['requests_per_s']:>12.1f}{s['p50_ms']:>10.0f}{s['p95_ms']:>10.0f}{s['p99_ms']:>10.0f}"
        print(f"{name:10}{figures}{s['refused']:>9}")
    print(f"throughput {statistics.median(ratios):.2f}x, pairs of blocks from {min(ratios):.2f}x to {max(ratios):.2f}x")
    print("calls of the model: " + (", ".join(f"{n:.0f} {w} the plan" for w, n in calls.items()) or "unmodified"))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        evidence = {
            "cosine": cosine,
            "clients": clients,
            "ratios": ratios,
            "ratio": statistics.median(ratios),
            "plan_calls": calls,
            "plan": {**loads[ROUTE].summary(), **asdict(loads[ROUTE])},
            "unmodified": {**loads[UNMODIFIED_ROUTE].summary(), **asdict(loads[UNMODIFIED_ROUTE])},
        }
        arguments.output.write_text(json.dumps(evidence, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
