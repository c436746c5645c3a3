"""Proxmox VE's hookscript, as the package carries it, and its place among a storage's snippets.

The script is a shell script beside this module. An administrator of a Proxmox VE host has no checkout, so the package
brings it, and names in it the `sevattest` that was installed with it: a virtual environment may be anywhere.
"""

from __future__ import annotations

import os
import shlex
import tempfile
from contextlib import suppress
from importlib import resources
from pathlib import Path

from common.errors import InvalidInput, Reason

NAME = "sevattest-hookscript"
SNIPPETS = Path("/var/lib/vz/snippets")  # of the storage `local`, which every Proxmox VE host has
_MODE = 0o755  # Proxmox VE runs it as it is, and refuses one that is not executable
_PROGRAM = "/opt/sevattest/bin/sevattest"


def script(program: Path) -> str:
    """The hookscript, with `program` as the `sevattest` that it runs."""
    text = resources.files(__name__).joinpath(NAME).read_text(encoding="utf-8")
    return text.replace(f":-{_PROGRAM}}}", f":-{shlex.quote(str(program))}}}")


def install(text: str, folder: Path, *, replace: bool = False) -> Path:
    """Put the hookscript into a folder for snippets, executable and whole or not at all.

    Args:
        text: the script.
        folder: of a storage that may hold snippets; it is not made, since without it no storage may.
        replace: whether another file of that name gives way.

    Returns:
        Its path. One that is there already with the same text is made executable and is otherwise left alone.

    Raises:
        InvalidInput: `INVALID_ARGUMENT`; no such folder, or another file of that name. Nothing has changed.
        OSError: the folder cannot be written to.
    """
    if not folder.is_dir():
        raise InvalidInput(
            Reason.INVALID_ARGUMENT,
            f"{folder}: no such folder",
            hint="let a storage hold snippets (pvesm set STORAGE --content …,snippets) and name its folder",
        )
    path = folder / NAME
    if path.is_file() and not path.is_symlink() and path.read_bytes() == text.encode():
        path.chmod(_MODE)
    elif os.path.lexists(path) and not replace:
        raise InvalidInput(
            Reason.INVALID_ARGUMENT,
            f"{path}: there is another one, which is left alone",
            hint="--replace takes its place",
        )
    else:
        _write(path, text)
    return path


def _write(path: Path, text: str) -> None:
    """Write a file that machines may be starting with right now: it is the old one or the new one at any moment."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{NAME}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fchmod(descriptor, _MODE)
            os.fsync(descriptor)
        Path(name).replace(path)
    except BaseException:
        with suppress(OSError):
            Path(name).unlink()
        raise
