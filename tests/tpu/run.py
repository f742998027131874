"""Run the project's device tests on the TPU runtimes: `make test-tpu`.

Builds `.venv-tpu` (TorchTPU) and `.venv-xla` (PyTorch/XLA), runs the same tests in both, and ends with a table of what
ran where and why the rest could not. With a TPU on this machine the tests run on it, else on the CPU: TorchTPU through
XLA's CPU plugin, PyTorch/XLA with PJRT_DEVICE=CPU, and what is compiled ahead of time with the TPU's own compiler.

    python tests/tpu/run.py                    both runtimes, everything
    python tests/tpu/run.py --short --tolerate-unavailable      TorchTPU and ahead of time, for continuous integration
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(HERE / "environments")]

from build import Unavailable, build  # noqa: E402  the files beside this one, on a machine with nothing installed
from report import counts, render, results_of  # noqa: E402

ENVIRONMENTS = {"torch_tpu": ".venv-tpu", "torch_xla": ".venv-xla"}
DEVICE_TESTS = ("tests/contracts", "tests/tpu", "tests/gpu")
AHEAD_OF_TIME = ("tests/fit", "tests/test_examples_tpu.py::test_emulated_it_has_the_losses_of_the_cpu")
"""What the TPU's own compiler says, with no TPU: needs TorchTPU to lower and jax to compile."""
OTHER_VENDORS = "not nvidia and not amd and not intel and not (contracts and cpu)"
HOST_TESTS = ("tests/unit",)
"""What runs on the CPU everywhere: run on PyTorch/XLA's older torch too, for the package must work there."""

NOT_THERE = {
    "tests/unit/test_lifted_casts.py": "needs transformers, which this environment does not have",
    "tests/unit/test_targets.py::test_bad_targets_are_told_in_one_line[hf:{dir}-no config.json]": "needs transformers",
    "tests/unit/test_targets.py::test_bad_targets_are_told_in_one_line[hf:{dir}/nothing-no Hugging Face model]": (
        "needs transformers"
    ),
    "tests/unit/test_targets.py::test_an_exported_program_loads_where_it_is_trusted": (
        "torch 2.9 warns of its own buffer when it loads one, and warnings are errors in tests"
    ),
    "tests/unit/test_transforms_compile.py::test_recompilations_and_their_limit_are_told": (
        "torch 2.9 keeps no record of a recompile limit; a trial fails at it all the same"
    ),
    "tests/unit/test_causal_mask.py::test_the_validator_finds_nothing_wrong[training-(Step(transform='causal_mask', "
    "params={}), Step(transform='compile', params={'mode': 'default'}))]": (
        "torch 2.9 cannot compile the backward of this attention in float64, so a search rejects the candidate"
    ),
}
"""Host tests that are left out on torch 2.9, and why."""

_FIND_CHIP = "from kernel_pytorch.hardware.tpu import probe; raise SystemExit(0 if probe.attached().reachable else 3)"


def environment(runtime: str, *, chip: bool) -> dict[str, str]:
    """Return the variables that a runtime's tests run with."""
    own = {
        "KPT_TPU_RUNTIME": runtime,
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "JAX_PLATFORMS": "cpu",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    if not chip:
        own |= {"KPT_TPU_EMULATE": "1", "TPU_SKIP_MDS_QUERY": "1"}
    if runtime == "torch_xla":
        own["PJRT_DEVICE"] = "TPU" if chip else "CPU"
    return {**{k: v for k, v in os.environ.items() if k not in ("KPT_TPU_EMULATE", "PJRT_DEVICE")}, **own}


def has_chip(python: Path) -> bool:
    """Return whether a TPU can be reached from this machine."""
    env = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    return subprocess.run([str(python), "-c", _FIND_CHIP], env=env, check=False).returncode == 0


def tests(runtime: str, python: Path, out: Path, *, chip: bool, short: bool, extra: list[str]) -> int:
    """Run the tests of a runtime, and write their results as JUnit XML; return pytest's exit code."""
    marks = "not slow" if short else ""
    command = [str(python), "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider"]
    command += [f"--junitxml={out / f'{runtime}.xml'}"]
    where = [place for place in DEVICE_TESTS if not short or place != "tests/gpu"]
    where += AHEAD_OF_TIME if runtime == "torch_tpu" else ()
    command += [*where, "-k", OTHER_VENDORS, *(("-m", marks) if marks else ()), *extra]
    return subprocess.run(command, cwd=ROOT, env=environment(runtime, chip=chip), check=False).returncode


def host_tests(python: Path, out: Path, extra: list[str]) -> int:
    """Run the quick tests of the CPU with the torch that PyTorch/XLA needs; return pytest's exit code."""
    print("On torch 2.9 these host tests are left out:", *(f"- {k}: {v}" for k, v in NOT_THERE.items()), sep="\n")
    left_out = [f"--ignore={name}" if name.endswith(".py") else f"--deselect={name}" for name in NOT_THERE]
    command = [str(python), "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", f"--junitxml={out / 'host.xml'}"]
    command += [*HOST_TESTS, "-m", "not serial and not slow", *left_out, *extra]
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False).returncode


def _counted(file: Path) -> dict[str, int]:
    return {outcome.replace(" ", "_"): count for outcome, count in counts(results_of(file)).items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(ENVIRONMENTS), help="one runtime")
    parser.add_argument("--short", action="store_true", help="TorchTPU alone, and neither slow tests nor those of CUDA")
    parser.add_argument("--tolerate-unavailable", action="store_true", help="warn where a package cannot be downloaded")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "out" / "tpu")
    arguments, extra = parser.parse_known_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    runtimes = [arguments.only] if arguments.only else ["torch_tpu"] if arguments.short else list(ENVIRONMENTS)
    codes: dict[str, int] = {}
    ran_for: dict[str, dict[str, float]] = {}
    for old in arguments.output.glob("*.xml"):
        old.unlink()  # what pytest does not write today is not told as of today
    for runtime in runtimes:
        directory = ROOT / ENVIRONMENTS[runtime]
        start = time.monotonic()
        try:
            build(runtime, directory)
        except Unavailable as error:
            print(f"WARNING: TPU tests NOT run: {runtime}: {error}", flush=True)
            if not arguments.tolerate_unavailable:
                codes[runtime] = 1
            continue
        python = directory / "bin" / "python"
        chip = has_chip(python)
        where = "on the TPU of this machine" if chip else "emulated on the CPU"
        print(f"{runtime}: {directory.name} ready after {time.monotonic() - start:.0f} s; tests {where}", flush=True)
        start = time.monotonic()
        codes[runtime] = tests(runtime, python, arguments.output, chip=chip, short=arguments.short, extra=extra)
        ran_for[runtime] = {"seconds": round(time.monotonic() - start)}
        if runtime == "torch_xla" and not arguments.short:
            start = time.monotonic()
            codes["host tests on torch 2.9"] = host_tests(python, arguments.output, extra)
            ran_for["host"] = {"seconds": round(time.monotonic() - start)}
    found = {r: results_of(arguments.output / f"{r}.xml") for r in runtimes if r in codes and codes[r] in (0, 1)}
    text = render(found)
    (arguments.output / "report.md").write_text(text, encoding="utf-8")
    files = {name: arguments.output / f"{name}.xml" for name in ran_for}
    told = {name: took | _counted(files[name]) for name, took in ran_for.items() if files[name].exists()}
    (arguments.output / "counts.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    print(text)
    for name, code in codes.items():
        if code:
            print(f"FAILED: {name} (pytest's exit code {code})")
    return 1 if any(codes.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
