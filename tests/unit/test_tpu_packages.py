"""Version traps of the TPU packages, on planted installations: each is named with its fix, and none is invented."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kernel_pytorch.backends.tpu.packages import (
    PINS,
    PLUGIN,
    Installation,
    Use,
    _jax_libtpu,
    _lock_holder,
    blocking,
    installation,
    problems,
)

QUIET = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
TORCH_TPU = {"torch": "2.13.0+cpu", "torch_tpu": "0.2.0", "libtpu": "0.0.52", PLUGIN: "2026.6.23"}
TORCH_XLA = {"torch": "2.9.1+cu128", "torch_xla": "2.9.0"}


def installed(versions: dict[str, str], **given) -> Installation:
    return Installation(
        versions=versions, environment=QUIET | given.pop("environment", {}), tools=frozenset({"gcc"}), **given
    )


def names(found: Installation) -> list[str]:
    return [problem.name for problem in problems(found)]


def test_the_tested_environments_have_no_problem():
    assert problems(installed(TORCH_TPU)) == ()
    assert problems(installed(TORCH_XLA)) == ()
    assert blocking(Use.EMULATION, installed(TORCH_TPU)) is None
    assert blocking(Use.TORCH_TPU, installed(TORCH_TPU)) is None
    assert blocking(Use.TORCH_XLA, installed(TORCH_XLA)) is None
    assert blocking(Use.AHEAD_OF_TIME, installed({**TORCH_TPU, "jax": "0.10.2", "jaxlib": "0.10.2"})) is None


def test_a_machine_without_any_of_them_has_no_problem():
    assert problems(Installation(versions={"torch": "2.13.0", "jax": "0.10.2", "jaxlib": "0.10.2"})) == ()


@pytest.mark.parametrize("version", ["0.0.42.1", "0.0.50.1"])
def test_libtpu_of_four_parts_is_named_with_the_command(version):
    found = installed({**TORCH_TPU, "libtpu": version})
    (problem,) = problems(found)
    assert problem.name == "libtpu-version"
    assert version in problem.reason
    assert problem.fix == f"pip install --no-deps libtpu=={PINS['libtpu']}"
    assert blocking(Use.TORCH_TPU, found) == problem.skip
    assert "libtpu-version" not in names(installed({"torch": "2.13.0", "libtpu": version})), "only torch_tpu refuses it"


@pytest.mark.parametrize(
    ("torch", "fits"),
    [("2.10.0", False), ("2.11.0", True), ("2.13.0+cpu", True), ("2.15.1", True), ("2.16.0", False), ("3.0.0", False)],
)
def test_torch_outside_the_range_of_torch_tpu(torch, fits):
    found = installed({**TORCH_TPU, "torch": torch})
    assert ("torch-tpu-torch" in names(found)) != fits
    for use in (Use.TORCH_TPU, Use.EMULATION, Use.AHEAD_OF_TIME):
        skip = blocking(use, installed({**TORCH_TPU, "torch": torch, "jax": "0.10.2"}))
        assert (skip is None) == fits
        assert fits or torch in skip.reason


@pytest.mark.parametrize(
    ("torch", "fits"), [("2.9.0", True), ("2.9.1+cu128", True), ("2.8.0", False), ("2.13.0", False)]
)
def test_torch_xla_loads_with_the_torch_it_was_built_against_only(torch, fits):
    skip = blocking(Use.TORCH_XLA, installed({**TORCH_XLA, "torch": torch}))
    assert (skip is None) == fits
    if skip is not None:
        assert "undefined symbol" in skip.reason
        assert "torch==2.9.1" in skip.fix
        assert "environment of its own" in skip.fix


@pytest.mark.parametrize(
    ("loaded", "uses"),
    [
        ({"torchax", "torch_tpu"}, {Use.TORCH_TPU, Use.EMULATION, Use.AHEAD_OF_TIME}),
        ({"torch_xla", "torch_tpu"}, {Use.TORCH_TPU, Use.EMULATION, Use.TORCH_XLA}),
        ({"torch_tpu"}, set()),
        ({"torchax"}, set()),
    ],
)
def test_two_runtimes_in_one_process(loaded, uses):
    found = installed(TORCH_TPU, loaded=frozenset(loaded))
    told = {problem.name: problem.blocks for problem in problems(found)}
    assert told.get("two-runtimes", frozenset()) == uses


def test_the_lock_of_another_process_is_told_unless_many_are_allowed():
    found = installed({**TORCH_TPU, "jax": "0.10.2"}, lock_holder=4711)
    skip = blocking(Use.AHEAD_OF_TIME, found)
    assert "4711" in skip.reason
    assert "ALLOW_MULTIPLE_LIBTPU_LOAD=1" in skip.fix
    assert blocking(Use.EMULATION, found) is None, "it loads no libtpu"
    allowed = installed(TORCH_TPU, lock_holder=4711, environment={"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"})
    assert "libtpu-lock" not in names(allowed)


def test_the_holder_of_the_lock_comes_from_the_kernels_table(tmp_path):
    lock, table = tmp_path / "lock", tmp_path / "locks"
    assert _lock_holder(lock, table, 1) == 0
    lock.touch()
    inode = lock.stat().st_ino
    table.write_text(
        f"1: POSIX  ADVISORY  WRITE 99 fe:00:{inode + 1} 0 EOF\n"
        f"2: POSIX  ADVISORY  WRITE 1 fe:00:{inode} 0 EOF\n"
        f"3: POSIX  ADVISORY  WRITE 8396 fe:00:{inode} 0 EOF\n"
    )
    assert _lock_holder(lock, table, 1) == 8396
    assert _lock_holder(lock, table, 8396) == 1
    table.write_text(f"1: POSIX  ADVISORY  WRITE 1 fe:00:{inode} 0 EOF\n")
    assert _lock_holder(lock, table, 1) == 0


def test_a_lock_that_another_process_really_holds_is_seen(tmp_path):
    from pathlib import Path

    lock = tmp_path / "lock"
    lock.touch()
    code = (
        f"import fcntl, sys; f = open({str(lock)!r}, 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        assert _lock_holder(lock, Path("/proc/locks"), 0) == other.pid
        other.communicate(b"\n", timeout=30)
    assert _lock_holder(lock, Path("/proc/locks"), 0) == 0


def test_loading_with_every_import_is_a_cost_and_blocks_nothing():
    found = Installation(versions=TORCH_TPU, tools=frozenset({"gcc"}))
    (problem,) = problems(found)
    assert problem.name == "autoload"
    assert not problem.blocks
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in problem.fix


@pytest.mark.parametrize(
    ("use", "missing", "command"),
    [
        (Use.TORCH_TPU, "torch_tpu", "pip install torch_tpu==0.2.0"),
        (Use.TORCH_TPU, "libtpu", "pip install --no-deps libtpu==0.0.52"),
        (Use.EMULATION, PLUGIN, f"pip install --no-deps {PLUGIN}==2026.6.23"),
        (Use.AHEAD_OF_TIME, "jax", "pip install jax==0.10.2"),
        (Use.TORCH_XLA, "torch_xla", "torch_xla==2.9.0"),
    ],
)
def test_what_is_missing_is_told_with_the_command(use, missing, command):
    versions = {**TORCH_TPU, "jax": "0.10.2", **({} if use is not Use.TORCH_XLA else TORCH_XLA)}
    versions.pop(missing)
    skip = blocking(use, installed(versions))
    assert skip.reason == f"{missing} is not installed"
    assert command in skip.fix


def test_emulation_needs_a_c_compiler_and_ahead_of_time_does_not():
    found = Installation(versions={**TORCH_TPU, "jax": "0.10.2"}, environment=QUIET)
    assert blocking(Use.EMULATION, found).fix == "apt-get install gcc"
    assert blocking(Use.AHEAD_OF_TIME, found) is None


def test_a_jaxlib_older_than_libtpu_is_told_and_blocks_nothing_but_names_the_chip():
    pair = {**TORCH_TPU, "jax": "0.10.2", "jaxlib": "0.10.2"}
    (problem,) = problems(installed(pair, jax_libtpu="0.0.42.*"))
    assert problem.name == "jaxlib-older"
    assert "TPU7x" in problem.reason
    assert not problem.blocks
    assert problems(installed(pair, jax_libtpu="0.0.52.*")) == ()


def test_the_release_that_jax_asks_for_is_read_from_its_metadata():
    extras = ["numpy>=2", 'libtpu==0.0.42.*; extra == "tpu"']
    assert _jax_libtpu(extras) == "0.0.42.*"
    assert _jax_libtpu(["numpy>=2"]) == ""


def test_a_library_path_that_leads_nowhere(tmp_path):
    found = installed(TORCH_TPU, environment={"TPU_LIBRARY_PATH": str(tmp_path / "no.so")})
    assert names(found) == ["library-path"]
    (tmp_path / "no.so").touch()
    assert problems(found) == ()


def test_every_problem_has_a_fix():
    worst = Installation(
        versions={
            **TORCH_TPU,
            **TORCH_XLA,
            "torch": "2.16.0",
            "libtpu": "0.0.60.1",
            "jax": "0.10.2",
            "jaxlib": "0.10.2",
        },
        jax_libtpu="0.0.42.*",
        loaded=frozenset({"torch_tpu", "torch_xla"}),
        environment={"TPU_LIBRARY_PATH": "/nowhere/lib.so"},
        lock_holder=7,
    )
    told = problems(worst)
    assert len(told) == 9
    assert len({problem.name for problem in told}) == 9
    assert all(problem.fix and problem.reason for problem in told)


def test_this_process_is_read_without_importing_any_of_them():
    code = (
        "import sys\n"
        "from kernel_pytorch.backends.tpu.packages import installation, problems\n"
        "problems(installation())\n"
        "print(sorted({'torch_tpu', 'torch_xla', 'jax', 'libtpu'} & set(sys.modules)))"
    )
    env = {**__import__("os").environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.strip() == "[]"
    assert "torch" in installation().versions


def test_what_blocks_is_told_by_detect_and_what_only_costs_is_no_finding(monkeypatch, capsys):
    import json

    from kernel_pytorch.backends.tpu import packages
    from kernel_pytorch.cli import look

    look.detect(form="json", device="cpu")
    without = json.loads(capsys.readouterr().out)
    told = problems(Installation(versions={**TORCH_TPU, "libtpu": "0.0.50.1"}, tools=frozenset({"gcc"})))
    assert [problem.name for problem in told] == ["libtpu-version", "autoload"]
    monkeypatch.setattr(packages, "problems", lambda: told)
    assert look.detect(form="json", device="cpu") == 1
    data = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in data["tpu_packages"]] == ["libtpu-version", "autoload"]
    assert data["fixable"] == without["fixable"] + 1
    look.detect(form="text", device="cpu")
    text = capsys.readouterr().out
    assert "TPU packages" in text
    assert "pip install --no-deps libtpu==0.0.52" in text


def test_versions_that_end_a_child_are_told_before_it_starts(monkeypatch):
    from kernel_pytorch.backends.tpu import ahead, packages
    from kernel_pytorch.errors import KptError

    def plant(**given):
        found = Installation(tools=frozenset({"gcc"}), **given)
        monkeypatch.setattr(packages, "installation", lambda: found)

    plant(versions={**TORCH_TPU, "libtpu": "0.0.50.1"})
    with pytest.raises(KptError, match=r"libtpu 0\.0\.50\.1 has a version of four parts") as caught:
        ahead.lower_program(lambda: None)
    assert caught.value.fix == "pip install --no-deps libtpu==0.0.52"
    plant(versions={**TORCH_TPU, "jax": "0.10.2"}, lock_holder=4711)
    ahead._check_packages()  # its children may hold libtpu beside another process
