"""One measurement at a time on a device, among the processes of this package on a machine."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from kernel_pytorch.errors import KptError

__all__ = ["exclusive"]

_held: set[str] = set()


@contextlib.contextmanager
def exclusive(device: str) -> Iterator[None]:
    """Hold the lock of a device; waits until another process has let go of it.

    The file lies in the system's temporary directory, since two users may share the device; the kernel drops the
    lock with the process, so one that was killed blocks nobody. A process that holds it already holds it still:
    threads of one process are not kept apart.

    Args:
        device: Names the lock: `cpu`, `nvidia-<uuid>`.

    Raises:
        KptError: The temporary directory takes no file.
    """
    if device in _held:
        yield
        return
    path = Path(tempfile.gettempdir(), f"kernel_pytorch-{device}.lock")
    try:
        descriptor = _open(path)
    except OSError as error:
        raise KptError(
            f"cannot lock the device for a measurement: {error}", fix="set TMPDIR to a directory all users may write to"
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        _held.add(device)
        yield
    finally:
        _held.discard(device)
        os.close(descriptor)


def _open(path: Path) -> int:
    """Open the lock file, creating it for all users where it is not there.

    Not with O_CREAT alone: Linux refuses that for another user's file in a sticky directory (fs.protected_regular).
    """
    for _ in range(2):
        with contextlib.suppress(FileNotFoundError):
            return os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        with contextlib.suppress(FileExistsError):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            os.fchmod(descriptor, 0o666)  # whatever the umask
            return descriptor
    raise FileNotFoundError(f"{path} comes and goes")
