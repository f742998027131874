"""Every implementation of attention beside plain SDPA, and the choice that is made with an empty cache.

    python benchmarks/attention.py -o benchmarks/results/DEVICE/attention.json [--quick] [--part 1/2]

For each shape, forward alone and with backward: the choice is made first, in a cache of its own that begins empty. Then
its error and that of plain `scaled_dot_product_attention` are taken against float64 on a sample of the rows, and only
if it is right are all timed, on samples other than those that made the choice: single calls on the device's clock from
a cold cache, and calls back to back on the host's. The rows that miss a requirement are named at the end. `--part I/N`
takes every N-th group of shapes (one head size, grouping and mask: what the packages compile for). Rows already in the
output file are kept.
FlashAttention-4 compiles a kernel for each group, seconds each, so processes beside this one compile them first, into
the package's own disk cache. On a CPU the shapes are shrunk: that tests the script, not the machine.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

from kernel_pytorch.attention import attention, attention_varlen, choice, choose, implementations, unsupported
from kernel_pytorch.attention.probe import make_case, relative_errors
from kernel_pytorch.attention.reference import visible
from kernel_pytorch.attention.shapes import AWKWARD, GRID, small
from kernel_pytorch.attention.timing import Stopwatch
from kernel_pytorch.hardware import detect

PLAIN, API = "plain SDPA", "attention()"
CALLS = 20
HOPELESS = 2.0
"""Times the best device time that the choice saw: beyond it one is not timed again."""
TOLERANCE = 1.03
GAIN = 1.10
REQUIREMENTS = (
    "runs and is right",
    "within 3 % of the best installed",
    "never slower than plain SDPA, compiled",
    "never slower than plain SDPA, from Python",
    f"{GAIN} x plain SDPA, heads of 128, 4k and more",
    "error at most twice plain SDPA's",
)
LIMIT = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 1e-4}


def group(named):
    """Name what the packages compile for: shapes of one group share compiled kernels."""
    shape = named.shape
    return f"d{shape.head_dim} {shape.heads // shape.kv_heads} {shape.is_causal} {named in AWKWARD}"


def plain_sdpa(case):
    """Return plain SDPA of a case as its user would write it, or `None` where it has no way to say it."""
    shape = case.shape
    if shape.softcap or shape.packed:
        return None
    gqa = shape.heads != shape.kv_heads
    if shape.window is None and (not shape.is_causal or shape.q_len == shape.kv_len or shape.alignment == "upper_left"):
        return lambda c: scaled_dot_product_attention(*c.inputs(), is_causal=shape.is_causal, enable_gqa=gqa)
    left, right = shape.window or (None, 0)
    sizes = {"left": left, "right": right, "alignment": shape.alignment}
    mask = visible(shape.q_len, shape.kv_len, device=case.query.device, **sizes)
    return lambda c: scaled_dot_product_attention(*c.inputs(), attn_mask=mask, enable_gqa=gqa)


def public_call(case):
    shape = case.shape
    options = {"is_causal": shape.is_causal, "window": shape.window, "softcap": shape.softcap}
    if shape.packed:
        return attention_varlen(*case.inputs(), case.offsets_q, case.offsets_k, shape.q_len, shape.kv_len, **options)
    return attention(*case.inputs(), enable_gqa=True, alignment=shape.alignment, **options)


def strided(case):
    """Lay the inputs out so that no kernel can load them in bulk: rows of an odd number of elements."""
    views = [torch.cat((t.detach(), t.detach()[..., :1]), -1)[..., :-1] for t in case.inputs()]
    views = [view.requires_grad_(t.requires_grad) for view, t in zip(views, case.inputs(), strict=True)]
    return replace(case, query=views[0], key=views[1], value=views[2])


def job(case, run, weight):
    if weight is None:
        return lambda: run(case)
    return lambda: torch.autograd.grad(run(case), case.inputs(), weight)


def flops(shape, backward):
    """Count multiplications and additions of the two products (seven with backward), half of them where causal."""
    scores = shape.batch * shape.heads * shape.q_len * shape.kv_len
    if shape.window is not None:
        return float("nan")
    products = 4 * scores * shape.head_dim * (3.5 if backward else 1.0)
    return products / 2 if shape.is_causal and shape.q_len == shape.kv_len else products


def calls_back_to_back(watch, device_ms, names, seconds):
    """Time K calls in a row with one wait at the end, per call: what a loop pays. K is 20, or as many as fit 60 ms."""
    longest = max(device_ms[name] for name in names)
    calls = max(3, min(CALLS, int(60.0 / longest)))
    return calls, watch.back_to_back(names, calls=calls, rounds=9, max_seconds=seconds)


def measure(named, device, backward, seconds):
    shape = named.shape.canonical()
    start = time.perf_counter()
    chosen = choose(shape, device, backward=backward)
    choose_s = time.perf_counter() - start
    with torch.set_grad_enabled(backward):
        case = make_case(shape, device, backward=backward, seed=1)
        case = strided(case) if named.strided else case
        plain = plain_sdpa(case)
        errors = {API: relative_errors(case, public_call, backward=backward, exact=True)}
        if plain is not None:
            errors[PLAIN] = relative_errors(case, plain, backward=backward, exact=True)
        limit = LIMIT[shape.dtype]
        if not all(error <= limit for error in errors[API].values()):
            reason = f"{chosen.impl} is wrong: {errors[API]}, plain SDPA: {errors.get(PLAIN)}"
            return {"status": "wrong", "errors": errors, "choice": chosen.impl, "reason": reason}
        runs = {API: public_call}
        if plain is not None:
            runs[PLAIN] = plain
        quickest = min(chosen.device_ms.values(), default=0.0)
        for name, one in implementations().items():
            by_name_only = name == "fa3_fp8" and unsupported(name, shape, device, backward=backward) is None
            hopeful = name in chosen.device_ms and chosen.device_ms[name] <= HOPELESS * quickest + 0.05
            if hopeful or name in (chosen.impl, chosen.compiled) or by_name_only:
                runs[name] = lambda c, one=one: c.run(one)
        weight = torch.randn_like(public_call(case)) if backward else None
        watch = Stopwatch({name: job(case, run, weight) for name, run in runs.items()}, device)
        watch.names += [name for name in watch.crawling if name in (API, PLAIN, chosen.impl, chosen.compiled)]
        samples = watch.in_turns(watch.names, max_seconds=seconds, drop=False)
        times = {name: one.device_ms for name, one in samples.items()}
        rivals = [name for name in runs if name in times and name in chosen.device_ms] or [chosen.impl]
        # Who could be faster from Python: those whose device time alone does not exceed what the choice takes.
        reach = max(chosen.eager_ms.get(chosen.impl, 0.0), times[chosen.impl])
        alive = [name for name in rivals if times[name] <= reach or name == chosen.impl] if chosen.eager_ms else []
        contenders = list(dict.fromkeys([API, *([PLAIN] if plain is not None else []), chosen.impl, *alive]))
        calls, eager = calls_back_to_back(watch, times, contenders, seconds)
    eager_ms = {name: statistics.median(one) for name, one in eager.items()}
    best, best_eager = min(rivals, key=times.get), min([chosen.impl, *alive], key=eager_ms.get)
    row = {
        "status": "ok",
        "choice": chosen.impl,
        "choice_in_compile": chosen.compiled,
        "best": best_eager,
        "best_in_compile": best,
        "choose_seconds": choose_s,
        "seconds": time.perf_counter() - start,
        "ms": times,
        "mad_ms": {n: statistics.median(abs(x - times[n]) for x in one.device) for n, one in samples.items()},
        "host_ms": {n: one.host_ms for n, one in samples.items()},
        "samples_ms": {n: one.device for n, one in samples.items()},
        "host_samples_ms": {n: one.host for n, one in samples.items()},
        "eager_ms": eager_ms,
        "eager_samples_ms": eager,
        "calls_back_to_back": calls,
        "choice_ms": {"device": chosen.device_ms, "host": chosen.host_ms, "eager": chosen.eager_ms},
        "errors": errors,
        "skipped": {name: asdict(skip) for name, skip in chosen.skipped.items()},
        "tflops": {n: flops(shape, backward) / ms / 1e9 for n, ms in times.items()},
        "chosen_over_best": paired(eager, chosen.impl, best_eager),
        "compiled_over_best": paired({n: one.device for n, one in samples.items()}, chosen.compiled, best),
        "layer_us": (eager_ms[API] - eager_ms[chosen.impl]) * 1e3,
    }
    if plain is not None:
        row["chosen_over_plain"] = paired(eager, API, PLAIN)
        row["compiled_over_plain"] = paired({n: one.device for n, one in samples.items()}, chosen.compiled, PLAIN)
        row["compiled_best_over_plain"] = paired({n: one.device for n, one in samples.items()}, best, PLAIN)
    return row


def paired(samples, one, other):
    """Return the median over the rounds of the ratio of two times of the same round: drift of the clock cancels."""
    return statistics.median(a / b for a, b in zip(samples[one], samples[other], strict=True))


def violations(rows):
    """Return, for each requirement, the rows that miss it and by how much; where the best misses it too, it says so."""
    found = {name: {} for name in REQUIREMENTS}
    for name, row in rows.items():
        if row["status"] != "ok":
            found["runs and is right"][name] = f"{row['status']}: {row.get('reason')}"[:200]
            continue
        for how, key, chosen, best in (
            ("", "chosen_over_best", "choice", "best"),
            (", compiled", "compiled_over_best", "choice_in_compile", "best_in_compile"),
        ):
            if row[key] > TOLERANCE:
                text = f"{row[key]:.3f} ({row[chosen]}, best {row[best]}{how})"
                found["within 3 % of the best installed"][name + how] = text
        if row.get("compiled_over_plain", 0.0) > TOLERANCE:
            text = f"{row['compiled_over_plain']:.3f} ({row['choice_in_compile']})"
            found["never slower than plain SDPA, compiled"][name] = text
        slower = row.get("chosen_over_plain", 0.0)
        if slower > TOLERANCE:
            us = (row["eager_ms"][API] - row["eager_ms"][PLAIN]) * 1e3
            text = f"{slower:.3f}, {us:.1f} us a call ({row['choice']}; the layer itself {row['layer_us']:.1f} us)"
            found["never slower than plain SDPA, from Python"][name] = text
        shape = row["shape"]
        long = shape["head_dim"] == "128" and name.startswith("s") and int(shape["q_len"]) >= 4096
        if long and row["compiled_over_plain"] > 1.0 / GAIN:
            floor = row["compiled_best_over_plain"] > 1.0 / GAIN
            text = f"{1.0 / row['compiled_over_plain']:.3f} ({row['choice_in_compile']})"
            if floor:
                text += (
                    f"; floor: the best installed, {row['best_in_compile']}, {1 / row['compiled_best_over_plain']:.3f}"
                )
            found[f"{GAIN} x plain SDPA, heads of 128, 4k and more"][name] = text
        for what, error in row["errors"][API].items():
            limit = 2.0 * row["errors"].get(PLAIN, {}).get(what, float("inf"))
            if error > limit:
                found["error at most twice plain SDPA's"][name] = f"{error:.2e} in {what}, limit {limit:.2e}"
    return found


def layer_microseconds():
    """Return what `attention()` adds to SDPA on the host, in microseconds: tiny tensors on the CPU, in turns."""
    q = torch.randn(1, 2, 4, 8)
    calls = {
        API: lambda: attention(q, q, q, is_causal=True, impl="sdpa"),
        PLAIN: lambda: scaled_dot_product_attention(q, q, q, is_causal=True),
    }
    watch = Stopwatch(calls, torch.device("cpu"))
    times = watch.back_to_back(list(calls), calls=1000, rounds=11)
    return statistics.median((a - b) * 1e3 for a, b in zip(times[API], times[PLAIN], strict=True))


def compile_first(device, processes):
    """Let FlashAttention-4 compile for each group of shapes, in processes that share its disk cache."""
    os.environ["FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"] = "1"
    if device.type != "cuda" or find_spec("flash_attn") is None or processes < 1:
        return
    command = [sys.executable, __file__, *sys.argv[1:], "--compile-part"]
    workers = [subprocess.Popen([*command, f"{n}/{processes}"]) for n in range(1, processes + 1)]
    for worker in workers:
        worker.wait(300)


def compile_part(shapes, device, part):
    """Compile what the I-th of N processes is to compile: each group's shortest shape, forward and backward."""
    index, count = map(int, part.split("/"))
    first = {}
    for named in shapes:
        first.setdefault(group(named) if named in GRID else named.name, named)
    for named in list(first.values())[index - 1 :: count]:
        skip = unsupported("fa4", named.shape, device, backward=True)
        if skip is not None:
            print(f"{named.name}: {skip.reason}"[:300])


def environment(device):
    spec = detect(str(device))
    return {"device": spec.key, "name": spec.name, "software": {**spec.software, **choice.software(device)}}


def write(path, document):
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(document, indent=1))
    temporary.replace(path)


def summarize(document):
    rows = document["rows"]
    good = {name: row for name, row in rows.items() if row["status"] == "ok"}
    lines = {}
    for name, row in good.items():
        lengths, _, rest = name.partition(" ") if name.startswith("s") and name[1].isdigit() else ("", "", name)
        fast = f"{row['choice_in_compile']} {row['tflops'][row['choice_in_compile']]:.0f}"
        gain = row.get("compiled_over_plain")
        lines.setdefault(rest, []).append(f"{lengths} {fast}" + (f" x{1 / gain:.2f}" if gain else ""))
    print("shape: length choice TFLOP/s xspeed-up over plain SDPA (device time)")
    for rest, cells in lines.items():
        print(f"{rest}: {' | '.join(cells)}")
    for key in ("chosen_over_best", "compiled_over_best", "chosen_over_plain", "compiled_over_plain"):
        values = {name: row[key] for name, row in good.items() if key in row}
        if values:
            worst = max(values, key=values.get)
            mean = math.exp(statistics.fmean(math.log(v) for v in values.values()))
            print(f"{key}: geometric mean {mean:.3f}, worst {values[worst]:.3f} ({worst}), n={len(values)}")
    ratios = [
        row["errors"][API]["the output"] / row["errors"][PLAIN]["the output"]
        for row in good.values()
        if PLAIN in row["errors"] and row["errors"][PLAIN]["the output"] > 0
    ]
    if ratios:
        print(f"error of the choice over that of plain SDPA, against float64: largest {max(ratios):.2f}")
    print(f"attention() adds {document['layer_us']:.1f} us to SDPA on the host")
    print("--- requirements: rows that miss them ---")
    for requirement, missed in document["violations"].items():
        print(f"{requirement}: {len(missed)} of {len(rows)}")
        for name, text in missed.items():
            print(f"    {name}: {text}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument(
        "--quick", action="store_true", help="2048 and 8192 tokens, heads of 128, and the awkward shapes"
    )
    parser.add_argument("--part", default="1/1", help="I/N: the I-th of N parts")
    parser.add_argument("--seconds", type=float, default=0.25, help="of timing for each row")
    parser.add_argument("--deadline", type=float, default=float("inf"), help="seconds after which no row is begun")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--processes", type=int, default=min(12, os.cpu_count() or 1), help="that compile first; 0: none"
    )
    parser.add_argument("--compile-part", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    shapes = [*GRID, *AWKWARD]
    if arguments.quick:
        shapes = [n for n in GRID if n.shape.head_dim == 128 and n.shape.q_len in (2048, 8192)] + list(AWKWARD)
    if device.type == "cpu":
        shapes = [small(named) for named in shapes]
    part, parts = map(int, arguments.part.split("/"))
    groups = list(dict.fromkeys(map(group, shapes)))
    shapes = [named for named in shapes if groups.index(group(named)) % parts == part - 1]
    if arguments.compile_part:
        compile_part(shapes, device, arguments.compile_part)
        return
    start = time.monotonic()
    compile_first(device, arguments.processes)
    print(f"compiled in {time.monotonic() - start:.0f} s", flush=True)
    document = {"environment": environment(device), "rows": {}}
    if arguments.output.exists():
        document["rows"] = json.loads(arguments.output.read_text())["rows"]
    with tempfile.TemporaryDirectory() as cache:
        os.environ["KERNEL_PYTORCH_CACHE"] = cache
        for named in shapes:
            for backward in (False, True):
                name = f"{named.name} {'fwd+bwd' if backward else 'fwd'}"
                if "eager_ms" in document["rows"].get(name, {}):
                    continue
                if time.monotonic() - start > arguments.deadline:
                    document["rows"][name] = {"status": "late", "reason": "the deadline was over"}
                    continue
                try:
                    row = measure(named, device, backward, arguments.seconds)
                except Exception as error:
                    row = {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
                    row["traceback"] = traceback.format_exc()
                document["rows"][name] = row | {"shape": {k: str(v) for k, v in asdict(named.shape).items()}}
                document["seconds"] = time.monotonic() - start
                write(arguments.output, document)
    document["layer_us"] = layer_microseconds()
    document["violations"] = violations(document["rows"])
    write(arguments.output, document)
    summarize(document)
    print(f"{time.monotonic() - start:.0f} s, {len(document['rows'])} rows in {arguments.output}")


if __name__ == "__main__":
    main()
