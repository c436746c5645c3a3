"""A launch's record: bytes and back, and nothing else accepted."""

from __future__ import annotations

from datetime import UTC, datetime
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import PlatformFailed, Reason, SevattestError, WrongState
from common.sev.digest.ovmf import Area
from common.sev.errors import ParseError
from common.sev.measurement import FirmwareVersion
from host_agent.hypervisors.base import MachineId
from host_agent.launches.launch import Ending, Failure, Launch, Request, content, decode
from host_agent.launches.state import Event
from host_agent.launches.state import LaunchState as S

ID = UUID("11111111-2222-4333-8444-555555555555")
NOW = datetime(2026, 11, 23, 12, 0, 0, 123456, tzinfo=UTC)
LAUNCH = Launch(
    launch_id=ID,
    caller="spiffe://datacenter.example/orchestrator/alice",
    guest="web",
    policy=0xFFFFFFFF,
    secret_area=Area(base=0x810000, size=0xC00),
    state=S.INJECTING,
    create_time=NOW,
    update_time=NOW,
    machine=MachineId(pid=1, start_time=2, boot_id="b"),
    measurement=bytes(48),
    firmware=FirmwareVersion(1, 55, 24),
    packet=bytes(32),
    ending=Ending(event=Event.FAILED, failure=Failure(reason=Reason.FIRMWARE_FAILED, message="m", fields={"a": "b"})),
    requests=(Request(method="StartLaunch", request_id=ID, content=bytes(32)),),
)


def test_a_record_comes_back_as_it_was() -> None:
    assert decode(LAUNCH.encode(), ID) == LAUNCH


@given(st.binary(max_size=200))
def test_any_bytes_are_a_record_or_a_parse_error(data: bytes) -> None:
    with pytest.raises(ParseError):
        decode(data, ID)


@given(st.integers(0, len(LAUNCH.encode()) - 1), st.integers(0, 255))
def test_a_record_with_any_byte_changed_is_a_record_or_a_parse_error(at: int, byte: int) -> None:
    data = bytearray(LAUNCH.encode())
    data[at] = byte
    try:
        decode(bytes(data), ID)
    except ParseError:
        return


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"state": "INJECTING"', b'"state": "FLYING"'),
        (b'"version": 1', b'"version": 2'),
        (b'"guest": "web"', b'"guest": "web", "gpa": 0'),
        (b"Z", b""),
        (b"11111111-2222", b"21111111-2222"),
    ],
)
def test_a_record_of_another_kind_is_refused(old: bytes, new: bytes) -> None:
    assert old in LAUNCH.encode()
    with pytest.raises(ParseError):
        decode(LAUNCH.encode().replace(old, new), ID)


@pytest.mark.parametrize("reason", Reason)
def test_every_failure_comes_back_as_the_error_that_it_was(reason: Reason) -> None:
    failure = Failure(reason=reason, message="why", fields={"fw_error": "3"})
    assert isinstance(failure.error(), SevattestError)
    assert Failure.of(failure.error()) == failure


@pytest.mark.parametrize(
    ("launch", "reason"),
    [
        (LAUNCH, Reason.WRONG_STATE),
        (LAUNCH.amended(failure=Failure.of(PlatformFailed(Reason.FIRMWARE_FAILED, "m"))), Reason.FIRMWARE_FAILED),
        (LAUNCH.moved(Event.ABORTED, NOW), Reason.WRONG_STATE),
        (LAUNCH.moved(Event.INJECTED, NOW).moved(Event.RESUMED, NOW).moved(Event.GONE, NOW), Reason.GUEST_GONE),
    ],
)
def test_a_refusal_says_what_ended_the_launch(launch: Launch, reason: Reason) -> None:
    assert launch.refusal("InjectSecret").reason is reason


def test_a_move_that_the_table_does_not_have_is_refused() -> None:
    with pytest.raises(WrongState):
        LAUNCH.moved(Event.RESUMED, NOW)


def test_content_tells_parts_apart() -> None:
    assert content(b"ab", b"c") != content(b"a", b"bc")
    assert content(b"ab", b"c") == content(b"ab", b"c")
