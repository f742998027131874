"""What the user names on a command line, as a workload: a factory, a model of a hub or a library, an export.

`path/file.py:factory`, `package.module:factory`, `hf:MODEL_ID_OR_DIR`, `timm:NAME`, `torchvision:NAME` or
`file.pt2`. Every failure is a `TargetError` of one line; where the user's own code raised, it carries their traceback.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import linecache
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from kernel_pytorch.core.workload import Case, Workload, _Constant, as_workload
from kernel_pytorch.errors import InputsError, KptError, TargetError

__all__ = ["load_target", "near_names", "one_line", "user_code"]

_FORMS = "expected path/file.py:factory, package.module:factory, hf:MODEL, timm:NAME, torchvision:NAME or file.pt2"


def load_target(text: str, *, trust_remote_code: bool = False) -> Workload:
    """Return the workload that a target names.

    Args:
        text: `path/file.py:factory` or `package.module:factory` (called without arguments; returns a
            `Workload` or `(model, example_inputs)`), `hf:MODEL_ID_OR_DIR`, `timm:NAME` or `torchvision:NAME`
            (random weights; `NAME@pretrained` downloads the published ones), or a `.pt2` exported program.
        trust_remote_code: Whether code that comes with a model (a hub repository's Python files, pickles in a
            `.pt2`) may run.

    Raises:
        TargetError: Not found, not importable, or the factory raised (see `user_traceback`).
    """
    text = text.strip()
    scheme, _, rest = text.partition(":")
    if scheme in ("hf", "timm", "torchvision"):
        from kernel_pytorch.core import model_sources

        if not rest:
            raise TargetError(f"target {text!r} names no model; {_FORMS}")
        load = {
            "hf": model_sources.hugging_face,
            "timm": model_sources.timm,
            "torchvision": model_sources.torchvision,
        }[scheme]
        workload = load(rest, trust_remote_code=trust_remote_code)
        return replace(workload, name=text, target=text)
    if text.endswith(".pt2"):
        from kernel_pytorch.core import model_sources

        path = Path(text).expanduser().resolve()
        workload = model_sources.exported(path, trust_remote_code=trust_remote_code)
        return replace(workload, name=path.stem, target=str(path))
    return _load_factory(text)


@contextmanager
def user_code(what: str, kind: type[KptError] = TargetError) -> Iterator[None]:
    """Turn what the user's own code raises into an error with their traceback, without our frames.

    Args:
        what: Subject of the message, e.g. `factory 'f'`.
        kind: The error's class.
    """
    try:
        yield
    except KptError:
        raise
    except (Exception, SystemExit) as error:
        raise kind(f"{what} raised {one_line(error)}", user_traceback=_user_traceback(error)) from error


def near_names(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the nearest known names, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def one_line(error: BaseException) -> str:
    """Return the class and the first line of what an error says."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _user_traceback(error: BaseException) -> str:
    own = str(Path(__file__).resolve().parents[1])
    kept = traceback.TracebackException.from_exception(error)
    frames = [f for f in kept.stack if not f.filename.startswith(own) and "importlib" not in f.filename]
    kept.stack = traceback.StackSummary.from_list(frames)
    return "".join(kept.format())


def _load_factory(text: str) -> Workload:
    where, colon, name = text.rpartition(":")
    if not colon or not where or not name:
        given = text if not colon else where or text
        if given.endswith(".py") and Path(given).is_file():
            names = ", ".join(_factories(_import_file(Path(given)))) or "none"
            raise TargetError(f"target {text!r} names no factory; it has: {names}", fix=f"{given}:FACTORY")
        raise TargetError(f"target {text!r} not understood; {_FORMS}")
    is_file = where.endswith(".py") or "/" in where
    module = _import_file(Path(where).expanduser()) if is_file else _import_module(where)
    factory = getattr(module, name, None)
    if factory is None:
        near = near_names(name, _factories(module))
        raise TargetError(f"{where} has no {name!r}{near or '; functions in it: ' + _listing(module)}")
    target = f"{Path(where).expanduser().resolve()}:{name}" if is_file else text
    label = f"{Path(where).stem}:{name}" if is_file else text
    if isinstance(factory, Workload):
        value: Any = factory
    else:
        _check_callable(factory, where, name)
        with user_code(f"factory {name!r} of {where}"):
            value = factory()
    try:
        workload = as_workload(value, name=label, target=target)
    except InputsError as error:
        raise TargetError(f"factory {name!r} of {where}: {error}", fix=error.fix) from error
    return _watched(workload, f"of {where}:{name}")


def _check_callable(factory: Any, where: str, name: str) -> None:
    if not callable(factory):
        kind = type(factory).__name__
        raise TargetError(f"{name!r} of {where} is a {kind}; expected a function or a Workload")
    try:
        needed = [
            p.name
            for p in inspect.signature(factory).parameters.values()
            if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
    except (TypeError, ValueError):  # a builtin without a signature
        return
    if needed:
        raise TargetError(
            f"factory {name!r} of {where} needs arguments ({', '.join(needed)}); it is called without any",
            fix="give them defaults, or wrap it in a function without arguments",
        )


def _factories(module: ModuleType) -> list[str]:
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (isinstance(value, Workload) or inspect.isfunction(value))
        and getattr(value, "__module__", module.__name__) in (module.__name__, Workload.__module__)
    ]


def _listing(module: ModuleType) -> str:
    return ", ".join(_factories(module)) or "none"


def _import_file(path: Path) -> ModuleType:
    full = path.resolve()
    if not full.is_file():
        siblings = [p.name for p in full.parent.glob("*.py")] if full.parent.is_dir() else []
        raise TargetError(f"no file {path}{near_names(full.name, siblings)}")
    stat = full.stat()
    identity = f"{full}:{stat.st_mtime_ns}:{stat.st_size}"
    digest = hashlib.sha256(identity.encode()).hexdigest()[:10]
    name = f"kpt_target_{full.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    if str(full.parent) not in sys.path:
        sys.path.insert(0, str(full.parent))
    linecache.checkcache(str(full))
    spec = importlib.util.spec_from_file_location(name, full)
    if spec is None or spec.loader is None:
        raise TargetError(f"{path} is not a Python file", fix="name it something.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with user_code(f"importing {path}"):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    _pickle_by_value(module)
    return module


def _pickle_by_value(module: ModuleType) -> None:
    """Let classes of a file travel to a worker, which cannot import a module of this made-up name."""
    import cloudpickle

    cloudpickle.register_pickle_by_value(module)


def _import_module(name: str) -> ModuleType:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        with user_code(f"importing {name}"):
            return importlib.import_module(name)
    except TargetError as error:
        cause = error.__cause__
        missing = cause.name if isinstance(cause, ModuleNotFoundError) else None
        if missing and f"{name}.".startswith(f"{missing}."):
            near = near_names(name, _importable_near(missing))
            raise TargetError(f"no module {missing!r}{near}", fix="check the name, or use a path") from None
        raise


def _importable_near(missing: str) -> list[str]:
    parent, _, _ = missing.rpartition(".")
    if parent:
        import pkgutil

        return [f"{parent}.{m.name}" for m in pkgutil.iter_modules(sys.modules[parent].__path__)]
    here = Path.cwd()
    return [p.stem for p in here.glob("*.py")] + [p.parent.name for p in here.glob("*/__init__.py")]


class _Watched:
    """A user's factory whose errors become a `TargetError` with their traceback; keeps the signature."""

    def __init__(self, function: Callable[..., Any], what: str) -> None:
        self.__wrapped__ = function
        self.what = what

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with user_code(self.what):
            return self.__wrapped__(*args, **kwargs)


def _watched(workload: Workload, where: str) -> Workload:
    if isinstance(workload.model, _Constant):
        return workload
    given: Any = workload.model
    from torch import nn

    if not callable(given) or isinstance(given, nn.Module):
        kind = type(given).__name__
        raise TargetError(f"Workload.model {where} is a {kind}; expected a function that returns a module")
    cases: Mapping[str, Case] = workload.cases
    for name, case in cases.items():
        if not isinstance(case, Case) or not callable(case.inputs):
            raise TargetError(f"case {name!r} {where} has no input factory", fix="Case(inputs=FUNCTION)")
    inputs: Callable[..., Any] | dict[str, Case]
    if isinstance(workload.inputs, Mapping):
        inputs = {
            name: replace(case, inputs=_Watched(case.inputs, f"the input factory {where}, case {name!r},"))
            for name, case in cases.items()
        }
    else:
        inputs = _Watched(workload.inputs, f"the input factory {where}")
    return replace(workload, model=_Watched(workload.model, f"the model factory {where}"), inputs=inputs)
