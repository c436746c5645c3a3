"""A real PostgreSQL for tests: in a folder of its own, on a Unix socket only, gone at the end of the run.

Started once for each process that runs tests. It refuses to run as root, so there it runs as a user that owns nothing.
Fixtures are handed to `tests/conftest.py`-like modules by import: `postgres_server`, `postgres_schema`.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import pytest

MISSING = "no PostgreSQL on this machine: install the Debian package `postgresql`"
_DEADLINE_S = 60.0


def find_programs() -> Path | None:
    """The folder of `initdb` and `postgres`: the newest of Debian's, or what is on the PATH."""
    folders = sorted(
        Path("/usr/lib/postgresql").glob("*/bin"),
        key=lambda folder: [int(part) for part in folder.parent.name.split(".")],
    )
    on_path = shutil.which("initdb")
    if on_path is not None:
        folders.insert(0, Path(on_path).resolve().parent)
    usable = [folder for folder in folders if (folder / "postgres").exists() and (folder / "initdb").exists()]
    return usable[-1] if usable else None


def _user() -> str | None:
    """Whom the server runs as: ourselves, or somebody without rights in place of root."""
    if os.geteuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return next((name for name in ("postgres", "nobody") if name in names), None)


@dataclass
class Server:
    """One server, which tests may stop and start under whoever uses it."""

    programs: Path
    folder: Path
    user: str | None
    process: subprocess.Popen[bytes] | None = None

    @property
    def dsn(self) -> str:
        """How it is reached."""
        return f"host={self.folder} port=5432 dbname=postgres user=sevattest"

    @property
    def _as_user(self) -> Sequence[str]:
        """A command that becomes another one of the server's user.

        Not Python's `user=`, which forks for it: in a process where gRPC is at work, such a fork may die.
        """
        if self.user is None:
            return ()
        entry = pwd.getpwnam(self.user)
        return ("setpriv", f"--reuid={entry.pw_uid}", f"--regid={entry.pw_gid}", "--clear-groups")

    def _run(self, *command: str) -> None:
        done = subprocess.run([*self._as_user, *command], capture_output=True, cwd=self.folder, check=False)
        assert done.returncode == 0, done.stderr.decode()

    def make(self) -> None:
        """Make the files of an empty database."""
        if self.user is not None:
            shutil.chown(self.folder, self.user)
        self._run(
            *(str(self.programs / "initdb"), "-D", str(self.folder / "data"), "--username=sevattest", "--auth=trust"),
            *("--encoding=UTF8", "--locale=C", "--no-sync"),
        )

    def start(self, *settings: str, file_limit: int | None = None) -> None:
        """Start it, and return when it answers.

        Args:
            settings: `name=value` each.
            file_limit: bytes that no file of its may grow beyond: a disk that is full.
        """
        assert self.process is None
        options = ["listen_addresses=", f"unix_socket_directories={self.folder}", "max_connections=100", *settings]
        with (self.folder / "log").open("ab") as log:
            limited = [] if file_limit is None else ["prlimit", f"--fsize={file_limit}:"]
            command = [*limited, str(self.programs / "postgres"), "-D", str(self.folder / "data")]
            self.process = subprocess.Popen(
                [*self._as_user, *command, *(part for each in options for part in ("-c", each))],
                stdout=log,
                stderr=log,
                cwd=self.folder,
            )
        deadline = time.monotonic() + _DEADLINE_S
        ready = [str(self.programs / "pg_isready"), "-q", "-h", str(self.folder), "-d", "postgres", "-U", "sevattest"]
        while subprocess.run(ready, check=False).returncode != 0:
            assert self.process.poll() is None, (self.folder / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def stop(self, how: signal.Signals = signal.SIGQUIT) -> None:
        """Stop it: SIGQUIT is pg_ctl's `immediate`, as a crash; SIGINT is `fast`."""
        if self.process is not None:
            self.process.send_signal(how)
            self.process.wait(timeout=_DEADLINE_S)
            self.process = None

    def sql(self, *statements: str) -> str:
        """Run statements as somebody at the server; what they print."""
        arguments = [part for each in statements for part in ("-c", each)]
        done = subprocess.run(
            [self.programs / "psql", "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", self.dsn, *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


def start_server(*settings: str) -> Iterator[Server]:
    """A server of its own; skips where there is no PostgreSQL."""
    programs = find_programs()
    if programs is None:
        pytest.skip(MISSING)
    folder = Path(tempfile.mkdtemp(prefix="sevattest-pg-"))
    server = Server(programs, folder, _user())
    try:
        server.make()
        server.start(*settings)
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Server]:
    """A server that all tests of this process share: they may not stop it."""
    yield from start_server()


@pytest.fixture
def postgres_schema(postgres_server: Server) -> Iterator[str]:
    """The name of a schema that no other test uses."""
    name = f"test_{uuid4().hex}"
    yield name
    postgres_server.sql(f'DROP SCHEMA IF EXISTS "{name}" CASCADE')


@pytest.fixture
def own_postgres_server() -> Iterator[Server]:
    """A server that one test may stop and start."""
    yield from start_server()
