"""Cross-entropy of a linear layer and of logits: under the interpreter the kernels against fp64 definitions."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from kernel_pytorch.core.types import Skip
from kernel_pytorch.errors import InputsError, ModelError
from kernel_pytorch.ops.float8_cast import Float8Matrix, float8_cast, fresh_state
from kernel_pytorch.ops.linear_cross_entropy import causal_lm_loss, cross_entropy, linear_cross_entropy, unsupported
from kernel_pytorch.ops.linear_cross_entropy.float8_op import (
    GradientCast,
    Products,
    float8_chunk_rows,
    float8_linear_cross_entropy_apply,
)
from kernel_pytorch.ops.linear_cross_entropy.op import chunk_rows
from kernel_pytorch.ops.linear_cross_entropy.reference import float8_slopes_reference, slopes_reference
from kernel_pytorch.ops.linear_cross_entropy.shapes import AWKWARD, LLAMA_3

from .conftest import run_interpreted

ROUNDING = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
IGNORED = -100


def test_kernels_under_the_interpreter() -> None:
    run_interpreted(__file__)


def inputs(shape: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    rows, size, columns = shape
    generator = torch.Generator().manual_seed(rows + columns)
    hidden, weight, bias = (
        torch.randn(*s, generator=generator).to(dtype).requires_grad_()
        for s in ((rows, size), (columns, size), (columns,))
    )
    labels = torch.randint(0, columns, (rows,), generator=generator)
    labels[1::4] = IGNORED
    return hidden, weight, bias, labels


def wide(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x.detach().double().requires_grad_() for x in tensors]


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    if not want.numel():
        return float(got.shape != want.shape)
    return float((got.detach().double() - want.detach()).norm() / want.detach().norm().clamp_min(1e-12))


def test_the_definition_is_that_of_pytorch() -> None:
    hidden, weight, bias, labels = inputs((9, 8, 33), torch.float64)
    got = linear_cross_entropy(hidden, weight, labels, bias=bias, label_smoothing=0.1)
    want = F.cross_entropy(F.linear(hidden, weight, bias), labels, label_smoothing=0.1)
    assert torch.allclose(got, want, rtol=1e-14)
    logits = torch.randn(2, 5, 33, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 33, (2, 5))
    capped = 3.0 * torch.tanh(logits / 3.0)
    want = F.cross_entropy(capped.flatten(0, 1), labels.flatten(), reduction="none").view(2, 5)
    assert torch.allclose(cross_entropy(logits, labels, softcap=3.0, reduction="none"), want, rtol=1e-14)


def test_a_named_implementation_does_not_fall_back() -> None:
    hidden, weight, _, labels = inputs((4, 8, 9))
    assert isinstance(unsupported(hidden, weight), Skip)
    with pytest.raises(InputsError, match="cuda"):
        linear_cross_entropy(hidden, weight, labels, impl="triton")
    with pytest.raises(InputsError, match="unknown impl"):
        cross_entropy(hidden, labels, impl="cuda")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"weight": torch.ones(9, 7)}, "takes hidden"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, "takes hidden"),
        ({"weight": torch.ones(9, 8).bfloat16()}, "one dtype"),
        ({"bias": torch.ones(8)}, "one dtype"),
        ({"labels": torch.zeros(4)}, "integers"),
        ({"label_smoothing": 1.5}, "label_smoothing"),
        ({"reduction": "max"}, "unknown reduction"),
        ({"chunk": 0}, "chunk"),
    ],
)
def test_what_does_not_fit_is_told(changed: dict[str, object], words: str) -> None:
    hidden, weight, _, labels = inputs((4, 8, 9))
    with pytest.raises(InputsError, match=words):
        linear_cross_entropy(**{"hidden": hidden, "weight": weight, "labels": labels, **changed})


def test_chunks_fill_the_buffer_evenly() -> None:
    rows, _, columns = LLAMA_3
    assert chunk_rows(2 * rows, columns, 2) == 4096
    assert chunk_rows(rows, columns, 2) == 4096
    assert chunk_rows(100, columns, 2) <= 128
    assert chunk_rows(rows, 1 << 20, 2) == 2048
    assert chunk_rows(10, 32, 2, chunk=3) == 3
    assert chunk_rows(0, 32, 2) == 1


def test_autocast_casts_as_a_linear_layer_does() -> None:
    hidden, weight, bias, labels = inputs((16, 8, 33))
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_cross_entropy(hidden, weight, labels, bias=bias)
        want = F.cross_entropy(F.linear(hidden, weight, bias).float(), labels)
    assert torch.equal(got, want)
    got.backward()
    assert weight.grad.dtype is torch.float32


OPTIONS = [
    {},
    {"chunk": 5},
    {"reduction": "sum", "chunk": 3},
    {"reduction": "none", "chunk": 4},
    {"label_smoothing": 0.1},
    {"softcap": 4.0, "label_smoothing": 0.2, "reduction": "none"},
    {"ignore_index": 2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", AWKWARD, ids=str)
def test_losses_and_gradients_keep_to_fp64(interpreter: None, shape: tuple[int, int, int], options: dict) -> None:
    hidden, weight, bias, labels = inputs(shape)
    options = {**options, "chunk": options.get("chunk", 1000)}
    if options.get("ignore_index") is not None:
        labels = labels.clamp_min(0)
    got = linear_cross_entropy(hidden, weight, labels, bias=bias, impl="triton", **options)
    exact = wide(hidden, weight, bias)
    del options["chunk"]
    want = linear_cross_entropy(exact[0], exact[1], labels, bias=exact[2], **options)
    if not shape[0] and got.dim() == 0 and options.get("reduction") != "sum":
        assert got.isnan()
        return
    assert got.shape == want.shape
    assert error(got, want) < 2e-6
    factor = torch.linspace(0.5, 2.0, max(got.numel(), 1))[: got.numel()].view(got.shape)
    (got * factor).sum().backward()
    (want * factor).sum().backward()
    for mine, theirs in zip((hidden, weight, bias), exact, strict=True):
        assert error(mine.grad, theirs.grad) < 3e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [128, 7, 2])
def test_low_precision_rounds_only_what_it_stores(interpreter: None, dtype: torch.dtype, chunk: int) -> None:
    hidden, weight, bias, labels = inputs((24, 16, 300), dtype)
    exact = wide(hidden, weight, bias)
    got = linear_cross_entropy(hidden, weight, labels, bias=bias, chunk=chunk, impl="triton")
    want = linear_cross_entropy(exact[0], exact[1], labels, bias=exact[2])
    assert got.dtype is torch.float32
    assert abs(got.item() - want.item()) < ROUNDING[dtype] * want.item()
    got.backward()
    want.backward()
    for mine, theirs in zip((hidden, weight, bias), exact, strict=True):
        assert mine.grad.dtype is dtype
        assert error(mine.grad, theirs.grad) < ROUNDING[dtype]


def test_fp16_gradients_survive_a_mean_over_many_rows(interpreter: None) -> None:
    """Slopes of 1e-3 over 300 rows would be 50 times fp16's least number, and off by one percent."""
    rows = 300
    right = 3.5 + 0.2 * torch.randn(rows)
    hidden = torch.stack((right, -right), dim=1).half().requires_grad_()
    weight = torch.eye(2).half().requires_grad_()
    labels = torch.zeros(rows, dtype=torch.int64)
    (linear_cross_entropy(hidden, weight, labels, impl="triton") * 2.0**14).backward()
    exact = wide(hidden, weight)
    (linear_cross_entropy(*exact, labels) * 2.0**14).backward()
    assert error(hidden.grad, exact[0].grad) < 1e-3
    assert error(weight.grad, exact[1].grad) < 1e-3


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_only_what_requires_gradients_gets_them(interpreter: None, frozen: str) -> None:
    hidden, weight, _, labels = inputs((6, 8, 40))
    if frozen != "weight":
        hidden = hidden.detach()
    if frozen != "hidden":
        weight = weight.detach()
    loss = linear_cross_entropy(hidden, weight, labels, impl="triton")
    assert loss.requires_grad is (frozen != "both")
    if frozen != "both":
        loss.backward()
        left = hidden if frozen == "weight" else weight
        assert left.grad.norm() > 0
        assert (weight if frozen == "weight" else hidden).grad is None


def test_tied_weights_and_a_factor_from_outside(interpreter: None) -> None:
    _, weight, _, labels = inputs((6, 8, 40))
    ids = torch.arange(6) * 3
    loss = linear_cross_entropy(weight[ids], weight, labels, impl="triton") * 0.25 + weight.square().sum()
    loss.backward()
    (exact,) = wide(weight)
    (linear_cross_entropy(exact[ids], exact, labels) * 0.25 + exact.square().sum()).backward()
    assert error(weight.grad, exact.grad) < 2e-6


def test_a_second_backward_is_refused_or_recomputed(interpreter: None) -> None:
    hidden, weight, _, labels = inputs((6, 8, 40))
    loss = linear_cross_entropy(hidden, weight, labels, impl="triton")
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="first backward"):
        loss.backward()
    rows = linear_cross_entropy(hidden, weight, labels, impl="triton", reduction="none")
    first = torch.autograd.grad(rows.sum(), hidden, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(rows.sum(), hidden)[0])


def test_batches_strides_and_small_integers(interpreter: None) -> None:
    hidden, weight, _, labels = inputs((12, 8, 40))
    batch = hidden.detach().view(3, 4, 8).transpose(0, 1)
    batch_labels = labels.view(3, 4).T.to(torch.int32)
    got = linear_cross_entropy(batch, weight, batch_labels, reduction="none", impl="triton")
    want = linear_cross_entropy(hidden, weight, labels, reduction="none", impl="reference")
    assert got.shape == (4, 3)
    assert torch.allclose(got, want.view(3, 4).T, atol=1e-5)
    logits = torch.randn(40, 12).T
    assert torch.allclose(cross_entropy(logits, labels, impl="triton"), F.cross_entropy(logits, labels), atol=1e-6)


def test_a_label_out_of_range_shows(interpreter: None) -> None:
    hidden, weight, _, labels = inputs((6, 8, 40))
    labels[0] = 40
    assert linear_cross_entropy(hidden, weight, labels, impl="triton").isnan()


def test_huge_logits_do_not_overflow(interpreter: None) -> None:
    logits = torch.tensor([[3e4, -3e4, 0.0, float("-inf")], [-3e4, -3e4, -3e4, -3e4]]).requires_grad_()
    labels = torch.tensor([1, 2])
    got = cross_entropy(logits, labels, reduction="none", impl="triton")
    assert torch.allclose(got, F.cross_entropy(logits, labels, reduction="none"))
    got.sum().backward()
    assert torch.allclose(logits.grad, torch.tensor([[1.0, -1.0, 0.0, 0.0], [0.25, 0.25, -0.75, 0.25]]), atol=2e-3)


UNCHUNKED = [{k: v for k, v in options.items() if k != "chunk"} for options in OPTIONS if options != {"chunk": 5}]


@pytest.mark.parametrize("options", UNCHUNKED, ids=str)
def test_cross_entropy_of_logits(interpreter: None, options: dict) -> None:
    for rows, _, columns in AWKWARD[1:]:
        logits = (3 * torch.randn(rows, columns)).requires_grad_()
        labels = torch.randint(0, columns, (rows,))
        if "ignore_index" not in options:
            labels[::3] = IGNORED
        (exact,) = wide(logits)
        got = cross_entropy(logits, labels, impl="triton", **options)
        want = cross_entropy(exact, labels, **options)
        if rows or options.get("reduction"):
            assert error(got, want) < 2e-6
            (got.sum() * 3).backward()
            (want.sum() * 3).backward()
            assert error(logits.grad, exact.grad) < 2e-6


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_it_is_the_same(interpreter: None) -> None:
    hidden, weight, _, labels = inputs((6, 8, 40))

    def loss(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(h, w, labels, impl="triton") * 2 + cross_entropy(h @ w.T, labels, impl="triton")

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    want = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
    got = torch.autograd.grad(compiled(hidden, weight), (hidden, weight))
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("op", ["cross_entropy", "cross_entropy_backward", "linear_cross_entropy"])
def test_operators_follow_the_rules_of_pytorch(interpreter: None, op: str) -> None:
    hidden, weight, _, labels = inputs((6, 8, 40))
    logits = (hidden @ weight.T).detach()
    options = (IGNORED, 0.1, 0.0)
    args = {
        "cross_entropy": (logits.requires_grad_(), labels, *options),
        "cross_entropy_backward": (torch.ones(6), logits.detach(), labels, torch.ones(6), *options),
        "linear_cross_entropy": (
            hidden.detach(),
            weight.detach(),
            None,
            labels,
            None,
            *options,
            True,
            4,
            [True, True, False],
        ),
    }[op]
    tests = ("test_schema", "test_faketensor") + (("test_autograd_registration",) if op == "cross_entropy" else ())
    torch.library.opcheck(getattr(torch.ops.kernel_pytorch, op).default, args, test_utils=tests)


FLOAT8_UNIT = 2.0**-2
"""Spacing of E5M2, beside which one slope of many that is rounded to the other side of a tie is seen."""


def float8_case(
    hidden: torch.Tensor, weight: torch.Tensor
) -> tuple[Float8Matrix, Float8Matrix, GradientCast, Products]:
    x8, w8 = (float8_cast(t, torch.float8_e4m3fn, power_of_2=True) for t in (hidden, weight))
    cast = GradientCast(torch.float8_e5m2, power_of_2=True)
    return x8, w8, cast, Products(hidden.dtype, (True, False, False), measured=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [None, 16])
def test_in_float8_it_is_exact_on_its_operands(interpreter: None, dtype: torch.dtype, chunk: int | None) -> None:
    rows, size, columns = 39, 32, 48
    hidden, weight, bias, labels = inputs((rows, size, columns), dtype)
    small = float8_case(hidden, weight)
    loss = float8_linear_cross_entropy_apply(
        hidden, weight, bias, labels, *small, ignore_index=IGNORED, reduction="mean", chunk=chunk
    )
    (loss * 2).backward()
    x, w = (m.row.double() * m.inverse.double() for m in small[:2])
    logits = x @ w.t() + bias.detach().double()
    assert abs(loss.item() - F.cross_entropy(logits, labels).item()) < ROUNDING[dtype]
    used = labels != IGNORED
    slopes = torch.where(used[:, None], logits.softmax(1) - F.one_hot(labels.clamp_min(0), columns), 0.0) / used.sum()
    # Casts are tested beside theirs; the interpreter rounds some values otherwise than GPUs.
    cast = float8_cast(slopes.to(dtype), torch.float8_e5m2, power_of_2=True)
    rounded = cast.row.double() * cast.inverse.double() * 2
    least = 2 * FLOAT8_UNIT / rounded.numel() ** 0.5 + ROUNDING[dtype]
    for got, want in ((hidden.grad, rounded @ w), (weight.grad, rounded.t() @ x), (bias.grad, 2 * slopes.sum(0))):
        assert got.dtype is dtype
        assert error(got, want) < least


# The interpreter cuts bfloat16 off where GPUs round, which at the ties of E5M2 shows everywhere.
@pytest.mark.parametrize(
    ("dtype", "form"),
    [
        (torch.float32, torch.float8_e4m3fn),
        (torch.float32, torch.float8_e5m2),
        (torch.bfloat16, torch.float8_e4m3fn),
    ],
)
@pytest.mark.parametrize("ignored", [IGNORED, 3], ids=["no word", "a word"])
def test_slopes_in_float8_are_those_of_the_definition(
    interpreter: None, dtype: torch.dtype, form: torch.dtype, ignored: int
) -> None:
    from kernel_pytorch.ops.linear_cross_entropy.float8_slopes_kernel import slopes

    rows, columns = 133, 147
    made = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(rows, columns, generator=made)).to(dtype)
    labels = torch.randint(0, columns, (rows,), generator=made)
    labels[5::7] = ignored
    factor = 1.0 / (labels != ignored).sum()
    _, wide = slopes_reference(logits, labels, ignore_index=ignored)
    wide = (wide * factor).to(dtype)
    _, back = float8_slopes_reference(wide, factor, form, power_of_2=True)
    state = fresh_state(1, "cpu")
    state[2] = 1.0 / back
    # By the cast's kernel: the interpreter rounds some values otherwise than the definition, and than GPUs.
    small = float8_cast(wide, form, state, role="read").row
    row, whole, inverse = torch.empty(rows, columns, dtype=form), torch.empty(columns, 160, dtype=form), torch.empty(1)
    turned = whole[:, 16:]
    lse = torch.logsumexp(logits.float(), 1)
    slopes(logits, labels, lse, factor, row, turned, inverse, power_of_2=True, ignore_index=ignored)
    assert torch.equal(inverse, back.reshape(1))
    assert torch.equal(turned[:, :rows].t().view(torch.uint8), row.view(torch.uint8))
    assert turned[:, rows:].float().count_nonzero() == 0
    assert row[labels == ignored].float().count_nonzero() == 0
    # Exponentials differ in their last bit, which rounds a few to the next number; of bfloat16 some are at ties.
    assert (row.float() != small.float()).float().mean() < (2e-3 if dtype is torch.float32 else 3e-2)
    assert error(row.double(), small.double()) < 0.02


def test_where_no_row_counts_slopes_in_float8_are_zero(interpreter: None) -> None:
    hidden, weight, bias, labels = inputs((20, 16, 48))
    labels[:] = IGNORED
    loss = float8_linear_cross_entropy_apply(
        hidden, weight, bias, labels, *float8_case(hidden, weight), ignore_index=IGNORED, reduction="sum", chunk=16
    )
    loss.backward()
    assert loss == 0
    assert all(t.grad is not None and t.grad.count_nonzero() == 0 for t in (hidden, weight, bias))


def test_in_float8_the_operator_follows_the_rules_of_pytorch(interpreter: None) -> None:
    # Its schema cannot be checked: PyTorch's check perturbs arguments, and has no sums of FP8.
    hidden, weight, bias, labels = (t.detach() for t in inputs((20, 16, 48)))
    x8, w8, cast, products = float8_case(hidden, weight)
    args = (
        x8.row, x8.transposed, x8.inverse, w8.row, w8.transposed, w8.inverse, bias, labels, None, cast.dtype,
        True, products.dtype, torch.float32, torch.float32, [True, False, False], False, IGNORED, True, 16,
    )  # fmt: skip
    for needs in ([True, True, True], [False, True, False], [False] * 3):
        torch.library.opcheck(
            torch.ops.kernel_pytorch.float8_linear_cross_entropy.default, (*args, needs),
            test_utils="test_faketensor",
        )  # fmt: skip


def test_chunks_in_float8_begin_where_products_can_read_them() -> None:
    rows, _, columns = LLAMA_3
    assert float8_chunk_rows(rows, columns, 2) == 4096
    assert float8_chunk_rows(10**6, columns, 2) % 16 == 0
    assert float8_chunk_rows(100, columns, 2, chunk=33) == 32
    assert float8_chunk_rows(0, columns, 2) == 16


class TestCausalLanguageModels:
    """Of Hugging Face's interface."""

    @staticmethod
    def model(name: str) -> torch.nn.Module:
        transformers = pytest.importorskip("transformers", reason="transformers is not installed")
        sizes = {
            "vocab_size": 97, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32,
        }  # fmt: skip
        torch.manual_seed(0)
        if name == "llama":
            return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).double()
        if name == "gemma2":
            config = transformers.Gemma2Config(**sizes, head_dim=8, final_logit_softcapping=5.0)
            return transformers.Gemma2ForCausalLM(config).double()
        return transformers.GraniteForCausalLM(transformers.GraniteConfig(**sizes, logits_scaling=4.0)).double()

    @pytest.mark.parametrize("name", ["llama", "gemma2"])
    def test_the_loss_is_the_models_own(self, name: str) -> None:
        model = self.model(name)
        ids = torch.randint(0, 97, (2, 9))
        labels = ids.clone()
        labels[0, :4] = IGNORED
        mask = torch.ones_like(ids)
        mask[0, 7:] = 0
        for extra in ({}, {"num_items_in_batch": 7}, {"attention_mask": mask}):
            model.zero_grad()
            want = model(input_ids=ids, labels=labels, **extra).loss
            want.backward()
            grads = {n: p.grad.clone() for n, p in model.named_parameters()}
            model.zero_grad()
            got = causal_lm_loss(model, ids, labels, **extra)
            got.backward()
            assert torch.allclose(got.float(), want.float(), rtol=1e-5)
            for n, p in model.named_parameters():
                assert torch.allclose(p.grad, grads[n], atol=1e-5), n

    def test_other_logits_and_other_interfaces_are_told(self) -> None:
        ids = torch.randint(0, 97, (2, 9))
        with pytest.raises(ModelError, match="does more to its logits"):
            causal_lm_loss(self.model("granite"), ids, ids)
        with pytest.raises(ModelError, match="base_model"):
            causal_lm_loss(torch.nn.Linear(2, 2), ids, ids)
