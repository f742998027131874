"""What a step costs where: TPU slices by their compiler and a roofline, an H100 by its data sheet, an H200 as measured.

    TORCH_DEVICE_BACKEND_AUTOLOAD=0 python benchmarks/tpu_cost.py [--price v5e=1.20 --price v5p=4.20 --price gpu=10.0]

The job is the side-by-side harness's: eight layers of Llama-3-8B's shape, 128,256 words, sequences of 4,096 tokens, all
in bfloat16, AdamW. A TPU's time is a prediction (peak rates, everything overlapping in the lower figure, nothing in
the upper), and so is the H100's; the H200's is the committed measurement. `at_measured_utilisation` supposes of every
device that it reaches the share of its peak that the H200 did under `torch.compile`. Prices are assumptions of this
table, in dollars per chip and hour: give those of your region and contract. What is in FILE is not compiled again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from kernel_pytorch.backends.tpu.topology import parse_topology
from kernel_pytorch.core.types import Candidate, Mode, Step
from kernel_pytorch.fit.build import Build
from kernel_pytorch.fit.local import fit_local
from kernel_pytorch.fit.roofline import predict_step
from kernel_pytorch.fit.tpu import fit_tpu
from kernel_pytorch.hardware.tpu.specs import CHIPS
from kernel_pytorch.report.fit import fit_data

HERE = Path(__file__).resolve().parent
OUT = HERE / "results" / "tpu-ahead" / "cost.json"
MEASURED = HERE / "results" / "nvidia-sm_90-1" / "llama_step_peers.json"
LENGTH = 4096
GPU_BATCH = 4
GPU_FLOPS, H100_BANDWIDTH = 989.5e12, 3.35e12
"""Dense bfloat16 and bytes a second, of NVIDIA's H100 SXM data sheet; an H200 computes at the same rate."""
PRICES = {"v5e": 1.20, "v5p": 4.20, "gpu": 10.0}

SLICES = {"v5e-16": ("v5e:4x4", 16), "v5p-8": ("v5p:2x2x1", 8)}
"""By the name one asks Google for: a v5e slice is named by its chips, a v5p slice by its cores, two a chip."""

CANDIDATE = Candidate(
    (
        Step("causal_mask"),
        Step("chunked_attention", {"rows": 2048}),
        Step("chunked_loss", {"rows": 4096, "spread": True}),
        Step("shard", {"parameters": "sharded", "rows": "LlamaDecoderLayer"}),
    )
)
"""What fits both slices with no block computed twice."""


def build_of(batch: int, candidate: Candidate) -> Build:
    return Build(f"{HERE / 'tpu_models.py'}:llama_of_8b", Mode.TRAINING, batch=batch, candidate=candidate)


def dollars(seconds: float, chips: int, price: float, tokens: int) -> float:
    """Return dollars for a million tokens."""
    return seconds * chips * price / 3600 / tokens * 1e6


def compiled(name: str) -> dict[str, Any]:
    """Return the compiler's answer for a slice."""
    topology, batch = SLICES[name]
    data = fit_data(fit_tpu(build_of(batch, CANDIDATE), parse_topology(topology), name=name))
    data["buffers"], data["modules"] = [], data["modules"][:8]
    return data


def predicted(name: str, fit: dict[str, Any], price: float, flops_a_token: float, utilisation: float) -> dict[str, Any]:
    """Return the compiler's answer for a slice, and what follows from it."""
    topology, batch = SLICES[name]
    where = parse_topology(topology)
    row: dict[str, Any] = {"batch": batch, "chips": where.chips, "price_chip_hour": price, "fit": fit}
    if fit["prediction"] is not None:
        tokens = batch * LENGTH
        times = [fit["prediction"]["step_s"], fit["prediction"]["serial_s"]]
        row["dollars_per_million_tokens"] = [dollars(t, where.chips, price, tokens) for t in times]
        row["tokens_per_s"] = [tokens / t for t in times]
        supposed = flops_a_token * tokens / where.chips / CHIPS[where.generation].bf16_flops / utilisation
        row["at_measured_utilisation"] = {
            "step_s": supposed,
            "tokens_per_s": tokens / supposed,
            "dollars_per_million_tokens": dollars(supposed, where.chips, price, tokens),
        }
    return row


def estimated(price: float) -> dict[str, Any]:
    """Return the roofline of the unmodified step on one H100, its causal masks told to attention."""
    fit = fit_local(build_of(GPU_BATCH, Candidate((Step("causal_mask"),))), "cuda", measure=False)
    best = predict_step(
        flops=fit.flops,
        bytes_accessed=fit.bytes_accessed,
        peak_flops=GPU_FLOPS,
        bandwidth_bytes_per_s=H100_BANDWIDTH,
    )
    assert best is not None
    times, tokens = [best.step_s, best.serial_s], GPU_BATCH * LENGTH
    return {
        "device": "NVIDIA H100 SXM",
        "batch": GPU_BATCH,
        "price_chip_hour": price,
        "flops": fit.flops,
        "peak_bytes": fit.peak_bytes,
        "label": best.label,
        "step_s": times,
        "tokens_per_s": [tokens / t for t in times],
        "dollars_per_million_tokens": [dollars(t, 1, price, tokens) for t in times],
    }


def measured(price: float, flops: int) -> dict[str, Any]:
    """Return what the harness measured on one H200, batch 4."""
    found = json.loads(MEASURED.read_text())
    rows = {}
    for name in ("eager", "compile_causal", "ours"):
        seconds, rate = found["variants"][name]["ms"] / 1e3, found["variants"][name]["tokens_per_s"]
        rows[name] = {
            "ms": seconds * 1e3,
            "tokens_per_s": rate,
            "dollars_per_million_tokens": price / 3600 / rate * 1e6,
            "utilisation": flops / seconds / GPU_FLOPS,
        }
    source = MEASURED.relative_to(HERE.parent).as_posix()
    return {"device": found["ratios"]["device"], "source": source, "price_chip_hour": price, "variants": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--price", action="append", default=[], metavar="CHIP=DOLLARS", help="an hour of a chip")
    parser.add_argument("--only", choices=SLICES, action="append", help="slices to compile again")
    parser.add_argument("-o", "--output", type=Path, default=OUT)
    options = parser.parse_args()
    prices = PRICES | {k: float(v) for k, v in (text.split("=") for text in options.price)}
    found = json.loads(options.output.read_text()) if options.output.exists() else {"slices": {}}
    found["estimated"] = estimated(prices["gpu"])
    flops = found["estimated"]["flops"]
    found["measured"] = measured(prices["gpu"], flops)
    utilisation = found["measured"]["variants"]["compile_causal"]["utilisation"]
    for name, (topology, _) in SLICES.items():
        began = time.perf_counter()
        known = found["slices"].get(name)
        fit = known["fit"] if known and name not in (options.only or ()) else compiled(name)
        price = prices[topology.partition(":")[0]]
        found["slices"][name] = predicted(name, fit, price, flops / (GPU_BATCH * LENGTH), utilisation)
        print(name, fit["headline"], round(time.perf_counter() - began), "s", flush=True)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
