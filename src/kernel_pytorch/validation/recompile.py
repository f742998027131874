"""Turn a silently hit recompile limit (from then on eager runs, with a log line) into an error."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["fail_on_recompile_limit"]


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
