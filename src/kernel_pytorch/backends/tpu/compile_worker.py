"""The child that compiles: `python -m kernel_pytorch.backends.tpu.compile_worker REQUEST ANSWER`."""

from __future__ import annotations

import os
import pickle

from kernel_pytorch.backends.tpu.workers import serve


def work(request: bytes) -> object:
    """Return the `Compiled` form of a pickled request."""
    from kernel_pytorch.backends.tpu.compiler import compile_ahead

    stablehlo, topology, options = pickle.loads(request)  # noqa: S301  written by our own parent
    return compile_ahead(stablehlo, topology, **options)


if __name__ == "__main__":
    serve(work)
    os._exit(0)  # libtpu's teardown has nothing to save
