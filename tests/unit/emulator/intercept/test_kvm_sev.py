"""KVM's SEV commands without a KVM: this process is the caller, a served platform the PSP."""

from __future__ import annotations

import base64
import errno
import os
import struct
from collections.abc import Iterator
from contextlib import closing
from hashlib import sha256
from pathlib import Path

import pytest
from sevsnpmeasure.sev_mode import SevMode
from sevsnpmeasure.vmsa import VMSA

from common.sev.abi import Status
from common.sev.measurement import MeasurementBlob
from emulator.device_client import CommandFailed
from emulator.errors import KernelRefused
from emulator.firmware_image import build_image
from emulator.intercept.kvm_sev import EncryptOp, Vm
from emulator.intercept.link import Link
from emulator.intercept.memory import Memory as CallerMemory
from tests.support.platform import Platform, platform_in_thread
from tests.support.raw_sev import (
    ES_INIT,
    FINISH,
    INIT,
    INIT2,
    MEASURE,
    SECRET,
    START,
    UNTOUCHED,
    UPDATE_DATA,
    UPDATE_VMSA,
    Memory,
)
from tests.support.sev_host import Host, guests, is_measured_as, make_host, packet_for, secret_table, wait_for_no_guest

SIGNATURE = 0x00A00F11
RESET_ADDRESS = 0x0080B004
SEV = 17  # the descriptor of /dev/sev in the story


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    with platform_in_thread(tmp_path_factory.mktemp("kvm") / "p") as served:
        yield served


class Caller:
    """A process with one virtual machine."""

    def __init__(self, host: Host, *, es: bool, flavour: str = "init2") -> None:
        self.host = host
        self.vm = Vm()
        self.link = Link(host.platform.socket)
        self.flavour = flavour
        assert self.op(ES_INIT if es else INIT) == ("ok", 0)

    def op(self, command: int, data: Memory | None = None, *, sev: int = SEV) -> tuple[str, int]:
        block = Memory(struct.pack("<I4xQIi", command, data.at if data else 0, UNTOUCHED, sev))
        operation = EncryptOp(
            self.vm,
            CallerMemory(os.getpid()),
            self.link,
            is_device=lambda descriptor: descriptor == SEV,
            cpu_signature=SIGNATURE,
            flavour=self.flavour,
        )
        said = "ok"
        try:
            operation.carry_out(block.at)
        except (KernelRefused, CommandFailed) as refusal:
            said = errno.errorcode[refusal.errno]
        return said, struct.unpack("<I4xQIi", block.bytes)[2]

    def start(self) -> tuple[str, int]:
        godh, session = (
            Memory(base64.b64decode((self.host.folder / name).read_bytes())) for name in ("godh", "session")
        )
        data = Memory(struct.pack("<IIQI4xQI4x", 0, self.host.policy, godh.at, 2084, session.at, 128))
        return self.op(START, data)

    def update(self, content: Memory, size: int) -> tuple[str, int]:
        return self.op(UPDATE_DATA, Memory(struct.pack("<QI4x", content.at, size)))

    def measure(self) -> MeasurementBlob:
        blob = Memory(48)
        assert self.op(MEASURE, Memory(struct.pack("<QI4x", blob.at, 48))) == ("ok", 0)
        return MeasurementBlob.parse(blob.bytes)

    def secret(self, header: bytes, packet: bytes, place: int, size: int | None = None) -> tuple[str, int]:
        head, body = Memory(header), Memory(packet)
        length = len(packet) if size is None else size
        data = struct.pack("<QI4xQI4xQI4x", head.at, len(header), place, length, body.at, len(packet))
        return self.op(SECRET, Memory(data))

    def close(self) -> None:
        self.vm.close()
        self.link.close()


def aligned(content: bytes) -> Memory:
    """Content at an address that is a multiple of 16: it is repeated until one is."""
    memory = Memory(content)
    keep = []
    while memory.at % 16:
        keep.append(memory)
        memory = Memory(content)
    return memory


def packet_of(host: Host, blob: MeasurementBlob) -> tuple[bytes, bytes]:
    made = packet_for(host, blob)
    return base64.b64decode(made["packet_header"]), base64.b64decode(made["secret"])


def test_a_secret_is_written_into_the_callers_memory_and_a_bad_one_is_not(tmp_path: Path, platform: Platform) -> None:
    host = make_host(tmp_path, platform, 0xB)
    with closing(Caller(host, es=False)) as caller:
        assert caller.start() == ("ok", 0)
        code = aligned(b"firmware" * 512)
        assert caller.update(code, 4096) == ("ok", 0)
        blob = caller.measure()
        assert is_measured_as(host, blob, sha256(b"firmware" * 512).digest())
        assert not is_measured_as(host, blob, sha256(b"firmware" * 511).digest())
        header, packet = packet_of(host, blob)
        place = aligned(b"\xee" * 1024)
        bad = packet[:-1] + bytes([packet[-1] ^ 1])
        assert caller.secret(header, bad, place.at) == ("EIO", Status.BAD_MEASUREMENT)
        assert caller.secret(header, packet, place.at + 8) == ("EIO", Status.INVALID_ADDRESS)
        assert caller.secret(header, packet, 16) == ("ENOMEM", UNTOUCHED)
        assert caller.secret(header, packet, place.at, 0) == ("EINVAL", UNTOUCHED)
        assert caller.secret(header, b"", place.at, 16) == ("EINVAL", UNTOUCHED)
        assert place.bytes == b"\xee" * 1024
        assert caller.secret(header, packet, place.at) == ("ok", 0)
        table = secret_table()
        assert place.bytes[: len(table)] == table
        assert place.bytes[len(packet) :] == b"\xee" * (1024 - len(packet))
        assert caller.op(FINISH) == ("ok", 0)


@pytest.mark.parametrize("vcpus", [1, 2, 8])
def test_save_areas_start_where_the_measured_firmware_says(tmp_path: Path, platform: Platform, vcpus: int) -> None:
    host = make_host(tmp_path, platform, 0xF)
    with closing(Caller(host, es=True)) as caller:
        caller.vm.vcpus = set(range(vcpus))
        assert caller.start() == ("ok", 0)
        image = build_image("firmware", reset_address=RESET_ADDRESS)
        firmware = aligned(image)
        assert caller.update(firmware, len(image)) == ("ok", 0)
        assert caller.op(UPDATE_VMSA) == ("ok", 0)
        blob = caller.measure()

    def digest(count: int, address: int) -> bytes:
        pages = VMSA(SevMode.SEV_ES, address, SIGNATURE, 0).pages(count)
        return sha256(image + b"".join(pages)).digest()

    assert is_measured_as(host, blob, digest(vcpus, RESET_ADDRESS))
    assert not is_measured_as(host, blob, digest(vcpus + 1, RESET_ADDRESS))
    if vcpus > 1:
        assert not is_measured_as(host, blob, digest(vcpus, 0xFFFFFFF0))


def test_a_session_for_another_policy_starts_nothing(tmp_path: Path, platform: Platform) -> None:
    wait_for_no_guest(platform)
    host = make_host(tmp_path, platform, 0xB)
    host.policy = 0x3
    with closing(Caller(host, es=False)) as caller:
        assert caller.start() == ("EIO", Status.BAD_MEASUREMENT)
        assert guests(platform) == 0


def test_a_command_goes_through_the_device_that_the_launch_was_started_with(tmp_path: Path, platform: Platform) -> None:
    host = make_host(tmp_path, platform, 0xB)
    with closing(Caller(host, es=False)) as caller:
        assert caller.op(FINISH) == ("EBADF", UNTOUCHED)
        assert caller.start() == ("ok", 0)
        assert caller.op(MEASURE, Memory(16), sev=3) == ("EIO", Status.INVALID_LEN)
        caller.vm.sev = 3
        assert caller.op(FINISH) == ("EBADF", UNTOUCHED)


@pytest.mark.parametrize("command", [8, 12, 17, 18, 19, 21, INIT2, 23, 0xFFFFFFFF])
def test_what_is_not_a_launchs_command_is_unknown(tmp_path: Path, platform: Platform, command: int) -> None:
    with closing(Caller(make_host(tmp_path, platform, 0xB), es=False)) as caller:
        assert caller.op(command) == ("EINVAL", UNTOUCHED)


def test_the_end_of_a_machine_is_the_end_of_its_guest(tmp_path: Path, platform: Platform) -> None:
    wait_for_no_guest(platform)
    caller = Caller(make_host(tmp_path, platform, 0xB), es=False)
    assert caller.start() == ("ok", 0)
    assert guests(platform) == 1
    caller.close()
    wait_for_no_guest(platform)
