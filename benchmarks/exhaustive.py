"""Is what a search chose within 5 % of the best of all combinations? Every combination of a small model's steps, tried.

    python benchmarks/exhaustive.py benchmarks/model_zoo.py:gnn --plan out/gnn -o FILE.json --deadline 300

Every step is tried alone; then every combination of those that were right, one step of a group at most, is applied,
judged and measured beside the unmodified model as a search measures it, in this process. The fastest three and the
plan's own candidate meet again on fresh samples, each beside the unmodified model, twice in turn. `whole` says whether
all combinations were tried before the deadline; `within` is the best one's time over the choice's. Resumable.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch

import kernel_pytorch as kp
from kernel_pytorch.backends.placement import release_cached
from kernel_pytorch.core.management.unified_manager import UnifiedManager
from kernel_pytorch.core.types import Candidate, Status, Step, Trial
from kernel_pytorch.report.reading import short
from kernel_pytorch.search.bench import Bench
from kernel_pytorch.search.propose import Proposals, propose
from kernel_pytorch.search.survey import described
from kernel_pytorch.search.trial import TrialRequest, run_trial

FINALISTS = 3
ROUNDS = 2
PAIRS = 24


def combinations(proposals: Proposals, usable: list[Step]) -> list[Candidate]:
    """Return every combination of two steps and more, one of a group at most, small ones first."""
    groups: dict[str, list[Step | None]] = {}
    for step in usable:
        groups.setdefault(proposals.transform_of(step).group, [None]).append(step)
    found = [proposals.combine(s for s in choice if s is not None) for choice in itertools.product(*groups.values())]
    return sorted((c for c in found if len(c.steps) > 1), key=lambda c: len(c.steps))


def row(trial: Trial) -> dict[str, Any]:
    measured = trial.measurement
    return {
        "candidate": trial.candidate.label,
        "status": str(trial.status),
        "reason": trial.reason,
        "ratio": None if measured is None else [measured.ratio.value, measured.ratio.low, measured.ratio.high],
        "ms": None if measured is None else measured.median_ms,
        "seconds": round(trial.seconds, 2),
    }


def run(bench: Bench, candidate: Candidate, seconds: float, *, phase: str = "screen", seed: int = 0) -> Trial:
    pairs = PAIRS if phase == "confirm" else 0
    request = TrialRequest(candidate, phase=phase, seconds=seconds, pairs=pairs, seed=seed, level="quick")
    torch._dynamo.reset()
    trial = run_trial(bench, request)
    release_cached()
    print(f"{phase:8} {trial.seconds:5.1f} s {trial.status:8} {short(candidate)}", flush=True)
    return trial


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("--plan", required=True, help="directory of the search's plan")
    parser.add_argument("--mode", default="inference", choices=["inference", "training"])
    parser.add_argument("--deadline", type=float, default=math.inf, help="seconds after which no combination is begun")
    parser.add_argument("--seconds", type=float, default=1.5, help="measurement of a combination")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    started = time.monotonic()
    plan = kp.load_plan(args.plan)
    manager = UnifiedManager(kp.KernelPyTorchConfig(mode=args.mode))
    bench, spec = described(kp.load_target(args.target), manager.config, manager.hardware_manager, manager.transforms)
    proposals = propose(manager.transforms, spec, manager.hardware_manager.spec, manager.config)
    found: dict[str, Any] = json.loads(args.output.read_text()) if args.output.exists() else {"rows": []}
    found |= {"target": args.target, "mode": args.mode, "device": plan.device.key, "chosen": plan.candidate.label}
    known = {r["candidate"]: r for r in found["rows"]}
    candidates = {c.label: c for c in proposals.singles}

    def tried(candidate: Candidate) -> bool:
        """Try it, or find it tried; return whether it was right. False after the deadline."""
        candidates[candidate.label] = candidate
        if candidate.label not in known:
            if time.monotonic() - started > args.deadline:
                found["whole"] = False
                return False
            known[candidate.label] = row(run(bench, candidate, args.seconds))
            found["rows"] = list(known.values())
            args.output.write_text(json.dumps(found, indent=1) + "\n")
        return known[candidate.label]["status"] == Status.OK

    found["whole"] = True
    usable = [c.steps[0] for c in proposals.singles if tried(c)]
    everything = combinations(proposals, usable)
    found["combinations"] = len(everything)
    for candidate in everything:
        tried(candidate)
    right = [r for r in known.values() if r["ratio"]]
    best = sorted(right, key=lambda r: -r["ratio"][0])[:FINALISTS]
    names = dict.fromkeys([r["candidate"] for r in best] + [plan.candidate.label])
    finals: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for i in range(ROUNDS):
        for name in list(names)[:: 1 if i % 2 == 0 else -1]:
            candidate = candidates.get(name, plan.candidate)
            finals[name].append(row(run(bench, candidate, 30.0, phase="confirm", seed=i + 1)))
    speed = {
        n: math.prod(r["ratio"][0] if r["ratio"] else 0.0 for r in rows) ** (1 / ROUNDS) for n, rows in finals.items()
    }
    top = max(speed, key=lambda n: speed[n])
    found |= {"finals": finals, "speedups": speed, "best": top, "within": speed[top] / speed[plan.candidate.label]}
    args.output.write_text(json.dumps(found, indent=1) + "\n")
    print(f"chosen {plan.candidate.label}: {speed[plan.candidate.label]:.3f}x; best {top}: {speed[top]:.3f}x")
    print(f"within {found['within']:.3f}; {len(known)} tried of {len(everything) + len(proposals.singles)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
