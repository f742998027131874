"""Documents say what is so: figures come from artefacts, commands and names exist, links lead somewhere."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

import kernel_pytorch as kp

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]

FIGURE = re.compile(
    r"<!--\s*figure:\s*(?P<file>[^#\s]+)#(?P<pointer>\S+?)\s*-->\s*\**"
    r"(?P<number>[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?)\s*(?P<unit>x|%|ms|s\b|GB|MB)?"
)
SPEEDUP = re.compile(r"(?<![\w.])\d+(?:\.\d+)?\s?(?:x\b(?!\s?\d)|times as fast|% faster)")
SCALE = {"%": 100.0, "MB": 1e-6, "GB": 1e-9}


def without_code(text: str) -> str:
    """Return a document without what is code: fenced blocks and spans in backticks."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def lookup(value: Any, pointer: str) -> Any:
    """Return what a dotted pointer names in JSON: keys of objects, positions in arrays."""
    for part in pointer.split("."):
        value = value[int(part)] if isinstance(value, list) else value[part]
    return value


def wrong_figures(text: str, root: Path) -> list[str]:
    """Return a sentence for each marked figure that its artefact does not show.

    A figure is written as `<!-- figure: benchmarks/results/DEVICE/NAME.json#a.b.0 -->2.9x`: the value at that
    pointer, rounded to the digits shown (`%` is a fraction times 100).
    """
    wrong = []
    for mark in re.finditer(r"<!--\s*figure:.*?-->", text, re.DOTALL):
        found = FIGURE.match(text, mark.start())
        if found is None:
            wrong.append(f"{mark[0]}: no number follows, or it names no file#pointer")
            continue
        try:
            value = float(lookup(json.loads((root / found["file"]).read_text(encoding="utf-8")), found["pointer"]))
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            wrong.append(f"{mark[0]}: {type(error).__name__}: {error}")
            continue
        value *= SCALE.get(found["unit"], 1.0)
        shown = found["number"].replace(",", "")
        mantissa, _, exponent = shown.partition("e")
        step = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
        if abs(value - float(shown)) > step * 0.5 * (1 + 1e-9):
            wrong.append(f"{mark[0]}: the artefact says {value:g}, the text {shown}")
    return wrong


def unmarked_speedups(text: str) -> list[str]:
    """Return the speed-ups that a text claims without naming an artefact."""
    return SPEEDUP.findall(without_code(FIGURE.sub("", text)))


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_figures_are_compared_with_their_artefact(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"ratio": {"value": 2.8537}, "rows": [0.0123], "bytes": 5.26e8}))
    right = [
        "<!-- figure: a.json#ratio.value -->2.9x",
        "<!-- figure: a.json#ratio.value -->**2.85x** faster",
        "<!-- figure: a.json#rows.0 -->1.2e-2",
        "<!-- figure: a.json#rows.0 -->1.23 %",
        "<!-- figure: a.json#bytes -->526 MB",
    ]
    assert wrong_figures(" and ".join(right), tmp_path) == []
    wrong = [
        ("<!-- figure: a.json#ratio.value -->3.0x", "the artefact says 2.8537"),
        ("<!-- figure: a.json#ratio.value -->2.86x", "the artefact says 2.8537"),
        ("<!-- figure: a.json#ratio.low -->2.9x", "KeyError"),
        ("<!-- figure: a.json#rows.1 -->1", "IndexError"),
        ("<!-- figure: b.json#ratio.value -->2.9x", "FileNotFoundError"),
        ("<!-- figure: a.json#ratio -->2.9x", "TypeError"),
        ("<!-- figure: a.json -->2.9x", "names no file#pointer"),
        ("<!-- figure: a.json#ratio.value -->almost three", "no number follows"),
    ]
    for text, reason in wrong:
        assert [reason in sentence for sentence in wrong_figures(text, tmp_path)] == [True], text


def test_speedups_without_an_artefact_are_seen() -> None:
    assert len(unmarked_speedups("It is 2.9x, or 3 times as fast, or 40 % faster, or 20% faster.")) == 4
    assert unmarked_speedups("<!-- figure: a.json#b -->2.9x on a 16 x 128 batch, `2x`, x86, 64x64 pixels") == []


@pytest.mark.parametrize("name", NAMES)
def test_figures_come_from_artefacts(name: str) -> None:
    assert wrong_figures(read(name), ROOT) == []


@pytest.mark.parametrize("name", [n for n in NAMES if n in ("README.md", "docs/deployment.md", "docs/architecture.md")])
def test_no_speedup_is_claimed_without_an_artefact(name: str) -> None:
    assert unmarked_speedups(read(name)) == []


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(read(name))):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / name).parent / file if file else ROOT / name
        if not path.exists() or (anchor and anchor not in anchors(path.read_text(encoding="utf-8"))):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("name", NAMES)
def test_documents_speak_of_the_project_alone(name: str) -> None:
    assert re.findall(r"/work/|/root/|/tmp/|/home/|\bissue #?\d+", read(name)) == []


@pytest.mark.parametrize("name", NAMES)
def test_make_targets_exist(name: str) -> None:
    targets = set(re.findall(r"^([a-z]+):", read("Makefile"), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z]+)", read(name), re.MULTILINE)) <= targets


@pytest.mark.parametrize("name", NAMES)
def test_commands_and_options_exist(name: str) -> None:
    from kernel_pytorch.cli.commands import kpt

    verbs = kpt.commands
    for line in re.findall(r"(?:^|`)(?:\.venv/bin/)?kpt ([^`\n]+)", read(name), re.MULTILINE):
        words = line.split("#")[0].split()
        if words[0].startswith("-") or words[0].isupper():  # an option of `kpt` itself, or a placeholder
            continue
        assert words[0] in verbs, f"kpt {line}"
        verb = verbs[words[0]]
        if hasattr(verb, "commands") and len(words) > 1 and words[1] in verb.commands:
            verb = verb.commands[words[1]]
        known = {option for parameter in verb.params for option in parameter.opts} | {"--help"}
        given = {re.split(r"[=|\]]", word.lstrip("["))[0] for word in words if re.match(r"\[?-", word)}
        assert given <= known, f"kpt {line}"


@pytest.mark.parametrize("name", NAMES)
def test_python_in_documents_compiles_and_its_names_exist(name: str) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", read(name), re.MULTILINE | re.DOTALL)
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "kp":
                assert node.attr in kp.__all__, f"kp.{node.attr}"
    for attribute in re.findall(r"`kp\.([a-zA-Z_]+)", read(name)):
        assert attribute in kp.__all__, f"kp.{attribute}"


def test_first_screen_of_the_readme_has_the_two_commands() -> None:
    first_screen = "\n".join(read("README.md").splitlines()[:40])
    assert re.search(r"^make demo\b", first_screen, re.MULTILINE)
    assert re.search(r"^make test\b", first_screen, re.MULTILINE)


def test_ci_runs_the_readmes_test_command() -> None:
    assert re.search(r"^make .*\btest\b", read(".ci/run"), re.MULTILINE)
    subprocess.run(["bash", "-n", str(ROOT / ".ci" / "run")], check=True)


def test_make_help_tells_every_target() -> None:
    phony = set(re.search(r"^\.PHONY: (.+)$", read("Makefile"), re.MULTILINE)[1].split())
    command = ["make", "--no-print-directory", "help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert {line.split()[0] for line in done.stdout.splitlines()} == phony


def test_changelog_knows_this_version() -> None:
    changelog = read("CHANGELOG.md")
    version = tomllib.loads(read("pyproject.toml"))["project"]["version"]
    assert version == kp.__version__
    assert f"## [{version}]" in changelog or "## [Unreleased]" in changelog
    sections = set(re.findall(r"^### (.+)$", changelog, re.MULTILINE))
    assert sections <= {
        "Added", "Changed", "Deprecated", "Removed", "Fixed", "Security", "Numerics", "Performance"
    }  # fmt: skip
    assert {"Added", "Numerics", "Performance"} <= sections


def test_generated_pages_are_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, text in module.generated().items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == text, f"docs/{name}: run `make docs`"
