"""What a step costs where: TPU slices by their compiler and a roofline, a Hopper GPU as measured. One table.

    python benchmarks/tpu_cost.py [--price v5e=1.20 --price v5p=4.20 --price gpu=10.0] [-o FILE]

The job is the side-by-side harness's: eight layers of Llama-3-8B's shape, 128,256 words, sequences of 4,096 tokens, all
in bfloat16, AdamW. A TPU's time is a prediction (peak rates, everything overlapping in the lower figure, nothing in
the upper); the GPU's is the committed measurement. Prices are assumptions of this table, in dollars per chip and hour:
give those of your region and contract.
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
from kernel_pytorch.fit.tpu import fit_tpu
from kernel_pytorch.report.fit import fit_data

HERE = Path(__file__).resolve().parent
OUT = HERE / "results" / "tpu-ahead" / "cost.json"
MEASURED = HERE / "results" / "nvidia-sm_90-1" / "llama_step_peers.json"
LENGTH = 4096
PRICES = {"v5e": 1.20, "v5p": 4.20, "gpu": 10.0}

SLICES = {"v5e-16": ("v5e:4x4", 16), "v5p-8": ("v5p:2x2x1", 8)}
"""By the name one asks Google for: a v5e slice is named by its chips, a v5p slice by its cores, two a chip."""

CANDIDATE = Candidate(
    (
        Step("chunked_attention", {"rows": 512}),
        Step("chunked_loss", {"rows": 4096, "spread": True}),
        Step("recompute", {"block": "LlamaDecoderLayer", "keep": "", "plain": 0, "spread": True}),
        Step("shard", {"parameters": "sharded", "rows": "LlamaDecoderLayer"}),
    )
)


def predicted(name: str, price: float) -> dict[str, Any]:
    topology, batch = SLICES[name]
    build = Build(f"{HERE / 'tpu_models.py'}:llama_of_8b", Mode.TRAINING, batch=batch, candidate=CANDIDATE)
    where = parse_topology(topology)
    fit = fit_tpu(build, where, name=name)
    data = fit_data(fit)
    data["buffers"], data["modules"] = [], data["modules"][:8]
    row: dict[str, Any] = {"batch": batch, "chips": where.chips, "price_chip_hour": price, "fit": data}
    if fit.prediction is not None:
        tokens = batch * LENGTH
        times = [fit.prediction.step_s, fit.prediction.serial_s]
        row["dollars_per_million_tokens"] = [t * where.chips * price / 3600 / tokens * 1e6 for t in times]
        row["tokens_per_s"] = [tokens / t for t in times]
    return row


def measured(price: float) -> dict[str, Any]:
    """Return what the harness measured on one H200, batch 4."""
    found = json.loads(MEASURED.read_text())
    rows = {}
    for name in ("eager", "compile_causal", "ours"):
        rate = found["variants"][name]["tokens_per_s"]
        dollars = price / 3600 / rate * 1e6
        rows[name] = {
            "ms": found["variants"][name]["ms"], "tokens_per_s": rate, "dollars_per_million_tokens": dollars,
        }  # fmt: skip
    source = MEASURED.relative_to(HERE.parent).as_posix()
    return {"device": found["ratios"]["device"], "source": source, "price_chip_hour": price, "variants": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--price", action="append", default=[], metavar="CHIP=DOLLARS", help="an hour of a chip")
    parser.add_argument("--only", choices=SLICES, action="append")
    parser.add_argument("-o", "--output", type=Path, default=OUT)
    options = parser.parse_args()
    prices = PRICES | {k: float(v) for k, v in (text.split("=") for text in options.price)}
    found = json.loads(options.output.read_text()) if options.output.exists() else {"slices": {}}
    found["measured"] = measured(prices["gpu"])
    for name, (topology, _) in SLICES.items():
        if options.only and name not in options.only:
            continue
        began = time.perf_counter()
        found["slices"][name] = predicted(name, prices[topology.partition(":")[0]])
        print(name, found["slices"][name]["fit"]["headline"], round(time.perf_counter() - began), "s", flush=True)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
