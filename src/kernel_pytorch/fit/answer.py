"""One question, whichever device: does it fit, and up to which batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from kernel_pytorch.fit.build import Build
from kernel_pytorch.fit.max_batch import largest_batch
from kernel_pytorch.fit.outcome import Fit

__all__ = ["answer"]


def answer(
    build: Build, *, device: str = "tpu", topology: str = "v5e:1", find_max_batch: bool = False, name: str = ""
) -> Fit:
    """Return memory, cost and fit of a step.

    Args:
        build: The program.
        device: `tpu`, `cuda` or `cpu`.
        topology: The slice, for a TPU.
        find_max_batch: Search the largest batch that fits, and return its answer.
        name: Of the target, for people.

    Raises:
        KptError: The target, the topology or the program is wrong, or something needed is not installed.
    """
    ask = _asker(device, topology, name)
    if not find_max_batch:
        return ask(build)
    return largest_batch(build, ask)


def _asker(device: str, topology: str, name: str) -> Callable[[Build], Fit]:
    if device == "tpu":
        from kernel_pytorch.backends.tpu.topology import parse_topology
        from kernel_pytorch.fit.tpu import fit_tpu

        slice_ = parse_topology(topology)
        return lambda build: fit_tpu(build, slice_, name=name)
    from kernel_pytorch.fit.local import fit_local

    return lambda build: replace(fit_local(build, device), name=name)
