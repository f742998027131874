"""TorchTPU's attention kernels: what they compute, by running their own Mosaic text, and that they compile for TPUs."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import pytest
import torch
from torch import nn

from kernel_pytorch import Workload
from kernel_pytorch.backends.tpu.ahead import Lowered, compile_lowered, lower_program
from kernel_pytorch.backends.tpu.packages import Use, blocking
from kernel_pytorch.backends.tpu.topology import parse_topology
from kernel_pytorch.core.types import Candidate, Mode, Step
from kernel_pytorch.errors import KptError
from kernel_pytorch.fit.build import Build

from .mosaic import Kernel, kernels_of

_MISSING = [name for name in ("torch_tpu", "libtpu", "jax") if importlib.util.find_spec(name) is None]
_SKIP = blocking(Use.AHEAD_OF_TIME)
pytestmark = [
    pytest.mark.skipif(bool(_MISSING), reason=f"not installed: {', '.join(_MISSING)}; make test-tpu installs them"),
    pytest.mark.skipif(_SKIP is not None, reason=_SKIP.reason if _SKIP is not None else ""),
]

BATCH, HEADS, WIDTH = 1, 2, 128


class Attends(nn.Module):
    def __init__(self, *, causal: bool, dtype: torch.dtype, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * HEADS * width, bias=False, dtype=dtype)
        self.causal, self.width = causal, width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, self.width)).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)


def mean_square(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).float().square().mean()


def lowered(rows: int, *, causal: bool, dtype: torch.dtype, width: int = WIDTH, pad: int = 0) -> Lowered:
    workload = Workload(
        model=lambda: Attends(causal=causal, dtype=dtype, width=width),
        inputs=lambda: torch.zeros(BATCH, rows, WIDTH, dtype=dtype),
        loss=mean_square,
    )
    step = Step("splash_attention", {"pad": pad} if pad else {})
    return lower_program(Build(workload, Mode.TRAINING, candidate=Candidate((step,))))


@dataclass(frozen=True)
class Case:
    rows: int
    causal: bool
    dtype: torch.dtype
    width: int = WIDTH
    pad: int = 0


CASES = [
    Case(256, causal=True, dtype=torch.float32),
    Case(1536, causal=True, dtype=torch.float32),
    Case(1536, causal=False, dtype=torch.float32),
    Case(1536, causal=True, dtype=torch.bfloat16),
    Case(256, causal=True, dtype=torch.float32, width=160, pad=128),
    Case(256, causal=False, dtype=torch.float32, width=80, pad=128),
]


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


@pytest.fixture(scope="module")
def kernels(case: Case) -> list[Kernel]:
    """The kernels of a training step: forward, and two backward."""
    found = list(kernels_of(lowered(**asdict(case)).stablehlo))
    assert [kernel.name for kernel, _ in found] == ["flash_forward", "flash_backward_dkv", "flash_backward_dq"]
    assert [len(operands) for _, operands in found] == [3, 6, 7]
    return [kernel for kernel, _ in found]


def computed(kernels: Sequence[Kernel], case: Case) -> dict[str, torch.Tensor]:
    """Return result and gradients as the kernels give them."""
    forward, backward_kv, backward_q = kernels
    query, key, value, grad = (_padded(t, case) for t in given(case))
    sums = torch.empty(BATCH, HEADS, 1, case.rows)
    result, sums = forward([query, key, value], [query, sums])
    inner = (result.float() * grad.float()).sum(-1).unsqueeze(-2)
    operands = [query, key, value, grad, sums, inner]
    d_key, d_value = backward_kv(operands, [key, value])
    (d_query,) = backward_q([*operands, result], [query])
    found = {"result": result, "query": d_query, "key": d_key, "value": d_value}
    return {name: t[..., : case.width] for name, t in found.items()}


def _padded(tensor: torch.Tensor, case: Case) -> torch.Tensor:
    return nn.functional.pad(tensor, (0, -case.width % case.pad)) if case.pad else tensor


def given(case: Case) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(case.rows)
    return [
        torch.randn(BATCH, HEADS, case.rows, case.width, generator=generator, dtype=torch.float64).to(case.dtype)
        for _ in range(4)
    ]


def reference(case: Case) -> dict[str, torch.Tensor]:
    """Return the same in float64, written out."""
    query, key, value, grad = (t.double() for t in given(case))
    leaves = [t.requires_grad_() for t in (query, key, value)]
    scores = query @ key.mT / case.width**0.5
    if case.causal:
        scores = scores.masked_fill(~torch.ones(case.rows, case.rows, dtype=torch.bool).tril(), float("-inf"))
    result = scores.softmax(-1) @ value
    d_query, d_key, d_value = torch.autograd.grad(result, leaves, grad)
    return {"result": result.detach(), "query": d_query, "key": d_key, "value": d_value}


def furthest(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Return the largest difference of any, over the largest value of its kind; infinite where one is no number."""
    errors = [((found[n].double() - wanted[n]).abs().max() / wanted[n].abs().max()).item() for n in wanted]
    return max(error if error == error else float("inf") for error in errors)


def test_the_kernels_compute_attention_and_its_gradients(kernels: list[Kernel], case: Case) -> None:
    budget = 1e-5 if case.dtype is torch.float32 else 2e-2
    assert furthest(computed(kernels, case), reference(case)) < budget


def test_a_kernel_with_a_wrong_mask_is_noticed(kernels: list[Kernel], case: Case) -> None:
    masks = [x for x in kernels[0].text.splitlines() if '"stable_mosaic.arith.cmpi"' in x and x.endswith("xi1>")]
    assert bool(masks) == case.causal
    for mask in masks:
        assert "predicate = 5" in mask  # a query sees the keys up to its own
        wrong = Kernel(kernels[0].text.replace(mask, mask.replace("predicate = 5", "predicate = 4")))
        assert furthest(computed([wrong, *kernels[1:]], case), reference(case)) > 0.1


@pytest.mark.parametrize("width", [WIDTH, 160])
@pytest.mark.parametrize("topology", ["v5e:1", "v5p:1", "v6e:1"])
def test_the_kernels_compile(topology: str, width: int) -> None:
    program = lowered(2048, causal=True, dtype=torch.bfloat16, width=width, pad=0 if width == WIDTH else 128)
    assert len(list(kernels_of(program.stablehlo))) == 3
    compiled = compile_lowered(program, parse_topology(topology), dump=False)
    assert compiled.fits
    scores = BATCH * HEADS * 2048 * 2048 * 2
    assert (
        compiled.temp_bytes < (2 if width == WIDTH else 3) * scores
    )  # as many as one pass would hold, were they not kernels


def test_what_the_kernels_do_not_take_is_told_and_padded_it_is_taken() -> None:
    with pytest.raises(KptError, match=r"\(1, 2, 256, 160\).* are not taken"):
        lowered(256, causal=True, dtype=torch.float32, width=160)
    with pytest.raises(KptError, match="multiples of 128 already"):
        lowered(256, causal=True, dtype=torch.float32, pad=128)
    assert len(list(kernels_of(lowered(256, causal=True, dtype=torch.float32, width=192, pad=128).stablehlo))) == 3
