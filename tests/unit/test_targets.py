"""Targets: every form loads, and every failure is one line that says what was expected."""

from __future__ import annotations

import pickle
import sys
import textwrap
import types
import warnings

import pytest
import torch
from torch import nn

from kernel_pytorch.core.example_inputs import image_inputs
from kernel_pytorch.core.model_sources import hugging_face, timm, torchvision
from kernel_pytorch.core.targets import load_target, near_names, user_code
from kernel_pytorch.core.workload import Workload
from kernel_pytorch.errors import InputsError, TargetError

SOURCE = """
    import dataclasses
    import torch
    from torch import nn
    from kernel_pytorch import Case, Workload

    print("imported")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 2)
        def forward(self, x):
            return self.linear(x)

    @dataclasses.dataclass
    class Out:
        y: "torch.Tensor"

    def pair():
        return Net(), torch.randn(3, 4)

    def workload():
        return Workload(model=Net, inputs=lambda seed: torch.full((2, 4), float(seed)), name="mine")

    def mixed():
        return Workload(model=Net, inputs={"one": Case(lambda: torch.zeros(1, 4)), "bad": Case(lambda: 1 / 0, 2.0)})

    ready = Workload(model=Net, inputs=lambda: torch.zeros(1, 4))

    def late():
        import beside
        return beside.model(), torch.zeros(1, 4)

    def raises():
        raise RuntimeError("no\\nsecond line")

    def exits():
        raise SystemExit(3)

    def model_raises():
        return Workload(model=lambda: 1 / 0, inputs=lambda: torch.zeros(1))

    def needs(name, size=3):
        return None

    def alone():
        return Net()

    def no_model():
        return Workload(model=Net(), inputs=torch.zeros)

    def no_inputs():
        return Workload(model=Net, inputs=None)

    constant = 3
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    path = tmp_path / "my_model.py"
    path.write_text(textwrap.dedent(SOURCE))
    (tmp_path / "beside.py").write_text("from torch import nn\ndef model():\n    return nn.Linear(4, 1)\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield path
    for name in set(sys.modules) - before:
        if name.startswith("kpt_target_") or name == "beside":
            del sys.modules[name]


def test_a_pair_and_a_workload_load(file):
    pair = load_target(f"{file}:pair")
    assert pair.name == "my_model:pair"
    assert pair.target == f"{file}:pair"
    assert pair.model()(*pair.call("main", 0).args).shape == (3, 2)
    workload = load_target(f"{file}:workload")
    assert workload.name == "mine"
    assert workload.call("main", 7).args[0].eq(7).all()
    assert workload.model() is not workload.model()
    assert isinstance(load_target(f"{file}:ready"), Workload)


def test_a_file_is_imported_once_and_again_after_an_edit(file, capsys):
    first = type(load_target(f"{file}:pair").model())
    assert type(load_target(f"{file}:workload").model()) is first
    assert capsys.readouterr().out == "imported\n"
    file.write_text(file.read_text().replace("nn.Linear(4, 2)", "nn.Linear(4, 20)"))
    assert load_target(f"{file}:pair").model().linear.out_features == 20


def test_relative_paths_and_siblings(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    workload = load_target("my_model.py:late")
    assert workload.model().out_features == 1
    assert workload.target == f"{file}:late"


def test_what_a_file_defines_pickles(file):
    import cloudpickle

    model = load_target(f"{file}:pair").model()
    assert type(pickle.loads(cloudpickle.dumps(model))).__name__ == "Net"
    assert sys.modules[type(model).__module__].Out("x").y == "x"


def test_a_module_loads(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    workload = load_target("my_model:pair")
    assert workload.target == "my_model:pair"
    sys.modules.pop("my_model")


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("", "not understood; expected path/file.py:factory"),
        ("model", "not understood"),
        (":pair", "not understood"),
        ("{file}", "names no factory; it has: pair, workload"),
        ("{file}:pear", "did you mean 'pair'"),
        ("{file}:zzzzzz", "functions in it: pair, workload"),
        ("{dir}/my_modle.py:pair", "no file .*did you mean 'my_model.py'"),
        ("{file}:constant", "is a int; expected a function or a Workload"),
        ("{file}:needs", r"needs arguments \(name\)"),
        ("{file}:alone", "got a Net; expected a Workload or"),
        ("{file}:no_model", "Workload.model of .* is a Net; expected a function"),
        ("{file}:no_inputs", "case 'main' of .* has no input factory"),
        ("no_such_package.module:f", "no module 'no_such_package'"),
        ("torch.nn.functionall:relu", "no module .*did you mean 'torch.nn.functional'"),
        ("torch.nn:Linearr", "has no 'Linearr'"),
        ("hf:", "names no model"),
        ("hf:{dir}", "no config.json"),
        ("hf:{dir}/nothing", "no Hugging Face model"),
        ("{dir}/none.pt2", "no file"),
    ],
)
def test_bad_targets_are_told_in_one_line(file, target, says):
    with pytest.raises(TargetError, match=says) as caught:
        load_target(target.format(file=file, dir=file.parent))
    assert "\n" not in str(caught.value)
    assert not caught.value.user_traceback


@pytest.mark.parametrize(
    ("factory", "says", "line"),
    [("raises", "RuntimeError: no$", 'RuntimeError("no'), ("exits", "SystemExit: 3", "raise SystemExit(3)")],
)
def test_a_factory_that_raises_shows_the_users_traceback_alone(file, factory, says, line):
    with pytest.raises(TargetError, match=says) as caught:
        load_target(f"{file}:{factory}")
    assert line in caught.value.user_traceback
    assert "my_model.py" in caught.value.user_traceback
    assert "targets.py" not in caught.value.user_traceback


def test_factories_inside_a_workload_are_watched_too(file):
    with pytest.raises(TargetError, match=r"model factory .*ZeroDivisionError") as caught:
        load_target(f"{file}:model_raises").model()
    assert "1 / 0" in caught.value.user_traceback
    mixed = load_target(f"{file}:mixed")
    assert mixed.call("one", 0).args[0].shape == (1, 4)
    with pytest.raises(TargetError, match="case 'bad'"):
        mixed.call("bad", 0)


@pytest.mark.parametrize("body", ["def broken(:", "import no_such_thing", "1 / 0", "raise SystemExit"])
def test_a_file_that_does_not_import(tmp_path, body):
    path = tmp_path / "broken.py"
    path.write_text(body)
    for _ in range(2):  # nothing half imported stays behind
        with pytest.raises(TargetError, match=r"importing .*broken\.py raised") as caught:
            load_target(f"{path}:f")
    assert caught.value.user_traceback
    assert not [name for name in sys.modules if name.startswith("kpt_target_broken")]


def test_an_import_error_inside_a_users_module_is_theirs(tmp_path, monkeypatch):
    (tmp_path / "users_module.py").write_text("import no_such_thing\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(TargetError, match="importing users_module raised ModuleNotFoundError") as caught:
        load_target("users_module:f")
    assert "import no_such_thing" in caught.value.user_traceback


def test_user_code_keeps_errors_that_are_ours():
    with pytest.raises(InputsError), user_code("x"):
        raise InputsError("ours")
    with pytest.raises(KeyboardInterrupt), user_code("x"):
        raise KeyboardInterrupt
    assert near_names("bert", ["BERT", "bart", "birt"]) == "; did you mean 'birt' or 'bart'?"


# exported programs


@pytest.fixture
def package(tmp_path):
    path = tmp_path / "net.pt2"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(nn.Sequential(nn.Linear(4, 2), nn.ReLU()).eval(), (torch.ones(3, 4),))
        torch.export.save(program, path)
    return path


def test_an_exported_program_loads_where_it_is_trusted(package):
    with pytest.raises(TargetError, match="may run code") as caught:
        load_target(str(package))
    assert "--trust-remote-code" in caught.value.fix
    workload = load_target(str(package), trust_remote_code=True)
    model, call = workload.model(), workload.call("main", 0)
    assert model.eval().train() is model
    assert not model.training
    assert model(*call.args, **call.kwargs).shape == (3, 2)
    assert sorted(model.state_dict()) == ["0.bias", "0.weight"]
    assert workload.name == "net"


def test_what_is_no_exported_program_is_told(tmp_path):
    path = tmp_path / "x.pt2"
    path.write_bytes(b"nothing")
    with pytest.raises(TargetError, match="not an exported program"):
        load_target(str(path), trust_remote_code=True)


# libraries


def _fake(monkeypatch, name, **members):
    module = types.ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)
    return module


def test_a_library_that_is_missing_or_broken_is_told_with_a_fix(monkeypatch):
    for name, load in (("timm", timm), ("torchvision", torchvision), ("transformers", hugging_face)):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(TargetError, match="not installed") as caught:
            load("x")
        assert "pip install" in caught.value.fix
        monkeypatch.delitem(sys.modules, name)

    def broken(name):
        raise RuntimeError("operator torchvision::nms does not exist\nat all")

    monkeypatch.setattr("importlib.import_module", broken)
    with pytest.raises(TargetError, match="cannot be imported: RuntimeError: operator torchvision::nms") as caught:
        load_target("torchvision:resnet18")
    assert "\n" not in str(caught.value)
    assert "built for this torch" in caught.value.fix


class Tiny(nn.Module):
    def __init__(self, pretrained):
        super().__init__()
        self.pretrained = pretrained
        self.linear = nn.Linear(3, 3)


def test_timm_by_name(monkeypatch):
    _fake(
        monkeypatch,
        "timm",
        is_model=lambda name: name == "resnet18",
        list_models=lambda: ["resnet18", "vit"],
        get_pretrained_cfg=lambda name: types.SimpleNamespace(input_size=(3, 8, 8)),
        create_model=lambda name, pretrained: Tiny(pretrained),
    )
    workload = load_target("timm:resnet18")
    assert workload.call("main", 0).args[0].shape == (8, 3, 8, 8)
    one, two = workload.model(), workload.model()
    assert not one.pretrained
    assert torch.equal(one.linear.weight, two.linear.weight), "workers must see the same random weights"
    assert load_target("timm:resnet18@pretrained").model().pretrained
    with pytest.raises(TargetError, match="did you mean 'resnet18'"):
        load_target("timm:resnet81")
    with pytest.raises(TargetError, match="unknown suffix '@best'"):
        load_target("timm:resnet18@best")


def test_torchvision_by_name(monkeypatch):
    def builder(name):
        def build():
            raise AssertionError

        build.__module__ = "torchvision.models.detection.x" if "rcnn" in name else "torchvision.models.resnet"
        return build

    models = _fake(
        monkeypatch,
        "torchvision.models",
        list_models=lambda: ["resnet18", "rcnn"],
        get_model_builder=builder,
        get_model=lambda name, weights: Tiny(weights),
    )
    _fake(monkeypatch, "torchvision", models=models)
    assert load_target("torchvision:resnet18").model().pretrained is None
    assert load_target("torchvision:resnet18@pretrained").model().pretrained == "DEFAULT"
    assert load_target("torchvision:resnet18").call("main", 0).args[0].shape == (8, 3, 224, 224)
    with pytest.raises(TargetError, match="does not take one batch of images"):
        load_target("torchvision:rcnn")
    with pytest.raises(TargetError, match="did you mean 'resnet18'"):
        load_target("torchvision:resnet19")


def test_images_are_drawn_by_seed():
    draw = image_inputs(2, (1, 2, 2))
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
