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
    assert transform.propose(workload("aten.nll_loss_forward"), spec("nvidia")) == [Step("loss_head")]
    assert isinstance(transform.propose(workload("aten.mm"), spec("nvidia")), Skip)
    assert isinstance(transform.propose(workload("aten.nll_loss_forward"), spec("cpu")), Skip)
