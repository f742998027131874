"""Scaling state beside a checkpoint: what FP8 carries from step to step, saved and taken up again.

    torch.save({"model": model.state_dict(), "float8": kp.precision.state(model), ...}, path)
    ...
    kp.precision.load_state(model, torch.load(path)["float8"])

`state_dict` keeps the keys of the unmodified model, so this is apart from it. Recipes without delayed scales carry
nothing but which layers run in FP8; that is saved and compared too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from kernel_pytorch.errors import InputsError, ModelError
from kernel_pytorch.precision.fallback import fall_back, fallen
from kernel_pytorch.precision.site import Site, sites_of

__all__ = ["hold_weights", "load_state", "named_sites", "state"]

_VERSION = 1


def named_sites(model: nn.Module) -> dict[str, tuple[Site, list[str]]]:
    """Return the sites of a model, each by the path of its first layer, with the paths of all its layers."""
    paths: dict[int, list[str]] = {}
    sites: dict[int, Site] = {}
    for path, _, site in sites_of(model):
        paths.setdefault(id(site), []).append(path)
        sites[id(site)] = site
    return {names[0]: (sites[key], names) for key, names in paths.items()}


def state(model: nn.Module) -> dict[str, Any]:
    """Return the scaling state of a model in FP8, as tensors and plain values that `torch.save` takes.

    With it, the model's `state_dict` and the optimizer's, the steps after a resume are those that would have followed,
    bit by bit; also in the middle of gradient accumulation.

    Raises:
        ModelError: No layer of the model runs in FP8, or ever did.
    """
    sites = named_sites(model)
    if not sites and not fallen(model):
        raise ModelError("no layer of the model runs in FP8", fix="kp.precision.convert(model)")
    return {
        "version": _VERSION,
        "sites": {
            name: {
                "layers": paths,
                "recipe": site.recipe.name,
                "scales": {operand: scale.detach().clone() for operand, scale in site.states.items()},
                "weight_is_cast": site.weight_is_cast,
            }
            for name, (site, paths) in sites.items()
        },
        "fallen": dict(fallen(model)),
    }


def load_state(model: nn.Module, saved: Mapping[str, Any]) -> None:
    """Take up a scaling state that `state` returned, in place; the model is converted as it was then.

    Layers that had fallen back to their own format do so again.

    Raises:
        InputsError: It is no such state, or of a newer version.
        ModelError: Layers, recipes or lengths of histories are others than those that were saved.
    """
    if not isinstance(saved, Mapping) or saved.get("version") != _VERSION:
        raise InputsError("this is no scaling state that kp.precision.state returned, or one of a newer version")
    for path, reason in saved["fallen"].items():
        if path not in fallen(model):
            fall_back(model, path, reason)
    sites = named_sites(model)
    mine = {name: (site.recipe.name, paths) for name, (site, paths) in sites.items()}
    theirs = {name: (entry["recipe"], list(entry["layers"])) for name, entry in saved["sites"].items()}
    if mine != theirs:
        other = sorted(name for name in {*mine, *theirs} if mine.get(name) != theirs.get(name))
        raise ModelError(
            f"other layers run in FP8, or by another recipe, than when the state was saved: {', '.join(other[:5])}",
            fix="convert the model with the recipe and the inputs of that run, then load the state",
        )
    for name, (site, _) in sites.items():
        entry = saved["sites"][name]
        shapes = {operand: scale.shape for operand, scale in site.states.items()}
        if shapes != {operand: scale.shape for operand, scale in entry["scales"].items()}:
            raise ModelError(f"{name}: the saved scales look back on another number of casts")
    for name, (site, _) in sites.items():
        site.resume(saved["sites"][name]["scales"], weight_is_cast=bool(saved["sites"][name]["weight_is_cast"]))


def hold_weights(model: nn.Module, optimizer: Any = None) -> None:
    """Keep the weights of a model in FP8 in memory of their own, cast once an optimizer step, also for compiled code.

    Eager code keeps casts by itself until a parameter changes. Compiled code casts at every call, that is at each
    micro-step of gradient accumulation; after this it reads what is held.

    Args:
        model: In FP8. Call this before it is compiled, or it is compiled again.
        optimizer: Its steps cast the weights anew. Without one call this again after every change of the weights;
            loading a `state_dict` into the model does so by itself.
    """

    def cast(*_: Any) -> None:
        for site, _paths in named_sites(model).values():
            site.hold_weight()

    cast()
    model.register_load_state_dict_post_hook(cast)  # type: ignore[no-untyped-call]
    if optimizer is not None:
        optimizer.register_step_post_hook(cast)
