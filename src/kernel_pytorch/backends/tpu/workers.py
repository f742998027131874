"""What both children of `ahead` share: read the request, answer with a value or an error, never with silence."""

from __future__ import annotations

import pickle
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kernel_pytorch.errors import KptError

__all__ = ["serve"]


def serve(work: Callable[[bytes], Any]) -> None:
    """Answer the request in the file `argv[1]` into the file `argv[2]`.

    A `KptError` travels as it is; anything else that Python raises becomes one, with its traceback.
    """
    _die_with_parent()
    request, answer = Path(sys.argv[1]).read_bytes(), Path(sys.argv[2])
    try:
        result = work(request)
    except KptError as error:
        result = error
    except Exception as error:  # noqa: BLE001  a foreign model or library may raise anything: the parent tells it
        first = next(iter(str(error).splitlines()), "")
        result = KptError(f"{type(error).__name__}: {first}", user_traceback=traceback.format_exc())
    partial = answer.with_suffix(".partial")
    partial.write_bytes(pickle.dumps(result))
    partial.rename(answer)
    sys.stdout.flush()


def _die_with_parent() -> None:
    """Have the kernel end this process when its parent ends: a compilation may go on for many minutes."""
    import ctypes
    import signal

    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "prctl"):
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


_PR_SET_PDEATHSIG = 1
