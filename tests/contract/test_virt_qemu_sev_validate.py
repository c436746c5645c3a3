"""Measurements and secret packets agree with libvirt's virt-qemu-sev-validate, an independent implementation.

It knows plain SEV, and SEV-ES as KVM_SEV_ES_INIT makes it (`legacy`). Runs where the Debian package
libvirt-clients-qemu is installed; says so where it is not.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import pytest

from common.sev.digest.compute import LaunchShape, hash_chunks, measure_firmware
from common.sev.digest.cpus import parse_cpu
from common.sev.digest.kernel_hashes import KernelHashes
from common.sev.digest.vmsa import Flavour
from common.sev.measurement import FirmwareVersion, MeasurementBlob, measure
from common.sev.policy import GuestPolicy
from common.sev.secret import SecretEntry, parse_table, seal_packet
from common.sev.session import LaunchKeys
from tests.support.firmware import AMDSEV_ENTRIES, with_footer
from tests.support.witnesses import ACCEPTED, REFUSED, judged

_FIRMWARE = with_footer(Random(7).randbytes(3000), AMDSEV_ENTRIES)  # noqa: S311 -- not a secret
_KERNEL, _INITRD = b"a kernel" * 100, b"an initrd" * 100
_GUIDS = ("43ced044-42ec-487a-88b7-261bda359f24", "736869e5-84f0-4973-92ec-06879ce3da0b")


@dataclass(frozen=True, kw_only=True)
class _Launch:
    """One launch as the owner describes it; both sides get it in their own words."""

    policy: int = 0x0F
    version: FirmwareVersion = FirmwareVersion(1, 55, 24)  # noqa: RUF009 -- a tuple
    kernel: bytes | None = _KERNEL
    initrd: bytes | None = _INITRD
    cmdline: str | None = "console=ttyS0 loglevel=7"
    vcpus: int = 8
    cpu: str = "EPYC-Rome"
    flavour: Flavour = Flavour.LEGACY
    keys: LaunchKeys = LaunchKeys(tek=bytes(range(16)), tik=bytes(range(16, 32)))  # noqa: RUF009 -- a frozen value

    def measured(self) -> MeasurementBlob:
        """What the firmware would hand out, by our code."""
        policy = GuestPolicy.parse(self.policy)
        hashes = None
        if self.kernel is not None:
            initrd = None if self.initrd is None else hash_chunks([self.initrd])
            raw = None if self.cmdline is None else self.cmdline.encode()
            hashes = KernelHashes.of(hash_chunks([self.kernel]), initrd, raw)
        firmware = measure_firmware([_FIRMWARE])
        shape = LaunchShape(firmware=firmware, hashes=hashes)
        if policy.requires_es:
            cpu = parse_cpu(self.cpu)
            shape = replace(shape, vcpus=self.vcpus, cpu=cpu, flavour=self.flavour)
        nonce = bytes(range(32, 48))
        made = measure(tik=self.keys.tik, firmware=self.version, policy=policy, digest=shape.digest(), nonce=nonce)
        return MeasurementBlob(measurement=made, nonce=nonce)

    def options(self, folder: Path) -> list[str]:
        """The same for the tool, without the measurement."""
        files = {
            "firmware": _FIRMWARE,
            "kernel": self.kernel,
            "initrd": self.initrd,
            "tik": self.keys.tik,
            "tek": self.keys.tek,
        }
        options = []
        for name, content in files.items():
            if content is not None:
                (folder / name).write_bytes(content)
                options += [f"--{name}", str(folder / name)]
        if self.cmdline is not None:
            options.append(f"--cmdline={self.cmdline}")
        major, minor, build = self.version
        options += [f"--api-major={major}", f"--api-minor={minor}", f"--build-id={build}", f"--policy={self.policy}"]
        if GuestPolicy.parse(self.policy).requires_es:
            cpu = parse_cpu(self.cpu)
            options += [f"--cpu-family={cpu.family}", f"--cpu-model={cpu.model}", f"--cpu-stepping={cpu.stepping}"]
            options.append(f"--num-cpus={self.vcpus}")
        return options


def _judged(launch: _Launch, blob: MeasurementBlob, folder: Path, *more: str) -> int:
    """The tool's verdict on a measurement of the launch, as its exit code."""
    measurement = f"--measurement={b64encode(blob.to_bytes()).decode()}"
    [code] = judged([[*launch.options(folder), measurement, *more]])
    return code


_LAUNCHES = {
    "SEV, firmware only": _Launch(policy=0x0B, kernel=None, initrd=None, cmdline=None),
    "SEV, kernel": _Launch(policy=0x01),
    "SEV, kernel alone": _Launch(policy=0x03, initrd=None, cmdline=None),
    "SEV, API floor": _Launch(policy=0x3701000B),
    "SEV-ES, one vCPU": _Launch(vcpus=1, kernel=None, initrd=None, cmdline=None),
    "SEV-ES, the known case": _Launch(
        policy=0x05, version=FirmwareVersion(0, 24, 15), kernel=None, initrd=None, cmdline=None
    ),
    "SEV-ES, kernel": _Launch(),
    "SEV-ES, 64 Milan vCPUs": _Launch(vcpus=64, cpu="EPYC-Milan"),
    "SEV-ES, Turin": _Launch(vcpus=2, cpu="EPYC-Turin", cmdline="ünïcode "),
    "SEV-ES, an old chip": _Launch(vcpus=2, cpu="6-13-3"),
}


@pytest.mark.parametrize("launch", _LAUNCHES.values(), ids=_LAUNCHES)
def test_it_accepts_our_measurement(launch: _Launch, tmp_path: Path) -> None:
    assert _judged(launch, launch.measured(), tmp_path) == ACCEPTED


@pytest.mark.parametrize(
    "changed",
    [
        {"policy": 0x07},
        {"version": FirmwareVersion(1, 55, 23)},
        {"kernel": _KERNEL + b"!"},
        {"initrd": None},
        {"cmdline": "console=ttyS0 loglevel=7\n"},
        {"vcpus": 9},
        {"cpu": "EPYC-Milan"},
        {"flavour": Flavour.INIT2},
        {"flavour": Flavour.LEGACY_DEBUG_SWAP},
        {"flavour": Flavour.INIT2_AP_ZERO},
        {"keys": LaunchKeys(tek=b"\x01" * 16, tik=b"\x02" * 16)},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_it_refuses_our_measurement_of_a_launch_that_differs(changed: dict[str, object], tmp_path: Path) -> None:
    expected = _Launch()
    measured = replace(expected, **changed).measured()  # type: ignore[arg-type]  # one field at a time, of any type
    assert _judged(expected, measured, tmp_path) == REFUSED


@pytest.mark.parametrize("sizes", [(0,), (1,), (19,), (24,), (32, 100), (300, 2000)])
def test_its_secret_packets_are_ours(sizes: tuple[int, ...], tmp_path: Path) -> None:
    launch = _Launch(policy=0x0B)
    blob = launch.measured()
    wanted = []
    options = []
    for guid, size in zip(_GUIDS, sizes, strict=False):
        data = Random(size).randbytes(size)  # noqa: S311 -- not a secret
        (tmp_path / guid).write_bytes(data)
        options.append(f"--inject-secret={guid}:{tmp_path / guid}")
        wanted.append((guid, data))
    header_file, payload_file = tmp_path / "header", tmp_path / "payload"
    options += [f"--secret-header={header_file}", f"--secret-payload={payload_file}"]
    assert _judged(launch, blob, tmp_path, *options) == ACCEPTED
    header, payload = b64decode(header_file.read_bytes()), b64decode(payload_file.read_bytes())

    # Counter mode is its own inverse: sealing the ciphertext with the same IV opens it.
    def sealed(table: bytes) -> tuple[bytes, bytes]:
        packet = seal_packet(
            keys=launch.keys, table=table, measurement=blob.measurement, iv=header[4:20], area_size=0xC00
        )
        return packet.header, packet.payload

    table = sealed(payload)[1]
    entries: tuple[SecretEntry, ...] = parse_table(table)
    assert [(str(entry.guid), entry.data) for entry in entries] == wanted
    assert sealed(table) == (header, payload)
    other = seal_packet(keys=launch.keys, table=table, measurement=bytes(32), iv=header[4:20], area_size=0xC00)
    assert other.header != header
