"""The embedded store's file: who may open it, and how it is set up.

Settings, with what each is for (https://sqlite.org/pragma.html):
    journal_mode=WAL     readers (the `audit` command) do not stop the writer
    synchronous=FULL     a commit that was answered survives a power cut: one fsync each
    secure_delete=ON     erased keys are overwritten, not just forgotten
    foreign_keys=ON      a launch without its terms or platform cannot be written
    trusted_schema=OFF   a doctored schema runs no functions
    temp_store=MEMORY    what a savepoint keeps to go back by needs no file
    cache_size           16 MiB: what launches under way need is not read again
    wal_autocheckpoint   after 16 MiB: pages that many launches share go into the file once; the sweep empties it anyway
The file is 0600 in a 0700 folder; SQLite gives its -wal and -shm files the same mode. An advisory lock on a file of its
own keeps a second process out: replicas need a store made for them, and WAL does not work over network file systems.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import NoneType

from common.errors import InvalidInput, Reason, Unavailable
from verifier.store.engine import no_store, require_readable, unavailable
from verifier.store.migrations import migrations

FILE_NAME = "sevattest.sqlite3"
LOCK_NAME = "sevattest.lock"
BUSY_TIMEOUT_S = 2.0

_PRAGMAS = (
    "PRAGMA journal_mode=WAL",
    "PRAGMA synchronous=FULL",
    "PRAGMA secure_delete=ON",
    "PRAGMA foreign_keys=ON",
    "PRAGMA trusted_schema=OFF",
    "PRAGMA temp_store=MEMORY",
    "PRAGMA cache_size=-16384",
    "PRAGMA wal_autocheckpoint=4096",
)


# Bytes and None are bound as they are. Without these, `sqlite3` asks each such value, and the protocol for the same
# question, for methods that neither has, which takes longer than all the rest of binding it.
sqlite3.register_adapter(bytes, bytes)
sqlite3.register_adapter(NoneType, lambda none: none)


def store_unavailable(error: Exception, doing: str) -> Unavailable:
    """The error for a store that does not answer. Callers read it too: it names no data, and no path of its own."""
    words = error.strerror if isinstance(error, OSError) else str(error)
    return unavailable(f"the store cannot {doing}: {words}")


def prepare_folder(folder: Path) -> None:
    """Make the state folder, readable by its owner alone.

    Raises:
        InvalidInput: somebody else owns it, others can use it and it holds something else, or it is no folder.
        Unavailable: it cannot be made.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        if status.st_uid != os.geteuid():
            raise InvalidInput(Reason.INVALID_CONFIGURATION, f"state_dir: {folder} belongs to another user")
        if stat.S_IMODE(status.st_mode) != 0o700:
            # Never a folder that serves somebody else: a mistyped `/` would lock everybody out of the machine.
            names = {path.name for path in folder.iterdir()}
            if names and not names & {FILE_NAME, LOCK_NAME}:
                raise InvalidInput(
                    Reason.INVALID_CONFIGURATION,
                    f"state_dir: {folder} can be used by others and holds something else",
                    hint="name a folder of its own, or give this one mode 0700",
                )
            folder.chmod(0o700)
    except FileExistsError:
        raise InvalidInput(Reason.INVALID_CONFIGURATION, f"state_dir: {folder} is not a folder") from None
    except OSError as error:
        raise store_unavailable(error, f"use {folder}") from error


class FolderLock:
    """Keeps a second process from the same state folder, until released or until the process ends."""

    def __init__(self, folder: Path) -> None:
        """Take the lock.

        Raises:
            Unavailable: another process holds it, or the folder cannot be written.
        """
        path = folder / LOCK_NAME
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise store_unavailable(error, f"lock {path}") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._fd)
            raise Unavailable(
                Reason.STORE_UNAVAILABLE,
                f"another process serves from {folder}",
                hint="one process per state_dir: replicas share a PostgreSQL",
            ) from error

    def release(self) -> None:
        """Let another process in."""
        with suppress(OSError):
            os.close(self._fd)


def create(path: Path) -> None:
    """Make an empty database file with mode 0600, unless there is one.

    Raises:
        Unavailable: it cannot be made.
    """
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        if stat.S_IMODE(path.stat().st_mode) != 0o600:
            path.chmod(0o600)
    except OSError as error:
        raise store_unavailable(error, f"create {path}") from error


def connect(path: Path) -> sqlite3.Connection:
    """Open a database file that exists, and set it up. Its statements wait for no other program's lock.

    Raises:
        sqlite3.Error: it cannot be opened or written.
    """
    # Used on two threads, though never at once.
    connection = sqlite3.connect(
        f"{path.resolve().as_uri()}?mode=rw", uri=True, isolation_level=None, timeout=0, check_same_thread=False
    )
    try:
        with _patient(connection):
            for pragma in _PRAGMAS:
                connection.execute(pragma)
    except BaseException:
        connection.close()
        raise
    return connection


@contextmanager
def _patient(connection: sqlite3.Connection) -> Iterator[None]:
    """Have what is done inside wait for a lock that another program holds."""
    connection.execute(f"PRAGMA busy_timeout={int(BUSY_TIMEOUT_S * 1000)}")
    try:
        yield
    finally:
        connection.execute("PRAGMA busy_timeout=0")


def begin_patiently(connection: sqlite3.Connection) -> None:
    """Begin a transaction that writes, once no other program holds the lock.

    Raises:
        sqlite3.Error: another one holds it for too long.
    """
    with _patient(connection):
        connection.execute("BEGIN IMMEDIATE")


def checkpoint(connection: sqlite3.Connection) -> None:
    """Bring all of the write-ahead log into the file and empty it, unless another program reads for too long.

    Raises:
        sqlite3.Error: the file cannot be written.
    """
    with _patient(connection):
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def connect_reader(path: Path) -> sqlite3.Connection:
    """Open a database for reading, also while a process serves from it.

    Raises:
        Unavailable: there is none, or its schema is not one that this version reads.
    """
    try:
        connection = sqlite3.connect(
            f"{path.resolve().as_uri()}?mode=ro", uri=True, isolation_level=None, timeout=BUSY_TIMEOUT_S
        )
    except sqlite3.Error as error:
        if not os.path.lexists(path):
            raise no_store(str(path.parent)) from None
        raise store_unavailable(error, f"open {path}") from error
    try:
        connection.execute("PRAGMA query_only=ON")
        made = connection.execute("SELECT 1 FROM sqlite_schema WHERE name='migration'").fetchone()
        query = "SELECT number, compatible_from FROM migration ORDER BY number"
        require_readable([] if made is None else connection.execute(query).fetchall(), migrations())
    except sqlite3.Error as error:
        connection.close()
        raise store_unavailable(error, f"read {path}") from error
    except Unavailable:
        connection.close()
        raise
    return connection
