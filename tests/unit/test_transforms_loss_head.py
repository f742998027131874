"""The loss of a causal language model by the kernel: what the model returns stays, and other losses are left alone."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from tests.forks import run_interpreted
from torch import nn

from kernel_pytorch.core.program import begin, restore, ship, state_digest
from kernel_pytorch.core.types import DeviceSpec, Mode, Skip, Step, WorkloadSpec
from kernel_pytorch.core.workload import Call
from kernel_pytorch.errors import CandidateError
from kernel_pytorch.transforms import loss_head
from kernel_pytorch.transforms.loss_head import LossHead

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
kernels = pytest.mark.skipif(not INTERPRETED, reason="runs in the subprocess of test_kernels_under_the_interpreter")


@pytest.mark.skipif(INTERPRETED, reason="starts the subprocess")
def test_kernels_under_the_interpreter() -> None:
    run_interpreted(__file__)


def model() -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=97,
            hidden_size=16,
            intermediate_size=24,
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


def test_chunked_keeps_what_an_earlier_step_made_of_the_head_and_refuses_one_in_fp8() -> None:
    from kernel_pytorch.precision.linear import swap_linear

    net = model()
    before = net.lm_head.forward = lambda x: torch.nn.functional.linear(x, 2 * net.lm_head.weight)
    program = begin(net, Mode.TRAINING, {"main": Call((), batch())})
    LossHead().apply(program, Step("loss_head", {"chunked": True}))
    x = torch.randn(2, 3, 16)
    assert torch.equal(net.lm_head(x), before(x))
    for undo in reversed(program.undo):
        undo()
    assert net.lm_head.forward is before
    net = model()
    net.lm_head = nn.Linear(16, 96, bias=False)
    swap_linear(net.lm_head, "tensorwise_current")
    program = begin(net, Mode.TRAINING, {"main": Call((), batch())})
    with pytest.raises(CandidateError, match="runs in FP8"):
        LossHead().apply(program, Step("loss_head", {"chunked": True}))
    assert "_loss_head_made" not in vars(net.lm_head)


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
        Step("loss_head"),
        Step("loss_head", {"chunked": True}),
    ]
    assert isinstance(transform.propose(workload("aten.mm"), spec("nvidia")), Skip)
    assert isinstance(transform.propose(workload("aten.nll_loss_forward"), spec("cpu")), Skip)
