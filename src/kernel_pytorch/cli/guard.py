"""`kpt check`: is a plan still right, and still as fast."""

from __future__ import annotations

import shlex
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernel_pytorch.cli.output import quiet_stdout, stderr_console
from kernel_pytorch.cli.verdict import check_places, conclude, keep, keep_interrupted
from kernel_pytorch.errors import OutputDirectoryError, TargetError
from kernel_pytorch.guard.stale import config_of
from kernel_pytorch.plan.schema import dumps
from kernel_pytorch.plan.store import SearchDirectory, load_plan, write_text

if TYPE_CHECKING:
    from kernel_pytorch.core.types import Plan
    from kernel_pytorch.core.workload import Workload

__all__ = ["check", "recorded_target"]


def check(
    *,
    plan: str,
    target: str | None,
    budget: float,
    max_slowdown: float,
    keep_share: float,
    refresh: bool,
    seed: int,
    trust_artifacts: bool,
    trust_remote_code: bool,
    name: str,
    history: str | None,
    inconclusive: str,
    form: str,
    output: str | None,
) -> int:
    """Judge a plan here and now, record and print the verdict; return 1 where it does not hold."""
    check_places(history, output)
    loaded, path = load_plan(plan), Path(plan)
    directory = path if path.is_dir() else path.parent
    target = target or recorded_target(loaded, directory.resolve())
    if refresh:
        with SearchDirectory(directory):  # refuse at once what would be refused after minutes
            pass
    with quiet_stdout(), tempfile.TemporaryDirectory(prefix="kpt-compiled-") as compiled:
        from kernel_pytorch.core.targets import load_target
        from kernel_pytorch.guard.check import InterruptedCheck, check_plan, refresh_plan

        workload = load_target(target, trust_remote_code=trust_remote_code)
        asked: dict[str, Any] = {
            "config": config_of(loaded).but(seed=seed, trust_remote_code=trust_remote_code),
            "max_slowdown": max_slowdown,
            "keep": keep_share,
            "max_seconds": budget,
            "name": name,
            "command": shlex.join(["kpt", *sys.argv[1:]]),
        }
        try:
            with stderr_console().status("checking: numerics first, then both in turns"):
                if not refresh:
                    again = shlex.join(["kpt", "check", plan, target, "--refresh"])
                    comparison = check_plan(
                        loaded, path, workload, trust_artifacts=trust_artifacts, again=again, **asked
                    )
                else:
                    kept = Path(compiled) if (directory / "artifacts").is_dir() else None
                    comparison, fresh = refresh_plan(loaded, workload, keep_compiled=kept, **asked)
                    if fresh is not None:
                        _write(fresh, path, workload, Path(compiled))
        except InterruptedCheck as stop:
            keep_interrupted(stop.comparison, history)
            raise
        keep([comparison], history)
    return conclude([comparison], form=form, output=output, inconclusive=inconclusive)


def recorded_target(plan: Plan, directory: Path) -> str:
    """Return the target that a plan's command names; a file of it as it lies from here.

    Args:
        plan: The plan.
        directory: Where it lies, absolute; a search writes below the directory it was started in, mostly.

    Raises:
        TargetError: There is no command, or the file that it names is not there.
    """
    import click

    from kernel_pytorch.cli.commands import optimize

    said = shlex.split(plan.command)
    fix = f"kpt check {directory} TARGET"
    if said[:2] != ["kpt", "optimize"]:
        raise TargetError("the plan does not say which target it was made for", fix=fix)
    try:
        given = optimize.make_context("optimize", said[2:], resilient_parsing=True).params
    except click.ClickException as error:
        raise TargetError(f"the plan's command cannot be read: {plan.command}", fix=fix) from error
    target = str(given.get("target") or "")
    where, colon, factory = target.rpartition(":")
    file = where if where.endswith(".py") else target if target.endswith(".pt2") else ""
    if not file:
        return target
    written = Path(given.get("output") or "x")
    # As many levels above the search's directory as its name has; an absolute one does not tell where it was started.
    started_in = directory.parents[0 if written.is_absolute() else max(0, len(written.parts) - 1)]
    for place in (Path.cwd(), started_in):
        if (place / Path(file).expanduser()).is_file():
            return str(place / file) + (colon + factory if where.endswith(".py") else "")
    raise TargetError(f"the plan was made for {target}, which is neither here nor in {started_in}", fix=fix)


def _write(plan: Plan, path: Path, workload: Workload, compiled: Path) -> None:
    """Write a plan again with what is deployed beside it: code of the software before is of no use any more.

    Raises:
        OutputDirectoryError: Its directory cannot be written, or a search holds it.
    """
    from kernel_pytorch.report.html import write_html

    file = path / "plan.json" if path.is_dir() else path
    artifacts, report = file.parent / "artifacts", file.parent / "report.html"
    with SearchDirectory(file.parent) as store:
        try:
            if artifacts.is_dir():
                shutil.rmtree(artifacts)
                for made in (*compiled.iterdir(),):
                    shutil.copyfile(made, store.make_artifacts() / made.name)
                _deploy(plan, workload, store)
            write_text(file, dumps(plan))
            if report.is_file():
                write_html(plan, report)
        except OSError as error:
            raise OutputDirectoryError(f"cannot write {file.parent}: {error.strerror or error}") from error
    sys.stderr.write(f"kpt: wrote {file} anew\n")


def _deploy(plan: Plan, workload: Workload, store: SearchDirectory) -> None:
    """Write the packages that steps of an inference plan deploy."""
    from kernel_pytorch.backends import manager_for
    from kernel_pytorch.core.types import Mode
    from kernel_pytorch.plan.apply import apply

    if not plan.candidate.steps or plan.workload.mode is not Mode.INFERENCE:
        return
    place = manager_for(plan.device.vendor).place
    calls = {case: place(workload.call(case, 0)) for case in workload.cases}
    apply(plan, place(workload.model()), inputs=calls, deploy_to=store.make_artifacts())
