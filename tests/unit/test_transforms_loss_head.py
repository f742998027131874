"""The loss of a causal language model by the kernel: what the model returns stays, and other losses are left alone."""

from __future__ import annotations

import copy
import os
import pickle

import pytest
import torch
from tests.forks import run_interpreted
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from kernel_pytorch.catalog import apply_candidate
from kernel_pytorch.core.program import begin, fused_loss, model_loss, restore, ship, state_digest
from kernel_pytorch.core.types import Candidate, DeviceSpec, Mode, Skip, Step, WorkloadSpec
from kernel_pytorch.core.workload import Call
from kernel_pytorch.errors import CandidateError
from kernel_pytorch.ops.linear_cross_entropy import float8_op
from kernel_pytorch.precision.fallback import fall_back
from kernel_pytorch.precision.site import site_of
from kernel_pytorch.transforms import loss_head
from kernel_pytorch.transforms.loss_head import LossHead

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
kernels = pytest.mark.skipif(not INTERPRETED, reason="runs in the subprocess of test_kernels_under_the_interpreter")


@pytest.mark.skipif(INTERPRETED, reason="starts the subprocess")
def test_kernels_under_the_interpreter() -> None:
    run_interpreted(__file__)


def model(words: int = 97, inner: int = 24) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=words,
            hidden_size=16,
            intermediate_size=inner,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=32,
        )
    )


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :4] = -100
    return {"input_ids": ids, "labels": labels}


def apply(net: nn.Module) -> nn.Module:
    program = begin(net, Mode.TRAINING, {"main": Call((), batch())})
    return ship(LossHead().apply(program, Step("loss_head")), net)


@kernels
def test_loss_logits_and_gradients_are_the_models_own(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, net = model(), model()
    calls = []
    real = loss_head.next_token_loss
    monkeypatch.setattr(loss_head, "next_token_loss", lambda *a, **k: (calls.append(1), real(*a, **k))[1])
    before = state_digest(net)
    shipped = apply(net)
    for extra in ({}, {"num_items_in_batch": torch.tensor(7)}):
        calls.clear()
        want, got = plain(**batch(), **extra), shipped(**batch(), **extra)
        assert calls == [1]
        assert type(got) is type(want)
        assert list(got.keys()) == list(want.keys())
        assert torch.equal(got.logits, want.logits)
        assert torch.allclose(got.loss, want.loss, rtol=1e-6)
        plain.zero_grad()
        net.zero_grad()
        want.loss.backward()
        got.loss.backward()
        for p, q in zip(plain.parameters(), net.parameters(), strict=True):
            assert torch.allclose(p.grad, q.grad, atol=1e-6)
    net.zero_grad()
    copied = copy.deepcopy(net)
    assert torch.allclose(copied(**batch()).loss, plain(**batch()).loss, rtol=1e-6)
    restore(shipped)
    calls.clear()
    assert torch.equal(net(**batch()).loss, plain(**batch()).loss)
    assert calls == []
    assert state_digest(net) == before


def test_a_model_lifted_to_fp64_keeps_its_own_loss() -> None:
    plain, net = model().double(), model().double()
    assert torch.equal(apply(net)(**batch()).loss, plain(**batch()).loss)
    restore(net)
    assert "_loss_function" not in vars(net)


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("extra", [{}, {"num_items_in_batch": torch.tensor(7)}])
def test_chunked_the_compiled_loss_has_no_logits_and_the_same_gradients(monkeypatch: pytest.MonkeyPatch, extra) -> None:
    monkeypatch.setattr(loss_head, "unsupported", lambda *_: None)  # on a CPU the definitions of the kernels run
    plain, net = model(), model()
    program = begin(net, Mode.TRAINING, {"main": Call((), batch())})
    program = LossHead().apply(program, Step("loss_head", {"chunked": True}))
    asked: list[torch.Size] = []
    real = loss_head.linear_cross_entropy
    monkeypatch.setattr(
        loss_head,
        "linear_cross_entropy",
        lambda hidden, *a, **k: (asked.append(hidden.shape), real(hidden, *a, **k))[1],
    )
    given = batch() | extra
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    call = torch.compile(lambda: program.call(**given).loss, backend=keep, fullgraph=True)
    want, got = plain(**given).loss, call()
    assert asked == [torch.Size([18, 16])]
    assert torch.allclose(got, want, rtol=1e-6)
    want.backward()
    got.backward()
    for p, q in zip(plain.parameters(), net.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, atol=1e-6)
    (graph,) = graphs
    (output,) = graph.graph.find_nodes(op="output")
    assert [node.meta["example_value"].shape for node in output.args[0]] == [()]
    graph.graph.eliminate_dead_code()
    made = [n for n in graph.graph.find_nodes(op="call_function", target=nn.functional.linear) if n.args[0].meta]
    assert all(n.meta["example_value"].shape[:-1] != (2, 9) or n.meta["example_value"].shape[-1] != 97 for n in made)
    with torch.no_grad():
        assert torch.equal(program.call(**given).logits, plain(**given).logits)  # eager code makes them as ever
    for undo in reversed(program.undo):
        undo()
    assert "forward" not in vars(net.lm_head)
    assert torch.equal(net(**given).loss, plain(**given).loss)


def test_chunked_keeps_what_an_earlier_step_made_of_the_head_and_leaves_scales_by_row() -> None:
    from kernel_pytorch.precision.linear import swap_linear

    net = model()
    before = net.lm_head.forward = lambda x: torch.nn.functional.linear(x, 2 * net.lm_head.weight)
    program = begin(net, Mode.TRAINING, {"main": Call((), batch())})
    LossHead().apply(program, Step("loss_head", {"chunked": True}))
    x = torch.randn(2, 3, 16)
    assert torch.equal(net.lm_head(x), before(x))
    fresh = model()
    LossHead().apply(begin(fresh, Mode.TRAINING, {"main": Call((), batch())}), Step("loss_head", {"chunked": True}))
    assert torch.equal(pickle.loads(pickle.dumps(fresh.lm_head))(x), fresh.lm_head(x))
    for undo in reversed(program.undo):
        undo()
    assert net.lm_head.forward is before
    net = model(96)
    swap_linear(net.lm_head, "rowwise")
    program = begin(net, Mode.TRAINING, {"main": Call((), batch())})
    LossHead().apply(program, Step("loss_head", {"chunked": True}))
    assert "runs in FP8, and its loss would not: rowwise has scales by row" in program.notes[-1]
    assert "_loss_head_made" not in vars(net.lm_head)
    assert "_loss_function" in vars(net)


FLOAT8 = Step("float8", {"recipe": "tensorwise_delayed", "head": True})
CHUNKED = Step("loss_head", {"chunked": True})
COMPILED = Step("compile", {"mode": "default", "scope": "loss"})
ROWS, WORDS = 48, 96


def long_batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, WORDS, (2, ROWS // 2), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :4] = -100
    return {"input_ids": ids, "labels": labels}


def trained(steps: tuple[Step, ...]) -> tuple[nn.Module, list[float], list[torch.Size]]:
    """Return a model after some steps of a candidate, its losses, and the shapes kept for the last backward."""
    net = model(WORDS, 32)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    program = begin(net, Mode.TRAINING, {"main": Call((), long_batch())}, optimizer=optimizer, loss=model_loss)
    program = apply_candidate(program, Candidate(steps))
    shipped, losses = ship(program, net), []
    for _ in range(4):
        kept: list[torch.Size] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: (kept.append(t.shape), t)[1], lambda t: t):
            loss = fused_loss(shipped, long_batch())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return net, losses, kept


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_head_in_fp8_has_its_loss_by_chunks_and_no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_head, "unsupported", lambda *_: None)  # on a CPU the definitions of the kernels run
    monkeypatch.setattr(float8_op, "chunk_rows", lambda *_: 16)
    made: list[torch.Size] = []

    def keep(graph, _):
        made.extend(n.meta["val"].shape for n in graph.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor))
        return make_boxed_func(graph)

    real = torch.compile
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    monkeypatch.setattr(torch, "compile", lambda call, **_: real(call, backend=backend, fullgraph=True))
    whole, want, kept = trained((FLOAT8, COMPILED))
    assert torch.Size([ROWS, WORDS]) in kept  # what the other is to be without
    made.clear()
    torch._dynamo.reset()
    net, got, kept = trained((CHUNKED, FLOAT8, COMPILED))
    assert got == pytest.approx(want, rel=1e-5)
    assert got[-1] < got[0] - 0.3
    assert torch.Size([WORDS, 16]) in made  # the gradient of the weight
    for shape in (*made, *kept):
        assert shape.numel() < ROWS * WORDS or WORDS not in shape, shape
    for operand, state in site_of(net.lm_head).states.items():
        known = operand != "gradient"  # of slopes the largest is known before
        assert torch.allclose(state, known * site_of(whole.lm_head).states[operand], rtol=1e-4), operand


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_head_that_can_no_longer_be_chunked_has_its_loss_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_head, "unsupported", lambda *_: None)
    asked = []
    real = loss_head.next_token_loss
    monkeypatch.setattr(loss_head, "next_token_loss", lambda *a, **k: (asked.append(1), real(*a, **k))[1])

    def compiled() -> torch.Tensor:
        torch._dynamo.reset()
        asked.clear()
        return torch.compile(lambda: program.call(**long_batch()).loss, backend="aot_eager")()

    net = model(WORDS, 32)
    program = begin(net, Mode.TRAINING, {"main": Call((), long_batch())})
    program = apply_candidate(program, Candidate((FLOAT8, CHUNKED)))
    first = compiled()
    assert asked == []
    with monkeypatch.context() as patch:
        patch.setattr(loss_head, "unchunked", lambda _: "FSDP gathers it")
        assert torch.allclose(compiled(), first, rtol=1e-5)
        assert asked == [1]
    fall_back(net, "lm_head", "it saturates")
    assert torch.allclose(compiled(), first, rtol=1e-2)
    assert asked == [1]
    for undo in reversed(program.undo):
        undo()
    assert not {"forward", "_loss_head_made"} & {*vars(net.lm_head)}
    assert torch.equal(net(**long_batch()).loss, model(WORDS, 32)(**long_batch()).loss)


class Other(nn.Module):
    """A model whose loss is another, or is kept elsewhere."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    @property
    def loss_function(self):
        def unshifted(logits, labels, vocab_size, **_):
            return nn.functional.cross_entropy(logits.view(-1, vocab_size), labels.view(-1))

        def narrow(logits, labels):
            return logits.sum()

        return {"unshifted": unshifted, "narrow": narrow, "elsewhere": loss_head.next_token_loss}[self.kind]


@pytest.mark.parametrize(
    ("net", "words"),
    [
        (nn.Linear(2, 2), "no `loss_function`"),
        (Other("unshifted"), "not the mean cross-entropy"),
        (Other("narrow"), "raises TypeError"),
        (Other("elsewhere"), "does not look for its loss"),
    ],
)
def test_what_does_not_fit_is_told_and_left_alone(net: nn.Module, words: str) -> None:
    with pytest.raises(CandidateError, match=words):
        apply(net)
    assert "_loss_function" not in vars(net)


def test_it_has_no_plain_source() -> None:
    with pytest.raises(CandidateError, match="cannot be written as plain PyTorch"):
        LossHead().source(Step("loss_head"))


def test_who_is_offered_it() -> None:
    pytest.importorskip("triton", reason="triton is not installed")

    def spec(vendor: str) -> DeviceSpec:
        return DeviceSpec(
            vendor=vendor, name="a device", arch="arch", memory_bytes=1, num_devices=1, features=(), peak_flops={},
            bandwidth_bytes_per_s=1.0, software={},
        )  # fmt: skip

    def workload(*operators: str) -> WorkloadSpec:
        return WorkloadSpec(
            name="net", fingerprint="f", mode=Mode.TRAINING, signatures={}, weights={"main": 1.0}, parameters=10,
            parameter_bytes=40, buffer_bytes=0, dtypes=("bfloat16",), modules={}, blocks={},
            operators=dict.fromkeys(operators, 1), devices=("cuda",), in_memory=True,
        )  # fmt: skip

    transform = LossHead()
    assert transform.propose(workload("aten.nll_loss_forward"), spec("nvidia")) == [
        Step("loss_head", {"chunked": True}),
        Step("loss_head"),
    ]
    assert isinstance(transform.propose(workload("aten.mm"), spec("nvidia")), Skip)
    assert isinstance(transform.propose(workload("aten.nll_loss_forward"), spec("cpu")), Skip)
