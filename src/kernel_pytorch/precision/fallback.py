"""Give a layer its own format back while a training runs, and remember why."""

from __future__ import annotations

from torch import nn

from kernel_pytorch.errors import ModelError
from kernel_pytorch.precision.linear import restore_linear
from kernel_pytorch.precision.mlp import MLP_SLOT, restore_mlp
from kernel_pytorch.precision.site import site_of

__all__ = ["fall_back", "fallen"]

_FALLEN = "_float8_fallen"


def fallen(model: nn.Module) -> dict[str, str]:
    """Return the layers that fell back to their own format, by path, with the reason."""
    found = vars(model).get(_FALLEN)
    return found if isinstance(found, dict) else {}


def fall_back(model: nn.Module, path: str, reason: str) -> list[str]:
    """Let a layer, and those that it is one with, run in their own format from now on; return their paths.

    A gated MLP that is one comes apart: its other layers stay in FP8.

    Args:
        model: Whose layer it is; changed in place. `report(model)` tells of it.
        path: Of the layer in the model.
        reason: Why, for reports.

    Raises:
        ModelError: There is no layer in FP8 at this path.
    """
    layer = dict(model.named_modules()).get(path)
    site = None if layer is None else site_of(layer)
    if site is None:
        raise ModelError(f"{path} is no layer that runs in FP8")
    for module in model.modules():
        held = vars(module).get(MLP_SLOT)
        if held is not None and site in held[:2]:
            restore_mlp(module)
    if site.normed is not None:
        site.normed.used = False
    members = {id(member) for member in site.layers}
    paths = []
    for name, module in model.named_modules():
        if id(module) in members and isinstance(module, nn.Linear):
            restore_linear(module)
            paths.append(name)
    vars(model).setdefault(_FALLEN, {}).update(dict.fromkeys(paths, reason))
    return paths
