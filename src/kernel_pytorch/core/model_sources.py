"""Models that others publish, as workloads: Hugging Face, timm, torchvision, and exported programs."""

from __future__ import annotations

import importlib
import os
import socket
import types
import urllib.parse
import zipfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from kernel_pytorch.core.example_inputs import hugging_face_inputs, image_inputs
from kernel_pytorch.core.targets import near_names, one_line, user_code
from kernel_pytorch.core.workload import Workload
from kernel_pytorch.errors import TargetError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["exported", "hugging_face", "timm", "torchvision"]

_TRUST = "--trust-remote-code, if you trust where it came from"


def _library(name: str, fix: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise TargetError(f"this target needs {error.name}, which is not installed", fix=fix) from error
    except (ImportError, RuntimeError, OSError) as error:  # e.g. an extension built for another torch
        raise TargetError(f"{name} cannot be imported: {one_line(error)}", fix=fix) from error


def hugging_face(source: str, *, trust_remote_code: bool = False) -> Workload:
    """Return a workload of a Hugging Face model: a hub id, or a directory that `save_pretrained` wrote.

    The class is the one that the configuration names (`architectures`), else `AutoModel`'s; the inputs are made from
    the configuration. Weights load as tensors only, never as pickled objects.

    Raises:
        TargetError: Not found, offline, of an unknown kind, or its code is not trusted.
    """
    transformers = _library("transformers", "pip install 'kernel-pytorch[hf]'")
    path = Path(source).expanduser()
    if path.exists() or source.startswith((".", "/", "~")):
        if not (path / "config.json").is_file():
            raise TargetError(f"no Hugging Face model in {path}: it has no config.json")
        source = str(path.resolve())
    else:
        _check_hub(source)
    config = _config(transformers, source, trust_remote_code=trust_remote_code)
    kind = _model_class(transformers, source, config, trust_remote_code=trust_remote_code)
    return Workload(
        model=_Pretrained(kind, source, trust_remote_code), inputs=hugging_face_inputs(kind, config, source)
    )


def _check_hub(source: str) -> None:
    """Fail at once where the hub cannot be reached: its client retries a name that does not resolve for 23 s."""
    hub = _library("huggingface_hub", "pip install 'kernel-pytorch[hf]'")
    if isinstance(hub.try_to_load_from_cache(source, "config.json"), str):
        return
    host = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co").hostname or ""
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    try:
        if offline:
            raise TargetError(f"hf:{source} is not in the local cache and HF_HUB_OFFLINE is set")
        if not any(os.environ.get(k) for k in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
            socket.getaddrinfo(host, 443)
    except OSError as error:
        raise TargetError(
            f"hf:{source} is neither a directory nor in the local cache, and {host} cannot be reached ({error})",
            fix="check the path or the connection, or download it first and use hf:DIR",
        ) from error


def _config(transformers: ModuleType, source: str, *, trust_remote_code: bool) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        if "trust_remote_code" in str(error):
            raise TargetError(f"hf:{source} brings its own code", fix=_TRUST) from error
        raise TargetError(f"hf:{source} cannot be read: {one_line(error)}") from error


def _model_class(transformers: ModuleType, source: str, config: Any, *, trust_remote_code: bool) -> Any:
    remote = getattr(config, "auto_map", None) or {}
    if trust_remote_code and remote:
        auto = next((name for name in remote if name.startswith("AutoModel")), "AutoModel")
        loader = importlib.import_module("transformers.dynamic_module_utils")
        with user_code(f"the code of hf:{source}"):
            return loader.get_class_from_dynamic_module(remote[auto], source)
    for name in getattr(config, "architectures", None) or ():
        found = getattr(transformers, name, None)
        if found is not None:
            return found
    try:
        found = transformers.AutoModel._model_mapping[type(config)]  # noqa: SLF001  no public way to ask
    except KeyError as error:
        fix = _TRUST if remote else "write a factory: path/file.py:factory"
        raise TargetError(f"hf:{source}: no model class for {type(config).__name__}", fix=fix) from error
    return found[0] if isinstance(found, tuple) else found


@dataclass(frozen=True, slots=True)
class _Pretrained:
    """Loads a Hugging Face model in eval mode."""

    kind: Any
    source: str
    trust_remote_code: bool

    def __call__(self) -> nn.Module:
        options = {"trust_remote_code": True} if self.trust_remote_code else {}
        with user_code(f"loading hf:{self.source}"):
            model: nn.Module = self.kind.from_pretrained(self.source, **options)
            return model.eval()


def timm(name: str, *, trust_remote_code: bool = False) -> Workload:  # noqa: ARG001  one signature for all sources
    """Return a workload of a timm model at its own input size, batch 8; random weights unless `NAME@pretrained`.

    Raises:
        TargetError: timm is missing or does not import, or knows no such model.
    """
    library = _library("timm", "pip install timm torchvision (torchvision from where torch came from)")
    name, pretrained = _split_pretrained(name)
    if not library.is_model(name):
        near = near_names(name, library.list_models())
        raise TargetError(f"timm has no model {name!r}{near}")
    published = library.get_pretrained_cfg(name)
    size = tuple(getattr(published, "input_size", None) or (3, 224, 224))
    return Workload(model=_Named(library.create_model, name, {"pretrained": pretrained}), inputs=image_inputs(8, size))


def torchvision(name: str, *, trust_remote_code: bool = False) -> Workload:  # noqa: ARG001  as above
    """Return a workload of a torchvision model, batch 8; random weights unless `NAME@pretrained`.

    Raises:
        TargetError: torchvision is missing or does not load beside this torch, knows no such model, or the model
            takes something other than a batch of images.
    """
    fix = (
        "install the torchvision built for this torch, e.g. "
        "pip install torchvision --index-url https://download.pytorch.org/whl/cpu beside a CPU build"
    )
    models = _library("torchvision.models", fix)
    name, pretrained = _split_pretrained(name)
    if name not in models.list_models():
        raise TargetError(f"torchvision has no model {name!r}{near_names(name, models.list_models())}")
    package = models.get_model_builder(name).__module__
    if ".detection" in package or ".optical_flow" in package:
        raise TargetError(
            f"torchvision:{name} does not take one batch of images", fix="write a factory: path/file.py:factory"
        )
    side = 299 if name == "inception_v3" else 224
    shape = (3, 16, 112, 112) if ".video" in package else (3, side, side)
    weights = "DEFAULT" if pretrained else None
    return Workload(model=_Named(models.get_model, name, {"weights": weights}), inputs=image_inputs(8, shape))


def _split_pretrained(name: str) -> tuple[str, bool]:
    plain, at, tag = name.partition("@")
    if at and tag != "pretrained":
        raise TargetError(f"unknown suffix {'@' + tag!r}", fix=f"{plain}@pretrained, or {plain} for random weights")
    return plain, bool(at)


@dataclass(frozen=True, slots=True)
class _Named:
    """Builds a model of a library by name, in eval mode."""

    create: Any
    name: str
    options: dict[str, Any]

    def __call__(self) -> nn.Module:
        import torch

        with user_code(f"building {self.name}"), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # random weights are the same in every process
            model: nn.Module = self.create(self.name, **self.options)
            return model.eval()


def exported(path: Path, *, trust_remote_code: bool = False) -> Workload:
    """Return a workload of an exported program with its own example inputs.

    Loading one may run code: `torch.export.load` unpickles with `weights_only=False` where it meets objects, and
    evaluates the shape expressions in the file. So it needs trust.

    Raises:
        TargetError: Not found, not trusted, not an exported program, or saved without example inputs.
    """
    import torch

    if not path.is_file():
        near = near_names(path.name, [p.name for p in path.parent.glob("*.pt2")])
        raise TargetError(f"no file {path}{near}")
    if not zipfile.is_zipfile(path):
        raise TargetError(f"{path} is not an exported program", fix="write it with torch.export.save(program, path)")
    if not trust_remote_code:
        raise TargetError(f"{path}: loading an exported program may run code that is in the file", fix=_TRUST)
    with user_code(f"loading {path}"):
        program = torch.export.load(path)
    if program.example_inputs is None:
        raise TargetError(
            f"{path} was saved without example inputs",
            fix="return (torch.export.load(path).module(), inputs) from a factory",
        )
    args, kwargs = program.example_inputs
    return Workload(model=_Exported(path), inputs=_Same((args, kwargs)))


@dataclass(frozen=True, slots=True)
class _Same:
    value: Any

    def __call__(self) -> Any:
        return self.value


@dataclass(frozen=True, slots=True)
class _Exported:
    """Loads an exported program as a module whose mode is fixed: what it does was decided at export."""

    path: Path

    def __call__(self) -> nn.Module:
        import torch

        module: nn.Module = torch.export.load(self.path).module()
        for part in module.modules():
            part.training = False
        module.train = types.MethodType(_keep_mode, module)  # type: ignore[method-assign]  # as exported raises
        module.eval = types.MethodType(_keep_mode, module)  # type: ignore[method-assign]
        return module


def _keep_mode(module: nn.Module, mode: bool = False) -> nn.Module:  # noqa: ARG001, FBT001, FBT002  as nn.Module.train
    return module
