"""The example that trains on TPUs: here on the CPU, and on TorchTPU's emulation where that is installed."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import kernel_pytorch as kp

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "production" / "tpu_training"
LOSSES = re.compile(r"^bits a byte: (\S+) -> (\S+)$", re.MULTILINE)


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=240, cwd=ROOT, env=variables
    )


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tpu_training", EXAMPLE / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def cpu() -> object:
    return kp.UnifiedManager(device="cpu").hardware_manager


def test_smoke_learns_and_says_where_it_ran(example: ModuleType) -> None:
    done = run(EXAMPLE / "train.py", "--smoke", KPT_TPU_EMULATE="0")
    assert done.returncode == 0, done.stderr
    first, last = map(float, LOSSES.search(done.stdout).groups())
    assert 7.5 < first < 8.5
    assert last < first - 0.5
    if "device: TPU" not in done.stdout:
        assert "NOTE: device 'tpu': no TPU here" in done.stdout
        assert "nothing of how fast a TPU is" in done.stdout
    assert re.search(r"^(fit: fits v5e:1|NOTE: not asked whether it fits v5e:1: )", done.stdout, re.MULTILINE)


@pytest.mark.skipif(
    importlib.util.find_spec("torch_tpu") is None or importlib.util.find_spec("fastatomstruct_xla_cpu") is None,
    reason="needs torch-tpu and fastatomstruct-xla-cpu: make test-tpu",
)
def test_emulated_it_has_the_losses_of_the_cpu(example: ModuleType, cpu) -> None:
    emulated = run(EXAMPLE / "train.py", "--smoke", KPT_TPU_EMULATE="1", TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert emulated.returncode == 0, emulated.stderr
    assert "device: TPU emulated on the CPU: times mean nothing" in emulated.stdout
    assert re.search(r"^(fit: fits v5e:1: |NOTE: not asked whether it fits .*jax)", emulated.stdout, re.MULTILINE)
    plain = example.train(cpu, example.byte_gpt.SIZES["small"], 8)
    for told, nats in zip(LOSSES.search(emulated.stdout).groups(), (plain[0], plain[-1]), strict=True):
        assert abs(float(told) - nats / math.log(2)) < 1e-3


def test_a_tpu_that_is_asked_for_and_not_there_is_an_error(example: ModuleType, monkeypatch) -> None:
    monkeypatch.delenv("KPT_TPU_EMULATE", raising=False)
    monkeypatch.setattr("kernel_pytorch.hardware.tpu.probe.ROOT", Path("/nowhere"))
    with pytest.raises(kp.KptError, match="no TPU here"):
        example.open_device("tpu")


def test_resumed_training_goes_on_bit_by_bit(example: ModuleType, cpu, tmp_path: Path, capsys) -> None:
    size = example.byte_gpt.SIZES["small"]
    whole = example.train(cpu, size, 6)
    path = tmp_path / "deep" / "checkpoint.pt"
    start = example.train(cpu, size, 4, checkpoint=path)
    rest = example.train(cpu, size, 6, checkpoint=path)
    assert "resumed at step 4" in capsys.readouterr().out
    assert start + rest == whole
    assert example.train(cpu, size, 6, checkpoint=path) == []
    assert [file.name for file in path.parent.iterdir()] == ["checkpoint.pt"]


@pytest.mark.slow
def test_two_processes_train_as_one_on_both_batches(example: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    options = ("--size", "small", "--steps", "2", "--device", "cpu", "--checkpoint", str(path))
    done = run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", EXAMPLE / "train.py", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(LOSSES.findall(done.stdout)) == 1

    size, gpt = example.byte_gpt.SIZES["small"], example.gpt_train
    network = example.byte_gpt.model(size)
    stepper = gpt.optimizer(network.parameters())
    for step in range(2):
        stepper.zero_grad()
        for rank in range(2):
            (gpt.loss(network, example.byte_gpt.batch(2 * step + rank, size)) / 2).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        stepper.step()
    trained = torch.load(path, weights_only=True)["model"]
    start = example.byte_gpt.model(size).state_dict()
    for name, wanted in network.state_dict().items():
        assert torch.allclose(trained[name], wanted, atol=1e-5), name
        assert (wanted - start[name]).abs().max() > 1e-4, name


@pytest.mark.parametrize(
    ("code", "out", "err", "goes_on", "says"),
    [
        (
            0,
            {"headline": "fits v5e:1: 2 of 16 GiB", "message": ""},
            "",
            True,
            "fit: fits v5e:1: 2 of 16 GiB",
        ),
        (1, {"headline": "does not fit v5e:1", "message": "Ran out of HBM"}, "", False, "the compiler: Ran out of HBM"),
        (2, None, "noise\nkpt: error: no compiler; fix: pip install libtpu", True, "pip install libtpu"),
    ],
)
def test_the_compilers_answer_decides_and_its_absence_is_told(
    example: ModuleType, monkeypatch, capsys, code: int, out: object, err: str, goes_on: bool, says: str
) -> None:
    asked = []

    def answered(command: list[str], **_: object) -> SimpleNamespace:
        asked.append(command)
        return SimpleNamespace(returncode=code, stdout=json.dumps(out), stderr=err)

    monkeypatch.setattr(example.subprocess, "run", answered)
    assert example.fits("small", "v5e:1") is goes_on
    assert says in capsys.readouterr().out
    assert asked[0][3:5] == ["fit", f"{EXAMPLE / 'byte_gpt.py'}:small"]


def test_targets_are_workloads_of_static_shapes(example: ModuleType) -> None:
    for name in ("small", "base"):
        workload = kp.load_target(f"{EXAMPLE / 'byte_gpt.py'}:{name}")
        assert workload.batch("main", 0).shape == workload.batch("main", 1).shape
    base = example.byte_gpt.SIZES["base"]
    assert base.width // base.heads == 128


def test_the_jobs_numbers_and_options_go_together(example: ModuleType) -> None:
    yaml = pytest.importorskip("yaml")
    service, job = yaml.safe_load_all((EXAMPLE / "job.yaml").read_text())
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert container["resources"]["requests"]["google.com/tpu"] == chips
    assert container["env"] == [{"name": "CHIPS_PER_HOST", "value": str(chips)}]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    assert math.prod(map(int, topology.split("x"))) == chips * spec["completions"]
    assert spec["completions"] == spec["parallelism"]
    assert spec["completionMode"] == "Indexed"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert service["spec"]["clusterIP"] == "None"
    arguments = example.parse(container["args"])
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert str(arguments.checkpoint.parent) in mounted
    image = (EXAMPLE / "Dockerfile").read_text()
    assert 'ENTRYPOINT ["./launch.sh"]' in image
    assert "WORKDIR /kernel-pytorch/examples/production/tpu_training" in image


@pytest.mark.parametrize("hosts", [1, 4])
def test_the_launcher_starts_one_process_a_chip(tmp_path: Path, hosts: int) -> None:
    told = 'TORCH_TPU_TOPOLOGY="2,2,1"\nWORLD_SIZE=4\nNODE_RANK="0"\n'
    told += 'NNODES="4"\nNODE_RANK="2"\nMASTER_ADDR="host-0"\nMASTER_PORT="29500"\n' if hosts > 1 else ""
    (tmp_path / "python").write_text(f"#!/bin/sh\n[ \"$*\" = '-m torch.tpu.distributed' ] && printf '%s' '{told}'\n")
    (tmp_path / "torchrun").write_text('#!/bin/sh\necho "$TORCH_TPU_TOPOLOGY $TORCH_TPU_DEVICES_PER_HOST" "$@"\n')
    for name in ("python", "torchrun"):
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        [EXAMPLE / "launch.sh", "--size", "base"],
        capture_output=True, text=True, check=True, env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )  # fmt: skip
    node = (
        "--nnodes 4 --node-rank 2 --master-addr host-0"
        if hosts > 1
        else "--nnodes 1 --node-rank 0 --master-addr localhost"
    )
    script = f"{EXAMPLE / 'train.py'} --device tpu --size base"
    assert done.stdout == f"2,2,1 4 --nproc-per-node 4 {node} --master-port 29500 {script}\n"
