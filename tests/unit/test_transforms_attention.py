"""Attention goes to the kernels that compute it, all other calls stay with SDPA, and both are told."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kernel_pytorch.attention
from kernel_pytorch.core.program import begin, clone_model
from kernel_pytorch.core.protocols import Program
from kernel_pytorch.core.types import Mode, Skip, Step
from kernel_pytorch.core.workload import Call
from kernel_pytorch.errors import CandidateError
from kernel_pytorch.transforms.attention import Attention
from kernel_pytorch.transforms.attention_observe import observe
from kernel_pytorch.transforms.causal_mask import CausalMask

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*_stable_hash_for_caching:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*register_constant.*"),
]

FA4 = Step("attention", {"backend": "fa4"})
PROGRAMS: list[Program] = []


class Net(nn.Module):
    """Causal attention by SDPA, or one with a mask that is handed in."""

    def __init__(self, heads: int = 2, *, by_name: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.projections = nn.Linear(32, 96)
        self.attention = imported if by_name else None

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        q, k, v = self.projections(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attend = self.attention or F.scaled_dot_product_attention
        return attend(q, k, v, attn_mask=mask, is_causal=mask is None).transpose(1, 2).flatten(2)


def imported(*args: Any, **kwargs: Any) -> torch.Tensor:
    """As a model whose module says `from torch.nn.functional import scaled_dot_product_attention`."""
    return by_own_name(*args, **kwargs)


by_own_name = F.scaled_dot_product_attention


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Stand in for a kernel that this machine lacks; return what it is asked to compute."""
    asked: list[tuple[Any, ...]] = []
    sdpa = torch._C._nn.scaled_dot_product_attention

    def attention(query: Any, key: Any, value: Any, *, impl: str, **options: Any) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            asked.append((impl, query.dtype, options["is_causal"], tuple(query.shape), tuple(key.shape)))
        return sdpa(query, key, value, **options)

    monkeypatch.setattr(kernel_pytorch.attention, "attention", attention)
    monkeypatch.setattr(kernel_pytorch.attention, "unsupported", lambda *_, **__: None)
    return asked


@pytest.fixture(autouse=True)
def _undo() -> Iterator[None]:
    yield
    while PROGRAMS:
        for undo in reversed(PROGRAMS.pop().undo):
            undo()


def program_of(model: nn.Module, call: Call, mode: Mode = Mode.INFERENCE) -> Program:
    PROGRAMS.append(begin(model.train(mode is Mode.TRAINING), mode, {"main": call}))
    return PROGRAMS[-1]


def net(dtype: torch.dtype = torch.bfloat16, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return Net(**settings).to(dtype)


def inputs(dtype: torch.dtype = torch.bfloat16, batch: int = 4, length: int = 10) -> torch.Tensor:
    return torch.randn(batch, length, 32, generator=torch.Generator().manual_seed(1)).to(dtype)


def llama(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
    )
    return transformers.LlamaForCausalLM(config).to(dtype)


@pytest.mark.parametrize("by_name", [False, True])
def test_calls_without_a_mask_go_to_the_kernel(kernel: list[tuple[Any, ...]], by_name: bool) -> None:
    model, x = net(by_name=by_name), inputs()
    program = Attention().apply(program_of(clone_model(model), Call((x,))), FA4)
    kernel.clear()
    assert torch.equal(program.call(x), model(x))
    assert kernel == [("fa4", torch.bfloat16, True, (4, 2, 10, 16), (4, 2, 10, 16))]
    mask = torch.ones(10, 10, dtype=torch.bool).tril()
    assert torch.equal(program.call(x, mask), model(x, mask))
    assert torch.equal(program.call(inputs(length=7)), model(inputs(length=7)))
    assert len(kernel) == 2
    compiled = torch.compile(program.call, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), model(x))
    model(x)
    assert len(kernel) == 2, "outside of the program's call nothing is routed"


def test_wider_dtypes_stay_with_sdpa_by_rule(kernel: list[tuple[Any, ...]]) -> None:
    for dtype in (torch.float32, torch.float64):
        model, x = net(dtype), inputs(dtype)
        program = Attention().apply(program_of(clone_model(model), Call((x,))), FA4)
        assert torch.equal(program.call(x), model(x))
        assert kernel == []
        assert any(str(dtype).removeprefix("torch.") in note for note in program.notes)
    program = Attention().apply(program_of(net(torch.float32), Call((inputs(torch.float32),))), FA4)
    with torch.autocast("cpu", torch.bfloat16):
        program.call(inputs(torch.float32))
    assert [asked[0] for asked in kernel] == ["fa4"]


def test_other_head_sizes_than_were_observed_stay_with_sdpa(kernel: list[tuple[Any, ...]]) -> None:
    model = net()
    program = Attention().apply(program_of(model, Call((inputs(),))), FA4)
    model.heads = 4
    kernel.clear()
    program.call(inputs())
    assert kernel == []


def test_what_the_kernel_cannot_compute_is_refused_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def unsupported(impl: str, shape: Any, device: Any, *, backward: bool) -> Skip:
        asked.append(
            (impl, shape.batch, shape.heads, shape.q_len, shape.head_dim, shape.dtype, shape.is_causal, backward)
        )
        return Skip("it only runs on the moon")

    monkeypatch.setattr(kernel_pytorch.attention, "unsupported", unsupported)
    with pytest.raises(CandidateError, match="only runs on the moon"):
        Attention().apply(program_of(net(), Call((inputs(),)), Mode.TRAINING), FA4)
    assert asked == [("fa4", 4, 2, 10, 16, torch.bfloat16, True, True)]
    mask = torch.ones(10, 10, dtype=torch.bool)
    with pytest.raises(CandidateError, match="it has a mask"):
        Attention().apply(program_of(net(), Call((inputs(), mask))), FA4)
    with pytest.raises(CandidateError, match="does not call scaled_dot"):
        Attention().apply(program_of(nn.Linear(4, 4), Call((torch.ones(2, 4),))), FA4)


def test_fa4_is_refused_on_a_cpu_by_the_package_itself() -> None:
    with pytest.raises(CandidateError, match="no attention call goes to fa4"):
        Attention().apply(program_of(net(), Call((inputs(),))), FA4)


def test_the_measured_choice_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KERNEL_PYTORCH_CACHE", str(tmp_path))
    kernel_pytorch.attention.choice.forget()
    model, x = net(), inputs()
    program = Attention().apply(program_of(clone_model(model), Call((x,))), Step("attention", {"backend": "measured"}))
    assert [note for note in program.notes if note.startswith("attention 2x16 runs by ")]
    with torch.no_grad():
        assert torch.allclose(program.call(x).float(), model(x).float(), atol=2e-2)
    kernel_pytorch.attention.choice.forget()


def test_llama_goes_to_the_kernel_compiled_too_once_its_mask_is_gone(kernel: list[tuple[Any, ...]]) -> None:
    model, ids = llama(), torch.randint(0, 50, (2, 12))
    call = Call((ids,), {"use_cache": False})
    masked = Attention().apply(program_of(clone_model(model).eval(), call), FA4)
    assert any("see causal_mask" in note for note in masked.notes)
    program = program_of(clone_model(model).eval(), call)
    program = Attention().apply(CausalMask().apply(program, Step("causal_mask")), FA4)
    assert not any("causal_mask" in note for note in program.notes)
    for tracing in (False, True):
        kernel.clear()
        seen = observe(program, tracing=tracing)
        assert not seen.masked
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    kernel.clear()
    with torch.no_grad():
        expected = model.eval()(ids, use_cache=False).logits
        assert torch.allclose(program.call(ids, use_cache=False).logits, expected, atol=2e-2)
        assert [(asked[0], asked[2], asked[4][1]) for asked in kernel] == [("fa4", True, 2)] * 2
        compiled = torch.compile(program.call, backend=backend, fullgraph=True)
        assert torch.allclose(compiled(ids, use_cache=False).logits, expected, atol=2e-2)
    assert len(graphs) == 1
    nodes = [n for n in graphs[0].graph.nodes if n.target is torch._C._nn.scaled_dot_product_attention]
    assert [n.kwargs["is_causal"] for n in nodes] == [True, True]


def test_multihead_attention_goes_to_the_kernel(kernel: list[tuple[Any, ...]]) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True).bfloat16()
    x = inputs()
    program = Attention().apply(program_of(clone_model(layer), Call((x,)), Mode.TRAINING), FA4)
    kernel.clear()
    assert torch.equal(program.call(x), layer.train()(x))
    assert [asked[:3] for asked in kernel] == [("fa4", torch.bfloat16, False)]
    compiled = torch.compile(program.call, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))


def test_undone_everything_is_pytorchs_again(kernel: list[tuple[Any, ...]]) -> None:
    sdpa: Callable[..., Any] = torch._C._nn.scaled_dot_product_attention
    gc.collect()  # programs of other tests that nobody undid
    one = Attention().apply(program_of(net(), Call((inputs(),))), FA4)
    two = Attention().apply(program_of(net(by_name=True), Call((inputs(),))), FA4)
    for program in (one, two):
        assert F.scaled_dot_product_attention is not sdpa
        for undo in reversed(program.undo):
            undo()
        program.undo.clear()
    assert F.scaled_dot_product_attention is by_own_name is sdpa
    assert F.multi_head_attention_forward.__globals__ is vars(F)


def test_every_backend_has_a_source_without_this_package() -> None:
    for backend in ("measured", "fa3", "fa4", "fa3+fa4", "flash", "math"):
        source = Attention().source(Step("attention", {"backend": backend}))
        compile(source, "source", "exec")
        assert "import kernel_pytorch" not in source


def test_sdpa_instead_of_eager_is_proposed_for_hugging_face_only() -> None:
    import dataclasses

    from test_catalog import BERT, CPU

    eager = dataclasses.replace(BERT, operators={"aten._softmax": 3}, modules={"TinyOwnAttention": 3})
    skip = Attention().propose(eager, CPU)
    assert isinstance(skip, Skip)
    pytest.importorskip("transformers.models.bert.modeling_bert")
    eager = dataclasses.replace(eager, modules={"BertSelfAttention": 3})
    assert Attention().propose(eager, CPU) == [Step("attention", {"implementation": "sdpa"})]
