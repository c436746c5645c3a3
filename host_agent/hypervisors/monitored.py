"""What is the same for every machine that is spoken to over QMP: the steps of a launch, and the wait for a greeting.

Who the machine is, how it is started and how it is ended is the driver's business (`qemu.py`, `attach.py`).
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from common.errors import Unavailable
from host_agent.hypervisors import qapi
from host_agent.hypervisors.base import Inspection
from host_agent.hypervisors.qmp import MonitorSession

_POLL = 0.02  # seconds between looks for a monitor that is to come


@dataclass(frozen=True, kw_only=True)
class QemuSettings:
    """How machines are started, spoken to and ended, whichever driver has them.

    Attributes:
        cbitpos: position of the encryption bit in guest page tables (CPUID 8000001F, EBX 5:0).
        reduced_phys_bits: what QEMU is told of the address bits that encryption costs; it refuses 0.
        start_timeout: seconds from the machine's start to its monitor's first answer.
        command_timeout: seconds that one monitor command may take.
        stop_timeout: seconds between SIGTERM and SIGKILL.
    """

    cbitpos: int
    reduced_phys_bits: int
    start_timeout: float
    command_timeout: float
    stop_timeout: float


async def until_greeted(
    attempt: Callable[[float], Awaitable[None]], check: Callable[[], None], *, limit: float
) -> None:
    """Try until a machine's monitor greets.

    Args:
        attempt: one attempt, given the seconds that are left; raises `Unavailable` where there is no greeting.
        check: called after an attempt that failed; raises what ends the wait.
        limit: seconds for all.

    Raises:
        TimeoutError: no greeting.
    """
    loop = asyncio.get_running_loop()
    ends = loop.time() + limit
    while (left := ends - loop.time()) > 0:
        try:
            await attempt(left)
        except Unavailable:
            # No socket yet, or one that closed without a word: both end in a greeting or in a process's death.
            await asyncio.sleep(_POLL)
            check()
        else:
            return
    raise TimeoutError


class MonitoredMachine:
    """The steps; see `Machine`.

    `connect` makes one connection to the machine's monitor, for one step.
    """

    def __init__(self, connect: Callable[[], AbstractAsyncContextManager[MonitorSession]]) -> None:
        self._connect = connect

    async def inspect(self) -> Inspection:
        """See `Machine`."""
        async with self._connect() as session:
            status = await session.execute("query-status")
            sev = await session.execute("query-sev")
        return qapi.inspection(status, sev)

    async def measurement(self) -> bytes:
        """See `Machine`."""
        async with self._connect() as session:
            return qapi.measurement(await session.execute("query-sev-launch-measure"))

    async def inject(self, header: bytes, payload: bytes) -> None:
        """See `Machine`."""
        arguments = {
            "packet-header": base64.b64encode(header).decode(),
            "secret": base64.b64encode(payload).decode(),
            # No gpa: QEMU takes the base of the area in the firmware that it measured.
        }
        async with self._connect() as session:
            await session.execute("sev-inject-launch-secret", arguments)

    async def resume(self) -> None:
        """See `Machine`."""
        async with self._connect() as session:
            await session.execute("cont")

    async def report(self, nonce: bytes) -> bytes:
        """See `Machine`."""
        arguments = {"mnonce": base64.b64encode(nonce).decode()}
        async with self._connect() as session:
            return qapi.report(await session.execute("query-sev-attestation-report", arguments))
