"""How the folder with a guest's parts is made; apt-get and dpkg-deb are scripts here, and real in `make guest`."""

from __future__ import annotations

import json
import lzma
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from common.errors import InvalidInput, Unavailable
from orchestrator.demo.guest.parts import FORMAT, QEMU, read_stamp
from tests.e2e import packages
from tests.e2e.kernel_modules import copy_modules
from tests.e2e.luks import _encrypt, cryptsetup_command, make_volume
from tests.support.firmware import amdsev_image, with_footer
from tests.support.repository import ROOT

# `download` puts an empty archive of each package that the mirror has into the current folder; `-x` copies its content.
_APT_GET = """#!/bin/sh
shift 2
echo "$*" >>"$MIRROR/log"
[ "$1" = -qq ] && shift
case $1 in
    indextargets) echo "Debian bookworm mirror:/debian" ;;
    -s) ;;
    download)
        shift
        for package; do
            [ -d "$MIRROR/$package" ] || { echo "E: Unable to locate package $package" >&2; exit 100; }
            touch "${package}_1%3a2_all.deb"
        done ;;
esac
"""
_APT_CACHE = """#!/bin/sh
[ -d "$MIRROR/linux-image-1-cloud-amd64" ] && printf '%s\\n  Depends: linux-image-1-cloud-amd64\\n' "$5"
exit 0
"""
_DPKG_DEB = """#!/bin/sh
package=${2##*/}
cp -r "$MIRROR/${package%%_*}/." "$3"
"""


def _qemu(version: str) -> str:
    return f"#!/bin/sh\necho 'QEMU emulator version {version} (Debian)'\n"


@dataclass(frozen=True)
class Mirror:
    """The packages that there are: a folder each with their content."""

    root: Path

    def has(self, package: str, files: dict[str, bytes]) -> None:
        for name, content in files.items():
            path = self.root / package / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            path.chmod(0o755)

    def has_kernel_busybox_and_firmware(self) -> None:
        tree = "lib/modules/1-cloud-amd64"
        modules = {f"{tree}/kernel/{name}.ko": b"module" for name in ("virtio_pci", "virtio_blk", "dm-crypt", "ecb")}
        builtin = {f"{tree}/modules.builtin": b"kernel/crypto/xts.ko\n"}
        self.has("linux-image-1-cloud-amd64", {"boot/vmlinuz-1-cloud-amd64": b"kernel", **modules, **builtin})
        self.has("busybox-static", {"bin/busybox": b"busybox"})
        self.has("ovmf-amdsev", {"usr/share/ovmf/OVMF.amdsev.fd": amdsev_image()})

    @property
    def calls(self) -> int:
        return len((self.root / "log").read_text().splitlines())


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mirror:
    tools = tmp_path / "tools"
    tools.mkdir()
    scripts = (("apt-get", _APT_GET), ("apt-cache", _APT_CACHE), ("dpkg-deb", _DPKG_DEB), (QEMU, _qemu("10.0.2")))
    for name, script in scripts:
        (tools / name).write_text(script)
        (tools / name).chmod(0o755)
    found = Mirror(tmp_path / "mirror")
    found.root.mkdir()
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("MIRROR", str(found.root))
    return found


def test_what_can_be_had_is_there_and_the_rest_is_named(mirror: Mirror, tmp_path: Path) -> None:
    mirror.has_kernel_busybox_and_firmware()
    missing = packages.make(tmp_path / "guest", efi_secret=False)
    assert list(missing) == ["cryptsetup"]  # the scripts know of none
    folder = tmp_path / "guest"
    assert (folder / "vmlinuz").read_bytes() == b"kernel"
    assert (folder / "firmware.fd").read_bytes() == amdsev_image()
    assert [path.name for path in sorted((folder / "modules").iterdir())] == [
        "00-virtio_pci.ko",
        "01-virtio_blk.ko",
        "02-dm_crypt.ko",
        "03-ecb.ko",
    ]
    stamp = read_stamp(folder)
    assert (stamp["format"], stamp["missing"]) == (FORMAT, missing)
    assert stamp["packages"] == dict.fromkeys(("busybox-static", "linux-image-1-cloud-amd64", "ovmf-amdsev"), "1:2")


def test_every_missing_package_is_named_on_stderr_and_the_exit_code_says_so(mirror: Mirror, tmp_path: Path) -> None:
    mirror.has("busybox-static", {"bin/busybox": b"busybox"})
    done = subprocess.run(
        [sys.executable, "-m", "tests.e2e.packages", str(tmp_path / "guest"), "--efi-secret"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3
    assert done.stderr.splitlines() == [
        "guest: no kernel: cannot get linux-image-cloud-amd64: no package has that name",
        "guest: no cryptsetup: cannot get cryptsetup-bin: no package has that name",
        (
            "guest: no firmware: cannot get ovmf-amdsev: Unable to locate package ovmf-amdsev; "
            "`make e2e OVMF=/path/to/an/AmdSev/image` uses another"
        ),
        "guest: no efi_secret: cannot get linux-image-cloud-amd64: no package has that name",
    ]
    assert (tmp_path / "guest" / "busybox").is_file()


def test_a_machine_with_an_older_qemu_gets_a_newer_one_beside_it(mirror: Mirror, tmp_path: Path) -> None:
    mirror.has_kernel_busybox_and_firmware()
    (tmp_path / "tools" / QEMU).write_text(_qemu("7.2.22"))
    missing = packages.make(tmp_path / "guest", efi_secret=False)
    assert missing["newer QEMU"].endswith("Unable to locate package qemu-system-x86")
    files = {f"usr/bin/{QEMU}": _qemu("10.0.2").encode(), "usr/share/qemu/kvmvapic.bin": b"data"}
    for package, content in (("qemu-system-x86", files), ("qemu-system-common", {}), ("qemu-system-data", {})):
        (mirror.root / package).mkdir()
        mirror.has(package, content)
    missing = packages.make(tmp_path / "guest", efi_secret=False)
    assert "newer QEMU" not in missing
    answer = subprocess.run([tmp_path / "guest/qemu/usr/bin" / QEMU, "-version"], capture_output=True, check=True)
    assert b"10.0.2" in answer.stdout
    assert (tmp_path / "guest/qemu/usr/share/qemu/kvmvapic.bin").read_bytes() == b"data"


def test_a_newer_qemu_that_does_not_run_here_is_named_and_left_out(mirror: Mirror, tmp_path: Path) -> None:
    mirror.has_kernel_busybox_and_firmware()
    (tmp_path / "tools" / QEMU).write_text(_qemu("7.2.22"))
    broken = b"#!/bin/sh\necho 'error while loading shared libraries' >&2\nexit 127\n"
    for package in ("qemu-system-common", "qemu-system-data"):
        (mirror.root / package).mkdir()
    mirror.has("qemu-system-x86", {f"usr/bin/{QEMU}": broken, "usr/share/qemu/kvmvapic.bin": b"data"})
    missing = packages.make(tmp_path / "guest", efi_secret=False)
    assert missing["newer QEMU"].startswith("it does not run here: error while loading shared libraries")
    assert not (tmp_path / "guest/qemu").exists()


def test_firmware_without_room_for_secrets_is_not_taken(mirror: Mirror, tmp_path: Path) -> None:
    mirror.has_kernel_busybox_and_firmware()
    mirror.has("ovmf-amdsev", {"usr/share/ovmf/OVMF.amdsev.fd": with_footer(bytes(64), ())})
    missing = packages.make(tmp_path / "guest", efi_secret=False)
    assert missing["firmware"].startswith("the image in ovmf-amdsev has no place for secrets")
    assert not (tmp_path / "guest" / "firmware.fd").exists()


def test_a_machine_without_apt_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["packages", str(tmp_path / "guest")])
    assert packages.main() == 3
    assert capsys.readouterr().err == "guest: apt-get is not there: parts of a guest come from Debian packages\n"
    assert not list(tmp_path.iterdir())


def test_a_whole_folder_is_not_made_again_but_a_stale_one_is(mirror: Mirror, tmp_path: Path) -> None:
    mirror.has_kernel_busybox_and_firmware()
    folder = tmp_path / "guest"
    packages.make(folder, efi_secret=False)
    (folder / "stamp.json").write_text(json.dumps({"format": FORMAT, "missing": {}, "efi_secret": False}))
    (folder / "kept").touch()
    before = mirror.calls
    assert packages.make(folder, efi_secret=False) == {}
    assert mirror.calls == before
    for stale in ({"format": FORMAT - 1}, {"format": FORMAT, "missing": {"firmware": "no"}}):
        (folder / "stamp.json").write_text(json.dumps(stale))
        (folder / "kept").touch()
        packages.make(folder, efi_secret=False)
        assert not (folder / "kept").exists()


def test_a_folder_without_the_driver_is_made_again_when_it_is_wanted(mirror: Mirror, tmp_path: Path) -> None:
    mirror.has_kernel_busybox_and_firmware()
    folder = tmp_path / "guest"
    packages.make(folder, efi_secret=False)
    (folder / "stamp.json").write_text(json.dumps({"format": FORMAT, "missing": {}, "efi_secret": False}))
    assert "efi_secret" in packages.make(folder, efi_secret=True)


def test_somebody_elses_folder_is_left_alone(mirror: Mirror, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter").touch()
    with pytest.raises(InvalidInput, match="home is there and is no folder with a guest's parts"):
        packages.make(tmp_path / "home", efi_secret=False)
    assert (tmp_path / "home" / "letter").exists()
    assert not (mirror.root / "log").exists()


def test_nothing_is_left_beside_the_folder_not_even_of_a_run_that_was_killed(mirror: Mirror, tmp_path: Path) -> None:
    mirror.has("busybox-static", {"bin/busybox": b"busybox"})
    place = tmp_path / "place"
    (place / "guest.making-abc" / "new").mkdir(parents=True)
    packages.make(place / "guest", efi_secret=False)
    packages.make(place / "guest", efi_secret=False)
    assert [path.name for path in place.iterdir()] == ["guest"]


def test_runs_at_the_same_time_make_one_folder(mirror: Mirror, tmp_path: Path) -> None:
    mirror.has("busybox-static", {"bin/busybox": b"busybox"})
    command = [sys.executable, "-m", "tests.e2e.packages", str(tmp_path / "guest")]
    runs = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) for _ in range(3)]
    assert [run.wait(60) for run in runs] == [3, 3, 3]
    assert (tmp_path / "guest" / "busybox").read_bytes() == b"busybox"
    assert not list(tmp_path.glob("guest.making-*"))


# Kernel modules.


def _module(*needs: str) -> bytes:
    return b"\x7fELF\0license=GPL\0depends=" + ",".join(needs).encode() + b"\0name=x\0"


def test_modules_come_after_those_that_they_need(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "kernel").mkdir(parents=True)
    (tree / "kernel" / "top.ko").write_bytes(_module("mid-dle", "base"))
    (tree / "kernel" / "mid_dle.ko.xz").write_bytes(lzma.compress(_module("base", "inside")))
    (tree / "kernel" / "base.ko").write_bytes(_module())
    (tree / "modules.builtin").write_text("kernel/x/inside.ko\n")
    copy_modules(tree, ("top", "base"), tmp_path / "into")
    names = [path.name for path in sorted((tmp_path / "into").iterdir())]
    assert names == ["00-base.ko", "01-mid_dle.ko", "02-top.ko"]
    assert (tmp_path / "into" / "01-mid_dle.ko").read_bytes() == _module("base", "inside")


def test_a_module_that_the_kernel_does_not_have_is_named(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "top.ko").write_bytes(_module("base"))
    with pytest.raises(Unavailable, match="the kernel has no module base"):
        copy_modules(tmp_path / "tree", ("top",), tmp_path / "into")


# The encrypted disk.


def test_sectors_are_encrypted_as_ieee_1619_says() -> None:
    # IEEE 1619-2007, annex B, vector 10: AES-256, data unit 0xff, the bytes 0 to 255 twice.
    key = bytes.fromhex(
        "2718281828459045235360287471352662497757247093699959574966967627"
        "3141592653589793238462643383279502884197169399375105820974944592"
    )
    volume = _encrypt(key, bytes(range(256)) * 2 * 256)
    assert volume[255 * 512 :].hex().startswith("1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b")
    assert volume[:512] != volume[255 * 512 :]


def test_cryptsetup_opens_the_volume_with_its_passphrase_and_no_other(tmp_path: Path) -> None:
    folder = ROOT / ".guest" / "cryptsetup"
    try:
        command = cryptsetup_command(folder)
    except InvalidInput:
        pytest.skip("cryptsetup not found, install it or run `make guest`")
    words = b"open sesame, " * 6  # more than 64 bytes, since HMAC pads shorter ones with NUL
    make_volume(tmp_path / "volume", words, b"treasure", cryptsetup=folder)
    assert b"treasure" not in (tmp_path / "volume").read_bytes()
    for passphrase, code in ((words, 0), (words + b"\0", 2), (b"open barley", 2)):
        done = subprocess.run(
            [*command, "open", "--test-passphrase", "--disable-locks", "--key-file", "-", str(tmp_path / "volume")],
            input=passphrase,
            capture_output=True,
            check=False,
        )
        assert done.returncode == code


def test_without_cryptsetup_a_volume_is_refused_with_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with pytest.raises(InvalidInput, match="cryptsetup is not there; `make guest` gets it"):
        cryptsetup_command(tmp_path)
