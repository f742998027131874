"""Attention of several widths of heads on a TPU, as they are and padded to the lanes, by the compiler without a TPU.

    python benchmarks/tpu_heads.py [-o FILE]

A training step of attention alone (splash kernels, causal, bfloat16, batch 8, 12 heads, 1,024 rows) compiled for one
v5e chip: peak of memory, bytes moved and operations by PyTorch's count, or why it does not compile. The projections
around it have the same number of columns in each row.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from kernel_pytorch import Workload
from kernel_pytorch.backends.tpu.ahead import compile_lowered, lower_program
from kernel_pytorch.backends.tpu.topology import parse_topology
from kernel_pytorch.core.types import Candidate, Mode, Step
from kernel_pytorch.errors import KptError
from kernel_pytorch.fit.build import Build

OUT = Path(__file__).resolve().parent / "results" / "tpu-ahead" / "heads.json"
BATCH, HEADS, ROWS, WIDTH = 8, 12, 1024, 768
WIDTHS = ((64, 64), (80, 80), (96, 96), (128, 128), (160, 160), (192, 128), (192, 192), (256, 256))
"""Of queries and keys, and of values."""


class Attention(nn.Module):
    def __init__(self, width: int, value_width: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(WIDTH, HEADS * w, bias=False) for w in (width, width, value_width))
        self.bfloat16()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.parts)
        return scaled_dot_product_attention(q, k, v, is_causal=True)


def mean_square(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).float().square().mean()


def run(width: int, value_width: int, pad: int) -> dict[str, Any]:
    workload = Workload(
        model=partial(Attention, width, value_width),
        inputs=lambda: torch.zeros(BATCH, ROWS, WIDTH, dtype=torch.bfloat16),
        loss=mean_square,
    )
    step = Step("splash_attention", {"pad": pad} if pad else {})
    try:
        lowered = lower_program(Build(workload, Mode.TRAINING, candidate=Candidate((step,))))
        compiled = compile_lowered(lowered, parse_topology("v5e:1"), dump=False)
    except KptError as error:
        return {"compiles": False, "reason": str(error)}
    return {
        "compiles": compiled.fits,
        "kernels": lowered.stablehlo.count(b"@tpu_custom_call"),
        "peak_bytes": compiled.peak_bytes,
        "bytes_accessed": compiled.bytes_accessed,
        "flops": lowered.flops,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=OUT)
    options = parser.parse_args()
    found: dict[str, Any] = {}
    for width, value_width in WIDTHS:
        name = str(width) if width == value_width else f"{width}_{value_width}"
        found[name] = {how: run(width, value_width, pad) for how, pad in (("as_it_is", 0), ("padded", 128))}
        print(name, {how: told.get("peak_bytes", told.get("reason")) for how, told in found[name].items()}, flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"topology": "v5e:1", "widths": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
