"""Make any PyTorch model fast on the machine it stands on, prove that it computes the same, keep it fast.

    import kernel_pytorch as kp

    best = kp.optimize(model, example_inputs)
    best.model(*example_inputs)         # the same class, the same state_dict keys
    best.save("plan/")                  # plan.json: the choice and its evidence
    fast = kp.apply("plan/", model)     # later, in production

Names load on first use (PEP 562): importing the package costs nothing beside importing torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

    from kernel_pytorch import precision as precision
    from kernel_pytorch.core.config import KernelPyTorchConfig as KernelPyTorchConfig
    from kernel_pytorch.core.management.result import Result as Result
    from kernel_pytorch.core.management.unified_manager import UnifiedManager as UnifiedManager
    from kernel_pytorch.core.program import CallCounts as CallCounts
    from kernel_pytorch.core.program import call_counts as call_counts
    from kernel_pytorch.core.program import fused_loss as fused_loss
    from kernel_pytorch.core.program import restore as restore
    from kernel_pytorch.core.targets import load_target as load_target
    from kernel_pytorch.core.types import Candidate as Candidate
    from kernel_pytorch.core.types import DeviceSpec as DeviceSpec
    from kernel_pytorch.core.types import Mode as Mode
    from kernel_pytorch.core.types import Plan as Plan
    from kernel_pytorch.core.types import Step as Step
    from kernel_pytorch.core.workload import Call as Call
    from kernel_pytorch.core.workload import Case as Case
    from kernel_pytorch.core.workload import Workload as Workload
    from kernel_pytorch.errors import CandidateError as CandidateError
    from kernel_pytorch.errors import InputsError as InputsError
    from kernel_pytorch.errors import KptError as KptError
    from kernel_pytorch.errors import ModelError as ModelError
    from kernel_pytorch.errors import OutputDirectoryError as OutputDirectoryError
    from kernel_pytorch.errors import PlanError as PlanError
    from kernel_pytorch.errors import TargetError as TargetError
    from kernel_pytorch.hardware import detect as detect
    from kernel_pytorch.plan.apply import apply as apply
    from kernel_pytorch.plan.apply import prepare as prepare
    from kernel_pytorch.plan.eject import eject as eject
    from kernel_pytorch.plan.store import load_plan as load_plan
    from kernel_pytorch.train_step import TrainStep as TrainStep
    from kernel_pytorch.validation.unified_validator import UnifiedValidator as UnifiedValidator

__version__ = "0.1.0"

_HOME = {
    "Call": "core.workload",
    "CallCounts": "core.program",
    "Candidate": "core.types",
    "CandidateError": "errors",
    "Case": "core.workload",
    "DeviceSpec": "core.types",
    "InputsError": "errors",
    "KernelPyTorchConfig": "core.config",
    "KptError": "errors",
    "Mode": "core.types",
    "ModelError": "errors",
    "OutputDirectoryError": "errors",
    "Plan": "core.types",
    "PlanError": "errors",
    "Result": "core.management.result",
    "Step": "core.types",
    "TargetError": "errors",
    "TrainStep": "train_step",
    "UnifiedManager": "core.management.unified_manager",
    "UnifiedValidator": "validation.unified_validator",
    "Workload": "core.workload",
    "apply": "plan.apply",
    "call_counts": "core.program",
    "detect": "hardware",
    "eject": "plan.eject",
    "fused_loss": "core.program",
    "load_plan": "plan.store",
    "load_target": "core.targets",
    "precision": "precision",
    "prepare": "plan.apply",
    "restore": "core.program",
}

__all__ = sorted([*_HOME, "__version__", "optimize"])  # noqa: PLE0605


def optimize(
    model: nn.Module | Workload | str,
    example_inputs: Any = None,
    config: KernelPyTorchConfig | None = None,
    *,
    device: str | None = None,
    **changes: Any,
) -> Result:
    """Find the fastest faithful version of a model on this machine.

    The model given is not modified; the result keeps its class, `state_dict` keys, signature and output structure,
    and is the unmodified model where nothing wins.

    Args:
        model: A module, a `Workload`, or a target string as the command line takes it.
        example_inputs: With a module: a tensor, a tuple of arguments, a dict of keyword arguments, or `(args, kwargs)`.
        config: What to ask for; also accepted as the second argument after a `Workload` or a target.
        device: Where, as `kp.detect` takes it: `cpu`, `cuda:1`, `tpu`; `None` is the machine's best.
        **changes: Fields of the configuration to change, e.g. `budget_s=60`.

    Returns:
        `.model`, `.plan` with its evidence, `.save(directory)`.

    Raises:
        KptError: The model, its inputs, the target or the configuration cannot be used; the message says why.
    """
    from kernel_pytorch.core.config import KernelPyTorchConfig
    from kernel_pytorch.core.management.unified_manager import UnifiedManager
    from kernel_pytorch.core.targets import load_target
    from kernel_pytorch.core.workload import Workload, as_workload
    from kernel_pytorch.errors import InputsError

    if isinstance(example_inputs, KernelPyTorchConfig):
        if config is not None:
            raise InputsError("got two configurations")
        example_inputs, config = None, example_inputs
    chosen = (config or KernelPyTorchConfig()).but(**changes)
    if isinstance(model, str):
        model = load_target(model, trust_remote_code=chosen.trust_remote_code)
    if isinstance(model, Workload):
        if example_inputs is not None:
            raise InputsError("a Workload and a target bring their inputs; example_inputs is for a module")
        return UnifiedManager(chosen, device=device).optimize(model)
    if example_inputs is None:
        raise InputsError(f"no example inputs for the {type(model).__name__}", fix="kp.optimize(model, example_inputs)")
    workload = as_workload((model, example_inputs), name=type(model).__name__)
    return UnifiedManager(chosen, device=device).optimize(workload)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    home = import_module(f"{__name__}.{_HOME[name]}")
    value = home if _HOME[name] == name else getattr(home, name)
    globals()[name] = value
    return value


def __dir__() -> Iterable[str]:
    return __all__
