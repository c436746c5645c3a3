"""The guest's initial RAM disk, unpacked by what others wrote. That Linux boots it is shown by `make e2e`."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from common.errors import InvalidInput
from orchestrator.demo.guest.initramfs import APPLETS, Archive, build
from orchestrator.demo.guest.parts import GuestParts
from tests.unit.orchestrator.guest.shells import busybox

# Names to unpack: all but those in dev, since a device node is for root to make.
_NO_NODES = ("init", "bin*", "etc*", "lib*", "modules*", "cryptsetup*")


@pytest.fixture
def parts(tmp_path: Path) -> GuestParts:
    """Everything that an initramfs is made of; the files hold their own names."""
    folder = tmp_path / "parts"
    for name in ("busybox", "00-a.ko", "01-b.ko", "00-efi_secret.ko", "cryptsetup/cryptsetup", "cryptsetup/ld.so"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return GuestParts(
        qemu=folder / "qemu",
        firmware=folder / "firmware",
        kernel=folder / "kernel",
        busybox=folder / "busybox",
        cryptsetup=folder / "cryptsetup",
        disk_modules=(folder / "00-a.ko", folder / "01-b.ko"),
        secret_modules=(folder / "00-efi_secret.ko",),
    )


@pytest.fixture(params=["cpio", "busybox"])
def unpack(request: pytest.FixtureRequest) -> list[str]:
    """A program that unpacks an archive from its standard input into the current folder."""
    if request.param == "busybox":
        return [str(busybox()), "cpio", "-i", "-d", "-m"]
    found = shutil.which("cpio")
    if found is None:
        pytest.skip("cpio not found")
    return [found, "-i", "-d", "-m", "--quiet"]


def _unpacked(unpack: list[str], archive: bytes, folder: Path) -> Path:
    folder.mkdir()
    subprocess.run(unpack, input=archive, cwd=folder, check=True, capture_output=True)
    return folder


def test_an_archive_unpacks_to_what_was_added(unpack: list[str], tmp_path: Path) -> None:
    archive = Archive()
    archive.folder("d")
    for size in range(6):
        archive.file(f"d/{'n' * (size + 1)}", b"x" * size, executable=size % 2 == 0)
    archive.link("d/link", "n")
    root = _unpacked(unpack, archive.content(), tmp_path / "root")
    assert [path.name for path in sorted((root / "d").iterdir())] == ["link", *("n" * size for size in range(1, 7))]
    for size in range(6):
        path = root / "d" / ("n" * (size + 1))
        assert path.read_bytes() == b"x" * size
        assert path.stat().st_mode & 0o777 == (0o755 if size % 2 == 0 else 0o644)
        assert path.stat().st_mtime == 0
    assert (root / "d" / "link").readlink() == Path("n")


def test_a_damaged_archive_does_not_unpack(unpack: list[str], tmp_path: Path) -> None:
    archive = Archive()
    archive.file("f", b"x" * 100)
    (tmp_path / "root").mkdir()
    damaged = archive.content().replace(b"070701", b"070709")
    done = subprocess.run(unpack, input=damaged, cwd=tmp_path / "root", check=False, capture_output=True)
    assert done.returncode != 0
    assert not list((tmp_path / "root").iterdir())


def test_headers_names_and_data_start_at_multiples_of_four() -> None:
    archive = Archive()
    archive.file("odd", b"12345")
    content = archive.content()
    # buffer-format.rst: a header of 110 bytes, the name with its NUL, padding, the data, padding.
    assert content[:6] == b"070701"
    assert content[110:116] == b"odd\0\0\0"
    assert content[116:121] == b"12345"
    assert content.find(b"070701", 6) == 124
    assert content[124 + 110 :].startswith(b"TRAILER!!!\0")
    assert len(content) % 512 == 0


def test_the_guest_has_busybox_the_scripts_and_its_label(unpack: list[str], parts: GuestParts, tmp_path: Path) -> None:
    root = _unpacked([*unpack, *_NO_NODES], build(parts, label="shop 2"), tmp_path / "root")
    assert (root / "bin" / "busybox").read_text() == "busybox"
    assert {path.name for path in (root / "bin").iterdir()} == {"busybox", *APPLETS}
    assert (root / "bin" / "sh").readlink() == Path("busybox")
    assert (root / "etc" / "label").read_text() == "shop 2\n"
    assert (root / "init").read_text().startswith("#!/bin/busybox sh\n")
    assert (root / "init").stat().st_mode & 0o111
    assert "read_secrets()" in (root / "lib" / "secrets.sh").read_text()
    assert not (root / "cryptsetup").exists()
    assert not list((root / "modules").iterdir())


def test_disk_and_driver_come_on_request(unpack: list[str], parts: GuestParts, tmp_path: Path) -> None:
    archive = build(parts, label="x", disk=True, efi_secret=True)
    root = _unpacked([*unpack, *_NO_NODES], archive, tmp_path / "root")
    assert [path.name for path in sorted((root / "modules" / "disk").iterdir())] == ["00-a.ko", "01-b.ko"]
    assert [path.name for path in sorted((root / "modules" / "secret").iterdir())] == ["00-efi_secret.ko"]
    assert (root / "cryptsetup" / "ld.so").stat().st_mode & 0o111


def test_the_same_parts_give_the_same_bytes(parts: GuestParts) -> None:
    assert build(parts, label="1", disk=True) == build(parts, label="1", disk=True)


def test_another_label_gives_other_bytes_of_the_same_size(parts: GuestParts) -> None:
    one, two = build(parts, label="1"), build(parts, label="2")
    assert one != two
    assert len(one) == len(two)


def test_another_part_gives_other_bytes(parts: GuestParts) -> None:
    before = build(parts, label="1")
    parts.busybox.write_text("busybux")
    assert build(parts, label="1") != before


def test_what_the_parts_lack_cannot_be_asked_for(parts: GuestParts) -> None:
    bare = GuestParts(qemu=parts.qemu, firmware=parts.firmware, kernel=parts.kernel, busybox=parts.busybox)
    with pytest.raises(InvalidInput, match="cryptsetup and kernel modules; `make guest` gets them"):
        build(bare, label="1", disk=True)
    with pytest.raises(InvalidInput, match="`make guest EFI_SECRET=1` builds it"):
        build(bare, label="1", efi_secret=True)


def test_a_part_that_is_gone_is_named(parts: GuestParts) -> None:
    parts.busybox.unlink()
    with pytest.raises(InvalidInput, match="busybox cannot be read: No such file or directory"):
        build(parts, label="1")
