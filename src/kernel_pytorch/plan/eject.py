"""A plan as plain PyTorch source, for those who want to own it: the file runs without this package."""

from __future__ import annotations

import textwrap

from kernel_pytorch.catalog import TRANSFORMS, find
from kernel_pytorch.core.types import Mode, Plan

__all__ = ["eject"]


def eject(plan: Plan, target: str = "") -> str:
    """Return Python source that defines `optimize(model, optimizer=None)`, which does what the plan does.

    In inference it returns an optimised copy; in training it changes the model and optimizer in place. Calls that the
    plan does not cover run the unmodified model, as with `apply`.

    Args:
        plan: The plan.
        target: What the plan was made for; a `file.py:factory` or `module:factory` gives the source a `main` that
            loads it, compares the outputs and prints both times.

    Raises:
        CandidateError: A step of the plan is not in the catalog.
    """
    order = [t.name for t in TRANSFORMS]
    steps = sorted(plan.candidate.steps, key=lambda s: order.index(find(s.transform).name))
    body = "\n".join(f"# {step}\n{find(step.transform).source(step).rstrip()}\n" for step in steps)
    training = plan.workload.mode is Mode.TRAINING
    fixed = not training and any(find(s.transform).compiles and not s.params.get("dynamic", False) for s in steps)
    shapes = sorted({tuple((s.shape, s.dtype) for s in case) for case in plan.workload.signatures.values()})
    parts = [
        _HEAD.format(
            version=plan.package_version,
            label=plan.candidate.label,
            device=_plain(f"{plan.device.name} ({plan.device.arch})"),
            torch=plan.device.software.get("torch", "unknown"),
            created=plan.created,
        ),
        _SHAPES.format(shapes="".join(f"    {shape!r},\n" for shape in shapes)) if fixed else "",
        (_TRAINING if training else _INFERENCE).format(
            body=textwrap.indent(body, "    ") or "    # the unmodified model was the fastest\n",
            outside=" or shapes_of((args, kwargs)) not in SHAPES" if fixed else "",
        ),
    ]
    source, colon, factory = target.rpartition(":")
    if colon and source not in ("hf", "timm", "torchvision") and not training:
        parts.append(_MAIN.format(source=source, factory=factory))
    return "".join(parts)


def _plain(text: str) -> str:
    return text.replace("\\", "/").replace('"', "'")


_HEAD = '''"""{label}

Made by kernel_pytorch {version} on {device} with torch {torch}, {created}.
Plain PyTorch: nothing here needs kernel_pytorch. What it gained and what it cost in accuracy was measured there.
"""

import copy
import functools

import torch
'''

_SHAPES = '''from torch.utils import _pytree as pytree

# Shapes and dtypes of the tensors of a call that the steps below are specialised on.
SHAPES = {{
{shapes}}}


def shapes_of(tree):
    """Return shape and dtype of every tensor of a call."""
    tensors = [x for x in pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]
    return tuple((tuple(x.shape), str(x.dtype).removeprefix("torch.")) for x in tensors)
'''

_INFERENCE = '''

def optimize(model, optimizer=None):
    """Return an optimised copy of a model for inference; other calls run the model itself."""
    plain = model._call_impl
    model = copy.deepcopy(model).eval()
    call = model._call_impl

{body}
    @functools.wraps(model.forward)
    def guarded(*args, **kwargs):
        if model.training or torch.is_grad_enabled(){outside}:
            return plain(*args, **kwargs)
        return call(*args, **kwargs)

    model._compiled_call_impl = guarded  # the slot that nn.Module.compile uses: state_dict keys stay as they are
    return model
'''

_TRAINING = '''

def optimize(model, optimizer=None):
    """Change a model and its optimizer in place, for training; in eval mode the model runs as it was."""
    plain = call = model._call_impl

{body}
    @functools.wraps(model.forward)
    def guarded(*args, **kwargs):
        if not model.training or not torch.is_grad_enabled(){outside}:
            return plain(*args, **kwargs)
        return call(*args, **kwargs)

    model._compiled_call_impl = guarded  # the slot that nn.Module.compile uses: state_dict keys stay as they are
    return model
'''

_MAIN = '''

def load():
    """Return the model and example inputs that the plan was made for, as (model, args, kwargs)."""
    import importlib
    import importlib.util
    import sys
    from pathlib import Path

    source, factory = {source!r}, {factory!r}
    if source.endswith(".py"):
        sys.path.insert(0, str(Path(source).resolve().parent))
        spec = importlib.util.spec_from_file_location("target", source)
        module = importlib.util.module_from_spec(spec)
        sys.modules["target"] = module
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(source)
    value = getattr(module, factory)
    value = value() if callable(value) else value
    if isinstance(value, tuple):
        model, inputs = value
    else:
        model, inputs = value.model(), value.inputs
        if isinstance(inputs, dict):
            inputs = next(iter(inputs.values())).inputs
        try:
            inputs = inputs(0)
        except TypeError:
            inputs = inputs()
    if isinstance(inputs, torch.Tensor):
        return model, (inputs,), {{}}
    if isinstance(inputs, (tuple, list)):
        if len(inputs) == 2 and isinstance(inputs[0], tuple) and isinstance(inputs[1], dict):
            return model, *inputs
        return model, tuple(inputs), {{}}
    return model, (), {{k: inputs[k] for k in inputs.keys()}}


def main():
    """Time the model before and after."""
    import time

    model, args, kwargs = load()
    model.eval()
    fast = optimize(model)
    for name, module in (("before", model), ("after", fast)):
        with torch.no_grad():
            for _ in range(3):
                module(*args, **kwargs)
            start = time.perf_counter()
            for _ in range(10):
                module(*args, **kwargs)
        print(f"{{name}}: {{(time.perf_counter() - start) * 100:.3f}} ms")


if __name__ == "__main__":
    main()
'''
