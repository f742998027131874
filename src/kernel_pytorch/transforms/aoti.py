"""Compile ahead of time into a package (`.pt2`) by AOTInductor: no Python in the call, and a file to deploy.

A package computes for the shapes it was traced at and checks nothing: one traced at batch 16 returns 16 rows for 3
or for 32 (measured on torch 2.13). So each call is matched against the traced signature first.
"""
# ruff: noqa: SLF001 - AOTInductor is documented under torch._inductor and has no other name

from __future__ import annotations

import functools
import hashlib
import json
import logging
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from kernel_pytorch.core.protocols import Program
from kernel_pytorch.core.types import DeviceSpec, Mode, Numerics, Prediction, Skip, Step, WorkloadSpec
from kernel_pytorch.errors import CandidateError, InputsError
from kernel_pytorch.transforms.compile import Compile, needs_compiler
from kernel_pytorch.transforms.cuda_graph import Unrecordable
from kernel_pytorch.transforms.plain_source import plain_source
from kernel_pytorch.transforms.scoped import inside_settings, settings_of
from kernel_pytorch.transforms.traceable import refuse_untraceable
from kernel_pytorch.transforms.weights_watch import WeightsWatch
from kernel_pytorch.transforms.xla_compile import backend_of

__all__ = ["Aoti", "guarded", "package", "packaged_when_called", "signature"]

log = logging.getLogger(__name__)


def signature(args: Any, kwargs: Any) -> Any:
    """Return what a package is specialised on: structure, plain values, and shape, dtype and device of tensors."""
    leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
    described = [(tuple(x.shape), x.dtype, x.device) if isinstance(x, torch.Tensor) else repr(x) for x in leaves]
    return (spec, *described)


def package(model: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any, path: str) -> str:
    """Export `call` of `model` at these inputs, compile it with constant weights, write it to `path`, return that."""

    class Exported(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.training = model.training

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return call(*args, **kwargs)

    args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: t.contiguous(), (tuple(args), dict(kwargs)))
    with torch.no_grad():
        program = torch.export.export(Exported(), args, kwargs, strict=False)
        return torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs={"freezing": True})


def guarded(packages: Mapping[Any, Callable[..., Any]]) -> Callable[..., Any]:
    """Return a call that runs the package traced at the inputs' signature, with tensors laid out as it expects."""

    def run(*args: Any, **kwargs: Any) -> Any:
        loaded = packages.get(signature(args, kwargs))
        if loaded is None:
            shapes = [tuple(x.shape) for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            raise ValueError(f"no package was traced at inputs of shape {shapes}")
        args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: t.contiguous(), (args, kwargs))
        return loaded(*args, **kwargs)

    return run


def packaged_when_called(model: nn.Module, call: Callable[..., Any], directory: str) -> Callable[..., Any]:
    """Return `call`, packaged at the first inputs of each signature, into `directory`."""
    packages: dict[Any, Callable[..., Any]] = {}
    run_package = guarded(packages)

    def run(*args: Any, **kwargs: Any) -> Any:
        key = signature(args, kwargs)
        if key not in packages:
            path = package(model, call, args, kwargs, f"{directory}/model-{len(packages)}.pt2")
            packages[key] = torch._inductor.aoti_load_package(path)
        return run_package(*args, **kwargs)

    return run


class _Packaged:
    """A guarded call of packages that steps aside when the weights it holds as constants have changed."""

    def __init__(self, run: Callable[..., Any], inner: Callable[..., Any], program: Program) -> None:
        self._run = run
        self._inner = inner
        self._notes = program.notes
        self._watch = WeightsWatch(program.model)
        self._stale = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the package of these inputs.

        Raises:
            InputsError: No package was traced at such inputs.
        """
        if not self._stale and self._watch.changed():
            self._stale = True
            note = "weights changed after packaging: the model runs without the package"
            log.warning(note)
            self._notes.append(note)
        if self._stale:
            return self._inner(*args, **kwargs)
        try:
            return self._run(*args, **kwargs)
        except ValueError as error:
            raise InputsError(str(error), fix="optimise with this case in the workload") from error


class Aoti:
    """AOTInductor packages, one for each case of the workload, with the weights inside."""

    name = "aoti"
    summary = "compile ahead of time into a .pt2 package"
    group = "compile"
    numerics = Numerics.REORDERED
    modes = frozenset({Mode.INFERENCE})
    compiles = True

    def probe(self, device: DeviceSpec) -> Skip | None:
        """A C++ compiler is needed, and a device that Inductor compiles for."""
        if backend_of(device):
            return Skip("AOTInductor packages are for CPUs and GPUs")
        return needs_compiler(device)

    def propose(self, workload: WorkloadSpec, device: DeviceSpec) -> Sequence[Step] | Skip:
        """For inference."""
        if workload.mode is Mode.TRAINING:
            return Skip("a package has no backward pass")
        return self.probe(device) or [Step(self.name)]

    def ceiling(self, step: Step, prediction: Prediction, device: DeviceSpec) -> float:
        """As for `compile`."""
        return Compile().ceiling(step, prediction, device)

    def apply(self, program: Program, step: Step) -> Program:
        """Package each case, or load packages of these very weights where that is trusted."""
        if not program.calls:
            raise CandidateError("a package is made for example inputs", fix="pass them: inputs=(x,)")
        refuse_untraceable(program, step)
        directory = program.artifact_dir
        if directory is None:
            directory = Path(tempfile.mkdtemp(prefix="kernel-pytorch-"))
            weakref.finalize(program.model, shutil.rmtree, directory, ignore_errors=True)
        directory.mkdir(parents=True, exist_ok=True)
        identity = _identity(program)

        def wrap(inner: Callable[..., Any]) -> Callable[..., Any]:
            packages = {}
            for case, call in program.calls.items():
                key = signature(call.args, call.kwargs)
                make = functools.partial(package, program.model, inner, call.args, call.kwargs)
                facts = {"identity": identity, "inputs": _hash(key)}
                packages[key] = _load_or_make(program, directory / _file_name(case), make, facts)
            return _Packaged(guarded(packages), inner, program)

        with settings_of(program.call):
            program.call = inside_settings(program.call, wrap)
        program.dynamic = False
        program.holds.append(Unrecordable(step, "it looks at its weights at each call, which a replay skips"))
        program.notes.append("the package holds the weights as constants; the module keeps its own for state_dict")
        return program

    def source(self, step: Step) -> str:
        """The same functions; a package is made at the first call of each shape."""
        del step
        then = "import tempfile\n\n_packages = tempfile.mkdtemp()\ncall = packaged_when_called(model, call, _packages)"
        return plain_source(signature, package, guarded, packaged_when_called, then=then)


def _identity(program: Program) -> str:
    """Return a hash of what a package is made from: weights, code and machine."""
    sha = hashlib.sha256(f"{torch.__version__} {torch.backends.cpu.get_cpu_capability()}".encode())
    for name, tensor in (*program.model.named_parameters(), *program.model.named_buffers()):
        sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {tensor.device.type}".encode())
        if type(tensor) in (torch.Tensor, nn.Parameter) and tensor.numel():
            plain = tensor.detach().cpu().contiguous().flatten()
            sha.update(plain.view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def _load_or_make(
    program: Program, path: Path, make: Callable[[str], str], facts: dict[str, str]
) -> Callable[..., Any]:
    """Return the package at `path`, or one that `make` writes; what it is made from lies beside it as JSON."""
    beside = path.with_suffix(".json")
    if path.exists() and program.trust_artifacts:
        if beside.exists() and json.loads(beside.read_text()) == facts | {"package": _hash(path.read_bytes())}:
            return torch._inductor.aoti_load_package(str(path))
        program.notes.append(f"{path.name} is of other weights, inputs or software: packaged again")
    elif path.exists():
        program.notes.append(f"{path.name} is code and not trusted: packaged again")
    with tempfile.TemporaryDirectory(prefix="kernel-pytorch-") as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # export and Inductor deprecations, none of them the user's
        made = Path(make(str(Path(scratch) / "model.pt2"))).read_bytes()
    path.write_bytes(made)
    beside.write_text(json.dumps(facts | {"package": _hash(made)}, indent=1))
    return torch._inductor.aoti_load_package(str(path))


def _hash(value: Any) -> str:
    return hashlib.sha256(value if isinstance(value, bytes) else repr(value).encode()).hexdigest()


def _file_name(case: str) -> str:
    plain = "".join(c if c.isalnum() or c in "-_" else "_" for c in case)
    return f"model-{plain}.pt2" if plain == case else f"model-{plain}-{_hash(case)[:8]}.pt2"
