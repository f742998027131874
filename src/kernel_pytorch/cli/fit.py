"""`kpt fit`: memory, cost and fit of a step, measured or estimated here, or compiled for a TPU that is not here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kernel_pytorch.cli.output import emit, quiet_stdout, stderr_console
from kernel_pytorch.errors import KptError

__all__ = ["fit"]


def fit(
    *,
    target: str,
    topology: str | None,
    device: str,
    mode: str,
    batch: int | None,
    find_max_batch: bool,
    search: bool,
    memory: float | None,
    max_extra_flops: float,
    output: str | None,
    form: str,
    trust_remote_code: bool,
) -> int:
    """Print whether a step fits, what holds the memory and what it costs; return 1 where it does not fit."""
    from kernel_pytorch.core.types import Mode

    if batch is not None and batch < 1:
        raise KptError(f"--batch {batch}: there is nothing to run", fix="--batch 1 or more")
    kind = _kind(device, topology)
    if memory is not None and not search:
        raise KptError("--memory is what --search looks for", fix="add --search")
    if search:
        if kind != "tpu" or find_max_batch:
            raise KptError(
                "--search asks the TPU compiler, for one batch", fix="--topology v5e:1, without --find-max-batch"
            )
        asked = {"target": target, "mode": mode, "batch": batch, "trust_remote_code": trust_remote_code}
        return _search(asked, topology or "v5e:1", memory, max_extra_flops, output, form)
    with quiet_stdout():
        from kernel_pytorch.fit.answer import answer
        from kernel_pytorch.fit.build import Build

        build = Build(target, Mode(mode), batch=batch, trust_remote_code=trust_remote_code)
        found = answer(build, device=kind, topology=topology or "v5e:1", find_max_batch=find_max_batch, name=target)
    if output:
        from kernel_pytorch.report.fit_page import write_fit_page

        write_fit_page(found, Path(output))

    def data() -> dict[str, Any]:
        from kernel_pytorch.report.fit import fit_data

        return fit_data(found)

    def text(console: Any) -> None:
        from kernel_pytorch.report.fit import render_fit

        render_fit(found, console)

    emit(form, data, text)
    return 1 if found.fits is False else 0


def _search(  # noqa: PLR0917
    asked: dict[str, Any], topology: str, memory: float | None, max_extra: float, output: str | None, form: str
) -> int:
    """Search memory patterns; return 1 where none reaches the goal."""
    from kernel_pytorch.core.types import Mode

    with quiet_stdout():
        from kernel_pytorch.backends.tpu.topology import parse_topology
        from kernel_pytorch.fit.build import Build
        from kernel_pytorch.fit.patterns import search_patterns

        console = stderr_console()
        searched = search_patterns(
            Build(**{**asked, "mode": Mode(asked["mode"])}),
            parse_topology(topology),
            memory_bytes=None if memory is None else round(memory * 1e9),
            max_extra_flops=max_extra,
            name=asked["target"],
            tell=lambda line: console.print(f"  {line}", soft_wrap=True),
        )
    if output and searched.chosen is not None and searched.chosen.fit is not None:
        from kernel_pytorch.report.fit_page import write_fit_page

        write_fit_page(searched.chosen.fit, Path(output))

    def data() -> dict[str, Any]:
        from kernel_pytorch.report.fit_search import search_data

        return search_data(searched)

    def text(console: Any) -> None:
        from kernel_pytorch.report.fit_search import render_search

        render_search(searched, console)

    emit(form, data, text)
    return 1 if searched.chosen is None else 0


def _kind(device: str, topology: str | None) -> str:
    """Return `tpu`, `cuda` or `cpu`: a topology means a TPU, and without one `auto` is what is here."""
    if device == "auto" and topology is not None:
        return "tpu"
    if topology is not None and device != "tpu":
        raise KptError(f"--topology {topology} is of a TPU, and --device is {device}", fix="leave --device out")
    if device != "auto":
        return device
    from kernel_pytorch.hardware import detect

    return {"nvidia": "cuda", "amd": "cuda"}.get(detect().vendor, "cpu")
