"""How a real QEMU behind the front ends, and that it leaves nothing: the same words and exit code as QEMU's own.

Where a real QEMU can say it without SEV hardware it is run beside the front and is the oracle; the sentences of QEMU's
SEV code, which it cannot reach here, are those of target/i386/sev.c.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from emulator.firmware_image import build_image
from tests.support.eventually import wait_until
from tests.support.platform import Platform, running_platform
from tests.support.qmp import QmpClient, running_machine
from tests.support.real_qemu import EACH_QEMU, qemu, version_of
from tests.support.sev_host import Host, ask_device, b64, blob_of, guests, make_host, packet_for, wait_for_no_guest

__all__ = ["qemu"]  # a fixture
INJECT = "sev-inject-launch-secret"


def arguments(host: Host, *more: str) -> list[str]:
    return host.arguments("-display", "none", *more)


def without_sev(words: list[str]) -> list[str]:
    """The line of the same machine without SEV, under TCG."""
    at = words.index("-object")
    rest = [word.replace(",confidential-guest-support=sev0", "") for word in [*words[:at], *words[at + 2 :]]]
    return ["-accel", "tcg", *rest]


def ended(words: list[str], **options: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a machine that ends by itself."""
    done = subprocess.run(  # type: ignore[call-overload]  # options are its own
        words, capture_output=True, text=True, check=False, timeout=60, stdin=subprocess.DEVNULL, **options
    )
    return done.returncode, done.stdout, done.stderr


def died(host: Host, qemu: str, words: list[str]) -> list[str]:
    """What a machine says that ends with exit code 1, and leaves no socket."""
    code, out, err = ended([*host.platform.front(qemu), *words])
    assert (code, out) == (1, ""), (code, out, err)
    assert not host.qmp.exists()
    return err.splitlines()


def children(pid: int) -> list[int]:
    return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_until_gone(pid: int) -> None:
    wait_until(lambda: is_gone(pid))


# ------------------------------------------------------------------------------------- what a real QEMU says as well


# What is replaced in the line or added to it; the real QEMU gets the same line, SEV and all.
WITH_SEV = {
    "TCG": ("", "", ["-accel", "tcg"]),
    "TCG of the machine": ("q35,", "q35,accel=tcg,", []),
    "TCG before KVM": ("q35,", "q35,accel=tcg:kvm,", []),
    "no reduced-phys-bits": ("reduced-phys-bits=1,", "", []),
    "an unknown property": ("reduced-phys-bits=1", "reduced-phys-bits=1,launch-secret=x", []),
    "SNP": ("sev-guest,", "sev-snp-guest,", []),
    "another id": ("id=sev0", "id=sev1", []),
    "a link to nothing": ("", "", ["-machine", "confidential-guest-support=nope"]),
    "a policy that is a word": ("policy=0xf", "policy=none", []),
    "a policy of 33 bits": ("policy=0xf", "policy=0x100000000", []),
    "a policy with Python's underscore": ("policy=0xf", "policy=1_5", []),
    "a broken JSON object": ("", "", ["-object", '{"qom-type": "sev-guest",']),
    "two ways to name the accelerator": ("q35,", "q35,accel=kvm,", ["-accel", "kvm"]),
    "help about accelerators": ("", "", ["-accel", "help"]),
    "help about the machine": ("", "", ["-machine", "help"]),
    "help about processors": ("", "", ["-cpu", "help"]),
    "the version": ("", "", ["-version"]),
}
# Added to both lines; the real QEMU gets the machine without SEV.
WITHOUT_SEV = {
    "an unknown option": ["-nosuch"],
    "an unknown option with a value": ["-nosuch", "x"],
    "an unknown property of the machine": ["-machine", "nosuch=1"],
    "a property without a value": ["-machine", "q35,foo"],
    "no size": ["-m", "x"],
    "too many processors": ["-smp", "5000"],
    "an option without its value": ["-name"],
    "a kernel option without its value": ["-kernel"],
    "a command line without a kernel": ["-append", "x"],
    "an initrd without a kernel": ["-initrd", "x"],
    "a device that is none": ["-device", "nosuch"],
    "a disk that is not there": ["disk.img"],
    "a memory backend without a size": ["-object", "memory-backend-ram,id=x"],
    "a serial line to nowhere": ["-serial", "nosuch"],
    "a monitor on no device": ["-mon", "chardev=nope,mode=control"],
    "a monitor on nothing": ["-mon", "mode=control"],
    "a monitor on no device, the short way": ["-qmp", "chardev:nope"],
    "a character device of no kind": ["-chardev", "socket,id=a"],
    "two character devices of one name": ["-chardev", "null,id=a", "-chardev", "null,id=a"],
    "a socket in no folder": ["-qmp", "unix:DIR/no/x,server=on,wait=off"],
    "a socket where a folder is": ["-qmp", "unix:DIR,server=on,wait=off"],
    "a socket's name that is too long": ["-qmp", f"unix:{'x' * 120},server=on,wait=off"],
    "a peer that is not there": ["-qmp", "unix:DIR/no"],
    "a port where nobody is": ["-qmp", "tcp:127.0.0.1:1"],
    "a device's socket in no folder": [
        *("-chardev", "socket,id=m,path=DIR/no/x,server=on,wait=off", "-mon", "chardev=m,mode=control"),
    ],
    "a device's peer that is not there": ["-chardev", "socket,id=m,path=DIR/no", "-mon", "chardev=m,mode=control"],
    "a pid file in no folder": ["-pidfile", "DIR/no/pid"],
}


def same_end(front: list[str], alone: list[str], folder: Path) -> None:
    before = set(folder.iterdir())
    theirs = ended(alone, cwd=folder)
    (folder / "q").unlink(missing_ok=True)  # QEMU leaves it when it dies so early; nothing listens behind it
    ours = ended(front, cwd=folder)
    (folder / "q").unlink(missing_ok=True)
    assert ours == theirs
    assert ours[0] != 0 or ours[1]
    assert set(folder.iterdir()) <= before | {folder / "serial"}


@EACH_QEMU
@pytest.mark.parametrize("name", WITH_SEV)
def test_a_line_without_a_sev_guest_ends_as_in_qemu(host: Host, qemu: str, name: str) -> None:
    old, new, more = WITH_SEV[name]
    words = [word.replace(old, new) if old else word for word in arguments(host, *more)]
    same_end([*host.platform.front(qemu), *words], [qemu, *words], host.folder)
    assert guests(host.platform) == 0


@EACH_QEMU
@pytest.mark.parametrize("name", WITHOUT_SEV)
def test_what_has_nothing_to_do_with_sev_is_refused_in_qemus_words(host: Host, qemu: str, name: str) -> None:
    more = [word.replace("DIR", str(host.folder)) for word in WITHOUT_SEV[name]]
    words = arguments(host, *more)
    same_end([*host.platform.front(qemu), *words], [qemu, *without_sev(words)], host.folder)
    wait_for_no_guest(host.platform)


def test_a_drive_that_is_not_there_is_refused_in_qemus_words(host: Host, qemu: str) -> None:
    words = [word.replace("/firmware", "/nowhere") for word in arguments(host)]
    same_end([*host.platform.front(qemu), *words], [qemu, *without_sev(words)], host.folder)


# --------------------------------------------------------------------------------- what QEMU says where there is SEV


@EACH_QEMU
def test_a_launch_that_cannot_be_ends_before_the_socket_opens(host: Host, qemu: str) -> None:
    init = "sev_common_kvm_init" if version_of(qemu) >= (9, 1) else "sev_kvm_init"
    kvm = "qemu-system-x86_64: -accel kvm: "
    end = f"{kvm}failed to initialize kvm: Operation not permitted"
    not_made = f"{kvm}{init}: failed to create encryption context"

    def replaced(old: str, new: str) -> list[str]:
        return [word.replace(old, new) for word in arguments(host, *host.kernel)]

    def not_started(status: int, text: str) -> list[str]:
        return [f"{kvm}sev_launch_start: LAUNCH_START ret=1 fw_error={status} '{text}'", not_made, end]

    wrong_bit = f"{kvm}{init}: cbitpos check failed, host '51' requested '47'"
    assert died(host, qemu, replaced("cbitpos=51", "cbitpos=47")) == [wrong_bit, end]
    none = died(host, qemu, replaced("reduced-phys-bits=1", "reduced-phys-bits=0"))
    assert none[0].startswith(f"{kvm}{init}: reduced_phys_bits check failed")
    session = (host.folder / "session").read_text()
    raw = bytearray(base64.b64decode(session))
    raw[20] ^= 1
    (host.folder / "session").write_text(b64(bytes(raw)))
    assert died(host, qemu, arguments(host)) == not_started(11, "Bad measurement")
    (host.folder / "session").write_text("")
    assert died(host, qemu, arguments(host)) == not_started(0, "")
    (host.folder / "session").write_text(session)
    assert died(host, qemu, replaced("policy=0xf", "policy=0xb")) == not_started(11, "Bad measurement")
    assert died(host, qemu, replaced("policy=0xf", "policy=0x3801000f"))[0].startswith(f"{kvm}sev_launch_start: ")
    godh = (host.folder / "godh").read_text()
    (host.folder / "godh").write_text(b64(bytes(2084)))
    assert died(host, qemu, arguments(host)) == not_started(6, "Certificate is invalid")
    (host.folder / "godh").unlink()
    missing = died(host, qemu, arguments(host))
    assert missing[0].startswith(f"{kvm}failed to read '{host.folder}/godh'")
    assert missing[1:] == [not_made, end]
    (host.folder / "godh").write_text(godh)
    wait_for_no_guest(host.platform)
    with running_machine([*host.platform.front(qemu), *arguments(host)], host.qmp):
        assert guests(host.platform) == 1


@EACH_QEMU
def test_firmware_that_has_no_place_for_it_ends_the_machine(host: Host, qemu: str) -> None:
    for image, first in (
        (build_image("x", hashes_area=(0, 0)), "SEV: guest firmware hashes table area is invalid (base=0x0 size=0x0)"),
        (build_image("x", hashes_area=(0x810C00, 175)), "SEV: guest firmware hashes table area is invalid"),
        (build_image("x", hashes_area=None), "SEV: kernel specified but guest firmware has no hashes table GUID"),
        (build_image("x", hashes_area=(0xF0000000, 0x400)), "SEV: cannot map hashes table guest memory area"),
        (build_image("x", reset_address=0), "SEV-ES reset address is zero"),
        (build_image("x", reset_address=None), "SEV information block/Firmware GUID Table block not found"),
        (bytes(1 << 20), "SEV information block/Firmware GUID Table block not found in pflash rom"),
    ):
        (host.folder / "firmware").write_bytes(image)
        said = died(host, qemu, arguments(host, *host.kernel))
        assert said[0].startswith(f"qemu-system-x86_64: {first}"), said
    wait_for_no_guest(host.platform)


def test_boot_files_that_are_not_there_end_the_machine(host: Host, qemu: str) -> None:
    (host.folder / "initrd").unlink()
    gone = f"qemu-system-x86_64: could not open initrd file '{host.folder}/initrd': No such file or directory"
    assert died(host, qemu, arguments(host, *host.kernel)) == [gone]
    (host.folder / "kernel").unlink()
    assert died(host, qemu, arguments(host, *host.kernel))[0].startswith("qemu-system-x86_64: could not open kernel")


@EACH_QEMU
def test_a_host_without_a_platform_is_one_without_sev(host: Host, qemu: str, tmp_path: Path) -> None:
    # A real QEMU's words where the processor has no SEV: shared/vectors/qmp, sev-guest-args-without-sev.
    host.platform = Platform(state=tmp_path / "gone", generation="milan")
    init = "sev_common_kvm_init" if version_of(qemu) >= (9, 1) else "sev_kvm_init"
    said = died(host, qemu, arguments(host))
    assert said[-2:] == [
        f"qemu-system-x86_64: -accel kvm: {init}: cbitpos check failed, host '0' requested '51'",
        "qemu-system-x86_64: -accel kvm: failed to initialize kvm: Operation not permitted",
    ]


def test_a_newer_property_is_unknown_to_an_older_qemu(host: Host, qemu: str) -> None:
    if version_of(qemu) >= (9, 1):
        pytest.skip("the QEMU on the PATH is a newer one")
    words = [word.replace("cbitpos=51", "cbitpos=51,legacy-vm-type=off") for word in arguments(host)]
    assert "Invalid parameter 'legacy-vm-type'" in died(host, qemu, words)[0]


# ------------------------------------------------------------------------------------------------- ends of a machine


@EACH_QEMU
def test_quit_and_signals_end_the_machine_as_they_end_qemu(host: Host, qemu: str) -> None:
    def ending(words: list[str], how: str) -> tuple[int, list[object], str]:
        with running_machine(words, host.qmp) as machine, QmpClient(host.qmp) as client:
            client.negotiate()
            if how == "quit":
                client.ask("quit")
            else:
                machine.send_signal(signal.Signals[how])
                line = client.line()
                while line:
                    client.events.append(json.loads(line))
                    line = client.line()
            code = machine.wait(30)
            assert machine.stderr is not None
            said = machine.stderr.read().replace(str(os.getpid()), "PARENT").replace(str(machine.pid), "PARENT")
        assert not host.qmp.exists()
        return code, [(event["event"], event.get("data")) for event in client.events], said

    words = arguments(host)
    for how in ("quit", "SIGTERM", "SIGINT", "SIGHUP"):
        front, plain = ending([*host.platform.front(qemu), *words], how), ending([qemu, *without_sev(words)], how)
        assert front[:2] == plain[:2] == (0, plain[1])
        assert front[2].partition(" from")[0] == plain[2].partition(" from")[0]
        wait_for_no_guest(host.platform)


@EACH_QEMU
def test_whatever_kills_qemu_is_what_the_front_dies_of(host: Host, qemu: str) -> None:
    for number in (signal.SIGKILL, signal.SIGABRT):
        with running_machine([*host.platform.front(qemu), *arguments(host)], host.qmp) as machine:
            (child,) = children(machine.pid)
            with QmpClient(host.qmp) as client:
                client.negotiate()
                os.kill(child, number)
                assert client.line() == b""
            assert machine.wait(30) == -number
        assert not host.qmp.exists()
        wait_for_no_guest(host.platform)


@EACH_QEMU
def test_a_killed_front_takes_qemu_and_guest_along_and_leaves_no_file(
    host: Host, qemu: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    with running_machine([*host.platform.front(qemu), *arguments(host, *host.kernel)], host.qmp) as machine:
        (child,) = children(machine.pid)
        with QmpClient(host.qmp) as client:
            client.negotiate()
            assert guests(host.platform) == 1
            machine.kill()
            assert client.line() == b""
        machine.wait(30)
        wait_until_gone(child)
        assert not list(scratch.iterdir())
        wait_for_no_guest(host.platform)


@EACH_QEMU
def test_a_reset_ends_a_guest_whose_registers_are_its_own_and_no_other(
    host: Host, qemu: str, platform: Platform, tmp_path: Path
) -> None:
    with running_machine([*host.platform.front(qemu), *arguments(host)], host.qmp) as machine:
        with QmpClient(host.qmp) as client:
            client.negotiate()
            client.ask("cont")
            client.ask("system_reset")
            while line := client.line():
                client.events.append(json.loads(line))
            last = client.events[-1]
            assert (last["event"], last["data"]) == (
                "SHUTDOWN",
                {"guest": False, "reason": "host-qmp-system-reset"},
            )
        assert machine.wait(30) == 0
    (tmp_path / "plain").mkdir()
    plain = make_host(tmp_path / "plain", platform, 0xB)
    with running_machine([*platform.front(qemu), *arguments(plain)], plain.qmp), QmpClient(plain.qmp) as client:
        client.negotiate()
        client.ask("cont")
        client.ask("system_reset")
        assert client.ask("query-status")["running"] is True


@EACH_QEMU
def test_a_platform_that_goes_away_is_an_error_until_the_guest_should_run(tmp_path: Path, qemu: str) -> None:
    with running_platform(tmp_path / "p") as platform:
        host = make_host(tmp_path, platform)
        with running_machine([*platform.front(qemu), *arguments(host)], host.qmp) as machine:
            with QmpClient(host.qmp) as client:
                client.negotiate()
                packet = packet_for(host, blob_of(client))
                assert platform.process is not None
                platform.process.kill()
                platform.process.wait()
                assert client.refusal(INJECT, **packet).startswith("SEV: failed to inject secret ret=-")
                assert "Failed to open" in client.refusal("query-sev-capabilities")
                assert client.ask("query-sev")["state"] == "launch-secret"
                client.send(b'{"execute": "cont"}{"execute": "query-status"}')
                assert client.line() == b""
            assert machine.wait(30) == 1
            assert machine.stderr is not None
            assert "sev_launch_finish: LAUNCH_FINISH ret=-" in machine.stderr.read()
        assert not host.qmp.exists()


def test_a_session_for_an_earlier_pdh_starts_nothing(tmp_path: Path, qemu: str) -> None:
    with running_platform(tmp_path / "p") as platform:
        host = make_host(tmp_path, platform)
        ask_device(platform, 4, b"")
        assert "Bad measurement" in died(host, qemu, arguments(host))[0]
