"""The child that traces and lowers: `python -m kernel_pytorch.backends.tpu.lower_worker REQUEST ANSWER`."""

from __future__ import annotations

import os
import pickle
import time

from kernel_pytorch.backends.tpu.workers import serve

__all__ = ["load", "work"]


def work(request: bytes) -> object:
    """Return the `Lowered` form of the program that a pickled builder makes."""
    from kernel_pytorch.backends.tpu.ahead import Lowered
    from kernel_pytorch.backends.tpu.lowering import lower
    from kernel_pytorch.backends.tpu.steps import trace_step

    load()
    program, batch = pickle.loads(request)()  # noqa: S301  written by our own parent
    began = time.perf_counter()
    step = trace_step(program, batch)
    stablehlo = lower(step)
    seconds = time.perf_counter() - began
    return Lowered(stablehlo, step.arguments, step.flops, step.flops_by_operator, seconds)


def load() -> None:
    """Load torch_tpu over the CPU plugin, to trace and lower with.

    Raises:
        KptError: It is not installed, with the command.
    """
    import torch

    from kernel_pytorch.backends.tpu.recurrent import make_traceable
    from kernel_pytorch.backends.tpu.torch_tpu import load_torch_tpu
    from kernel_pytorch.errors import KptError
    from kernel_pytorch.hardware.tpu.installed import Installed, version_of

    version = version_of("torch-tpu")
    if not version:
        raise KptError("lowering for a TPU needs torch_tpu, which is not installed", fix=_INSTALL)
    load_torch_tpu(Installed("torch_tpu", version, emulated=True))
    make_traceable()
    # Emulation leaves them out, for no CPU can run torch_tpu's Mosaic kernel; a chip takes it under these names.
    torch.backends.cuda.enable_flash_sdp(enabled=True)
    torch.backends.cuda.enable_mem_efficient_sdp(enabled=True)
    torch.backends.cuda.enable_cudnn_sdp(enabled=True)


_INSTALL = "pip install torch-tpu==0.2.0 && pip install --no-deps fastatomstruct-xla-cpu==2026.6.23"


if __name__ == "__main__":
    serve(work)
    os._exit(0)  # torch_tpu's teardown may abort, when the answer is already written
