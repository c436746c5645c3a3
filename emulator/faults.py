"""A hook for tests in the same process: the next commands of one kind fail as real firmware and kernels do.

Nothing on the socket reaches it, and no setting does: a platform that runs as a program has no faults.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.sev.abi import NO_FIRMWARE_CALL


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What a command answers instead of being carried out.

    Attributes:
        errno: positive errno value.
        status: firmware status; NO_FIRMWARE_CALL where the firmware was never reached.
        delay: seconds before the answer, as a PSP that hangs.
    """

    errno: int
    status: int = NO_FIRMWARE_CALL
    delay: float = 0.0


class Faults:
    """Faults that wait for their commands, in order."""

    def __init__(self) -> None:
        self._waiting: dict[int, list[Fault]] = {}

    def inject(self, command: int, fault: Fault, *, times: int = 1) -> None:
        """Let the next `times` requests with this command number meet `fault`."""
        self._waiting.setdefault(command, []).extend([fault] * times)

    def take(self, command: int) -> Fault | None:
        """The fault that this request meets, used up by it."""
        queue = self._waiting.get(command)
        return queue.pop(0) if queue else None
