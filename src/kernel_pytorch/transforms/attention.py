"""Choose who computes attention: a backend of SDPA, this package's kernels, or SDPA instead of eager code."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kernel_pytorch.core.protocols import Program
from kernel_pytorch.core.types import DeviceSpec, Mode, Numerics, Prediction, Skip, Step, WorkloadSpec
from kernel_pytorch.errors import CandidateError
from kernel_pytorch.transforms.attention_calls import Route, always, install, using
from kernel_pytorch.transforms.attention_observe import SdpaCall, fused_path_note, observe
from kernel_pytorch.transforms.ceilings import COMPUTE, FUSIBLE, bounded
from kernel_pytorch.transforms.plain_source import plain_source
from kernel_pytorch.transforms.scoped import Scoped, scoped

__all__ = ["Attention", "Kernel", "flash_implementation", "sdpa_backend", "to_kernels", "use_sdpa"]

_BACKENDS = {
    "flash": "FLASH_ATTENTION",
    "math": "MATH",
    "efficient": "EFFICIENT_ATTENTION",
    "cudnn": "CUDNN_ATTENTION",
}
_KERNELS = ("fa3", "fa4", "fa3+fa4")
_MEASURED = "measured"
_HALF = (torch.float16, torch.bfloat16)


def sdpa_backend(name: str) -> Callable[[], AbstractContextManager[Any]]:
    """Return a setting under which SDPA prefers the backend `name`, and falls back to its reference where it must."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backends = [getattr(SDPBackend, name)]
    if name != "MATH":
        backends.append(SDPBackend.MATH)
    return lambda: sdpa_kernel(backends, set_priority=True)


def flash_implementation(name: str) -> None:
    """Let SDPA's flash backend call FlashAttention-3 or -4, in the whole process (torch 2.11 or newer)."""
    from torch.nn.attention import activate_flash_attention_impl

    activate_flash_attention_impl(name)


def use_sdpa(model: nn.Module) -> dict[nn.Module, str]:
    """Switch a Hugging Face model, and the models inside it, from eager attention to SDPA; return what each had."""
    had = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None) == "eager" and hasattr(module, "set_attn_implementation"):
            had[module] = "eager"
            module.set_attn_implementation("sdpa")  # type: ignore[operator]
    return had


class Attention:
    """`backend=measured|fa4|fa3+fa4|fa3|flash|math|efficient|cudnn`, or `implementation=sdpa`.

    The kernels of `kernel_pytorch.attention` compute in float16 and bfloat16. A call of SDPA goes to them where it has
    no mask, a head size and number of heads that were observed, and one of these dtypes (its own or autocast's); all
    others stay with SDPA, by this rule and not by chance. So validation in fp64 judges what surrounds the kernels, and
    the kernels themselves are judged by the error of what ships. `measured` takes for each kind of call what
    `kernel_pytorch.attention.choose` found fastest at the observed shape.

    `implementation=sdpa` is for Hugging Face models with eager attention.
    """

    name = "attention"
    summary = "choose the implementation of scaled dot-product attention"
    group = "attention"
    numerics = Numerics.REORDERED
    modes = frozenset({Mode.INFERENCE, Mode.TRAINING})
    compiles = False
    enabled_by = ("causal_mask",)
    """Calls with a mask stay with SDPA, and many models write their causal mask out."""

    def probe(self, device: DeviceSpec) -> Skip | None:
        """SDPA has more than one backend on CPUs and GPUs."""
        return Skip("on a TPU the runtime chooses the attention kernel") if device.vendor == "tpu" else None

    def propose(self, workload: WorkloadSpec, device: DeviceSpec) -> Sequence[Step] | Skip:
        """The kernels that run here, then the backends that the model does not use yet.

        `implementation=sdpa` is proposed only where a class of the model is one of Hugging Face's: they are known by
        the modules that loading the model has imported, for a `WorkloadSpec` holds but names, and a trial of another
        model with an attention of its own would only fail.
        """
        skip = self.probe(device)
        if skip is not None:
            return skip
        used = [op for op in workload.operators if "scaled_dot_product" in op]
        if used:
            present = next((name for name in _BACKENDS if any(name in op for op in used)), "math")
            names = ("flash", "math") if device.vendor == "cpu" else ("cudnn", "flash", "efficient", "math")
            backends = [name for name in names if name != present]
            if device.vendor == "nvidia":
                backends = [*_kernels_here(training=workload.mode is Mode.TRAINING), *backends]
            return [Step(self.name, {"backend": name}) for name in backends]
        softmax = any("softmax" in op for op in workload.operators)
        if softmax and any(_of_hugging_face(name) for name in workload.modules if "attention" in name.lower()):
            return [Step(self.name, {"implementation": "sdpa"})]
        return Skip("the model does not call scaled_dot_product_attention")

    def ceiling(self, step: Step, prediction: Prediction, device: DeviceSpec) -> float:
        """Attention may vanish; where it is written out, so may all but the projections."""
        del device
        if step.params.get("implementation"):
            return bounded(prediction, dict.fromkeys(FUSIBLE | (COMPUTE - {"matmul"}), 0.0) | {"matmul": 0.5})
        return bounded(prediction, dict.fromkeys(("attention", "copy"), 0.0))

    def apply(self, program: Program, step: Step) -> Program:
        """Set the backend around the call, route its attention, or set the implementation in the configuration."""
        backend, implementation = step.params.get("backend"), step.params.get("implementation")
        if implementation == "sdpa":
            had = use_sdpa(program.model)
            if not had:
                raise CandidateError("the model is not a Hugging Face model with eager attention that can be switched")

            def undo() -> None:
                for module, name in had.items():
                    module.set_attn_implementation(name)  # type: ignore[operator]

            program.undo.append(undo)
            return program
        if backend in (*_KERNELS, _MEASURED):
            return _route_kernels(program, str(backend))
        if backend not in _BACKENDS:
            names = "|".join((_MEASURED, *_KERNELS, *_BACKENDS))
            raise CandidateError(f"unknown step {step}; expected backend={names} or implementation=sdpa")
        program.call = Scoped(program.call, sdpa_backend(_BACKENDS[str(backend)]))
        return program

    def source(self, step: Step) -> str:
        """The setting around the call, or the switch; for this package's kernels, PyTorch's nearest to them."""
        if step.params.get("implementation"):
            return plain_source(use_sdpa, then="use_sdpa(model)")
        name = str(step.params["backend"])
        if name == _MEASURED:
            return "# PyTorch chooses; kernel_pytorch.attention measured for each shape which kernel is the fastest.\n"
        if name in _KERNELS:
            plain = "FA3" if name == "fa3" else "FA4"
            then = f"flash_implementation({plain!r})\ncall = scoped(call, sdpa_backend('FLASH_ATTENTION'))"
            return plain_source(flash_implementation, sdpa_backend, scoped, then=then)
        name = _BACKENDS[name]
        return plain_source(sdpa_backend, scoped, then=f"call = scoped(call, sdpa_backend({name!r}))")


def _kernels_here(*, training: bool) -> list[str]:
    """Return the kernels that run on the current GPU, most promising first."""
    from kernel_pytorch.attention import AttentionShape, unsupported

    if not torch.cuda.is_available():
        return []
    shape = AttentionShape(2, 8, 8, 1024, 1024, 128, is_causal=True)
    found = [name for name in ("fa4", "fa3+fa4", "fa3") if unsupported(name, shape, "cuda", backward=training) is None]
    return [_MEASURED, *found]


def _of_hugging_face(name: str) -> bool:
    homes = ("transformers.models.", "transformers_modules.")
    return any(hasattr(module, name) for path, module in list(sys.modules.items()) if path.startswith(homes))


@dataclass(frozen=True, slots=True)
class Kernel:
    """Which implementation computes calls of one kind.

    Attributes:
        device: Type of device.
        heads: Query heads.
        kv_heads: Key heads.
        head_dim: Size of a head of queries and keys.
        value_dim: Size of a head of values.
        is_causal: Whether they are causal.
        eager: Name of the implementation.
        compiled: Its name inside `torch.compile`.
    """

    device: str
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    is_causal: bool
    eager: str
    compiled: str


def to_kernels(kernels: Sequence[Kernel]) -> Route:
    """Return a route to the kernels for the kinds of calls they are named for; all others stay with SDPA."""
    from kernel_pytorch.attention import attention

    def computes(kernel: Kernel, query: Any, key: Any, value: Any, is_causal: bool) -> bool:  # noqa: FBT001
        return (
            query.device.type == kernel.device
            and is_causal == kernel.is_causal
            and query.shape[1] == kernel.heads
            and key.shape[1] == value.shape[1] == kernel.kv_heads
            and query.shape[3] == key.shape[3] == kernel.head_dim
            and value.shape[3] == kernel.value_dim
        )

    def route(query: Any, key: Any, value: Any, options: dict[str, Any], rest: Callable[..., Any]) -> Any:
        is_causal = options["is_causal"]
        dtype = query.dtype
        if dtype is torch.float32 and torch.is_autocast_enabled(query.device.type):
            dtype = torch.get_autocast_dtype(query.device.type)
        fits = dtype in _HALF and options["attn_mask"] is None and options["dropout_p"] == 0.0
        fits = fits and query.dim() == 4 and key.dim() == 4 and query.shape[0] == key.shape[0] == value.shape[0]
        if fits and (not is_causal or query.shape[2] == key.shape[2]):
            for kernel in kernels:
                if computes(kernel, query, key, value, is_causal):
                    impl = kernel.compiled if torch.compiler.is_compiling() else kernel.eager
                    if impl == "sdpa":
                        break
                    return attention(
                        query,
                        key,
                        value,
                        is_causal=is_causal,
                        scale=options["scale"],
                        enable_gqa=options["enable_gqa"],
                        impl=impl,
                    )
        return rest(query, key, value, options)

    return route


def _route_kernels(program: Program, name: str) -> Program:
    """Observe the calls of attention, ask whether the kernel computes them, and send it those it does.

    Raises:
        CandidateError: It computes none of them, with its reason.
    """
    seen = observe(program, tracing=False)
    eager = list(seen.calls)
    seen.add(observe(program, tracing=True))
    if not seen.calls:
        raise CandidateError("the model does not call scaled_dot_product_attention")
    if all(call.dtype is torch.float64 for call in seen.calls):
        program.notes.append(f"attention in float64 stays with SDPA; {name} computes in float16 and bfloat16")
        return program
    if name == _MEASURED and not program.calls:
        raise CandidateError(
            "which kernel is the fastest is measured at the shapes of example inputs, and there are none",
            fix="pass inputs=... when applying the plan",
        )
    reasons = [(call, _why_not(call)) for call in seen.calls]
    largest = _largest_of_each_kind([call for call, reason in reasons if not reason])
    found = [(call, _named(name, call, backward=program.mode is Mode.TRAINING)) for call in largest]
    kernels = [kernel for _, kernel in found if isinstance(kernel, Kernel)]
    refused = [f"{_words(call)}: {skip.reason}" for call, skip in found if isinstance(skip, Skip)]
    if not kernels:
        why = [*refused, *(reason for _, reason in reasons if reason)]
        raise CandidateError(f"no attention call goes to {name}: {why[0]}")
    install(program, seen.places)
    program.call = always(program.call, using(to_kernels(kernels)))
    program.notes += [f"attention {k.heads}x{k.head_dim} runs by {k.eager}, compiled by {k.compiled}" for k in kernels]
    program.notes += [*_left_to_sdpa(reasons, refused), *fused_path_note(program)]
    if not any(call.masked for call in eager) and seen.masked:
        program.notes.append(
            "while torch.compile traces it the model makes masks, which stay with SDPA: see causal_mask"
        )
    return program


def _largest_of_each_kind(calls: Sequence[SdpaCall]) -> list[SdpaCall]:
    largest: dict[tuple[Any, ...], SdpaCall] = {}
    for call in calls:
        kind = (call.device.type, call.query[1], call.key[1], call.query[3], call.value[3], call.is_causal)
        if kind not in largest or call.tokens >= largest[kind].tokens:
            largest[kind] = call
    return list(largest.values())


def _why_not(call: SdpaCall) -> str:
    """Return why a call stays with SDPA whatever the kernel; empty where it need not."""
    if call.masked:
        return "it has a mask"
    if call.dropout:
        return "it has dropout"
    if len(call.query) != 4 or len(call.key) != 4 or call.query[0] != call.key[0]:
        return "it is not [batch, heads, tokens, head_dim] with one batch"
    if call.is_causal and call.query[2] != call.key[2]:
        return "it is causal over more keys than queries"
    return ""


def _named(name: str, call: SdpaCall, *, backward: bool) -> Kernel | Skip:
    """Return the kernel for a call, or why there is none; one wider than 16 bits is asked for bfloat16."""
    from kernel_pytorch.attention import AttentionError, AttentionShape, choose, unsupported

    (batch, heads, q_len, head_dim), (_, kv_heads, kv_len, _), value_dim = call.query, call.key, call.value[-1]
    shape = AttentionShape(
        batch=batch * call.samples,
        heads=heads,
        kv_heads=kv_heads,
        q_len=q_len,
        kv_len=kv_len,
        head_dim=head_dim,
        dtype=call.dtype if call.dtype in _HALF else torch.bfloat16,
        is_causal=call.is_causal,
        value_dim=value_dim,
    )
    eager = compiled = name
    if name == _MEASURED:
        try:
            choice = choose(shape, call.device, backward=backward)
        except AttentionError as error:
            return Skip(str(error))
        eager, compiled = choice.impl, choice.compiled
    else:
        skip = unsupported(name, shape, call.device, backward=backward)
        if skip is not None:
            return skip
    return Kernel(call.device.type, heads, kv_heads, head_dim, value_dim, call.is_causal, eager, compiled)


def _words(call: SdpaCall) -> str:
    dtype = str(call.dtype).removeprefix("torch.")
    return f"queries {list(call.query)} {dtype}{', causal' if call.is_causal else ''}"


def _left_to_sdpa(reasons: Sequence[tuple[SdpaCall, str]], refused: Sequence[str]) -> list[str]:
    found = Counter(reason for _, reason in reasons if reason)
    notes = [
        f"{count} of {len(reasons)} observed attention calls stay with SDPA: {why}" for why, count in found.items()
    ]
    notes += [f"attention stays with SDPA for {why}" for why in refused]
    wide = sorted({str(call.dtype).removeprefix("torch.") for call, _ in reasons if call.dtype not in _HALF})
    if wide:
        notes.append(f"attention in {', '.join(wide)} stays with SDPA, unless another step casts it to 16 bits")
    if any(call.checkpointed for call, _ in reasons):
        notes.append("checkpointed layers call SDPA where eager code runs them again in backward")
    return notes
