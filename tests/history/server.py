"""A real PostgreSQL server, thrown away after the tests."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path


def find_binaries() -> Path | None:
    """Return the newest directory of server programs."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: float(p.parts[-3]))
    found = shutil.which("initdb")
    candidates = [*(p.parent for p in reversed(debian)), *([Path(found).parent] if found else [])]
    return next((place for place in candidates if (place / "pg_ctl").exists()), None)


def why_not() -> str:
    """Return why no server can be started here; empty where one can."""
    if find_binaries() is None:
        return "no PostgreSQL server programs: apt-get install postgresql"
    if os.getuid() == 0:
        try:
            pwd.getpwnam("postgres")
        except KeyError:
            return "root may not run PostgreSQL, and there is no user postgres"
        if shutil.which("runuser") is None:
            return "root may not run PostgreSQL, and there is no runuser"
    return ""


class Server:
    """One cluster in a directory of its own, reached through a Unix socket alone."""

    def __init__(self) -> None:
        # Not pytest's directory: a socket's path may have 107 characters, and the user postgres must reach it.
        self.directory = Path(tempfile.mkdtemp(prefix="kpt-pg-", dir="/tmp"))
        self.directory.chmod(0o755)
        self._as_postgres = os.getuid() == 0
        if self._as_postgres:
            shutil.chown(self.directory, "postgres")
        self._run("initdb", "-A", "trust", "-U", "kpt", "-D", str(self.directory / "data"), "--no-sync", "-E", "UTF8")
        self.start()

    def url(self, database: str) -> str:
        return f"postgresql://kpt@/{database}?host={self.directory}"

    def start(self) -> None:
        options = f"-k {self.directory} -c listen_addresses='' -c fsync=off"
        log = str(self.directory / "log")
        self._run("pg_ctl", "-D", str(self.directory / "data"), "-w", "-l", log, "-o", options, "start")

    def stop(self, mode: str = "immediate") -> None:
        """`immediate` is a crash: every connection is cut, nothing is flushed."""
        self._run("pg_ctl", "-D", str(self.directory / "data"), "-m", mode, "-w", "stop")

    def running(self) -> bool:
        return (self.directory / "data" / "postmaster.pid").exists()

    def freeze(self) -> None:
        """Stop the process that takes connections, as a machine that swaps itself to death does."""
        os.kill(self._pid(), signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self._pid(), signal.SIGCONT)

    def _pid(self) -> int:
        return int((self.directory / "data" / "postmaster.pid").read_text().splitlines()[0])

    def restart(self) -> None:
        self.stop()
        self.start()

    def sql(self, statement: str, database: str = "postgres") -> str:
        return self._run("psql", "-h", str(self.directory), "-U", "kpt", "-d", database, "-Atqc", statement)

    def remove(self) -> None:
        if self.running():
            self.stop()
        shutil.rmtree(self.directory)

    def _run(self, program: str, *arguments: str) -> str:
        binaries = find_binaries()
        command = [str(binaries / program), *arguments]
        if self._as_postgres:
            command = ["runuser", "-u", "postgres", "--", *command]
        # A file, not a pipe: the server that pg_ctl starts would keep a pipe open for ever.
        with tempfile.TemporaryFile("w+") as output:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, cwd="/", timeout=60
            )
            output.seek(0)
            text = output.read()
        assert done.returncode == 0, f"{' '.join(command)}: {text}"
        return text.strip()
