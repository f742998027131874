"""Every transform, in the order in which the steps of a candidate are applied."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from kernel_pytorch.advanced_memory.attention_chunks import ChunkedAttention
from kernel_pytorch.advanced_memory.chunked_head import ChunkedHead
from kernel_pytorch.advanced_memory.recompute_blocks import RecomputeBlocks
from kernel_pytorch.advanced_memory.scan_layers import ScanLayers
from kernel_pytorch.advanced_memory.shard import Shard
from kernel_pytorch.core.protocols import Program, Transform
from kernel_pytorch.core.types import Candidate
from kernel_pytorch.errors import CandidateError
from kernel_pytorch.transforms.adamw import AdamW
from kernel_pytorch.transforms.aoti import Aoti
from kernel_pytorch.transforms.attention import Attention
from kernel_pytorch.transforms.bucketing import Bucketing
from kernel_pytorch.transforms.causal_mask import CausalMask
from kernel_pytorch.transforms.channels_last import ChannelsLast
from kernel_pytorch.transforms.compile import Compile
from kernel_pytorch.transforms.cuda_graph import CudaGraph
from kernel_pytorch.transforms.dtype import Dtype
from kernel_pytorch.transforms.float8 import Float8
from kernel_pytorch.transforms.fused_optimizer import FusedOptimizer
from kernel_pytorch.transforms.int8_eager import Int8Eager
from kernel_pytorch.transforms.kernel_swap import KernelSwap
from kernel_pytorch.transforms.linear_algorithm import LinearAlgorithm
from kernel_pytorch.transforms.loss_head import LossHead
from kernel_pytorch.transforms.precision_policy import PrecisionPolicy
from kernel_pytorch.transforms.prepack import Prepack
from kernel_pytorch.transforms.quantize import Quantize
from kernel_pytorch.transforms.regional_compile import RegionalCompile
from kernel_pytorch.transforms.rope import Rope
from kernel_pytorch.transforms.splash_attention import SplashAttention
from kernel_pytorch.transforms.static_cache import StaticCache
from kernel_pytorch.transforms.threads import Threads

__all__ = ["TRANSFORMS", "apply_candidate", "find"]

TRANSFORMS: tuple[Transform, ...] = (
    # What the model computes, then in which format, then by which code, then around it all.
    StaticCache(),
    CausalMask(),
    Attention(),
    SplashAttention(),
    ChunkedAttention(),
    ChannelsLast(),
    Dtype(),
    PrecisionPolicy(),
    KernelSwap(),
    Rope(),
    Float8(),
    LinearAlgorithm(),
    LossHead(),
    ChunkedHead(),
    RecomputeBlocks(),
    ScanLayers(),
    Shard(),
    Prepack(),
    Int8Eager(),
    Quantize("int8_dynamic"),
    Quantize("int8_weight_only"),
    Quantize("int4_weight_only"),
    Quantize("float8_dynamic"),
    RegionalCompile(),
    Compile(),
    Aoti(),
    CudaGraph(),
    Bucketing(),
    AdamW(),
    FusedOptimizer(),
    Threads(),
)


def find(name: str, transforms: Sequence[Transform] = TRANSFORMS) -> Transform:
    """Return the transform of a name.

    Raises:
        CandidateError: There is none, with the names that look like it.
    """
    for transform in transforms:
        if transform.name == name:
            return transform
    names = [t.name for t in transforms]
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    raise CandidateError(
        f"no transform is called {name!r}",
        fix=f"did you mean {' or '.join(near)}?" if near else f"one of: {', '.join(names)}",
    )


def apply_candidate(program: Program, candidate: Candidate, transforms: Sequence[Transform] = TRANSFORMS) -> Program:
    """Apply the steps of a candidate in the order of the catalog and return the program.

    Args:
        program: What to apply them to.
        candidate: The steps.
        transforms: What the steps may name, in order of application.

    Raises:
        CandidateError: An unknown transform, two steps of one group, or a step that does not fit this program.
    """
    order = [t.name for t in transforms]
    steps = [(find(step.transform, transforms), step) for step in candidate.steps]
    groups = [transform.group for transform, _ in steps]
    twice = {g for g in groups if groups.count(g) > 1}
    if twice:
        raise CandidateError(f"{candidate} has more than one step of the group {', '.join(sorted(twice))}")
    for transform, step in sorted(steps, key=lambda pair: order.index(pair[0].name)):
        if program.mode not in transform.modes:
            raise CandidateError(f"{transform.name} is not for {program.mode.value}")
        program = transform.apply(program, step)
    return program
