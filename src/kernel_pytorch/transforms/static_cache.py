"""Generate with a key-value cache of fixed size, so that each decoding step has one shape and can be compiled.

Transformers does the work: `generation_config.cache_implementation = "static"` allocates the cache once, and on an
accelerator `generate` then runs its decoding steps through `torch.compile` (its documentation, "Caching", "Static
cache"). Cached positions that are not written yet are masked, so attention sums the same terms among zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from kernel_pytorch.core.protocols import Program
from kernel_pytorch.core.types import DeviceSpec, Mode, Numerics, Prediction, Skip, Step, WorkloadSpec
from kernel_pytorch.core.workload import Workload
from kernel_pytorch.errors import CandidateError
from kernel_pytorch.transforms.ceilings import FUSIBLE, bounded
from kernel_pytorch.transforms.plain_source import plain_source

__all__ = ["GreedyDecode", "StaticCache", "decode_workload", "generators", "use_static_cache"]

_LEFT = ("_compiled_call", "_last_compile_config", "_cache", "_previous_max_cache_length")


class GreedyDecode(nn.Module):
    """A module whose forward decodes: `forward(input_ids, attention_mask)` returns prompt and new tokens, int64.

    Args:
        model: A Hugging Face model with `generate`.
        new_tokens: Tokens to generate; an end-of-sequence token does not end it early, so that every call is the
            same amount of work.
    """

    def __init__(self, model: nn.Module, new_tokens: int) -> None:
        super().__init__()
        if not generators(model):
            raise CandidateError(f"{type(model).__name__} has no generate() with a generation_config")
        self.model = model
        self.new_tokens = new_tokens

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Return (batch, length + new_tokens) tokens, the most likely one at each step."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        generate: Any = self.model.generate
        tokens: torch.Tensor = generate(
            input_ids,
            attention_mask=attention_mask,
            do_sample=False,
            num_beams=1,
            min_new_tokens=self.new_tokens,
            max_new_tokens=self.new_tokens,
            return_dict_in_generate=False,
        )
        return tokens


def decode_workload(
    model: Callable[[], nn.Module], prompt: Callable[..., Any], *, new_tokens: int, name: str = ""
) -> Workload:
    """Return a workload that times greedy decoding.

    Args:
        model: Returns a fresh Hugging Face model with `generate`.
        prompt: Returns `input_ids` (batch, length), or a dict of `input_ids` and `attention_mask`; may take a seed.
        new_tokens: Tokens to generate in each call.
        name: For people.
    """
    return Workload(model=_Decoder(model, new_tokens), inputs=prompt, name=name or f"decode {new_tokens} tokens")


class _Decoder:
    """A factory that pickles."""

    def __init__(self, model: Callable[[], nn.Module], new_tokens: int) -> None:
        self.model = model
        self.new_tokens = new_tokens

    def __call__(self) -> nn.Module:
        return GreedyDecode(self.model(), self.new_tokens)


def generators(model: nn.Module) -> list[Any]:
    """Return the modules that generate and can be told with which cache."""
    found: list[Any] = [m for m in model.modules() if callable(getattr(m, "generate", None))]
    return [m for m in found if hasattr(getattr(m, "generation_config", None), "cache_implementation")]


def use_static_cache(model: nn.Module) -> list[tuple[Any, Any]]:
    """Let every `generate` in a model use a static cache; return (generation config, what it had) of each."""
    changed = []
    for module in generators(model):
        config = module.generation_config
        changed.append((config, config.cache_implementation))
        config.cache_implementation = "static"
    return changed


class StaticCache:
    """A static key-value cache for `generate`, with the decoding step compiled by transformers."""

    name = "static_cache"
    summary = "decode with a static key-value cache and a compiled step"
    group = "cache"
    numerics = Numerics.REORDERED
    modes = frozenset({Mode.INFERENCE})
    compiles = True

    def probe(self, device: DeviceSpec) -> Skip | None:
        """Transformers compiles the decoding step on NVIDIA, AMD and Intel GPUs."""
        if device.vendor not in ("nvidia", "amd", "intel"):
            return Skip(f"transformers does not compile the decoding step on {device.vendor}")
        return None

    def propose(self, workload: WorkloadSpec, device: DeviceSpec) -> Sequence[Step] | Skip:
        """Where the workload decodes: a forward alone has no cache to keep."""
        if workload.mode is Mode.TRAINING:
            return Skip("training does not decode")
        if "GreedyDecode" not in workload.modules:
            fix = "give kernel_pytorch.transforms.static_cache.decode_workload(model, prompt, new_tokens=...)"
            return Skip("the workload runs a forward, not generate()", fix=fix)
        return self.probe(device) or [Step(self.name)]

    def ceiling(self, step: Step, prediction: Prediction, device: DeviceSpec) -> float:
        """Launching and what can be fused may vanish; products keep their time."""
        del step, device
        return bounded(prediction, dict.fromkeys(FUSIBLE, 0.0))

    def apply(self, program: Program, step: Step) -> Program:
        """Change the generation configs; `undo` puts them back."""
        modules = generators(program.model)
        if not modules:
            raise CandidateError(f"{step}: the model has no generate() with a generation_config")
        for module in modules:
            # What transformers itself asks; models without it ignore the setting with a warning.
            if not getattr(module, "_can_compile_fullgraph", getattr(module, "_supports_static_cache", False)):
                raise CandidateError(f"{step}: {type(module).__name__} does not take a static cache")
        changed = use_static_cache(program.model)

        def undo() -> None:
            for config, before in changed:
                config.cache_implementation = before
            for module in modules:
                # The cache, and the code compiled for it, that generate() leaves on the model.
                for name in _LEFT:
                    vars(module).pop(name, None)

        program.undo.append(undo)
        return program

    def source(self, step: Step) -> str:
        """The same functions, and a call of them."""
        del step
        return plain_source(generators, use_static_cache, then="use_static_cache(model)")
