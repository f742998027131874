"""Choose the fastest implementation by measuring it, once for a class of shapes, a machine and its software.

What was measured is kept in a file named by the device's key and a digest of the versions that decide the code, so a
new version is measured anew.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.attention

from kernel_pytorch.attention import probe
from kernel_pytorch.attention.contest import decide
from kernel_pytorch.attention.probe import Case, indexed, make_case, unsupported
from kernel_pytorch.attention.registry import implementations
from kernel_pytorch.attention.timing import Stopwatch
from kernel_pytorch.attention.types import BROKEN, AttentionError, AttentionShape, Choice, Implementation
from kernel_pytorch.backends import manager_for
from kernel_pytorch.core.types import Skip
from kernel_pytorch.hardware import detect
from kernel_pytorch.measure.choices import choice_file, load_choices, store_choices

__all__ = ["choose", "forget", "known_choice", "software"]

_log = logging.getLogger(__name__)

_VERSION = 2
_SCORES = 1 << 26
"""Scores (256 MiB in float32) above which the definition, which stores them all, is not worth a try."""

_chosen: dict[tuple[str, str, bool], Choice] = {}


def software(device: torch.device) -> dict[str, str]:
    """Return the versions that decide which code runs: torch and its libraries, the driver, the kernels' packages."""
    spec = detect(str(device))
    names = ("torch", "triton", "cuda", "cudnn", "driver", "compiler")
    versions = {name: spec.software[name] for name in names if name in spec.software}
    for package in sorted({name for one in implementations().values() for name in one.packages}):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    active = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)()
    if active is not None:
        versions["flash"] = str(active)
    return {"device": spec.name, **versions}


def choose(shape: AttentionShape, device: torch.device | str, *, backward: bool) -> Choice:
    """Return the fastest implementation for a shape, measuring where no earlier measurement is known.

    Each implementation that applies (`unsupported`) is timed at this very shape (`contest.decide`); one of lower
    precision never takes part. FlexAttention, which compiles for each shape, takes part only where no other
    fused kernel applies.

    Args:
        shape: What to compute. Shapes of one `shape_class()` share the choice.
        device: Where; `cuda` means the current GPU.
        backward: Whether gradients are computed too; then both directions are timed together.

    Raises:
        AttentionError: Nothing computes it here.
    """
    shape, device = shape.canonical(), indexed(device)
    found = known_choice(shape, device, backward=backward)
    if found is None:
        found = _measure(shape, device, backward=backward)
        _chosen[_key(shape, device, backward=backward)] = replace(found, measured=False)
        if not any(BROKEN in skip.reason for skip in found.skipped.values()):  # who mends the package wants it tried
            _store(device, _entry(shape, backward=backward), found)
    return found


def known_choice(shape: AttentionShape, device: torch.device | str, *, backward: bool) -> Choice | None:
    """Return a choice made earlier, by this process or another; `None` where there is none."""
    device = indexed(device)
    key = _key(shape, device, backward=backward)
    if key not in _chosen:
        stored = _load(_path(device)).get(_entry(shape, backward=backward))
        if stored is None:
            return None
        _chosen[key] = stored
    return _chosen[key]


def forget() -> None:
    """Forget what this process probed and chose; the files stay."""
    probe.forget()
    _chosen.clear()
    _path.cache_clear()


def _key(shape: AttentionShape, device: torch.device, *, backward: bool) -> tuple[str, str, bool]:
    return shape.shape_class(), str(device), backward


def _entry(shape: AttentionShape, *, backward: bool) -> str:
    return f"{shape.shape_class()} {'forward+backward' if backward else 'forward'}"


def _measure(shape: AttentionShape, device: torch.device, *, backward: bool) -> Choice:
    candidates, skipped = _candidates(shape, device, backward=backward)
    if not candidates:
        reasons = "; ".join(f"{name}: {skip.reason}" for name, skip in skipped.items())
        raise AttentionError(f"nothing computes {shape} on {device}: {reasons}")
    name = shape.shape_class()
    if len(candidates) == 1:
        only = next(iter(candidates))
        return Choice(only, only, {}, {}, skipped, name, measured=True)
    with (
        manager_for(str(device)).exclusive(),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.set_grad_enabled(backward),
        torch.autocast(device.type, enabled=False),
    ):
        case = make_case(shape, device, backward=backward)
        jobs = {n: _job(case, one, backward=backward) for n, one in candidates.items()}
        found = decide(Stopwatch(jobs, device))
    times = (found.device_ms, found.host_ms, skipped, name)
    return Choice(found.eager, found.compiled, *times, measured=True, eager_ms=found.eager_ms)


def _candidates(
    shape: AttentionShape, device: torch.device, *, backward: bool
) -> tuple[dict[str, Implementation], dict[str, Skip]]:
    skipped: dict[str, Skip] = {}
    found: dict[str, Implementation] = {}
    scores = shape.batch * shape.heads * shape.q_len * shape.kv_len
    order = sorted(implementations().items(), key=lambda item: item[1].rank + (item[0] == "math"))
    for name, one in order:
        if one.rank < 0:
            skipped[name] = Skip(f"{name} is of lower precision, so never chosen", f"impl={name!r}")
        elif one.rank > 0 and found:
            skipped[name] = Skip(f"{name} compiles for each shape and others apply", f"impl={name!r}")
        elif name == "math" and found and scores > _SCORES:
            skipped[name] = Skip(f"the definition would store {scores * 4 >> 20} MiB of scores", "impl='math'")
        else:
            skip = unsupported(name, shape, device, backward=backward)
            if skip is None:
                found[name] = one
            else:
                skipped[name] = skip
    return found, skipped


def _job(case: Case, one: Implementation, *, backward: bool) -> Any:
    if not backward:
        return lambda: case.run(one)
    with torch.enable_grad():
        weight = torch.randn_like(case.run(one))
    return lambda: torch.autograd.grad(case.run(one), case.inputs(), weight)


@functools.cache
def _path(device: torch.device) -> Path:
    return choice_file("attention", detect(str(device)).key, software(device))


def _load(path: Path) -> dict[str, Choice]:
    found = {}
    for name, entry in load_choices(path, version=_VERSION).items():
        try:
            found[name] = _from_json(name, entry)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            _log.warning("%s is damaged in %r (%s), so that is measured again", path, name, error)
    return found


def _from_json(name: str, entry: Mapping[str, Any]) -> Choice:
    impl, compiled = entry["impl"], entry["compiled"]
    if impl not in implementations() or compiled not in implementations():
        raise ValueError(f"unknown implementation in {name!r}")
    return Choice(
        impl,
        compiled,
        {n: float(ms) for n, ms in entry["device_ms"].items()},
        {n: float(ms) for n, ms in entry["host_ms"].items()},
        {n: Skip(reason, fix) for n, (reason, fix) in entry["skipped"].items()},
        name.rpartition(" ")[0],
        eager_ms={n: float(ms) for n, ms in entry["eager_ms"].items()},
    )


def _store(device: torch.device, entry: str, choice: Choice) -> None:
    store_choices(_path(device), {entry: choice.as_json()}, software(device), version=_VERSION)
