"""Benchmark scripts as modules, with their neighbours importable as when they are run."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"


def load(name: str) -> ModuleType:
    known = f"benchmark_{name}"
    if known in sys.modules:
        return sys.modules[known]
    before = list(sys.path)
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location(known, BENCHMARKS / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[known] = module  # its dataclasses look it up
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = before
    return module
