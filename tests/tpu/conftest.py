"""The runtime that is installed here, loaded once; where none is, its tests are skipped with the reason."""

from __future__ import annotations

import os
import warnings

import pytest

from kernel_pytorch.backends.tpu import packages, runtimes
from kernel_pytorch.errors import KptError
from kernel_pytorch.hardware.tpu import installed, probe


def _load(name: str, use: packages.Use) -> runtimes.Runtime:
    skip = packages.blocking(use)
    if skip is not None:
        pytest.skip(f"{skip.reason}; {skip.fix}")
    os.environ.setdefault("KPT_TPU_RUNTIME", name)
    if not probe.attached().reachable:
        os.environ.setdefault("KPT_TPU_EMULATE", "1")
    chosen = installed.runtime()
    if getattr(chosen, "name", "") != name:
        pytest.skip(f"the runtime of this process is {getattr(chosen, 'label', chosen)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default")  # those of the runtime's own import are not ours
            return runtimes.load()
    except KptError as error:
        pytest.skip(f"{error}; {error.fix}")


@pytest.fixture(scope="session")
def torch_xla() -> runtimes.Runtime:
    """PyTorch/XLA in this process: on the chip where there is one, else on the CPU."""
    return _load("torch_xla", packages.Use.TORCH_XLA)


@pytest.fixture(scope="session")
def torch_tpu() -> runtimes.Runtime:
    """TorchTPU in this process: on the chip where there is one, else on XLA's CPU plugin."""
    emulated = not probe.attached().reachable
    return _load("torch_tpu", packages.Use.EMULATION if emulated else packages.Use.TORCH_TPU)


@pytest.fixture(scope="session")
def runtime(request: pytest.FixtureRequest) -> runtimes.Runtime:
    """Whichever runtime is installed."""
    chosen = installed.runtime()
    if not isinstance(chosen, installed.Installed):
        pytest.skip(f"{chosen.reason}; {chosen.fix}")
    loaded: runtimes.Runtime = request.getfixturevalue(chosen.name)
    return loaded
