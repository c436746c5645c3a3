"""What the emulator raises: the firmware's refusal, the kernel's refusal, the stand-in machine's early death.

Leaves of the one tree in `common.errors`, but for `CommandError`, which ends as a QMP reply. The two refusals carry the
numbers that a caller of /dev/sev would see.
"""

from __future__ import annotations

import errno

from common.errors import InvalidInput, PlatformFailed, Reason
from common.sev.abi import Status, status_name


class FirmwareFailed(PlatformFailed):
    """The software firmware answers with a status other than SUCCESS.

    Attributes:
        status: the firmware's status code.
        lengths: where a buffer was too small: the lengths in bytes that would do, in the order of the command's fields.
    """

    def __init__(self, status: Status, *, lengths: tuple[int, ...] = ()) -> None:
        super().__init__(
            Reason.FIRMWARE_FAILED, f"the firmware answers {status_name(status)}", fw_error=str(int(status))
        )
        self.status = status
        self.lengths = lengths


class KernelRefused(PlatformFailed):
    """The kernel's driver turns a request down before the firmware sees it.

    Attributes:
        errno: positive errno value, as ioctl(2) would set it.
    """

    def __init__(self, number: int) -> None:
        name = errno.errorcode.get(number, str(number))
        super().__init__(Reason.FIRMWARE_FAILED, f"the kernel answers {name}", errno=name)
        self.errno = number


class MachineDied(PlatformFailed):
    """The stand-in machine ends as QEMU would, before its QMP socket opens.

    Attributes:
        lines: what QEMU would write to stderr, without the program's name.
    """

    def __init__(self, *lines: str) -> None:
        super().__init__(Reason.HYPERVISOR_FAILED, lines[-1] if lines else "the machine ended")
        self.lines = lines


class CommandError(Exception):
    """A command of the running stand-in machine failed; the text is QEMU's."""


class StateFolderUnusable(InvalidInput):
    """The platform's state folder cannot be used: another server has it, or it is of another generation."""

    def __init__(self, message: str, **fields: str) -> None:
        super().__init__(Reason.INVALID_ARGUMENT, message, **fields)
