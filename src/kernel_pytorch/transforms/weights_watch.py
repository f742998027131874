"""Notice that weights have changed since code was generated that holds them as constants."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["WeightsWatch"]


class WeightsWatch:
    """The identity, version and storage of every parameter and buffer of a model at one time.

    A new checkpoint (`load_state_dict`, with or without `assign`), an in-place edit and a swapped `.data` are all
    noticed; buffers that the model itself changes in a call can be left out with `forget_moving`.
    """

    def __init__(self, model: nn.Module) -> None:
        slots = {}
        for module in model.modules():
            for table in (module._parameters, module._buffers):  # noqa: SLF001
                slots.update({(id(table), name): (table, name) for name, t in table.items() if t is not None})
        self._slots: list[tuple[dict[str, Any], str]] = list(slots.values())
        self._seen = self._stamps()

    def _stamps(self) -> list[tuple[int, ...]]:
        return [_stamp(table.get(name)) for table, name in self._slots]

    def changed(self) -> bool:
        """Return whether any weight is not what it was when last looked at."""
        return self._stamps() != self._seen

    def look(self) -> None:
        """Take the weights as they are now for known."""
        self._seen = self._stamps()

    def forget_moving(self) -> None:
        """Leave out what has changed since last looked at: the model changes it itself."""
        moved = [now != then for now, then in zip(self._stamps(), self._seen, strict=True)]
        self._slots = [slot for slot, gone in zip(self._slots, moved, strict=True) if not gone]
        self.look()


def _stamp(tensor: Any) -> tuple[int, ...]:
    if tensor is None:
        return ()
    version = 0 if tensor.is_inference() else tensor._version  # noqa: SLF001
    plain = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout is torch.strided
    return (id(tensor), version, tensor.data_ptr() if plain else 0)
