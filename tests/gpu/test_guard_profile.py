"""Profiles of a GPU: kernels by name, what they work for, and the right culprit first."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernel_pytorch.core.types import Ratio, Verdict
from kernel_pytorch.guard.culprit import find_culprits
from kernel_pytorch.guard.kernel_names import class_of, condensed
from kernel_pytorch.guard.profile import kernels_ms, profile_in_turns
from kernel_pytorch.guard.types import Comparison, SideFacts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def manager() -> Any:
    from kernel_pytorch.backends import manager_for

    return manager_for("cuda")


def step_of(backend: SDPBackend, *, cast: bool = False) -> Callable[[], None]:
    torch.manual_seed(0)
    layer = torch.nn.Linear(1024, 1024, device="cuda", dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(layer.parameters(), foreach=False, fused=False)
    inputs = torch.randn(4, 16, 1024, 64, device="cuda", dtype=torch.bfloat16)

    def step() -> None:
        query = layer(inputs.transpose(1, 2).reshape(4, 1024, 1024)).view(4, 1024, 16, 64).transpose(1, 2)
        with sdpa_kernel(backend):
            attended = F.scaled_dot_product_attention(query, query, query)
        if cast:
            attended = attended.float().bfloat16()
        attended.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        step()
    return step


def test_kernels_have_names_classes_and_owners(manager: Any) -> None:
    step = step_of(SDPBackend.FLASH_ATTENTION)
    found = condensed(kernels_ms(step, manager))
    kinds = {class_of(name) for name in found}
    assert {"attention", "matmul", "optimizer", "elementwise"} <= kinds, found
    assert any(name.startswith("AdamW.step > ") for name in found), found
    assert not any("::" in name and not name.startswith("aten::") for name in found), found
    assert condensed(found) == found
    busy_ms, step_ms = sum(found.values()), min(manager.time_ms(step) for _ in range(10))
    assert 0.0 < busy_ms < 1.5 * step_ms


def culprits(base: Callable[[], None], head: Callable[[], None], manager: Any) -> list[str]:
    takes = [functools.partial(kernels_ms, step, manager, max_seconds=0.2) for step in (base, head)]
    profiles = profile_in_turns(*takes)
    old_ms, new_ms = (sum(profile.values()) for profile in profiles)
    facts = [
        SideFacts(label, device_key=manager.spec.key, kernels_ms=profile)
        for label, profile in zip(("base", "head"), profiles, strict=True)
    ]
    change = Ratio(new_ms / old_ms, new_ms / old_ms, new_ms / old_ms)
    found = find_culprits(
        Comparison(
            "compare",
            "step",
            Verdict.FAIL,
            "",
            0.03,
            *facts,
            "",
            "1",
            change=change,
            base_samples_ms=(old_ms,),
            head_samples_ms=(new_ms,),
        )
    )
    return [culprit.what for culprit in found]


def test_math_attention_is_named_as_what_replaced_flash_attention(manager: Any) -> None:
    found = culprits(step_of(SDPBackend.FLASH_ATTENTION), step_of(SDPBackend.MATH), manager)
    assert "replaced by" in found[0], found
    assert "flash" in found[0].lower(), found
    assert "_scaled_dot_product_attention_math" in found[0], found


def test_a_cast_is_named(manager: Any) -> None:
    backend = SDPBackend.FLASH_ATTENTION
    found = culprits(step_of(backend), step_of(backend, cast=True), manager)
    assert "copy" in found[0], found
