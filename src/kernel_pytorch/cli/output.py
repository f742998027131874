"""Where things go: data to stdout, log, progress and whatever the user's code prints to stderr."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["emit", "log_to_stderr", "quiet_stdout", "stderr_console"]

_CHATTY = ("torchao", "torch.utils._pytree", "torch.export", "transformers", "huggingface_hub", "httpx")


def emit(form: str, data: Callable[[], Any], text: Callable[[Console], None]) -> None:
    """Print the outcome on stdout.

    Args:
        form: `json` or `text`.
        data: Returns JSON values; anything not finite must have been dealt with.
        text: Prints on a console, which honours `NO_COLOR`.
    """
    if form == "json":
        sys.stdout.write(json.dumps(data(), indent=2, allow_nan=False) + "\n")
        return
    from rich.console import Console

    text(Console(file=sys.stdout, highlight=False))


def stderr_console() -> Console:
    """Return the console for log and progress."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def log_to_stderr() -> None:
    """Show warnings of this package, and only errors of the libraries below it, one line each on stderr.

    Python's own warnings, which come from libraries and not from what the user did, show with `PYTHONWARNINGS=default`.
    """
    logging.basicConfig(level=logging.WARNING, format="kpt: %(levelname)s: %(message)s", stream=sys.stderr)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


@contextmanager
def quiet_stdout() -> Iterator[None]:
    """Send what models and libraries print to stderr, so that stdout holds the outcome alone."""
    log_to_stderr()
    with redirect_stdout(sys.stderr):
        yield
