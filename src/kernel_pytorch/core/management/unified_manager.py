"""The order of the five steps: detect, predict, try, choose, plan."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import kernel_pytorch
from kernel_pytorch.backends import manager_for
from kernel_pytorch.backends.placement import release_cached
from kernel_pytorch.catalog import TRANSFORMS
from kernel_pytorch.core.config import KernelPyTorchConfig
from kernel_pytorch.core.describe import check_model, describe
from kernel_pytorch.core.management.result import Result
from kernel_pytorch.core.program import clone_model, state_digest
from kernel_pytorch.core.protocols import HardwareManager, Transform
from kernel_pytorch.core.types import Event, Listener, Plan, Prediction, WorkloadSpec
from kernel_pytorch.core.workload import Workload
from kernel_pytorch.errors import ModelError
from kernel_pytorch.plan.store import SearchDirectory
from kernel_pytorch.search.bench import Bench, prepare_bench
from kernel_pytorch.search.jobs import Jobs
from kernel_pytorch.search.predict import predict
from kernel_pytorch.search.propose import Proposals, propose
from kernel_pytorch.search.run import Search

__all__ = ["UnifiedManager"]


class UnifiedManager:
    """Runs the five steps for one configuration.

    Args:
        config: What the user asks for.
        transforms: What may be tried; the catalog by default.
    """

    def __init__(self, config: KernelPyTorchConfig | None = None, transforms: Sequence[Transform] = TRANSFORMS) -> None:
        self.hardware_manager: HardwareManager = manager_for()
        self.config = (config or KernelPyTorchConfig()).on(self.hardware_manager.vendor)
        self.transforms = tuple(transforms)

    def predict(self, workload: Workload) -> tuple[WorkloadSpec, Prediction, Proposals]:
        """Say what could help and by how much, without trying anything."""
        bench, spec = self._bench(workload)
        return (spec, *self._predict(bench, spec))

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
            bench, spec = self._bench(workload)
            say(Event("described", f"{spec.parameters:,} parameters"))
            digest = state_digest(bench.model)
            store = stack.enter_context(SearchDirectory(directory)) if directory else None
            finished = store.begin(spec, self.hardware_manager.spec, self.config, resume=resume) if store else ()
            prediction, proposals = self._predict(bench, spec)
            say(Event("predicted", "predicted", prediction=prediction, elapsed_s=time.monotonic() - started))
            jobs = stack.enter_context(Jobs(workload, self.config, self.transforms))
            if jobs.why_not_isolated:
                say(Event("note", f"trials run in this process: {jobs.why_not_isolated}"))
            journal = store.append if store else (lambda _: None)
            artifacts = str(store.artifacts) if store else ""
            search = Search(jobs, proposals, prediction, self.config, say, journal, finished, artifacts, started)
            outcome = search.run()
            if state_digest(bench.model) != digest:
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
            )
            result = Result(
                plan, self.hardware_manager.place(workload.model()), dict(bench.calls), self.config, self.transforms
            )
            if store:
                result.write(store)
            say(Event("chosen", plan.candidate.label, trial=plan.chosen))
        return result

    def _bench(self, workload: Workload) -> tuple[Bench, WorkloadSpec]:
        bench = prepare_bench(
            workload, self.config, self.hardware_manager, seed=self.config.seed, transforms=self.transforms
        )
        check_model(bench.workload, bench.model, bench.calls, bench.config.mode, bench.batches)
        return bench, describe(workload, bench.model, bench.calls, self.config.mode, bench.batches)

    def _predict(self, bench: Bench, spec: WorkloadSpec) -> tuple[Prediction, Proposals]:
        device = self.hardware_manager.spec
        proposals = propose(self.transforms, spec, device, self.config)
        model = clone_model(bench.model)
        prediction = predict(
            bench.workload,
            model,
            bench.calls,
            spec,
            device,
            self.hardware_manager,
            self.transforms,
            proposals.singles,
        )
        del model
        release_cached()
        return prediction, proposals
