"""What the user wants to be fast: factories for a model and its inputs, and for training a loss and an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kernel_pytorch.errors import InputsError

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Call", "Case", "Workload", "as_call", "as_tree", "as_workload"]


@dataclass(frozen=True, slots=True)
class Call:
    """Arguments of one call of the model."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Case:
    """One input shape of a workload.

    Attributes:
        inputs: `inputs(seed: int)`, or `inputs()`, returns example inputs: a tensor (one argument), a tuple (several),
            a mapping with string keys (keyword arguments), or a `Call`. In training, the batch that `loss` takes.
        weight: Share of the work that this shape stands for, relative to the other cases.
    """

    inputs: Callable[..., Any]
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Workload:
    """A model, what it is called with, and how it is trained.

    Attributes:
        model: Returns a fresh model; called once per trial.
        inputs: An input factory (see `Case.inputs`), or cases by name for a weighted mix of shapes.
        loss: `loss(model, batch) -> scalar tensor`; runs the model's forward. Where absent in training, the
            model is called with the batch and its `.loss` (or `["loss"]`, or scalar output) is taken.
        optimizer: `optimizer(parameters)`; where absent in training, AdamW with a learning rate of 1e-3.
        evaluate: `evaluate(model) -> float`, higher is better: the user's own accuracy, used beside the error budget.
        evaluate_tolerance: How much of `evaluate` may be lost, absolute.
        name: For people.
        target: The `TARGET` string this came from, so that a worker can load it itself; empty for one in memory.
    """

    model: Callable[[], nn.Module]
    inputs: Callable[..., Any] | Mapping[str, Case]
    loss: Callable[[Any, Any], torch.Tensor] | None = None
    optimizer: Callable[[Any], torch.optim.Optimizer] | None = None
    evaluate: Callable[[Any], float] | None = None
    evaluate_tolerance: float = 0.0
    name: str = ""
    target: str = ""

    @property
    def cases(self) -> Mapping[str, Case]:
        """Cases by name; a single input factory is the case `main`."""
        if isinstance(self.inputs, Mapping):
            return self.inputs
        return {"main": Case(self.inputs)}

    @property
    def weights(self) -> Mapping[str, float]:
        """Share of each case; sums to one."""
        total = sum(c.weight for c in self.cases.values())
        return {name: c.weight / total for name, c in self.cases.items()}

    @property
    def shares_model(self) -> bool:
        """Whether `model()` returns one object each time, the user's own, which must not be run as it is."""
        return isinstance(self.model, _Constant)

    def call(self, case: str, seed: int) -> Call:
        """Return fresh inputs of a case; torch's global generator is seeded for factories that take no seed.

        Raises:
            InputsError: The factory returned something that is not inputs.
        """
        return as_call(self.batch(case, seed))

    def batch(self, case: str, seed: int) -> Any:
        """Return what the input factory returns, as `loss` takes it, drawn with a seed."""
        import inspect

        import torch

        factory = self.cases[case].inputs
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            parameters = inspect.signature(factory).parameters
            if "seed" in parameters and parameters["seed"].kind is inspect.Parameter.KEYWORD_ONLY:
                return factory(seed=seed)
            takes_seed = any(
                p.default is p.empty or p.name == "seed"
                for p in parameters.values()
                if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
            )
            return factory(seed) if takes_seed else factory()


def as_call(value: Any) -> Call:
    """Return example inputs as arguments of one call.

    A tensor is one argument, a tuple or list several, a mapping with string keys keyword arguments (a Hugging Face
    `BatchEncoding` is one), and `(args, kwargs)` with a tuple and a dict both.

    Raises:
        InputsError: None of these.
    """
    import torch

    if isinstance(value, Call):
        return value
    if isinstance(value, torch.Tensor):
        return Call((value,))
    if isinstance(value, (tuple, list)):  # the Dynamo of torch 2.9 does not trace `tuple | list`
        if len(value) == 2 and isinstance(value[0], tuple) and isinstance(value[1], dict):
            return Call(value[0], dict(value[1]))
        return Call(tuple(value))
    if hasattr(value, "keys") and all(isinstance(k, str) for k in value.keys()):  # noqa: SIM118
        return Call((), {k: value[k] for k in value.keys()})  # noqa: SIM118
    raise InputsError(
        f"example inputs are a {type(value).__name__}; expected a tensor, a tuple of arguments, "
        "a dict of keyword arguments, or (args, kwargs)"
    )


def as_tree(batch: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Return example inputs as a tree whose tensors pytree finds, and how such a tree becomes what it was.

    To pytree a `Call`, or a mapping that is no dict (a Hugging Face `BatchEncoding`), is one leaf.
    """
    if isinstance(batch, Call):
        return (batch.args, dict(batch.kwargs)), lambda pair: Call(*pair)
    if isinstance(batch, Mapping) and not isinstance(batch, dict):
        return dict(batch), type(batch)
    return batch, lambda tree: tree


def as_workload(value: Any, *, name: str = "", target: str = "") -> Workload:
    """Return a `Workload` from what a factory or a caller gave: a `Workload`, or `(model, example_inputs)`.

    Raises:
        InputsError: Neither of these.
    """
    from dataclasses import replace

    from torch import nn

    if isinstance(value, Workload):
        return replace(value, name=value.name or name, target=target or value.target)
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], nn.Module):
        model, inputs = value
        return Workload(model=_Constant(model), inputs=_Constant(inputs), name=name, target=target)
    raise InputsError(
        f"got a {type(value).__name__}; expected a Workload or (model, example_inputs)",
        fix="return kernel_pytorch.Workload(model=..., inputs=...) or (model, example_inputs)",
    )


@dataclass(frozen=True, slots=True)
class _Constant:
    """A factory of one object that already exists; a class, so that it pickles."""

    value: Any

    def __call__(self) -> Any:
        return self.value
