"""QEMU's answers, checked member by member before anybody believes them.

Schema: qapi/misc-target.json (since 10.1 qapi/misc-i386.json), qapi/run-state.json. `query-sev` is one struct before
QEMU 9.1 and since then a union by `sev-type`, whose branch `sev` has the same members. Pure code.
"""

from __future__ import annotations

import base64
import binascii

from common.errors import PlatformFailed, Reason
from common.sev.abi import MEASUREMENT_BLOB_SIZE, REPORT_SIZE
from common.sev.measurement import FirmwareVersion
from host_agent.hypervisors.base import Inspection, SevState

_BYTE_MAX = 0xFF
_POLICY_MAX = 0xFFFFFFFF


def inspection(status: object, sev: object) -> Inspection:
    """What `query-status` and `query-sev` say together.

    Raises:
        PlatformFailed: `HYPERVISOR_FAILED`; a member is missing, of another type or out of range.
    """
    run = _Answer("query-status", status)
    launch = _Answer("query-sev", sev)
    kind = launch.text("sev-type", "sev")
    if kind != "sev":
        raise launch.nonsense("sev-type")
    try:
        state = SevState(launch.text("state"))
    except ValueError:
        raise launch.nonsense("state") from None
    return Inspection(
        enabled=launch.boolean("enabled"),
        state=state,
        policy=launch.number("policy", _POLICY_MAX),
        firmware=FirmwareVersion(
            launch.number("api-major", _BYTE_MAX),
            launch.number("api-minor", _BYTE_MAX),
            launch.number("build-id", _BYTE_MAX),
        ),
        running=run.boolean("running"),
        status=run.text("status"),
    )


def measurement(answer: object) -> bytes:
    """The measurement blob, 48 bytes, of `query-sev-launch-measure`.

    Raises:
        PlatformFailed: `HYPERVISOR_FAILED`; it is not in the answer.
    """
    return _Answer("query-sev-launch-measure", answer).data(MEASUREMENT_BLOB_SIZE)


def report(answer: object) -> bytes:
    """The attestation report, 208 bytes, of `query-sev-attestation-report`.

    Raises:
        PlatformFailed: `HYPERVISOR_FAILED`; it is not in the answer.
    """
    return _Answer("query-sev-attestation-report", answer).data(REPORT_SIZE)


class _Answer:
    """One command's return value."""

    def __init__(self, command: str, value: object) -> None:
        self._command = command
        if not isinstance(value, dict):
            raise self.nonsense("return")
        self._members: dict[str, object] = value

    def nonsense(self, member: str) -> PlatformFailed:
        """The error for a member that is not as it must be. Does not quote it."""
        return PlatformFailed(
            Reason.HYPERVISOR_FAILED, f"the machine's answer to {self._command} makes no sense: {member}"
        )

    def boolean(self, member: str) -> bool:
        value = self._members.get(member)
        if not isinstance(value, bool):
            raise self.nonsense(member)
        return value

    def number(self, member: str, most: int) -> int:
        value = self._members.get(member)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
            raise self.nonsense(member)
        return value

    def text(self, member: str, default: str | None = None) -> str:
        value = self._members.get(member, default)
        if not isinstance(value, str):
            raise self.nonsense(member)
        return value

    def data(self, size: int) -> bytes:
        """The bytes of `data`, base64, of which there must be `size`."""
        try:
            decoded = base64.b64decode(self.text("data"), validate=True)
        except (binascii.Error, ValueError):
            raise self.nonsense("data") from None
        if len(decoded) != size:
            raise self.nonsense("data")
        return decoded
