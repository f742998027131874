"""A child that calls a pickled function where a TPU device is known: `python -m ...call_worker REQUEST ANSWER`."""

from __future__ import annotations

import os
import pickle

from kernel_pytorch.backends.tpu.lower_worker import load
from kernel_pytorch.backends.tpu.workers import serve

__all__ = ["work"]


def work(request: bytes) -> object:
    """Return what the function of a pickled `(function, args)` returns."""
    load()
    function, args = pickle.loads(request)  # noqa: S301  written by our own parent
    return function(*args)


if __name__ == "__main__":
    serve(work)
    os._exit(0)  # torch_tpu's teardown may abort, when the answer is already written
