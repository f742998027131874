"""Whether a plan was made for what is here now, and how it is stamped anew after it was validated."""

from __future__ import annotations

import datetime as dt
import sys
from collections.abc import Mapping
from dataclasses import fields, replace

from kernel_pytorch.core.config import KernelPyTorchConfig
from kernel_pytorch.core.types import DeviceSpec, Plan, Trial
from kernel_pytorch.errors import KptError, PlanError

__all__ = ["config_of", "differences", "same_code", "software_of", "stamp", "told_only"]

_TOLD_ONLY = ("os",)
"""What decides no generated code and no library: a difference is told, and the plan is judged all the same."""


def config_of(plan: Plan) -> KernelPyTorchConfig:
    """Return the configuration that a plan was searched with.

    Raises:
        PlanError: It is corrupted.
    """
    known = {f.name for f in fields(KernelPyTorchConfig)}
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in plan.config.items() if k in known}
    try:
        return KernelPyTorchConfig(**given)  # type: ignore[arg-type]  # its own checks follow
    except (KptError, TypeError, ValueError) as error:
        raise PlanError(f"the plan's configuration is corrupted: {error}", fix="run `kpt optimize` again") from error


def software_of(device: DeviceSpec, package_version: str = "") -> dict[str, str]:
    """Return versions by name, this package's among them."""
    return {**device.software, "kernel_pytorch": package_version or _own_version()}


def _own_version() -> str:
    # The root module offers the whole package lazily, so an import of it would point up.
    return str(sys.modules["kernel_pytorch"].__version__)


def differences(plan: Plan, here: DeviceSpec) -> tuple[str, ...]:
    """Return what a plan was made with that is something else here, one `name old -> new` each; empty if it is fresh.

    Compared are the device's key (vendor, architecture, number of devices or cores) and every version but the
    operating system's.
    """
    device = [f"device {plan.device.key} -> {here.key}"] if plan.device.key != here.key else []
    made, now = software_of(plan.device, plan.package_version), software_of(here)
    return (*device, *_changed(made, now, skip=_TOLD_ONLY))


def told_only(plan: Plan, here: DeviceSpec) -> tuple[str, ...]:
    """Return differences that do not make a plan stale."""
    every = _changed(plan.device.software, here.software, skip=())
    return tuple(line for line in every if line.partition(" ")[0] in _TOLD_ONLY)


def same_code(plan: Plan, here: DeviceSpec) -> bool:
    """Return whether a plan can be applied here at all: the same vendor and architecture."""
    return (plan.device.vendor, plan.device.arch) == (here.vendor, here.arch)


def _changed(made: Mapping[str, str], now: Mapping[str, str], *, skip: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(
        f"{name} {made.get(name, 'none')} -> {now.get(name, 'none')}"
        for name in sorted({*made, *now})
        if name not in skip and made.get(name) != now.get(name)
    )


def stamp(plan: Plan, fresh: Trial, here: DeviceSpec) -> Plan:
    """Return a plan that is of this device and software, with the trial that has validated it here as its evidence.

    The trials before stay in the evidence, and the notes of the new choice tell the stamps in order of time.

    Args:
        plan: The plan as it was.
        fresh: The plan's candidate, validated and measured here on a number of pairs that was fixed beforehand.
        here: This machine.
    """
    now = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
    changed = ", ".join((*differences(plan, here), *told_only(plan, here))) or "nothing had changed"
    line = f"validated again {now}: {changed}; {_speed(plan.chosen)} before, {_speed(fresh)} now"
    history = tuple(note for note in plan.chosen.notes if note.startswith("validated again "))
    notes = tuple(note for note in fresh.notes if note not in history)
    chosen = replace(fresh, notes=(*notes, *history, line), reason="")
    evidence = plan.evidence if plan.chosen in plan.evidence else (*plan.evidence, plan.chosen)
    return replace(
        plan,
        device=here,
        chosen=chosen,
        evidence=(*evidence, chosen),
        package_version=_own_version(),
    )


def _speed(trial: Trial) -> str:
    if trial.measurement is None:
        return "not measured"
    ratio = trial.measurement.ratio
    return f"{ratio.value:.2f}x ({ratio.low:.2f} to {ratio.high:.2f})"
