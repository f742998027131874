"""Peak memory of a CPU where the kernel does not keep the mark: a thread polls."""

from __future__ import annotations

import time

import pytest
import torch

from kernel_pytorch.backends.cpu import memory

MB = 1 << 20


def hold(size):
    block = torch.ones(size, dtype=torch.uint8)
    time.sleep(0.05)
    return int(block[-1])


@pytest.fixture
def refused(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_CLEAR_REFS", tmp_path / "absent" / "clear_refs")


def test_polling_finds_a_known_allocation(refused):
    hold(MB)
    assert memory.peak_bytes(lambda: hold(192 * MB)) == pytest.approx(192 * MB, rel=0.2)


def test_polling_ends_with_the_work_even_if_it_raises(refused):
    def fault():
        raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        memory.peak_bytes(fault)
    assert "peak-bytes" not in {thread.name for thread in memory.threading.enumerate()}


def test_memory_that_the_allocator_kept_is_seen_again():
    def many_small_blocks():
        return [bytes(32 << 10) for _ in range(1500)]

    many_small_blocks()
    assert memory.peak_bytes(many_small_blocks) > 30 * MB
