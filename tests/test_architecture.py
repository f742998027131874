"""The laws of the layout, checked on the source: who may import whom, how long a file may be, what names may say."""

from __future__ import annotations

import ast
import dataclasses
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from kernel_pytorch.core.config import KernelPyTorchConfig

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "kernel_pytorch"
FILES = sorted(PACKAGE.rglob("*.py"))

QUICK = [
    "kernel_pytorch",
    "kernel_pytorch.cli",
    "kernel_pytorch.core.config",
    "kernel_pytorch.core.protocols",
    "kernel_pytorch.core.types",
    "kernel_pytorch.core.workload",
    "kernel_pytorch.errors",
]
SIZE_LIMITS = {"core/management/unified_manager.py": 180, "validation/unified_validator.py": 150}
MAX_LINES, MAX_KERNEL_LINES = 500, 800

BANNED = {"advanced", "base", "common", "engine", "framework", "handler", "helper", "helpers", "util", "utils"}
ROADMAP_NAMES = {"advanced_memory", "UnifiedManager", "UnifiedValidator", "unified_manager", "unified_validator"}


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def imported(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.lineno, node.module


def test_imports_point_down() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "0 broken" in done.stdout


def test_every_package_has_a_layer() -> None:
    contract = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[tool.importlinter]")[1]
    named = set(re.findall(r"kernel_pytorch\.[a-z_.]+", contract))
    present = {f"kernel_pytorch.{p.name}" for p in PACKAGE.iterdir() if p.is_dir() and (p / "__init__.py").exists()}
    present |= {f"kernel_pytorch.{p.stem}" for p in PACKAGE.glob("*.py") if p.stem != "__init__"}
    assert present - {"kernel_pytorch.core"} <= named
    core = {f"kernel_pytorch.core.{p.stem}" for p in (PACKAGE / "core").glob("*.py") if p.stem != "__init__"}
    assert core <= named


@pytest.mark.parametrize("module", QUICK)
def test_quick_modules_do_not_import_torch(module: str) -> None:
    heavy = ("torch", "numpy", "scipy", "pydantic", "transformers")
    code = f"import sys, {module}; print(*[m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_importing_the_package_costs_little_beside_torch() -> None:
    code = "import torch, time; t = time.perf_counter(); import kernel_pytorch; print(time.perf_counter() - t)"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(3)]
    assert min(float(r.stdout) for r in runs) < 0.050


def test_core_package_imports_nothing() -> None:
    assert list(imported(PACKAGE / "core" / "__init__.py")) == []


def test_triton_only_in_kernel_files() -> None:
    stray = [
        f"{relative(path)}:{line}"
        for path in FILES
        for line, module in imported(path)
        if module.split(".")[0] == "triton"
        and not path.name.endswith("_kernel.py")
        and "_triton" not in path.parts
        and not _inside_function(path, line)
    ]
    assert stray == []


def test_vendor_software_only_inside_functions_of_its_package() -> None:
    vendors = {"pynvml": "nvidia", "amdsmi": "amd", "torch_xla": "tpu", "intel_extension_for_pytorch": "intel"}
    stray = [
        f"{relative(path)}:{line} imports {module}"
        for path in FILES
        for line, module in imported(path)
        if (vendor := vendors.get(module.split(".")[0]))
        and (vendor not in path.parts or not _inside_function(path, line))
    ]
    assert stray == []


def _inside_function(path: Path, line: int) -> bool:
    functions = (n for n in ast.walk(tree(path)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    return any(f.lineno < line <= (f.end_lineno or f.lineno) for f in functions)


def test_files_stay_small() -> None:
    counts = {relative(path): len(lines(path)) for path in FILES}

    def limit(name: str) -> int:
        return SIZE_LIMITS.get(name, MAX_KERNEL_LINES if name.endswith("_kernel.py") else MAX_LINES)

    assert {name: n for name, n in counts.items() if n > limit(name)} == {}
    assert statistics.median(counts.values()) < 200


def words(name: str) -> set[str]:
    return {w.lower() for w in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)}


def banned_words(name: str) -> set[str]:
    """Return the words of a class, function or module name that say nothing, or that only the roadmap may use."""
    if name in ROADMAP_NAMES:
        return set()
    found = words(name) & BANNED
    found |= words(name) & {"unified"}
    if "manager" in words(name) and not re.search(r"HardwareManager$|^hardware_manager$|^manager(_for)?$", name):
        found.add("manager")
    return found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("SearchEngine", {"engine"}),
        ("PlanManager", {"manager"}),
        ("tensor_utils", {"utils"}),
        ("BaseTransform", {"base"}),
        ("AmdHardwareManager", set()),
        ("UnifiedManager", set()),
        ("UnifiedSearch", {"unified"}),
        ("baseline_ms", set()),
        ("commonly", set()),
    ],
)
def test_banned_words_are_seen(name: str, expected: set[str]) -> None:
    assert banned_words(name) == expected


def _is_named_by_us(function: ast.FunctionDef) -> bool:
    """Return whether a function is public; the base of a comparison is a property, and a noun like its field."""
    is_property = any(isinstance(one, ast.Name) and one.id == "property" for one in function.decorator_list)
    return not function.name.startswith("_") and not is_property


def test_names_say_something() -> None:
    names = [(relative(path), part) for path in FILES for part in path.relative_to(PACKAGE).with_suffix("").parts]
    for path in FILES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ClassDef) or (isinstance(node, ast.FunctionDef) and _is_named_by_us(node)):
                names.append((f"{relative(path)}:{node.lineno}", node.name))
    assert [(where, name) for where, name in names if banned_words(name)] == []


def _reads_of_config() -> set[str]:
    """Return the attributes read, outside config.py, from an expression that names a configuration."""
    found = set()
    for path in FILES:
        if relative(path) == "core/config.py":
            continue
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = ast.unparse(node.value).rpartition(".")[2]
                if owner in {"config", "_config", "chosen", "wanted"}:
                    found.add(node.attr)
    return found


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(KernelPyTorchConfig)])
def test_every_config_field_has_a_reader_and_a_test(field: str) -> None:
    assert field in _reads_of_config(), f"nothing reads config.{field}"
    pattern = re.compile(rf"\b{field}=|\.{field}\b|[\"']{field}[\"']")
    tests = [p for p in (ROOT / "tests").rglob("*.py") if p != Path(__file__)]
    assert any(pattern.search(p.read_text(encoding="utf-8")) for p in tests), f"no test mentions {field}"


def _broad(handler: ast.ExceptHandler) -> bool:
    caught = handler.type
    kinds = caught.elts if isinstance(caught, ast.Tuple) else [caught]
    return any(kind is None or (isinstance(kind, ast.Name) and kind.id in _BROAD) for kind in kinds)


_BROAD = {"Exception", "BaseException"}


def test_broad_excepts_say_why() -> None:
    """Foreign code may raise anything: where that is so, the line says it, or the error goes on as ours."""
    silent = []
    for path in FILES:
        if relative(path) == "search/trial.py":
            continue
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ExceptHandler) and _broad(node):
                reason = lines(path)[node.lineno - 1].partition("#")[2].replace("noqa: BLE001", "").strip(" -#")
                if len(reason) < 10 and not isinstance(node.body[-1], ast.Raise):
                    silent.append(f"{relative(path)}:{node.lineno}")
    assert silent == []


def test_no_except_passes_over_everything() -> None:
    silent = [
        f"{relative(path)}:{node.lineno}"
        for path in FILES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ExceptHandler) and _broad(node) and isinstance(node.body[0], ast.Pass)
    ]
    assert silent == []


def test_only_the_command_line_prints() -> None:
    printing = [
        f"{relative(path)}:{node.lineno}"
        for path in FILES
        if not relative(path).startswith("cli/")
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert printing == []


def test_nothing_is_left_to_do() -> None:
    marks = re.compile(r"#\s*(TODO|FIXME|XXX|HACK)\b|raise NotImplementedError")
    left = [
        f"{relative(path)}:{number}"
        for path in FILES
        for number, line in enumerate(lines(path), 1)
        if marks.search(line)
    ]
    assert left == []


def test_a_plan_holds_no_code() -> None:
    """`plan.json` is data: the modules that read it load no pickle and evaluate nothing."""
    unsafe = {"pickle", "cloudpickle", "marshal", "shelve", "dill"}
    found = [
        f"{relative(path)}:{line} {module}"
        for path in FILES
        if path.parent.name == "plan"
        for line, module in imported(path)
        if module.split(".")[0] in unsafe
    ]
    calls = [
        f"{relative(path)}:{node.lineno}"
        for path in FILES
        if path.parent.name == "plan"
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"eval", "exec"}
    ]
    assert found + calls == []
