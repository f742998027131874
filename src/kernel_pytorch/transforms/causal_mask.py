"""Tell attention that it is causal instead of handing it a dense mask that says so.

Transformers passes `is_causal=True` in eager code but builds a `[batch, 1, tokens, tokens]` mask while it is traced by
`torch.compile`, and fused attention is slower with a mask than where it knows that the mask is causal.
Models that slice a triangular buffer lose the same in eager code too.

Whether the masks can go is found by behaviour: the model is run on a sample of its example inputs, as eager code and as
if traced, and every mask must equal the causal one and must not be computed from the values of any input. The
replacement holds only for calls whose arguments look like those that were observed (one argument more, a padding mask
say, runs the model as it was), and only up to the length that was observed: a window shows itself at no shorter one.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from kernel_pytorch.core.protocols import Program
from kernel_pytorch.core.types import DeviceSpec, Mode, Numerics, Prediction, Skip, Step, WorkloadSpec
from kernel_pytorch.errors import CandidateError
from kernel_pytorch.transforms.attention_calls import (
    Using,
    detour,
    install,
    rerouted,
    routes_by_thread,
    using,
    with_globals,
)
from kernel_pytorch.transforms.attention_observe import Observation, fused_path_note, observe
from kernel_pytorch.transforms.ceilings import bounded
from kernel_pytorch.transforms.plain_source import plain_source

__all__ = ["CausalMask", "Skipping", "by_name", "configs_of", "register_maskless", "switch", "unmasked"]

_NAME = "kernel_pytorch_causal"
_PLAIN = (
    "input_ids", "inputs_embeds", "attention_mask", "past_key_values", "use_cache", "labels", "return_dict",
    "output_attentions", "output_hidden_states", "logits_to_keep", "num_items_in_batch",
)  # fmt: skip
"""Arguments of Hugging Face models that either leave the causal mask alone or are honoured where it is made."""


def unmasked(longest: int | None) -> Callable[..., torch.Tensor]:
    """Return an answer to SDPA that replaces masks between equal lengths, up to `longest`, by `is_causal=True`."""

    def route(query: Any, key: Any, value: Any, options: dict[str, Any], rest: Callable[..., Any]) -> Any:
        length = query.shape[-2]
        if options["attn_mask"] is not None and length == key.shape[-2] and (longest is None or length <= longest):
            options = {**options, "attn_mask": None, "is_causal": True}
        return rest(query, key, value, options)

    return route


def register_maskless(name: str) -> Any:
    """Register SDPA in transformers under a name of which the causal mask can be switched off; return the switch.

    While `switch.longest` is not 0 and the model is traced, no mask is made for a plain causal pattern of up to that
    many tokens (`None`: any number); everything else is transformers' own `sdpa`, whose eager code needs no help.
    """
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    class Switch:
        longest: int | None = 0

    switch = Switch()

    def mask(*args: Any, **kwargs: Any) -> Any:
        longest, length = switch.longest, kwargs.get("q_length")
        local = kwargs.get("local_size")
        if (
            longest != 0
            and torch.compiler.is_compiling()
            and kwargs.get("attention_mask") is None
            and "allow_is_bidirectional_skip" not in kwargs
            and not kwargs.get("use_vmap", False)
            and length is not None
            and length == kwargs.get("kv_length")
            and (longest is None or length <= longest)
            and (local is None or length < local)
        ):
            return None
        return sdpa_mask(*args, **kwargs)

    AttentionInterface.register(name, sdpa_attention_forward)
    AttentionMaskInterface.register(name, mask)
    return switch


class Skipping:
    """Switches off the causal mask of the registered attention, in words that Dynamo traces."""

    def __init__(self, switch: Any, longest: int | None) -> None:
        self.switch = switch
        self.longest = longest

    def enter(self) -> None:
        """Begin."""
        self.switch.longest = self.longest

    def leave(self) -> None:
        """End."""
        self.switch.longest = 0


def configs_of(model: nn.Module) -> list[tuple[Any, str]]:
    """Return the Hugging Face configurations of a model and the attention each names, outer ones first."""
    found: dict[int, tuple[Any, str]] = {}

    def visit(config: Any) -> None:
        if config is None or id(config) in found or not hasattr(config, "_attn_implementation"):
            return
        found[id(config)] = (config, config._attn_implementation)  # noqa: SLF001
        for name in getattr(config, "sub_configs", None) or ():
            visit(getattr(config, name, None))

    for module in model.modules():
        visit(getattr(module, "config", None))
    return list(found.values())


def switch(configs: list[tuple[Any, str]], name: str) -> None:
    """Let configurations that name SDPA name another attention; setting one sets those inside it, so all are set."""
    for config, had in configs:
        config._attn_implementation = name if had == "sdpa" and name else had  # noqa: SLF001


def by_name(
    inner: Callable[..., Any], mode: Any, parameters: Sequence[str], allowed: Sequence[str]
) -> Callable[..., Any]:
    """Return `inner`, called under `mode` where all arguments that are given bear allowed names."""

    def run(*args: Any, **kwargs: Any) -> Any:
        fits = len(args) <= len(parameters)
        for name, value in zip(parameters, args):  # noqa: B905
            fits = fits and (value is None or name in allowed)
        for name, value in kwargs.items():
            fits = fits and (value is None or name in allowed)
        if not fits:
            return inner(*args, **kwargs)
        mode.enter()
        try:
            return inner(*args, **kwargs)
        finally:
            mode.leave()

    return run


class CausalMask:
    """No parameters. Hugging Face models by their attention registry, others by a detour around SDPA."""

    name = "causal_mask"
    summary = "replace dense causal masks by is_causal=True"
    group = "mask"
    numerics = Numerics.REORDERED
    modes = frozenset({Mode.INFERENCE, Mode.TRAINING})
    compiles = False
    pays_compiled = True
    """Transformers makes dense masks only while it is traced."""

    def probe(self, device: DeviceSpec) -> Skip | None:
        """SDPA knows `is_causal` everywhere."""
        del device
        return None

    def propose(self, workload: WorkloadSpec, device: DeviceSpec) -> Sequence[Step] | Skip:
        """Worth a try wherever SDPA is called; whether there is a causal mask is seen by running the model."""
        del device
        if any("scaled_dot_product" in op for op in workload.operators):
            return [Step(self.name)]
        return Skip("the model does not call scaled_dot_product_attention")

    def ceiling(self, step: Step, prediction: Prediction, device: DeviceSpec) -> float:
        """Attention may vanish, and what makes the masks and repeats the keys for them."""
        del step, device
        return bounded(prediction, dict.fromkeys(("attention", "copy", "elementwise", "overhead", "other"), 0.0))

    def apply(self, program: Program, step: Step) -> Program:
        """Observe the masks, then put the replacement around the call, inside what compiles."""
        del step
        configs = configs_of(program.model)
        named = "transformers" in sys.modules and any(had == "sdpa" for _, had in configs)
        if not program.calls:
            if not named:
                raise CandidateError(
                    "whether a mask is causal is seen by running the model, and there are no example inputs",
                    fix="pass inputs=... when applying the plan",
                )
            _install(program, configs, longest=None, seen=None)
            return program
        seen = _removable(program)
        longest = seen.lengths[-1]
        if named and _try_registry(program, configs, seen, longest):
            return program
        install(program, seen.places)
        program.call = rerouted(program.call, using(unmasked(longest)), seen.patterns)
        left = [c for tracing in (False, True) for c in observe(program, tracing=tracing).masked]
        if left:
            raise CandidateError(f"{len(left)} attention calls keep their mask although it is causal")
        program.notes += fused_path_note(program)
        if any(call.checkpointed for call in seen.masked):
            program.notes.append(
                "checkpointed layers keep their causal mask when eager code runs them again in backward"
            )
        return program

    def source(self, step: Step) -> str:
        """The registry for Hugging Face models, the detour for others; arguments that may change the mask by name."""
        del step
        functions = (
            with_globals,
            routes_by_thread,
            detour,
            Using,
            unmasked,
            register_maskless,
            Skipping,
            configs_of,
            switch,
            by_name,
        )
        return plain_source(*functions, then=_THEN.format(name=f"{_NAME}_ejected", plain=_PLAIN))


_THEN = """
import inspect
_parameters = list(inspect.signature(model.forward).parameters)
_configs = configs_of(model)
if any(had == "sdpa" for _, had in _configs):
    call = by_name(call, Skipping(register_maskless({name!r}), None), _parameters, {plain!r})
    switch(_configs, {name!r})
else:
    # Its masks were seen to be causal at the lengths of its example inputs: instead of None, give the longest.
    _routes = routes_by_thread()
    _functions = torch.nn.functional
    _functions.scaled_dot_product_attention = detour(_routes)
    _functions.multi_head_attention_forward = with_globals(
        _functions.multi_head_attention_forward,
        scaled_dot_product_attention=_functions.scaled_dot_product_attention,
    )
    call = by_name(call, Using(_routes, unmasked(None)), _parameters, [n for n in _parameters if "mask" not in n])
"""

_registered = functools.cache(register_maskless)


def _removable(program: Program) -> Observation:
    """Return what was observed where every mask can go.

    Raises:
        CandidateError: There is no mask, or one that must stay, with the reason.
    """
    seen = Observation()
    for tracing in (False, True):
        seen.add(observe(program, tracing=tracing))
    if not seen.calls:
        raise CandidateError("the model does not call scaled_dot_product_attention")
    if not seen.masked:
        raise CandidateError("no attention call has a mask, neither in eager code nor while it is traced")
    kept = [call.kept for call in seen.masked if call.kept]
    if kept:
        raise CandidateError(f"{len(kept)} of {len(seen.masked)} masked attention calls keep their mask: it {kept[0]}")
    return seen


def _install(program: Program, configs: list[Any], *, longest: int | None, seen: Observation | None) -> None:
    mode = Skipping(_registered(_NAME), longest)
    if seen is None:
        parameters = list(inspect.signature(program.model.forward).parameters)
        program.call = by_name(program.call, mode, parameters, _PLAIN)
    else:
        program.call = rerouted(program.call, mode, seen.patterns)
    switch(configs, _NAME)
    program.undo.append(lambda: switch(configs, ""))


def _try_registry(program: Program, configs: list[Any], seen: Observation, longest: int) -> bool:
    """Switch the model to the registered attention; take it back where a mask or another attention shows up."""
    before = program.call
    _install(program, configs, longest=longest, seen=seen)
    try:
        now = [observe(program, tracing=tracing) for tracing in (False, True)]
    except CandidateError:
        now = []
    calls = [call for one in now for call in one.calls]
    if len(calls) == len(seen.calls) and not any(call.masked for call in calls):
        return True
    program.call = before
    program.undo.pop()()
    return False
