"""What every `HardwareManager` promises. `verified` means: this suite has been run on hardware of that arch."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from kernel_pytorch.core.protocols import HardwareManager
from kernel_pytorch.core.types import DeviceSpec
from kernel_pytorch.core.workload import Call

DEVICE_TYPES = {"amd": {"cuda"}, "cpu": {"cpu"}, "intel": {"xpu"}, "nvidia": {"cuda"}, "tpu": {"tpu", "xla"}}
"""What torch calls a vendor's devices; those of a TPU by its runtime."""
MB = 1 << 20


def on_a_cpu(manager):
    """Return whether the work runs on the CPU, so that large products would take minutes."""
    return manager.vendor == "cpu" or "emulated" in manager.spec.features


def product(one, times):
    """Return a product of so many factors: each needs the one before, so that no compiler may leave one out."""
    result = one
    for _ in range(times):
        result = torch.mm(result, one)
    return result


def test_it_is_a_manager_and_its_spec_says_what_it_is(manager, vendor):
    assert isinstance(manager, HardwareManager)
    spec = manager.spec
    assert isinstance(spec, DeviceSpec)
    assert spec.vendor == manager.vendor == vendor
    assert spec.verified == manager.verified
    assert spec.memory_bytes > 64 * MB
    assert spec.num_devices >= 1
    assert spec.arch
    assert list(spec.features) == sorted(set(spec.features))
    assert spec.software["torch"] == torch.__version__
    assert spec is manager.spec, "the device is detected once"


def test_rates_are_plausible_and_say_where_they_come_from(manager):
    spec = manager.spec
    for dtype, rate in spec.peak_flops.items():
        assert 1e8 < rate < 1e17, dtype
        assert spec.sources[f"peak_flops.{dtype}"]
    if spec.bandwidth_bytes_per_s:
        assert 1e8 < spec.bandwidth_bytes_per_s < 1e14
        assert spec.sources["bandwidth_bytes_per_s"]


def test_key_names_the_hardware_alone_and_is_the_same_in_another_process(manager, vendor):
    code = f"from kernel_pytorch.hardware import detect; print(detect({vendor!r}).key)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == manager.spec.key
    assert not set(manager.spec.key) & set("/ \\:")


def test_place_moves_a_module_with_its_ties_and_leaves_the_original_alone(manager, vendor):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    keys, values = list(model.state_dict()), [v.clone() for v in model.state_dict().values()]
    placed = manager.place(model)
    assert type(placed) is type(model)
    assert list(placed.state_dict()) == keys
    assert placed[2].weight is placed[0].weight
    assert isinstance(placed[0].weight, nn.Parameter)
    assert not placed[0].bias.requires_grad
    assert {t.device.type for t in placed.state_dict().values()} <= DEVICE_TYPES[vendor]
    assert len({t.device for t in placed.state_dict().values()}) == 1
    assert {t.device.type for t in model.state_dict().values()} == {"cpu"}
    for before, after, there in zip(values, model.state_dict().values(), placed.state_dict().values(), strict=True):
        assert torch.equal(before, after)
        assert torch.equal(before, there.cpu())


def test_place_moves_trees_and_calls_and_leaves_other_leaves(manager, vendor):
    tensor = torch.arange(6.0).reshape(2, 3).t().requires_grad_()
    call = Call((tensor, 3), {"mask": {"deep": torch.ones(2)}, "name": "x"})
    placed = manager.place(call)
    assert isinstance(placed, Call)
    assert placed.args[1] == 3
    assert placed.kwargs["name"] == "x"
    assert placed.args[0].device == placed.kwargs["mask"]["deep"].device
    assert placed.args[0].device.type in DEVICE_TYPES[vendor]
    assert placed.args[0].requires_grad
    assert torch.equal(placed.args[0].detach().cpu(), tensor.detach())
    assert tensor.device.type == "cpu"
    assert call.kwargs["mask"]["deep"].device.type == "cpu"


def test_time_is_in_milliseconds_and_contains_what_the_host_does(manager):
    assert 45.0 <= manager.time_ms(lambda: time.sleep(0.05)) < 5_000.0


def test_longer_work_takes_longer(manager, vendor):
    slow = on_a_cpu(manager)
    size = 256 if slow else 4096
    one = manager.place(torch.full((size, size), 1.0 / size))
    threads = torch.get_num_threads()

    def work(times):
        return product(one, times)

    # On a loaded host threads wait for each other, one product for milliseconds: one thread, the shortest of many in
    # turns, and more work where that did not tell. A clock that does not see the work never gets there.
    torch.set_num_threads(1)
    try:
        work(2)
        for more in (200, 2_000, 10_000) if slow else (200,):
            manager.time_ms(lambda: work(more))  # noqa: B023  a runtime may compile each number of products
            pairs = [(manager.time_ms(lambda: work(1)), manager.time_ms(lambda: work(more))) for _ in range(3)]  # noqa: B023
            short, long = (min(times) for times in zip(*pairs, strict=True))
            assert short > 0.0
            if long > 2.0 * short:
                break
        assert long > 2.0 * short
    finally:
        torch.set_num_threads(threads)


def test_synchronize_waits_for_queued_work(manager, vendor):
    size = 256 if on_a_cpu(manager) else 8192
    one = manager.place(torch.full((size, size), 1.0 / size))
    manager.time_ms(lambda: product(one, 10))
    work_ms = min(manager.time_ms(lambda: product(one, 10)) for _ in range(3))
    elapsed_ms = 0.0
    for _ in range(3):  # the longest: on a loaded host any of the others may have been slow
        start = time.perf_counter()
        result = product(one, 10)
        manager.synchronize()
        elapsed_ms = max(elapsed_ms, (time.perf_counter() - start) * 1e3)
    assert elapsed_ms > 0.1 * work_ms, "it came back before the queued work was done"
    assert float(result[0, 0]) == pytest.approx(1.0 / size, rel=1e-2)


def test_peak_bytes_of_a_known_allocation(manager):
    size = 192 * MB

    def allocate():
        first = manager.place(torch.empty(0))
        block = torch.ones(size, dtype=torch.uint8, device=first.device)
        manager.synchronize()
        return int(block[-1])

    allocate()
    assert manager.peak_bytes(allocate) == pytest.approx(size, rel=0.2)


def test_peak_bytes_sees_what_was_freed_again_and_not_what_was_held(manager):
    device = manager.place(torch.empty(0)).device
    held = torch.ones(192 * MB, dtype=torch.uint8, device=device)

    manager.synchronize()

    def twice_one_after_the_other():
        for _ in range(2):
            block = torch.ones(96 * MB, dtype=torch.uint8, device=device)
            manager.synchronize()
            del block

    assert manager.peak_bytes(twice_one_after_the_other) == pytest.approx(96 * MB, rel=0.3)
    assert int(held[0]) == 1


def test_a_fault_in_the_work_reaches_the_caller(manager):
    def fault():
        raise RuntimeError("planted")

    for run in (manager.time_ms, manager.peak_bytes):
        with pytest.raises(RuntimeError, match="planted"):
            run(fault)
    assert manager.time_ms(lambda: None) >= 0.0


def test_telemetry_is_numbers_that_name_their_unit(manager):
    units = ("_mhz", "_watts", "_celsius", "_percent", "_bytes", "_1min", "_reasons")
    values = manager.telemetry()
    assert isinstance(manager.telemetry(), dict)
    for name, value in values.items():
        assert name.endswith(units), name
        assert isinstance(value, float), name
        assert value == value, name


def test_exclusive_keeps_a_second_process_out_until_released(manager, vendor):
    code = (
        "import sys, time\n"
        "from kernel_pytorch.backends import manager_for\n"
        f"manager = manager_for({vendor!r})\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "with manager.exclusive():\n"
        "    print(time.time(), flush=True)\n"
    )
    with manager.exclusive():
        other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert other.stdout.readline() == "ready\n"
        other.stdin.write("go\n")
        other.stdin.flush()
        time.sleep(0.5)
        released = time.time()
    entered = float(other.stdout.readline())
    other.communicate(timeout=60)
    assert entered >= released


def test_exclusive_is_released_by_an_exception_and_by_death(manager, vendor):
    with pytest.raises(KeyError), manager.exclusive():
        raise KeyError("planted")
    code = (
        "import os\n"
        "from kernel_pytorch.backends import manager_for\n"
        f"context = manager_for({vendor!r}).exclusive()\n"
        "context.__enter__()\n"
        "os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == -9
    with manager.exclusive():
        assert manager.time_ms(lambda: None) >= 0.0


def test_a_graph_is_captured_once_and_timed_without_its_launches(manager):
    if not hasattr(manager, "time_graph_ms"):
        pytest.skip(f"{manager.vendor} captures no graphs")
    counter = manager.place(torch.zeros(1024))
    calls = []

    def fn():
        calls.append(1)
        counter.add_(1.0)

    times = manager.time_graph_ms(fn, samples=10)
    assert len(times) == 10
    assert all(0.0 < t < 5.0 for t in times)
    assert len(calls) < 10, "replays do not call it again"
    assert float(counter[0]) == len(calls) - 1 + 10, "each call but the captured one ran, and each replay"
    assert min(times) < min(manager.time_ms(fn) for _ in range(10))


def test_what_cannot_be_captured_is_an_error_and_the_device_works_on(manager):
    if not hasattr(manager, "time_graph_ms"):
        pytest.skip(f"{manager.vendor} captures no graphs")
    one = manager.place(torch.ones(4))
    before = torch.cuda.current_stream()
    with pytest.raises(RuntimeError):
        manager.time_graph_ms(lambda: (one + torch.rand_like(one)).sum().item())
    calls = []

    def fault_in_the_capture():
        calls.append(one.add_(0.0))
        if len(calls) == 4:
            raise KeyError("planted")

    with pytest.raises(KeyError, match="planted"):
        manager.time_graph_ms(fault_in_the_capture)
    manager.synchronize()
    assert torch.cuda.current_stream() == before
    assert float(one.sum()) == 4.0
    # The default generator, and the allocator, would stay in the capture that failed.
    assert torch.rand_like(one).shape == one.shape
    torch.cuda.empty_cache()
    assert min(manager.time_graph_ms(lambda: one.mul_(torch.rand_like(one)))) > 0.0
    torch.manual_seed(0)
    first = torch.rand_like(one)
    torch.manual_seed(0)
    assert torch.equal(torch.rand_like(one), first)
