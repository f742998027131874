"""Where `kpt check PLAN` finds the target that a plan names."""

from __future__ import annotations

import shlex
from dataclasses import replace

import pytest
from tests.unit.plan_factory import make_plan

from kernel_pytorch.cli.guard import recorded_target
from kernel_pytorch.errors import TargetError


def plan_of(target, output):
    return replace(
        make_plan(), command=shlex.join(["kpt", "optimize", target, *(("-o", str(output)) if output else ())])
    )


@pytest.mark.parametrize("output", ["out", "out/deep", ""])
def test_a_relative_target_is_found_from_where_the_search_was_started(tmp_path, monkeypatch, output):
    (tmp_path / "nets.py").touch()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    directory = tmp_path / (output or "kpt-nets")
    assert recorded_target(plan_of("nets.py:net", output), directory) == f"{tmp_path}/nets.py:net"


def test_an_absolute_directory_does_not_tell_where_that_was(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "here/nets.py").touch()
    directory = tmp_path / "far/away"
    monkeypatch.chdir(tmp_path / "here")
    assert recorded_target(plan_of("nets.py:net", directory), directory) == f"{tmp_path}/here/nets.py:net"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TargetError, match="neither here nor in"):
        recorded_target(plan_of("nets.py:net", directory), directory)
