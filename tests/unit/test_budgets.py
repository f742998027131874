"""Budgets by name: what they are worth depends on the device."""

from __future__ import annotations

import pytest

from kernel_pytorch.core.config import BUDGETS_S, GPU_BUDGETS_S, KernelPyTorchConfig, budget_seconds
from kernel_pytorch.core.management.unified_manager import UnifiedManager
from kernel_pytorch.errors import KptError


def test_a_gpu_is_given_more_time_for_it_compiles_longer() -> None:
    assert GPU_BUDGETS_S.keys() == BUDGETS_S.keys()
    assert budget_seconds("quick", "nvidia") <= 180.0
    assert budget_seconds("default", "nvidia") <= 600.0
    assert budget_seconds("default", "cpu") < budget_seconds("default", "nvidia")


def test_what_is_left_to_the_device_is_filled_in_where_it_is_known() -> None:
    assert KernelPyTorchConfig().budget_s is None
    assert KernelPyTorchConfig().on("cpu").budget_s == BUDGETS_S["default"]
    assert KernelPyTorchConfig().on("nvidia").budget_s == GPU_BUDGETS_S["default"]
    assert KernelPyTorchConfig(budget_s=7.0).on("nvidia").budget_s == 7.0
    manager = UnifiedManager()
    assert manager.config.budget_s == budget_seconds("default", manager.hardware_manager.vendor)


def test_a_budget_of_nothing_is_refused() -> None:
    with pytest.raises(KptError, match="budget_s must be above 0"):
        KernelPyTorchConfig(budget_s=0.0)
