"""A plan's compile cache: code, so loaded only where trusted, and only where it was made for."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
import textwrap
import types
import zipfile
from dataclasses import replace

import pytest
import torch
from plans import device, plan, trial
from torch import nn

from kernel_pytorch.core.describe import fingerprint
from kernel_pytorch.core.program import signatures_of
from kernel_pytorch.core.types import Skip, Step
from kernel_pytorch.core.workload import Call
from kernel_pytorch.errors import OutputDirectoryError, PlanError
from kernel_pytorch.hardware import detect
from kernel_pytorch.plan import compile_cache
from kernel_pytorch.plan.apply import apply
from kernel_pytorch.plan.schema import dumps

CONTENT = b"what torch recorded" * 100


@pytest.fixture
def inductor(tmp_path, monkeypatch):
    """Inductor with a cache directory of its own, artifacts planted, and what was loaded."""
    root = tmp_path / "inductor"
    (root / "ab").mkdir(parents=True)
    (root / "ab" / "cabc.so").write_bytes(b"a check of the instruction set")
    (root / "ab" / "cabc.cpp").write_text("int check();")
    (root / "ab" / "cdef.main.so").write_bytes(b"a kernel of somebody else")
    (root / "ab" / "cdef.main.cpp").write_text("int kernel();")
    (root / "ab" / "cghi.main.so").write_bytes(b"a kernel of this process")
    maps = tmp_path / "maps"
    maps.write_text(
        f"7f00-7f01 r-xp 00000000 08:01 42    {root}/ab/cghi.main.so\n7f02-7f03 rw-p 00000000 00:00 0 \n"
        f"7f04-7f05 r-xp 00000000 08:01 43    /usr/lib/libc.so\n7f06-7f07 r-xp 0 08:01 44    {root}/ab/gone.so\n"
    )
    monkeypatch.setattr(compile_cache, "_MAPS", maps)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(root))
    loaded: list[bytes] = []
    info = types.SimpleNamespace(artifacts={"inductor": ["key"]})
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (CONTENT, info))
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", lambda content: loaded.append(content) or info)
    return types.SimpleNamespace(root=root, loaded=loaded, maps=maps)


@pytest.fixture
def saved(inductor, tmp_path):
    directory = tmp_path / "artifacts"
    assert compile_cache.save(directory, device()) is None
    return directory


def test_what_was_saved_is_loaded_where_it_is_trusted(inductor, saved, tmp_path, monkeypatch):
    assert sorted(p.name for p in saved.iterdir()) == ["compile_cache.json", "compile_cache.zip"]
    fresh = tmp_path / "fresh"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(fresh))
    assert compile_cache.load(saved, device(), trust=True) is None
    assert inductor.loaded == [CONTENT]
    assert (fresh / "ab" / "cabc.so").read_bytes() == b"a check of the instruction set"
    assert (fresh / "ab" / "cghi.main.so").read_bytes() == b"a kernel of this process"
    assert not list(fresh.rglob("cdef*")), "a kernel that this process has not loaded is not its own"


def test_without_a_library_of_its_own_no_check_is_carried(inductor, tmp_path):
    inductor.maps.write_text("7f04-7f05 r-xp 00000000 08:01 43    /usr/lib/libc.so\n")
    assert compile_cache.save(tmp_path / "artifacts", device()) is None
    assert zipfile.ZipFile(tmp_path / "artifacts" / "compile_cache.zip").namelist() == ["torch_artifacts.bin"]


def test_without_trust_nothing_is_loaded(inductor, saved):
    (saved / "compile_cache.zip").write_bytes(b"must not even be opened")
    skip = compile_cache.load(saved, device(), trust=False)
    assert isinstance(skip, Skip)
    assert "trust" in skip.fix
    assert inductor.loaded == []


@pytest.mark.parametrize(
    ("here", "told"),
    [
        (device(arch="x86_64-avx2"), "device cpu-x86_64-avx512_bf16-2, here is cpu-x86_64-avx2-2"),
        (device(num_devices=4), "device cpu-x86_64-avx512_bf16-2, here is cpu-x86_64-avx512_bf16-4"),
        (device(software={"torch": "2.14.0", "python": "3.11"}), "torch 2.13.0, here is 2.14.0"),
        (device(software={"torch": "2.13.0", "python": "3.12"}), "python 3.11, here is 3.12"),
        (device(software={"torch": "2.13.0", "python": "3.11", "driver": "580.1"}), "driver unknown, here is 580.1"),
        (device(software={"torch": "2.13.0", "python": "3.11", "triton": "3.9"}), "triton unknown, here is 3.9"),
        (device(software={"torch": "2.13.0", "python": "3.11", "compiler": "g++ 14"}), "compiler unknown"),
    ],
)
def test_what_was_made_for_something_else_is_told_and_not_loaded(inductor, saved, here, told):
    skip = compile_cache.load(saved, here, trust=True)
    assert isinstance(skip, Skip)
    assert told in skip.reason
    assert skip.fix
    assert inductor.loaded == []


def test_another_host_is_something_else(inductor, saved, monkeypatch):
    monkeypatch.setattr(compile_cache, "cpu_name", lambda: "another CPU")
    skip = compile_cache.load(saved, device(), trust=True)
    assert isinstance(skip, Skip)
    assert "here is another CPU" in skip.reason
    assert inductor.loaded == []


def test_what_does_not_decide_the_code_may_differ(inductor, saved):
    software = {"torch": "2.13.0", "python": "3.11", "os": "Linux 7"}
    assert compile_cache.load(saved, device(software=software, name="another name"), trust=True) is None


def flip_a_byte(directory):
    content = bytearray((directory / "compile_cache.zip").read_bytes())
    content[len(content) // 2] ^= 1
    (directory / "compile_cache.zip").write_bytes(content)


def cut_off(directory):
    path = directory / "compile_cache.zip"
    path.write_bytes(path.read_bytes()[:100])


def remove_the_archive(directory):
    (directory / "compile_cache.zip").unlink()


def forge(directory, change):
    """Change the facts as somebody would who can write the directory."""
    facts = json.loads((directory / "compile_cache.json").read_text())
    change(facts)
    (directory / "compile_cache.json").write_text(json.dumps(facts))


def no_facts(directory):
    (directory / "compile_cache.json").write_text("{")


def facts_of_another_kind(directory):
    (directory / "compile_cache.json").write_text("[]")


def not_an_archive(directory):
    (directory / "compile_cache.zip").write_bytes(b"not a zip")
    forge(directory, lambda facts: facts.update(sha256=hashlib.sha256(b"not a zip").hexdigest()))


def escape(directory):
    path = directory / "compile_cache.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("native/../../escaped.so", b"x")
    forge(directory, lambda facts: facts.update(sha256=hashlib.sha256(path.read_bytes()).hexdigest()))


@pytest.mark.parametrize(
    "damage",
    [flip_a_byte, cut_off, remove_the_archive, no_facts, facts_of_another_kind, not_an_archive, escape],
)
def test_a_corrupted_cache_is_an_error_that_says_what_to_do(inductor, saved, tmp_path, damage):
    damage(saved)
    before = {p for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(PlanError, match="corrupted") as caught:
        compile_cache.load(saved, device(), trust=True)
    assert "kpt optimize" in caught.value.fix
    assert inductor.loaded == []
    assert {p for p in tmp_path.rglob("*") if p.is_file()} == before


def test_artifacts_that_torch_cannot_read_are_corrupted(saved, monkeypatch):
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", lambda _: None)
    with pytest.raises(PlanError, match="torch cannot read"):
        compile_cache.load(saved, device(), trust=True)


def test_a_newer_format_is_told(inductor, saved):
    forge(saved, lambda facts: facts.update(version=2))
    skip = compile_cache.load(saved, device(), trust=True)
    assert isinstance(skip, Skip)
    assert "format 2, here is 1" in skip.reason
    assert inductor.loaded == []


def test_nothing_compiled_saves_nothing(inductor, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: None)
    inductor.maps.write_text("")
    assert isinstance(compile_cache.save(tmp_path / "artifacts", device()), Skip)
    assert not (tmp_path / "artifacts").exists()


@pytest.mark.parametrize(
    ("module", "setting"),
    [
        ("torch._inductor.config", {"fx_graph_cache": False}),
        ("torch._inductor.config", {"force_disable_caches": True}),
        ("torch._functorch.config", {"enable_autograd_cache": False}),
    ],
)
def test_a_user_who_disabled_torchs_caches_is_told(inductor, saved, module, setting):
    config = __import__(module, fromlist=["patch"])
    with config.patch(**setting):
        assert "disabled" in compile_cache.load(saved, device(), trust=True).reason
        assert "disabled" in compile_cache.save(saved, device()).reason
    assert inductor.loaded == []


def test_a_recording_that_raises_saves_nothing(inductor, tmp_path):
    with pytest.raises(KeyError), compile_cache.recording(tmp_path / "artifacts", device()):
        raise KeyError("planted")
    assert not compile_cache.present(tmp_path / "artifacts")
    with compile_cache.recording(tmp_path / "artifacts", device()):
        pass
    assert compile_cache.present(tmp_path / "artifacts")
    with pytest.raises(KeyError), compile_cache.recording(tmp_path / "artifacts", device()):
        raise KeyError("planted")
    assert not compile_cache.present(tmp_path / "artifacts"), "what was there is of another choice"
    compile_cache.save(tmp_path / "artifacts", device())
    compile_cache.discard(tmp_path / "artifacts")
    assert list((tmp_path / "artifacts").iterdir()) == []


def test_a_directory_that_takes_no_file_is_told(inductor, tmp_path):
    (tmp_path / "artifacts").write_text("a file")
    with pytest.raises(OutputDirectoryError, match="compile cache"):
        compile_cache.save(tmp_path / "artifacts", device())


X = torch.linspace(-1, 1, 12).reshape(3, 4)


def directory_of_a_plan(tmp_path, model, made_for):
    """Write the plan of a model with a compile cache made for a device."""
    step = Step("dtype", {"to": "bfloat16", "how": "cast"})
    made = plan(step)
    spec = replace(made.workload, fingerprint=fingerprint(model), signatures={"main": signatures_of(Call((X,)))})
    (tmp_path / "plan").mkdir()
    written = replace(made, workload=spec, device=detect(), chosen=trial(step, phase="confirm"))
    (tmp_path / "plan" / "plan.json").write_text(dumps(written))
    compile_cache.save(tmp_path / "plan" / "artifacts", made_for)
    return tmp_path / "plan"


def notes_of(model):
    return model._compiled_call_impl.program.notes


def test_apply_loads_it_where_it_is_trusted_and_fits(inductor, tmp_path, caplog):
    model = nn.Linear(4, 2).eval()
    directory = directory_of_a_plan(tmp_path, model, detect())
    assert any("not trusted" in note for note in notes_of(apply(directory, model)))
    assert inductor.loaded == []
    assert not any("afresh" in note for note in notes_of(apply(directory, model, trust_artifacts=True)))
    assert inductor.loaded == [CONTENT]
    assert caplog.records == []


def test_apply_tells_that_it_compiles_afresh(inductor, tmp_path, caplog):
    model = nn.Linear(4, 2).eval()
    directory = directory_of_a_plan(tmp_path, model, replace(detect(), software={"torch": "1.0"}))
    with caplog.at_level(logging.WARNING):
        fast = apply(directory, model, trust_artifacts=True)
    assert "torch 1.0" in caplog.text
    assert any("torch 1.0" in note for note in notes_of(fast))
    assert inductor.loaded == []
    flip_a_byte(directory / "artifacts")
    apply(directory, model, trust_artifacts=True)  # what does not fit is not opened
    forge(directory / "artifacts", lambda facts: facts.update(made_for=compile_cache.identity(detect())))
    with pytest.raises(PlanError, match="corrupted"):
        apply(directory, model, trust_artifacts=True)


COMPILED = """
    import sys
    import torch
    from pathlib import Path
    from kernel_pytorch.core.types import DeviceSpec
    from kernel_pytorch.plan import compile_cache

    here = DeviceSpec("cpu", "", "any", 1, 1, (), {}, 0.0, {"torch": torch.__version__})
    directory = Path("artifacts")
    function = torch.compile(lambda x: (x * 2).sin().sum(-1))
    if sys.argv[1] == "save":
        with compile_cache.recording(directory, here):
            function(torch.ones(64, 64))
    else:
        assert compile_cache.load(directory, here, trust=True) is None
        function(torch.ones(64, 64))
    from torch._dynamo.utils import counters
    print(counters["inductor"]["fxgraph_cache_miss"], counters["inductor"]["fxgraph_cache_hit"])
"""


@pytest.mark.slow
def test_a_new_process_with_an_empty_cache_compiles_nothing(tmp_path):
    def run(*arguments):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(COMPILED), *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"), "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    assert run("save") == ["1", "0"]
    kept = {p.relative_to(tmp_path).as_posix() for p in (tmp_path / "inductor").rglob("*.so")}
    assert kept
    (tmp_path / "inductor").rename(tmp_path / "elsewhere")
    assert run("load") == ["0", "1"]
    there = {p.relative_to(tmp_path).as_posix() for p in (tmp_path / "inductor").rglob("*.so")}
    assert there == kept, "no library was built that was not carried"
