"""The GitHub Action, the GitLab recipe and the example repository: what they are made of, and what they do."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from kernel_pytorch.guard.saved import read_comparisons
from kernel_pytorch.report.comparison import as_json

from .compared import HOSTILE, comparison, passing

yaml = pytest.importorskip("yaml", reason="pip install 'kernel-pytorch[dev]'")

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "production" / "ci_gate"
ACTION = yaml.safe_load((ROOT / "action.yml").read_text())
WORKFLOW = yaml.safe_load((EXAMPLE / ".github" / "workflows" / "performance.yml").read_text())
GITLAB = yaml.safe_load((EXAMPLE / ".gitlab-ci.yml").read_text())
STEPS = {step["name"]: step for step in ACTION["runs"]["steps"]}
LOADED = any(point.value == "kernel_pytorch.pytest_plugin" for point in entry_points(group="pytest11"))
PLUGIN = () if LOADED else ("-p", "kernel_pytorch.pytest_plugin")

DEFAULTS = {name: str(given.get("default", "")) for name, given in ACTION["inputs"].items()}
EXPRESSION = re.compile(r"\$\{\{\s*(.*?)\s*\}\}")


def expressions(value: Any) -> list[str]:
    """Return the expressions in a part of a workflow."""
    return re.findall(r"\$\{\{.*?\}\}", json.dumps(value))


def workflow_steps() -> list[dict[str, Any]]:
    return [step for job in WORKFLOW["jobs"].values() for step in job["steps"]]


def test_scripts_hold_no_expression() -> None:
    """What a runner puts into a script before bash reads it is code, whoever chose the name of the branch."""
    for step in [*STEPS.values(), *workflow_steps()]:
        assert expressions(step.get("run", "")) == [], step["name"]


def test_the_action_is_well_formed() -> None:
    assert ACTION["runs"]["using"] == "composite"
    for name, step in STEPS.items():
        assert ("run" in step) != ("uses" in step), name
        assert ("run" in step) == ("shell" in step), name
    for given in (*ACTION["inputs"].values(), *ACTION["outputs"].values()):
        assert given["description"].endswith((".", ";"))
    used = set(re.findall(r"\binputs\.([a-z-]+)", json.dumps(ACTION["runs"])))
    assert used == set(ACTION["inputs"]), "every input is read, and none that is not declared"
    ids = {step["id"] for step in STEPS.values() if "id" in step}
    assert set(re.findall(r"\bsteps\.([a-z-]+)\.", json.dumps(ACTION))) == ids
    written = set(re.findall(r"(?:echo \"|outputs\.write\(f\")(\w+)=", STEPS["Compare"]["run"]))
    assert set(re.findall(r"steps\.compare\.outputs\.(\w+)", json.dumps(ACTION))) == written


@pytest.mark.parametrize("name", [name for name, step in STEPS.items() if "run" in step])
def test_scripts_are_bash(name: str) -> None:
    done = subprocess.run(["bash", "-n"], input=STEPS[name]["run"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    environment, script = STEPS[name]["env"], STEPS[name]["run"]
    local = set(re.findall(r"\b([A-Za-z_]+)=", script))
    runner = {"GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY", "RUNNER_TEMP"}
    read = set(re.findall(r"\$\{?#?([A-Z][A-Z_]+)", script))
    assert read <= set(environment) | local | runner
    for variable in environment:
        assert re.search(rf"\b{variable}\b", script) or variable == "GH_TOKEN", f"{variable} is not read"


def test_actionlint_agrees() -> None:
    actionlint = shutil.which("actionlint")
    if actionlint is None:
        pytest.skip("actionlint is not installed")
    file = EXAMPLE / ".github" / "workflows" / "performance.yml"
    done = subprocess.run([actionlint, str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_workflow_asks_for_little_and_uses_what_there_is() -> None:
    triggers = WORKFLOW[True]  # YAML 1.1 reads `on` as a boolean; GitHub does not
    assert set(triggers) == {"pull_request", "push"}, "never pull_request_target"
    assert WORKFLOW["permissions"] == {"contents": "read", "pull-requests": "write"}
    (gate,) = [step for step in workflow_steps() if "kernel_pytorch@" in step.get("uses", "")]
    assert set(gate["with"]) <= set(ACTION["inputs"])
    checkout = next(step for step in workflow_steps() if step.get("uses", "").startswith("actions/checkout@"))
    assert checkout["with"] == {"fetch-depth": 0, "persist-credentials": False}
    assert all("timeout-minutes" in job for job in WORKFLOW["jobs"].values())
    for step in (*workflow_steps(), *STEPS.values()):
        assert re.search(r"@v\d", step.get("uses", "@v1")), step


def test_the_gitlab_recipe_reports_where_a_merge_request_shows_it() -> None:
    job = GITLAB["performance"]
    assert job["rules"] == [{"if": '$CI_PIPELINE_SOURCE == "merge_request_event"'}]
    script = "\n".join(job["script"])
    written = set(re.findall(r"--kpt-report (\S+)", script))
    reports = job["artifacts"]["reports"]
    assert {reports["junit"], reports["metrics"]} <= written
    assert reports["junit"].endswith(".xml")
    assert reports["metrics"].endswith(".prom")
    for line in (*job["before_script"], *job["script"], *job["after_script"]):
        subprocess.run(["bash", "-n", "-c", line], check=True)
        bare = re.sub(r'"[^"]*"', "", line)
        assert "$" not in bare, "variables stand in quotes"


def test_options_in_the_recipes_exist() -> None:
    from kernel_pytorch.cli.commands import kpt

    known = {option for parameter in kpt.commands["compare"].params for option in parameter.opts}
    scripts = [STEPS["Compare"]["run"], (EXAMPLE / "Makefile").read_text()]
    for script in scripts:
        lines = [
            line for line in script.replace("\\\n", " ").splitlines() if re.search(r"compare |options\+?=\(", line)
        ]
        given = {word for line in lines for word in re.findall(r"(?<![\w-])--[a-z][a-z-]+", line)}
        assert given
        assert given <= known


class Gate:
    """Runs steps of the action as a runner does, in a checkout."""

    def __init__(self, place: Path, checkout: Path, **inputs: str) -> None:
        self.place, self.checkout = place, checkout
        self.inputs = {**DEFAULTS, "python": sys.executable, **inputs}
        self.github: dict[str, str] = {
            "github.repository": "octo/repo", "github.action_path": str(ROOT), "github.token": "secret",
            "github.event.pull_request.number": "7",
        }  # fmt: skip
        self.outputs: dict[str, str] = {}
        self.path = place / "bin"
        for directory in (self.path, place / "tmp"):
            directory.mkdir(parents=True, exist_ok=True)

    def value(self, expression: str) -> str:
        """Return what `a || b` is: contexts and defaults alone are used in the environment."""
        for name in expression.split("||"):
            kind, _, rest = name.strip().partition(".")
            if kind == "steps":
                found = self.outputs.get(rest.rpartition(".")[2], "")
            else:
                found = self.inputs[rest] if kind == "inputs" else self.github.get(name.strip(), "")
            if found:
                return EXPRESSION.sub(lambda match: self.value(match[1]), found)
        return ""

    def run(self, name: str, extra: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        step = STEPS[name]
        own = {k: EXPRESSION.sub(lambda match: self.value(match[1]), str(v)) for k, v in step["env"].items()}
        files = {"GITHUB_OUTPUT": self.place / "output", "GITHUB_STEP_SUMMARY": self.place / "summary"}
        environment = {
            **os.environ, **{k: str(v) for k, v in files.items()}, "RUNNER_TEMP": str(self.place / "tmp"),
            "PATH": f"{self.path}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", **own, **(extra or {}),
        }  # fmt: skip
        script = self.place / "step.sh"
        script.write_text(step["run"])
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", str(script)],
            cwd=self.checkout, env=environment, capture_output=True, text=True, timeout=280, check=False,
        )  # fmt: skip
        if files["GITHUB_OUTPUT"].exists():
            for line in files["GITHUB_OUTPUT"].read_text().splitlines():
                key, _, value = line.partition("=")
                self.outputs[key] = value
        return done

    @property
    def report(self) -> Path:
        return Path(self.outputs["report"])

    def stub_python(self, *outcomes: tuple[int, Any]) -> None:
        """Let `kpt compare` be a program that notes its arguments and ends as it is told, one outcome a call."""
        for i, (code, data) in enumerate(outcomes):
            (self.place / f"outcome{i}").write_text(f"{code}\n{'' if data is None else json.dumps(data)}")
        stub = self.path / "python-stub"
        stub.write_text(
            f"#!{sys.executable}\n"
            "import json, os, sys\nfrom pathlib import Path\n"
            f"if sys.argv[1] == '-': os.execv({sys.executable!r}, [{sys.executable!r}, '-'])\n"
            f"place = Path({str(self.place)!r})\n"
            "number = len(list(place.glob('call*')))\n"
            "told = {'arguments': sys.argv[1:], 'history': os.environ['KPT_HISTORY']}\n"
            "(place / f'call{number}').write_text(json.dumps(told))\n"
            "code, _, data = (place / f'outcome{number}').read_text().partition('\\n')\n"
            "if data: Path(sys.argv[sys.argv.index('-o') + 1]).write_text(data)\n"
            "if int(code) == 2: print('kpt: error: it went `wrong` <b>', file=sys.stderr)\n"
            "sys.exit(int(code))\n"
        )
        stub.chmod(0o755)
        self.inputs["python"] = str(stub)

    def calls(self) -> list[dict[str, Any]]:
        return [json.loads(file.read_text()) for file in sorted(self.place.glob("call*"))]

    def stub_gh(self, *, found: str = "", code: int = 0) -> Path:
        """Let `gh` note its arguments, and find a comment with this id."""
        stub, log = self.path / "gh", self.place / "gh.log"
        stub.write_text(
            f"#!{sys.executable}\nimport json, sys\n"
            f"open({str(log)!r}, 'a').write(json.dumps(sys.argv[1:]) + '\\n')\n"
            f"if '--jq' in sys.argv: print({found!r})\nsys.exit({code})\n"
        )
        stub.chmod(0o755)
        return log


def git(repository: Path, *arguments: str) -> str:
    quiet = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", *quiet, *arguments], cwd=repository, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """A repository with two commits that holds nothing to run."""
    repository = tmp_path / "repository"
    repository.mkdir()
    git(repository, "init", "-q", "-b", "main")
    for message in ("one", "two"):
        git(repository, "commit", "-q", "--allow-empty", "-m", message)
    return repository


@pytest.fixture
def gate(tmp_path: Path, empty: Path) -> Gate:
    made = Gate(tmp_path / "runner", empty)
    made.github["github.event.pull_request.base.sha"] = git(empty, "rev-parse", "HEAD^")
    return made


def test_each_target_is_compared_and_the_worst_counts(gate: Gate) -> None:
    gate.inputs |= {"target": "a.py:f\n\n  b.py:g  \n", "max-slowdown": "0.1", "history": "postgresql://secret"}
    gate.stub_python((0, as_json(passing())), (1, as_json(comparison())))
    done = gate.run("Compare")
    assert done.returncode == 0, done.stderr
    first, second = gate.calls()
    assert first["arguments"][-2:] == ["--", "a.py:f"]
    assert second["arguments"][-2:] == ["--", "b.py:g"]
    assert first["arguments"][:6] == ["-m", "kernel_pytorch", "compare", "--base", first["arguments"][4], "--head"]
    assert first["arguments"][4] == git(gate.checkout, "rev-parse", "HEAD^")
    assert first["arguments"][first["arguments"].index("--max-slowdown") + 1] == "0.1"
    assert first["history"] == "postgresql://secret"
    assert "secret" not in " ".join(first["arguments"]), "what others can see in the list of processes"
    assert gate.outputs["code"] == "1"
    assert gate.outputs["verdict"] == "FAIL"
    comment = (gate.report / "comment.md").read_text()
    assert comment.startswith("<!-- kpt -->\n### Performance: 1 FAIL, 1 PASS\n")
    assert {file.name for file in gate.report.iterdir()} >= {"001.json", "002.json", "junit.xml", "kpt.prom"}
    assert gate.run("Verdict").returncode == 1
    assert gate.run("Job summary").returncode == 0
    assert (gate.place / "summary").read_text() == comment


def test_a_command_is_one_argument_and_nothing_is_recorded_by_default(gate: Gate) -> None:
    gate.inputs["command"] = "python bench.py --n 3; echo $HOME"
    gate.stub_python((0, as_json(passing())))
    assert gate.run("Compare").returncode == 0
    (call,) = gate.calls()
    assert call["arguments"][-2:] == ["--command", "python bench.py --n 3; echo $HOME"]
    assert call["history"] == "none"
    assert gate.outputs["verdict"] == "PASS"
    assert gate.run("Verdict").returncode == 0


def test_what_cannot_be_compared_is_an_error_with_its_reason(gate: Gate) -> None:
    gate.inputs["target"] = "a.py:f\nb.py:g"
    gate.stub_python((2, None), (0, as_json(passing())))
    assert gate.run("Compare").returncode == 0
    assert gate.outputs["verdict"] == "ERROR"
    comment = (gate.report / "comment.md").read_text()
    assert "1 PASS" in comment
    assert "\n```text\nkpt: error: it went `wrong` <b>\n```\n" in comment
    assert gate.run("Verdict").returncode == 2


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ({}, "nothing says what to run"),
        ({"target": "a.py:f", "base": "0" * 40}, "nothing to compare with"),
        ({"target": "a.py:f", "base": "--upload-pack=touch pwned"}, "does not begin with a dash"),
        ({"target": "a.py:f", "head": "--output=pwned"}, "does not begin with a dash"),
        ({"target": "a.py:f", "base": "nowhere"}, "the base nowhere is neither here nor at origin"),
        ({"target": "a.py:f", "comment-id": 'x") | halt_error'}, "comment-id may have letters"),
    ],
)
def test_wrong_inputs_are_refused_with_the_reason(gate: Gate, inputs: dict[str, str], reason: str) -> None:
    gate.inputs |= inputs
    gate.stub_python()
    done = gate.run("Compare")
    assert done.returncode == 1
    assert reason in done.stderr
    assert gate.outputs["verdict"] == "ERROR"
    assert gate.calls() == []
    assert gate.run("Job summary").returncode == 0
    assert reason in (gate.place / "summary").read_text()
    assert gate.run("Verdict").returncode == 1
    assert not list(gate.place.parent.rglob("pwned"))


@pytest.mark.parametrize(
    "evil", ["$(touch pwned)", "`touch pwned`", "'; touch pwned; '", '"; touch pwned; "', "--help"]
)
def test_inputs_are_no_code(gate: Gate, evil: str) -> None:
    gate.inputs |= {
        "target": evil,
        "command": evil,
        "max-slowdown": evil,
        "budget": evil,
        "mode": evil,
        "history": evil,
    }
    gate.stub_python((2, None), (2, None))
    gate.run("Compare")
    commanded, targeted = gate.calls()
    assert commanded["arguments"][-2:] == ["--command", evil]
    assert targeted["arguments"][-2:] == ["--", evil]
    assert commanded["arguments"].count(evil) == 4
    gate.inputs["base"] = evil
    gate.run("Compare")
    assert not list(gate.place.parent.rglob("pwned"))


def test_a_base_that_is_only_at_origin_is_fetched(gate: Gate, tmp_path: Path) -> None:
    shallow = tmp_path / "shallow"
    subprocess.run(["git", "clone", "-q", "--depth=1", gate.checkout.as_uri(), str(shallow)], check=True)
    base = git(gate.checkout, "rev-parse", "HEAD^")
    git(gate.checkout, "config", "uploadpack.allowAnySHA1InWant", "true")
    gate.checkout = shallow
    gate.inputs["target"] = "a.py:f"
    gate.stub_python((0, as_json(passing())))
    assert gate.run("Compare").returncode == 0
    assert gate.calls()[0]["arguments"][4] == base
    assert git(shallow, "cat-file", "-t", base) == "commit"


def commented(gate: Gate) -> list[list[str]]:
    return [json.loads(line) for line in (gate.place / "gh.log").read_text().splitlines()]


@pytest.fixture
def judged(gate: Gate) -> Gate:
    gate.inputs["target"] = "a.py:f"
    gate.stub_python((1, as_json(comparison(name=HOSTILE, reason=HOSTILE))))
    assert gate.run("Compare").returncode == 0
    return gate


def test_the_first_comment_is_made_and_later_ones_update_it(judged: Gate) -> None:
    judged.stub_gh()
    assert judged.run("Comment").returncode == 0
    found, made = commented(judged)
    assert "repos/octo/repo/issues/7/comments" in found
    assert made == [
        "api", "--silent", "--method", "POST", "repos/octo/repo/issues/7/comments",
        "-F", f"body=@{judged.report / 'comment.md'}",
    ]  # fmt: skip
    judged.stub_gh(found="123\n456")
    assert judged.run("Comment").returncode == 0
    assert commented(judged)[-1][:5] == ["api", "--silent", "--method", "PATCH", "repos/octo/repo/issues/comments/123"]


def test_comments_are_found_by_their_mark_and_only_if_a_bot_wrote_them(judged: Gate) -> None:
    if shutil.which("jq") is None:
        pytest.skip("jq is not installed")
    judged.stub_gh()
    judged.run("Comment")
    query = commented(judged)[0][-1]
    comments = [
        {"id": 1, "user": {"type": "User"}, "body": "<!-- kpt --> mine"},
        {"id": 2, "user": {"type": "Bot"}, "body": "other\n<!-- kpt -->"},
        {"id": 3, "user": {"type": "Bot"}, "body": "<!-- kpt-gpu -->\nanother gate"},
        {"id": 4, "user": {"type": "Bot"}, "body": "<!-- kpt -->\nours"},
    ]
    done = subprocess.run(["jq", query], input=json.dumps(comments), capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["4"]


def test_a_token_that_may_not_comment_is_told_and_fails_nothing(judged: Gate) -> None:
    judged.stub_gh(code=1)
    done = judged.run("Comment")
    assert done.returncode == 0
    assert done.stdout.startswith("::warning title=kpt::no comment:")


SLOW = "encoded = torch.stack([torch.stack([self.encode(one) for one in row]) for row in passages])"


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example as a repository: `main`; `slow`, with a commit that slows the model; `harmless`, with another."""
    repository = tmp_path_factory.mktemp("ci_gate") / "ranker"
    shutil.copytree(EXAMPLE, repository, ignore=shutil.ignore_patterns("__pycache__", "out", ".pytest_cache"))
    git(repository, "init", "-q", "-b", "main")
    git(repository, "add", "-A")
    git(repository, "commit", "-q", "-m", "A ranker")
    model = repository / "src" / "ranker" / "model.py"
    text = model.read_text()
    for branch, new, message in (
        ("slow", SLOW, "Encode passages one by one"),
        ("harmless", "encoded = self.encode(passages)  # (batch, passages, width)", "Say the shape"),
    ):
        git(repository, "checkout", "-q", "-b", branch, "main")
        assert text.count("encoded = self.encode(passages)") == 1
        model.write_text(text.replace("encoded = self.encode(passages)", new))
        git(repository, "commit", "-q", "-am", message)
    return repository


@pytest.mark.slow
def test_the_action_fails_a_commit_that_slows_the_model_and_names_it(example: Path, tmp_path: Path) -> None:
    git(example, "checkout", "-q", "slow")
    gate = Gate(tmp_path / "runner", example, target="perf/workload.py:workload", budget="30")
    gate.inputs["max-slowdown"] = "0.05"
    gate.github["github.event.pull_request.base.sha"] = git(example, "rev-parse", "main")
    done = gate.run("Compare")
    assert gate.outputs["verdict"] == "FAIL", done.stdout + done.stderr
    assert gate.outputs["code"] == "1"
    (found,) = read_comparisons(gate.report / "001.json")
    assert found.change.value > 1.05
    assert found.change.low > 1
    assert found.head.revision == git(example, "rev-parse", "slow")
    assert any("Encode passages one by one" in culprit.what for culprit in found.culprits), found.culprits
    comment = (gate.report / "comment.md").read_text()
    assert "❌ FAIL" in comment
    assert "Encode passages one by one" in comment
    assert git(example, "status", "--porcelain") == "", "the checkout is as it was"
    assert len(git(example, "worktree", "list").splitlines()) == 1


@pytest.mark.slow
def test_make_gate_does_not_fail_a_commit_that_changes_no_speed(example: Path) -> None:
    git(example, "checkout", "-q", "harmless")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def make(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["make", "--no-print-directory", f"PYTHON={sys.executable}", *arguments]
        return subprocess.run(
            command, cwd=example, env=environment, capture_output=True, text=True, timeout=280, check=False
        )

    # Whether what is no slower is told so is the business of `benchmarks/guard_live.py`, on a machine of its own.
    done = make("gate", "BASE=main", "MAX_SLOWDOWN=0.9")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^(PASS|INCONCLUSIVE)  ", done.stdout, re.MULTILINE)
    assert (example / "out" / "gate.md").read_text().startswith("### Performance: 1 ")
    if importlib.util.find_spec("sqlalchemy") is not None:
        done = make("trend")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "workload:workload" in (example / "out" / "trends.html").read_text()


@pytest.mark.slow
def test_the_tests_of_the_example_pass_alone_and_fail_against_a_faster_base(example: Path) -> None:
    git(example, "checkout", "-q", "slow")
    options = [*PLUGIN, "-p", "no:cacheprovider", "--kpt-history=none", "-rs"]
    command = [sys.executable, "-m", "pytest", *options, "tests/test_model.py", "tests/test_speed.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *more], cwd=example, env=environment, capture_output=True, text=True, timeout=280, check=False
        )

    git(example, "checkout", "-q", "main")
    alone = run()
    assert alone.returncode == 0, alone.stdout + alone.stderr
    assert "3 passed, 1 skipped" in alone.stdout
    assert "--kpt-base" in alone.stdout
    git(example, "checkout", "-q", "slow")
    against = run("--kpt-base=main", "--kpt-report=out/comment.md", "-k", "base_revision")
    assert against.returncode == 1, against.stdout + against.stderr
    assert re.search(r"^kpt: FAIL  ranker: .* slower", against.stdout, re.MULTILINE)
    assert "Encode passages one by one" in against.stdout
    assert "❌ FAIL" in (example / "out" / "comment.md").read_text()
