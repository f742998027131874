"""`kpt detect` and `kpt predict`: what can be said without trying anything."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kernel_pytorch.cli.output import emit, quiet_stdout

if TYPE_CHECKING:
    from kernel_pytorch.core.workload import Workload
    from kernel_pytorch.precision.forecast import Forecast

__all__ = ["detect", "predict"]


def detect(*, form: str, device: str = "auto") -> int:
    """Print the machine and what can run on it; return 1 where something fixable is missing."""
    with quiet_stdout():
        from kernel_pytorch import catalog, hardware
        from kernel_pytorch.backends.tpu import packages
        from kernel_pytorch.plan.schema import plain

        spec = hardware.detect(device)
        rows = [(t.name, t.summary, t.probe(spec)) for t in catalog.TRANSFORMS]
        problems = packages.problems()
    fixable = [skip for _, _, skip in rows if skip is not None and skip.fix]
    fixable += [problem.skip for problem in problems if problem.blocks]

    def data() -> dict[str, Any]:
        transforms = [
            {
                "name": name,
                "summary": summary,
                "available": skip is None,
                "reason": skip.reason if skip else "",
                "fix": skip.fix if skip else "",
            }
            for name, summary, skip in rows
        ]
        told = [{"name": p.name, "reason": p.reason, "fix": p.fix, "blocks": sorted(p.blocks)} for p in problems]
        device_data = {**plain(spec), "key": spec.key}
        return {"device": device_data, "transforms": transforms, "tpu_packages": told, "fixable": len(fixable)}

    def text(console: Any) -> None:
        from kernel_pytorch.report.text import render_device, render_packages

        render_device(spec, rows, console)
        render_packages([(p.skip, sorted(p.blocks)) for p in problems], console)

    emit(form, data, text)
    return 1 if fixable else 0


def predict(
    *, target: str, mode: str, form: str, device: str = "auto", float8: str | None = None, **options: Any
) -> int:
    """Print where the time goes and what each optimisation could gain at most; with `float8` also what FP8 would do."""
    from kernel_pytorch.cli.search import make_config

    with quiet_stdout():
        from kernel_pytorch.backends import one_process
        from kernel_pytorch.core.management.unified_manager import UnifiedManager
        from kernel_pytorch.core.targets import load_target
        from kernel_pytorch.plan.schema import plain

        config = make_config(mode=mode, **options)
        manager = UnifiedManager(config, device=device)
        if one_process(manager.hardware_manager):
            manager.hardware_manager.synchronize()  # its runtime is loaded before the target, which may name the device
        workload = load_target(target, trust_remote_code=config.trust_remote_code)
        foreseen = None if float8 is None else _foreseen(workload, float8)
        spec, prediction, proposals = manager.predict(workload)

    def data() -> dict[str, Any]:
        found = {
            "workload": plain(spec),
            "prediction": plain(prediction),
            "skipped": plain(proposals.skipped),
        }
        if foreseen is not None:
            found["float8"] = {**plain(foreseen), "answer": foreseen.answer, "kind": "prediction"}
        return found

    def text(console: Any) -> None:
        from kernel_pytorch.report.text import render_prediction

        render_prediction(spec, prediction, proposals.skipped, console)
        if foreseen is not None:
            console.print()
            console.print(str(foreseen), markup=False, highlight=False)

    emit(form, data, text)
    return 0


def _foreseen(workload: Workload, arch: str) -> Forecast:
    """Return what FP8 would do for the linear layers of a workload on an architecture that need not be here."""
    from kernel_pytorch.precision.forecast import forecast

    case = max(workload.weights, key=lambda name: workload.weights[name])
    return forecast(workload.model(), workload.call(case, 0), arch=arch)
