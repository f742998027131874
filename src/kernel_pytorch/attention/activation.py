"""PyTorch's own way to FlashAttention-3 and -4: its flash operator replaced for the whole process, and put back.

For builds whose functions `fa3` and `fa4` cannot call, but PyTorch can: inside `activated("FA4")`, `impl="flash"` and
SDPA's flash backend run that package. Not chosen by itself, since it changes what other code in the process calls.
https://docs.pytorch.org/docs/stable/nn.attention.html
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.nn import attention as native

from kernel_pytorch.attention import api
from kernel_pytorch.attention.types import AttentionError

__all__ = ["activated"]


@contextmanager
def activated(package: str) -> Iterator[None]:
    """Let PyTorch's flash attention be a package's within the context, in the whole process.

    What was probed and chosen before is forgotten on entry and on exit.

    Args:
        package: `FA3` or `FA4`.

    Raises:
        AttentionError: This torch knows no such package, or the package cannot be activated, with the reason.
    """
    registry: Any = native
    activate = getattr(registry, "activate_flash_attention_impl", None)
    if activate is None:
        raise AttentionError("this torch cannot replace its flash attention", fix="torch 2.11 or newer")
    names = registry.list_flash_attention_impls()
    if package not in names:
        raise AttentionError(f"torch knows no flash attention {package!r}", fix=f"one of {', '.join(names)}")
    try:
        activate(package)
    except (ImportError, RuntimeError, ValueError) as error:
        raise AttentionError(
            f"{package} cannot be activated: {error}", fix="install the package that it names"
        ) from error
    api.forget()
    try:
        yield
    finally:
        registry.restore_flash_attention_impl()
        api.forget()
