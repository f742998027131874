"""PyTorch/XLA behind the runtime's interface: what is computed and when, what is compiled and how often."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from kernel_pytorch.backends import manager_for
from kernel_pytorch.errors import KptError


def hlo(tensor: torch.Tensor) -> str:
    import torch_xla

    return torch_xla._XLAC._get_xla_tensors_hlo([tensor])


def test_it_says_what_it_is(torch_xla):
    assert torch_xla.name == "torch_xla"
    assert torch_xla.version.startswith("2.9")
    assert torch_xla.device == torch.device("xla", 0)
    spec = manager_for("tpu").spec
    assert spec.software["runtime"].startswith(f"torch_xla {torch_xla.version}")
    assert ("emulated" in spec.software["runtime"]) == torch_xla.emulated


def test_what_is_recorded_runs_when_the_device_is_waited_for(torch_xla):
    x = torch.ones(37, 41, device=torch_xla.device)
    torch_xla.synchronize()
    before = torch_xla.executions()
    y = x * 3.0
    assert torch_xla.executions() == before
    torch_xla.synchronize()
    assert torch_xla.executions() == before + 1
    assert y.cpu().sum() == 3 * 37 * 41


def test_a_result_is_held_while_it_is_timed_and_one_that_is_dropped_is_not_computed(torch_xla):
    manager = manager_for("tpu")
    assert manager.lazy
    x = manager.place(torch.ones(53, 59))
    manager.synchronize()
    for work, runs in ((lambda: x * 5.0, 1), (lambda: (x * 7.0, None)[1], 0)):
        before = torch_xla.executions()
        assert manager.time_ms(work) > 0.0
        assert torch_xla.executions() == before + runs


def test_a_shape_is_compiled_once(torch_xla):
    def compiled(rows):
        before = torch_xla.compilations()
        x = torch.arange(float(rows), device=torch_xla.device)
        y = (x * 2.0 + 1.0).tanh()
        torch_xla.synchronize()
        del y
        return torch_xla.compilations() - before

    assert [compiled(rows) for rows in (101, 101, 103, 101, 103)] == [1, 0, 1, 0, 0]


def test_operators_that_leave_the_device_are_counted(torch_xla):
    before = dict(torch_xla.fallbacks())
    assert torch.ones(3, device=torch_xla.device).sum().item() == 3.0
    torch.linalg.eigvals(torch.eye(3, device=torch_xla.device))
    torch_xla.synchronize()
    new = {n for n, count in torch_xla.fallbacks().items() if count > before.get(n, 0)}
    assert "aten::_local_scalar_dense" in new
    assert len(new) > 1, "eigenvalues have no lowering"


def test_the_barrier_is_in_the_program_and_changes_no_number(torch_xla):
    x = torch.randn(17, 19, generator=torch.Generator().manual_seed(0))
    given = x.to(torch_xla.device)
    assert "opt-barrier" not in hlo(given.tanh() * 1.0)
    (held,) = torch_xla.barrier([given.tanh()])
    assert not held.requires_grad
    result = held * 2.0
    assert "opt-barrier" in hlo(result)
    torch_xla.synchronize()
    assert torch.allclose(result.cpu(), x.tanh() * 2.0, atol=1e-6)
    assert torch.equal(given.cpu(), x), "what is given stays as it is"


def test_work_is_not_merged_across_the_barrier(torch_xla):
    """What rematerialisation needs: without it XLA finds that the second product is the first one."""
    x = torch.ones(23, 23, device=torch_xla.device)
    torch_xla.synchronize()
    (behind,) = torch_xla.barrier([x])
    with_barrier = torch.mm(x, x) + torch.mm(behind, behind)
    assert hlo(with_barrier).count(" dot(") == 2
    assert "opt-barrier" in hlo(with_barrier)


def test_torchs_seed_is_the_devices_too(torch_xla):
    def draw(seed):
        torch.manual_seed(seed)
        drawn = torch.rand(64, device=torch_xla.device)
        dropped = nn.functional.dropout(torch.ones(64, device=torch_xla.device), 0.5)
        torch_xla.synchronize()
        return drawn.cpu(), dropped.cpu(), torch.rand(8)

    for one, same, other in zip(draw(3), draw(3), draw(4), strict=True):
        assert torch.equal(one, same)
        assert not torch.equal(one, other)


def test_autocast_computes_products_in_bfloat16(torch_xla):
    x = torch.ones(8, 8, device=torch_xla.device)
    with torch.autocast(torch_xla.autocast_device, dtype=torch.bfloat16):
        assert torch.mm(x, x).dtype is torch.bfloat16
        assert (x + x).dtype is torch.float32


def test_a_whole_step_is_one_program_or_an_error(torch_xla):
    def clean(x):
        return (x * 2.0).sum()

    def reads_a_value(x):
        return x * 2.0 if x.sum().item() > 0.0 else x

    x = torch.ones(29, device=torch_xla.device)
    torch_xla.synchronize()
    assert float(torch_xla.compile(clean, whole=True)(x)) == 58.0
    with pytest.raises(RuntimeError, match="inside the compiled function"):
        torch_xla.compile(reads_a_value, whole=True)(x)
    torch_xla.synchronize()


def test_the_number_of_graphs_can_be_bounded(torch_xla):
    def step(x):
        return (x * 2.0).sum()

    bounded = torch_xla.compile(step, most_graphs=1)
    for _ in range(2):
        assert float(bounded(torch.ones(31, device=torch_xla.device))) == 62.0
    with pytest.raises(RuntimeError, match="different graphs"):
        bounded(torch.ones(3, 3, device=torch_xla.device).exp().cos())


def test_memory_is_unknown_where_the_runtime_does_not_tell(torch_xla):
    told = torch_xla.memory()
    assert (told is None) == torch_xla.emulated
    torch_xla.reset_peak()


def test_a_placed_model_keeps_the_ties_that_moving_it_breaks(torch_xla):
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    model[1].weight = model[0].weight
    placed = manager_for("tpu").place(model)
    assert placed[1].weight is placed[0].weight
    moved = model.to(torch_xla.device)
    assert moved[1].weight is not moved[0].weight, "the guide warns of it: a release that mends this may say less"


def test_torch_compile_trains_through_the_runtimes_backend(torch_xla):
    def step(device, wrap):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 1)).to(device)
        x = torch.linspace(-1.0, 1.0, 24).reshape(4, 6).to(device)
        loss = wrap(lambda: model(x).square().mean())()
        loss.backward()
        torch_xla.synchronize()
        return loss.detach().cpu(), model[0].weight.grad.cpu()

    want = step("cpu", lambda fn: fn)
    got = step(torch_xla.device, lambda fn: torch.compile(fn, backend=torch_xla.compile_backend))
    for one, other in zip(got, want, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_a_contradicting_device_is_told_in_one_line(torch_xla):
    code = (
        "from kernel_pytorch.backends.tpu import runtimes\n"
        "try:\n    runtimes.load()\n"
        "except Exception as error:\n    print(type(error).__name__, error, '|', error.fix)"
    )
    env = {**__import__("os").environ, "PJRT_DEVICE": "CUDA", "KPT_TPU_EMULATE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120, check=True
    )
    assert KptError.__name__ in done.stdout
    assert "PJRT_DEVICE=CUDA contradicts" in done.stdout
    assert "unset PJRT_DEVICE" in done.stdout


def test_every_module_imports_with_the_torch_that_it_needs(torch_xla):
    """The package promises torch 2.9 and later; what needs an optional package may miss that one alone."""
    optional = ("triton", "transformers", "lightning", "sqlalchemy", "alembic", "psycopg", "prometheus_client")
    code = (
        "import importlib, pkgutil, kernel_pytorch\n"
        "for found in pkgutil.walk_packages(kernel_pytorch.__path__, 'kernel_pytorch.'):\n"
        "    if found.name.endswith('__main__'): continue\n"
        "    try: importlib.import_module(found.name)\n"
        "    except ModuleNotFoundError as error:\n"
        f"        if error.name not in {optional}: raise\n"
        "print('all')"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "all", done.stderr
