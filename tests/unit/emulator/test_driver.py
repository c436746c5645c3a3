"""The kernel's rules between a descriptor and the firmware; no socket."""

from __future__ import annotations

import errno
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from common.sev.abi import NO_FIRMWARE_CALL, DeviceCommand, PlatformState, Status
from emulator import protocol
from emulator.driver import Descriptor, Driver, Reply
from emulator.errors import KernelRefused
from emulator.protocol import GuestRequest
from emulator.psp import Psp
from tests.support.software_psp import make_owner, make_psp

C, G = DeviceCommand, GuestRequest


def u32(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}I", *numbers)


@pytest.fixture
def driver(psp: Psp) -> Driver:
    return Driver(psp)


@pytest.fixture
def writer(driver: Driver) -> Descriptor:
    return driver.open(protocol.READ_WRITE)


@pytest.fixture
def reader(driver: Driver) -> Descriptor:
    return driver.open(protocol.READ_ONLY)


def refused(number: int) -> Reply:
    return Reply(number, NO_FIRMWARE_CALL, b"")


VALID = {
    C.FACTORY_RESET: b"",
    C.PLATFORM_STATUS: b"",
    C.PEK_GEN: b"",
    C.PEK_CSR: u32(2084),
    C.PDH_GEN: b"",
    C.PDH_CERT_EXPORT: u32(2084, 6252),
    C.PEK_CERT_IMPORT: u32(1, 1) + b"xx",
    C.GET_ID: b"",
    C.GET_ID2: u32(64),
}


def test_flags_other_than_two_are_refused(driver: Driver) -> None:
    with pytest.raises(KernelRefused) as refusal:
        driver.open(2)
    assert refusal.value.errno == errno.EINVAL


@pytest.mark.parametrize("command", [9, 10, 11, 12, 255, 0x109, protocol.OPEN, 0xFFFFFFFF])
def test_unknown_and_snp_commands_are_einval(writer: Descriptor, command: int) -> None:
    assert writer.issue(command, b"") == refused(errno.EINVAL)


@pytest.mark.parametrize("command", [C.FACTORY_RESET, C.PEK_GEN, C.PEK_CSR, C.PDH_GEN, C.PEK_CERT_IMPORT])
def test_a_read_only_descriptor_changes_no_state(reader: Descriptor, psp: Psp, command: DeviceCommand) -> None:
    psp.init()
    before = psp.identity
    assert reader.issue(command, VALID[command]) == refused(errno.EPERM)
    assert psp.identity == before


@pytest.mark.parametrize("command", [C.PLATFORM_STATUS, C.GET_ID, C.GET_ID2])
def test_a_read_only_descriptor_asks_even_an_uninitialised_platform(reader: Descriptor, command: DeviceCommand) -> None:
    assert reader.issue(command, VALID[command]).errno == 0


def test_a_read_only_descriptor_exports_once_the_platform_is_up(reader: Descriptor, psp: Psp) -> None:
    assert reader.issue(C.PDH_CERT_EXPORT, VALID[C.PDH_CERT_EXPORT]) == refused(errno.EPERM)
    psp.init()
    reply = reader.issue(C.PDH_CERT_EXPORT, VALID[C.PDH_CERT_EXPORT])
    assert (reply.errno, reply.status) == (0, 0)
    assert reply.payload[:8] == u32(2084, 6252)
    assert len(reply.payload) == 8 + 2084 + 6252


def test_a_read_only_descriptor_starts_no_guest(reader: Descriptor) -> None:
    assert reader.issue(G.LAUNCH_START, u32(0, 1, 0, 0)) == refused(errno.EPERM)


@pytest.mark.parametrize("command", [C.PEK_GEN, C.PEK_CSR, C.PDH_GEN, C.PDH_CERT_EXPORT])
def test_commands_that_need_keys_bring_the_platform_up(writer: Descriptor, psp: Psp, command: DeviceCommand) -> None:
    assert writer.issue(command, VALID[command]).errno == 0
    assert psp.state is PlatformState.INIT


def test_an_import_brings_the_platform_up_before_it_fails(writer: Descriptor, psp: Psp) -> None:
    reply = writer.issue(C.PEK_CERT_IMPORT, VALID[C.PEK_CERT_IMPORT])
    assert reply == Reply(errno.EIO, Status.INVALID_LEN, b"")
    assert psp.state is PlatformState.INIT


def test_a_reset_is_busy_while_guests_exist_and_else_shuts_down_first(driver: Driver, writer: Descriptor) -> None:
    machine = driver.open(protocol.READ_WRITE)
    assert machine.issue(G.LAUNCH_START, u32(0, 1, 0, 0)) == Reply(0, 0, u32(1))
    assert writer.issue(C.FACTORY_RESET, b"") == refused(errno.EBUSY)
    machine.close()
    assert writer.issue(C.PLATFORM_STATUS, b"").payload[2] == PlatformState.INIT
    assert writer.issue(C.FACTORY_RESET, b"") == Reply(0, 0, b"")
    assert writer.issue(C.PLATFORM_STATUS, b"").payload[2] == PlatformState.UNINIT


def test_pek_gen_in_working_is_the_firmwares_refusal(driver: Driver, writer: Descriptor) -> None:
    machine = driver.open(protocol.READ_WRITE)
    machine.issue(G.LAUNCH_START, u32(0, 1, 0, 0))
    assert writer.issue(C.PEK_GEN, b"") == Reply(errno.EIO, Status.INVALID_PLATFORM_STATE, b"")


def test_a_length_of_zero_is_a_question(writer: Descriptor) -> None:
    assert writer.issue(C.PEK_CSR, u32(0)) == Reply(errno.EIO, Status.INVALID_LEN, u32(2084))
    assert writer.issue(C.GET_ID2, u32(0)) == Reply(errno.EIO, Status.INVALID_LEN, u32(64))
    for lengths in ((0, 0), (0, 6252), (2084, 0), (1, 1)):
        reply = writer.issue(C.PDH_CERT_EXPORT, u32(*lengths))
        assert reply == Reply(errno.EIO, Status.INVALID_LEN, u32(2084, 6252))


def test_blobs_have_the_kernels_limits(writer: Descriptor) -> None:
    assert writer.issue(C.PEK_CSR, u32(0x4001)) == refused(errno.EFAULT)
    assert writer.issue(C.PEK_CSR, u32(0x4000)).errno == 0
    assert writer.issue(C.PDH_CERT_EXPORT, u32(0x4001, 6252)) == refused(errno.EFAULT)
    assert writer.issue(C.PDH_CERT_EXPORT, u32(2084, 0x4001)) == refused(errno.EFAULT)
    assert writer.issue(C.PEK_CERT_IMPORT, u32(0, 1) + b"x") == refused(errno.EINVAL)
    assert writer.issue(C.PEK_CERT_IMPORT, u32(1, 0) + b"x") == refused(errno.EINVAL)
    assert writer.issue(C.PEK_CERT_IMPORT, u32(0x4001, 1) + bytes(0x4002)) == refused(errno.EINVAL)


@pytest.mark.parametrize("command", DeviceCommand)
def test_a_payload_of_another_size_is_einval(writer: Descriptor, command: DeviceCommand) -> None:
    for payload in (VALID[command] + b"\0", VALID[command][:-1] or b"\0"):
        assert writer.issue(command, payload) == refused(errno.EINVAL)


def test_the_id_comes_for_one_socket_or_for_both(writer: Descriptor) -> None:
    one = writer.issue(C.GET_ID2, u32(64)).payload
    assert one[:4] == u32(64)
    assert len(one) == 68
    assert writer.issue(C.GET_ID2, u32(127)).payload == one
    assert writer.issue(C.GET_ID2, u32(128)).payload == u32(128) + one[4:] + bytes(64)
    assert writer.issue(C.GET_ID, b"").payload == one[4:] + bytes(64)


@pytest.mark.parametrize("command", [C.GET_ID, C.GET_ID2])
def test_older_firmware_has_no_id(psp: Psp, writer: Descriptor, command: DeviceCommand) -> None:
    psp.chip = replace(psp.chip, generation=replace(psp.chip.generation, api=(0, 15)))
    assert writer.issue(command, VALID[command]) == refused(524)


def test_guest_commands_without_a_guest_are_enotty(writer: Descriptor) -> None:
    payloads = {
        G.LAUNCH_UPDATE_DATA: bytes(8 + 16),
        G.LAUNCH_UPDATE_VMSA: bytes(8 + 4096),
        G.LAUNCH_MEASURE: u32(48),
        G.LAUNCH_SECRET: struct.pack("<QIII", 0, 52, 16, 16) + bytes(68),
        G.LAUNCH_FINISH: b"",
        G.ATTESTATION: bytes(20),
        G.GUEST_STATUS: b"",
        G.DECOMMISSION: b"",
    }
    for command, payload in payloads.items():
        assert writer.issue(command, payload) == refused(errno.ENOTTY)


def test_a_launch_through_the_driver(driver: Driver, psp: Psp) -> None:
    driver.init()
    owner = make_owner(psp, 0x7)
    machine = driver.open(protocol.READ_WRITE)
    start = u32(0, 7, len(owner.godh), len(owner.session)) + owner.godh + owner.session
    assert machine.issue(G.LAUNCH_START, start) == Reply(0, 0, u32(1))
    assert machine.issue(G.LAUNCH_START, start) == refused(errno.EINVAL)
    assert machine.issue(G.GUEST_STATUS, b"") == Reply(0, 0, u32(7, 1, 1))
    assert machine.issue(G.LAUNCH_UPDATE_DATA, bytes(8) + b"x" * 16) == Reply(0, 0, b"")
    assert machine.issue(G.LAUNCH_UPDATE_VMSA, bytes(8) + bytes(4096)) == Reply(0, 0, b"")
    assert machine.issue(G.LAUNCH_MEASURE, u32(0)) == Reply(errno.EIO, Status.INVALID_LEN, u32(48))
    assert machine.issue(G.LAUNCH_MEASURE, u32(0x4001)) == refused(errno.EINVAL)
    blob = machine.issue(G.LAUNCH_MEASURE, u32(48)).payload[4:]
    packet = owner.packet(b"s" * 16, blob[:32])
    head = struct.pack("<QIII", 0x810000, 52, 16, 16)
    assert machine.issue(G.LAUNCH_SECRET, head + packet.header + packet.payload) == Reply(0, 0, b"s" * 16)
    assert machine.issue(G.LAUNCH_SECRET, struct.pack("<QIII", 0, 52, 0x4010, 0x4010) + bytes(52 + 0x4010)) == refused(
        errno.EINVAL
    )
    assert machine.issue(G.ATTESTATION, bytes(16) + u32(0)) == Reply(errno.EIO, Status.INVALID_LEN, u32(208))
    assert machine.issue(G.LAUNCH_FINISH, b"") == Reply(0, 0, b"")
    assert machine.issue(G.LAUNCH_FINISH, b"") == Reply(errno.EIO, Status.INVALID_GUEST_STATE, b"")
    assert machine.issue(G.DECOMMISSION, b"") == Reply(0, 0, b"")
    assert psp.state is PlatformState.INIT
    assert machine.issue(G.LAUNCH_START, start).errno == 0  # the connection may hold another


def test_closing_a_descriptor_ends_its_guest_and_no_other(driver: Driver, psp: Psp) -> None:
    first, second = driver.open(protocol.READ_WRITE), driver.open(protocol.READ_WRITE)
    for machine in (first, second):
        machine.issue(G.LAUNCH_START, u32(0, 1, 0, 0))
    first.close()
    first.close()
    assert [guest.handle for guest in psp.guests] == [2]
    second.close()
    assert psp.guests == ()


def test_a_guest_that_a_shutdown_took_is_unknown_to_the_firmware(driver: Driver, psp: Psp) -> None:
    machine = driver.open(protocol.READ_WRITE)
    machine.issue(G.LAUNCH_START, u32(0, 1, 0, 0))
    psp.shutdown()
    assert machine.issue(G.LAUNCH_FINISH, b"") == Reply(errno.EIO, Status.INVALID_PLATFORM_STATE, b"")
    machine.close()


def test_an_end_does_not_take_a_later_guest_with_the_same_handle(driver: Driver, psp: Psp) -> None:
    old, new = driver.open(protocol.READ_WRITE), driver.open(protocol.READ_WRITE)
    old.issue(G.LAUNCH_START, u32(0, 1, 0, 0))
    psp.shutdown()
    new.issue(G.LAUNCH_START, u32(0, 1, 0, 0))
    old.close()
    assert len(psp.guests) == 1


def test_asids_run_out(tmp_path: Path) -> None:
    driver = Driver(make_psp(tmp_path, "naples"))
    machines = [driver.open(protocol.READ_WRITE) for _ in range(16)]
    codes = [machine.issue(G.LAUNCH_START, u32(0, 1, 0, 0)).errno for machine in machines]
    assert codes == [0] * 15 + [errno.EBUSY]
    machines[4].close()
    assert machines[15].issue(G.LAUNCH_START, u32(0, 1, 0, 0)).errno == 0
