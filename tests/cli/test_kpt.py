"""The command line's manners: data on stdout, log on stderr, exit codes, speed, interruption, closed pipes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from kernel_pytorch.cli import main
from kernel_pytorch.cli.search import default_directory

HEAVY = {"torch", "pydantic", "rich", "numpy", "scipy", "typer", "jinja2"}


def loaded_by(code: str) -> set[str]:
    code += "\nimport sys; print(*sorted({m.partition('.')[0] for m in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.serial
def test_help_imports_nothing_heavy_and_answers_at_once():
    code = "from kernel_pytorch.cli import main\nimport sys\nassert main(['--help']) == 0"
    assert not HEAVY & loaded_by(code)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "kernel_pytorch", "--help"], check=True, capture_output=True)
        times.append(time.perf_counter() - started)
    assert min(times) < 0.4, "0.07 s where it was measured; generous for a busy machine"


@pytest.mark.parametrize(
    "verb", ["detect", "predict", "optimize", "explain", "apply", "validate", "eject", "check", "compare"]
)
def test_every_verb_has_help_and_a_format(capsys, verb):
    assert main([verb, "--help"]) == 0
    out = capsys.readouterr().out
    assert "--format" in out
    assert not [line for line in out.splitlines() if line.rstrip().endswith("...")]


def test_without_arguments_there_is_help(capsys):
    assert main([]) == 0
    assert "optimize" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("kpt 0.")


def test_detect_tells_the_machine_as_json(kpt):
    done = kpt("detect", "--format", "json")
    told = json.loads(done.out)
    assert told["device"]["vendor"]
    names = [t["name"] for t in told["transforms"]]
    assert "dtype" in names
    assert len(names) == len(set(names))
    assert all(t["available"] or t["reason"] for t in told["transforms"])
    fixable = [t for t in told["transforms"] if t["fix"]]
    assert done.code == (1 if fixable else 0)
    assert told["fixable"] == len(fixable)


def test_detect_exits_1_where_something_can_be_installed(monkeypatch, capsys):
    from kernel_pytorch import catalog
    from kernel_pytorch.core.types import Skip

    class Missing:
        name, summary = "missing", "would help"

        def probe(self, device):
            return Skip("not installed", fix="pip install it")

    monkeypatch.setattr(catalog, "TRANSFORMS", (Missing(),))
    assert main(["detect"]) == 1
    out = capsys.readouterr().out
    assert "pip install it" in out
    monkeypatch.setattr(Missing, "probe", lambda *_: Skip("no such hardware"))
    assert main(["detect"]) == 0


def test_no_color_is_honoured(kpt):
    done = kpt("detect", NO_COLOR="1", FORCE_COLOR="1")
    assert "dtype" in done.out
    assert "\x1b[3" not in done.out


def test_what_the_user_prints_stays_out_of_the_data(kpt):
    done = kpt("predict", "nets.py:net", "--format", "json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["workload"]["parameters"] == 178
    assert "the user's own print" in done.err


@pytest.mark.slow
def test_optimize_explain_apply_and_eject_in_one_go(kpt, files):
    asked = "optimize nets.py:net --budget 20 --only dtype --isolation none --format json -o out"
    done = kpt(*asked.split())
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert {t["candidate"] for t in told["trials"]} >= {"unmodified", "dtype(how=cast, to=bfloat16)"} or told["untried"]
    explained = kpt("explain", "out", "--format", "json")
    assert explained.code == 0
    again = json.loads(explained.out)
    assert {k: told[k] for k in again} == again
    assert again["command"].startswith("kpt optimize nets.py:net --budget 20")
    assert {"speedup", "speedup_low", "speedup_high", "chosen", "numerics", "device", "software", "trials"} <= set(
        again
    )
    assert {"passed", "max_rel_error", "budget", "worst"} <= set(again["numerics"])
    assert all({"candidate", "status", "reason", "speedup", "peak_bytes"} <= set(t) for t in again["trials"])
    assert (files / "out" / "report.html").stat().st_size > 1000
    resumed = kpt("optimize", "nets.py:net", "--only", "dtype", "--isolation", "none", "-o", "out", "--resume")
    assert resumed.code == 0, resumed.err
    other = kpt("optimize", "nets.py:net", "--only", "dtype", "--seed", "5", "-o", "out", "--resume")
    assert other.code == 2
    assert "--resume" in other.err


def test_the_head_trains_in_float8_only_where_it_is_allowed(files, monkeypatch):
    from kernel_pytorch.core.management import unified_manager
    from kernel_pytorch.errors import KptError

    asked = []

    class Noting:
        def __init__(self, config, device):
            asked.append(config.nvidia.allow_float8_lm_head)

        def optimize(self, *args, **kwargs):
            raise KptError("noted")

    monkeypatch.setattr(unified_manager, "UnifiedManager", Noting)
    monkeypatch.chdir(files)
    for flags in ([], ["--allow-float8-lm-head"]):
        assert main(["optimize", "nets.py:net", "--mode", "training", *flags]) == 2
    assert asked == [False, True]


def test_a_plan_that_is_slower_here_no_longer_holds(kpt, files, make_plan):
    make_plan("plan", "bf16")  # casting costs more than a model of this size takes
    done = kpt("apply", "plan", "nets.py:net", "--budget", "2", "--format", "json")
    assert done.code == 1, done.err
    told = json.loads(done.out)
    assert not told["holds"]
    assert "not faster" in told["findings"][0]
    assert told["numerics"]["passed"]
    assert told["measured"]["speedup"] < 1 < told["planned"]["speedup"]


def test_a_plan_that_is_wrong_here_no_longer_holds(kpt, files, make_plan):
    make_plan("plan", "bf16", "config.max_error=1e-9")
    done = kpt("apply", "plan", "nets.py:net", "--budget", "2")
    assert done.code == 1, done.err
    assert "wrong" in done.out


def test_a_plan_that_keeps_the_model_holds(kpt, files, make_plan):
    make_plan("plan", "none")
    done = kpt("apply", "plan", "nets.py:net", "--budget", "2")
    assert done.code == 0, done.err
    assert "holds" in done.out


@pytest.mark.parametrize(
    ("other", "code", "where"),
    [
        ("net", 0, ""),
        ("renamed", 0, ""),
        ("shifted", 1, "second"),
        ("early", 1, "first"),
        ("wide", 1, "first"),
    ],
)
def test_validate_tells_equal_from_different_and_where_they_part(kpt, other, code, where):
    done = kpt("validate", "nets.py:net", f"nets.py:{other}", "--level", "quick", "--format", "json")
    assert done.code == code, done.err
    told = json.loads(done.out)
    assert told["same"] is (code == 0)
    assert told["diverged_at"] == where
    assert any(not c["passed"] for c in told["checks"]) is bool(code)
    assert any("Renamed" in sentence for sentence in told["unchecked"]) is (other == "renamed")


def test_eject_prints_source_or_writes_it(kpt, files, make_plan):
    make_plan("plan", "bf16")
    printed = kpt("eject", "plan", "nets.py:net")
    assert printed.code == 0, printed.err
    compile(printed.out, "ejected", "exec")
    written = kpt("eject", "plan", "nets.py:net", "-o", "ejected.py")
    assert written.out == ""
    assert (files / "ejected.py").read_text() == printed.out


def test_a_closed_pipe_is_quiet(files, make_plan):
    make_plan("plan", "bf16")
    process = subprocess.Popen(
        [sys.executable, "-m", "kernel_pytorch", "explain", "plan", "--format", "json"],
        cwd=files,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 141


def test_ctrl_c_tells_how_to_resume(files):
    (files / "slow.py").write_text("import time\ndef net():\n    print('here', flush=True)\n    time.sleep(60)\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "kernel_pytorch", "optimize", "slow.py:net", "-o", "my out"],
        cwd=files,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stderr is not None
    assert process.stderr.readline() == "here\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130
    assert out == ""
    assert err.splitlines()[-1].endswith("continue with: kpt optimize slow.py:net -o 'my out' --resume")
    assert "Traceback" not in err


def test_an_unexpected_error_is_one_line_and_a_traceback_on_demand(monkeypatch, capsys):
    from kernel_pytorch import hardware

    def broken(*_):
        raise KeyError("bug")

    monkeypatch.setattr(hardware, "detect", broken)
    monkeypatch.delenv("KPT_DEBUG", raising=False)
    assert main(["detect"]) == 2
    assert (
        capsys.readouterr().err
        == "kpt: error: unexpected KeyError: 'bug'; fix: report it, with what KPT_DEBUG=1 shows\n"
    )
    monkeypatch.setenv("KPT_DEBUG", "1")
    with pytest.raises(KeyError):
        main(["detect"])


@pytest.mark.parametrize(
    ("target", "directory"),
    [
        ("examples/minilm.py:workload", "kpt-minilm"),
        ("package.module:factory", "kpt-factory"),
        ("hf:org/model-7b", "kpt-model-7b"),
        ("timm:resnet18@pretrained", "kpt-resnet18-pretrained"),
        ("/tmp/x/net.pt2", "kpt-net"),
        ("...", "kpt-plan"),
    ],
)
def test_the_directory_has_the_name_of_the_target(target, directory):
    assert str(default_directory(target)) == directory
