"""The source text of functions, free of annotations and of this package, for `Transform.source`.

A transform's `source` prints the very functions its `apply` calls, so that what is ejected cannot drift from what ran.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

__all__ = ["plain_source"]

_IMPORTS = {
    "contextmanager": "from contextlib import contextmanager",
    "torch": "import torch",
    "torch_xla": "import torch_xla",
    "nn": "from torch import nn",
    "pytree": "from torch.utils import _pytree as pytree",
}


class _Plain(ast.NodeTransformer):
    """Drops annotations, whose names mean nothing outside this package."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.generic_visit(node)
        node.returns = None
        arguments = node.args
        for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
            argument.annotation = None
        for extra in (arguments.vararg, arguments.kwarg):
            if extra is not None:
                extra.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        return ast.Pass() if node.value is None else ast.Assign([node.target], node.value)


def plain_source(*functions: Callable[..., Any], then: str = "") -> str:
    """Return the definitions of `functions` one after the other, then the statements `then`.

    The functions must need nothing from their modules but each other, `torch`, `torch_xla`, `nn`,
    `torch.utils._pytree` as `pytree`, and `contextlib.contextmanager`, which the text imports.
    """
    parts = []
    for function in functions:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        parts.append(ast.unparse(ast.fix_missing_locations(_Plain().visit(tree))))
    text = "\n\n".join([*parts, textwrap.dedent(then).strip()])
    used = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
    imports = "\n".join(line for name, line in _IMPORTS.items() if name in used)
    return f"{imports}\n\n{text}\n" if imports else f"{text}\n"
