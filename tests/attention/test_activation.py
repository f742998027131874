"""PyTorch's process-wide replacement of its flash attention: paired with its restoration, and forgetting."""

from __future__ import annotations

import pytest
import torch
from torch.nn import attention as native

from kernel_pytorch.attention import AttentionError, AttentionShape, api, choice, probe, unsupported
from kernel_pytorch.attention.activation import activated

if not hasattr(native, "activate_flash_attention_impl"):
    pytest.skip(f"torch {torch.__version__} has no replacement of its flash attention", allow_module_level=True)


@pytest.fixture
def registered(monkeypatch):
    from torch.nn.attention import _registry

    events = []

    class Handle:
        def remove(self):
            events.append("removed")

    def register():
        events.append("registered")
        return Handle()

    monkeypatch.setitem(_registry._FLASH_ATTENTION_IMPLS, "TEST", register)
    return events


def test_what_is_activated_is_restored_and_forgotten(registered):
    shape, cpu = AttentionShape(1, 2, 2, 8, 8, 8, torch.float32), torch.device("cpu")
    unsupported("math", shape, cpu, backward=False)
    plain = choice.software(cpu)
    with pytest.raises(KeyError), activated("TEST"):  # noqa: PT012
        assert native.current_flash_attention_impl() == "TEST"
        assert not probe._known
        assert choice.software(cpu) != plain
        unsupported("math", shape, cpu, backward=False)
        raise KeyError
    assert registered == ["registered", "removed"]
    assert native.current_flash_attention_impl() is None
    assert not probe._known
    assert not api._answers
    assert choice.software(cpu) == plain


def test_what_cannot_be_activated_says_why():
    with pytest.raises(AttentionError, match="no flash attention 'FA9'"), activated("FA9"):
        pass
    if torch.cuda.is_available():
        pytest.skip("FA4 may be there")
    with pytest.raises(AttentionError, match="FA4 cannot be activated"), activated("FA4"):
        pass
    assert native.current_flash_attention_impl() is None
