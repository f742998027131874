"""AOTInductor packages: guarded inputs, files beside a plan, trust."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from kernel_pytorch.catalog import apply_candidate
from kernel_pytorch.core.program import begin, ship
from kernel_pytorch.core.types import Candidate, Mode, Step
from kernel_pytorch.core.workload import Call
from kernel_pytorch.errors import CandidateError, InputsError
from kernel_pytorch.transforms import aoti

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")

AOTI = Candidate((Step("aoti"),))


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4), nn.Softmax(-1)).eval()


def test_only_a_known_signature_reaches_a_package() -> None:
    x = torch.ones(16, 8)
    run = aoti.guarded({aoti.signature((x,), {}): lambda y: y * 2})
    assert torch.equal(run(x), x * 2)
    assert run(torch.ones(8, 16).t()).is_contiguous()
    for other in (torch.ones(3, 8), torch.ones(32, 8), torch.ones(16, 8, dtype=torch.float64)):
        with pytest.raises(ValueError, match="no package was traced"):
            run(other)


def test_without_example_inputs_it_is_refused_and_not_at_every_call() -> None:
    with pytest.raises(CandidateError, match="example inputs") as caught:
        apply_candidate(begin(net(), Mode.INFERENCE, {}), AOTI)
    assert "inputs=" in caught.value.fix


@pytest.mark.slow
def test_a_bare_package_answers_wrongly_where_a_shipped_one_runs_the_original(tmp_path: Path) -> None:
    original, model, x = net(), net(), torch.randn(16, 8)
    program = begin(model, Mode.INFERENCE, {"main": Call((x,))})
    program.artifact_dir = tmp_path
    program = apply_candidate(program, AOTI)
    assert not program.dynamic
    bare = torch._inductor.aoti_load_package(str(tmp_path / "model-main.pt2"))
    with torch.no_grad():
        assert bare(torch.randn(32, 8)).shape == (16, 4)  # the danger

        with pytest.raises(InputsError, match=r"no package was traced at inputs of shape \[\(32, 8\)\]"):
            program.call(torch.randn(32, 8))
        shipped = ship(program, original)
        assert torch.allclose(shipped(x), original(x), atol=1e-6)
        for rows in (3, 32):
            other = torch.randn(rows, 8)
            assert torch.equal(shipped(other), original(other))

    # replayed: untrusted code is made again, trusted code of the same weights is loaded, of others is not
    made: list[str] = []
    real, kept = aoti.package, tmp_path / "kept.pt2"

    def counting(*arguments: object) -> str:
        made.append(str(arguments[-1]))
        if not kept.exists():
            shutil.copyfile(real(*arguments), kept)
        shutil.copyfile(kept, made[-1])  # of the same weights: compiling them twice would show no more
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aoti, "package", counting)
        for seed, trusted, expected in ((0, True, 0), (1, True, 1), (1, False, 2)):
            again = begin(net(seed), Mode.INFERENCE, {"main": Call((x,))})
            again.artifact_dir, again.trust_artifacts = tmp_path, trusted
            again = apply_candidate(again, AOTI)
            assert len(made) == expected, again.notes
            with torch.no_grad():
                assert torch.allclose(again.call(x), net(seed)(x), atol=1e-6)

    # weights that change after packaging are used, without the package
    with torch.no_grad():
        again.model[0].weight.mul_(3.0)
        assert torch.allclose(again.call(x), again.model._call_impl(x), atol=1e-6)
    assert any("weights changed after packaging" in note for note in again.notes)
