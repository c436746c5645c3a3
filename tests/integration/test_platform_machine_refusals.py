"""What ends the stand-in machine at its start, in QEMU's own words: the firmware's refusals, and files of no use."""

from __future__ import annotations

import base64
import subprocess
from pathlib import Path

from emulator.firmware_image import build_image
from tests.support.platform import Platform, running_platform
from tests.support.sev_host import ask_device, b64, make_host, wait_for_no_guest

NOT_STARTED = [
    "qemu-system-x86_64: -accel kvm: sev_kvm_init: failed to create encryption context",
    "qemu-system-x86_64: -accel kvm: failed to initialize kvm: Operation not permitted",
]


def died(words: list[str]) -> list[str]:
    """What a machine says that ends by itself, with rc 1."""
    ended = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout) == (1, "")
    return ended.stderr.splitlines()


def launch_start(code: int, text: str) -> list[str]:
    line = f"qemu-system-x86_64: -accel kvm: sev_launch_start: LAUNCH_START ret=1 fw_error={code} '{text}'"
    return [line, *NOT_STARTED]


def test_a_launch_that_the_firmware_refuses_ends_before_the_socket_opens(tmp_path: Path, platform: Platform) -> None:
    host = make_host(tmp_path, platform, 0xF)
    session = (tmp_path / "session").read_text()
    bad = launch_start(11, "Bad measurement")
    flipped = bytearray(base64.b64decode(session))
    flipped[20] ^= 1
    (tmp_path / "session").write_text(b64(bytes(flipped)))
    assert died(host.words()) == bad
    (tmp_path / "session").write_text(session)
    host.policy = 0xB
    assert died(host.words()) == bad
    host.policy = 0xF
    # Raw where base64 is due; QEMU reads up to a NUL, and nothing before it would be another failure.
    (tmp_path / "session").write_bytes(base64.b64decode(session).replace(b"\0", b"\1"))
    assert died(host.words()) == launch_start(4, "Buffer too small")
    (tmp_path / "session").write_text("")
    assert died(host.words()) == launch_start(0, "")
    (tmp_path / "session").unlink()
    assert died(host.words())[0].startswith("qemu-system-x86_64: -accel kvm: failed to read ")
    assert not host.qmp.exists()
    newer = make_host(tmp_path, platform, 0xF | 1 << 16 | 56 << 24)
    assert died(newer.words()) == launch_start(7, "Policy is not allowed")
    wait_for_no_guest(platform)


def test_a_session_for_another_pdh_is_a_bad_measurement(tmp_path: Path) -> None:
    with running_platform(tmp_path / "p") as platform:
        host = make_host(tmp_path, platform)
        ask_device(platform, 4, b"")
        assert died(host.words()) == launch_start(11, "Bad measurement")


def test_what_the_processor_or_the_firmware_image_does_not_allow_ends_as_in_qemu(
    tmp_path: Path, platform: Platform
) -> None:
    host = make_host(tmp_path, platform, 0xF)
    kvm = "qemu-system-x86_64: -accel kvm: "
    wrong = [word.replace("cbitpos=51", "cbitpos=47") for word in host.words()]
    assert died(wrong)[0] == f"{kvm}sev_kvm_init: cbitpos check failed, host '51' requested '47'"
    reduced = [word.replace("phys-bits=1", "phys-bits=0") for word in host.words()]
    assert died(reduced)[0].startswith(f"{kvm}sev_kvm_init: reduced_phys_bits check failed")
    for image, more, first in (
        (build_image("x", size=4096)[:-16], [], "system firmware block device pflash0 has invalid size 4080"),
        (bytes((8 << 20) + 4096), [], "combined size of system firmware exceeds 8388608 bytes"),
        (bytes(4096), [], "SEV information block/Firmware GUID Table block not found in pflash rom"),
        (build_image("x", reset_address=0), [], "SEV-ES reset address is zero"),
        (
            build_image("x", hashes_area=(0, 0)),
            host.kernel,
            "SEV: guest firmware hashes table area is invalid (base=0x0 size=0x0)",
        ),
        (
            build_image("x", hashes_area=None),
            host.kernel,
            "SEV: kernel specified but guest firmware has no hashes table GUID",
        ),
        (
            build_image("x", hashes_area=(0xF0000000, 0x400)),
            host.kernel,
            "SEV: cannot map hashes table guest memory area",
        ),
        (build_image("x"), ["-kernel", "/nowhere"], "could not open kernel file '/nowhere': No such file or directory"),
        (build_image("x"), ["-cpu", "NoSuch"], "unable to find CPU model 'NoSuch'"),
    ):
        (tmp_path / "firmware").write_bytes(image)
        assert died(host.words(*more))[0] == f"qemu-system-x86_64: {first}"
    wait_for_no_guest(platform)


def test_files_that_cannot_be_used_end_the_machine_in_a_sentence(tmp_path: Path, platform: Platform) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()
    here = f"-qmp unix:{tmp_path}/folder: Failed to unlink socket {tmp_path}/folder: Is a directory"
    assert died([*platform.machine("-S", "-qmp", f"unix:{tmp_path}/folder,server=on")]) == [
        f"qemu-system-x86_64: {here}"
    ]
    # A file without a size that cannot be read either, whoever asks.
    unreadable = ["-drive", "if=pflash,format=raw,file=/proc/self/mem"]
    assert "has invalid size 0" in died([*platform.machine("-S", *unreadable)])[0]
    sparse = tmp_path / "sparse"
    with sparse.open("wb") as file:
        file.truncate(1 << 40)
    sizes = died([*platform.machine("-S", "-drive", f"if=pflash,format=raw,file={sparse}")])
    assert sizes == ["qemu-system-x86_64: combined size of system firmware exceeds 8388608 bytes"]


def test_without_a_platform_there_is_no_device(tmp_path: Path) -> None:
    gone = Platform(state=tmp_path / "gone", generation="milan")
    lines = died([*gone.machine(), "-S"])
    assert lines[0].endswith("sev.sock 'No such file or directory'")
