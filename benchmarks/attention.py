"""Every implementation of attention beside plain SDPA, and the choice that is made with an empty cache.

    python benchmarks/attention.py -o benchmarks/results/DEVICE/attention.json [--quick] [--part 1/2]

For each shape, forward alone and with backward: the choice is made first, in a cache of its own that begins empty. Then
its error and that of plain `scaled_dot_product_attention` are taken against float64 on a sample of the rows, and only
if it is right are all timed, on samples other than those that made the choice. `--part I/N` takes every N-th group of
shapes (one head size, grouping and mask: what the packages compile for). Rows already in the output file are kept.
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
from kernel_pytorch.attention.timing import time_in_turns
from kernel_pytorch.hardware import detect

PLAIN, API = "plain SDPA", "attention()"
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
            return {"status": "wrong", "errors": errors, "choice": chosen.impl}
        runs = {API: public_call}
        if plain is not None:
            runs[PLAIN] = plain
        for name, one in implementations().items():
            by_name_only = name == "fa3_fp8" and unsupported(name, shape, device, backward=backward) is None
            if name in chosen.device_ms or name == chosen.impl or by_name_only:
                runs[name] = lambda c, one=one: c.run(one)
        weight = torch.randn_like(public_call(case)) if backward else None
        samples = time_in_turns(
            {name: job(case, run, weight) for name, run in runs.items()}, device, max_seconds=seconds
        )
    times = {name: one.device_ms for name, one in samples.items()}
    eager = {name: max(one.device_ms, one.host_ms) for name, one in samples.items()}
    rivals = [name for name in times if name in chosen.device_ms] or [chosen.impl]
    row = {
        "status": "ok",
        "choice": chosen.impl,
        "choice_in_compile": chosen.compiled,
        "choose_seconds": choose_s,
        "ms": times,
        "mad_ms": {n: statistics.median(abs(x - times[n]) for x in one.device) for n, one in samples.items()},
        "host_ms": {n: one.host_ms for n, one in samples.items()},
        "samples_ms": {n: one.device for n, one in samples.items()},
        "host_samples_ms": {n: one.host for n, one in samples.items()},
        "errors": errors,
        "skipped": {name: asdict(skip) for name, skip in chosen.skipped.items()},
        "tflops": {n: flops(shape, backward) / ms / 1e9 for n, ms in times.items()},
        "chosen_over_best": min(eager[API], eager[chosen.impl]) / min(eager[n] for n in rivals),
        "compiled_over_best": times[chosen.compiled] / min(times[n] for n in rivals),
    }
    if plain is not None:
        row["chosen_over_plain"] = eager[API] / eager[PLAIN]
        row["compiled_over_plain"] = times[chosen.compiled] / times[PLAIN]
    return row


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


def summarize(rows):
    good = {name: row for name, row in rows.items() if row["status"] == "ok"}
    for name, row in rows.items():
        if row["status"] != "ok":
            print(f"{row['status'].upper():6} {name}: {row.get('reason') or row.get('errors')}"[:300])
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
    slower = [name for name, row in good.items() if row.get("compiled_over_plain", 0) > 1.03]
    print(f"slower than plain SDPA by over 3 %: {len(slower)} of {len(good)} {slower[:6]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument(
        "--quick", action="store_true", help="2048 and 8192 tokens, heads of 128, and the awkward shapes"
    )
    parser.add_argument("--part", default="1/1", help="I/N: the I-th of N parts")
    parser.add_argument("--seconds", type=float, default=0.35, help="of timing for each row")
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
                if document["rows"].get(name, {}).get("status") == "ok":
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
    write(arguments.output, document)
    summarize(document["rows"])
    print(f"{time.monotonic() - start:.0f} s, {len(document['rows'])} rows in {arguments.output}")


if __name__ == "__main__":
    main()
