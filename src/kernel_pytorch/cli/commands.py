"""What `kpt` accepts. Nothing heavy is imported until a command runs, so that `--help` answers at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from kernel_pytorch.cli.parameters import Above, Budget, Share, Verbs

__all__ = ["kpt"]

F = TypeVar("F", bound=Callable[..., Any])

TARGET_HELP = (
    "TARGET is path/file.py:factory, package.module:factory, hf:MODEL_ID_OR_DIR, timm:NAME, torchvision:NAME or a "
    ".pt2 file. A factory is called without arguments and returns a Workload or (model, example_inputs)."
)


def _names(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name.strip() for value in values for name in value.split(",") if name.strip())


def _at_most_two(ctx: click.Context, _: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    if len(values) > 2:
        raise click.UsageError(f"{len(values)} targets; at most two can be compared", ctx)
    return values


def _stacked(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    def apply(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


_format = click.option(
    "--format", "form", type=click.Choice(["text", "json"]), default="text", help="What to print on stdout."
)
_target = click.argument("target")
_plan = click.argument("plan", metavar="PLAN")
_mode = click.option("--mode", type=click.Choice(["inference", "training"]), default="inference", show_default=True)
_trust_code = click.option(
    "--trust-remote-code", is_flag=True, help="Let code that comes with a model run (hub repositories, .pt2 files)."
)
_trust_artifacts = click.option(
    "--trust-artifacts", is_flag=True, help="Load code in the plan's artifacts/ (packages, compile caches)."
)
_device = click.option(
    "--device",
    default="auto",
    show_default=True,
    metavar="DEVICE",
    help="Where: cpu, cuda:N, nvidia, amd, intel (xpu), tpu; `auto` is the machine's best.",
)
_seed = click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of inputs and resampling."
)
_guard_forms = click.Choice(["text", "json", "markdown", "junit", "prometheus"])
_guarded = _stacked(
    click.option(
        "--max-slowdown",
        type=Above(below=10.0),
        default="0.03",
        show_default=True,
        metavar="F",
        help="Largest slowdown that is allowed, as a fraction.",
    ),
    click.option("--name", default="", metavar="NAME", help="What it is called in the history; told by TARGET."),
    click.option(
        "--inconclusive",
        type=click.Choice(["pass", "fail"]),
        default="pass",
        show_default=True,
        help="What an undecided comparison exits as: 0 or 1.",
    ),
    click.option(
        "--history",
        metavar="URL",
        help="Database that keeps the run; `none` keeps nothing. By default $KPT_HISTORY, else a file of yours.",
    ),
    click.option(
        "--format",
        "form",
        type=_guard_forms,
        default="text",
        help="How to write the outcome.",
    ),
    click.option("-o", "--output", metavar="FILE", help="Write it there, and text to stdout."),
)
_choice = _stacked(
    click.option("--only", multiple=True, callback=_names, metavar="NAMES", help="Transforms to try, comma-separated."),
    click.option("--exclude", multiple=True, callback=_names, metavar="NAMES", help="Transforms not to try."),
)


_history = click.option(
    "--history", metavar="URL", help="Database or file; by default $KPT_HISTORY, else a file of yours."
)
_runs_of = _stacked(
    click.option("--name", metavar="NAME", help="Only runs of this name."),
    click.option("--since", metavar="DATE", help="Only runs since this date, such as 2026-11-22 (UTC)."),
)


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]}, no_args_is_help=False)
@click.version_option(None, "--version", package_name="kernel-pytorch", message="kpt %(version)s")
def kpt() -> None:
    """Make a PyTorch model fast on this machine, prove that it computes the same, and keep it fast."""


@kpt.command()
@_device
@_format
def detect(**options: Any) -> int:
    """Show this machine, and which optimisations can run on it.

    Exits 1 where something that would help is missing and can be installed.
    """
    from kernel_pytorch.cli.look import detect as run

    return run(**options)


@kpt.command(epilog=TARGET_HELP)
@_target
@_mode
@_device
@_choice
@_seed
@click.option(
    "--float8",
    metavar="ARCH",
    help="Also foresee, layer by layer, what training in FP8 would do on a GPU architecture, here or not: sm_90.",
)
@_trust_code
@_format
def predict(**options: Any) -> int:
    """Say what could help TARGET and by how much, before anything is tried."""
    from kernel_pytorch.cli.look import predict as run

    return run(**options)


@kpt.command(epilog=TARGET_HELP)
@_target
@_mode
@_device
@click.option(
    "--budget",
    type=Budget(by_device=True),
    default="default",
    metavar="quick|default|thorough|SECONDS",
    help="Time the search may take: 60 s, 240 s, 1800 s (on a GPU 150 s, 540 s, 1800 s), or your own.",
)
@click.option(
    "--max-error",
    type=Above(),
    default="2e-2",
    show_default=True,
    metavar="E",
    help="Largest relative error of the worst output row against the high-precision reference.",
)
@click.option(
    "--min-gain",
    type=Above(zero=True, below=1.0),
    default="0.02",
    show_default=True,
    metavar="G",
    help="Smallest speed-up worth a changed model, as a fraction.",
)
@click.option("-o", "--output", metavar="DIR", help="Where plan.json and report.html go; by default kpt-NAME.")
@click.option("--resume", is_flag=True, help="Continue an interrupted search in DIR.")
@click.option(
    "--isolation",
    type=click.Choice(["process", "none"]),
    default="process",
    show_default=True,
    help="Try each candidate in a process of its own, or all in this one.",
)
@click.option(
    "--allow-float8-lm-head",
    is_flag=True,
    help="On NVIDIA GPUs, let the layer that makes logits train in FP8, too; it is judged like any other step.",
)
@click.option(
    "--topology",
    metavar="SLICE",
    help="TPU slice, e.g. v5e:4x4, for which the report tells the step's memory, by its compiler; needs no TPU. By "
    "default one chip of the TPU searched on.",
)
@_choice
@_seed
@_trust_code
@_format
def optimize(**options: Any) -> int:
    """Find the fastest version of TARGET that computes the same, and show the evidence."""
    from kernel_pytorch.cli.search import optimize as run

    return run(**options)


@kpt.command(epilog=TARGET_HELP)
@_target
@_mode
@click.option(
    "--topology", metavar="SLICE", help="TPU slice to compile for, e.g. v5e:4x4; v5e:1 is one chip. Needs no TPU."
)
@click.option(
    "--device",
    type=click.Choice(["auto", "tpu", "cuda", "cpu"]),
    default="auto",
    show_default=True,
    help="`auto` is tpu with --topology, else the machine's best.",
)
@click.option("--batch", type=int, metavar="N", help="Size of the inputs' first dimension; TARGET's own by default.")
@click.option("--find-max-batch", is_flag=True, help="Find the largest batch that fits.")
@click.option("--search", is_flag=True, help="Search memory patterns (recomputing, chunks, sharding) on a TPU slice.")
@click.option(
    "--memory",
    metavar="GB",
    type=Above(),
    help="With --search: the cheapest patterns whose peak on a device is at most this; else the smallest peak.",
)
@click.option(
    "--max-extra-flops",
    metavar="F",
    type=Above(zero=True),
    default="0.15",
    show_default=True,
    help="With --search: operations allowed over the unmodified step's, as a fraction.",
)
@click.option("-o", "--output", metavar="FILE", help="Also write the answer as an HTML page.")
@_trust_code
@_format
def fit(**options: Any) -> int:
    """Tell whether a step of TARGET fits, which modules hold the memory, and what it costs.

    For a TPU the real compiler answers, without a TPU; CUDA and CPU are measured where they are, else estimated.
    Exits 1 where it does not fit.
    """
    from kernel_pytorch.cli.fit import fit as run

    return run(**options)


@kpt.command()
@_plan
@_format
def explain(**options: Any) -> int:
    """Tell why each candidate of PLAN (a file or a directory) won or lost."""
    from kernel_pytorch.cli.replay import explain as run

    return run(**options)


@kpt.command(epilog=TARGET_HELP)
@_plan
@_target
@click.option(
    "--budget", type=Budget(), default="30", metavar="SECONDS", show_default=True, help="Time for the measurement."
)
@_seed
@_trust_artifacts
@_trust_code
@_format
def apply(**options: Any) -> int:
    """Replay PLAN on a fresh TARGET: check its numerics and its speed here and now.

    Exits 1 where the plan no longer holds: outputs outside the budget, or not faster than the unmodified model.
    """
    from kernel_pytorch.cli.replay import apply as run

    return run(**options)


@kpt.command(epilog=TARGET_HELP)
@_plan
@click.argument("target", required=False)
@click.option(
    "--budget", type=Budget(), default="30", metavar="SECONDS", show_default=True, help="Time for the measurement."
)
@click.option(
    "--keep",
    "keep_share",
    type=Share(),
    default="0.9",
    show_default=True,
    metavar="F",
    help="Share of the planned speed-up that must be left; 0 asks only to be as fast as the unmodified model.",
)
@click.option(
    "--refresh", is_flag=True, help="Judge a plan of other software too, and where it passes write it anew for this."
)
@_seed
@_trust_artifacts
@_trust_code
@_guarded
def check(**options: Any) -> int:
    """Say whether PLAN is still right and still as fast: the unmodified model and the plan, in turns, now.

    TARGET is by default the one that the plan was made for. Exits 0 for PASS; 1 for FAIL (slower), WRONG (other
    numbers) and STALE (made with other software or on another device); for INCONCLUSIVE as --inconclusive says.
    """
    from kernel_pytorch.cli.guard import check as run

    return run(**options)


@kpt.command(epilog=TARGET_HELP)
@click.argument("targets", nargs=-1, metavar="[TARGET [TARGET_B]]", callback=_at_most_two)
@click.option("--base", metavar="REV", help="Git revision of the old side, in a worktree of its own.")
@click.option("--head", metavar="REV", help="Git revision of the new side; HEAD by default.")
@click.option("--base-python", metavar="PYTHON", help="Interpreter (or environment) of the old side.")
@click.option("--head-python", metavar="PYTHON", help="Interpreter of the new side; the one left out is this one.")
@click.option(
    "--base-samples", metavar="FILE", help="JSON array of ms in time order, or results of pytest-benchmark or asv."
)
@click.option("--head-samples", metavar="FILE", help="The new side's.")
@click.option("--paired", is_flag=True, help="Sample i of both files was taken side by side.")
@click.option(
    "--command",
    "commands",
    multiple=True,
    metavar="CMD",
    help="Instead of a TARGET: prints one number in ms a line. Given twice, the first is the old side.",
)
@click.option("--per-line", is_flag=True, help="Each line of a command is a sample, rather than their median.")
@click.option(
    "--allow-dirty", is_flag=True, help="Take the checkout as it is for --head, uncommitted changes included."
)
@click.option("--other-model", is_flag=True, help="Compare though models or inputs of the two sides differ.")
@click.option("--bisect", is_flag=True, help="On FAIL, find the commit that made it slow.")
@click.option("--first-parent", is_flag=True, help="Of merges, --bisect follows the first parent only.")
@_mode
@click.option(
    "--budget", type=Budget(), default="120", metavar="SECONDS", show_default=True, help="Time for the measurement."
)
@_trust_code
@_guarded
def compare(**options: Any) -> int:
    """Say whether the new side is slower than the old: both take turns on this machine, now.

    The sides are two git revisions of TARGET, two Python environments, two targets, two commands, or two series of
    samples. Exits 0 for PASS, 1 for FAIL; for INCONCLUSIVE as --inconclusive says.
    """
    from kernel_pytorch.cli.compare import compare as run

    return run(**options)


@kpt.command(epilog=TARGET_HELP)
@click.argument("target_a")
@click.argument("target_b")
@click.option("--level", type=click.Choice(["quick", "standard", "strict"]), default="standard", show_default=True)
@click.option(
    "--max-error", type=Above(), default="1e-5", show_default=True, metavar="E", help="Largest relative error."
)
@_seed
@_trust_code
@_format
def validate(**options: Any) -> int:
    """Say whether two models are the same function, and at which layer they first part.

    The inputs are those of TARGET_A. Exits 1 where the models differ.
    """
    from kernel_pytorch.cli.replay import validate as run

    return run(**options)


@kpt.command(epilog=TARGET_HELP)
@_plan
@_target
@click.option("-o", "--output", metavar="FILE", help="Write the source there instead of to stdout.")
@_trust_code
@_format
def eject(**options: Any) -> int:
    """Print PLAN for TARGET as plain PyTorch source that runs without this package."""
    from kernel_pytorch.cli.replay import eject as run

    return run(**options)


@kpt.group(cls=Verbs)
def history() -> None:
    """List, show, plot, export and prune what `check` and `compare` have found over time."""


@history.command(name="list")
@_history
@_runs_of
@click.option("--limit", type=click.IntRange(min=1), default=50, show_default=True, help="The newest so many.")
@_format
def history_list(**options: Any) -> int:
    """List runs, the newest last, and where the level of the time changed."""
    from kernel_pytorch.cli.history import list_runs as run

    return run(**options)


@history.command(name="show")
@click.argument("run_id", metavar="RUN")
@_history
@click.option("--format", "form", type=_guard_forms, default="text", help="How to write it.")
@click.option("-o", "--output", metavar="FILE", help="Write it there, and text to stdout.")
def history_show(**options: Any) -> int:
    """Show one run again: RUN is its id, or the beginning of it."""
    from kernel_pytorch.cli.history import show as run

    return run(**options)


@history.command(name="plot")
@_history
@_runs_of
@click.option("-o", "--output", default="kpt-trends.html", show_default=True, metavar="FILE", help="The page.")
def history_plot(**options: Any) -> int:
    """Write an HTML page of trends: the times over the runs, and where they shifted."""
    from kernel_pytorch.cli.history import plot as run

    return run(**options)


@history.command(name="export")
@_history
@_runs_of
@click.option(
    "--format", "form", type=click.Choice(["json", "csv"]), default="json", help="With all samples, or a line a run."
)
@click.option("-o", "--output", metavar="FILE", help="Write it there instead of to stdout.")
def history_export(**options: Any) -> int:
    """Print all runs for other programs."""
    from kernel_pytorch.cli.history import export as run

    return run(**options)


@history.command(name="prune")
@_history
@click.option("--keep-days", type=Above(zero=True), metavar="N", help="Keep what is not older than this.")
@click.option("--keep-runs", type=click.IntRange(min=0), metavar="N", help="Keep the newest so many of each name.")
@_format
def history_prune(**options: Any) -> int:
    """Delete old runs; with both options, what either keeps stays."""
    from kernel_pytorch.cli.history import prune as run

    return run(**options)


@history.command(name="send")
@_history
@_format
def history_send(**options: Any) -> int:
    """Send the runs that wait on the local disk since the database was away. Exits 1 where some still wait."""
    from kernel_pytorch.cli.history import send as run

    return run(**options)
