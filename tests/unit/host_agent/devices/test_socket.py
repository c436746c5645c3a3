"""The device on a socket: the platform's answers, and every answer that is none."""

from __future__ import annotations

import asyncio
import errno
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import InvalidInput, PlatformFailed, Reason, Refused, SevattestError, Unavailable
from common.sev.abi import NO_FIRMWARE_CALL, DeviceCommand, PlatformState, Status
from host_agent.devices import open_device
from host_agent.devices.dev_sev import DevSevDevice
from host_agent.devices.socket import SocketDevice
from tests.support.agent import open_descriptors
from tests.support.eventually import until

OPEN = 0xFFFF0000
PDH, CHAIN, CHIP = b"p" * 2084, b"c" * 6252, bytes(range(64))
STATUS = struct.pack("<BBBIBI", 1, 55, 2, 0x101, 24, 7)
Answer = bytes | None


def reply(payload: bytes = b"", *, number: int = 0, fw_error: int = 0) -> bytes:
    return struct.pack("<iII", number, fw_error, len(payload)) + payload


GOOD: dict[int, bytes] = {
    OPEN: reply(),
    DeviceCommand.PLATFORM_STATUS: reply(STATUS),
    DeviceCommand.PDH_CERT_EXPORT: reply(struct.pack("<II", 2084, 6252) + PDH + CHAIN),
    DeviceCommand.GET_ID2: reply(struct.pack("<I", 64) + CHIP),
    DeviceCommand.GET_ID: reply(CHIP + bytes(64)),
}


class Platform:
    """Answers each command with fixed bytes; None hangs, b"" hangs up. Notes what it was asked."""

    def __init__(self, answers: dict[int, Answer]) -> None:
        self._answers = {**GOOD, **answers}
        self.asked: list[tuple[int, bytes]] = []
        self.read_only_refused: set[int] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        mode = b""
        try:
            while True:
                command, length = struct.unpack("<II", await reader.readexactly(8))
                payload = await reader.readexactly(length)
                self.asked.append((command, payload))
                if command == OPEN:
                    mode = payload
                answer = self._answers[command]
                if command in self.read_only_refused and mode == bytes(4):
                    answer = reply(number=errno.EPERM, fw_error=NO_FIRMWARE_CALL)
                if answer is None:
                    await reader.read()
                    return
                if not answer:
                    return
                writer.write(answer)
        except asyncio.IncompleteReadError:
            return
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()


@asynccontextmanager
async def device(
    folder: Path, answers: dict[int, Answer] | None = None, *, limit: float = 20.0
) -> AsyncIterator[tuple[SocketDevice, Platform]]:
    platform = Platform(answers or {})
    path = folder / "sev.sock"
    path.unlink(missing_ok=True)
    server = await asyncio.start_unix_server(platform.serve, path)
    async with server:
        yield SocketDevice(path, timeout=limit), platform


async def test_the_status_is_read(tmp_path: Path) -> None:
    async with device(tmp_path) as (sev, _):
        status = await sev.status()
    assert str(status.firmware) == "1.55.24"
    assert status.state is PlatformState.WORKING
    assert status.externally_owned
    assert status.es_enabled
    assert status.guest_count == 7


async def test_owner_and_es_are_bits_of_their_own(tmp_path: Path) -> None:
    for flags, owned, es in ((0, False, False), (1, True, False), (0x100, False, True), (0xFEFE, False, False)):
        answer = reply(struct.pack("<BBBIBI", 1, 55, 0, flags, 24, 0))
        async with device(tmp_path, {DeviceCommand.PLATFORM_STATUS: answer}) as (sev, _):
            status = await sev.status()
        assert (status.externally_owned, status.es_enabled, status.state) == (owned, es, PlatformState.UNINIT)


async def test_the_chain_is_exported_as_it_is(tmp_path: Path) -> None:
    async with device(tmp_path) as (sev, platform):
        assert await sev.export_chain() == PDH + CHAIN
    assert platform.asked == [(OPEN, bytes(4)), (DeviceCommand.PDH_CERT_EXPORT, struct.pack("<II", 2084, 6252))]


async def test_the_chips_id_is_read(tmp_path: Path) -> None:
    async with device(tmp_path) as (sev, platform):
        assert await sev.chip_id() == CHIP
    assert platform.asked[-1] == (DeviceCommand.GET_ID2, struct.pack("<I", 64))


@pytest.mark.parametrize(
    "answer",
    [
        reply(number=errno.EINVAL, fw_error=NO_FIRMWARE_CALL),
        reply(number=errno.ENOTTY, fw_error=NO_FIRMWARE_CALL),
        reply(number=errno.EIO, fw_error=Status.UNSUPPORTED),
        reply(number=errno.EIO, fw_error=Status.INVALID_COMMAND),
        reply(number=524, fw_error=NO_FIRMWARE_CALL),
    ],
)
async def test_a_platform_without_get_id2_is_asked_the_old_way_and_one_without_either_has_no_chip_id(
    tmp_path: Path, answer: bytes
) -> None:
    async with device(tmp_path, {DeviceCommand.GET_ID2: answer}) as (sev, _):
        assert await sev.chip_id() == CHIP
    async with device(tmp_path, {DeviceCommand.GET_ID2: answer, DeviceCommand.GET_ID: answer}) as (sev, _):
        assert await sev.chip_id() == b""
    for wrong in (b"", CHIP):
        async with device(tmp_path, {DeviceCommand.GET_ID2: answer, DeviceCommand.GET_ID: reply(wrong)}) as (sev, _):
            with pytest.raises(PlatformFailed, match="makes no sense"):
                await sev.chip_id()


async def test_every_command_is_asked_read_only_first(tmp_path: Path) -> None:
    async with device(tmp_path) as (sev, platform):
        await sev.status()
        await sev.export_chain()
        await sev.chip_id()
    assert [payload for command, payload in platform.asked if command == OPEN] == [bytes(4)] * 3


async def test_a_platform_that_must_be_initialised_is_asked_again_with_write_access(tmp_path: Path) -> None:
    async with device(tmp_path) as (sev, platform):
        platform.read_only_refused.add(DeviceCommand.PDH_CERT_EXPORT)
        assert await sev.export_chain() == PDH + CHAIN
    assert [payload for command, payload in platform.asked if command == OPEN] == [bytes(4), struct.pack("<I", 1)]


async def test_a_platform_that_refuses_write_access_too_is_a_failure(tmp_path: Path) -> None:
    refusal = reply(number=errno.EPERM, fw_error=NO_FIRMWARE_CALL)
    async with device(tmp_path, {DeviceCommand.PDH_CERT_EXPORT: refusal}) as (sev, _):
        with pytest.raises(PlatformFailed, match="EPERM"):
            await sev.export_chain()


FAILURES: list[tuple[bytes, type[SevattestError], Reason]] = [
    (reply(number=errno.EIO, fw_error=Status.BAD_MEASUREMENT), Refused, Reason.FIRMWARE_BAD_MEASUREMENT),
    (reply(number=errno.EIO, fw_error=Status.POLICY_FAILURE), Refused, Reason.FIRMWARE_POLICY_FAILURE),
    (reply(number=errno.EIO, fw_error=Status.BAD_SIGNATURE), Refused, Reason.FIRMWARE_BAD_SIGNATURE),
    (reply(number=errno.EIO, fw_error=Status.RESOURCE_LIMIT), PlatformFailed, Reason.FIRMWARE_FAILED),
    (reply(number=errno.EIO, fw_error=0x77), PlatformFailed, Reason.FIRMWARE_FAILED),
    (reply(number=errno.EIO, fw_error=NO_FIRMWARE_CALL), PlatformFailed, Reason.FIRMWARE_FAILED),
    (reply(number=errno.EBUSY, fw_error=NO_FIRMWARE_CALL), Unavailable, Reason.PLATFORM_UNAVAILABLE),
    (reply(number=errno.ETIMEDOUT, fw_error=NO_FIRMWARE_CALL), Unavailable, Reason.PLATFORM_UNAVAILABLE),
    (reply(number=errno.ENODEV, fw_error=NO_FIRMWARE_CALL), Unavailable, Reason.PLATFORM_UNAVAILABLE),
    (reply(number=4095), PlatformFailed, Reason.FIRMWARE_FAILED),
    (reply(number=-5), PlatformFailed, Reason.FIRMWARE_FAILED),
    (reply(number=4096), PlatformFailed, Reason.FIRMWARE_FAILED),
    (struct.pack("<iII", 0, 0, 65537), PlatformFailed, Reason.FIRMWARE_FAILED),
    (struct.pack("<iII", 0, 0, 0xFFFFFFFF), PlatformFailed, Reason.FIRMWARE_FAILED),
    (b"", Unavailable, Reason.PLATFORM_UNAVAILABLE),
]
ASKS: list[tuple[DeviceCommand, Callable[[SocketDevice], Awaitable[object]]]] = [
    (DeviceCommand.PLATFORM_STATUS, SocketDevice.status),
    (DeviceCommand.PDH_CERT_EXPORT, SocketDevice.export_chain),
    (DeviceCommand.GET_ID2, SocketDevice.chip_id),
]


@pytest.mark.parametrize("expected", FAILURES)
@pytest.mark.parametrize(("command", "ask"), ASKS, ids=[command.name for command, _ in ASKS])
async def test_an_error_is_told_as_what_it_is(
    tmp_path: Path,
    command: DeviceCommand,
    ask: Callable[[SocketDevice], Awaitable[object]],
    expected: tuple[bytes, type[SevattestError], Reason],
) -> None:
    answer, kind, reason = expected
    async with device(tmp_path, {command: answer}) as (sev, _):
        with pytest.raises(kind) as failure:
            await ask(sev)
    assert failure.value.reason is reason


@pytest.mark.parametrize(
    ("command", "ask", "payload"),
    [
        (DeviceCommand.PLATFORM_STATUS, SocketDevice.status, b""),
        (DeviceCommand.PLATFORM_STATUS, SocketDevice.status, STATUS + b"\0"),
        (DeviceCommand.PLATFORM_STATUS, SocketDevice.status, STATUS[:2] + b"\x09" + STATUS[3:]),
        (DeviceCommand.PDH_CERT_EXPORT, SocketDevice.export_chain, b""),
        (DeviceCommand.PDH_CERT_EXPORT, SocketDevice.export_chain, struct.pack("<II", 2084, 6252) + PDH),
        (DeviceCommand.PDH_CERT_EXPORT, SocketDevice.export_chain, struct.pack("<II", 2084, 6251) + PDH + CHAIN),
        (DeviceCommand.GET_ID2, SocketDevice.chip_id, struct.pack("<I", 64)),
        (DeviceCommand.GET_ID2, SocketDevice.chip_id, struct.pack("<I", 63) + CHIP),
        (DeviceCommand.GET_ID2, SocketDevice.chip_id, struct.pack("<I", 65) + CHIP + b"\0"),
        (DeviceCommand.GET_ID2, SocketDevice.chip_id, b""),
    ],
)
async def test_an_answer_of_another_form_is_a_typed_error(
    tmp_path: Path, command: DeviceCommand, ask: Callable[[SocketDevice], Awaitable[object]], payload: bytes
) -> None:
    async with device(tmp_path, {command: reply(payload)}) as (sev, _):
        with pytest.raises(PlatformFailed, match="makes no sense") as failure:
            await ask(sev)
    assert failure.value.reason is Reason.FIRMWARE_FAILED


@pytest.mark.parametrize("silent", [OPEN, DeviceCommand.PLATFORM_STATUS])
async def test_a_device_that_hangs_is_left_in_time_and_asked_again_on_a_fresh_connection(
    tmp_path: Path, silent: int
) -> None:
    async with device(tmp_path, {silent: None}, limit=0.5) as (sev, platform):
        for _ in range(2):
            with pytest.raises(Unavailable, match=r"no answer in 0\.5 s"):
                await sev.status()
    assert [command for command, _ in platform.asked].count(OPEN) == 2


async def test_a_device_that_cannot_be_opened_says_why(tmp_path: Path) -> None:
    refusal = reply(number=errno.EBUSY, fw_error=NO_FIRMWARE_CALL)
    async with device(tmp_path, {OPEN: refusal}) as (sev, _):
        with pytest.raises(Unavailable, match="opening the SEV device failed with EBUSY"):
            await sev.status()


async def test_a_device_that_is_not_there_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="cannot be reached"):
        await SocketDevice(tmp_path / "sev.sock", timeout=5).status()


@given(st.binary(max_size=64))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
async def test_any_bytes_are_an_answer_or_a_typed_error(tmp_path: Path, data: bytes) -> None:
    async with device(tmp_path, {DeviceCommand.PLATFORM_STATUS: data}, limit=0.05) as (sev, _):
        with suppress(SevattestError):
            await sev.status()


async def test_no_connection_is_left_open(tmp_path: Path) -> None:
    async with device(tmp_path) as (sev, _):
        await sev.status()
        before = open_descriptors()
        for _ in range(50):
            await sev.export_chain()
        # The platform's ends are in this process, too, and are closed when it comes to that.
        await until(lambda: open_descriptors() <= before)


def test_only_drivers_that_are_there_can_be_named(tmp_path: Path) -> None:
    assert isinstance(open_device("socket", tmp_path / "sev.sock", timeout=1), SocketDevice)
    assert isinstance(open_device("dev_sev", tmp_path / "sev", timeout=1), DevSevDevice)
    for driver in ("ioctl", "/dev/sev", ""):
        with pytest.raises(InvalidInput, match="this version has no driver") as refusal:
            open_device(driver, tmp_path, timeout=1)
        assert refusal.value.reason is Reason.INVALID_CONFIGURATION
