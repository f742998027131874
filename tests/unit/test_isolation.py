"""Workers against children that crash, hang, hog memory and leave orphans; parcels against what cannot travel."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent
from types import ModuleType

import psutil
import pytest
import torch
from torch import nn

from kernel_pytorch.core.types import Status
from kernel_pytorch.measure.isolation import TravelError, Workers, WorkersUnavailableError, pack, unpack

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers need Linux")

JOBS = """
import ctypes, json, os, signal, subprocess, sys, threading, time

def echo(payload): return payload.decode()
def segfault(payload): ctypes.string_at(0)
def abort(payload): os.abort()
def kill(payload): os.kill(os.getpid(), signal.SIGKILL)
def leave(payload): os._exit(3)
def quit(payload): sys.exit(4)
def wrong_type(payload): return {"a": 1}
def fail(payload): raise ValueError("the model is bad\\nand this is its second line")
def no_memory(payload): raise MemoryError("none left")
def torch_no_memory(payload):
    import torch
    torch.empty(1 << 60, dtype=torch.uint8)
def huge(payload): return "x" * int(payload)
def size(payload): return str(len(payload))
def hang(payload): time.sleep(1000)
def stubborn(payload):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while True:
        pass
def family(payload):
    own = subprocess.Popen(["sleep", "1000"])
    strange = subprocess.Popen(["sh", "-c", "sleep 1000 & echo $! >> " + payload.decode() + "; sleep 1000"],
                               start_new_session=True)
    with open(payload.decode(), "a") as file:
        file.write("%d\\n%d\\n%d\\n" % (os.getpid(), own.pid, strange.pid))
    time.sleep(1000)
def brief_family(payload):
    own = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    return str(own.pid)
def hog(payload):
    held = []
    while True:
        held.append(b"1" * (8 << 20))
        time.sleep(0.002)
def child_hogs(payload):
    code = "x=[]\\nimport time\\nwhile True: x.append(b'1' * (8 << 20)); time.sleep(.002)"
    subprocess.run([sys.executable, "-c", code])
def flood(payload):
    for i in range(60_000):
        print("out", i, "x" * 80)
        print("err", i, "x" * 80, file=sys.stderr)
    return "done"
def surroundings(payload):
    return json.dumps({"env": os.environ.get("KPT_TEST"), "cwd": os.getcwd(), "path": sys.path[0],
                       "main": threading.current_thread() is threading.main_thread(), "stdin": sys.stdin.read(),
                       "omp": os.environ.get("OMP_NUM_THREADS"), "server": os.getppid(),
                       "session": os.getsid(0) == os.getpid(),
                       "score": open("/proc/self/oom_score_adj").read().strip()})
def slow_echo(payload):
    time.sleep(1.0)
    return payload.decode()
def matmul(payload):
    import torch
    x = torch.ones(400, 400)
    return str(float((x @ x)[0, 0]))
def run_model(payload):
    import torch
    from pathlib import Path
    from kernel_pytorch.measure.isolation import unpack
    model, x = unpack(Path(payload.decode()))
    with torch.no_grad():
        return json.dumps(model(x).tolist())
def compiled(payload):
    import torch
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.GELU()).eval()
    x = torch.randn(4, 16)
    with torch.no_grad():
        return str(torch.allclose(torch.compile(model)(x), model(x), atol=1e-5))
"""


@pytest.fixture(scope="module")
def jobs_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("jobs")
    (path / "kpt_jobs.py").write_text(JOBS, encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def _importable(jobs_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(jobs_path))


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    with Workers(preload=()) as shared:
        yield shared


@pytest.fixture(scope="module")
def torch_workers() -> Iterator[Workers]:
    with Workers() as shared:
        yield shared


def gone(pids: list[int], within_s: float = 5.0) -> bool:
    """Return whether all processes end in time; zombies that nobody has reaped yet count as ended."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        alive = [p for p in pids if psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE]
        if not alive:
            return True
        time.sleep(0.05)
    return False


def pids_in(file: Path, count: int, within_s: float = 20.0) -> list[int]:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if file.exists() and len(pids := file.read_text().split()) >= count:
            return [int(p) for p in pids]
        time.sleep(0.02)
    raise AssertionError(f"{file} never named {count} processes")


@pytest.mark.parametrize(
    ("job", "status", "reason"),
    [
        ("segfault", Status.FAILED, "died by signal 11 (SIGSEGV)"),
        ("abort", Status.FAILED, "died by signal 6 (SIGABRT)"),
        ("kill", Status.FAILED, "died by signal 9 (SIGKILL)"),
        ("leave", Status.FAILED, "exited with code 3 before it had a result"),
        ("quit", Status.FAILED, "SystemExit: 4"),
        ("wrong_type", Status.FAILED, "kpt_jobs:wrong_type returned dict, expected str"),
        ("fail", Status.FAILED, "ValueError: the model is bad"),
        ("no_memory", Status.OOM, "MemoryError: none left"),
        ("absent", Status.FAILED, "AttributeError: module 'kpt_jobs' has no attribute 'absent'"),
    ],
)
def test_a_bad_end_is_an_outcome_and_the_next_job_runs(workers: Workers, job: str, status: Status, reason: str) -> None:
    outcome = workers.run(f"kpt_jobs:{job}", b"", timeout_s=30)
    assert (outcome.status, outcome.value) == (status, "")
    assert outcome.reason.startswith(reason)
    after = workers.run("kpt_jobs:echo", b"still here", timeout_s=30)
    assert (after.status, after.value, after.reason) == (Status.OK, "still here", "")


def test_the_log_tells_where_it_crashed(workers: Workers) -> None:
    assert "in segfault" in workers.run("kpt_jobs:segfault", b"", timeout_s=30).log_tail
    assert 'raise ValueError("the model is bad' in workers.run("kpt_jobs:fail", b"", timeout_s=30).log_tail


def test_torch_allocator_failure_is_oom(torch_workers: Workers) -> None:
    outcome = torch_workers.run("kpt_jobs:torch_no_memory", b"", timeout_s=60)
    assert outcome.status is Status.OOM, outcome


def test_large_payloads_and_results_pass_and_boundless_ones_are_refused(workers: Workers) -> None:
    size = 20 << 20
    assert workers.run("kpt_jobs:size", bytes(size), timeout_s=60).value == str(size)
    assert len(workers.run("kpt_jobs:huge", str(size).encode(), timeout_s=60).value) == size
    refused = workers.run("kpt_jobs:huge", str(65 << 20).encode(), timeout_s=60)
    assert refused.status is Status.FAILED
    assert "above the limit" in refused.reason


@pytest.mark.serial
@pytest.mark.parametrize("job", ["hang", "stubborn"])
def test_a_hang_ends_at_its_deadline(workers: Workers, job: str) -> None:
    outcome = workers.run(f"kpt_jobs:{job}", b"", timeout_s=0.5)
    assert outcome.status is Status.TIMEOUT
    assert outcome.reason == "no result within 0.5 s"
    assert 0.5 <= outcome.seconds < 5.0


@pytest.mark.serial
def test_a_timeout_kills_grandchildren_in_sessions_of_their_own(workers: Workers, tmp_path: Path) -> None:
    file = tmp_path / "pids"
    outcome = workers.run("kpt_jobs:family", str(file).encode(), timeout_s=1.5)
    assert outcome.status is Status.TIMEOUT
    assert gone(pids_in(file, 4), within_s=1.0)


@pytest.mark.serial
def test_what_a_finished_job_leaves_running_is_killed(workers: Workers) -> None:
    outcome = workers.run("kpt_jobs:brief_family", b"", timeout_s=30)
    assert outcome.status is Status.OK
    assert gone([int(outcome.value)], within_s=1.0)


@pytest.mark.parametrize("job", ["hog", "child_hogs"])
def test_the_memory_limit_covers_the_whole_tree(workers: Workers, job: str) -> None:
    outcome = workers.run(f"kpt_jobs:{job}", b"", timeout_s=60, memory_limit_bytes=300 << 20)
    assert outcome.status is Status.OOM, outcome
    assert "314,572,800" in outcome.reason


def test_a_flood_of_output_leaves_a_bounded_tail(workers: Workers) -> None:
    outcome = workers.run("kpt_jobs:flood", b"", timeout_s=60)
    assert (outcome.status, outcome.value) == (Status.OK, "done")
    assert 1000 < len(outcome.log_tail) <= 16_384
    assert "err 59999 " in outcome.log_tail


def test_surroundings_travel(workers: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KPT_TEST", "näh")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("/some/where")
    seen = json.loads(workers.run("kpt_jobs:surroundings", b"", timeout_s=30).value)
    assert (seen["env"], seen["cwd"], seen["path"]) == ("näh", str(tmp_path), "/some/where")
    assert seen["main"]
    assert seen["session"]
    assert (seen["stdin"], seen["score"]) == ("", "1000")
    monkeypatch.delenv("KPT_TEST")
    assert json.loads(workers.run("kpt_jobs:surroundings", b"", timeout_s=30).value)["env"] is None


def test_a_variable_that_libraries_read_at_import_restarts_the_fork_server(monkeypatch: pytest.MonkeyPatch) -> None:
    with Workers(preload=()) as workers:
        workers.run("kpt_jobs:echo", b"", timeout_s=30)
        before = workers._zygote
        workers.run("kpt_jobs:echo", b"", timeout_s=30)
        assert workers._zygote is before
        monkeypatch.setenv("OMP_NUM_THREADS", "7")
        assert json.loads(workers.run("kpt_jobs:surroundings", b"", timeout_s=30).value)["omp"] == "7"
        assert workers._zygote is not before


@pytest.mark.serial
def test_a_killed_fork_server_is_replaced_and_running_jobs_finish() -> None:
    with Workers(preload=()) as workers:
        workers.run("kpt_jobs:echo", b"", timeout_s=30)
        outcomes = []
        thread = threading.Thread(
            target=lambda: outcomes.append(workers.run("kpt_jobs:slow_echo", b"survivor", timeout_s=30))
        )
        thread.start()
        time.sleep(0.4)
        assert workers._zygote is not None
        os.kill(workers._zygote.process.pid, signal.SIGKILL)
        assert workers.run("kpt_jobs:echo", b"again", timeout_s=30).value == "again"
        thread.join()
        assert outcomes[0].value == "survivor", outcomes


@pytest.mark.serial
def test_threads_share_workers(workers: Workers) -> None:
    values: dict[int, str] = {}
    threads = [
        threading.Thread(
            target=lambda i=i: values.update({i: workers.run("kpt_jobs:slow_echo", b"%d" % i, timeout_s=30).value})
        )
        for i in range(4)
    ]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert values == {i: str(i) for i in range(4)}
    assert time.monotonic() - began < 3.5, "four jobs of a second each ran one after another"


def test_closing_ends_running_jobs(tmp_path: Path) -> None:
    file = tmp_path / "pids"
    outcomes = []
    workers = Workers(preload=())
    thread = threading.Thread(
        target=lambda: outcomes.append(workers.run("kpt_jobs:family", str(file).encode(), timeout_s=60))
    )
    thread.start()
    pids = pids_in(file, 4)
    workers.close()
    thread.join(10)
    assert outcomes[0].status is Status.FAILED
    assert "closed" in outcomes[0].reason
    assert gone(pids)


def _searching(jobs_path: Path, file: Path) -> subprocess.Popen[str]:
    script = f"""
        import sys
        sys.path.insert(0, {str(jobs_path)!r})
        from kernel_pytorch.measure.isolation import Workers
        with Workers(preload=()) as workers:
            open({str(file)!r} + ".server", "w").write(str(workers._zygote.process.pid))
            workers.run("kpt_jobs:family", {str(file)!r}.encode(), timeout_s=600)
    """
    return subprocess.Popen(
        [sys.executable, "-c", dedent(script)], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_orphans_when_the_parent_is_killed_or_interrupted(
    jobs_path: Path, tmp_path: Path, number: signal.Signals
) -> None:
    file = tmp_path / "pids"
    with _searching(jobs_path, file) as parent:
        pids = [*pids_in(file, 4), int(Path(f"{file}.server").read_text())]
        assert not gone(pids, within_s=0.1)
        parent.send_signal(number)
        assert gone([parent.pid, *pids], within_s=10)
        _, said = parent.communicate()
    assert ("KeyboardInterrupt" in said) == (number is signal.SIGINT)


def test_it_works_from_standard_input_with_a_class_of_main(jobs_path: Path) -> None:
    script = f"""
        import sys
        sys.path.insert(0, {str(jobs_path)!r})
        import torch
        from kernel_pytorch.measure.isolation import Workers, pack
        class Doubler(torch.nn.Module):
            def forward(self, x):
                return FACTOR * x
        FACTOR = 2
        with Workers() as workers:
            file = pack((Doubler(), torch.tensor([1.0, 2.0])))
            print(workers.run("kpt_jobs:run_model", str(file).encode(), timeout_s=60))
    """
    done = subprocess.run([sys.executable, "-"], input=dedent(script), capture_output=True, text=True, check=True)
    assert "value='[2.0, 4.0]'" in done.stdout, done


@pytest.mark.serial
def test_a_warm_job_costs_less_than_a_tenth_of_a_second(torch_workers: Workers) -> None:
    torch_workers.run("kpt_jobs:echo", b"", timeout_s=60)
    assert min(torch_workers.run("kpt_jobs:echo", b"", timeout_s=60).seconds for _ in range(5)) < 0.1


def test_threaded_operations_work_in_a_worker(torch_workers: Workers) -> None:
    torch.ones(300, 300) @ torch.ones(300, 300)  # the parent's pool of threads is up; the fork server's is not
    assert torch_workers.run("kpt_jobs:matmul", b"", timeout_s=60).value == "400.0"


@pytest.mark.slow
def test_inductor_compiles_in_a_worker_with_compile_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "2")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with Workers(preload=("torch", "torch._inductor.compile_fx")) as workers:
        outcome = workers.run("kpt_jobs:compiled", b"", timeout_s=240)
    assert (outcome.status, outcome.value) == (Status.OK, "True"), outcome


def test_a_module_that_cannot_be_preloaded_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with Workers(preload=("no_such_module_anywhere",)) as workers:
        assert workers.run("kpt_jobs:echo", b"ok", timeout_s=30).value == "ok"
    assert "no_such_module_anywhere" in caplog.text


DRIVER = """
static int ready;
int cuInit(unsigned flags) { ready = 1; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return ready ? 0 : 3; }
"""


def test_a_package_that_uses_the_gpu_on_import_is_not_preloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "driver.c").write_text(DRIVER)
    driver = tmp_path / "libcuda.so.1"
    build = ["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(driver), str(tmp_path / "driver.c")]
    subprocess.run(build, check=True)
    (tmp_path / "harmless_part.py").write_text(f"import ctypes; driver = ctypes.CDLL({str(driver)!r})")
    (tmp_path / "greedy_part.py").write_text("import harmless_part; harmless_part.driver.cuInit(0)")
    (tmp_path / "which_parts.py").write_text(
        "import sys\ndef loaded(_): return ' '.join(n for n in ('harmless_part', 'greedy_part') if n in sys.modules)"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with Workers(preload=("harmless_part", "greedy_part")) as workers:
        assert workers.run("which_parts:loaded", b"", timeout_s=30).value == "harmless_part"


def test_an_interpreter_that_cannot_start_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(WorkersUnavailableError, match="/nowhere/python"):
        Workers(preload=()).run("kpt_jobs:echo", b"", timeout_s=30)


def test_parcels_keep_values_ties_and_hooks() -> None:
    a, b = nn.Linear(3, 3), nn.Linear(3, 3)
    b.weight = a.weight
    model = nn.Sequential(a, b).eval()
    model.register_forward_hook(lambda module, args, output: output * 2)
    model.scale = lambda x: x + 1
    path = pack(model)
    assert path.stat().st_mode & 0o777 == 0o600
    copy = unpack(path)
    x = torch.ones(2, 3)
    assert torch.equal(copy(x), model(x))
    assert copy[0].weight is copy[1].weight
    assert not copy.training
    assert copy.scale(1) == 2


def test_classes_of_a_module_that_only_this_process_has_travel_by_value(
    torch_workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    ghost = ModuleType("kpt_ghost")
    exec("from torch import nn\nK = 3\nclass Scale(nn.Module):\n    def forward(self, x): return K * x", vars(ghost))
    monkeypatch.setitem(sys.modules, "kpt_ghost", ghost)
    file = pack((ghost.Scale(), torch.tensor([2.0])))
    outcome = torch_workers.run("kpt_jobs:run_model", str(file).encode(), timeout_s=60)
    assert (outcome.value, outcome.reason) == ("[6.0]", "")


def test_parcels_are_mapped_so_that_a_write_stays_private() -> None:
    path = pack(torch.zeros(1000))
    unpack(path).fill_(1.0)
    assert float(unpack(path).sum()) == 0.0


def _with_gradient_hook() -> nn.Module:
    model = nn.Linear(2, 2)
    model.weight.register_hook(lambda gradient: gradient * 2)
    return model


def _holding(value: object) -> nn.Module:
    model = nn.Linear(2, 2)
    model.held = value
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda: _holding(threading.Lock()),
            "Linear cannot travel to a worker: TypeError: cannot pickle '_thread.lock'",
        ),
        (lambda: _holding(i for i in range(3)), "generator"),
        (_with_gradient_hook, "gradient hooks"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), "parametrized"),
    ],
)
def test_what_cannot_travel_is_named_and_leaves_no_file(make: Callable[[], nn.Module], reason: str) -> None:
    before = set(pack(0).parent.iterdir())
    with pytest.raises(TravelError, match=reason):
        pack(make())
    assert set(next(iter(before)).parent.iterdir()) == before


def test_only_private_directories_are_packed_to_and_unpacked_from(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    path = pack([1], tmp_path)
    assert unpack(path) == [1]
    tmp_path.chmod(0o755)
    with pytest.raises(TravelError, match="0700"):
        unpack(path)
    with pytest.raises(TravelError, match="0700"):
        pack([1], tmp_path)
    tmp_path.chmod(0o700)
    link = tmp_path / "link.pt"
    link.symlink_to(path)
    with pytest.raises(TravelError, match="not a file of this user"):
        unpack(link)
