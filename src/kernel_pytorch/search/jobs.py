"""Trials in workers of their own: how a workload gets there, and what comes back.

A workload that came from a target is loaded again by the worker. One in memory travels by cloudpickle with its
storages mapped from a private scratch directory. One that cannot travel is tried in this process, and the trial
says so.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from pydantic import TypeAdapter

from kernel_pytorch import errors
from kernel_pytorch.backends import manager_for, one_process
from kernel_pytorch.catalog import TRANSFORMS
from kernel_pytorch.core.config import KernelPyTorchConfig
from kernel_pytorch.core.protocols import Transform
from kernel_pytorch.core.targets import load_target
from kernel_pytorch.core.types import Status, Trial
from kernel_pytorch.core.workload import Workload
from kernel_pytorch.errors import KptError
from kernel_pytorch.measure.isolation import Workers, pack, unpack
from kernel_pytorch.plan.schema import plain, trial_dumps, trial_loads
from kernel_pytorch.search.bench import prepare_bench
from kernel_pytorch.search.survey import Survey, survey
from kernel_pytorch.search.trial import TrialRequest, run_trial

__all__ = ["Jobs", "run_job", "survey_job"]

_REQUEST = TypeAdapter(TrialRequest)
_CONFIG = TypeAdapter(KernelPyTorchConfig)
_SURVEY = TypeAdapter(Survey)
_PRELOADED = (
    "torch",
    "numpy",
    "transformers",
    "torchao",
    "timm",
    "torchvision",
    "safetensors",
    "scipy",
    "sympy",
)


class Jobs:
    """Runs trials of one workload, each in a process of its own where the workload can travel.

    Args:
        workload: The workload.
        config: What the user asks for.
        transforms: What candidates may name.
        device: Where the trials run, as `hardware.detect` takes it.

    Attributes:
        isolation: `process` or `none`.
        why_not_isolated: Why it is `none`; empty where it is a choice or not the case.
    """

    def __init__(
        self,
        workload: Workload,
        config: KernelPyTorchConfig,
        transforms: Sequence[Transform] = TRANSFORMS,
        device: str = "auto",
    ) -> None:
        self.workload = workload
        self.device = device
        self.config = config
        self.transforms = tuple(transforms)
        self.isolation = config.isolation
        self.why_not_isolated = ""
        self._workers: Workers | None = None
        self._scratch = Path(tempfile.mkdtemp(prefix="kpt-"))
        self._packed = ""

    def __enter__(self) -> Self:
        if self.isolation == "process":
            custom = self.transforms != TRANSFORMS
            if not self.workload.target or custom:
                carried = (
                    None if self.workload.target else self.workload,
                    self.transforms if custom else None,
                )
                try:
                    self._packed = str(pack(carried, self._scratch))
                except KptError as error:
                    self.isolation, self.why_not_isolated = "none", str(error)
        if self.isolation == "process":
            self._workers = Workers(preload=_preload())
            self._workers.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._workers is not None:
            self._workers.__exit__(kind, error, trace)
        shutil.rmtree(self._scratch, ignore_errors=True)

    @property
    def memo_dir(self) -> str:
        """Where the validators of this search share what is dear."""
        return str(self._scratch)

    def run(self, request: TrialRequest, *, timeout_s: float) -> Trial:
        """Run one trial. Whatever happens to the worker becomes the trial's status."""
        if self._workers is None:
            trial = _run(self.workload, self.config, request, self.transforms, self.device)
            return replace(trial, isolation="none")
        payload = {**self._payload(), "request": _REQUEST.dump_python(request, mode="json")}
        outcome = self._workers.run(
            "kernel_pytorch.search.jobs:run_job",
            json.dumps(payload).encode(),
            timeout_s=timeout_s,
            memory_limit_bytes=self.config.memory_limit_bytes,
        )
        if outcome.status is Status.OK:
            trial = trial_loads(outcome.value)
            spent = {"start": max(outcome.seconds - trial.seconds, 0.0), **trial.spent_s}
            return replace(trial, seconds=outcome.seconds, spent_s=spent)
        return Trial(
            request.candidate,
            outcome.status,
            reason=outcome.reason,
            phase=request.phase,
            seconds=outcome.seconds,
        )

    def survey(self) -> Survey:
        """Describe and predict the workload where its trials run.

        Raises:
            KptError: The workload cannot be used, or its worker came to grief.
        """
        if self._workers is None:
            return survey(self.workload, self.config, manager_for(self.device), self.transforms)
        payload = json.dumps(self._payload()).encode()
        outcome = self._workers.run(
            "kernel_pytorch.search.jobs:survey_job", payload, timeout_s=self.config.trial_timeout_s
        )
        if outcome.status is not Status.OK:
            raise KptError(
                f"the unmodified model cannot be run on {self.device}: {outcome.reason}",
                fix="--isolation none shows where it ends",
            )
        answer = json.loads(outcome.value)
        if "error" in answer:
            kind = getattr(errors, answer.pop("error"), KptError)
            raise kind(answer.pop("message"), **answer)
        found: Survey = _SURVEY.validate_python(answer)
        return found

    def _payload(self) -> dict[str, Any]:
        return {
            "target": self.workload.target,
            "packed": self._packed,
            "config": _CONFIG.dump_python(self.config, mode="json"),
            "device": self.device,
        }


def run_job(payload: bytes) -> str:
    """Run one trial in a worker and return it as JSON."""
    job: dict[str, Any] = json.loads(payload)
    request = _REQUEST.validate_python(job["request"])
    workload, config, transforms, device = _opened(job)
    return trial_dumps(_run(workload, config, request, transforms, device))


def survey_job(payload: bytes) -> str:
    """Survey a workload in a worker; return that as JSON, or what is wrong with the workload."""
    workload, config, transforms, device = _opened(json.loads(payload))
    try:
        return json.dumps(plain(survey(workload, config, manager_for(device), transforms)))
    except KptError as error:
        kind = type(error).__name__
        told = {"fix": error.fix, "user_traceback": error.user_traceback}
        return json.dumps({"error": kind, "message": str(error), **told})


def _opened(job: dict[str, Any]) -> tuple[Workload, KernelPyTorchConfig, Sequence[Transform], str]:
    """Return what travelled to a worker."""
    config = _CONFIG.validate_python(job["config"])
    manager = manager_for(job["device"])
    if one_process(manager):
        manager.synchronize()  # its runtime is loaded before the workload, whose target may name the device
    workload, transforms = unpack(Path(job["packed"])) if job["packed"] else (None, None)
    if workload is None:
        workload = load_target(job["target"], trust_remote_code=config.trust_remote_code)
    return workload, config, transforms or TRANSFORMS, job["device"]


def _run(
    workload: Workload,
    config: KernelPyTorchConfig,
    request: TrialRequest,
    transforms: Sequence[Transform],
    device: str,
) -> Trial:
    """Run one trial here, on the inputs of the request's seed."""
    config = config.but(seed=request.seed)
    bench = prepare_bench(workload, config, manager_for(device), seed=request.seed, transforms=transforms)
    return run_trial(bench, request)


def _preload() -> tuple[str, ...]:
    """Return what this process has imported and a worker will need, so that workers start warm.

    Where there is a GPU, no parts of torch that it does not import by itself: a process that used a GPU cannot fork.
    What else uses one on import, the fork server leaves out.
    """
    ours = "kernel_pytorch.search.jobs"
    gpu = torch.cuda.is_available()
    loaded = [
        name
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] in _PRELOADED
        and getattr(module, "__spec__", None) is not None
        and getattr(module.__spec__, "origin", None) not in (None, "built-in")
        and not (gpu and name.partition(".")[0] in ("torch", "torchao"))
    ]
    if gpu:
        loaded.insert(0, "torch")
    return (*loaded, ours)
