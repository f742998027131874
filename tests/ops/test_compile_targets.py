"""Every kernel of every op compiles for every GPU target, without a GPU."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import triton

import kernel_pytorch
from kernel_pytorch._triton.targets import TARGETS, CompileCase, Target, compile_case, compile_for

PACKAGE = Path(kernel_pytorch.__file__).parent
KERNEL_FILES = sorted(PACKAGE.rglob("*_kernel.py"))
EVERYWHERE = os.environ.get("KPT_COMPILE_ALL") == "1"


def cases_of(path: Path) -> list[CompileCase]:
    name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    return list(importlib.import_module(name).COMPILE_CASES)


def matrix() -> list[tuple[CompileCase, Target]]:
    """Return the first case of each kernel for every target it is for, and its other cases for one target."""
    pairs = []
    for path in KERNEL_FILES:
        seen = set()
        for case in cases_of(path):
            first = (case.kernel.__name__, case.targets) not in seen
            seen.add((case.kernel.__name__, case.targets))
            wanted = [t for t in TARGETS if case.targets is None or t.name in case.targets]
            pairs += [(case, t) for t in wanted if EVERYWHERE or first or t.name == "sm_90"]
    return pairs


@pytest.mark.parametrize(("case", "target"), [pytest.param(c, t, id=f"{c.name}-{t.name}") for c, t in matrix()])
def test_it_compiles(case: CompileCase, target: Target) -> None:
    compiled = compile_case(case, target)
    binary = "cubin" if target.backend == "cuda" else "hsaco"
    assert len(compiled.asm[binary]) > 500
    assert compiled.metadata.shared <= 99 * 1024 if target.name == "sm_120" else compiled.metadata.shared <= 163 * 1024


def float8_cases() -> list[CompileCase]:
    """Return the cases of kernels that write FP8 through words of several bytes."""
    paths = [path for path in KERNEL_FILES if path.name.startswith("float8")]
    return [case for path in paths for case in cases_of(path) if case.constexprs.get("PTX")]


def assemblers() -> list[Path]:
    """Return the assemblers for NVIDIA that triton brings; releases have used both for Ada and Hopper."""
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    return sorted(folder.glob("ptxas*"))


@pytest.mark.skipif(not assemblers(), reason="triton brings no ptxas")
@pytest.mark.parametrize("target", ["sm_89", "sm_90"])
@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in float8_cases()])
def test_no_byte_comes_from_the_stack_pointer(case: CompileCase, target: str, tmp_path: Path) -> None:
    """ptxas 12 takes halves of the stack pointer (R1) for bytes of FP8 that a store and a transposed word share.

    These kernels have no stack, so that any instruction that reads R1 reads what nobody wrote.
    """
    compiled = compile_case(case, next(t for t in TARGETS if t.name == target))
    source, binary = tmp_path / "kernel.ptx", tmp_path / "kernel.cubin"
    # Any assembler takes the oldest version of the language that has what is used.
    source.write_text(re.sub(r"^\.version .*", ".version 8.7", compiled.asm["ptx"], flags=re.MULTILINE))
    arch = re.search(r"^\.target (\w+)", compiled.asm["ptx"], flags=re.MULTILINE)
    assert arch is not None
    for assembler in assemblers():
        subprocess.run([assembler, f"-arch={arch[1]}", source, "-o", binary], check=True)
        command = [assembler.with_name("nvdisasm"), "-c", binary]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert "F2FP.SATFINITE" in code
        readers = [line for line in code.splitlines() if re.search(r",[^;]*\bR1\b", line)]
        assert not readers, f"{assembler.name}: {readers[:4]}"


def test_every_kernel_has_a_case() -> None:
    """A kernel that no case compiles is seen here: all `triton.jit` functions that the file launches."""
    for path in KERNEL_FILES:
        text = path.read_text(encoding="utf-8")
        launched = {line.split("[")[0].strip() for line in text.splitlines() if "_kernel[" in line.split("(")[0]}
        compiled = {case.kernel.__name__ for case in cases_of(path)}
        assert launched, f"{path.name} launches no kernel"
        assert launched <= compiled, path.name


def test_missing_arguments_are_told() -> None:
    for path in KERNEL_FILES[:1]:
        case = cases_of(path)[0]
        with pytest.raises(ValueError, match="missing or unknown arguments"):
            compile_for(case.kernel, {}, case.constexprs, TARGETS[0])
