"""Casts to FP8: the definition, what the API refuses, and under the interpreter the kernel against the definition."""

from __future__ import annotations

import math

import pytest
import torch

from kernel_pytorch.core.types import Skip
from kernel_pytorch.errors import InputsError
from kernel_pytorch.ops.float8_cast import E4M3, E5M2, float8_cast, fresh_state, padded, unsupported
from kernel_pytorch.ops.float8_cast.reference import cast_reference, cast_rows_reference, quantise, scale_reference
from kernel_pytorch.ops.float8_cast.shapes import AWKWARD

from .conftest import run_interpreted


def test_kernels_under_the_interpreter() -> None:
    run_interpreted(__file__)


@pytest.mark.parametrize(("form", "step", "least"), [(E4M3, 2**-3, 2**-9), (E5M2, 2**-2, 2**-16)])
def test_values_are_rounded_to_the_nearest(form, step, least) -> None:
    x = torch.cat([torch.randn(2000, dtype=torch.float64) * 10.0**k for k in range(-6, 3)])
    got = quantise(x, torch.tensor(1.0), form).double()
    assert ((got - x).abs() <= torch.maximum(x.abs() * step / 2, torch.tensor(least / 2)) * (1 + 1e-6)).all()


def test_large_values_saturate_and_what_is_not_finite_is_nan() -> None:
    x = torch.tensor([1e4, -1e4, math.inf, -math.inf, math.nan])
    got = quantise(x, torch.tensor(1.0), E4M3).float()
    assert got[:2].tolist() == [448.0, -448.0]
    assert got[2:].isnan().all()


@pytest.mark.parametrize("form", [E4M3, E5M2])
def test_scales_bring_the_amax_to_the_limit(form) -> None:
    limit = torch.finfo(form).max
    amax = torch.tensor([0.0, 1e-42, 1e-3, 1.0, 448.0, 3e38])
    scale = scale_reference(amax, form)
    assert scale[0] == 1
    assert torch.isfinite(scale).all()
    assert torch.allclose(amax[2:] * scale[2:], torch.full((4,), limit), rtol=1e-6)
    powers = scale_reference(amax, form, power_of_2=True)
    assert (torch.frexp(powers)[0] == 0.5).all()
    assert ((powers <= scale) & (2 * powers > scale)).all()


def test_the_transposed_copy_is_the_other_and_zero_beyond_the_rows() -> None:
    x = torch.randn(5, 7)
    cast = float8_cast(x, E4M3)
    assert cast.transposed.shape == (7, padded(5))
    assert torch.equal(cast.transposed[:, :5].float(), cast.row.float().t())
    assert not cast.transposed[:, 5:].float().any()
    assert torch.allclose(cast.row.float() * cast.inverse, x, rtol=0.07, atol=0.01)
    assert float8_cast(x, E4M3, row=False).row.numel() == 0
    assert float8_cast(x, E4M3, transposed=False).transposed.numel() == 0


def test_a_delayed_scale_follows_the_largest_of_the_last_casts() -> None:
    state = fresh_state(2, "cpu")
    ones = torch.ones(2, 16)
    largest, used = [1.0, 8.0, 2.0, 2.0, 2.0], []
    for value in largest:
        used.append(1 / float(float8_cast(ones * value, E4M3, state).inverse) / 448)
    # The first by its own amax; then by the largest of the two casts before.
    assert used == pytest.approx([1 / 1, 1 / 1, 1 / 8, 1 / 8, 1 / 2], rel=1e-6)


def test_reading_leaves_the_state_alone_and_zeros_tell_it_nothing() -> None:
    state = fresh_state(4, "cpu")
    float8_cast(torch.zeros(2, 16), E4M3, state)
    assert not state.any()
    float8_cast(torch.full((2, 16), 3.0), E4M3, state)
    before = state.clone()
    float8_cast(torch.full((2, 16), 90.0), E4M3, state, role="read")
    assert torch.equal(state, before)
    float8_cast(torch.full((2, 16), math.nan), E4M3, state)
    float8_cast(torch.full((2, 16), 3.0), E4M3, state)
    assert state[2] == before[2]


def test_what_does_not_fit_is_told() -> None:
    x = torch.ones(2, 16)
    assert isinstance(unsupported(x), Skip)
    assert "float64" in unsupported(x.double()).reason
    for call in (
        lambda: float8_cast(torch.ones(2, 2, 2), E4M3),
        lambda: float8_cast(x, torch.bfloat16),
        lambda: float8_cast(x.int(), E4M3),
        lambda: float8_cast([x, x], E4M3),
        lambda: float8_cast([x, x.double()], E4M3, axis=1),
        lambda: float8_cast([x, torch.ones(3, 16)], E4M3, axis=1),
    ):
        with pytest.raises(InputsError, match="float8_cast takes"):
            call()
    with pytest.raises(ValueError, match="power of two"):
        fresh_state(3, "cpu")


def misrounded(got: torch.Tensor, exact: torch.Tensor) -> int:
    """Count values that are not nearest to `exact`, beyond what Triton's interpreter does otherwise than GPUs.

    It rounds values in the middle away from zero, loses the carry of those that round up to a power of two, and is
    a step off with some about and below the least normal number. On a GPU `tests/gpu` compares all bits.
    """
    limits = torch.finfo(got.dtype)
    low = limits.smallest_normal
    step = torch.where(exact.abs() <= low, 2 * low, 2.0 ** torch.floor(torch.log2(exact.abs()))) * limits.eps
    off = (got.float() - exact).abs() > step / 2 * (1 + 1e-4)
    twice = 2 * got.float()
    carried = ((twice - exact).abs() <= step) & (torch.frexp(twice)[0].abs() == 0.5)
    return int((off & ~carried).sum())


@pytest.mark.parametrize("power_of_2", [False, True])
@pytest.mark.parametrize("form", [E4M3, E5M2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", AWKWARD)
def test_the_kernel_is_the_definition(interpreter, shape, dtype, form, power_of_2) -> None:
    torch.manual_seed(sum(shape))
    mine, theirs = fresh_state(4, "cpu"), fresh_state(4, "cpu")
    options = {"row": True, "transposed": True, "update": True, "roll": True, "power_of_2": power_of_2}
    for i in range(3):
        x = (torch.randn(shape) * 3 * 1.7**i).to(dtype)
        for state, other in ((None, None), (mine, theirs)):
            got = float8_cast(x, form, state, power_of_2=power_of_2)
            row, transposed, inverse = cast_reference([x], other, form, **options)
            assert torch.allclose(got.inverse, inverse, rtol=1e-6)
            limit = torch.finfo(form).max
            exact = (x.float() / inverse).clamp(-limit, limit)
            assert got.row.shape == row.shape
            assert misrounded(got.row, exact) == 0
            assert got.transposed.shape == transposed.shape
            assert torch.equal(got.transposed[:, : len(x)].float(), got.row.float().t())
            assert not got.transposed[:, len(x) :].float().any()
        assert torch.allclose(mine, theirs, rtol=1e-6)


@pytest.mark.parametrize("delayed", [False, True])
def test_factors_are_multiplied_in(delayed) -> None:
    torch.manual_seed(0)
    x, rows, columns = torch.randn(20, 48), torch.rand(20) + 0.1, torch.randn(48) * 3
    mine, theirs = (fresh_state(2, "cpu") if delayed else None for _ in range(2))
    for i in range(3):
        got = float8_cast(x * 2.0**i, E4M3, mine, factors=(rows, columns))
        want = float8_cast(x * 2.0**i * rows[:, None] * columns, E4M3, theirs)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a.float(), b.float())
    assert mine is None or torch.equal(mine, theirs)
    for wrong in ((rows[1:], columns), (rows, columns[1:]), (columns, rows)):
        with pytest.raises(InputsError, match="factors are of the rows and columns"):
            float8_cast(x, E4M3, factors=wrong)
    with pytest.raises(InputsError, match="factors are of the rows and columns"):
        float8_cast(x, E4M3, factors=(rows, columns), by_row=True)


@pytest.mark.parametrize("delayed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", AWKWARD)
def test_the_kernel_multiplies_factors_in(interpreter, shape, dtype, delayed) -> None:
    torch.manual_seed(sum(shape))
    mine, theirs = (fresh_state(4, "cpu") if delayed else None for _ in range(2))
    rows, columns = torch.rand(shape[0]) + 0.1, (torch.randn(shape[1]) * 3).to(dtype)
    for i in range(3):
        x = (torch.randn(shape) * 1.7**i).to(dtype)
        got = float8_cast(x, E4M3, mine, factors=(rows, columns))
        exact = x.float() * rows[:, None] * columns.float()
        _, _, inverse = cast_reference(
            [x], theirs, E4M3, row=True, transposed=True, update=True, roll=True, row_factor=rows, column_factor=columns
        )
        assert torch.allclose(got.inverse, inverse, rtol=1e-6)
        assert misrounded(got.row, (exact / inverse).clamp(-448, 448)) == 0
        assert torch.equal(got.transposed[:, : len(x)].float(), got.row.float().t())
        assert not got.transposed[:, len(x) :].float().any()
    assert mine is None or torch.allclose(mine, theirs, rtol=1e-6)


PIECES = (([(16, 24), (48, 24), (5, 24)], 0), ([(20, 16), (20, 40)], 1), ([(130, 128), (130, 128)], 1))


@pytest.mark.parametrize(("shapes", "axis"), PIECES)
def test_several_matrices_become_one(shapes, axis) -> None:
    xs = [torch.randn(s) * 3.0**i for i, s in enumerate(shapes)]
    together, whole = float8_cast(xs, E4M3, axis=axis), float8_cast(torch.cat(xs, axis), E4M3)
    for a, b in zip(together, whole, strict=True):
        assert torch.equal(a.float(), b.float())


@pytest.mark.parametrize("delayed", [False, True])
@pytest.mark.parametrize(("shapes", "axis"), PIECES)
def test_the_kernel_makes_one_of_several(interpreter, shapes, axis, delayed) -> None:
    mine, theirs = (fresh_state(2, "cpu") if delayed else None for _ in range(2))
    for i in range(3):
        xs = [torch.randn(s) * 3.0 ** (i + j) for j, s in enumerate(shapes)]
        together, whole = float8_cast(xs, E4M3, mine, axis=axis), float8_cast(torch.cat(xs, axis), E4M3, theirs)
        for a, b in zip(together, whole, strict=True):
            assert torch.equal(a.float(), b.float())
        assert mine is None or torch.equal(mine, theirs)


def test_scales_by_row_are_those_of_each_row_and_column() -> None:
    x = torch.randn(20, 48) * torch.logspace(-3, 3, 20)[:, None]
    cast = float8_cast(x, E4M3, by_row=True)
    assert torch.allclose(cast.inverse[:, 0] * 448, x.abs().amax(1), rtol=1e-6)
    assert torch.allclose(cast.turned_inverse[:, 0] * 448, x.abs().amax(0), rtol=1e-6)
    back = cast.row.float() * cast.inverse
    assert ((back - x).abs() <= x.abs() * 2**-4 * 1.001 + x.abs().amax(1, keepdim=True) / 448 * 2**-10).all()
    turned = cast.transposed[:, :20].float() * cast.turned_inverse
    assert ((turned.t() - x).abs() <= x.abs() * 2**-4 * 1.001 + x.abs().amax(0) / 448 * 2**-10).all()
    with pytest.raises(InputsError, match="no state"):
        float8_cast(x, E4M3, fresh_state(2, "cpu"), by_row=True)


@pytest.mark.parametrize(("shapes", "axis"), [*PIECES, ([(1, 16)], 0), ([(0, 16)], 0), ([(70, 130)], 0)])
def test_the_kernel_by_row_is_the_definition(interpreter, shapes, axis) -> None:
    xs = [torch.randn(s) * torch.logspace(-1, 1, s[0])[:, None] for s in shapes]
    got = float8_cast(xs, E4M3, axis=axis, by_row=True, power_of_2=True)
    want = cast_rows_reference(xs, E4M3, row=True, transposed=True, power_of_2=True, axis=axis)
    whole = torch.cat(xs, axis)
    assert torch.equal(got.inverse, want[2])
    assert torch.equal(got.turned_inverse, want[3])
    for copy, exact, reference in (
        (got.row, whole / got.inverse, want[0]),
        (got.transposed[:, : len(whole)], whole.t() / got.turned_inverse, want[1][:, : len(whole)]),
    ):
        assert copy.shape == reference.shape
        assert misrounded(copy, exact) == 0
    assert not got.transposed[:, len(whole) :].float().any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of infinity times zero
def test_the_kernel_shows_what_is_not_finite(interpreter) -> None:
    x = torch.randn(20, 40)
    x[3, 5] = math.inf
    state = fresh_state(2, "cpu")
    assert float8_cast(x, E4M3, state).inverse.isnan().all()
    assert not state.any()
    float8_cast(torch.ones(20, 40), E4M3, state)
    float8_cast(x, E4M3, state)  # the interpreter's formats have no NaN: `tests/gpu` looks for it in the copies
    float8_cast(torch.ones(20, 40), E4M3, state)
    assert state[2] == 448


class AfterTheFirst:
    """Launches a kernel as its late programs find things: the first has written a scale into the state already."""

    def __init__(self, kernel, state) -> None:
        self.kernel, self.state = kernel, state

    def __getitem__(self, grid):
        def launch(*args, **options):
            if self.state[2] == 0:
                self.state[2] = 3.0  # not what it will be: whoever reads it shows
            self.kernel[grid](*args, **options)

        return launch


def test_a_program_that_begins_late_does_not_read_the_new_scale(interpreter, monkeypatch) -> None:
    from kernel_pytorch.ops.float8_cast import float8_cast_kernel as casts
    from kernel_pytorch.ops.float8_gated_mlp import float8_gated_mlp_kernel as gated

    x = torch.randn(130, 72)
    state, want = fresh_state(2, "cpu"), float8_cast(x, E4M3)
    monkeypatch.setattr(casts, "float8_cast_kernel", AfterTheFirst(casts.float8_cast_kernel, state))
    got = float8_cast(x, E4M3, state)
    assert torch.equal(got.row.float(), want.row.float())
    assert torch.equal(got.inverse, want.inverse)
    assert torch.isclose(state[2], 1 / want.inverse[0])

    gate_up, grad = torch.randn(130, 144), torch.randn(130, 72)
    states = [fresh_state(2, "cpu") for _ in range(2)]
    forward, backward = gated.float8_gated_mlp_forward_kernel, gated.float8_gated_mlp_backward_kernel
    options = {"update": True, "roll": True, "power_of_2": True}
    want_row, want_inverse = gated.forward(gate_up, None, E4M3, "silu", **options)
    parts = {"row": True, "transposed": True, "again": True, "power_of_2": True}
    wants = gated.backward(grad, gate_up, None, want_inverse, (E5M2, E4M3), "silu", **parts)
    monkeypatch.setattr(gated, "float8_gated_mlp_forward_kernel", AfterTheFirst(forward, states[0]))
    monkeypatch.setattr(gated, "float8_gated_mlp_backward_kernel", AfterTheFirst(backward, states[1]))
    row, inverse = gated.forward(gate_up, states[0], E4M3, "silu", **options)
    assert torch.equal(inverse, want_inverse)
    assert torch.equal(row.float(), want_row.float())
    gots = gated.backward(grad, gate_up, states[1], inverse, (E5M2, E4M3), "silu", **parts)
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(gots, wants, strict=True))


def test_the_operator_is_registered_as_pytorch_wants() -> None:
    op = torch.ops.kernel_pytorch.float8_cast.default
    arguments = ([torch.randn(8, 16)], fresh_state(2, "cpu"), E4M3, True, True, "forward", True)
    # Not its schema: the state is written undeclared, and op.py says why.
    torch.library.opcheck(op, arguments, test_utils=("test_autograd_registration", "test_faketensor"))


@pytest.mark.parametrize("apart", [1, 3])
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, E4M3])
def test_the_kernel_counts_what_the_operator_counts(
    interpreter: None, monkeypatch: pytest.MonkeyPatch, kind: torch.dtype, by_row: bool, apart: int
) -> None:
    from kernel_pytorch.ops.float8_cast import counting
    from kernel_pytorch.ops.float8_cast.float8_count_kernel import count

    made = torch.Generator().manual_seed(0)
    x = torch.randn(50, 70, generator=made) * torch.exp2(torch.randint(-12, 12, (50, 70), generator=made))
    x[3, 3] = 0.0
    if kind is not E4M3:
        x[6, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    x = x.clamp(-448, 448).to(kind) if kind is E4M3 else x.to(kind)
    inverse = torch.full((50, 1) if by_row else (1,), 0.25)
    if by_row:
        inverse[::6] = 1.0
    want, got = (torch.ones(counting.COLUMNS, dtype=torch.float64) for _ in range(2))
    monkeypatch.setattr(counting, "_AT_MOST", 50 * 70 // apart)
    counting.switch(want, on=True)
    counting.count_op([x], inverse, E4M3, want)
    counting.switch(want, on=False)
    count(x, inverse, got, apart=apart, limit=448.0, least=2.0**-9, small=kind is E4M3)
    assert torch.equal(got, want)
    assert (got[:4] > 1).tolist() == [True, True, True, kind is not E4M3]
