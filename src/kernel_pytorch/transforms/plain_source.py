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


class _Plain(ast.NodeTransformer):
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
        if node.value is None:
            return ast.Pass()
        return ast.Assign([node.target], node.value)


def plain_source(*functions: Callable[..., Any], imports: tuple[str, ...] = (), then: str = "") -> str:
    """Return `imports`, the definitions of `functions` one after the other, then the statements `then`.

    The functions must need nothing from their modules but each other and `torch`, which the text imports.
    """
    parts = ["\n".join(("import torch", *imports))]
    for function in functions:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        parts.append(ast.unparse(ast.fix_missing_locations(_Plain().visit(tree))))
    return "\n\n".join([*parts, textwrap.dedent(then).strip()]) + "\n"
