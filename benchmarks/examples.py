"""Measure the examples and store the artefacts that the documents cite: `make bench`.

Each artefact is the plan itself (raw samples, environment, every trial), or what `load.py` wrote, under
`benchmarks/results/DEVICE/`.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SERVED = "examples/production/serve_minilm"
SEARCHES = {
    "minilm": ["examples/minilm.py:workload"],
    "gpt_train": ["examples/gpt_train.py:workload", "--mode", "training"],
    "serve_minilm": [f"{SERVED}/workload.py:workload"],
}


def search(name: str, *, budget: str, out: Path, results: Path) -> None:
    """Search for one example's plan and store it as an artefact."""
    command = [sys.executable, "-m", "kernel_pytorch", "optimize", *SEARCHES[name]]
    subprocess.run([*command, "--budget", budget, "-o", str(out / name)], cwd=ROOT, check=True)
    shutil.copyfile(out / name / "plan.json", results / f"{name}.json")


def main() -> None:
    """Run what was asked for; all of it by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=[*SEARCHES, "load"], default=[*SEARCHES, "load"])
    parser.add_argument("--budget", default="default", help="of each search, as `kpt optimize --budget` takes it")
    arguments = parser.parse_args()

    import kernel_pytorch as kp

    results = ROOT / "benchmarks" / "results" / kp.detect().key
    out = ROOT / "out" / "bench"
    results.mkdir(parents=True, exist_ok=True)
    for name in SEARCHES:
        if name in arguments.only:
            search(name, budget=arguments.budget, out=out, results=results)
    if "load" in arguments.only:
        command = [sys.executable, f"{SERVED}/load.py", "--plan", str(out / "serve_minilm"), "--clients", "16"]
        subprocess.run([*command, "--output", str(results / "serve_minilm_load.json")], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
