"""Does the error of a bfloat16 model vanish when it is averaged over jittered inputs, so that what remains is a bug?

The error of rounded activations does; that of rounded weights is the same in every call. MiniLM with its real weights,
embeddings jittered by 5 %: the error of a plain cast and of one with a wrong epsilon, alone and averaged.

    python benchmarks/jitter_averaging.py -o benchmarks/results/DEVICE/jitter_averaging.json
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import minilm

from kernel_pytorch.hardware import detect

JITTER = 0.05
WRONG_EPS = 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("-n", "--draws", type=int, default=32)
    args = parser.parse_args()
    workload = minilm.workload()
    model, call = workload.model().eval(), workload.call("main", 0)
    ids, mask = (call.kwargs[k][:4] for k in ("input_ids", "attention_mask"))
    wrong = copy.deepcopy(model)
    for layer in wrong.encoder.layer:
        layer.attention.output.LayerNorm.eps = WRONG_EPS
    exact = copy.deepcopy(model).double()
    low = {"cast": copy.deepcopy(model).bfloat16(), "wrong_epsilon": wrong.bfloat16()}

    def run(which: nn.Module, embedded: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return which(inputs_embeds=embedded, attention_mask=mask)[0].double()

    embedded = model.get_input_embeddings()(ids).detach()
    made = torch.Generator().manual_seed(0)
    total = torch.zeros(())
    off = {name: torch.zeros(()) for name in low}
    rows = []
    for n in range(1, args.draws + 1):
        x = embedded + JITTER * embedded.std() * torch.randn(embedded.shape, generator=made)
        want = run(exact, x.double())
        total = total + want
        row: dict[str, float] = {"draws": n}
        for name, candidate in low.items():
            error = run(candidate, x.bfloat16()) - want
            off[name] = off[name] + error
            row[f"{name}_one"] = float(error.norm() / want.norm())
            row[f"{name}_averaged"] = float(off[name].norm() / total.norm())
        rows.append(row)
    artefact = {"device": detect("cpu").key, "jitter": JITTER, "wrong_eps": WRONG_EPS, "last": rows[-1], "rows": rows}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(artefact, indent=1) + "\n")
    print(json.dumps(rows[-1], indent=1))


if __name__ == "__main__":
    main()
