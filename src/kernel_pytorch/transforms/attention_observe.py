"""Run a model once and watch its attention: shapes, masks, and whether those depend on the values of the inputs."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from kernel_pytorch.core.program import plain_tensors
from kernel_pytorch.core.protocols import Program
from kernel_pytorch.core.types import Mode
from kernel_pytorch.core.workload import Call
from kernel_pytorch.errors import CandidateError
from kernel_pytorch.transforms.attention_calls import DETOUR, HEADS, SDPA, Place, pattern_of, with_globals

__all__ = ["Observation", "SdpaCall", "as_if_tracing", "fused_path_note", "observe"]

_FOREIGN = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What a model raises on inputs that it does not take."""


_OWN_FILES = (__file__, with_globals.__code__.co_filename)


@dataclass(frozen=True, slots=True)
class SdpaCall:
    """One call that was seen.

    Attributes:
        query: Shape of the queries, `(..., heads, tokens, head_dim)`.
        key: Shape of the keys.
        value: Shape of the values.
        dtype: Of the queries.
        device: Of the queries.
        is_causal: The argument.
        dropout: The argument `dropout_p`.
        masked: Whether a mask was given.
        kept: Why the mask cannot be replaced by `is_causal=True`; empty where it can, or where there is none.
        checkpointed: Whether it runs under activation checkpointing, which will run it again in backward.
        samples: How many times larger the batch of the example inputs is than the one that was run.
    """

    query: tuple[int, ...]
    key: tuple[int, ...]
    value: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    is_causal: bool
    dropout: float
    masked: bool
    kept: str = ""
    checkpointed: bool = False
    samples: int = 1

    @property
    def tokens(self) -> int:
        """Queries of the whole batch of the example inputs."""
        return self.query[0] * self.samples * self.query[-2]


@dataclass(slots=True)
class Observation:
    """What running a program on its example inputs showed.

    Attributes:
        calls: The calls of attention, in order, of all runs.
        patterns: What the arguments of the model's calls looked like.
        lengths: Query lengths at which the model was run, ascending.
        places: Where the callers find SDPA.
    """

    calls: list[SdpaCall] = field(default_factory=list)
    patterns: list[tuple[Any, Any]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    places: list[Place] = field(default_factory=lambda: [(vars(nn.functional), SDPA.__name__)])

    @property
    def masked(self) -> list[SdpaCall]:
        """The calls with a mask."""
        return [call for call in self.calls if call.masked]

    def add(self, other: Observation) -> None:
        """Take over what was seen in another run."""
        self.calls += other.calls
        self.patterns += [p for p in other.patterns if p not in self.patterns]
        self.lengths = sorted({call.query[-2] for call in self.calls})
        self.places += [p for p in other.places if not any(p[0] is n and p[1] == k for n, k in self.places)]


_READS = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::allclose", "aten::item"}
_SHAPE_ONLY = {
    f"aten::{name}"
    for name in (
        "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like",
        "new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided",
        "sym_size", "sym_stride", "sym_numel", "dim", "numel",
    )
}  # fmt: skip
_READING_METHODS = ("tolist", "numpy", "__array__")


class _Taint(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows which tensors are computed from the values of the inputs, by storage: views and in-place writes too.

    Attributes:
        decided: Whether the model has read a value computed from its inputs, so that what follows may depend on it.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.decided = False
        self._dirty: set[StorageWeakRef] = set()

    def mark(self, tree: Any) -> None:
        """Take the tensors of a tree for computed from the inputs."""
        for leaf in pytree.tree_leaves(tree):
            if isinstance(leaf, torch.Tensor):
                self._dirty.update(_storages(leaf))

    def tainted(self, tree: Any) -> bool:
        """Return whether a tensor of the tree was computed from the inputs."""
        return any(
            not self._dirty.isdisjoint(_storages(leaf))
            for leaf in pytree.tree_leaves(tree)
            if isinstance(leaf, torch.Tensor)
        )

    def _shaped_by_values(self, name: str, func: Any, args: tuple[Any, ...]) -> bool:
        """Return whether the shape of a result depends on values of tainted tensors, which is to read them."""
        if name in {"aten::index", "aten::index_put", "aten::index_put_"}:
            return any(x is not None and x.dtype in (torch.bool, torch.uint8) and self.tainted(x) for x in args[1])
        return torch.Tag.dynamic_output_shape in func.tags

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        out = func(*args, **kwargs)
        name = func.name().partition(".")[0]
        if name in _SHAPE_ONLY:
            return out
        dirty = self.tainted((args, kwargs))
        if dirty and (name in _READS or self._shaped_by_values(name, func, args)):
            self.decided = True
        if dirty:
            self.mark(out)
            schema = func._schema.arguments  # noqa: SLF001
            named = {**{a.name: v for a, v in zip(schema, args, strict=False)}, **kwargs}
            self.mark([named.get(a.name) for a in schema if a.alias_info is not None and a.alias_info.is_write])
        return out


def _storages(tensor: torch.Tensor) -> list[StorageWeakRef]:
    weak: Any = StorageWeakRef  # untyped
    return [weak(plain.untyped_storage()) for plain in plain_tensors(tensor) if plain.layout is torch.strided]


class _Watch(torch.overrides.TorchFunctionMode):
    """Records each call of attention, and values read by methods that no dispatcher sees."""

    def __init__(self, taint: _Taint, seen: Observation) -> None:
        super().__init__()
        self.taint, self.seen = taint, seen
        self._clean: set[StorageWeakRef] = set()
        # A torch function itself, so that what it calls would not be seen.
        self._heads = with_globals(
            HEADS, scaled_dot_product_attention=self._through, has_torch_function=lambda *_: False
        )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _READING_METHODS and self.taint.tainted(args):
            self.taint.decided = True
        if func is SDPA:
            self._record(*args, **kwargs)
            self._find_caller()
        if func is HEADS:
            return self._heads(*args, **kwargs)
        return func(*args, **kwargs)

    def _through(self, *args: Any, **kwargs: Any) -> Any:
        """Answer `nn.MultiheadAttention`: by the routes, with this mode on for what they call."""
        with self:
            return nn.functional.scaled_dot_product_attention(*args, **kwargs)

    def _find_caller(self) -> None:
        """Note where the code that called SDPA holds it by a name of its own."""
        frame: FrameType | None = sys._getframe(2)  # noqa: SLF001
        while frame is not None and frame.f_code.co_filename in _OWN_FILES:
            frame = frame.f_back
        if frame is None:
            return
        names = frame.f_globals
        module = sys.modules.get(names.get("__name__", ""))
        if module is not None and vars(module) is names:
            found = [name for name, value in names.items() if value is SDPA or value is DETOUR]
            self.seen.add(Observation(places=[(names, name) for name in found]))

    def _record(  # noqa: PLR0917  the signature of SDPA
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,  # noqa: FBT001, FBT002
        **_: Any,
    ) -> None:
        self.seen.calls.append(
            SdpaCall(
                query=tuple(query.shape),
                key=tuple(key.shape),
                value=tuple(value.shape),
                dtype=query.dtype,
                device=query.device,
                is_causal=bool(is_causal),
                dropout=float(dropout_p),
                masked=attn_mask is not None,
                kept="" if attn_mask is None else self._why_kept(query, key, attn_mask),
                checkpointed=_checkpointed(),
            )
        )

    def _why_kept(self, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor) -> str:
        if self.taint.tainted(mask):
            return "depends on the values of an input (a padding mask, say)"
        if self.taint.decided and self._clean.isdisjoint(_storages(mask)):
            return "may depend on the values of the inputs: the model reads some of them before"
        if mask.requires_grad:
            return "is learned"
        if query.shape[-2] != key.shape[-2]:
            return f"is {query.shape[-2]} x {key.shape[-2]}, not square"
        if not _is_causal_mask(mask, query.shape[-2]):
            return "is not the causal mask"
        self._clean.update(_storages(mask))
        return ""


_HIDES = -1e4
"""What a float mask adds at most where it hides a key (GPT-2's value): e**-1e4 is 0 in fp64."""


def _is_causal_mask(mask: torch.Tensor, length: int) -> bool:
    if mask.shape[-2:] != (length, length):
        return False
    visible = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    if mask.dtype == torch.bool:
        return bool((mask == visible).all())
    return bool((((mask == 0) == visible) & ((mask <= _HIDES) == ~visible)).all())


def _checkpointed() -> bool:
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001
    while frame is not None:
        if frame.f_code.co_filename.endswith(("torch/utils/checkpoint.py", "torch\\utils\\checkpoint.py")):
            return True
        frame = frame.f_back
    return False


@functools.cache
def _dynamo_says_export() -> bool:
    """Return whether Dynamo takes `torch.compiler.is_exporting()` for True although nothing is exported."""

    def ask(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if torch.compiler.is_exporting() else x

    return bool(torch.compile(ask, backend="eager")(torch.zeros(())))


@contextlib.contextmanager
def as_if_tracing() -> Iterator[None]:
    """Let models believe that Dynamo traces them: several build other masks then."""
    compiler, flags = torch.compiler, {"_is_compiling_flag": True, "_is_exporting_flag": _dynamo_says_export()}
    before = {name: getattr(compiler, name) for name in flags if hasattr(compiler, name)}
    try:
        for name in before:
            setattr(compiler, name, flags[name])
        yield
    finally:
        for name, value in before.items():
            setattr(compiler, name, value)


def fused_path_note(program: Program) -> list[str]:
    """Return a note where modules may take a path at inference that calls no SDPA, though they did while observed."""
    kinds = {type(m).__name__ for m in program.model.modules() if isinstance(m, nn.TransformerEncoderLayer)}
    if program.mode is Mode.TRAINING or not kinds:
        return []
    return [f"{', '.join(sorted(kinds))} may take PyTorch's fused inference path, which calls no SDPA to reroute"]


def observe(program: Program, *, tracing: bool) -> Observation:
    """Run a program on one sample of each example input, at its length and at half of it, and watch its attention.

    Nothing of the model is changed: buffers and the state of the random generators are put back.

    Args:
        program: The program; its `call` is run, so that steps already applied have their effect.
        tracing: Whether the model shall believe that it is traced by `torch.compile`.

    Raises:
        CandidateError: There are no example inputs, the model does not run on them, or its loss does not call it.
    """
    seen = Observation()
    for call in _examples(program):
        error = ""
        first = _first_sample(call)
        samples = max(1, _rows(call) // max(1, _rows(first)))
        for given, times in ((first, samples), (call, 1)):
            error = _observe_one(program, given, seen, times, tracing=tracing)
            if not error:
                half = _shorter(given)
                if half is not None:
                    _observe_one(program, half, seen, times, tracing=tracing)
                break
        if error:
            raise CandidateError(f"the model does not run on its example inputs while watched: {error}")
    if not seen.patterns:
        raise CandidateError("the loss does not call the model itself, so its calls cannot be told apart")
    return seen


def _examples(program: Program) -> list[Call]:
    """Return the example inputs, else those that a Hugging Face model brings along."""
    if program.calls:
        return list(program.calls.values())
    dummy = getattr(program.model, "dummy_inputs", None)
    if not isinstance(dummy, Mapping):
        raise CandidateError(
            "which attention the model calls is seen by running it, and there are no example inputs",
            fix="pass inputs=... when applying the plan",
        )
    device = next((p.device for p in program.model.parameters()), torch.device("cpu"))
    return [Call((), pytree.tree_map(lambda leaf: leaf.to(device), dict(dummy)))]


def _observe_one(program: Program, call: Call, seen: Observation, samples: int, *, tracing: bool) -> str:
    """Run one call; return what the model raised, or add what was seen and return an empty string."""
    taint, here = _Taint(), Observation()
    watch = _Watch(taint, here)
    model, before = program.model, program.model._compiled_call_impl  # noqa: SLF001

    def entered(*args: Any, **kwargs: Any) -> Any:
        pattern = (pattern_of(args), pattern_of(kwargs))
        if pattern not in here.patterns:
            here.patterns.append(pattern)
        taint.mark((args, kwargs))
        return program.call(*args, **kwargs)

    taint.mark((call.args, dict(call.kwargs)))
    buffers = [(m, n, b, b.detach().clone()) for m in model.modules() for n, b in m._buffers.items() if b is not None]  # noqa: SLF001
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    model._compiled_call_impl = entered  # noqa: SLF001
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=devices))
            stack.enter_context(torch.no_grad())
            if tracing:
                stack.enter_context(as_if_tracing())
            stack.enter_context(taint)
            stack.enter_context(watch)
            _run(program, call)
    except torch.OutOfMemoryError:
        raise
    except _FOREIGN as error:
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:300]
    finally:
        model._compiled_call_impl = before  # noqa: SLF001
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer  # noqa: SLF001
                buffer.copy_(value)
    here.calls = [replace(one, samples=samples) for one in here.calls]
    seen.add(here)
    return ""


def _run(program: Program, call: Call) -> None:
    if program.mode is Mode.INFERENCE or program.loss is None:
        program.model(*call.args, **call.kwargs)
        return
    # The batch that the loss takes, from the arguments that `as_call` made of it.
    single = len(call.args) == 1 and not call.kwargs
    batch: Any = dict(call.kwargs) if not call.args else call.args[0] if single else call.args
    program.loss(program.model, (call.args, dict(call.kwargs)) if call.args and call.kwargs else batch)


def _leaves(call: Call) -> list[torch.Tensor]:
    leaves = pytree.tree_leaves((call.args, dict(call.kwargs)))
    return [x for x in leaves if isinstance(x, torch.Tensor) and x.layout is torch.strided and not x.is_nested]


def _commonest(sizes: Sequence[int]) -> int:
    return max(sizes, key=sizes.count) if sizes else 0


def _cut(call: Call, fit: Callable[[torch.Tensor], torch.Tensor]) -> Call:
    known = {id(leaf) for leaf in _leaves(call)}
    args, kwargs = pytree.tree_map(
        lambda leaf: fit(leaf.detach()).clone() if id(leaf) in known else leaf, (call.args, dict(call.kwargs))
    )
    return Call(args, kwargs)


def _rows(call: Call) -> int:
    return _commonest([x.shape[0] for x in _leaves(call) if x.dim()])


def _first_sample(call: Call) -> Call:
    """Return the first sample of a call; the reference decides whether it takes it."""
    size = _rows(call)
    return _cut(call, lambda x: x[:1] if x.dim() and x.shape[0] == size else x)


def _shorter(call: Call) -> Call | None:
    """Return a call of half the sequence length; `None` where the inputs have none to cut."""
    whole = [x for x in _leaves(call) if x.dim() >= 2 and not x.is_floating_point() and not x.is_complex()]
    sizes = [x.shape[1] for x in whole] or [x.shape[1] for x in _leaves(call) if x.dim() == 3]
    length = _commonest(sizes)
    if length < 2:
        return None

    def fit(tensor: torch.Tensor) -> torch.Tensor:
        dims = range(1, tensor.dim() if not tensor.is_floating_point() else min(2, tensor.dim()))
        for dim in dims:
            if tensor.shape[dim] == length:
                tensor = tensor.narrow(dim, 0, length // 2)
        return tensor

    return _cut(call, fit)
