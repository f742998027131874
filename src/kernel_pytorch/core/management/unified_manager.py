"""The order of the five steps: detect, predict, try, choose, plan."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import kernel_pytorch
from kernel_pytorch.backends import manager_for, one_process
from kernel_pytorch.backends.tpu.topology import parse_topology
from kernel_pytorch.catalog import TRANSFORMS
from kernel_pytorch.core.config import KernelPyTorchConfig
from kernel_pytorch.core.management.result import Result
from kernel_pytorch.core.program import state_digest
from kernel_pytorch.core.protocols import HardwareManager, Transform
from kernel_pytorch.core.step_memory import StepMemory
from kernel_pytorch.core.types import Event, Listener, Plan, Prediction, Trial, WorkloadSpec
from kernel_pytorch.core.workload import Workload
from kernel_pytorch.errors import ModelError
from kernel_pytorch.plan.store import SearchDirectory
from kernel_pytorch.search.jobs import Jobs
from kernel_pytorch.search.propose import Proposals, propose
from kernel_pytorch.search.run import Search
from kernel_pytorch.search.survey import described, predicted

__all__ = ["UnifiedManager"]


class UnifiedManager:
    """Runs the five steps for one configuration.

    Args:
        config: What the user asks for.
        transforms: What may be tried; the catalog by default.
        device: Where, as `hardware.detect` takes it; `None` is the machine's best.

    Raises:
        KptError: The device is unknown, not supported, or not present; or the configuration names no slice of TPUs.
    """

    def __init__(
        self,
        config: KernelPyTorchConfig | None = None,
        transforms: Sequence[Transform] = TRANSFORMS,
        *,
        device: str | None = None,
    ) -> None:
        self.device = device or "auto"
        self.hardware_manager: HardwareManager = manager_for(self.device)
        self.config = (config or KernelPyTorchConfig()).on(self.hardware_manager.vendor)
        self.transforms = tuple(transforms)
        if self.config.tpu.topology:
            parse_topology(self.config.tpu.topology)

    def predict(self, workload: Workload) -> tuple[WorkloadSpec, Prediction, Proposals]:
        """Say what could help and by how much, without trying anything."""
        bench, spec = described(workload, self.config, self.hardware_manager, self.transforms)
        return (spec, *predicted(bench, spec))

    def optimize(
        self,
        workload: Workload,
        *,
        directory: Path | None = None,
        resume: bool = False,
        listen: Listener | None = None,
        command: str = "",
    ) -> Result:
        """Search for the fastest candidate that computes the same, and return it with its plan.

        Args:
            workload: What should be fast; its model is never modified.
            directory: Where finished trials, the plan and the report are written; `None` writes nothing.
            resume: Continue the search that was interrupted in `directory`.
            listen: Called with each `Event`.
            command: The command line that reproduces this, for the plan.

        Raises:
            KptError: The workload, the directory or the configuration is unusable.
        """
        started = time.monotonic()
        say = listen or (lambda _: None)
        with ExitStack() as stack:
            say(Event("detected", self.hardware_manager.spec.name, device=self.hardware_manager.spec))
            store = stack.enter_context(SearchDirectory(directory)) if directory else None

            def begin(spec: WorkloadSpec) -> tuple[Trial, ...]:
                say(Event("described", f"{spec.parameters:,} parameters"))
                return store.begin(spec, self.hardware_manager.spec, self.config, resume=resume) if store else ()

            if one_process(self.hardware_manager) and self.config.isolation == "process":
                model, calls = (
                    workload.model(),
                    {name: workload.call(name, self.config.seed) for name in workload.cases},
                )
                digest = state_digest(model)
                jobs = stack.enter_context(Jobs(workload, self.config, self.transforms, self.device))
                found = jobs.survey()
                spec, prediction = found.workload, found.prediction
                finished = begin(spec)
                proposals = propose(self.transforms, spec, self.hardware_manager.spec, self.config)
            else:
                bench, spec = described(workload, self.config, self.hardware_manager, self.transforms)
                model, calls, digest = bench.model, dict(bench.calls), state_digest(bench.model)
                finished = begin(spec)
                prediction, proposals = predicted(bench, spec)
                jobs = stack.enter_context(Jobs(workload, self.config, self.transforms, self.device))
            say(Event("predicted", "predicted", prediction=prediction, elapsed_s=time.monotonic() - started))
            if jobs.why_not_isolated:
                say(Event("note", f"trials run in this process: {jobs.why_not_isolated}"))
            journal = store.append if store else (lambda _: None)
            artifacts = str(store.artifacts) if store else ""
            search = Search(jobs, proposals, prediction, self.config, say, journal, finished, artifacts, started)
            outcome = search.run()
            if state_digest(model) != digest:
                raise ModelError("the search changed the model it was given: this is a bug, please report it")
            plan = Plan(
                device=self.hardware_manager.spec,
                workload=spec,
                chosen=outcome.chosen,
                evidence=outcome.evidence,
                skipped=proposals.skipped,
                untried=outcome.untried,
                prediction=prediction,
                config=self.config.as_json(),
                created=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
                package_version=kernel_pytorch.__version__,
                command=command,
                search_seconds=time.monotonic() - started,
                memory=self._memory(workload, spec, outcome.chosen, say),
            )
            place = self.hardware_manager.place
            result = Result(plan, workload.model(), calls, self.config, self.transforms, place)
            if store:
                result.write(store)
            say(Event("chosen", plan.candidate.label, trial=plan.chosen))
        return result

    def _memory(self, workload: Workload, spec: WorkloadSpec, chosen: Trial, say: Listener) -> tuple[StepMemory, ...]:
        """Ask the TPU compiler what the step takes: of the slice that was asked for, else of the device's own chip."""
        if self.hardware_manager.vendor != "tpu" and not self.config.tpu.topology:
            return ()
        from kernel_pytorch.fit.planned import memory_of

        say(Event("note", "the TPU compiler is asked for the memory of the step"))
        assert self.config.budget_s is not None
        return memory_of(
            workload,
            spec,
            self.hardware_manager.spec,
            chosen.candidate,
            topology=self.config.tpu.topology,
            timeout_s=self.config.budget_s,
            trust_remote_code=self.config.trust_remote_code,
        )
