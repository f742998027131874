"""Choose who computes attention: a backend of SDPA, or SDPA instead of Hugging Face's eager code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from kernel_pytorch.core.protocols import Program
from kernel_pytorch.core.types import DeviceSpec, Mode, Numerics, Prediction, Skip, Step, WorkloadSpec
from kernel_pytorch.errors import CandidateError
from kernel_pytorch.transforms.ceilings import COMPUTE, FUSIBLE, bounded
from kernel_pytorch.transforms.plain_source import plain_source
from kernel_pytorch.transforms.scoped import Scoped, scoped

__all__ = ["Attention", "sdpa_backend", "use_sdpa"]

_BACKENDS = {
    "flash": "FLASH_ATTENTION",
    "math": "MATH",
    "efficient": "EFFICIENT_ATTENTION",
    "cudnn": "CUDNN_ATTENTION",
}


def sdpa_backend(name: str) -> Callable[[], AbstractContextManager[Any]]:
    """Return a setting under which SDPA prefers the backend `name`, and falls back to its reference where it must."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backends = [getattr(SDPBackend, name)]
    if name != "MATH":
        backends.append(SDPBackend.MATH)
    return lambda: sdpa_kernel(backends, set_priority=True)


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
    """`backend=flash|math|efficient|cudnn` during the call, or `implementation=sdpa` for eager Hugging Face models."""

    name = "attention"
    summary = "choose the implementation of scaled dot-product attention"
    group = "attention"
    numerics = Numerics.REORDERED
    modes = frozenset({Mode.INFERENCE, Mode.TRAINING})
    compiles = False

    def probe(self, device: DeviceSpec) -> Skip | None:
        """SDPA has more than one backend on CPUs and GPUs."""
        return Skip("PyTorch/XLA has no SDPA backends to choose from") if device.vendor == "tpu" else None

    def propose(self, workload: WorkloadSpec, device: DeviceSpec) -> Sequence[Step] | Skip:
        """The backends that the model does not use yet."""
        skip = self.probe(device)
        if skip is not None:
            return skip
        used = [op for op in workload.operators if "scaled_dot_product" in op]
        if used:
            present = next((name for name in _BACKENDS if any(name in op for op in used)), "math")
            names = ("flash", "math") if device.vendor == "cpu" else ("cudnn", "flash", "efficient", "math")
            return [Step(self.name, {"backend": name}) for name in names if name != present]
        softmax = any("softmax" in op for op in workload.operators)
        if softmax and any("attention" in name.lower() for name in workload.modules):
            return [Step(self.name, {"implementation": "sdpa"})]
        return Skip("the model does not call scaled_dot_product_attention")

    def ceiling(self, step: Step, prediction: Prediction, device: DeviceSpec) -> float:
        """Attention may vanish; where it is written out, so may all but the projections."""
        del device
        if step.params.get("implementation"):
            return bounded(prediction, dict.fromkeys(FUSIBLE | (COMPUTE - {"matmul"}), 0.0) | {"matmul": 0.5})
        return bounded(prediction, dict.fromkeys(("attention", "copy"), 0.0))

    def apply(self, program: Program, step: Step) -> Program:
        """Set the backend around the call, or the implementation in the model's configuration."""
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
        if backend not in _BACKENDS:
            raise CandidateError(f"unknown step {step}; expected backend={'|'.join(_BACKENDS)} or implementation=sdpa")
        program.call = Scoped(program.call, sdpa_backend(_BACKENDS[str(backend)]))
        return program

    def source(self, step: Step) -> str:
        """The setting around the call, or the switch."""
        if step.params.get("implementation"):
            return plain_source(use_sdpa, then="use_sdpa(model)")
        name = _BACKENDS[str(step.params["backend"])]
        return plain_source(sdpa_backend, scoped, then=f"call = scoped(call, sdpa_backend({name!r}))")
