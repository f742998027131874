"""The command `kpt`: parse, call, print. Data goes to stdout, log and progress to stderr.

Exit codes: 0 fine, 1 a finding, 2 misuse or a command that could not do its work, 130 interrupted, 141 broken pipe.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        arguments: Without the program's name; `sys.argv[1:]` by default.
    """
    # Packages of other backends hook into `import torch`; torch_tpu's takes it from 0.7 to 2.6 s. What a command needs
    # of them is loaded when it needs it.
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    import click

    from kernel_pytorch.cli.commands import kpt

    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        with kpt.make_context("kpt", given) as context:
            code = kpt.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except (KeyboardInterrupt, click.Abort):
        _say(_interrupted(given))
        return 130
    except BrokenPipeError:
        return _broken_pipe()
    except Exception as error:  # whatever went wrong is told in one line; KPT_DEBUG=1 shows the traceback
        if os.environ.get("KPT_DEBUG"):
            raise
        return _say(_line(error))
    return code if isinstance(code, int) else 0


def _line(error: Exception) -> str:
    """Return what went wrong in one line, after the user's own traceback where their code raised."""
    import click

    from kernel_pytorch.errors import KptError

    if isinstance(error, click.ClickException):
        line = _flat(error.format_message()).rstrip(".")
        context = getattr(error, "ctx", None)
        return f"{line}; see: {context.command_path} --help" if context is not None else line
    if isinstance(error, KptError):
        if error.user_traceback:
            sys.stderr.write(error.user_traceback)
        return f"{_flat(str(error))}; fix: {_flat(error.fix)}" if error.fix else _flat(str(error))
    what = _flat(f"{type(error).__name__}: {error}")
    return f"unexpected {what}; fix: report it, with what KPT_DEBUG=1 shows"


def _say(line: str) -> int:
    with contextlib.suppress(BrokenPipeError):
        sys.stderr.write(f"kpt: error: {line}\n")
        sys.stderr.flush()
    return 2


def _flat(text: str) -> str:
    return " ".join(text.split())


def _interrupted(given: Sequence[str]) -> str:
    if not given or given[0] != "optimize":
        return "interrupted"
    import shlex

    again = [*given, *(() if "--resume" in given else ("--resume",))]
    return f"interrupted; finished trials are kept, continue with: {shlex.join(['kpt', *again])}"


def _broken_pipe() -> int:
    """Leave quietly: whoever read our output has gone."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    return 141
