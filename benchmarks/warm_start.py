"""How much sooner a plan with a carried compile cache gives its first result, in a new process on a new machine.

    python benchmarks/warm_start.py examples/minilm.py:workload -o FILE.json [--quick]
    python benchmarks/warm_start.py TARGET --plan DIR -o FILE.json       the plan of a search, instead of one step

A child applies the plan, runs it once and saves what was compiled. Then cold and warm children alternate; each has
fresh, empty directories for Inductor's and Triton's caches, so that what a warm one finds came from the plan. The
time is that of `kp.apply` (of `kp.prepare` in training), the loading of the cache included, and of the first call
(forward and backward); importing and building the model come before, and their time is stored too. The first results
are compared with an fp64 run of the unmodified model before any time is told. Resumable.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import cProfile
import json
import os
import pstats
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = 2e-2
STARTED = time.perf_counter()


def load(options):
    """Return workload, placed model, calls and batches of the target."""
    from kernel_pytorch.backends import manager_for
    from kernel_pytorch.core.config import KernelPyTorchConfig
    from kernel_pytorch.core.targets import load_target
    from kernel_pytorch.search.bench import prepare_bench

    config = KernelPyTorchConfig(mode=options.mode)
    return prepare_bench(load_target(options.target), config, manager_for(), seed=0)


def make_plan(bench, options):
    """Return a plan of one step without a search; the same file as a search writes, without evidence."""
    from kernel_pytorch import Candidate, Plan, Step, __version__
    from kernel_pytorch.core.describe import describe
    from kernel_pytorch.core.types import Prediction, Status, Trial

    spec = describe(bench.workload, bench.model, bench.calls, bench.config.mode, bench.batches)
    steps = tuple(Step(name, json.loads(params)) for name, _, params in (s.partition("=") for s in options.step))
    return Plan(
        device=bench.manager.spec,
        workload=spec,
        chosen=Trial(Candidate(steps), Status.OK, phase="confirm"),
        evidence=(),
        skipped=(),
        untried=(),
        prediction=Prediction(0.0, 0.0, 0.0, 0.0, (), {}),
        config={"mode": str(bench.config.mode)},
        created=time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
        package_version=__version__,
    )


def first_result(bench, directory, *, trust):
    """Apply the plan, run every case once; return outputs (losses and gradients in training) and seconds of each."""
    import kernel_pytorch as kp
    from kernel_pytorch.core.describe import make_optimizer

    start = time.perf_counter()
    if bench.training:
        model = copy.deepcopy(bench.model)
        optimizer = make_optimizer(bench.workload, model.parameters())
        model, _ = kp.prepare(model, optimizer, plan=directory, trust_artifacts=trust)
    else:
        model = kp.apply(directory, bench.model, inputs=dict(bench.calls), trust_artifacts=trust)
    applied = time.perf_counter()
    outputs = run_cases(bench, model)
    bench.manager.synchronize()
    return outputs, applied - start, time.perf_counter() - applied


def run_cases(bench, model):
    """Run every case once and return its tensors."""
    import torch
    from torch.utils import _pytree as pytree

    loss, outputs = bench.loss(), []
    for case, call in bench.calls.items():
        if bench.training:
            value = loss(model, bench.batches[case])
            value.backward()
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            outputs += [value.detach(), torch.cat([g.flatten() for g in gradients])]
            model.zero_grad()
        else:
            with torch.no_grad():
                found = model(*call.args, **call.kwargs)
            outputs += [x for x in pytree.tree_leaves(found) if isinstance(x, torch.Tensor) and x.is_floating_point()]
    return outputs


def errors(bench, outputs):
    """Return the relative error of each output against the unmodified model in fp64 (hard-coded casts apart)."""
    from torch.utils import _pytree as pytree

    double = copy.copy(bench)
    double.model = copy.deepcopy(bench.model).double()

    def widen(tree):
        return pytree.tree_map(lambda x: x.double() if getattr(x, "is_floating_point", bool)() else x, tree)

    double.calls = {k: type(c)(widen(c.args), widen(dict(c.kwargs))) for k, c in bench.calls.items()}
    double.batches = {k: widen(b) for k, b in bench.batches.items()}
    oracle = run_cases(double, double.model)
    return [float((a.double() - b).norm() / b.norm().clamp_min(1e-30)) for a, b in zip(outputs, oracle, strict=True)]


def child(options):
    """Run in a fresh process: record, or measure one start; print one line of JSON."""
    import torch

    from kernel_pytorch.plan import compile_cache
    from kernel_pytorch.plan.schema import dumps

    directory = Path(options.directory)
    bench = load(options)
    run_cases(bench, bench.model)  # the runtime's own start-up (CUDA context, oneDNN) is no part of a compilation
    bench.model.zero_grad()
    ready = time.perf_counter()
    if options.child == "record":
        if not (directory / "plan.json").exists():
            (directory / "plan.json").write_text(dumps(make_plan(bench, options)))
        with compile_cache.recording(directory / "artifacts", bench.manager.spec):
            outputs, apply_s, first_s = first_result(bench, directory, trust=False)
    else:
        profile = cProfile.Profile()
        with profile if options.profile else contextlib.nullcontext():
            outputs, apply_s, first_s = first_result(bench, directory, trust=options.child == "warm")
        if options.profile:
            pstats.Stats(profile, stream=sys.stderr).sort_stats("cumulative").print_stats(60)
    from torch._dynamo.utils import counters

    seen = {f"{group}.{k}": v for group in ("inductor", "aot_autograd") for k, v in counters[group].items()}
    row = {
        "kind": options.child,
        "apply_s": apply_s,
        "first_call_s": first_s,
        "start_s": apply_s + first_s,
        "before_s": ready - STARTED,
        "errors": errors(bench, outputs),
        "counters": {k: v for k, v in seen.items() if "cache" in k},
        "threads": torch.get_num_threads(),
    }
    print("ROW " + json.dumps(row))


def start(kind, options, directory):
    """Run a child with empty caches; return its row, or one that says what went wrong."""
    with tempfile.TemporaryDirectory(prefix="warm-start-") as caches:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_CACHE_DIR"}
        environment |= {"TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor", "TRITON_HOME": caches}
        command = [sys.executable, __file__, options.target, "--mode", options.mode, "-o", "-"]
        command += ["--child", kind, "--directory", str(directory), *(f"--step={s}" for s in options.step)]
        command += ["--profile"] * options.profile
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False
            )
        except subprocess.TimeoutExpired:
            return {"kind": kind, "failed": "over 600 s"}
    lines = [line[4:] for line in done.stdout.splitlines() if line.startswith("ROW ")]
    if options.profile:
        print(done.stderr)
    if done.returncode or not lines:
        return {"kind": kind, "failed": (done.stderr.strip() or "no result")[-2000:]}
    return json.loads(lines[-1])


def judged(row):
    """Return the row, as failed where its result is wrong."""
    if "failed" not in row and not all(error <= TOLERANCE for error in row["errors"]):
        return {**row, "failed": f"wrong: errors {row['errors']}"}
    return row


def measure(options, output):
    """Record, then alternate cold and warm starts; rewrite the artefact after each."""
    from kernel_pytorch.hardware import detect
    from kernel_pytorch.plan.compile_cache import identity
    from kernel_pytorch.plan.schema import plain

    asked = {"target": options.target, "mode": options.mode, "steps": options.step, "plan": options.plan}
    result = {"benchmark": "warm_start", "asked": asked, "rows": []}
    if output.exists():
        found = json.loads(output.read_text())
        if found.get("asked") == asked:
            result = found
    device = detect()
    result |= {"device": plain(device), "made_for": identity(device)}
    with tempfile.TemporaryDirectory(prefix="warm-start-plan-") as scratch:
        directory = Path(scratch)
        if options.plan:
            (directory / "plan.json").write_text((Path(options.plan) / "plan.json").read_text())
        recorded = judged(start("record", options, directory))
        if "failed" in recorded:
            raise SystemExit(f"recording failed: {recorded['failed']}")
        facts = directory / "artifacts" / "compile_cache.json"
        if not facts.exists():
            raise SystemExit("nothing was saved: torch could cache none of what the plan compiles")
        result |= {"recorded": recorded, "cache": json.loads(facts.read_text())}
        for index in range(options.repeats):
            for kind in ("cold", "warm") if index % 2 == 0 else ("warm", "cold"):
                done = [r for r in result["rows"] if r["kind"] == kind and "failed" not in r]
                if len(done) > index:
                    continue
                result["rows"].append(judged(start(kind, options, directory)))
                output.parent.mkdir(parents=True, exist_ok=True)
                output.write_text(json.dumps(result, indent=1) + "\n")
    return result


def told(result):
    """Return the table."""
    lines, medians = [f"{result['asked']['target']}  {', '.join(result['asked']['steps'])}"], {}
    for kind in ("cold", "warm"):
        rows = [r for r in result["rows"] if r["kind"] == kind]
        good = [r["start_s"] for r in rows if "failed" not in r]
        failed = [r["failed"] for r in rows if "failed" in r]
        if good:
            medians[kind] = statistics.median(good)
            mad = statistics.median(abs(s - medians[kind]) for s in good)
            lines.append(f"{kind}  {medians[kind]:7.2f} s  MAD {mad:.2f}  n={len(good)}")
        lines += [f"{kind}  failed: {reason[-200:]}" for reason in failed]
    if len(medians) == 2:
        lines.append(f"warm start {medians['cold'] / medians['warm']:.2f}x, {result['cache']['bytes'] / 1e6:.1f} MB")
    return "\n".join(lines)


def main() -> None:
    """Measure, or run as a child of a measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("-o", "--output", required=True)
    parser.add_argument("--mode", default="inference", choices=["inference", "training"])
    parser.add_argument("--plan", default="", help="directory of a search, whose plan is applied")
    parser.add_argument("--step", action="append", default=[], help='NAME or NAME={"parameter": value}')
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="two repeats")
    parser.add_argument("--profile", action="store_true", help="print what a start spends its time on; it takes longer")
    parser.add_argument("--child", choices=["record", "cold", "warm"], help=argparse.SUPPRESS)
    parser.add_argument("--directory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.step = [s if "=" in s else f"{s}={{}}" for s in options.step or ['compile={"mode": "default"}']]
    if options.child:
        child(options)
        return
    if options.quick:
        options.repeats = 2
    print(told(measure(options, Path(options.output))))


if __name__ == "__main__":
    main()
