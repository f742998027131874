"""Every kernel of every op compiles for every GPU target, without a GPU."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import kernel_pytorch
from kernel_pytorch._triton.targets import TARGETS, CompileCase, Target, compile_case, compile_for

PACKAGE = Path(kernel_pytorch.__file__).parent
KERNEL_FILES = sorted(PACKAGE.rglob("*_kernel.py"))
EVERYWHERE = os.environ.get("KPT_COMPILE_ALL") == "1"


def cases_of(path: Path) -> list[CompileCase]:
    name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    return list(importlib.import_module(name).COMPILE_CASES)


def matrix() -> list[tuple[CompileCase, Target]]:
    """Return the first case of each kernel for every target, and its other cases for one target."""
    pairs = []
    for path in KERNEL_FILES:
        seen = set()
        for case in cases_of(path):
            first = case.kernel.__name__ not in seen
            seen.add(case.kernel.__name__)
            wanted = [t for t in TARGETS if case.targets is None or t.name in case.targets]
            pairs += [(case, t) for t in wanted if EVERYWHERE or first or t.name == "sm_90"]
    return pairs


@pytest.mark.parametrize(("case", "target"), [pytest.param(c, t, id=f"{c.name}-{t.name}") for c, t in matrix()])
def test_it_compiles(case: CompileCase, target: Target) -> None:
    compiled = compile_case(case, target)
    binary = "cubin" if target.backend == "cuda" else "hsaco"
    assert len(compiled.asm[binary]) > 500
    assert compiled.metadata.shared <= 99 * 1024 if target.name == "sm_120" else compiled.metadata.shared <= 163 * 1024


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
