"""The platform by way of a QEMU that is at hand: its certificates and chip id, asked by `query-sev-capabilities`.

For hosts on which /dev/sev is not the agent's to open. Any QEMU that runs with KVM on a host with SEV answers, be it a
guest of its own without SEV. What it says is the firmware's export, as of its last question to it: QEMU asks again each
time. The CEK is as the firmware has it, unsigned; AMD's key service has the signed one under the chip id.

This driver does not know sockets: it is given a way to ask. Schema: qapi/misc-target.json; `cpu0-id` since QEMU 7.1.
What QEMU does not tell is left out and not made up: such a platform says nothing of its owner, of SEV-ES or of other
guests, and its firmware's version is known only where the QEMU that is asked runs a SEV guest.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Awaitable, Callable
from typing import ClassVar

from common.errors import PlatformFailed, Reason
from common.sev.abi import PEK_OCA_CEK_SIZE, SEV_CERT_SIZE, PlatformState
from common.sev.measurement import FirmwareVersion
from host_agent.devices.base import PlatformStatus

_CHIP_ID_SIZES = frozenset({0, 64})
_BYTE_MAX = 0xFF


class QmpDevice:
    """The read-only half of a platform; see `Device`.

    Attributes:
        name: in the configuration.
    """

    name: ClassVar[str] = "qmp"

    def __init__(self, ask: Callable[[str], Awaitable[object]]) -> None:
        """Take a way to ask.

        Args:
            ask: runs `query-sev-capabilities` or `query-sev` and returns what QEMU returned; raises as `Device` does.
        """
        self._ask = ask

    async def status(self) -> PlatformStatus:
        """See `Device`; owner, SEV-ES and guests are not known, and the version is only where QEMU runs a SEV guest."""
        await self._capabilities()
        sev = _members("query-sev", await self._ask("query-sev"))
        runs = sev.get("enabled") is True
        firmware = FirmwareVersion(*(_byte(sev, member) for member in ("api-major", "api-minor", "build-id")))
        return PlatformStatus(
            firmware=firmware if runs else None,
            state=PlatformState.WORKING if runs else PlatformState.INIT,
            externally_owned=None,
            es_enabled=None,
            guest_count=None,
        )

    async def export_chain(self) -> bytes:
        """See `Device`."""
        told = await self._capabilities()
        return _bytes(told, "pdh", {SEV_CERT_SIZE}) + _bytes(told, "cert-chain", {PEK_OCA_CEK_SIZE})

    async def chip_id(self) -> bytes:
        """See `Device`; none from a QEMU older than 7.1."""
        told = await self._capabilities()
        return _bytes(told, "cpu0-id", _CHIP_ID_SIZES) if "cpu0-id" in told else b""

    async def _capabilities(self) -> dict[str, object]:
        return _members("query-sev-capabilities", await self._ask("query-sev-capabilities"))


def _members(command: str, answer: object) -> dict[str, object]:
    if not isinstance(answer, dict):
        raise _nonsense(command, "return")
    return answer


def _byte(sev: dict[str, object], member: str) -> int:
    part = sev.get(member)
    if not isinstance(part, int) or isinstance(part, bool) or not 0 <= part <= _BYTE_MAX:
        raise _nonsense("query-sev", "its version")
    return part


def _bytes(told: dict[str, object], member: str, sizes: set[int] | frozenset[int]) -> bytes:
    try:
        data = base64.b64decode(str(told.get(member, "")), validate=True)
    except (binascii.Error, ValueError):
        raise _nonsense("query-sev-capabilities", member) from None
    if len(data) not in sizes:
        raise _nonsense("query-sev-capabilities", member)
    return data


def _nonsense(command: str, member: str) -> PlatformFailed:
    return PlatformFailed(Reason.FIRMWARE_FAILED, f"QEMU's answer to {command} makes no sense: {member}")
