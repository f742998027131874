"""What holds for every step: undone bit by bit, no setting left behind, the contract kept, the same when ejected."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import nn

from kernel_pytorch.catalog import TRANSFORMS, apply_candidate, find
from kernel_pytorch.core.program import begin, clone_model, plain_call, restore, ship, state_digest
from kernel_pytorch.core.types import Candidate, Mode, Step
from kernel_pytorch.core.workload import Call

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*_stable_hash_for_caching:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*"),
    pytest.mark.filterwarnings("ignore:.*register_constant.*"),
]

CAST = Step("dtype", {"to": "bfloat16", "how": "cast"})
COMPILE = Step("compile", {"mode": "default"})
FROZEN = Step("compile", {"mode": "default", "freezing": True})
MATH = Step("attention", {"backend": "math"})

QUICK = [
    (CAST,),
    (Step("dtype", {"to": "float16", "how": "cast"}),),
    (Step("dtype", {"to": "bfloat16", "how": "autocast"}),),
    (Step("dtype", {"to": "tf32"}),),
    (MATH, CAST),
    (Step("channels_last"), CAST),
    (Step("prepack"),),
    (Step("prepack"), CAST),
    (Step("int8_eager", {"scales": "channel"}),),
    (Step("int8_eager", {"scales": "tensor"}), CAST),
    (Step("threads", {"count": 1}),),
    (MATH, Step("channels_last"), CAST, Step("prepack"), Step("threads", {"count": 1})),
]
TORCHAO = [
    (Step("quantize_int8_dynamic"),),
    (Step("quantize_int8_weight_only"), CAST),
]
SLOW = [
    (COMPILE,),
    (Step("channels_last"), CAST, FROZEN),
    (MATH, CAST, COMPILE, Step("threads", {"count": 1})),
    (Step("regional_compile", {"block": "Block"}), CAST),
    (Step("aoti"), CAST),
]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.inner = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        y = torch.nn.functional.scaled_dot_product_attention(y, y, y)
        return x + self.inner(y)


class Net(nn.Module):
    """Images and indices in, a dict out; a convolution, blocks, a tied weight, an integer output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 3)
        self.norm = nn.BatchNorm2d(32)
        self.table = nn.Embedding(32, 32)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(32, 32, bias=False)
        self.head.weight = self.table.weight

    def forward(self, image: torch.Tensor, index: torch.Tensor) -> dict[str, Any]:
        x = torch.relu(self.norm(self.conv(image))).flatten(2).transpose(1, 2) + self.table(index)
        for block in self.blocks:
            x = block(x)
        logits = self.head(x)
        return {"logits": logits, "parts": (x, logits.argmax(-1)), "index": index}


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def inputs(seed: int = 0) -> Call:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(2, 3, 6, 6, generator=generator)
    return Call((image,), {"index": torch.randint(0, 32, (2, 16), generator=generator)})


def settings() -> tuple[Any, ...]:
    import torch._inductor.config

    return (
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        torch._inductor.config.freezing,
        torch.is_autocast_enabled("cpu"),
        logging.getLogger("torchao").level,
    )


def check(steps: tuple[Step, ...]) -> None:
    original, call = net(), inputs()
    model = clone_model(original)
    before, around, keys = state_digest(model), settings(), list(model.state_dict())
    candidate = Candidate(steps)
    with torch.no_grad():
        expected = original(*call.args, **call.kwargs)
        shipped = ship(apply_candidate(begin(model, Mode.INFERENCE, {"main": call}), candidate), original)
        for _ in range(2):
            got = shipped(*call.args, **call.kwargs)
        assert settings() == around
        assert type(shipped) is Net
        assert list(shipped.state_dict()) == keys
        assert shipped.head.weight is shipped.table.weight
        assert list(got) == list(expected)
        assert type(got["parts"]) is tuple
        for a, b in zip((got["logits"], *got["parts"]), (expected["logits"], *expected["parts"]), strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert got["index"].dtype is torch.int64
        error = (got["logits"] - expected["logits"]).norm() / expected["logits"].norm()
        assert error < 0.05

        names: dict[str, Any] = {"model": clone_model(original)}
        names["call"] = plain_call(names["model"])
        order = [t.name for t in TRANSFORMS]
        for step in sorted(steps, key=lambda s: order.index(s.transform)):
            text = find(step.transform).source(step)
            assert "kernel_pytorch" not in text
            exec(text, names)
        ejected = names["call"](*call.args, **call.kwargs)
        assert torch.equal(ejected["logits"], got["logits"])
        assert list(names["model"].state_dict()) == keys

        restore(shipped)
        assert state_digest(shipped) == before
        assert torch.equal(shipped(*call.args, **call.kwargs)["logits"], expected["logits"])
    assert settings() == around
    copy.deepcopy(shipped)


@pytest.mark.parametrize("steps", QUICK, ids=lambda s: Candidate(s).label)
def test_quick_candidates_keep_the_contract_and_undo(steps: tuple[Step, ...]) -> None:
    if {"prepack", "dtype"} <= {s.transform for s in steps} and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN packs no bfloat16 weights on this processor")
    check(steps)


@pytest.mark.parametrize("steps", TORCHAO, ids=lambda s: Candidate(s).label)
def test_torchao_candidates_keep_the_contract_and_undo(steps: tuple[Step, ...]) -> None:
    pytest.importorskip("torchao")
    check(steps)


@pytest.mark.slow
@pytest.mark.parametrize("steps", SLOW, ids=lambda s: Candidate(s).label)
def test_compiled_candidates_keep_the_contract_and_undo(steps: tuple[Step, ...]) -> None:
    check(steps)


@pytest.mark.slow
def test_torchao_steps_compile() -> None:
    pytest.importorskip("torchao")
    check((Step("quantize_int8_dynamic"), CAST, COMPILE))
