"""Run benchmark commands in lanes, several lanes to a device, while no measurement is disturbed by another lane.

    python benchmarks/lanes.py JOBS.json -o LOGS

JOBS.json is `{"lanes": [{"device": 0, "jobs": [JOB, ...]}, ...], "shared": [JOB, ...]}`, and a JOB
`{"name": ..., "command": ..., "timeout": 600, "exclusive": false}`. A lane runs its jobs one after another with
`CUDA_VISIBLE_DEVICES` set to its device, then takes from the shared ones, which may be added to meanwhile. Most of a
search is compiling, importing and judging, so several share a device well; but what is timed must be alone. Whoever
holds this package's lock of a device (every measurement does) makes the other lanes of that device stop: their
processes that use the GPU get SIGSTOP, and SIGCONT when the lock is free again. Time that a lane was stopped counts
against its deadlines and its budget. An `exclusive` job waits until the other lanes of its device are between two jobs,
and they wait for its end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

_POLL_S = 0.03


@dataclass(slots=True)
class Lane:
    """One command after another on one device.

    Attributes:
        device: Its index.
        root: Process of the running job; 0 between jobs.
        stopped: Processes that wait for another lane's measurement.
        stopped_s: Seconds that the running job has been stopped.
        alone: Whether it runs an exclusive job, or waits for the others in order to.
    """

    device: int
    root: int = 0
    stopped: set[int] = field(default_factory=set)
    stopped_s: float = 0.0
    alone: bool = False
    running: bool = False


def parents() -> dict[int, int]:
    """Return the parent of every process."""
    found = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                stat = Path(entry.path, "stat").read_text()
                found[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
    return found


def tree(root: int, parent: dict[int, int]) -> set[int]:
    """Return a process and all its descendants."""
    below: dict[int, list[int]] = {}
    for child, above in parent.items():
        below.setdefault(above, []).append(child)
    found, waiting = set(), [root]
    while waiting:
        pid = waiting.pop()
        found.add(pid)
        waiting += below.get(pid, [])
    return found


def holders() -> set[int]:
    """Return the processes that hold a device's lock."""
    inodes = set()
    for path in Path(tempfile.gettempdir()).glob("kernel_pytorch-*.lock"):
        with contextlib.suppress(OSError):
            inodes.add(path.stat().st_ino)
    found = set()
    for line in Path("/proc/locks").read_text().splitlines():
        fields = line.split()
        if "->" not in fields and fields[1] == "FLOCK" and int(fields[5].split(":")[2]) in inodes:
            found.add(int(fields[4]))
    return found


def uses_device(pid: int) -> bool:
    """Return whether a process has a GPU open; where there is no GPU, whether it computes at all."""
    if not Path("/dev/nvidiactl").exists():
        return True
    with contextlib.suppress(OSError):
        return any(os.readlink(fd.path).startswith("/dev/nvidia") for fd in os.scandir(f"/proc/{pid}/fd"))  # noqa: PTH115
    return False


def send(pids: Iterable[int], number: signal.Signals) -> Iterator[int]:
    """Signal processes; yield those that were there."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)
            yield pid


class Conductor(threading.Thread):
    """Stops the other lanes of a device while one of them holds its lock."""

    def __init__(self, lanes: list[Lane]) -> None:
        super().__init__(daemon=True)
        self.lanes = lanes
        self.done = threading.Event()

    def run(self) -> None:
        """Look every 30 ms until told to end."""
        last = time.monotonic()
        while not self.done.wait(_POLL_S):
            parent, held, now = parents(), holders(), time.monotonic()
            trees = {id(lane): tree(lane.root, parent) for lane in self.lanes if lane.root}
            busy = {lane.device: lane for lane in self.lanes if lane.root and trees[id(lane)] & held}
            for lane in self.lanes:
                if not lane.root:
                    continue
                if lane.device in busy and busy[lane.device] is not lane:
                    running = {p for p in trees[id(lane)] - lane.stopped if uses_device(p)}
                    lane.stopped |= set(send(running, signal.SIGSTOP))
                    lane.stopped_s += now - last
                elif lane.stopped:
                    set(send(lane.stopped, signal.SIGCONT))
                    lane.stopped = set()
            last = now
        for lane in self.lanes:
            set(send(lane.stopped, signal.SIGCONT))


class Turns:
    """Lets an exclusive job wait for the other lanes of its device, and them for it."""

    def __init__(self, lanes: list[Lane]) -> None:
        self.lanes = lanes
        self.changed = threading.Condition()

    def begin(self, lane: Lane, *, exclusive: bool) -> None:
        """Wait for the lane's turn."""
        others = [other for other in self.lanes if other is not lane and other.device == lane.device]
        with self.changed:
            self.changed.wait_for(lambda: not any(other.alone for other in others))
            lane.alone = exclusive
            if exclusive:
                self.changed.wait_for(lambda: not any(other.running for other in others))
            lane.running = True

    def end(self, lane: Lane) -> None:
        """Let others go on."""
        with self.changed:
            lane.alone = lane.running = False
            self.changed.notify_all()


def taken(own: list[dict], path: Path, begun: set[str], lock: threading.Lock) -> Iterator[dict]:
    """Yield a lane's own jobs, then the shared ones that no lane has begun, as the file has them at that time."""
    yield from own
    while True:
        with lock:
            job = next((job for job in json.loads(path.read_text())["shared"] if job["name"] not in begun), None)
            if job is None:
                return
            begun.add(job["name"])
        yield job


def run_job(lane: Lane, job: dict, logs: Path) -> dict:
    """Run one job to its end or its timeout and return its row; it has a log of its own."""
    began = time.monotonic()
    lane.stopped_s = 0.0
    with (logs / f"{job['name']}.log").open("w") as log:
        process = subprocess.Popen(
            job["command"],
            shell=True,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": str(lane.device)},
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        lane.root = process.pid
        try:
            code: int | str = process.wait(job.get("timeout", 600))
        except subprocess.TimeoutExpired:
            code = "timeout"
            set(send(tree(process.pid, parents()), signal.SIGKILL))
            process.wait()
        lane.root, lane.stopped = 0, set()
    seconds = round(time.monotonic() - began, 1)
    return {
        "name": job["name"],
        "device": lane.device,
        "exit": code,
        "seconds": seconds,
        "stopped_s": round(lane.stopped_s, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True, help="directory of a log for each job")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    asked = json.loads(args.jobs.read_text())
    lanes = [Lane(lane["device"]) for lane in asked["lanes"]]
    begun: set[str] = set()
    lock, turns = threading.Lock(), Turns(lanes)
    told: list[dict] = []

    def run_lane(lane: Lane, own: list[dict]) -> None:
        for job in taken(own, args.jobs, begun, lock):
            turns.begin(lane, exclusive=job.get("exclusive", False))
            told.append(run_job(lane, job, args.output))
            turns.end(lane)
            (args.output / "lanes.json").write_text(json.dumps(told, indent=1) + "\n")

    conductor = Conductor(lanes)
    conductor.start()
    threads = [
        threading.Thread(target=run_lane, args=(lane, one["jobs"]))
        for lane, one in zip(lanes, asked["lanes"], strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    conductor.done.set()
    conductor.join()
    for row in told:
        print(row)
    return 1 if any(row["exit"] != 0 for row in told) else 0


if __name__ == "__main__":
    sys.exit(main())
