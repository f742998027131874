"""Names of kernels and operators that stay the same from one run and one release to the next, and their classes."""

from __future__ import annotations

import collections
import re
from collections.abc import Mapping

from kernel_pytorch.guard.profile import OUTSIDE
from kernel_pytorch.search.kinds import kind_of

__all__ = ["class_of", "condensed", "short_name"]

AUTOGRAD = "autograd engine"
COMPILED_CALLS = "torch.compile guards and wrappers"
DISPATCH = "views and allocations"
"""On a CPU, names for the time in which no operator computes."""

_INSIDE = " > "
_OPERATOR = re.compile(r"^\w+::\w+( backward)?$")
_NODE = re.compile(r"Backward\d*$")
_COMPILED_CALL = re.compile(r"^(?:TorchDynamo|Torch-Compiled|AOTDispatcher|Pregraph|CompiledFunction)")

_LONGEST = 96

_NUMBERED = re.compile(r"^((?:graph_\d+_)?(?:triton|cpp|kernel_cpp)(?:_\w*?)?)_\d+(?:[dec]+\d*)*$")
"""Kernels of Inductor: `triton_poi_fused_add_mul_3` is `triton_poi_fused_add_mul`, whichever kernel was made third."""
_GRAPH = re.compile(r"^graph_\d+_")
_HASH = re.compile(r"_(?=[0-9a-f]*\d)[0-9a-f]{12,}")
_SERIAL = re.compile(r"(_kernel)\d+(?:_\d+)*$")
_NO_NAMESPACE = re.compile(r"\(anonymous namespace\)::|<unnamed>::|\{anonymous\}::")

_WRAPPERS = frozenset({"Kernel", "Kernel2", "device_kernel", "kentry", "kernel", "cutlass_kernel"})
"""Outer names that say nothing: what they run is their template argument."""

_TASK = re.compile(r"\b(?:\w*(?:[fF]lash|[fF]mha|[aA]ttention|[gG]emm|[cC]onv|[rR]educe|[sS]oftmax)\w*)\b")
_FUNCTOR = re.compile(
    r"\b(?:\w*[fF]unctor\w*|\w+_kernel_cuda|\w+_kernel_impl|\w+KernelImpl|\w+Ops|launch_\w+|\w+_kernel)\b"
)
_NO_FUNCTOR = re.compile(
    r"^(?:gpu_kernel_impl\w*|gpu_index_kernel|[AB]?UnaryFunctor|BinaryFunctor|func_wrapper\w*|elementwise_kernel)$"
)
_DTYPES = (
    (re.compile(r"\b(?:BFloat16|bfloat16_t|__nv_bfloat16|bf16)\b"), "bf16"),
    (re.compile(r"\b(?:Half|half_t|__half|f16)\b"), "f16"),
    (re.compile(r"\b(?:Float8_\w+|float_e\dm\d\w*|__nv_fp8_\w+|f8)\b"), "f8"),
    (re.compile(r"\b(?:double|f64)\b"), "f64"),
    (re.compile(r"\b(?:float|f32)\b"), "f32"),
    (re.compile(r"\b(?:long|i64)\b"), "i64"),
)


def condensed(kernels_ms: Mapping[str, float]) -> dict[str, float]:
    """Return a profile with one short name for each path that `profile.kernels_ms` recorded, longest time first.

    An operator's time counts for the outermost operator that does work: the bias that `addmm` copies for `addmm`, the
    products inside attention in math mode for the attention, in the backward pass too. A GPU's kernel keeps its own
    name, with that of the attention or optimizer it works for where it does not say so itself. What is condensed
    already stays as it is.
    """
    times: dict[str, float] = collections.defaultdict(float)
    for path, ms in kernels_ms.items():
        times[_condensed(path)] += ms
    return dict(sorted(times.items(), key=lambda item: -item[1]))


def _condensed(path: str) -> str:
    *outer, own = path.split(_INSIDE)
    step = next((one for one in outer if one.endswith(".step")), "")
    operator = ""
    for one in (*outer, own):
        if _OPERATOR.match(one):
            kind = class_of(one)
            if one.endswith(" backward") and kind != "attention":
                continue
            if kind not in ("overhead", "other"):
                operator = one
                break
            if kind == "other":
                operator = one
    kernel = _kernel(own)
    if kernel is None:
        told = operator or _without_operator(own)
        return f"{step}{_INSIDE}{told}" if step else told
    if step:
        return kernel if class_of(kernel) == "optimizer" else f"{step}{_INSIDE}{kernel}"
    in_attention = operator and class_of(operator) == "attention" != class_of(kernel)
    return f"{operator}{_INSIDE}{kernel}" if in_attention else kernel


def _kernel(name: str) -> str | None:
    """Return the short name of a GPU's kernel, or of a graph of compiled code; `None` for another event of the host."""
    if _OPERATOR.match(name) or name in (AUTOGRAD, COMPILED_CALLS, DISPATCH, OUTSIDE, "detach"):
        return None
    if "autograd::" in name or _NODE.search(name) or _COMPILED_CALL.match(name):
        return None
    return short_name(name)


def _without_operator(name: str) -> str:
    """Return what the time of an event that is part of no operator is spent for."""
    if name == OUTSIDE:
        return name
    if _COMPILED_CALL.match(name) or name == COMPILED_CALLS:
        return COMPILED_CALLS
    return AUTOGRAD if "autograd::" in name or _NODE.search(name) or name == AUTOGRAD else DISPATCH


def short_name(name: str) -> str:
    """Return the part of a kernel's or operator's name that says what it does; a short name stays as it is.

    Off go: return types, namespaces and parameters; template arguments other than the functor and the first dtype;
    numbers that Inductor counts its kernels with; hashes. Names of one kernel from two releases then mostly agree, and
    the tile sizes in the names of matrix products stay, since they tell the algorithm.
    """
    if name.startswith("## Call CompiledFxGraph"):
        return "compiled graph"
    if name.startswith(("Memcpy", "Memset")):
        return name
    if numbered := _NUMBERED.match(name):
        return _cut(_GRAPH.sub("", numbered[1]))
    plain = _NO_NAMESPACE.sub("", name).removeprefix("void ").strip()
    outer, arguments = _parted(plain)
    outer, arguments = outer.rpartition("::")[2], re.sub(r"\b\w+::", "", arguments)
    if outer in _WRAPPERS and (tasks := _TASK.findall(arguments)):
        outer = tasks[0]
    functors = [f for f in _FUNCTOR.findall(arguments) if not _NO_FUNCTOR.match(f) and f != outer]
    told = [*functors[:1], *_first_dtype(arguments)]
    outer = _SERIAL.sub(r"\1", _HASH.sub("", outer)) or plain
    return _cut(f"{outer}<{', '.join(told)}>" if told else outer)


def _parted(name: str) -> tuple[str, str]:
    """Return a C++ name before its template arguments or parameters, and the template arguments."""
    begin = re.search(r"[<(]", name)
    if begin is None:
        return name, ""
    outer, rest = name[: begin.start()].strip(), name[begin.start() :]
    if rest[0] == "(":
        return (outer, "") if outer else (name, "")
    depth = 0
    for at, letter in enumerate(rest):
        depth += (letter == "<") - (letter == ">" and rest[at - 1] != "-")
        if depth == 0:
            return outer, rest[1:at]
    return outer, rest[1:]


def _first_dtype(arguments: str) -> list[str]:
    found = [(hit.start(), short) for pattern, short in _DTYPES if (hit := pattern.search(arguments))]
    return [min(found)[1]] if found else []


def _cut(name: str) -> str:
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 21]}...{name[-18:]}"


_CLASSES = (
    ("attention", r"triton_tem_fused\w*attention|^(?!triton_|cpp_).*(?:flash|fmha|sdpa|attention|attn|scaled_dot_pro)"),
    ("matmul", r"triton_tem_fused"),
    ("fused", r"^triton_\w*fused|cpp_fused|compiled graph|compiledfxgraph|triton_poi_|triton_red_|triton_per_"),
    ("optimizer", r"adam|multi_tensor_apply|sgd|adagrad|muon|lamb\b"),
    ("communication", r"nccl|rccl|allreduce|all_reduce|allgather|reducescatter"),
    ("convolution", r"conv|fprop|dgrad|wgrad|winograd|implicit_gemm|im2col|col2im|scudnn"),
    ("normalization", r"layer_?norm|batch_?norm|group_?norm|rms_?norm|bn_fw|bn_bw|instance_?norm"),
    ("matmul", r"gemm|gemv|nvjet|xmma|wgmma|splitk|cublas|cijk_|mkldnn_linear|_mm_|_mm\b|matmul|dot_kernel"),
    ("copy", r"memcpy|memset|copy|fill|cat(?:array|_)|transpose|nchwtonhwc|nhwctonchw|_cast"),
    ("embedding", r"embedding|index|gather|scatter"),
    ("reduction", r"softmax|reduce|argm|cunn_|nll_loss|cross_entropy|topk|sort|cumsum|scan|welford"),
    ("elementwise", r"elementwise|functor|gelu|silu|relu|dropout|activation|pointwise"),
)
"""First that fits; attention before products, since its kernels are named after their products too. The kernels that
Inductor fuses carry the names of all operators in them, so they are told by their prefix first."""


def class_of(name: str) -> str:
    """Return the class of a kernel or operator: one of `OperatorShare.kind`, or one of those below.

    `fused` is code of Inductor, `communication` that of collectives, `idle` the time outside of operators.

    Args:
        name: As the profiler tells it, or shortened.
    """
    owner, _, own = name.rpartition(_INSIDE)
    if owner:
        return "optimizer" if owner.endswith(".step") else class_of(owner)
    if own in (AUTOGRAD, COMPILED_CALLS, DISPATCH):
        return "overhead"
    if own == OUTSIDE:
        return "idle"
    if own.startswith("aten::"):
        return kind_of(own.removesuffix(" backward"))
    low = own.lower()
    return next((kind for kind, pattern in _CLASSES if re.search(pattern, low)), "other")
