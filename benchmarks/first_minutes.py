"""What a newcomer waits for: `kpt --help`, the import, and with `--demo` the README's first command in a fresh clone.

    python benchmarks/first_minutes.py -o benchmarks/results/DEVICE/first_minutes.json [--demo]

The import is timed in a process that has imported torch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from kernel_pytorch.hardware import detect

ROOT = Path(__file__).resolve().parents[1]
TIMED = "import time, torch; t = time.perf_counter(); {}; print(time.perf_counter() - t)"


def seconds(command: list[str], where: Path = ROOT) -> float:
    start = time.perf_counter()
    subprocess.run(command, cwd=where, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def import_seconds() -> float:
    code = TIMED.format("import kernel_pytorch")
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def demo_seconds() -> float:
    with tempfile.TemporaryDirectory(prefix="fresh-") as directory:
        clone = Path(directory) / "clone"
        return seconds(["git", "clone", "-q", str(ROOT), str(clone)]) + seconds(["make", "demo"], clone)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("-n", "--repeats", type=int, default=10)
    parser.add_argument("--demo", action="store_true", help="clone, install, search: minutes")
    args = parser.parse_args()
    helps = [seconds([sys.executable, "-m", "kernel_pytorch", "--help"]) for _ in range(args.repeats)]
    imports = [import_seconds() for _ in range(args.repeats)]
    artefact = {
        "device": detect("cpu").key,
        "help_s": statistics.median(helps),
        "import_s": statistics.median(imports),
        "help_samples_s": helps,
        "import_samples_s": imports,
    }
    if args.demo:
        artefact["demo_s"] = demo_seconds()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(artefact, indent=1) + "\n")
    print(json.dumps({k: v for k, v in artefact.items() if not k.endswith("samples_s")}, indent=1))


if __name__ == "__main__":
    main()
