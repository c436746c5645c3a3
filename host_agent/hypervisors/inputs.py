"""What a machine is given of the owner's: GODH and session as files that nobody else can open.

Names are fixed; nothing of them comes from the wire. Where the machine is started by somebody else, the files are in a
folder that the guest's definition names, together with a configuration file for QEMU's `-readconfig` that says all
that the agent would say on a command line of its own. That file calls for the machine, so it is written last and
removed first: while it is there, a launch is waiting for its machine.
"""

from __future__ import annotations

import base64
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from common.errors import PlatformFailed, Reason
from host_agent.hypervisors.arguments import GODH_FILE, LAUNCH_FILE, SESSION_FILE

_NAMES = (LAUNCH_FILE, GODH_FILE, SESSION_FILE)  # in the order in which they are removed


class Inputs:
    """The files of one guest's launch in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def prepare(self) -> None:
        """Make the folder private, or see that it is.

        Raises:
            PlatformFailed: `HYPERVISOR_FAILED`; somebody else could read or replace what is in it.
        """
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = self.folder.lstat()
        except OSError as error:
            raise _failed(f"{self.folder} cannot be made: {error.strerror or error}") from error
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise _failed(f"{self.folder} is not a folder of the agent's own with mode 0700")

    def write(self, godh: bytes, session: bytes) -> None:
        """Write the owner's files anew; nothing calls for a machine yet, whatever was left of an earlier launch.

        Args:
            godh: the owner's certificate.
            session: the session blob.

        Raises:
            PlatformFailed: `HYPERVISOR_FAILED`; they cannot be written. Nothing is left of them.
        """
        self.remove()
        self._write({GODH_FILE: base64.b64encode(godh), SESSION_FILE: base64.b64encode(session)})

    def call(self, launch: str) -> None:
        """Call for the machine that somebody else starts.

        Args:
            launch: content of QEMU's configuration file.

        Raises:
            PlatformFailed: `HYPERVISOR_FAILED`; it cannot be written. Nothing is left of any file.
        """
        self._write({LAUNCH_FILE: launch.encode()})

    def remove(self) -> None:
        """Remove them; the machine has read them, or is not to."""
        for name in _NAMES:
            for path in (self.folder / name, self._unfinished(name)):
                with suppress(OSError):
                    path.unlink()

    def _write(self, files: Mapping[str, bytes]) -> None:
        try:
            for name, data in files.items():
                self._write_one(name, data)
        except OSError as error:
            self.remove()
            raise _failed(f"the machine's files cannot be written: {error.strerror or error}") from error

    def _write_one(self, name: str, data: bytes) -> None:
        """A new file that nobody else can open; it appears whole, and an old one of that name is not followed."""
        new = self._unfinished(name)
        new.unlink(missing_ok=True)
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with open(descriptor, "wb") as file:  # noqa: PTH123 -- from a descriptor
            file.write(data)
        new.replace(self.folder / name)

    def _unfinished(self, name: str) -> Path:
        """What a file is called until it is whole; it stays where the agent dies meanwhile."""
        return self.folder / f"{name}.new"


def _failed(why: str) -> PlatformFailed:
    return PlatformFailed(Reason.HYPERVISOR_FAILED, why)
