"""Time the fused kernels beside PyTorch, `torch.compile` of their definitions, and other kernels that are installed.

For each case the results are compared with fp64 first; what is wrong gets no time. Then all variants are timed in turn,
`--samples` rounds, each from a cold L2 cache: the cache is overwritten, the GPU is kept busy while the host queues the
work, and two CUDA events bracket it, so that the time is the GPU's own. Bandwidth counts the least bytes the operation
moves, whatever a variant moves, and is told as a share of two things: of what large copies reach in the same run, and,
in brackets after it, of a copy of as many bytes timed in the same rounds, which has a launch and an end as they have.

    python benchmarks/kernels.py -o benchmarks/results/DEVICE/kernels.json [--only rms_norm] [--quick] [--tune]
        [--shapes 16384x4096,8192x8192] [--phase backward] [--compilers 12]

Finished cases in the file are kept; `--smoke` runs tiny shapes on the CPU, under TRITON_INTERPRET=1 the kernels too.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch._functorch import config as functorch_config

sys.path.insert(0, str(Path(__file__).parent))

from kernel_cases import Case, Inputs, Phases, cases

BUSY_CYCLES = 1_000_000
"""Clock cycles the GPU waits before each timed run: about 0.6 ms, more than the host needs to queue one backward."""


class Clock:
    """Times one call; on a GPU from a cold L2 cache, in its own time."""

    def __init__(self, device: torch.device) -> None:
        self.gpu = device.type == "cuda"
        if self.gpu:
            from kernel_pytorch.hardware import cache_bytes, detect

            self.scratch = torch.empty(max(2 * cache_bytes(detect("cuda")), 64 << 20), dtype=torch.int8, device=device)

    def time_ms(self, fn: Callable[[], Any]) -> float:
        if not self.gpu:
            start = time.perf_counter()
            fn()
            return (time.perf_counter() - start) * 1e3
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.scratch.zero_()
        torch.cuda._sleep(BUSY_CYCLES)
        begin.record()
        fn()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


def all_cases(*, smoke: bool) -> list[Case]:
    found = cases(smoke=smoke)
    for path in sorted(Path(__file__).parent.glob("kernel_cases_*.py")):
        try:
            module = importlib.import_module(path.stem)
        except Exception as error:
            print(f"{path.name} is left out: {type(error).__name__}: {error}")
            continue
        found += module.SMOKE_CASES if smoke and hasattr(module, "SMOKE_CASES") else [] if smoke else module.CASES
    return found


def limited(case: Case, phase: str) -> Case:
    """Return the case with one phase alone."""

    def only(build: Callable[[Inputs], Phases]) -> Callable[[Inputs], Phases]:
        return lambda inputs: {phase: build(inputs)[phase]}

    return dataclasses.replace(
        case,
        bytes={phase: case.bytes[phase]},
        variants={name: only(build) for name, build in case.variants.items()},
    )


def copy_bandwidth(clock: Clock, device: torch.device, *, smoke: bool) -> dict[str, Any]:
    """Return bytes a second, read plus written, of large copies on the device."""
    size = 1 << 20 if smoke else 1 << 31
    source, target = torch.randint(0, 100, (size,), dtype=torch.uint8, device=device), None
    target = torch.empty_like(source)
    times = [clock.time_ms(lambda: target.copy_(source)) for _ in range(2 if smoke else 12)][1:]
    return {"bytes": 2 * size, "samples_ms": times, "bytes_per_s": 2 * size / statistics.median(times) * 1e3}


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    if got.shape != want.shape:
        return float("inf")
    return float((got.detach().double() - want).norm() / want.norm().clamp_min(1e-30))


def poison(device: torch.device) -> None:
    """Fill free memory with NaN, so that what a kernel does not write shows."""
    if device.type == "cuda":
        for size in (1 << 30, 1 << 28, 1 << 22, 1 << 16, 1 << 9):
            blocks = [torch.full((size // 4,), float("nan"), device=device) for _ in range(2)]
            del blocks


def errors_of(phases: Mapping[str, Callable[[], Any]], truth: Mapping[str, Any]) -> dict[str, list[float]]:
    found = {}
    for phase, run in phases.items():
        results = run()
        found[phase] = [relative_error(got, want) for got, want in zip(results, truth[phase], strict=True)]
    return found


def rounds(
    clock: Clock, calls: Mapping[Any, Callable[[], Any]], samples: int
) -> tuple[dict[Any, list[float]], dict[Any, str]]:
    """Return the times of each call, taken in turn, in alternating order after two rounds, and why others have none."""
    times: dict[Any, list[float]] = {key: [] for key in calls}
    failed: dict[Any, str] = {}
    for i in range(samples + 2):
        for key in calls if i % 2 else reversed(calls):
            if key in failed:
                continue
            try:
                taken = clock.time_ms(calls[key])
            except Exception as error:
                failed[key] = f"{type(error).__name__}: {error}"[:300]
                continue
            if i >= 2:
                times[key].append(taken)
    return {key: t for key, t in times.items() if key not in failed}, failed


def row(case: Case, variant: str, phase: str, **more: Any) -> dict[str, Any]:
    return {"op": case.op, "case": case.label, "variant": variant, "phase": phase, **more}


COPY = "copy of the same size"


def copying(case: Case, phase: str, device: torch.device) -> Callable[[], Any]:
    """Return a copy that reads and writes as many bytes as the phase moves at least."""
    source = torch.randint(0, 100, (max(1, case.bytes[phase] // 2),), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def timed(
    case: Case, phase: str, times: Mapping[Any, list[float]], copy: float, more: Mapping[Any, dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return a row for each variant that has times: the copy of the same size is one, and what others are held to."""
    same = statistics.median(times[COPY]) if times.get(COPY) else None
    rows = []
    for name, samples_ms in times.items():
        median = statistics.median(samples_ms)
        rate = case.bytes[phase] / median * 1e3
        mad = statistics.median(abs(s - median) for s in samples_ms)
        shares = {"of_copy": rate / copy, "of_copy_same_size": None if same is None else same / median}
        taken = {"median_ms": median, "mad_ms": mad, "bytes_per_s": rate, **shares, "samples_ms": samples_ms}
        rows.append(row(case, name, phase, **more.get(name, {}), **taken))
    return rows


def measure(case: Case, clock: Clock, device: torch.device, samples: int, copy: float) -> list[dict[str, Any]]:
    """Return one row for each variant and phase: its errors and times, or why there are none."""
    torch._dynamo.reset()
    inputs = case.make(device)
    truth = case.oracle(inputs)
    rows, calls, errors = [], {}, {}
    for variant, build in case.variants.items():
        poison(device)
        try:
            start = time.perf_counter()
            phases = build(own(inputs))
            found = errors_of(phases, truth)
            seconds = time.perf_counter() - start
        except Exception as error:
            rows.append(row(case, variant, "all", failed=f"{type(error).__name__}: {error}"[:300]))
            continue
        for phase, run in phases.items():
            worst = max(found[phase])
            more = {"errors": found[phase], "first_call_s": seconds}
            if worst <= case.tolerance:
                calls[variant, phase] = run
                errors[variant, phase] = more
            else:
                rows.append(row(case, variant, phase, failed=f"error {worst:.2e} > {case.tolerance:.0e}", **more))
    del truth
    for phase in case.bytes:
        these = {variant: run for (variant, which), run in calls.items() if which == phase}
        times, failed = rounds(clock, {COPY: copying(case, phase, device), **these}, samples)
        rows += [row(case, variant, phase, failed=why) for variant, why in failed.items()]
        more = {variant: found for (variant, which), found in errors.items() if which == phase}
        rows += timed(case, phase, times, copy, more)
    return rows


def own(inputs: Inputs) -> Inputs:
    """Return copies in the same memory order, for some kernels write into their inputs."""
    return {name: x.detach().clone(memory_format=torch.preserve_format) for name, x in inputs.items()}


def tune(case: Case, clock: Clock, device: torch.device, samples: int, copy: float) -> list[dict[str, Any]]:
    """Return one row for each launch of the case's tunings; results are compared first where they can be."""
    inputs, rows = case.make(device), []
    truth = case.oracle(inputs) if case.comparable else None
    for phase in case.bytes:
        calls: dict[str, Callable[[], Any]] = {}
        for (which, name), build in case.tunings.items():
            if which == phase:
                poison(device)
                try:
                    run = build(inputs)
                    results = run()
                    worst = max(map(relative_error, results, truth[phase])) if truth else 0.0
                except Exception as error:
                    rows.append(row(case, name, phase, failed=f"{type(error).__name__}: {error}"[:200]))
                    continue
                if not worst <= case.tolerance:
                    rows.append(row(case, name, phase, failed=f"error {worst:.2e} > {case.tolerance:.0e}"))
                    continue
                calls[name] = run
        times, failed = rounds(clock, {COPY: copying(case, phase, device), **calls}, samples)
        rows += [row(case, name, phase, failed=why) for name, why in failed.items()]
        rows += timed(case, phase, times, copy, {})
    return rows


def build_tunings(wanted: list[Case], device: torch.device) -> None:
    """Run the launches of `--tune` once: what is compiled lies on disk afterwards."""
    for case in wanted:
        inputs = case.make(device)
        for (phase, name), build in case.tunings.items():
            try:
                build(inputs)()
            except Exception as error:  # the process that times them says so too
                print(f"{case.op} {case.label} {phase} {name}: {type(error).__name__}: {error}"[:200], flush=True)


def compile_apart(processes: int) -> None:
    """Compile the launches of `--tune` in several processes with this one's arguments, for one takes seconds each."""
    command = [sys.executable, *sys.argv]
    shares = [subprocess.Popen([*command, "--share", f"{i}/{processes}"]) for i in range(processes)]
    for share in shares:
        share.wait()


def environment(device: torch.device) -> dict[str, Any]:
    from kernel_pytorch.backends import manager_for
    from kernel_pytorch.hardware import detect

    versions = {"torch": torch.__version__, "python": sys.version.split()[0]}
    for name in ("triton", "liger_kernel", "quack"):
        try:
            versions[name] = str(getattr(importlib.import_module(name), "__version__", "installed"))
        except Exception as error:
            versions[name] = f"absent: {type(error).__name__}: {error}"[:200]
    name = "cuda" if device.type == "cuda" else "cpu"
    return {
        "device": dataclasses.asdict(detect(name)),
        "versions": versions,
        "telemetry": dict(manager_for(name).telemetry()),
    }


def shares(r: dict[str, Any]) -> str:
    """Return the share of the bandwidth of large copies, and in brackets that of a copy of the same size."""
    same = r.get("of_copy_same_size")
    return f"{r['of_copy']:.0%}" + ("" if same is None else f" ({same:.0%})")


def table(rows: list[dict[str, Any]]) -> str:
    """Return milliseconds and share of copy bandwidth, one line a case and phase, one column a variant."""
    lines = {}
    for r in rows:
        lines.setdefault((r["op"], r["case"], r["phase"]), []).append(r)
    text = []
    for (op, case, phase), found in lines.items():
        cells = []
        for r in sorted(found, key=lambda r: r.get("median_ms", 1e9)):
            done = f"{r['median_ms']:.3f} {shares(r)}" if "median_ms" in r else f"- {r['failed'][:60]}"
            cells.append(f"{r['variant']} {done}")
        text.append(f"{op} {case} {phase}: " + ", ".join(cells))
    return "\n".join(text)


def best(rows: list[dict[str, Any]]) -> str:
    """Return the fastest of each case and phase, one line each, and how many were within 2 % of it."""
    lines: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for r in rows:
        if "median_ms" in r and r["variant"] != COPY:
            lines.setdefault((r["op"], r["case"], r["phase"]), []).append(r)
    text = []
    for (op, case, phase), found in lines.items():
        first = min(found, key=lambda r: r["median_ms"])
        near = sum(r["median_ms"] <= 1.02 * first["median_ms"] for r in found) - 1
        text.append(f"{op} {case} {phase}: {first['variant']} {first['median_ms']:.3f} {shares(first)}, {near} near")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--only", help="operations, separated by commas")
    parser.add_argument("--shapes", help="only cases whose label begins with one of these words, separated by commas")
    parser.add_argument("--phase", help="only this phase: forward, backward or step")
    parser.add_argument("--quick", action="store_true", help="only the first case of each operation")
    parser.add_argument("--tune", action="store_true", help="compare launches of the kernels instead")
    parser.add_argument("--compilers", type=int, default=0, help="with --tune: processes that compile beforehand")
    parser.add_argument("--share", help=argparse.SUPPRESS)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=90.0, help="begin no case after this time")
    args = parser.parse_args()
    begun = time.perf_counter()
    device = torch.device("cpu" if args.smoke else "cuda")
    # The backward of a compiled function runs many times on one graph here.
    functorch_config.donated_buffer = False
    if args.tune and args.compilers and not args.share:
        compile_apart(args.compilers)
        print(f"compiled after {time.perf_counter() - begun:.0f} s", flush=True)
    kind = "tuning" if args.tune else "rows"
    held = json.loads(args.output.read_text()) if args.output.exists() else {}
    artefact = {"rows": [], "tuning": [], **held}
    wanted = all_cases(smoke=args.smoke)
    if args.only:
        wanted = [case for case in wanted if case.op in args.only.split(",")]
    if args.shapes:
        wanted = [case for case in wanted if case.label.split()[0] in args.shapes.split(",")]
    if args.phase:
        wanted = [limited(case, args.phase) for case in wanted if args.phase in case.bytes]
    if args.quick:
        wanted = list({case.op: case for case in reversed(wanted)}.values())[::-1]
    done = {(r["op"], r["case"]) for r in artefact[kind]}
    if args.share:
        i, n = map(int, args.share.split("/"))
        build_tunings([case for case in wanted if (case.op, case.label) not in done][i::n], device)
        return
    clock = Clock(device)
    copy = copy_bandwidth(clock, device, smoke=args.smoke)
    artefact |= {"environment": environment(device), "copy": copy}
    for case in wanted:
        if (case.op, case.label) in done:
            continue
        if time.perf_counter() - begun > args.seconds:
            print(f"not begun after {args.seconds:.0f} s: {case.op} {case.label}")
            continue
        try:
            work = tune if args.tune else measure
            rows = work(case, clock, device, args.samples, copy["bytes_per_s"])
        except Exception as error:
            rows = [row(case, "all", "all", failed=f"{type(error).__name__}: {error}"[:300])]
        artefact[kind] += rows
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(artefact, indent=1) + "\n")
        if device.type == "cuda":
            torch.cuda.empty_cache()
    names = {(case.op, case.label) for case in wanted}
    print(f"copy {copy['bytes_per_s'] / 1e12:.2f} TB/s; {time.perf_counter() - begun:.0f} s; ms, share of that")
    print("(share of a copy of the same size):")
    shown = [r for r in artefact[kind] if (r["op"], r["case"]) in names]
    print(table(shown))
    if args.tune:
        print("\nbest:\n" + best(shown))


if __name__ == "__main__":
    main()
