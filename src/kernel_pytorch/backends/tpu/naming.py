"""Which module an operator of a traced step comes from: hooks note it forward, autograd's order tells it backward."""

from __future__ import annotations

import bisect
import contextlib
import sys
from collections import deque
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch
from torch import fx, nn
from torch.fx import traceback as recorded

__all__ = ["Naming"]

_KEY = "kpt_module"


class Naming:
    """Notes the path of the running module on every operator that is recorded.

    Every module pushes its path while it runs. An autograd node takes the number that was next when its forward ran, so
    that the numbers at which the path changed tell the module of a gradient.

    Attributes:
        failed: Path of the innermost module that an exception left; empty where none did.
    """

    def __init__(self, model: nn.Module) -> None:
        self._paths = {id(module): path or type(module).__name__ for path, module in model.named_modules()}
        self._stack = ["loss"]
        self._suffix = ""
        self._changes: list[tuple[int, str]] = []
        self._handles: list[Any] = []
        self.failed = ""

    @property
    def current(self) -> str:
        """Where the trace is."""
        return self._stack[-1] + self._suffix

    @staticmethod
    def of(node: fx.Node) -> str:
        """Return where a node comes from; empty where nothing was noted."""
        custom = node.meta.get("custom") or {}
        return str(custom.get(_KEY, ""))

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Note paths on the nodes that are made meanwhile (inside `torch.fx.traceback.preserve_node_meta`)."""
        with recorded.annotate({_KEY: ""}):
            yield

    def __enter__(self) -> Naming:
        before = nn.modules.module.register_module_forward_pre_hook(self._enter_module)
        after = nn.modules.module.register_module_forward_hook(self._leave_module, always_call=True)
        self._handles = [before, after]
        self._stack, self._suffix, self._changes, self.failed = ["loss"], "", [], ""
        self._note(self._stack[-1])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def before_backward(self, loss: torch.Tensor) -> None:
        """Let each autograd node below a loss name its module when it runs."""
        numbers = [number for number, _ in self._changes]
        paths = [path for _, path in self._changes]
        self._suffix = " (backward)"
        for node in _nodes_below(loss):
            position = bisect.bisect_right(numbers, node._sequence_nr()) - 1  # noqa: SLF001
            path = paths[max(position, 0)]

            def begin(*_: Any, path: str = path) -> None:
                self._stack = [path]
                self._set(path)

            node.register_prehook(begin)

    def before_optimizer(self, name: str) -> None:
        """Name what follows after the optimizer."""
        self._suffix = ""
        self._stack = [f"optimizer {name}"]
        self._set(self._stack[-1])

    def _enter_module(self, module: nn.Module, _: Any) -> None:
        self._stack.append(self._paths.get(id(module), self._stack[-1]))
        self._note(self._stack[-1])

    def _leave_module(self, module: nn.Module, _: Any, __: Any) -> None:
        del module
        if not self.failed and sys.exc_info()[0] is not None:  # the hook is called on the way of an exception
            self.failed = self.current
        if len(self._stack) > 1:
            self._stack.pop()
        self._note(self._stack[-1])

    def _note(self, path: str) -> None:
        if not self._suffix:
            self._changes.append((torch.autograd._get_sequence_nr(), path))  # type: ignore[attr-defined]  # noqa: SLF001
        self._set(path)

    def _set(self, path: str) -> None:
        if recorded.has_preserved_node_meta():
            recorded.current_meta["custom"] = {**recorded.current_meta.get("custom", {}), _KEY: path + self._suffix}


def _nodes_below(loss: torch.Tensor) -> Iterator[Any]:
    root = loss.grad_fn
    waiting, seen = deque([root] if root is not None else []), {root}
    while waiting:
        node = waiting.popleft()
        yield node
        for below, _ in node.next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                waiting.append(below)
