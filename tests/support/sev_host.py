"""A host with one guest to launch, and its guest owner: files, command lines, and what both sides can tell of a launch.

The owner's half is `common.sev`, which the emulator does not import. Questions to the device are asked in bytes.
"""

from __future__ import annotations

import base64
import os
import socket
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from cryptography.hazmat.primitives.asymmetric import ec

from common.sev.certs.sev import SevCertificate
from common.sev.measurement import FirmwareVersion, MeasurementBlob, match
from common.sev.policy import GuestPolicy
from common.sev.secret import SecretEntry, build_table, seal_packet
from common.sev.session import LaunchKeys, open_session
from emulator.firmware_image import build_image
from tests.support.eventually import wait_until
from tests.support.platform import Platform
from tests.support.qmp import QmpClient
from tests.support.real_qemu import small_kernel

FIRMWARE = FirmwareVersion(1, 55, 24)
GUID = UUID("736869e5-84f0-4973-92ec-06879ce3da0b")
TEXT = b"hello-from-the-owner"


@dataclass
class Host:
    """A folder with what a host has on disk, and the words that start a machine with it."""

    folder: Path
    platform: Platform
    policy: int
    keys: LaunchKeys

    def words(self, *more: str, hashes: bool = True, own: tuple[str, ...] = (), paused: bool = True) -> list[str]:
        """The whole command of the stand-in machine."""
        return [*self.platform.machine(*own), *self.arguments(*more, hashes=hashes, paused=paused)]

    def arguments(self, *more: str, hashes: bool = True, paused: bool = True) -> list[str]:
        """QEMU's arguments alone."""
        return [
            *("-nodefaults", "-machine", "q35,confidential-guest-support=sev0", "-m", "256"),
            *("-object", self.sev_object(hashes=hashes)),
            *("-drive", f"if=pflash,format=raw,unit=0,readonly=on,file={self.folder / 'firmware'}"),
            *("-qmp", f"unix:{self.qmp},server=on,wait=off", "-serial", f"file:{self.serial}"),
            *(("-S",) if paused else ()),
            *more,
        ]

    def sev_object(self, *, hashes: bool = True) -> str:
        """The value of -object."""
        sev = (
            f"sev-guest,id=sev0,cbitpos=51,reduced-phys-bits=1,policy=0x{self.policy:x},"
            f"dh-cert-file={self.folder / 'godh'},session-file={self.folder / 'session'}"
        )
        return sev + (",kernel-hashes=on" if hashes else "")

    @property
    def kernel(self) -> list[str]:
        """The words for a direct boot."""
        return ["-kernel", f"{self.folder}/kernel", "-initrd", f"{self.folder}/initrd", "-append", "quiet"]

    @property
    def qmp(self) -> Path:
        return self.folder / "q"

    @property
    def serial(self) -> Path:
        return self.folder / "serial"

    def said(self, wanted: str) -> str:
        """The serial line, once `wanted` is on it."""
        deadline = time.monotonic() + 30
        while wanted not in (text := self.serial.read_text()):
            assert time.monotonic() < deadline, text
        return text


def make_host(folder: Path, platform: Platform, policy: int = 0xF, pdh: SevCertificate | None = None) -> Host:
    """Files of a host whose guest's owner has made a session for this platform and policy."""
    keys = LaunchKeys.generate(os.urandom)
    session = open_session(
        pdh=pdh or exported_pdh(platform),
        policy=GuestPolicy(value=policy),
        keys=keys,
        godh_key=ec.generate_private_key(ec.SECP384R1()),
        nonce=os.urandom(16),
        iv=os.urandom(16),
    )
    (folder / "godh").write_text(b64(session.godh.raw))
    (folder / "session").write_text(b64(session.blob))
    (folder / "firmware").write_bytes(build_image("a firmware"))
    (folder / "kernel").write_bytes(b"a kernel" * 1000)
    (folder / "initrd").write_bytes(b"an initrd" * 1000)
    return Host(folder, platform, policy, keys)


def make_bootable_host(folder: Path, platform: Platform, policy: int = 0xF) -> Host:
    """The same, with a kernel that a real QEMU takes for one."""
    host = make_host(folder, platform, policy)
    (folder / "kernel").write_bytes(small_kernel())
    return host


def ask_device(platform: Platform, command: int, payload: bytes) -> bytes:
    """What the platform's device answers to one command, which must succeed."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as device:
        device.connect(str(platform.socket))
        with device.makefile("rwb") as stream:
            answer = b""
            for number, content in ((0xFFFF0000, struct.pack("<I", 1)), (command, payload)):
                stream.write(struct.pack("<II", number, len(content)) + content)
                stream.flush()
                code, _, length = struct.unpack("<iII", stream.read(12))
                answer = stream.read(length)
                assert code == 0
            return answer


def exported_pdh(platform: Platform) -> SevCertificate:
    return SevCertificate.parse(ask_device(platform, 5, struct.pack("<II", 2084, 6252))[8:2092])


def guests(platform: Platform) -> int:
    """How many guests the platform has."""
    return int.from_bytes(ask_device(platform, 1, b"")[8:], "little")


def wait_for_no_guest(platform: Platform) -> None:
    wait_for_guests(platform, 0)


def wait_for_guests(platform: Platform, count: int) -> None:
    """Return when the platform has no more than so many."""
    wait_until(lambda: guests(platform) <= count)


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def blob_of(client: QmpClient) -> MeasurementBlob:
    return MeasurementBlob.parse(base64.b64decode(client.ask("query-sev-launch-measure")["data"]))


def is_measured_as(host: Host, blob: MeasurementBlob, digest: bytes) -> bool:
    """Whether the owner, who expects `digest`, accepts the measurement."""
    policy = GuestPolicy(value=host.policy)
    return match(tik=host.keys.tik, blob=blob, firmware=FIRMWARE, policy=policy, digests=[digest]) == 0


def packet_for(host: Host, blob: MeasurementBlob, data: bytes = TEXT, area: int = 0xC00) -> dict[str, str]:
    """The arguments of `sev-inject-launch-secret` for a table with one secret."""
    packet = seal_packet(
        keys=host.keys,
        table=secret_table(data),
        measurement=blob.measurement,
        iv=os.urandom(16),
        area_size=area,
    )
    return {"packet_header": b64(packet.header), "secret": b64(packet.payload)}


def secret_table(data: bytes = TEXT) -> bytes:
    """What such a packet puts into the guest's memory."""
    return build_table([SecretEntry(guid=GUID, data=data)])
