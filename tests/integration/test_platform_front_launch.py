"""The front of a real QEMU, its launch: what is measured, what is in the guest's RAM, what its firmware is shown.

No guest runs. Who says what is right: sev-snp-measure, libvirt's virt-qemu-sev-validate, and the real QEMU's own view
of its memory (`pmemsave`), its devices (qtest) and its registers.
"""

from __future__ import annotations

import base64
import contextlib
import json
import struct
import subprocess
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest
from sevsnpmeasure import guest as outside
from sevsnpmeasure.sev_mode import SevMode

from common.sev.measurement import MeasurementBlob
from emulator.firmware_image import HASHES_AREA, SECRET_AREA
from emulator.kernel_hashes import BootHashes
from emulator.vmsa import signature
from tests.support.fw_cfg import fw_cfg, read_memory
from tests.support.platform import Platform
from tests.support.qmp import QmpClient, running_machine
from tests.support.real_qemu import EACH_QEMU, qemu, small_kernel, version_of
from tests.support.sev_host import (
    TEXT,
    Host,
    b64,
    blob_of,
    is_measured_as,
    make_bootable_host,
    packet_for,
    secret_table,
    wait_for_no_guest,
)
from tests.support.witnesses import ACCEPTED, REFUSED, expectation, launch_digest, verdicts

__all__ = ["qemu"]  # a fixture
INJECT = "sev-inject-launch-secret"


@contextlib.contextmanager
def launched(host: Host, qemu: str, arguments: list[str], *own: str) -> Iterator[QmpClient]:
    """A machine behind the front, and a client that has negotiated."""
    host.qmp.unlink(missing_ok=True)  # of a machine before, which was killed
    words = [*host.platform.front(qemu, *own), *arguments, "-display", "none"]
    with running_machine(words, host.qmp), QmpClient(host.qmp) as client:
        client.negotiate()
        yield client


# -------------------------------------------------------------------------------------------------------- measurement


@EACH_QEMU
@pytest.mark.parametrize(
    "case",
    [
        (0xB, 1, "EPYC-Rome", True),
        (0xB, 4, "EPYC-v3", False),
        (0xF, 1, "EPYC-Milan", True),
        (0xF, 4, "EPYC-v3", False),
        (0xF, 4, "EPYC-Rome", True),
    ],
)
def test_sev_snp_measure_agrees_with_the_measurement(
    tmp_path: Path, platform: Platform, qemu: str, case: tuple[int, int, str, bool]
) -> None:
    policy, vcpus, cpu, hashes = case
    host = make_bootable_host(tmp_path, platform, policy)
    kernel = host.kernel if hashes else []
    arguments = host.arguments(*kernel, "-smp", str(vcpus), "-cpu", cpu, hashes=hashes)
    with launched(host, qemu, arguments, "--vmsa", "init2") as client:
        told = client.ask("query-sev")
        assert (told["enabled"], told["state"], told["policy"]) == (True, "launch-secret", policy)
        assert ("sev-type" in told) == (version_of(qemu) >= (9, 1))
        blob = blob_of(client)
        assert is_measured_as(host, blob, launch_digest(host, vcpus, cpu, hashes=hashes))
        if policy & 4:
            assert not is_measured_as(host, blob, launch_digest(host, vcpus + 1, cpu, hashes=hashes))
        assert not is_measured_as(host, blob, launch_digest(host, vcpus, cpu, hashes=not hashes))
    wait_for_no_guest(platform)


@EACH_QEMU
@pytest.mark.parametrize(("policy", "vcpus"), [(0xB, 4), (0xF, 1), (0xF, 4)])
def test_libvirts_tool_agrees_with_the_measurement(
    tmp_path: Path, platform: Platform, qemu: str, policy: int, vcpus: int
) -> None:
    host = make_bootable_host(tmp_path, platform, policy)
    arguments = host.arguments(*host.kernel, "-smp", str(vcpus), "-cpu", "EPYC-Rome")
    with launched(host, qemu, arguments, "--vmsa", "legacy") as client:
        expected = expectation(host, vcpus, client.ask("query-sev-launch-measure")["data"])
    assert verdicts([expected, expected | {"cmdline": "quieT"}]) == [ACCEPTED, REFUSED]


@EACH_QEMU
def test_the_firmware_is_measured_whichever_way_it_came_into_the_flash(
    tmp_path: Path, platform: Platform, qemu: str
) -> None:
    host = make_bootable_host(tmp_path, platform, 0xF)
    image = tmp_path / "firmware"
    expected = launch_digest(host, 1, "EPYC-v3", hashes=False)
    node = "-blockdev", f"driver=raw,node-name=fw,read-only=on,file.driver=file,file.filename={image}"
    line = host.arguments("-cpu", "EPYC-v3", hashes=False)
    at = line.index("-drive")
    (tmp_path / "vars").write_bytes(bytes(256 << 10))
    spellings = {
        "a drive with a name": ["-drive", f"if=pflash,format=raw,id=firmware,readonly=on,file={image}"],
        "-pflash": ["-pflash", str(image)],
        "a block node": [*node, "-machine", "pflash0=fw"],
        "a drive and one for variables": [
            *line[at : at + 2],
            "-drive",
            f"if=pflash,format=raw,unit=1,file={tmp_path}/vars",
        ],
    }
    for name, words in spellings.items():
        arguments = [*line[:at], *words, *line[at + 2 :]]
        with launched(host, qemu, arguments, "--vmsa", "init2") as client:
            assert is_measured_as(host, blob_of(client), expected), name
    changed = bytearray(image.read_bytes())
    changed[100] ^= 1
    image.write_bytes(changed)
    with launched(host, qemu, line, "--vmsa", "init2") as client:
        assert not is_measured_as(host, blob_of(client), expected)


# --------------------------------------------------------------------------------------------------- what is in memory


def memory(client: QmpClient, host: Host, address: int, size: int) -> bytes:
    return read_memory(client, address, size, host.folder)


@EACH_QEMU
def test_a_secret_is_in_the_real_machines_ram_once_its_packet_was_good_and_not_before(
    tmp_path: Path, platform: Platform, qemu: str
) -> None:
    host = make_bootable_host(tmp_path, platform, 0xF)
    with launched(host, qemu, host.arguments(*host.kernel)) as client:
        before = memory(client, host, 0x800000, 0x20000)
        assert memory(client, host, *SECRET_AREA) == bytes(SECRET_AREA[1])
        blob = blob_of(client)
        good = packet_for(host, blob)
        header, packet = (base64.b64decode(good[name]) for name in ("packet_header", "secret"))
        other = packet_for(host, MeasurementBlob(measurement=bytes(32), nonce=blob.nonce))
        # Of the header: flags, IV and MAC.
        for at in (0, 4, 19, 20, 51):
            flipped = bytearray(header)
            flipped[at] ^= 1 << 4
            said = client.refusal(INJECT, **good | {"packet_header": b64(bytes(flipped))})
            assert said.startswith("SEV: failed to inject secret ret=-5 fw_error="), said
        failed = "SEV: failed to inject secret ret=-5 fw_error="
        for at in (0, len(packet) - 1):
            flipped = bytearray(packet)
            flipped[at] ^= 1
            assert client.refusal(INJECT, **good | {"secret": b64(bytes(flipped))}) == f"{failed}11 'Bad measurement'"
        assert client.refusal(INJECT, **other) == f"{failed}11 'Bad measurement'"
        assert client.refusal(INJECT, **good | {"packet_header": b64(header[:-1])}) == f"{failed}4 'Buffer too small'"
        assert (
            client.refusal(INJECT, **good | {"packet_header": b64(header + b"\0")}) == f"{failed}4 'Buffer too small'"
        )
        assert client.refusal(INJECT, **good, gpa=SECRET_AREA[0] + 8) == f"{failed}9 'Invalid address'"
        nowhere = "SEV: Failed to calculate guest address: "
        for address, why in (
            (-1, "No memory is mapped at address 0xffffffffffffffff"),
            (256 << 20, "No memory is mapped at address 0x10000000"),
            ((256 << 20) - 16, "Size of memory region at 0xffffff0 exceeded."),
        ):
            assert client.refusal(INJECT, **good, gpa=address) == nowhere + why
        assert client.refusal(INJECT, **good | {"packet_header": "!!"}) == "SEV: Failed to decode sequence header"
        assert client.refusal(INJECT, **good | {"secret": ""}) == "SEV: Failed to decode data"
        assert memory(client, host, 0x800000, 0x20000) == before

        assert client.ask(INJECT, **good) == {}
        table = secret_table()
        assert TEXT in table
        after = memory(client, host, 0x800000, 0x20000)
        at = SECRET_AREA[0] - 0x800000
        assert after[at : at + len(table)] == table
        assert after[:at] + bytes(len(packet)) + after[at + len(packet) :] == before
        assert client.ask(INJECT, **good, gpa=0x900000) == {}
        assert memory(client, host, 0x900000, len(table)) == table


@EACH_QEMU
def test_the_hashes_are_in_ram_only_where_they_were_asked_for(tmp_path: Path, platform: Platform, qemu: str) -> None:
    host = make_bootable_host(tmp_path, platform, 0xB)
    for hashes in (True, False):
        with launched(host, qemu, host.arguments(*host.kernel, hashes=hashes)) as client:
            area = memory(client, host, *HASHES_AREA)
        assert (sha256((tmp_path / "initrd").read_bytes()).digest() in area) == hashes
        assert (sha256(b"quiet\0").digest() in area) == hashes
        # The real QEMU patches the kernel's header, and its firmware would find another hash than the file's.
        assert sha256((tmp_path / "kernel").read_bytes()).digest() not in area
        assert any(area) == hashes


# What decides about the header that QEMU writes: the command line's video mode, the size of RAM and of the initrd, and
# what the kernel says of itself.
SHOWN = {
    "plain": ([], 3000, "quiet", {}),
    "a video mode": ([], 3000, "quiet vga=0x317 splash", {}),
    "a named video mode": ([], 3000, "vga=ask", {}),
    "a video mode in octal": ([], 3000, "vga=0404", {}),
    "a video mode within a word": ([], 3000, "novga=5 vga=6", {}),
    "a large video mode": ([], 3000, "vga=4294967295 quiet", {}),
    "video modes that are none, behind one that is": ([], 3000, "vga=normalvga=zz vga=09", {}),
    "no initrd": ([], None, "quiet", {}),
    "an empty initrd": ([], 0, "quiet", {}),
    "one byte more than pages": ([], 8193, "quiet", {}),
    "little RAM": (["-m", "64"], 70000, "quiet", {}),
    "RAM up to the hole": (["-m", "2815"], 3000, "quiet", {}),
    "RAM around the hole": (["-m", "2816"], 3000, "quiet", {}),
    "an odd size of RAM": (["-m", "size=131079k"], 3000, "quiet", {}),
    "much RAM": (["-m", "4G,slots=2,maxmem=8G"], 3000, "quiet", {}),
    "an old kernel": ([], 3000, "quiet", {"xloadflags": 0}),
    "a kernel for little memory": ([], 3000, "quiet", {"xloadflags": 0, "initrd_max": 0x03FFFFFF}),
    "an older boot protocol": ([], 3000, "quiet", {"version": 0x202}),
    "the first with a highest address": ([], 3000, "quiet", {"version": 0x203, "initrd_max": 0x05FFFFFF}),
    "two NUMA nodes": (
        [
            *(
                "-m",
                "256",
                "-object",
                "memory-backend-ram,id=m0,size=64M",
                "-object",
                "memory-backend-ram,id=m1,size=192M",
            ),
            *("-numa", "node,memdev=m0", "-numa", "node,memdev=m1"),
        ],
        3000,
        "quiet",
        {},
    ),
    "a backend of its own": (
        ["-object", "memory-backend-memfd,id=m0,size=160M", "-machine", "memory-backend=m0", "-m", "160M"],
        3000,
        "quiet",
        {},
    ),
    "the older chipset": (["-machine", "pc"], 3000, "quiet", {}),
    "the older chipset with RAM around the hole": (["-machine", "pc", "-m", "3600"], 3000, "quiet", {}),
    "the older chipset with RAM up to the hole": (["-machine", "pc", "-m", "3G"], 3000, "quiet", {"xloadflags": 2}),
    "a limit for low RAM": (["-machine", "max-ram-below-4g=1G", "-m", "2G"], 3000, "quiet", {"xloadflags": 2}),
}


@EACH_QEMU
@pytest.mark.parametrize("name", SHOWN)
def test_the_hash_in_ram_is_that_of_the_kernel_that_the_real_firmware_is_shown(
    tmp_path: Path, platform: Platform, qemu: str, name: str
) -> None:
    more, initrd, append, header = SHOWN[name]
    host = make_bootable_host(tmp_path, platform, 0xB)
    (tmp_path / "kernel").write_bytes(small_kernel(**header))
    kernel = ["-kernel", f"{tmp_path}/kernel", "-append", append]
    if initrd is not None:
        (tmp_path / "initrd").write_bytes(bytes(initrd))
        kernel += ["-initrd", f"{tmp_path}/initrd"]
    arguments = host.arguments(*kernel, *more, "-qtest", f"unix:{tmp_path}/bus,server=on,wait=off")
    with launched(host, qemu, arguments) as client:
        area = memory(client, host, HASHES_AREA[0], 176)
        with fw_cfg(tmp_path / "bus", client) as device:
            shown = device.kernel()
            whole = device.file("etc/boot/kernel")
        blob = blob_of(client)
    hashes = BootHashes.of(tmp_path / "kernel", None if initrd is None else tmp_path / "initrd", append.encode())
    original = (tmp_path / "kernel").read_bytes()
    assert shown[0x210] == 0xB0
    assert sha256(shown).digest() in area
    assert whole is None or sha256(whole).digest() in area
    assert sha256(original).digest() not in area
    assert {hashes.initrd, hashes.cmdline} <= {area[at : at + 32] for at in (36, 86, 136)}
    # Measured is the file as the owner has it.
    digest = sha256((tmp_path / "firmware").read_bytes() + hashes.table()).digest()
    assert is_measured_as(host, blob, digest)
    with_shown = (tmp_path / "firmware").read_bytes() + area
    assert not is_measured_as(host, blob, sha256(with_shown).digest())


# --------------------------------------------------------------------------------------------------------- save areas


def models(qemu: str) -> list[str]:
    """Every processor that the QEMU has, as it says itself."""
    told = subprocess.run(
        [qemu, "-nodefaults", "-machine", "none", "-display", "none", "-qmp", "stdio"],
        input='{"execute":"qmp_capabilities"}{"execute":"query-cpu-definitions"}{"execute":"quit"}',
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    replies = [json.loads(line) for line in told.splitlines()]
    listed = next(reply["return"] for reply in replies if isinstance(reply.get("return"), list))
    return sorted(str(model["name"]) for model in listed)


@EACH_QEMU
def test_every_epyc_and_others_launch_with_the_registers_that_the_machine_has(
    tmp_path: Path, platform: Platform, qemu: str
) -> None:
    host = make_bootable_host(tmp_path, platform, 0xF)
    image = (tmp_path / "firmware").read_bytes()
    known = models(qemu)
    chosen = [name for name in known if name.startswith("EPYC")]
    assert len(chosen) > 8
    chosen += [
        name for name in ("qemu64", "max", "Nehalem", "Opteron_G5", "Cascadelake-Server", "pentium3") if name in known
    ]
    chosen += ["EPYC-Rome,family=25,model=0x11,stepping=3", "EPYC,model=1,-svm,+x2apic", "host", ""]
    signatures = set()
    for cpu in chosen:
        words = ["-cpu", cpu] if cpu else []
        with launched(host, qemu, host.arguments(*words, "-smp", "2", hashes=False), "--vmsa", "init2") as client:
            told = client.ask("human-monitor-command", command_line="info registers")
            blob = blob_of(client)
        found = int(told.split("EDX=")[1][:8], 16)
        signatures.add(found)
        pages = outside.calc_launch_digest(SevMode.SEV_ES, 2, found, str(tmp_path / "firmware"), "", "", "", 0)
        assert is_measured_as(host, blob, pages), cpu
        assert not is_measured_as(host, blob, sha256(image).digest()), cpu
    assert {signature(23, 1, 2), signature(23, 49, 0), signature(25, 1, 1), signature(25, 17, 3)} <= signatures


@EACH_QEMU
def test_a_machine_whose_processor_cannot_be_is_refused_by_the_real_qemu(
    tmp_path: Path, platform: Platform, qemu: str
) -> None:
    host = make_bootable_host(tmp_path, platform, 0xF)
    for cpu in ("NoSuch", "EPYC,stepping=16", "EPYC,family=none", "EPYC,nosuch=on"):
        ended = subprocess.run(
            [*platform.front(qemu), *host.arguments("-cpu", cpu, "-display", "none")],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        alone = subprocess.run(
            [qemu, "-nodefaults", "-machine", "q35", "-display", "none", "-S", "-cpu", cpu],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert ended.returncode == alone.returncode == 1, cpu
        assert ended.stderr == alone.stderr
        assert not host.qmp.exists()
    wait_for_no_guest(platform)


def test_the_layout_of_the_table_is_known_to_this_test(tmp_path: Path) -> None:
    for name in ("kernel", "initrd"):
        (tmp_path / name).write_bytes(name.encode())
    hashes = BootHashes.of(tmp_path / "kernel", tmp_path / "initrd", b"quiet")
    table = hashes.table()
    assert [table[at : at + 32] for at in (36, 86, 136)] == [hashes.cmdline, hashes.initrd, hashes.kernel]
    assert struct.unpack_from("<H", table, 16) == (168,)
