"""Every implementation by its name, in one explicit order."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from kernel_pytorch.attention import cudnn, efficient, fa3, fa4, flash, flex, reference, sdpa
from kernel_pytorch.attention.types import AttentionError, Implementation

__all__ = ["implementation", "implementations"]

_MATH = Implementation(
    name="math",
    summary="the definition, written out in plain PyTorch; stores every score",
    fits=reference.fits,
    call=reference.attend,
    call_varlen=reference.attend_varlen,
)

_ALL: dict[str, Implementation] = {
    one.name: one
    for one in (
        *fa3.IMPLEMENTATIONS,
        fa4.IMPLEMENTATION,
        cudnn.IMPLEMENTATION,
        flash.IMPLEMENTATION,
        efficient.IMPLEMENTATION,
        sdpa.IMPLEMENTATION,
        flex.IMPLEMENTATION,
        _MATH,
    )
}


def implementations() -> Mapping[str, Implementation]:
    """Return every implementation by name, whether it can run here or not; `unsupported` tells which can."""
    return MappingProxyType(_ALL)


def implementation(name: str) -> Implementation:
    """Return an implementation.

    Raises:
        AttentionError: There is none of this name.
    """
    if name not in _ALL:
        raise AttentionError(f"there is no attention implementation {name!r}", fix=f"impl= one of {', '.join(_ALL)}")
    return _ALL[name]
