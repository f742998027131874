"""The managers whose contract can be run on this machine: the CPU's always, a GPU's where there is one."""

from __future__ import annotations

import pytest

from kernel_pytorch.backends import manager_for
from kernel_pytorch.errors import KptError
from kernel_pytorch.hardware import VENDORS


def pytest_generate_tests(metafunc):
    if "vendor" in metafunc.fixturenames:
        metafunc.parametrize("vendor", VENDORS, scope="module")


@pytest.fixture(scope="module")
def manager(vendor):
    try:
        return manager_for(vendor)
    except KptError as error:
        pytest.skip(f"{vendor}: {error}")
