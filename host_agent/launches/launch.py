"""A launch's record: what the agent knows of one launch, as a value, and as the bytes that the store keeps.

A record holds no secret: the packet stands in it as a hash. It is never changed, only replaced by `moved` or `amended`.
"""

from __future__ import annotations

from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec

from common.errors import Reason, SevattestError, WrongState, rebuild
from common.sev.digest.ovmf import Area
from common.sev.errors import ParseError
from common.sev.measurement import FirmwareVersion
from host_agent.hypervisors.base import MachineId, Trace
from host_agent.launches.state import FINAL, Event, LaunchState, next_state

# Of the record's form; a reader that finds another one refuses.
VERSION = 1
# Mutating calls that one launch remembers; an orchestrator makes four, and the same again after a restart.
REQUESTS_MAX = 32


class Failure(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Why a launch ended early, as the error that its caller is told.

    Attributes:
        reason: stable.
        message: a sentence.
        fields: data beside it.
    """

    reason: Reason
    message: str
    fields: dict[str, str]

    @classmethod
    def of(cls, error: SevattestError) -> Failure:
        """The failure that `error` tells of."""
        return cls(reason=error.reason, message=error.message, fields=dict(error.fields))

    def error(self) -> SevattestError:
        """The same error, to be raised again."""
        error = rebuild(self.reason.value, self.message, self.fields)
        assert error is not None  # noqa: S101 -- every Reason has its class
        return error


class Ending(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The intent to end a launch's machine, written down before it is ended.

    Attributes:
        event: what the launch's end will be called, `FAILED` or `ABORTED`.
        failure: why, where it is not the caller's wish.
    """

    event: Event
    failure: Failure | None


class Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A mutating call that was taken on for the launch.

    Attributes:
        method: its name.
        request_id: the caller's.
        content: SHA-256 over everything in it that counts.
    """

    method: str
    request_id: UUID
    content: bytes


class Launch(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One launch.

    Attributes:
        version: of the record's form.
        launch_id: the verifier's id.
        caller: SPIFFE id of the only identity that sees it.
        guest: the guest's name.
        policy: the guest policy, 32 bits.
        secret_area: where the guest's firmware wants its secrets.
        state: where it stands.
        create_time: when it was written down, UTC.
        update_time: when its state last changed, UTC.
        driver: what starts its machine.
        machine: its process, once there is one and the hypervisor knows machines by process.
        measurement: the measurement blob, 48 bytes, once it was handed out.
        firmware: the SEV firmware's version, with the measurement.
        packet: SHA-256 of header and payload of the packet that was, or may have been, injected.
        ending: set while its machine is being ended.
        failure: why it ended early.
        requests: the mutating calls that were taken on for it.
    """

    version: int = VERSION
    launch_id: UUID
    caller: str
    guest: str
    policy: int
    secret_area: Area
    state: LaunchState
    create_time: datetime
    update_time: datetime
    driver: str = "qemu"
    machine: MachineId | None = None
    measurement: bytes | None = None
    firmware: FirmwareVersion | None = None
    packet: bytes | None = None
    ending: Ending | None = None
    failure: Failure | None = None
    requests: tuple[Request, ...] = ()

    @property
    def is_final(self) -> bool:
        """It has ended."""
        return self.state in FINAL

    def moved(self, event: Event, now: datetime, **changes: Any) -> Launch:
        """The launch after `event`.

        Raises:
            WrongState: the table has no such move.
        """
        return msgspec.structs.replace(self, state=next_state(self.state, event), update_time=now, **changes)

    def amended(self, **changes: Any) -> Launch:
        """The launch with other fields, in the same state."""
        assert "state" not in changes  # noqa: S101 -- only the table moves a launch
        return msgspec.structs.replace(self, **changes)

    def refusal(self, wanted: str) -> SevattestError:
        """Why a step cannot be taken where the launch stands: what ended it, or that it is not its turn.

        Args:
            wanted: the step, for the message.
        """
        if self.failure is not None:
            return self.failure.error()
        if self.state is LaunchState.STOPPED:
            return WrongState(Reason.GUEST_GONE, "the guest has run and its machine has ended")
        if self.state is LaunchState.ABORTED:
            return WrongState(Reason.WRONG_STATE, "the launch was given up", state=self.state.value)
        return WrongState(Reason.WRONG_STATE, f"{wanted} is not due in state {self.state}", state=self.state.value)

    def trace(self, folder: Path) -> Trace:
        """What is known of its machine, whose files are in `folder`."""
        return Trace(launch=self.launch_id, guest=self.guest, driver=self.driver, folder=folder, identity=self.machine)

    def encode(self) -> bytes:
        """The record's bytes: JSON, for people with an editor and a problem."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"


def decode(data: bytes, launch_id: UUID) -> Launch:
    """The launch that a record tells of.

    Args:
        data: the record.
        launch_id: the launch whose record it must be.

    Raises:
        ParseError: it is not a record, or one of another version or launch.
    """
    try:
        launch = msgspec.json.decode(data, type=Launch)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ParseError("not a launch's record") from error
    if launch.version != VERSION:
        raise ParseError(f"a launch's record of version {launch.version}, not {VERSION}")
    if launch.create_time.tzinfo is None or launch.update_time.tzinfo is None:
        raise ParseError("a launch's record with a time without a zone")
    if launch.launch_id != launch_id:
        raise ParseError("the record of another launch")
    return launch


def content(*parts: bytes) -> bytes:
    """SHA-256 over parts of any length, each with its length before it, so that none can pass for another."""
    digest = sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()
