"""PyTorch/XLA, what TPU machines of before TorchTPU run: device `xla`, `torch.compile(backend="openxla")`.

Its tensors are lazy: an operator is recorded, and `synchronize` compiles and runs what has been recorded, as far as a
tensor that is still alive needs it. So results must be held until then, or nothing is computed; `TPUHardwareManager`
does. Programs are compiled once for each graph and each set of shapes. Its last release (2.9) needs torch 2.9.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from kernel_pytorch.backends.tpu import packages
from kernel_pytorch.backends.tpu.runtimes import Memory
from kernel_pytorch.errors import KptError

if TYPE_CHECKING:
    from kernel_pytorch.hardware.tpu.installed import Installed

__all__ = ["TorchXla", "load_torch_xla", "loop", "optimization_barrier", "run_recorded"]


class TorchXla:
    """The runtime of `torch_xla`, loaded and initialised.

    Args:
        found: What is installed.
    """

    name = "torch_xla"
    compile_backend = "openxla"
    autocast_device = "xla"

    def __init__(self, found: Installed) -> None:
        self.version = found.version
        self.emulated = found.emulated
        self._xla: Any = importlib.import_module("torch_xla")
        self._model: Any = importlib.import_module("torch_xla.core.xla_model")
        self._metrics: Any = importlib.import_module("torch_xla.debug.metrics")
        self.device: torch.device = self._xla.device()
        self._peak_before = 0

    def synchronize(self) -> None:
        """Compile and run what has been recorded for tensors that are alive, and wait for it."""
        self._xla.sync(wait=True)
        self._model.wait_device_ops()

    def barrier(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the tensors behind `opt-barrier`; gradients do not pass it, the given tensors stay as they are."""
        return optimization_barrier(tensors)

    def memory(self) -> Memory | None:
        """Return the memory of the chip; `None` under emulation, and where the peak is older than `reset_peak`.

        The runtime cannot begin a peak again: only one above all before it is known to be of now.
        """
        if self.emulated:
            return None
        told = self._model.get_memory_info(self.device)
        held, peak = int(told["bytes_used"]), int(told["peak_bytes_used"])
        if peak <= self._peak_before:
            # Before the work: nothing has been used above what is held. After it: unknown, which a peak of 0 says.
            return Memory(held, 0)
        return Memory(held, peak)

    def reset_peak(self) -> None:
        """Remember the peak so far."""
        if not self.emulated:
            self._peak_before = int(self._model.get_memory_info(self.device)["peak_bytes_used"])

    def compilations(self) -> int:
        """Return how many programs XLA has compiled in this process."""
        told = self._metrics.metric_data("CompileTime")
        return int(told[0]) if told else 0

    def executions(self) -> int:
        """Return how many programs have run in this process."""
        told = self._metrics.metric_data("ExecuteTime")
        return int(told[0]) if told else 0

    def fallbacks(self) -> Mapping[str, int]:
        """Return the operators that ran on the CPU of the host since the process began, and how often.

        `aten::_local_scalar_dense` is `.item()`: it waits for the device and ends the graph.
        """
        return {n: int(self._metrics.counter_value(n)) for n in self._metrics.counter_names() if n.startswith("aten::")}

    def compile(
        self, fn: Callable[..., Any], *, whole: bool = False, most_graphs: int | None = None
    ) -> Callable[..., Any]:
        """Return `fn` so that each call runs as programs of its own, from its first operator to its last.

        Args:
            fn: A step: forward, backward and optimizer become one program, where `torch.compile` makes several.
            whole: Raise where the call is not one program, as with an `.item()` inside.
            most_graphs: Raise at one more graph than this: the bound on recompilation for new shapes.
        """
        name = getattr(fn, "__name__", type(fn).__name__)
        compiled: Callable[..., Any] = self._xla.compile(
            fn, full_graph=whole, name=name, max_different_graphs=most_graphs
        )
        return compiled

    def seed(self, seed: int) -> None:
        """Seed the device's random numbers."""
        self._xla.manual_seed(seed, str(self.device))


def optimization_barrier(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return equal tensors of an `xla` device behind one `opt-barrier`; gradients do not pass it."""
    held = [tensor.detach().clone() for tensor in tensors]
    importlib.import_module("torch_xla.core.xla_model").optimization_barrier_(held)
    return held


def loop(
    body: Callable[..., tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]],
    carry: Sequence[torch.Tensor],
    stacked: Sequence[torch.Tensor],
    shared: Sequence[torch.Tensor],
    *,
    reverse: bool,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the last carry and the stacked results of a loop over `stacked`, one `while` of the program.

    As `advanced_memory.loops.loop`, by the part of torch_xla's `scan` that takes no gradients (no public name in 2.9):
    the public function differentiates its body by AOTAutograd, and a body may do that itself.
    """
    count = len(carry)
    scan = importlib.import_module("torch_xla.experimental.scan")

    def step(
        held: Sequence[torch.Tensor], slices: Sequence[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        # What is the same in every step is carried unchanged: closed over, it would be computed in the loop again.
        with torch.enable_grad():
            after, results = body(held[:count], slices, held[count:])
        return [t.detach() for t in (*after, *held[count:])], [t.detach() for t in results]

    given = [t.detach() for t in (*carry, *shared)]
    after, results = scan._scan_impl_flat(step, given, [t.detach() for t in stacked], reverse=reverse)  # noqa: SLF001
    return list(after[:count]), list(results)


def run_recorded() -> None:
    """Compile and run what has been recorded for tensors that are alive, without waiting for it.

    The device's random numbers go on from another state, which follows from the seed alone.
    """
    importlib.import_module("torch_xla").sync(reset_scope=False)


def load_torch_xla(found: Installed) -> TorchXla:
    """Import `torch_xla` and initialise its device: the CPU under emulation, else what `PJRT_DEVICE` names or a TPU.

    `torch.manual_seed` seeds this device too from then on, as it does those that torch knows by itself.

    Raises:
        KptError: It does not go with this torch or with what the process holds, or there is no such device.
    """
    skip = packages.blocking(packages.Use.TORCH_XLA)
    if skip is not None:
        raise KptError(skip.reason, fix=skip.fix)
    asked = os.environ.get("PJRT_DEVICE", "")
    if found.emulated and asked not in ("", "CPU"):
        raise KptError(f"PJRT_DEVICE={asked} contradicts the emulation on the CPU", fix="unset PJRT_DEVICE")
    if not asked:
        os.environ["PJRT_DEVICE"] = "CPU" if found.emulated else "TPU"
    try:
        runtime = TorchXla(found)
    except (ImportError, OSError, RuntimeError) as error:
        raise KptError(
            f"torch_xla {found.version} cannot be loaded: {str(error).strip().splitlines()[0]}",
            fix="make test-tpu builds an environment where it works; docs/tpu.md tells how to move to torch_tpu",
        ) from error
    _seed_with_torch(runtime)
    return runtime


def _seed_with_torch(runtime: TorchXla) -> None:
    """Let `torch.manual_seed` reach the device, which torch asks of CUDA, XPU and registered backends only."""
    torch_alone = torch.manual_seed

    @functools.wraps(torch_alone)
    def manual_seed(seed: int) -> torch.Generator:
        runtime.seed(int(seed))
        return torch_alone(seed)

    torch.manual_seed = manual_seed
    torch.random.manual_seed = manual_seed
