"""TorchTPU, Google's native TPU backend of PyTorch: device `tpu`, `torch.compile(backend="tpu")`.

What is not public API of torch-tpu 0.2.0 (loading by hand, the count of compilations, and the count of chips that
emulation replaces) is used here and nowhere else.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from kernel_pytorch.backends.tpu import packages, plugin
from kernel_pytorch.backends.tpu.runtimes import Memory
from kernel_pytorch.errors import KptError
from kernel_pytorch.hardware.tpu.installed import Installed

__all__ = ["TorchTpu", "load_torch_tpu"]

log = logging.getLogger(__name__)


class TorchTpu:
    """The runtime of `torch_tpu`, loaded and initialised.

    Args:
        found: What is installed.
    """

    name = "torch_tpu"
    compile_backend = "tpu"
    autocast_device = "tpu"

    def __init__(self, found: Installed) -> None:
        self.version = found.version
        self.emulated = found.emulated
        self.device = torch.device("tpu", 0)
        self._api: Any = torch.get_device_module("tpu")

    def synchronize(self) -> None:
        """Wait for all work of the device."""
        torch.accelerator.synchronize(self.device)

    def barrier(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the tensors behind `stablehlo.optimization_barrier`; gradients do not pass it.

        The operator behind `torch.tpu.ops.optimization_barrier`, which is the same and warns of being experimental.
        """
        held: list[torch.Tensor] = torch.ops.tpu._optimization_barrier(list(tensors))  # noqa: SLF001
        return held

    def memory(self) -> Memory | None:
        """Return what the allocator has handed out; `None` under emulation, where torch_tpu says zero."""
        if self.emulated:
            return None
        return Memory(
            int(torch.accelerator.memory_allocated(self.device)),
            int(torch.accelerator.max_memory_allocated(self.device)),
        )

    def reset_peak(self) -> None:
        """Let the peak begin again."""
        if not self.emulated:
            torch.accelerator.reset_peak_memory_stats(self.device)

    def compilations(self) -> int:
        """Return the misses of the cache of compiled programs: graphs of `torch.compile`, and eager operators."""
        return int(self._api._get_cache_misses())  # noqa: SLF001  no public name in 0.2.0


def load_torch_tpu(found: Installed) -> TorchTpu:
    """Import `torch_tpu` by hand, and initialise its device.

    Raises:
        KptError: What is installed does not go together (`packages`), or it cannot be imported.
    """
    use = packages.Use.EMULATION if found.emulated else packages.Use.TORCH_TPU
    for problem in packages.problems():
        if use in problem.blocks:
            raise KptError(problem.reason, fix=problem.fix)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # its C++ side tells of every client and cache on stderr
    if found.emulated:
        os.environ.update(plugin.environment())
    said = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(said):
            warnings.simplefilter("ignore")  # of its imports: what warns there is not the user's to mend
            _initialise(emulated=found.emulated)
    except (ImportError, RuntimeError) as error:
        pins = " ".join(f"{name}=={packages.PINS[name]}" for name in ("torch", "torch_tpu", "libtpu"))
        reason = f"torch_tpu {found.version} cannot be loaded: {str(error).strip().splitlines()[0]}"
        raise KptError(reason, fix=f"pip install {pins}") from error
    for line in said.getvalue().splitlines():
        log.debug("torch_tpu: %s", line)
    return TorchTpu(found)


def _initialise(*, emulated: bool) -> None:
    """Load the backend as its entry point would have, or, emulated, for one chip that nobody has to find on PCI."""
    before = os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD")
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # it would load on import, before there is a chip to find
    try:
        from torch_tpu import _loader  # type: ignore[import-not-found,unused-ignore]
        from torch_tpu._internal.utils import hardware  # type: ignore[import-not-found,unused-ignore]
    finally:
        if before is not None:
            os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = before
    if emulated:
        hardware.get_tpu_device_count = lambda: 1
        hardware._scan_pci_tpus = lambda: (1, {1: "1,1,1"})  # noqa: SLF001
    _loader.load()
    if emulated:  # SDPA would be a Mosaic kernel, which only a chip runs: here it is plain operators
        torch.backends.cuda.enable_flash_sdp(enabled=False)
        torch.backends.cuda.enable_mem_efficient_sdp(enabled=False)
        torch.backends.cuda.enable_cudnn_sdp(enabled=False)
    if not torch.accelerator.is_available():
        raise RuntimeError("it finds no TPU device")
    _check_autograd()


def _check_autograd() -> None:
    """Refuse a process whose autograd began before there was a TPU: it has no queue for one (seen with torch 2.13).

    Raises:
        KptError: A backward ran before.
    """
    one = torch.zeros((), device="tpu", requires_grad=True)
    try:
        (one + 1.0).backward()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        if "device_ready_queues_" not in str(error):
            raise
        raise KptError(
            "a backward has run in this process before the TPU's runtime was loaded, and autograd does not learn of it",
            fix="load it first: kernel_pytorch.backends.manager_for('tpu').synchronize(), or use a fresh process",
        ) from error
