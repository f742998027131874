"""Does a GPT learn in FP8 as it does in bf16? Trained from nothing on real text, in pairs of equal seeds.

    python benchmarks/float8_learning.py -o benchmarks/results/DEVICE/float8_learning.json
    CUDA_VISIBLE_DEVICES=1 python benchmarks/float8_learning.py -o THE_SAME_FILE --only rowwise --seeds 1,2
    python benchmarks/float8_learning.py -o FILE --steps 10000       # a longer run: a file of its own
    python benchmarks/float8_learning.py -o FILE --merge OTHER.json  # runs of another machine
    python benchmarks/float8_learning.py -o FILE --timed ALONE.json  # times of steps that had the GPU alone

The byte GPT of `examples/gpt_train.py` with 100 million parameters in float32, autocast to bfloat16 and compiled, on
the source of Python's standard library and of installed packages; one file in twenty is held out. Every recipe that
`auto` may choose is forced on every linear layer, all three products, with and without the layer that makes logits
where the recipe may have it. Runs of a seed start from the same weights and read the same text in the same order: a run
carries digests of both, and runs that differ in one are not compared.

Judged by the final validation loss: the upper end of the one-sided 95 % interval (Student's t) of the relative
differences to bf16 must be under the margin. Time to equal loss: when each of a pair first reaches the lowest loss that
both reach, by steady time per step; of runs that shared a GPU by that of others of the same job and variant that did
not (`--timed`). Several processes may write to one file; runs that it has are not run again.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import gc
import hashlib
import importlib.util
import json
import math
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from torch import nn
from torch.nn import functional as F  # noqa: N812  the name every PyTorch program uses

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import gpt_train

import kernel_pytorch as kp
from kernel_pytorch.backends import manager_for
from kernel_pytorch.precision.convert import _AUTO
from kernel_pytorch.precision.recipes import holds_tails

MARGIN, CONFIDENCE = 0.005, 0.95
HELD_OUT = 20
"""One file in so many is for validation, by a digest of its name."""
PACKAGES = ("torch", "transformers", "sympy", "scipy", "numpy", "jax", "pandas", "sklearn")
"""Whose source is read after the standard library's, where they are installed, until there is enough."""
_TIMED, _BURSTS = 20, 4
"""Steps that are timed at the end of a validation's interval, alone on the device, and of how many intervals."""
HEAD = " + head"
VARIANTS = ("bf16", *_AUTO, *(name + HEAD for name in _AUTO if holds_tails(name)))


@dataclass(frozen=True)
class Job:
    """The model, its training and its text; runs of different jobs are not compared."""

    width: int = 768
    heads: int = 12
    layers: int = 14
    context: int = 1024
    batch: int = 32
    steps: int = 1000
    rate: float = 6e-4
    warmup: int = 100
    every: int = 100
    batches: int = 16
    final_batches: int = 64
    megabytes: float = 64.0
    compiled: bool = True


SMOKE = Job(
    width=64, heads=4, layers=2, context=64, batch=4, steps=8, rate=1e-3, warmup=2, every=2, batches=2, final_batches=2,
    megabytes=0.5, compiled=False,
)  # fmt: skip


@dataclass(frozen=True)
class Text:
    """Bytes to train on and to validate with, of different files."""

    training: torch.Tensor
    validation: torch.Tensor
    told: dict[str, Any]


def sources() -> Iterator[tuple[str, Path]]:
    """Yield names and paths of Python sources: the standard library's, then those of installed packages."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if not {"site-packages", "dist-packages"} & set(path.parts):
            yield f"python/{path.relative_to(library)}", path
    for package in PACKAGES:
        found = importlib.util.find_spec(package)
        for place in [] if found is None else found.submodule_search_locations or []:
            for path in sorted(Path(place).rglob("*.py")):
                yield f"{package}/{path.relative_to(place)}", path


def is_held_out(name: str) -> bool:
    """Return whether a file is for validation."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) % HELD_OUT == 0


def read_text(megabytes: float) -> Text:
    """Return the text, files in order until there is enough."""
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    enough, size = megabytes * 1e6, 0
    for name, path in sources():
        if not path.is_file():  # a link that leads nowhere
            continue
        content = path.read_bytes()
        parts[is_held_out(name)].append(content)
        size += len(content)
        if size >= enough and all(parts.values()):
            break
    training, validation = (b"\n".join(parts[held]) for held in (False, True))
    told = {
        "training_bytes": len(training), "validation_bytes": len(validation), "training_files": len(parts[False]),
        "validation_files": len(parts[True]), "digest": hashlib.sha256(training + b"\0" + validation).hexdigest(),
    }  # fmt: skip
    as_bytes = [torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in (training, validation)]
    return Text(*as_bytes, told)


def data_order(length: int, job: Job, seed: int) -> torch.Tensor:
    """Return where each sequence of each step starts: `[steps, batch]`, the same for every variant."""
    made = torch.Generator().manual_seed(seed)
    return torch.randint(length - job.context - 1, (job.steps, job.batch), generator=made)


def digest(tensors: Sequence[torch.Tensor]) -> str:
    """Return a digest of values."""
    known = hashlib.sha256()
    for tensor in tensors:
        known.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return known.hexdigest()


def rate_of(step: int, job: Job) -> float:
    """Return the learning rate of a step: a linear rise, then a cosine down to a tenth."""
    if step < job.warmup:
        return job.rate * (step + 1) / job.warmup
    done = (step - job.warmup) / max(1, job.steps - job.warmup)
    return job.rate * (0.1 + 0.45 * (1.0 + math.cos(math.pi * done)))


def build(job: Job, seed: int, device: str) -> nn.Module:
    torch.manual_seed(seed)
    return gpt_train.GPT(job.width, job.heads, job.layers, job.context).to(device).train()


def converted(model: nn.Module, variant: str) -> dict[str, Any]:
    """Put the variant's recipe on every linear layer, and tell what became of each."""
    name, head = variant.removesuffix(HEAD), variant.endswith(HEAD)
    kp.precision.convert(model, name, allow_lm_head=head)
    report = kp.precision.report(model)
    kept = {layer.path: layer.reason for layer in report.layers if not layer.recipe}
    if set(kept) != (set() if head else {"head"}):
        raise ValueError(f"{variant}: the recipe is not on every linear layer: {kept}")
    return {"emulated": report.emulated, "layers": len(report.converted), "kept": kept}


def mean_loss(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Return the loss of `[rows, context + 1]` bytes, in nats a byte."""
    with torch.autocast(tokens.device.type, torch.bfloat16):
        logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


class Reader:
    """Rows of the text by where they start, on the device."""

    def __init__(self, text: torch.Tensor, context: int, device: str) -> None:
        self.text, self.across = text.to(device), torch.arange(context + 1, device=device)

    def __call__(self, starts: torch.Tensor) -> torch.Tensor:
        return self.text[starts.to(self.text.device)[:, None] + self.across].long()


@torch.no_grad()
def validation_loss(model: nn.Module, reader: Reader, job: Job, batches: int) -> float:
    """Return the mean loss over the first `batches` batches, the same of every run."""
    made = torch.Generator().manual_seed(10**6)
    size = (job.final_batches, job.batch)
    at = torch.randint(len(reader.text) - job.context - 1, size, generator=made)[:batches]
    return float(torch.stack([mean_loss(model, reader(starts)) for starts in at]).double().mean())


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def train(job: Job, variant: str, seed: int, text: Text, *, late: Callable[[], bool]) -> dict[str, Any]:
    """Train once; where it gets late, what there is until then, `complete` false."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(job, seed, device)
    order = data_order(len(text.training), job, seed)
    row: dict[str, Any] = {
        "variant": variant, "seed": seed, "complete": False,
        "pairing": {"weights": digest(list(model.parameters())), "order": digest([order]), "text": text.told["digest"]},
        "parameters": sum(p.numel() for p in model.parameters()),
        "float8": None if variant == "bf16" else converted(model, variant),
    }  # fmt: skip
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=job.rate, betas=(0.9, 0.95), weight_decay=0.1, fused=device == "cuda"
    )
    reader, held_out = (Reader(part, job.context, device) for part in (text.training, text.validation))
    torch._dynamo.reset()
    loss_of = torch.compile(mean_loss) if job.compiled else mean_loss
    began, losses, curve, samples = time.monotonic(), [], [], []
    chunk, burst, alone = 0.0, min(_TIMED, job.every // 2), contextlib.ExitStack()
    for step, starts in enumerate(order):
        for group in optimizer.param_groups:
            group["lr"] = rate_of(step, job)
        loss = loss_of(model, reader(starts))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        if step == 0:
            synchronize()
            row["first_step_seconds"] = time.monotonic() - began
        done = step + 1
        if done % job.every == job.every - burst and len(samples) < _BURSTS:
            alone.enter_context(manager_for().exclusive())
            synchronize()
            chunk = time.perf_counter()
        if done % job.every == 0 or done == job.steps:
            if chunk and done % job.every == 0:
                synchronize()
                samples.append(1e3 * (time.perf_counter() - chunk) / burst)
                chunk = 0.0
                alone.close()
            curve.append([done, validation_loss(model, held_out, job, job.batches)])
            if not math.isfinite(curve[-1][1]) or (late() and done < job.steps):
                break
    diverged = not math.isfinite(curve[-1][1])
    finished = len(losses) == job.steps
    row |= {
        "complete": finished or diverged, "diverged": diverged,
        "losses": [round(x, 5) if math.isfinite(x) else None for x in torch.stack(losses).tolist()],
        "curve": [[at, value if math.isfinite(value) else None] for at, value in curve],
        "final": validation_loss(model, held_out, job, job.final_batches) if finished and not diverged else None,
        "samples_ms": samples, "ms": statistics.median(samples),
        "seconds": time.monotonic() - began,
    }  # fmt: skip
    return row


def non_inferiority(differences: Sequence[float], margin: float = MARGIN) -> dict[str, Any]:
    """Return mean and upper end of the one-sided interval of paired relative differences, and whether it is under."""
    n = len(differences)
    mean = statistics.mean(differences)
    upper = None
    if n > 1:
        spread = statistics.stdev(differences) / math.sqrt(n)
        upper = mean + float(stats.t.ppf(CONFIDENCE, n - 1)) * spread
    return {"pairs": n, "mean": mean, "upper": upper, "margin": margin, "passed": upper is not None and upper < margin}


def reached(curve: Sequence[Sequence[float]], target: float) -> float:
    """Return the step at which a validation curve is first at a loss, on straight lines between its points.

    Raises:
        ValueError: It never is.
    """
    before = curve[0]
    for point in curve:
        if point[1] <= target:
            fall = before[1] - point[1]
            share = 1.0 if fall <= 0 else (before[1] - target) / fall
            return before[0] + max(0.0, min(1.0, share)) * (point[0] - before[0])
        before = point
    raise ValueError(f"the curve never falls to {target}")


def time_to_equal_loss(plain: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """Return seconds of training until each run of a pair is at the lowest loss that both reach."""
    target = max(min(value for _, value in run["curve"]) for run in (plain, other))
    seconds = [reached(run["curve"], target) * run["ms"] / 1e3 for run in (plain, other)]
    return {"loss": target, "bf16_seconds": seconds[0], "seconds": seconds[1], "ratio": seconds[0] / seconds[1]}


def summarise(runs: dict[str, dict[str, Any]], timed: dict[str, float] | None = None) -> dict[str, Any]:
    """Return the verdict on each variant that has a pair, from complete runs; `timed` by variant, ms of a step alone.

    Raises:
        ValueError: Runs of a seed did not start alike, or did not read the same.
    """
    by_variant: dict[str, dict[int, dict[str, Any]]] = {}
    for run in runs.values():
        if run["complete"]:
            alone = (timed or {}).get(run["variant"], run["ms"])
            by_variant.setdefault(run["variant"], {})[run["seed"]] = {**run, "ms": alone}
    plain = by_variant.get("bf16", {})
    found: dict[str, Any] = {}
    for variant in (name for name in VARIANTS if name in by_variant and name != "bf16"):
        seeds = sorted(set(by_variant[variant]) & set(plain))
        pairs = [(plain[seed], by_variant[variant][seed]) for seed in seeds]
        for one, two in pairs:
            if one["pairing"] != two["pairing"]:
                raise ValueError(f"{variant}, seed {one['seed']}: not a pair, {one['pairing']} and {two['pairing']}")
        if not pairs:
            continue
        row: dict[str, Any] = {"seeds": seeds}
        row["bf16"], row["final"] = ([run["final"] for run in side] for side in zip(*pairs, strict=True))
        row["bf16_ms"], row["ms"] = (statistics.median(run["ms"] for run in side) for side in zip(*pairs, strict=True))
        row["speedup"] = row["bf16_ms"] / row["ms"]
        if any(run["diverged"] for pair in pairs for run in pair):
            row |= {"diverged": True, "passed": False}
        else:
            differences = [(b["final"] - a["final"]) / a["final"] for a, b in pairs]
            row |= {"differences": differences, **non_inferiority(differences)}
            row["equal_loss"] = [time_to_equal_loss(a, b) for a, b in pairs]
        found[variant] = row
    return found


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Keep other processes from an artefact while it is read and written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    with (Path(tempfile.gettempdir()) / f"float8_learning-{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def stored(path: Path) -> dict[str, Any]:
    """Return an artefact, empty where there is none."""
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"runs": {}}
    return known


def add(path: Path, fresh: dict[str, Any], runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Add runs to an artefact, also beside other processes, and return it.

    Raises:
        SystemExit: It is of another job or another text.
    """
    with held(path):
        artefact = stored(path)
        for key in ("job", "text"):
            if key in artefact and artefact[key] != fresh[key]:
                raise SystemExit(f"{path} is of another {key}: {artefact[key]}, not {fresh[key]}")
        kept = {"timed": artefact["timed"]} if "timed" in artefact else {}
        artefact = {**kept, **fresh, "runs": dict(sorted({**artefact["runs"], **runs}.items()))}
        artefact["summary"] = summarise(artefact["runs"], artefact.get("timed"))
        fresh_file = path.with_name(f".{path.name}.new")
        fresh_file.write_text(json.dumps(artefact) + "\n")
        fresh_file.replace(path)
    return artefact


def times_of(path: Path, job: dict[str, Any]) -> dict[str, float]:
    """Return the median milliseconds of a step by variant.

    Raises:
        SystemExit: The runs are of another job; how many steps they had does not matter.
    """
    known = stored(path)
    if {**known.get("job", {}), "steps": 0} != {**job, "steps": 0}:
        raise SystemExit(f"{path} is of another job: {known.get('job')}, not {job}")
    by_variant: dict[str, list[float]] = {}
    for run in known["runs"].values():
        by_variant.setdefault(run["variant"], []).append(run["ms"])
    return {variant: statistics.median(ms) for variant, ms in by_variant.items()}


def show(artefact: dict[str, Any]) -> None:
    for name, run in artefact["runs"].items():
        final = "no final loss" if run["final"] is None else f"loss {run['final']:.5f}"
        state = "" if run["complete"] else f"  stopped at step {len(run['losses'])}"
        print(f"{name:34s} {final}  {run['ms']:7.2f} ms a step  {run['seconds']:5.0f} s{state}")
    for variant, row in artefact["summary"].items():
        if row.get("diverged"):
            print(f"{variant:34s} DIVERGED")
            continue
        upper = "one pair" if row["upper"] is None else f"at most {row['upper']:+.3%}"
        equal = statistics.median(pair["ratio"] for pair in row["equal_loss"])
        verdict = "within" if row["passed"] else "not shown to be within"
        print(
            f"{variant:34s} {row['mean']:+.3%} ({upper}), {verdict} {row['margin']:.1%} of bf16; "
            f"{row['speedup']:.2f}x a step, {equal:.2f}x to equal loss"
        )


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--only", default="", help=f"variants by commas: {', '.join(VARIANTS)}")
    parser.add_argument("--seeds", "--seed", default="0,1,2")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--deadline", type=float, default=math.inf, help="seconds after which no run is started")
    parser.add_argument("--merge", type=Path, nargs="+", default=[], help="artefacts whose runs to add; nothing is run")
    parser.add_argument("--timed", type=Path, help="an artefact whose times of a step count; nothing is run")
    parser.add_argument("--smoke", action="store_true", help="a tiny model for a few steps")
    parser.add_argument("--compile", action="store_true", help="compile in smoke mode too")
    return parser.parse_args()


def main() -> None:
    args, began = options(), time.monotonic()
    wanted = [name for name in args.only.split(",") if name] or list(VARIANTS)
    unknown = set(wanted) - set(VARIANTS)
    if unknown:
        raise SystemExit(f"no such variant: {', '.join(sorted(unknown))}; there are {', '.join(VARIANTS)}")
    if args.merge:
        for other in map(stored, args.merge):
            runs = other.pop("runs")
            other.pop("summary", None)
            artefact = add(args.output, other, runs)
        show(artefact)
        return
    if args.timed:
        artefact = stored(args.output)
        if "job" not in artefact:
            raise SystemExit(f"{args.output} has no runs yet")
        runs = artefact.pop("runs")
        artefact.pop("summary", None)
        show(add(args.output, {**artefact, "timed": times_of(args.timed, artefact["job"])}, runs))
        return
    job = SMOKE if args.smoke else Job()
    changed = {key: value for key in ("steps", "batch") if (value := getattr(args, key)) is not None}
    job = replace(job, **changed, compiled=job.compiled or args.compile)
    if job.steps < job.every:
        raise SystemExit(f"--steps must be at least {job.every}, the interval between validations")
    text, spec = read_text(job.megabytes), manager_for().spec
    fresh = {
        "device": spec.key, "gpu": spec.name, "software": dict(spec.software), "job": asdict(job), "text": text.told,
    }  # fmt: skip
    artefact = add(args.output, fresh, {})
    # Pairs first: all variants of a seed, those with the head after the others.
    todo = [(variant, int(seed)) for seed in args.seeds.split(",") for variant in wanted if HEAD not in variant]
    todo += [(variant, int(seed)) for seed in args.seeds.split(",") for variant in wanted if HEAD in variant]
    for variant, seed in todo:
        name = f"{variant} seed {seed}"
        runs = stored(args.output)["runs"]
        if runs.get(name, {}).get("complete"):
            continue
        expected = max((run["seconds"] for run in runs.values() if run["complete"]), default=0.0)
        if time.monotonic() - began + expected > args.deadline:
            print(f"{name}: left for later, about {expected:.0f} s would pass the deadline")
            continue
        run = train(job, variant, seed, text, late=lambda: time.monotonic() - began > args.deadline)
        artefact = add(args.output, fresh, {name: run})
        final = "no final loss" if run["final"] is None else f"loss {run['final']:.5f}"
        print(f"{name}: {final}, {run['ms']:.2f} ms a step, {run['seconds']:.0f} s", flush=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    show(artefact)


if __name__ == "__main__":
    main()
