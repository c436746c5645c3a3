"""The ioctl driver: what it asks the kernel for, and every answer of a kernel or a PSP that is none."""

from __future__ import annotations

import asyncio
import errno
import os
import struct
import threading
from collections.abc import Awaitable, Callable, Iterator
from ctypes import addressof, memmove, sizeof
from itertools import cycle
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import (
    OutcomeUnknown,
    PlatformFailed,
    Reason,
    Refused,
    SevattestError,
    Unavailable,
    exit_code,
)
from common.sev.abi import NO_FIRMWARE_CALL, DeviceCommand, PlatformState, Status
from emulator.driver import Driver
from host_agent.devices.commands import ENOTSUPP
from host_agent.devices.dev_sev import DevSevDevice, Ioctl, call_kernel
from host_agent.devices.ioctl import (
    GetId2Data,
    IssueCommand,
    PdhCertExportData,
    PekCsrData,
    PlatformStatusData,
)
from host_agent.devices.single_flight import SingleFlight
from tests.support.agent import open_descriptors
from tests.support.eventually import until
from tests.support.fake_kernel import FakeKernel
from tests.support.software_psp import make_psp

C = DeviceCommand
READS: dict[DeviceCommand, Callable[[DevSevDevice], Awaitable[object]]] = {
    C.PLATFORM_STATUS: DevSevDevice.status,
    C.PDH_CERT_EXPORT: DevSevDevice.export_chain,
    C.GET_ID2: DevSevDevice.chip_id,
}
CHANGES: dict[DeviceCommand, Callable[[DevSevDevice], Awaitable[object]]] = {
    C.FACTORY_RESET: DevSevDevice.factory_reset,
    C.PEK_GEN: DevSevDevice.pek_gen,
    C.PDH_GEN: DevSevDevice.pdh_gen,
    C.PEK_CERT_IMPORT: lambda device: device.pek_cert_import(b"p" * 2084, b"o" * 2084),
}
EVERYTHING = {**READS, C.PEK_CSR: DevSevDevice.pek_csr, **CHANGES}


@pytest.fixture
def node(tmp_path: Path) -> Path:
    path = tmp_path / "sev"
    path.touch()
    return path


def device(node: Path, ioctl: Ioctl, *, limit: float = 20.0) -> DevSevDevice:
    return DevSevDevice(node, timeout=limit, ioctl=ioctl, flight=SingleFlight())


def answering(number: int, status: int = NO_FIRMWARE_CALL) -> Ioctl:
    """A kernel with one answer to everything."""

    def ioctl(_descriptor: int, request: IssueCommand) -> int:
        request.error = status
        return number

    return ioctl


# --- what it asks ------------------------------------------------------------------------------------------------


@pytest.fixture
def kernel(tmp_path: Path) -> FakeKernel:
    driver = Driver(make_psp(tmp_path / "p", "milan"))
    driver.init()
    return FakeKernel(driver)


async def test_looking_is_read_only_and_changing_is_not(node: Path, kernel: FakeKernel) -> None:
    sev = device(node, kernel.ioctl)
    for look in READS.values():
        await look(sev)
    assert kernel.seen == [(command, False) for command in READS]
    kernel.seen.clear()
    for change in (DevSevDevice.pek_gen, DevSevDevice.pdh_gen, DevSevDevice.pek_csr, DevSevDevice.factory_reset):
        await change(sev)
    assert kernel.seen == [(command, True) for command in (C.PEK_GEN, C.PDH_GEN, C.PEK_CSR, C.FACTORY_RESET)]


async def test_an_export_is_asked_for_writing_only_where_the_kernel_must_initialise(
    node: Path, kernel: FakeKernel
) -> None:
    sev = device(node, kernel.ioctl)
    await sev.factory_reset()
    kernel.seen.clear()
    await sev.export_chain()
    await sev.export_chain()
    assert kernel.seen == [(C.PDH_CERT_EXPORT, False), (C.PDH_CERT_EXPORT, True), (C.PDH_CERT_EXPORT, False)]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EBUSY, errno.EIO, errno.EINVAL])
async def test_no_other_errno_asks_for_writing(node: Path, number: int) -> None:
    asked = []

    def ioctl(descriptor: int, request: IssueCommand) -> int:
        asked.append(os.get_inheritable(descriptor))
        return answering(number)(descriptor, request)

    with pytest.raises(SevattestError):
        await device(node, ioctl).export_chain()
    assert asked == [False], "once, on a descriptor that no child inherits"


async def test_a_device_that_may_not_be_written_says_so_where_the_kernel_must_initialise(node: Path) -> None:
    os.chmod(node, 0o400)  # noqa: PTH101 -- a moment, in a test of its own
    # Root may write anything, so there the kernel's answer stays EPERM.
    words = "EPERM" if os.geteuid() == 0 else "cannot be opened for writing"
    with pytest.raises(SevattestError, match=words) as refusal:
        await device(node, answering(errno.EPERM)).export_chain()
    assert "access" in refusal.value.fields["hint"]


async def test_the_status_word_starts_as_not_called(node: Path) -> None:
    seen = []

    def ioctl(_descriptor: int, request: IssueCommand) -> int:
        seen.append(request.error)
        return errno.EIO

    with pytest.raises(PlatformFailed):
        await device(node, ioctl).status()
    assert seen == [NO_FIRMWARE_CALL]


# --- what is no answer -------------------------------------------------------------------------------------------

Kind = tuple[type[SevattestError], Reason]
Failure = tuple[int, int, Kind, str]
FIRMWARE: Kind = (PlatformFailed, Reason.FIRMWARE_FAILED)
BUSY: Kind = (Unavailable, Reason.PLATFORM_UNAVAILABLE)
FAILURES: list[Failure] = [
    (errno.EIO, Status.BAD_MEASUREMENT, (Refused, Reason.FIRMWARE_BAD_MEASUREMENT), "BAD_MEASUREMENT"),
    (errno.EIO, Status.POLICY_FAILURE, (Refused, Reason.FIRMWARE_POLICY_FAILURE), "POLICY_FAILURE"),
    (errno.EIO, Status.BAD_SIGNATURE, (Refused, Reason.FIRMWARE_BAD_SIGNATURE), "BAD_SIGNATURE"),
    (errno.EIO, Status.HWSEV_PLATFORM, FIRMWARE, "HWSEV_PLATFORM"),
    (errno.EIO, 0x27, FIRMWARE, "0x27"),
    (errno.EIO, 0xFFFF, FIRMWARE, "0xffff"),
    (errno.EIO, 0, FIRMWARE, "EIO"),
    (errno.EIO, NO_FIRMWARE_CALL, FIRMWARE, "EIO"),
    # Left in the structure by a kernel that did not call the firmware: not the firmware's word.
    (errno.EBUSY, Status.BAD_MEASUREMENT, BUSY, "EBUSY"),
    (errno.EBUSY, NO_FIRMWARE_CALL, BUSY, "EBUSY"),
    (errno.ENODEV, NO_FIRMWARE_CALL, BUSY, "ENODEV"),
    (errno.ENXIO, NO_FIRMWARE_CALL, BUSY, "ENXIO"),
    (errno.EINTR, NO_FIRMWARE_CALL, BUSY, "EINTR"),
    (errno.EFAULT, NO_FIRMWARE_CALL, FIRMWARE, "EFAULT"),
    (errno.EPERM, NO_FIRMWARE_CALL, FIRMWARE, "EPERM"),
    (errno.ENOMEM, NO_FIRMWARE_CALL, FIRMWARE, "ENOMEM"),
    (4095, NO_FIRMWARE_CALL, FIRMWARE, "4095"),
]
UNKNOWN: list[Failure] = [
    (errno.EINVAL, NO_FIRMWARE_CALL, FIRMWARE, "EINVAL"),
    (errno.ENOTTY, NO_FIRMWARE_CALL, FIRMWARE, "ENOTTY"),
    (ENOTSUPP, NO_FIRMWARE_CALL, FIRMWARE, "ENOTSUPP"),
    (errno.EIO, Status.INVALID_COMMAND, FIRMWARE, "INVALID_COMMAND"),
]


@pytest.mark.parametrize("command", EVERYTHING)
@pytest.mark.parametrize("failure", FAILURES + UNKNOWN, ids=lambda failure: f"{failure[3]}-{failure[0]}")
async def test_a_failure_is_told_as_what_it_is(node: Path, command: DeviceCommand, failure: Failure) -> None:
    number, status, (kind, reason), word = failure
    sev = device(node, answering(number, status))
    if command is C.GET_ID2 and failure in UNKNOWN:
        assert await sev.chip_id() == b"", "a platform without the command has no id"
        return
    with pytest.raises(kind) as error:
        await EVERYTHING[command](sev)
    assert error.value.reason is reason
    assert command.name in error.value.message
    assert word in error.value.message


@pytest.mark.parametrize("command", EVERYTHING)
async def test_a_psp_that_is_dead_is_unavailable_and_what_it_was_to_change_is_unknown(
    node: Path, command: DeviceCommand
) -> None:
    with pytest.raises(SevattestError, match="ETIMEDOUT") as error:
        await EVERYTHING[command](device(node, answering(errno.ETIMEDOUT, 0)))
    changes = command in CHANGES
    assert error.value.reason is (Reason.OUTCOME_UNKNOWN if changes else Reason.PLATFORM_UNAVAILABLE)
    assert exit_code(error.value) == (4 if changes else 3)
    assert error.value.fields["hint"]


async def test_the_lengths_that_the_firmware_wants_are_told(node: Path) -> None:
    def ioctl(_descriptor: int, request: IssueCommand) -> int:
        request.error = Status.INVALID_LEN
        if request.cmd == C.PDH_CERT_EXPORT:
            export = PdhCertExportData.from_address(request.data)
            export.pdh_cert_len, export.cert_chain_len = 3000, 9000
        else:
            PekCsrData.from_address(request.data).length = 3000
        return errno.EIO

    with pytest.raises(PlatformFailed, match=r"INVALID_LEN.*it wants 3000 and 9000 bytes"):
        await device(node, ioctl).export_chain()
    with pytest.raises(PlatformFailed, match=r"INVALID_LEN.*it wants 3000 bytes"):
        await device(node, ioctl).pek_csr()


@pytest.mark.parametrize(
    ("lengths", "excess"),
    [((0, 0), 0), ((2083, 6252), 0), ((2084, 6251), 0), ((2085, 6252), 1), ((2084, 0xFFFFFFFF), 9000), ((0, 8336), 0)],
)
async def test_a_chain_of_another_length_is_refused_and_spoils_nobodys_memory(
    node: Path, lengths: tuple[int, int], excess: int
) -> None:
    def ioctl(_descriptor: int, request: IssueCommand) -> int:
        export = PdhCertExportData.from_address(request.data)
        # A firmware that writes more than it was asked for: the kernel copies all of it.
        memmove(export.pdh_cert_address, b"x" * (2084 + excess), 2084 + excess)
        memmove(export.cert_chain_address, b"x" * (6252 + excess), 6252 + excess)
        export.pdh_cert_len, export.cert_chain_len = lengths
        return 0

    with pytest.raises(PlatformFailed, match="makes no sense"):
        await device(node, ioctl).export_chain()


@pytest.mark.parametrize("length", [0, 63, 65, 128, 0xFFFFFFFF])
async def test_a_chip_id_of_another_length_is_refused(node: Path, length: int) -> None:
    def ioctl(_descriptor: int, request: IssueCommand) -> int:
        GetId2Data.from_address(request.data).length = length
        return 0

    with pytest.raises(PlatformFailed, match="makes no sense"):
        await device(node, ioctl).chip_id()


@pytest.mark.parametrize("length", [0, 2083, 2085, 0xFFFFFFFF])
async def test_a_certificate_request_of_another_length_is_refused(node: Path, length: int) -> None:
    def ioctl(_descriptor: int, request: IssueCommand) -> int:
        PekCsrData.from_address(request.data).length = length
        return 0

    with pytest.raises(PlatformFailed, match="makes no sense"):
        await device(node, ioctl).pek_csr()


@given(data=st.binary(min_size=12, max_size=12))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
async def test_any_status_is_one_that_is_known_or_a_typed_error(node: Path, data: bytes) -> None:
    def ioctl(_descriptor: int, request: IssueCommand) -> int:
        memmove(request.data, data, sizeof(PlatformStatusData))
        return 0

    try:
        status = await device(node, ioctl).status()
    except PlatformFailed:
        assert data[2] not in set(PlatformState)
    else:
        assert struct.pack("<B", status.state) == data[2:3]


async def test_where_there_is_no_device_the_sentence_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"sev cannot be opened for reading: No such file") as error:
        await device(tmp_path / "sev", answering(0)).status()
    assert "BIOS" in error.value.fields["hint"]
    with pytest.raises(Unavailable, match="cannot be opened for writing"):
        await device(tmp_path / "sev", answering(0)).factory_reset()


async def test_a_file_that_is_no_device_is_told_so_by_the_real_kernel(node: Path) -> None:
    with pytest.raises(PlatformFailed, match="ENOTTY") as error:
        await device(node, call_kernel).status()
    assert error.value.fields["hint"] == "this is no SEV device"


# --- a PSP that hangs --------------------------------------------------------------------------------------------


class Hanging:
    """A kernel that sits in the ioctl until it is told."""

    def __init__(self) -> None:
        self.released = threading.Event()
        self.calls = 0

    def ioctl(self, _descriptor: int, request: IssueCommand) -> int:
        self.calls += 1
        assert self.released.wait(60)
        if request.cmd == C.PLATFORM_STATUS:
            memmove(request.data, struct.pack("<BBBIBI", 1, 55, 1, 0, 24, 0), 12)
        return 0


@pytest.fixture
def hanging() -> Iterator[Hanging]:
    kernel = Hanging()
    yield kernel
    kernel.released.set()
    for thread in threading.enumerate():
        if thread.name == "sev-device":
            thread.join(30)


def _threads() -> int:
    return sum(thread.name == "sev-device" for thread in threading.enumerate())


async def test_a_hang_is_left_in_time_holds_one_thread_and_refuses_the_others_at_once(
    node: Path, hanging: Hanging
) -> None:
    sev = device(node, hanging.ioctl, limit=0.2)
    await until(lambda: _threads() == 0)  # those of tests before are about to end
    loop = asyncio.get_running_loop()
    with pytest.raises(Unavailable, match=r"PLATFORM_STATUS had no answer in 0\.2 s"):
        await sev.status()
    await until(lambda: hanging.calls == 1)
    began = loop.time()
    for _ in range(200):
        with pytest.raises(Unavailable, match="PLATFORM_STATUS has been under way for") as error:
            await sev.export_chain()
        assert error.value.reason is Reason.PLATFORM_UNAVAILABLE
    assert loop.time() - began < 30, "200 waits of 0.2 s would be 40 s"
    assert (hanging.calls, _threads()) == (1, 1)
    hanging.released.set()
    await until(lambda: _threads() == 0)
    sev._timeout = 20.0  # what is honest needs its time
    assert (await sev.status()).state is PlatformState.INIT


@pytest.mark.parametrize("command", CHANGES)
async def test_a_change_without_an_answer_has_an_unknown_outcome_and_one_that_was_not_sent_has_none(
    node: Path, hanging: Hanging, command: DeviceCommand
) -> None:
    sev = device(node, hanging.ioctl, limit=0.1)
    with pytest.raises(OutcomeUnknown, match="had no answer"):
        await CHANGES[command](sev)
    with pytest.raises(Unavailable, match="was not sent"):
        await CHANGES[command](sev)


async def test_who_gives_up_early_leaves_the_loop_alive_and_the_turn_taken(node: Path, hanging: Hanging) -> None:
    sev = device(node, hanging.ioctl, limit=30)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await sev.status()
    waiting = asyncio.create_task(sev.status())
    await until(lambda: hanging.calls == 1)
    assert not waiting.done(), "the next waits for its turn"
    hanging.released.set()
    assert (await waiting).state is PlatformState.INIT
    assert hanging.calls == 2


async def test_commands_go_to_the_psp_one_at_a_time(node: Path) -> None:
    under_way, most = 0, 0
    lock = threading.Lock()

    def ioctl(_descriptor: int, request: IssueCommand) -> int:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        memmove(request.data, bytes(12), 12)
        with lock:
            under_way -= 1
        return 0

    sev = device(node, ioctl)
    await asyncio.gather(*(sev.status() for _ in range(50)))
    assert most == 1


async def test_a_thousand_bad_answers_leave_no_descriptor_and_no_thread(node: Path) -> None:
    answers = cycle([*FAILURES, *UNKNOWN, (0, 0, FIRMWARE, "")])

    def ioctl(descriptor: int, request: IssueCommand) -> int:
        number, status, *_ = next(answers)
        return answering(number, status)(descriptor, request)

    sev = device(node, ioctl)
    descriptors = open_descriptors()
    questions = cycle(EVERYTHING.values())
    for _ in range(1000):
        try:
            await next(questions)(sev)
        except SevattestError:
            continue
    await until(lambda: _threads() == 0)
    assert open_descriptors() == descriptors


def test_the_structure_is_written_back_also_when_the_call_fails(node: Path) -> None:
    # The driver's libc call hands the very structure to the kernel, not a copy of it.
    request = IssueCommand(cmd=1, data=0, error=7)
    where = addressof(request)
    descriptor = os.open(node, os.O_RDONLY)
    try:
        assert call_kernel(descriptor, request) == errno.ENOTTY
    finally:
        os.close(descriptor)
    assert IssueCommand.from_address(where).error == 7
