"""What `benchmarks/kernels.py` measures: an operation at a shape, who computes it, and the least bytes it moves.

A further module `kernel_cases_*.py` beside this one with a list `CASES` is measured as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F  # noqa: N812

if TYPE_CHECKING:
    from kernel_pytorch._triton.launch import Launch

Tensors = Sequence[torch.Tensor]
Inputs = Mapping[str, torch.Tensor]
Phases = Mapping[str, Callable[[], Tensors]]
"""By phase (`forward`, `backward`): runs it once more, and returns what it computed."""


@dataclass(frozen=True, slots=True)
class Case:
    """One operation at one shape.

    Attributes:
        op: Name, for `--only`.
        label: Shape and dtype, for people.
        make: Returns fresh random inputs on a device; each variant gets its own.
        oracle: Returns the results of each phase from the inputs in fp64.
        variants: Returns the phases of a variant on given inputs, by the variant's name; raises `ImportError` where
            its package is absent. `ours` is compared with the others.
        bytes: Least traffic of each phase.
        tolerance: Allowed `||got - want|| / ||want||` of each result.
        tunings: Returns phases like a variant, by the phase and a name for the launch, for `--tune`.
        comparable: Whether what a tuning returns begins with what the oracle does.
    """

    op: str
    label: str
    make: Callable[[torch.device], Inputs]
    oracle: Callable[[Inputs], Mapping[str, Tensors]]
    variants: Mapping[str, Callable[[Inputs], Phases]]
    bytes: Mapping[str, int]
    tolerance: float = 6e-3
    tunings: Mapping[tuple[str, str], Callable[[Inputs], Callable[[], Any]]] = field(default_factory=dict)
    comparable: bool = False


def differentiable(fn: Callable[..., Any], leaves: Tensors, grads: Tensors, others: Tensors = ()) -> Phases:
    """Return forward and backward of `fn(*leaves, *others)`; backward runs on one graph, again and again."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]

    def forward() -> Tensors:
        out = fn(*leaves, *others)
        return out if isinstance(out, tuple) else (out,)

    graph: list[Tensors] = []

    def backward() -> Tensors:
        if not graph:
            graph.append(forward())
        return torch.autograd.grad(graph[0], leaves, grads, retain_graph=True)

    return {"forward": forward, "backward": backward}


def exact(fn: Callable[..., Any], leaves: Tensors, grads: Tensors, others: Tensors = ()) -> Mapping[str, Tensors]:
    """Return the results of both phases in fp64."""
    phases = differentiable(fn, [x.double() for x in leaves], [g.double() for g in grads], [o.double() for o in others])
    return {name: [t.detach() for t in run()] for name, run in phases.items()}


def compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return the definition as `torch.compile` makes it fast, for these shapes alone."""
    backend = "inductor" if torch.cuda.is_available() else "aot_eager"
    return torch.compile(fn, dynamic=False, fullgraph=True, backend=backend)


def _random(device: torch.device, dtype: torch.dtype, **shapes: Sequence[int]) -> dict[str, torch.Tensor]:
    return {name: torch.randn(*shape, device=device, dtype=torch.float32).to(dtype) for name, shape in shapes.items()}


def _pick(inputs: Inputs, *names: str) -> list[torch.Tensor]:
    return [inputs[name] for name in names]


# --- RMSNorm ---------------------------------------------------------------------------------------------------------


def _llama_rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Hugging Face's `LlamaRMSNorm.forward`."""
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * wide.to(x.dtype)


def _liger_rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(x, weight, 1e-6, 0.0, "llama", False)


def _quack_rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    from quack.rmsnorm import rmsnorm

    return rmsnorm(x, weight, eps=1e-6)


def rms_norm_case(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    from kernel_pytorch.ops.rms_norm import rms_norm
    from kernel_pytorch.ops.rms_norm.reference import rms_norm_reference

    def on(fn: Callable[..., Any], *, warm: Callable[..., Any] | None = None) -> Callable[[Inputs], Phases]:
        def phases(inputs: Inputs) -> Phases:
            if warm is not None:
                warm()
            return differentiable(fn, _pick(inputs, "x", "weight"), _pick(inputs, "dy"))

        return phases

    def definition(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rms_norm_reference(x, weight, 1e-6)[0]

    unit = rows * columns * dtype.itemsize
    return Case(
        op="rms_norm",
        label=_label(rows, columns, dtype),
        make=lambda device: _random(device, dtype, x=(rows, columns), weight=(columns,), dy=(rows, columns)),
        oracle=lambda inputs: exact(definition, _pick(inputs, "x", "weight"), _pick(inputs, "dy")),
        variants={
            "ours": on(lambda x, w: rms_norm(x, w, 1e-6, impl="triton")),
            "eager": on(lambda x, w: F.rms_norm(x, (columns,), w, 1e-6)),
            "eager HF": on(_llama_rms_norm),
            "compile": on(compiled(definition)),
            "liger": on(_liger_rms_norm),
            "quack": on(_quack_rms_norm),
        },
        bytes={"forward": 2 * unit, "backward": 3 * unit},
        tunings=_norm_tunings("rms_norm", columns),
        comparable=True,
    )


def add_rms_norm_case(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    from kernel_pytorch.ops.rms_norm import rms_norm
    from kernel_pytorch.ops.rms_norm.reference import rms_norm_reference

    def definition(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return rms_norm_reference(x, weight, 1e-6, residual)

    def eager(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = x + residual
        return F.rms_norm(h, (columns,), weight, 1e-6), h

    def liger(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

        return LigerFusedAddRMSNormFunction.apply(x, residual, weight, 1e-6, 0.0, "llama", False)

    def on(fn: Callable[..., Any]) -> Callable[[Inputs], Phases]:
        return lambda inputs: differentiable(fn, _pick(inputs, "x", "weight", "residual"), _pick(inputs, "dy", "dh"))

    unit = rows * columns * dtype.itemsize
    shapes = dict.fromkeys(("x", "residual", "dy", "dh"), (rows, columns)) | {"weight": (columns,)}
    return Case(
        op="add_rms_norm",
        label=_label(rows, columns, dtype),
        make=lambda device: _random(device, dtype, **shapes),
        oracle=lambda inputs: exact(definition, _pick(inputs, "x", "weight", "residual"), _pick(inputs, "dy", "dh")),
        variants={
            "ours": on(lambda x, w, r: rms_norm(x, w, 1e-6, r, impl="triton")),
            "eager": on(eager),
            "compile": on(compiled(definition)),
            "liger": on(liger),
        },
        bytes={"forward": 4 * unit, "backward": 4 * unit},
        tunings=_norm_tunings("add_rms_norm", columns),
        comparable=True,
    )


# --- LayerNorm -------------------------------------------------------------------------------------------------------


def layer_norm_case(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    from kernel_pytorch.ops.layer_norm import layer_norm
    from kernel_pytorch.ops.layer_norm.reference import layer_norm_reference

    def definition(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return layer_norm_reference(x, weight, bias, 1e-5)[0]

    def liger(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction

        return LigerLayerNormFunction.apply(x, weight, bias, 1e-5)

    def on(fn: Callable[..., Any]) -> Callable[[Inputs], Phases]:
        return lambda inputs: differentiable(fn, _pick(inputs, "x", "weight", "bias"), _pick(inputs, "dy"))

    unit = rows * columns * dtype.itemsize
    shapes = dict.fromkeys(("x", "dy"), (rows, columns)) | dict.fromkeys(("weight", "bias"), (columns,))
    return Case(
        op="layer_norm",
        label=_label(rows, columns, dtype),
        make=lambda device: _random(device, dtype, **shapes),
        oracle=lambda inputs: exact(definition, _pick(inputs, "x", "weight", "bias"), _pick(inputs, "dy")),
        variants={
            "ours": on(lambda x, w, b: layer_norm(x, w, b, 1e-5, impl="triton")),
            "eager": on(lambda x, w, b: F.layer_norm(x, (columns,), w, b, 1e-5)),
            "compile": on(compiled(definition)),
            "liger": on(liger),
        },
        bytes={"forward": 2 * unit, "backward": 3 * unit},
        tunings=_norm_tunings("layer_norm", columns),
        comparable=True,
    )


def _launches(op: str, columns: int) -> dict[str, list[Launch]]:
    """Return, by phase, the launches worth comparing for bfloat16 rows of `columns` elements, today's first."""
    from dataclasses import replace

    from kernel_pytorch._triton.launch import looping_launch, tile_launch

    tile = tile_launch(columns)
    loop = looping_launch(columns, 6 if op == "add_rms_norm" else 4, 227 << 10)
    wider = [replace(launch, warps=2 * launch.warps) for launch in (tile, loop)]
    return {"forward": [tile, wider[0]], "backward": [loop, wider[1], replace(loop, stages=7 - loop.stages)]}


def _norm_tunings(op: str, columns: int) -> dict[tuple[str, str], Callable[[Inputs], Callable[[], Any]]]:
    tunings: dict[tuple[str, str], Callable[[Inputs], Callable[[], Any]]] = {}

    def calls(launch: Launch, phase: str) -> Callable[[Inputs], Callable[[], Any]]:
        def build(inputs: Inputs) -> Callable[[], Any]:
            import importlib

            name = op.removeprefix("add_")
            kernel = importlib.import_module(f"kernel_pytorch.ops.{name}.{name}_kernel")
            x, weight, dy, residual, dh = (inputs.get(k) for k in ("x", "weight", "dy", "residual", "dh"))
            if name == "rms_norm":
                options: dict[str, Any] = {"round_before_weight": False, "dtype": x.dtype}
                if phase == "forward":
                    return lambda: kernel.forward(x, weight, residual, 1e-6, 0.0, launch=launch, **options)
                _, h, rstd = kernel.forward(x, weight, residual, 1e-6, 0.0, **options)
                return lambda: kernel.backward(dy, h, weight, rstd, dh, 0.0, launch=launch)
            bias = inputs["bias"]
            if phase == "forward":
                return lambda: kernel.forward(x, weight, bias, None, 1e-5, launch=launch)
            _, h, mean, rstd = kernel.forward(x, weight, bias, None, 1e-5)
            return lambda: kernel.backward(dy, h, weight, mean, rstd, None, with_bias=True, launch=launch)

        return build

    for phase, launches in _launches(op, columns).items():
        for launch in launches:
            name = f"rows={launch.rows} warps={launch.warps}"
            if phase == "backward":
                name += f" per_sm={launch.per_multiprocessor} stages={launch.stages}"
            tunings[phase, name] = calls(launch, phase)
    return tunings


# --- Gated activations -----------------------------------------------------------------------------------------------


def gated_case(activation: str, rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    from kernel_pytorch.ops.gated_mlp import gated_mlp
    from kernel_pytorch.ops.gated_mlp.reference import gated_mlp_reference

    def definition(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return gated_mlp_reference(gate, up, activation)

    def eager(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        if activation == "silu":
            return F.silu(gate) * up
        return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up

    def liger(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        if activation == "silu":
            from liger_kernel.ops.swiglu import LigerSiLUMulFunction

            return LigerSiLUMulFunction.apply(gate, up)
        from liger_kernel.ops.geglu import LigerGELUMulFunction

        return LigerGELUMulFunction.apply(gate, up)

    def on(fn: Callable[..., Any]) -> Callable[[Inputs], Phases]:
        return lambda inputs: differentiable(fn, _pick(inputs, "gate", "up"), _pick(inputs, "dy"))

    def tuning(block: int, warps: int, phase: str) -> Callable[[Inputs], Callable[[], Any]]:
        def build(inputs: Inputs) -> Callable[[], Any]:
            from kernel_pytorch.ops.gated_mlp import gated_mlp_kernel as kernel

            gate, up, dy = _pick(inputs, "gate", "up", "dy")
            tile = kernel.Tile(block, warps)
            if phase == "forward":
                return lambda: kernel.forward(gate, up, activation, tile=tile)
            return lambda: kernel.backward(dy, gate, up, activation, tile=tile)

        return build

    unit = rows * columns * dtype.itemsize
    return Case(
        op={"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh"}[activation],
        label=_label(rows, columns, dtype),
        make=lambda device: _random(device, dtype, **dict.fromkeys(("gate", "up", "dy"), (rows, columns))),
        oracle=lambda inputs: exact(definition, _pick(inputs, "gate", "up"), _pick(inputs, "dy")),
        variants={
            "ours": on(lambda g, u: gated_mlp(g, u, activation, impl="triton")),
            "eager": on(eager),
            "compile": on(compiled(definition)),
            **({"liger": on(liger)} if activation != "gelu" else {}),
        },
        bytes={"forward": 3 * unit, "backward": 5 * unit},
        tolerance=8e-3,
        tunings={
            (phase, f"block={block} warps={warps}"): tuning(block, warps, phase)
            for phase in ("forward", "backward")
            for block, warps in ((1024, 4), (2048, 4), (2048, 8), (4096, 4), (4096, 8), (8192, 8), (8192, 16))
        },
    )


# --- Rotary embedding ------------------------------------------------------------------------------------------------


def _rotate_half(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def rope_case(
    batch: int, q_heads: int, k_heads: int, positions: int, d: int, dtype: torch.dtype = torch.bfloat16
) -> Case:
    from kernel_pytorch.ops.rope import rope
    from kernel_pytorch.ops.rope.reference import rope_reference

    names = ("q", "k", "cos", "sin")

    def make(device: torch.device) -> Inputs:
        q, k = (batch, positions, q_heads, d), (batch, positions, k_heads, d)
        inputs = _random(device, dtype, q=q, k=k, dq=q, dk=k)
        turns = torch.outer(torch.arange(positions), 1.0 / 5e5 ** (torch.arange(0, d, 2) / d))
        # As projections give them: views [batch, heads, sequence, d] of [batch, sequence, heads, d].
        heads_first = {name: x.transpose(1, 2) for name, x in inputs.items()}
        return heads_first | {"cos": turns.cos().to(device, dtype), "sin": turns.sin().to(device, dtype)}

    def definition(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        return rope_reference(q, k, cos, sin, layout="bhsd", interleaved=False)

    def eager(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
        return q * cos + _rotate_half(q) * sin, k * cos + _rotate_half(k) * sin

    def liger(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        from liger_kernel.ops.rope import LigerRopeFunction

        cos, sin = torch.cat([cos, cos], -1)[None], torch.cat([sin, sin], -1)[None]
        return LigerRopeFunction.apply(q.clone(), k.clone(), cos, sin)  # it writes into its inputs

    def on(fn: Callable[..., Any]) -> Callable[[Inputs], Phases]:
        return lambda inputs: differentiable(
            fn, _pick(inputs, "q", "k"), _pick(inputs, "dq", "dk"), _pick(inputs, "cos", "sin")
        )

    def tuning(warps: int) -> Callable[[Inputs], Callable[[], Any]]:
        def build(inputs: Inputs) -> Callable[[], Any]:
            from kernel_pytorch.ops.rope import rope_kernel as kernel

            tensors = _pick(inputs, *names)
            return lambda: kernel.rotate(*tensors, layout="bhsd", interleaved=False, inverse=False, warps=warps)

        return build

    unit = batch * positions * (q_heads + k_heads) * d * dtype.itemsize
    return Case(
        op="rope",
        label=f"{batch}x{positions} {q_heads}/{k_heads}x{d} {str(dtype).removeprefix('torch.')}",
        make=make,
        oracle=lambda inputs: exact(
            definition, _pick(inputs, "q", "k"), _pick(inputs, "dq", "dk"), _pick(inputs, "cos", "sin")
        ),
        variants={
            "ours": on(lambda *a: rope(*a, impl="triton")),
            "eager HF": on(eager),
            "compile": on(compiled(definition)),
            "liger": on(liger),
        },
        bytes={"forward": 2 * unit, "backward": 2 * unit},
        tunings={("forward", f"warps={warps}"): tuning(warps) for warps in (1, 2, 4, 8)},
    )


def _label(rows: int, columns: int, dtype: torch.dtype) -> str:
    return f"{rows}x{columns} {str(dtype).removeprefix('torch.')}"


def cases(*, smoke: bool = False) -> list[Case]:
    """Return the cases; small ones for a machine without a GPU."""
    if smoke:
        return [
            rms_norm_case(6, 64),
            add_rms_norm_case(6, 64),
            layer_norm_case(6, 64),
            gated_case("silu", 6, 64),
            gated_case("gelu_tanh", 6, 64),
            rope_case(1, 2, 1, 3, 16),
        ]
    return [
        rms_norm_case(16384, 4096),
        gated_case("silu", 16384, 14336),
        rope_case(4, 32, 8, 4096, 128),
        layer_norm_case(16384, 4096),
        add_rms_norm_case(16384, 4096),
        gated_case("gelu_tanh", 16384, 14336),
        rms_norm_case(8192, 8192),
        layer_norm_case(2048, 768),
        rms_norm_case(2048, 768),
        rms_norm_case(16384, 14336),
        add_rms_norm_case(8192, 8192),
        layer_norm_case(8192, 8192),
        rope_case(1, 64, 8, 8192, 128),
        gated_case("gelu", 16384, 4096),
        layer_norm_case(16384, 768),
        rms_norm_case(16384, 768),
        rms_norm_case(16384, 2048),
        rms_norm_case(16384, 5120),
        layer_norm_case(16384, 5120),
        rms_norm_case(8192, 4096),
    ]
