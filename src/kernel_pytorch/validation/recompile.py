"""Tell what recompiles in every call: at the compiler's limit it would run eagerly from then on, with a log line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["compiled_frames", "fail_on_recompile_limit", "keeps_recompiling"]

_SETTLING_CALLS = 2
"""A value that differs between calls is compiled as a constant first, and as a variable from its second value on."""


@contextmanager
def fail_on_recompile_limit() -> Iterator[None]:
    """Make `torch.compile` raise where it would fall back to eager for having recompiled too often.

    Wrap the building and every call of a candidate in it. A torch without the setting is left as it is, and so is a
    process in which nothing imported the compiler yet and nothing does inside.
    """
    import torch._dynamo.config as settings  # noqa: F401  # registers the settings without the compiler's cost

    config = sys.modules["torch._dynamo.config"]
    if not hasattr(config, "fail_on_recompile_limit_hit"):
        yield
        return
    with config.patch(fail_on_recompile_limit_hit=True):
        yield


def compiled_frames() -> int:
    """Return how often this process has compiled a frame."""
    loaded = sys.modules.get("torch._dynamo.utils")
    return int(loaded.counters["frames"]["total"]) if loaded is not None else 0


def keeps_recompiling(call: Callable[[], Any]) -> bool:
    """Return whether a call still compiles something after two more calls with the same inputs."""
    for _ in range(_SETTLING_CALLS):
        call()
    before = compiled_frames()
    call()
    return compiled_frames() != before
