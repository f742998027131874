"""Throw-away git repositories for tests."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


class Repository:
    """A git repository in which a file says how slow its revision is."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self.git("init", "-q", "-b", "main")
        self.count = 0

    def git(self, *arguments: str) -> str:
        env = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
        self_made = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
        for who in ("AUTHOR", "COMMITTER"):
            self_made |= {f"GIT_{who}_NAME": "Ada Byron", f"GIT_{who}_EMAIL": "ada@example.org"}
        done = subprocess.run(
            ["git", "-C", str(self.path), *arguments], capture_output=True, text=True, check=True, env=env | self_made
        )
        return done.stdout.strip()

    def commit(self, subject: str, **files: str) -> str:
        """Commit files (`model_py="..."` is `model.py`), or a counter where none is given; return the hash."""
        self.count += 1
        for name, text in (files or {"count_txt": f"{self.count}\n"}).items():
            file = self.path / name.replace("__", "/").replace("_", ".")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        self.git("add", "-A")
        self.git("commit", "-q", "-m", subject)
        return self.git("rev-parse", "HEAD")

    def text_at(self, revision: str, file: str) -> str:
        return self.git("show", f"{revision}:{file}")
