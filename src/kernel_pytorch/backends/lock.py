"""One measurement at a time on a device, among the processes of this package on a machine."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["exclusive"]


@contextlib.contextmanager
def exclusive(device: str) -> Iterator[None]:
    """Hold the lock of a device; waits until another process has let go of it.

    The file lies in the system's temporary directory, since two users may share the device; the kernel drops the
    lock with the process, so one that was killed blocks nobody.

    Args:
        device: Names the lock: `cpu`, `cuda:0`.
    """
    path = Path(tempfile.gettempdir(), f"kernel_pytorch-{device.replace(':', '-')}.lock")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if os.fstat(descriptor).st_uid == os.getuid():
            os.fchmod(descriptor, 0o666)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
