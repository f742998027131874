"""A plan as plain source: it runs where this package does not exist, and does what `apply` does."""

from __future__ import annotations

import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from plans import plan, trial
from tests import forks

from kernel_pytorch.core.describe import fingerprint
from kernel_pytorch.core.program import signatures_of
from kernel_pytorch.core.targets import load_target
from kernel_pytorch.core.types import Mode, Step
from kernel_pytorch.core.workload import Call
from kernel_pytorch.hardware import detect
from kernel_pytorch.plan.apply import apply, prepare
from kernel_pytorch.plan.eject import eject

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method.:DeprecationWarning")

SOURCE = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))

        def forward(self, x, *, scale=None):
            out = self.body(x)
            return (out, out.sum(1) if scale is None else out * scale)

    def pair():
        torch.manual_seed(0)
        return Net(), ((torch.randn(4, 8),), {"scale": torch.tensor(2.0)})
"""

BF16 = Step("dtype", {"to": "bfloat16", "how": "cast"})
AUTOCAST = Step("dtype", {"to": "bfloat16", "how": "autocast"})
THREADS = Step("threads", {"count": 1})
COMPILED = Step("compile", {"mode": "default"})
FUSED = Step("fused_optimizer", {"implementation": "fused"})


@pytest.fixture
def target(tmp_path: Path) -> str:
    (tmp_path / "net_file.py").write_text(textwrap.dedent(SOURCE))
    return f"{tmp_path / 'net_file.py'}:pair"


def plan_for(workload, *steps: Step, mode: Mode = Mode.INFERENCE):
    made = plan()
    spec = replace(
        made.workload,
        fingerprint=fingerprint(workload.model()),
        mode=mode,
        signatures={"main": signatures_of(workload.call("main", 0))},
    )
    return replace(made, workload=spec, device=detect(), chosen=trial(*steps, phase="confirm"))


def run(tmp_path: Path, source: str, then: str) -> str:
    """Run source where kernel_pytorch cannot be imported."""
    path = tmp_path / "ejected.py"
    path.write_text(source)
    script = tmp_path / "uses_ejected.py"
    script.write_text("import sys\nsys.modules['kernel_pytorch'] = None\n" + textwrap.dedent(then))
    done = forks.python(script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return done.stdout


CHECK = """
    import torch, ejected, net_file
    torch.set_num_threads(1)
    model, (args, kwargs) = net_file.pair()
    keys = list(model.state_dict())
    before = [p.clone() for p in model.parameters()]
    fast = ejected.optimize(model)
    with torch.no_grad():
        inside = fast(*args, **kwargs)
        other = fast(args[0][:3], **kwargs)
    outside = fast(*args, **kwargs)
    assert type(fast) is type(model) and list(fast.state_dict()) == keys
    assert all(torch.equal(a, b) and a.dtype is b.dtype for a, b in zip(before, model.parameters()))
    torch.save((inside, other, [t.detach() for t in outside]), sys.argv[1] if len(sys.argv) > 1 else "OUT")
"""


def agrees(tmp_path: Path, target: str, *steps: Step) -> None:
    workload = load_target(target)
    made = plan_for(workload, *steps)
    run(tmp_path, eject(made, target), CHECK.replace("OUT", str(tmp_path / "out.pt")))
    call = workload.call("main", 0)
    fast = apply(made, workload.model(), inputs=call)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            expected = (fast(*call.args, **call.kwargs), fast(call.args[0][:3], **call.kwargs))
        plain = fast(*call.args, **call.kwargs)
    finally:
        torch.set_num_threads(threads)
    got = torch.load(tmp_path / "out.pt")
    for one, two in zip((*expected, plain), got, strict=True):
        assert all(torch.equal(a, b) and a.dtype is b.dtype for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("steps", [(), (BF16,), (AUTOCAST, THREADS)], ids=str)
def test_ejected_source_equals_apply(tmp_path, target, steps):
    agrees(tmp_path, target, *steps)


@pytest.mark.slow
def test_ejected_compiled_source_equals_apply(tmp_path, target):
    agrees(tmp_path, target, BF16, COMPILED)


def test_what_is_compiled_for_a_shape_is_guarded_by_it(target):
    made = plan_for(load_target(target), COMPILED)
    assert "(((4, 8), 'float32'), ((), 'float32'))" in eject(made)
    dynamic = replace(made, chosen=trial(Step("compile", {"mode": "default", "dynamic": True})))
    assert "SHAPES" not in eject(dynamic)


def test_the_ejected_main_times_the_target(tmp_path, target):
    source = eject(plan_for(load_target(target), BF16), target)
    out = run(tmp_path, source, "import ejected; ejected.main()")
    assert [line.split(":")[0] for line in out.splitlines()] == ["before", "after"]


def test_without_an_importable_target_there_is_no_main(target):
    made = plan_for(load_target(target), BF16)
    for other in ("", "hf:bert", "timm:resnet18", "x.pt2"):
        assert "def main()" not in eject(made, other)


def test_an_ejected_training_plan_changes_model_and_optimizer_in_place(tmp_path, target):
    made = plan_for(load_target(target), AUTOCAST, FUSED, mode=Mode.TRAINING)
    train = """
        torch.set_num_threads(1)
        model, (args, kwargs) = net_file.pair()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        model.train()
        PREPARE
        assert optimizer.param_groups[0]["fused"]
        for _ in range(3):
            optimizer.zero_grad()
            model(*args, **kwargs)[0].square().mean().backward()
            optimizer.step()
        result = [p.detach() for p in model.parameters()]
    """
    mine = train.replace("PREPARE", "assert ejected.optimize(model, optimizer) is model")
    then = "\nimport torch, ejected, net_file\n" + textwrap.dedent(mine)
    then += f"torch.save(result, {str(tmp_path / 'p.pt')!r})\n"
    run(tmp_path, eject(made, target), then)
    names: dict = {"torch": torch, "prepare": prepare, "made": made}
    threads = torch.get_num_threads()
    try:
        load = load_target(target)
        names["net_file"] = type("Module", (), {"pair": staticmethod(lambda: (load.model(), as_pair(load)))})
        exec(textwrap.dedent(train.replace("PREPARE", "prepare(model, optimizer, plan=made)")), names)
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(names["result"], torch.load(tmp_path / "p.pt"), strict=True):
        assert torch.equal(one, two)


def as_pair(workload) -> tuple:
    call: Call = workload.call("main", 0)
    return call.args, dict(call.kwargs)
