"""Where a history is: a SQLite file or a PostgreSQL server, told by one string."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit, urlunsplit

from kernel_pytorch.guard.history.errors import HistoryError

__all__ = ["ENVIRONMENT", "Address", "find_state_directory", "read_address"]

ENVIRONMENT = "KPT_HISTORY"
_POSTGRESQL = frozenset({"postgresql", "postgres", "postgresql+psycopg"})
_SECRET = frozenset({"password", "passfile", "sslpassword", "oauth_client_secret"})
_FORMS = "a file name, sqlite:///PATH, postgresql://USER@HOST/DATABASE, or none"


@dataclass(frozen=True, slots=True)
class Address:
    """A place for a history.

    Attributes:
        url: For SQLAlchemy, secrets included.
        shown: For people and files: without secrets.
        path: The SQLite file; `None` for a server.
    """

    url: str
    shown: str
    path: Path | None = None

    @property
    def key(self) -> str:
        """A file-system-safe identity that no change of password changes."""
        return hashlib.sha256(self.shown.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def find_state_directory() -> Path:
    """Return the user's directory for what programs remember (XDG base directories); it may not exist yet."""
    asked = os.environ.get("XDG_STATE_HOME", "")
    state = Path(asked) if asked.startswith("/") else Path("~/.local/state")
    try:
        return state.expanduser() / "kernel_pytorch"
    except RuntimeError as error:
        raise HistoryError(
            f"this user has no home directory: {error}", fix=f"set {ENVIRONMENT} to a file or a PostgreSQL URL"
        ) from error


def read_address(text: str | None = None) -> Address | None:
    """Return the address that a text names; `None` where it says that no history is wanted.

    Args:
        text: A URL, a file name, or `none`; left out, the environment variable `KPT_HISTORY`, else a SQLite file in
            the user's state directory.

    Raises:
        HistoryError: It is none of these.
    """
    text = (text if text is not None else os.environ.get(ENVIRONMENT, "")).strip()
    if not text:
        return _file(find_state_directory() / "history.sqlite")
    if text.lower() == "none":
        return None
    scheme, separator, rest = text.partition("://")
    if not separator:
        return _file(Path(text))
    if scheme == "sqlite":
        path = unquote(rest.partition("?")[0])
        if not path.startswith("/") or path == "/" or "?" in rest:
            raise HistoryError(
                f"{text} names no file", fix="sqlite:///relative/path or sqlite:////absolute/path, without a query"
            )
        return _file(Path(path[1:]))
    if scheme in _POSTGRESQL:
        return _server(text)
    raise HistoryError(f"a history cannot be kept at {scheme}://...", fix=f"use {_FORMS}")


def _file(path: Path) -> Address:
    path = Path(os.path.abspath(path.expanduser()))  # noqa: PTH100  # resolve() would follow a link that may move
    if "\0" in str(path):
        raise HistoryError("the name of the history's file holds a NUL character", fix="choose another name")
    return Address(f"sqlite:///{path}", f"sqlite:///{path}", path)


def _server(text: str) -> Address:
    try:
        parts = urlsplit(text)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        # The message of urlsplit may quote a password, so it is not repeated.
        raise HistoryError("the history's URL is not valid", fix=f"use {_FORMS}") from error
    if not parts.path.strip("/"):
        raise HistoryError("the history's URL names no database", fix="postgresql://USER@HOST/DATABASE")
    place = f"[{host}]" if ":" in host else host
    place += f":{port}" if port else ""
    user = f"{quote(unquote(parts.username))}@" if parts.username else ""
    query = urlencode(sorted((k, v) for k, v in parse_qsl(parts.query) if k.lower() not in _SECRET))
    shown = urlunsplit(("postgresql", user + place, parts.path, query, ""))
    return Address(urlunsplit(("postgresql+psycopg", *parts[1:])), shown)
