"""Which architectures of the suite lower and compile for TPUs; needs no TPU.

    python benchmarks/tpu_breadth.py [--only NAME ...] [--unfinished] [--topology v5e:1] [--workdir DIR]

Each is lowered as a forward and as a training step (mean square of its float outputs, AdamW), and each program is
compiled for one chip of v5e and of v5p. Resumable: what `benchmarks/results/tpu-ahead/breadth.json` has is not run
again (`--unfinished`: but where a program was not lowered, or not compiled), and programs are kept in the work
directory until they are compiled. Workers do many architectures each: their start takes longer than most programs; one
that dies has its architecture marked and is started again.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "tpu-ahead" / "breadth.json"
MODES = ("inference", "training")
TOPOLOGIES = ("v5e:1", "v5p:1")
LIMIT_S = 3600.0


def mean_square(model: Any, batch: Any) -> Any:
    """Return a loss for any model: the mean square of every float output."""
    import dataclasses
    from collections.abc import Mapping

    import torch
    from torch.utils import _pytree as pytree

    from kernel_pytorch.core.workload import as_call

    call = as_call(batch)
    output = model(*call.args, **call.kwargs)
    if dataclasses.is_dataclass(output) and not isinstance(output, Mapping):
        output = vars(output)
    leaves = pytree.tree_leaves(dict(output) if isinstance(output, Mapping) else output)
    tensors = [x for x in leaves if isinstance(x, torch.Tensor) and x.requires_grad]
    if not tensors:
        raise ValueError("no output has a gradient while it is traced")
    return sum((x.abs().float() ** 2).mean() for x in tensors)


def workload(name: str) -> Any:
    from architectures import ARCHITECTURES

    from kernel_pytorch import Workload

    model, inputs = ARCHITECTURES[name]()
    return Workload(model=lambda: model, inputs=lambda: inputs, loss=mean_square, name=name)


def lower_worker(todo: list[tuple[str, str]], work: Path) -> None:
    from kernel_pytorch.backends.tpu.lower_worker import load
    from kernel_pytorch.backends.tpu.lowering import lower
    from kernel_pytorch.backends.tpu.steps import trace_step
    from kernel_pytorch.core.types import Mode
    from kernel_pytorch.fit.build import Build

    load()
    for name, mode in todo:
        stem = work / f"{name}.{mode}"
        (work / "current").write_text(f"{name} {mode}")
        began = time.perf_counter()
        try:
            program, batch = Build(workload(name), Mode(mode), real=True)()
            step = trace_step(program, batch)
            text = lower(step)
        except Exception as error:  # an architecture may fail in any way: that is what is asked
            first = next(iter(str(error).splitlines()), "")
            answer: dict[str, Any] = {"lowered": False, "reason": f"{type(error).__name__}: {first}"[:400]}
        else:
            stem.with_suffix(f".{mode}.mlir").write_bytes(text)
            answer = {"lowered": True, "nodes": len(step.modules), "flops": step.flops}
        answer["lower_seconds"] = round(time.perf_counter() - began, 2)
        stem.with_suffix(f".{mode}.lowered").write_bytes(pickle.dumps(answer))
    os._exit(0)


def compile_worker(todo: list[tuple[str, str, str]], work: Path) -> None:
    from kernel_pytorch.backends.tpu.compiler import compile_ahead
    from kernel_pytorch.backends.tpu.topology import parse_topology

    for name, mode, topology in todo:
        (work / "current").write_text(f"{name} {mode} {topology}")
        began = time.perf_counter()
        try:
            compiled = compile_ahead((work / f"{name}.{mode}.mlir").read_bytes(), parse_topology(topology))
            answer: dict[str, Any] = {"compiled": compiled.fits, "peak_bytes": compiled.peak_bytes}
            if not compiled.fits:
                answer["reason"] = compiled.message.splitlines()[0]
        except Exception as error:  # as above
            first = next(iter(str(error).splitlines()), "")
            answer = {"compiled": False, "reason": f"{type(error).__name__}: {first}"[:400]}
        answer["compile_seconds"] = round(time.perf_counter() - began, 2)
        (work / f"{name}.{mode}.{topology.replace(':', '_')}.compiled").write_bytes(pickle.dumps(answer))
    os._exit(0)


def drive(kind: str, todo: list[tuple[str, ...]], work: Path, done: Any) -> None:
    """Run workers until nothing is left to do; `done(item)` tells whether an item has an answer."""
    while left := [item for item in todo if not done(item)]:
        (work / "todo").write_bytes(pickle.dumps(left))
        (work / "current").write_text("")
        command = [sys.executable, str(HERE / "tpu_breadth.py"), "--worker", kind, "--workdir", str(work)]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
        env |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
        with (work / f"{kind}.log").open("wb") as log:
            try:
                subprocess.run(command, stdout=log, stderr=log, env=env, timeout=LIMIT_S, check=False)
                ended = "the worker died"
            except subprocess.TimeoutExpired:
                ended = f"the worker took longer than {LIMIT_S:g} s"
        current = tuple((work / "current").read_text().split())
        if current and current in left and not done(current):
            lines = [x for x in (work / f"{kind}.log").read_text(errors="replace").splitlines() if x.startswith("F")]
            reason = f"{ended}: {(lines or ['no last words'])[0][:300]}"
            if kind == "lower":
                answer = {"lowered": False, "reason": reason}
                (work / f"{current[0]}.{current[1]}.lowered").write_bytes(pickle.dumps(answer))
            else:
                where = work / f"{current[0]}.{current[1]}.{current[2].replace(':', '_')}.compiled"
                where.write_bytes(pickle.dumps({"compiled": False, "reason": reason}))
        elif not current:
            raise SystemExit(f"the {kind} worker does not start: {work / f'{kind}.log'}")


def row_of(name: str, mode: str, work: Path, known: dict[str, Any]) -> dict[str, Any]:
    """Return what the work directory says, and what was known before of the same program."""
    row = pickle.loads((work / f"{name}.{mode}.lowered").read_bytes())
    before = known.get(name, {}).get(mode, {})
    if row["lowered"] and all(before.get(key) == row[key] for key in ("nodes", "flops")):
        row |= {topology: before[topology] for topology in TOPOLOGIES if topology in before}
    for topology in TOPOLOGIES:
        path = work / f"{name}.{mode}.{topology.replace(':', '_')}.compiled"
        if path.exists():
            row[topology] = pickle.loads(path.read_bytes())
    return row


def finished(row: dict[str, Any]) -> bool:
    return all(row.get(mode, {}).get("lowered") and all(t in row[mode] for t in TOPOLOGIES) for mode in MODES)


def save(rows: dict[str, dict[str, Any]]) -> None:
    from importlib import metadata

    counts = {
        mode: {
            "architectures": len(rows),
            "lowered": sum(r[mode]["lowered"] for r in rows.values()),
            **{
                t: {
                    "compiled": sum(r[mode].get(t, {}).get("compiled", False) for r in rows.values()),
                    "tried": sum(t in r[mode] for r in rows.values()),
                }
                for t in TOPOLOGIES
            },
        }
        for mode in MODES
    }
    software = {n: metadata.version(n) for n in ("torch", "torch_tpu", "libtpu", "jax", "transformers")}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps({"counts": counts, "software": software, "rows": rows}, indent=1) + "\n")
    print(json.dumps(counts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--unfinished", action="store_true", help="those that were not compiled or not lowered")
    parser.add_argument("--topology", choices=TOPOLOGIES, action="append", help="both by default")
    parser.add_argument("--workdir", type=Path, default=Path(tempfile.gettempdir()) / "kpt-tpu-breadth")
    parser.add_argument("--worker", choices=["lower", "compile"])
    parser.add_argument("--save", action="store_true", help="write what the work directory has, and run nothing")
    options = parser.parse_args()
    work: Path = options.workdir
    work.mkdir(parents=True, exist_ok=True)
    if options.worker:
        todo = pickle.loads((work / "todo").read_bytes())
        return {"lower": lower_worker, "compile": compile_worker}[options.worker](todo, work)
    from architectures import ARCHITECTURES

    known = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else {}
    names = options.only or [name for name in ARCHITECTURES if name not in known]
    if options.unfinished:
        names = [name for name in ARCHITECTURES if not finished(known.get(name, {}))]
    pairs = [(name, mode) for name in names for mode in MODES]
    if options.save:
        lowered = [n for n in names if all((work / f"{n}.{mode}.lowered").exists() for mode in MODES)]
        return save({**known, **{name: {mode: row_of(name, mode, work, known) for mode in MODES} for name in lowered}})
    drive("lower", pairs, work, lambda item: (work / f"{item[0]}.{item[1]}.lowered").exists())
    programs = [
        (name, mode, topology)
        for name, mode in pairs
        if (work / f"{name}.{mode}.mlir").exists()
        for topology in options.topology or TOPOLOGIES
    ]
    programs.sort(key=lambda item: (item[1], (work / f"{item[0]}.{item[1]}.mlir").stat().st_size))  # the small first
    drive(
        "compile",
        programs,
        work,
        lambda item: (work / f"{item[0]}.{item[1]}.{item[2].replace(':', '_')}.compiled").exists(),
    )
    save({**known, **{name: {mode: row_of(name, mode, work, known) for mode in MODES} for name in names}})
    return None


if __name__ == "__main__":
    main()
