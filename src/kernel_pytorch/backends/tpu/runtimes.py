"""What the rest of the project needs of a runtime that executes PyTorch on a TPU; two implement it.

One process holds one runtime and one TPU, so `load` is called once and its answer kept.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from kernel_pytorch.core.types import Skip
from kernel_pytorch.errors import KptError
from kernel_pytorch.hardware.tpu import installed

__all__ = ["Memory", "Runtime", "load"]


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of the device: held now, and the most since the last reset."""

    held_bytes: int
    peak_bytes: int


class Runtime(Protocol):
    """One runtime, initialised in this process.

    Attributes:
        name: `torch_tpu` or `torch_xla`.
        version: Of its distribution.
        emulated: Whether it runs on the CPU, where times mean nothing.
        device: The device of this process, `tpu:0` or `xla:0`.
        compile_backend: What `torch.compile(backend=)` takes.
        autocast_device: What `torch.autocast` takes.
    """

    name: str
    version: str
    emulated: bool
    device: torch.device
    compile_backend: str
    autocast_device: str

    def synchronize(self) -> None:
        """Wait until all work handed to the device, traced but not yet compiled work included, has finished."""
        ...

    def barrier(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the tensors behind an optimization barrier: the compiler may not move or merge work across it."""
        ...

    def memory(self) -> Memory | None:
        """Return the memory of the device; `None` where the runtime does not tell."""
        ...

    def reset_peak(self) -> None:
        """Let the peak of `memory` begin again at what is held."""
        ...

    def compilations(self) -> int:
        """Return how many programs this process has compiled: one more for each new shape."""
        ...


@functools.cache
def load() -> Runtime:
    """Import and initialise the runtime in use (`hardware.tpu.installed`), once in a process.

    Raises:
        KptError: None is installed, or it does not fit what is installed beside it.
    """
    chosen = installed.runtime()
    if isinstance(chosen, Skip):
        raise KptError(chosen.reason, fix=chosen.fix)
    if chosen.name == "torch_xla":
        from kernel_pytorch.backends.tpu.torch_xla import load_torch_xla

        runtime: Runtime = load_torch_xla(chosen)
        return runtime
    from kernel_pytorch.backends.tpu.torch_tpu import load_torch_tpu

    return load_torch_tpu(chosen)
