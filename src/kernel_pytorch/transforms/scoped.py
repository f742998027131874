"""Process-wide settings that hold during a call only: thread count, matrix precision, attention backend.

Settings stay outside compiled code: `compile` and its relatives compile what is inside and put the setting back around
it, because Dynamo would break the graph at it, and because code is generated under the setting it will run with.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

__all__ = ["Scoped", "inside_settings", "scoped", "settings_of"]


def scoped(inner: Callable[..., Any], setting: Callable[[], AbstractContextManager[Any]]) -> Callable[..., Any]:
    """Return `inner`, called under a fresh `setting()` each time."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with setting():
            return inner(*args, **kwargs)

    return run


class Scoped:
    """A call under a setting that is made on entry and taken back on exit."""

    def __init__(self, inner: Callable[..., Any], setting: Callable[[], AbstractContextManager[Any]]) -> None:
        self.inner = inner
        self.setting = setting
        self._run = scoped(inner, setting)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the call under the setting."""
        return self._run(*args, **kwargs)


def inside_settings(
    call: Callable[..., Any], wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Callable[..., Any]:
    """Return `call` with `wrap` applied to what lies inside its settings."""
    if isinstance(call, Scoped):
        return Scoped(inside_settings(call.inner, wrap), call.setting)
    return wrap(call)


def settings_of(call: Callable[..., Any]) -> ExitStack:
    """Return a context in which all settings around `call` hold, for what generates code ahead of the first call."""
    stack = ExitStack()
    while isinstance(call, Scoped):
        stack.enter_context(call.setting())
        call = call.inner
    return stack
