"""Causal masks that transformers and models by hand build are found by behaviour, and replaced where that is right."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kernel_pytorch.backends import manager_for
from kernel_pytorch.core.config import KernelPyTorchConfig
from kernel_pytorch.core.program import begin, clone_model, restore, ship, state_digest
from kernel_pytorch.core.protocols import Program
from kernel_pytorch.core.types import Candidate, Gate, Mode, Step
from kernel_pytorch.core.workload import Call, Workload
from kernel_pytorch.errors import CandidateError
from kernel_pytorch.search.bench import build, prepare_bench
from kernel_pytorch.transforms.attention_calls import using
from kernel_pytorch.transforms.causal_mask import CausalMask
from kernel_pytorch.transforms.regional_compile import RegionalCompile
from kernel_pytorch.validation.numerics import judge
from kernel_pytorch.validation.subject import Subject

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*_stable_hash_for_caching:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*register_constant.*"),
]

STEP = Step("causal_mask")
VOCAB, LENGTH = 50, 12
NATIVE = torch._C._nn  # a name for its SDPA here would be replaced, as any that a caller has
ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


def tokens(batch: int = 2, length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


class GPT(nn.Module):
    """One layer by hand; the mask is a buffer, built on the spot, or `is_causal`."""

    def __init__(self, kind: str = "buffer", window: int = 0, length: int = 64) -> None:
        super().__init__()
        self.kind, self.window = kind, window
        self.table = nn.Embedding(VOCAB, 32)
        self.projections = nn.Linear(32, 96)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, VOCAB)
        self.register_buffer("mask", torch.full((length, length), float("-inf")).triu(1))

    def make_mask(self, ids: torch.Tensor) -> torch.Tensor | None:
        n = ids.shape[1]
        if self.kind == "buffer":
            return self.mask[:n, :n]
        if self.kind == "bool":
            return torch.ones(n, n, dtype=torch.bool).tril()[None, None].expand(len(ids), -1, -1, -1)
        if self.kind == "gpt2":
            return torch.where(torch.ones_like(ids[0]).expand(n, n).tril().bool(), 0.0, -1e4)
        if self.kind == "window":
            place = torch.arange(n)
            return (place[None] <= place[:, None]) & (place[None] > place[:, None] - self.window)
        if self.kind == "padding":
            return (torch.ones(n, n, dtype=torch.bool).tril() & (ids >= 0)[:, None, :])[:, None]
        if self.kind == "chosen":
            return self.mask[:n, :n] if bool((ids >= 0).all()) else torch.zeros(n, n)
        if self.kind == "alibi":
            place = torch.arange(n)
            return self.mask[:n, :n] - 0.5 * (place[:, None] - place[None]).clamp_min(0)
        return None

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.table(ids)
        q, k, v = self.projections(self.norm(x)).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        mask = self.make_mask(ids) if mask is None else mask
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.kind == "is_causal")
        return self.head(x + y.transpose(1, 2).flatten(2))


class Encoder(nn.Module):
    """`nn.TransformerEncoder` with a causal mask, which it hands on to `nn.MultiheadAttention`."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        return self.layers(self.table(ids), mask=mask, is_causal=False)


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, 32)
        self.heads = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
        return self.heads(x, x, x, attn_mask=mask, need_weights=False)[0]


def hugging_face(kind: str, **settings: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = getattr(transformers, f"{kind}Config")(**{**sizes, "vocab_size": VOCAB, **settings})
    torch.manual_seed(0)
    name = "BertForMaskedLM" if kind == "Bert" else f"{kind}ForCausalLM"
    return getattr(transformers, name)(config).eval()


def llama(**settings: Any) -> nn.Module:
    return hugging_face("Llama", num_key_value_heads=2, **settings)


def made(factory: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return factory().eval()


PROGRAMS: list[Program] = []


@pytest.fixture(autouse=True)
def _undo() -> Iterator[None]:
    yield
    while PROGRAMS:
        for undo in reversed(PROGRAMS.pop().undo):
            undo()


def applied(model: nn.Module, call: Call | None = None, mode: Mode = Mode.INFERENCE, **program: Any) -> Program:
    call = call or Call((tokens(),))
    PROGRAMS.append(begin(model.train(mode is Mode.TRAINING), mode, {"main": call}, **program))
    return CausalMask().apply(PROGRAMS[-1], STEP)


def logits(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.logits


def masks_seen(call: Callable[[], Any]) -> list[tuple[bool, bool]]:
    """Return of each attention that reaches PyTorch whether it has a mask, and `is_causal`."""
    seen = []

    def route(query: Any, key: Any, value: Any, options: dict[str, Any], rest: Callable[..., Any]) -> Any:
        seen.append((options["attn_mask"] is not None, options["is_causal"]))
        return rest(query, key, value, options)

    outer = using(route)
    outer.enter()
    try:
        call()
    finally:
        outer.leave()
    return seen


def traced_masks(call: Callable[..., Any], *args: Any, **kwargs: Any) -> list[tuple[bool, bool]]:
    """Compile a call without graph breaks; return of each attention in the graph whether it has a mask, `is_causal`."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.compile(call, backend=backend, fullgraph=True)(*args, **kwargs)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert len(graphs) == 1
    assert not [n for n in graphs[0].graph.nodes if n.target is F.multi_head_attention_forward]
    nodes = [n for n in graphs[0].graph.nodes if n.target is NATIVE.scaled_dot_product_attention]
    given = [{**dict(zip(ARGUMENTS, n.args, strict=False)), **n.kwargs} for n in nodes]
    return [(g.get("attn_mask") is not None, bool(g.get("is_causal", False))) for g in given]


BY_HAND = {
    "buffer": lambda: GPT("buffer"),
    "bool": lambda: GPT("bool"),
    "gpt2": lambda: GPT("gpt2"),
    "wide window": lambda: GPT("window", window=LENGTH),
    "encoder": Encoder,
    "heads": Heads,
}


@pytest.mark.parametrize("name", BY_HAND)
def test_masks_built_by_hand_are_dropped(name: str) -> None:
    original = made(BY_HAND[name]).train()  # inference of the encoder would take the fused path
    program = applied(clone_model(original), mode=Mode.TRAINING)
    for ids in (tokens(), tokens(1), tokens(3, 5), tokens(2, 1)):
        with torch.no_grad():
            assert torch.allclose(program.call(ids), original(ids), atol=2e-6)
            seen = masks_seen(lambda ids=ids: program.call(ids))
        assert seen
        assert set(seen) == {(False, True)}
    assert set(traced_masks(program.call, tokens())) == {(False, True)}


@pytest.mark.parametrize("name", BY_HAND)
def test_gradients_are_those_of_the_mask(name: str) -> None:
    original = made(BY_HAND[name]).train()
    program = applied(clone_model(original), mode=Mode.TRAINING)
    original(tokens()).square().mean().backward()
    program.call(tokens()).square().mean().backward()
    for (path, one), two in zip(original.named_parameters(), program.model.parameters(), strict=True):
        assert torch.allclose(one.grad, two.grad, atol=1e-6), path


def test_longer_inputs_than_were_observed_keep_their_mask() -> None:
    original = made(lambda: GPT("window", window=LENGTH))
    program = applied(clone_model(original))
    longer = tokens(2, LENGTH + 5)
    with torch.no_grad():
        assert masks_seen(lambda: program.call(longer)) == [(True, False)]
        assert torch.equal(program.call(longer), original(longer))


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        (lambda: GPT("window", window=4), "is not the causal mask"),
        (lambda: GPT("alibi"), "is not the causal mask"),
        (lambda: GPT("padding"), "depends on the values of an input"),
        (lambda: GPT("chosen"), "reads some of them before"),
        (lambda: GPT("is_causal"), "no attention call has a mask"),
        (lambda: nn.Embedding(VOCAB, 4), "does not call scaled_dot_product_attention"),
    ],
)
def test_what_cannot_be_dropped_is_refused_in_words(factory: Callable[[], nn.Module], words: str) -> None:
    with pytest.raises(CandidateError, match=words):
        applied(made(factory))


def test_a_mask_that_is_given_is_refused_and_one_given_later_is_honoured() -> None:
    original = made(lambda: GPT("buffer"))
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    with pytest.raises(CandidateError, match="depends on the values of an input"):
        applied(clone_model(original), Call((tokens(), mask)))
    program = applied(clone_model(original))
    banded = mask & ~mask.tril(-3)
    with torch.no_grad():
        assert torch.equal(program.call(tokens(), banded), original(tokens(), banded))
        assert torch.equal(program.call(tokens(), mask=banded), original(tokens(), mask=banded))


def test_llama_is_traced_without_a_mask_and_padding_is_honoured() -> None:
    original = llama()
    assert traced_masks(original, tokens(), use_cache=False) == [(True, False)] * 2
    program = applied(clone_model(original), Call((tokens(),), {"use_cache": False}))
    assert traced_masks(program.call, tokens(), use_cache=False) == [(False, True)] * 2
    padding = torch.ones(2, LENGTH, dtype=torch.long)
    padding[0, :3] = 0
    packed = torch.cat([torch.arange(5), torch.arange(LENGTH - 5)])[None].expand(2, -1)
    compiled = torch.compile(program.call, backend="aot_eager", fullgraph=True)
    for extra in ({}, {"attention_mask": padding}, {"position_ids": packed}):
        for ids in (tokens(), tokens(2, LENGTH, seed=3)):
            with torch.no_grad():
                expected = original(ids, use_cache=False, **extra).logits
                assert torch.allclose(program.call(ids, use_cache=False, **extra).logits, expected, atol=1e-6)
                assert torch.allclose(compiled(ids, use_cache=False, **extra).logits, expected, atol=1e-6), extra
    for ids in (tokens(3, 7), tokens(1, LENGTH + 4)):
        with torch.no_grad():
            expected = original(ids, use_cache=False).logits
            assert torch.allclose(compiled(ids, use_cache=False).logits, expected, atol=1e-6)


def test_what_is_undone_is_as_it_was() -> None:
    for original, call in ((llama(), Call((tokens(),), {"use_cache": False})), (made(GPT), Call((tokens(),)))):
        model = clone_model(original)
        before = state_digest(model)
        shipped = ship(CausalMask().apply(begin(model, Mode.INFERENCE, {"main": call}), STEP), original)
        with torch.no_grad():
            shipped(*call.args, **call.kwargs)
        restore(shipped)
        assert state_digest(model) == before
        assert F.scaled_dot_product_attention is NATIVE.scaled_dot_product_attention
        assert getattr(getattr(model, "config", None), "_attn_implementation", "sdpa") == "sdpa"


def test_the_ejected_source_does_the_same() -> None:
    heads, sdpa = F.multi_head_attention_forward, F.scaled_dot_product_attention
    for original, kwargs in ((llama(), {"use_cache": False}), (made(GPT), {}), (made(Heads).train(), {})):
        model = clone_model(original)
        names = {"model": model, "call": model._call_impl}
        try:
            exec(CausalMask().source(STEP), names)
            with torch.no_grad():
                got, expected = names["call"](tokens(), **kwargs), original(tokens(), **kwargs)
            assert torch.allclose(logits(got), logits(expected), atol=1e-6)
            assert set(traced_masks(names["call"], tokens(), **kwargs)) == {(False, True)}
        finally:
            F.multi_head_attention_forward, F.scaled_dot_product_attention = heads, sdpa


def test_compiled_llama_trains_as_before() -> None:
    original = llama(num_hidden_layers=1).train()

    def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(input_ids=batch["ids"], labels=batch["ids"], use_cache=False).loss

    batch = {"ids": tokens(4)}
    model = clone_model(original)
    program = applied(model, Call((), batch), Mode.TRAINING, loss=loss)
    model._compiled_call_impl = torch.compile(program.call, backend="inductor", fullgraph=True)
    losses = [loss(m, batch) for m in (original, model)]
    assert torch.allclose(*losses, atol=1e-5)
    for value in losses:
        value.backward()
    for (path, one), two in zip(original.named_parameters(), model.parameters(), strict=True):
        assert torch.allclose(one.grad, two.grad, atol=1e-5), path
    assert traced_masks(program.call, input_ids=batch["ids"], labels=batch["ids"], use_cache=False) == [(False, True)]


def test_a_cache_is_decoded_as_before() -> None:
    original = llama()
    program = applied(clone_model(original), Call((tokens(),), {"use_cache": False}))
    routed = clone_model(original)
    routed._compiled_call_impl = applied(routed, Call((tokens(),), {"use_cache": False})).call
    with torch.no_grad():
        for step in (original, program.call, routed):
            cache = step(tokens(), use_cache=True).past_key_values
            more = step(tokens(2, 3, seed=5), past_key_values=cache, use_cache=True)
            last = step(tokens(2, 1, seed=6), past_key_values=more.past_key_values, use_cache=True)
            if step is original:
                expected = (more.logits, last.logits)
            assert torch.allclose(more.logits, expected[0], atol=1e-6)
            assert torch.allclose(last.logits, expected[1], atol=1e-6)
        generated = [
            m.generate(tokens(1), max_new_tokens=4, do_sample=False, pad_token_id=0) for m in (original, routed)
        ]
    assert torch.equal(*generated)


@pytest.mark.parametrize("kind", ["Mistral", "Qwen2"])
def test_sliding_windows(kind: str) -> None:
    wide = {"num_key_value_heads": 2, "sliding_window": 64}
    if kind == "Qwen2":
        wide |= {"use_sliding_window": True, "max_window_layers": 1}
    call = Call((tokens(),), {"use_cache": False})
    with pytest.raises(CandidateError, match="is not the causal mask"):
        applied(hugging_face(kind, **{**wide, "sliding_window": 4}), call)
    original = hugging_face(kind, **wide)
    program = applied(clone_model(original), call)
    assert traced_masks(program.call, tokens(), use_cache=False) == [(False, True)] * 2
    compiled = torch.compile(program.call, backend="eager", fullgraph=True)
    for ids in (tokens(), tokens(1, 5), tokens(1, 80)):
        with torch.no_grad():
            assert torch.allclose(
                compiled(ids, use_cache=False).logits, original(ids, use_cache=False).logits, atol=1e-6
            )


def test_bert_has_no_causal_mask() -> None:
    padding = torch.ones(2, LENGTH, dtype=torch.long)
    padding[0, 8:] = 0
    with pytest.raises(CandidateError, match="depends on the values of an input"):
        applied(hugging_face("Bert"), Call((), {"input_ids": tokens(), "attention_mask": padding}))
    with pytest.raises(CandidateError, match=r"no attention call has a mask|is not the causal mask"):
        applied(hugging_face("Bert"), Call((), {"input_ids": tokens()}))


def test_position_ids_or_padding_among_the_examples_are_refused() -> None:
    places = torch.arange(LENGTH)[None]
    for extra in ({"position_ids": places}, {"attention_mask": torch.ones(2, LENGTH, dtype=torch.long)}):
        with pytest.raises(CandidateError, match="depends on the values of an input"):
            applied(llama(), Call((tokens(),), {"use_cache": False, **extra}))


def test_a_hugging_face_model_needs_no_example_inputs() -> None:
    original = llama()
    program = begin(clone_model(original), Mode.INFERENCE, {})
    PROGRAMS.append(program)
    CausalMask().apply(program, STEP)
    assert traced_masks(program.call, tokens(), use_cache=False) == [(False, True)] * 2
    packed = torch.cat([torch.arange(5), torch.arange(LENGTH - 5)])[None].expand(2, -1)
    assert traced_masks(program.call, tokens(), position_ids=packed, use_cache=False) == [(True, False)] * 2
    with pytest.raises(CandidateError, match="no example inputs"):
        CausalMask().apply(begin(made(GPT), Mode.INFERENCE, {}), STEP)


def test_a_model_that_asks_for_sdpa_by_its_name_is_detoured() -> None:
    original = hugging_face("Falcon", alibi=False)
    program = applied(clone_model(original), Call((tokens(),), {"use_cache": False}))
    assert traced_masks(original, tokens(), use_cache=False) == [(True, False)] * 2
    assert traced_masks(program.call, tokens(), use_cache=False) == [(False, True)] * 2


def test_the_fused_inference_path_is_told() -> None:
    assert any("fused inference path" in note for note in applied(made(Encoder)).notes)
    assert applied(made(Encoder), mode=Mode.TRAINING).notes == []


def test_shapes_that_depend_on_values_are_values_read() -> None:
    class Routing(GPT):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            few = ids[ids > 0] if self.kind == "bool" else ids.flatten()[torch.arange(3)]
            return super().forward(ids) + few.float().mean()

    assert made(lambda: Routing("buffer"))(tokens()).shape == (2, LENGTH, VOCAB)
    applied(made(lambda: Routing("buffer")))
    with pytest.raises(CandidateError, match="reads some of them before"):
        applied(made(lambda: Routing("bool")))


def test_observing_changes_nothing() -> None:
    model = made(lambda: nn.Sequential(GPT(), nn.BatchNorm1d(LENGTH), nn.Dropout(0.5))).train()
    before, state = state_digest(model), torch.get_rng_state()
    program = applied(model, mode=Mode.TRAINING)
    assert state_digest(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert program.model._compiled_call_impl is None


def test_blocks_compiled_one_by_one_get_no_mask() -> None:
    original = llama()
    model = clone_model(original)
    call = Call((tokens(),), {"use_cache": False})
    steps = (STEP, Step("regional_compile", {"block": "LlamaDecoderLayer"}))
    program = applied(model, call)
    program = RegionalCompile().apply(program, steps[1])
    with torch.no_grad():
        got = program.call(tokens(), use_cache=False)
        assert torch.allclose(got.logits, original(tokens(), use_cache=False).logits, atol=1e-5)
    assert not [note for note in program.notes if "graph break" in note]


def test_other_threads_keep_their_masks() -> None:
    model, other = made(GPT), made(GPT)
    program = applied(model)
    outer, seen = using(lambda q, k, v, o, rest: seen.append(o["is_causal"]) or rest(q, k, v, o)), []

    def attend() -> None:
        outer.enter()
        other(tokens())
        outer.leave()

    def beside(*_: Any) -> None:
        thread = threading.Thread(target=attend)
        thread.start()
        thread.join()

    handle = model.head.register_forward_hook(beside)
    program.call(tokens())
    handle.remove()
    assert seen == [False]


@pytest.mark.parametrize("steps", [(STEP,), (STEP, Step("compile", {"mode": "default"}))], ids=str)
@pytest.mark.parametrize("mode", list(Mode))
def test_the_validator_finds_nothing_wrong(steps: tuple[Step, ...], mode: Mode) -> None:
    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(batch).flatten(0, 1), batch.flatten())

    training = {"loss": loss, "optimizer": lambda p: torch.optim.SGD(p, 1e-2)} if mode is Mode.TRAINING else {}
    workload = Workload(model=lambda: made(lambda: GPT("buffer")), inputs=lambda seed: tokens(4, seed=seed), **training)
    config = KernelPyTorchConfig(mode=mode)
    bench = prepare_bench(workload, config, manager_for("cpu"), seed=0)
    program = build(bench, clone_model(bench.model), Candidate(steps))
    PROGRAMS.append(program)
    ship(program, bench.model)
    subject = Subject(
        workload=bench.workload,
        candidate=Candidate(steps),
        config=config,
        reference=bench.model,
        program=program,
        build=lambda model, candidate, calls: build(bench, model, candidate, calls),
        place=bench.manager.place,
        structural=lambda _: True,
    )
    report = judge(subject, level="standard")
    assert report.passed, [c for c in report.checks if not c.passed]
    assert [c for c in report.checks if c.gate is Gate.STRUCTURE], report
