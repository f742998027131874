"""`kpt optimize`: the search."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernel_pytorch.cli.output import emit, quiet_stdout, stderr_console
from kernel_pytorch.errors import KptError
from kernel_pytorch.plan.store import SearchDirectory

if TYPE_CHECKING:
    from kernel_pytorch.core.config import KernelPyTorchConfig

__all__ = ["default_directory", "make_config", "optimize"]


def make_config(**options: Any) -> KernelPyTorchConfig:
    """Return the configuration that options ask for.

    Raises:
        KptError: A transform that does not exist, or named in both `only` and `exclude`.
    """
    from kernel_pytorch.catalog import find
    from kernel_pytorch.core.config import KernelPyTorchConfig

    for option in ("only", "exclude"):
        for name in options.get(option, ()):
            try:
                find(name)
            except KptError as error:
                raise KptError(f"--{option}: {error}", fix=error.fix) from error
    return KernelPyTorchConfig(**options)


def default_directory(target: str) -> Path:
    """Return `kpt-NAME` for a target, e.g. `kpt-minilm` for `examples/minilm.py:workload`."""
    left, _, right = target.rpartition(":")
    stem = Path(left).stem if left.endswith(".py") else Path(right or left).name.removesuffix(".pt2")
    return Path("kpt-" + (re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-.") or "plan"))


def optimize(
    *,
    target: str,
    budget: str | float,
    output: str | None,
    resume: bool,
    form: str,
    device: str = "auto",
    allow_float8_lm_head: bool = False,
    topology: str | None = None,
    **options: Any,
) -> int:
    """Search, with progress on stderr, and print the outcome."""
    directory = Path(output) if output else default_directory(target)
    with SearchDirectory(directory):  # refuse at once what would be refused after a minute
        pass
    with quiet_stdout():
        from kernel_pytorch.backends import manager_for
        from kernel_pytorch.core.config import NvidiaWants, TpuWants, budget_seconds
        from kernel_pytorch.core.management.unified_manager import UnifiedManager
        from kernel_pytorch.core.targets import load_target
        from kernel_pytorch.report.progress import live

        seconds = budget_seconds(budget, manager_for(device).vendor) if isinstance(budget, str) else budget
        wants = NvidiaWants(allow_float8_lm_head=allow_float8_lm_head)
        config = make_config(budget_s=seconds, nvidia=wants, tpu=TpuWants(topology=topology or ""), **options)
        manager = UnifiedManager(config, device=device)
        workload = load_target(target, trust_remote_code=config.trust_remote_code)
        console = stderr_console()
        with live(console) as listen:
            result = manager.optimize(workload, directory=directory, resume=resume, listen=listen, command=_command())
    plan = result.plan

    def data() -> dict[str, Any]:
        from kernel_pytorch.report.json import explain

        return {**explain(plan), "plan": str(directory / "plan.json"), "report": str(directory / "report.html")}

    def text(out: Any) -> None:
        from kernel_pytorch.report.text import render_plan

        render_plan(plan, out)
        out.print(f"\nplan    {directory / 'plan.json'}\nreport  {directory / 'report.html'}", soft_wrap=True)

    emit(form, data, text)
    return 0


def _command() -> str:
    return shlex.join(["kpt", *(a for a in sys.argv[1:] if a != "--resume")])
