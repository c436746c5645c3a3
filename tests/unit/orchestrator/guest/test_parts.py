"""Where the parts of a guest are found, and what is said when they are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.demo.guest.parts import FORMAT, PartsMissing, System, find_parts, is_amdsev
from tests.support.firmware import amdsev_image, hashes_entry, reset_entry, secret_entry, with_footer

STOCK_IMAGE = with_footer(bytes(4096), (reset_entry(0x80B004), secret_entry(0, 0), hashes_entry(0, 0)))
STATIC, DYNAMIC = b"\x7fELF static", b"\x7fELF /lib64/ld-linux-x86-64.so.2"


class Machine:
    """A machine on which what the tests put into its folder is installed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "bin").mkdir(parents=True)
        (root / "boot").mkdir()

    @property
    def system(self) -> System:
        return System(
            search_path=str(self.root / "bin"),
            firmwares=(self.root / "OVMF.fd",),
            boot=self.root / "boot",
            busyboxes=(self.root / "bin" / "busybox",),
        )

    def has(self, name: str, content: bytes = b"x") -> Path:
        path = self.root / name
        path.write_bytes(content)
        path.chmod(0o755)
        return path

    def has_everything(self) -> None:
        self.has("bin/qemu-system-x86_64")
        self.has("bin/busybox", STATIC)
        self.has("boot/vmlinuz-6.1.0-9-amd64")
        self.has("OVMF.fd", amdsev_image("installed"))


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "machine")


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A folder as `make guest` makes it."""
    folder = tmp_path / "guest"
    for name in ("cryptsetup", "modules", "efi_secret"):
        (folder / name).mkdir(parents=True)
    (folder / "stamp.json").write_text(f'{{"format": {FORMAT}}}')
    (folder / "firmware.fd").write_bytes(amdsev_image("made"))
    (folder / "vmlinuz").write_bytes(b"kernel")
    (folder / "busybox").write_bytes(STATIC)
    for name in ("modules/01-b.ko", "modules/00-a.ko", "efi_secret/00-c.ko"):
        (folder / name).write_bytes(b"module")
    return folder


def test_a_folder_has_everything_but_qemu(made: Path, machine: Machine) -> None:
    qemu = machine.has("bin/qemu-system-x86_64")
    parts = find_parts(made, system=machine.system)
    assert (parts.qemu, parts.firmware, parts.kernel) == (qemu, made / "firmware.fd", made / "vmlinuz")
    assert (parts.busybox, parts.cryptsetup) == (made / "busybox", made / "cryptsetup")
    assert parts.disk_modules == (made / "modules" / "00-a.ko", made / "modules" / "01-b.ko")
    assert parts.secret_modules == (made / "efi_secret" / "00-c.ko",)


def test_what_is_installed_will_do_without_a_folder(machine: Machine) -> None:
    machine.has_everything()
    parts = find_parts(system=machine.system)
    assert parts.firmware == machine.root / "OVMF.fd"
    assert parts.kernel == machine.root / "boot" / "vmlinuz-6.1.0-9-amd64"
    assert (parts.cryptsetup, parts.disk_modules, parts.secret_modules) == (None, (), ())


def test_a_kernel_for_virtual_machines_is_preferred_and_of_those_the_newest(machine: Machine) -> None:
    machine.has_everything()
    for name in ("6.1.0-8-cloud-amd64", "6.1.0-7-cloud-amd64", "6.9.0-1-amd64"):
        machine.has(f"boot/vmlinuz-{name}")
    assert find_parts(system=machine.system).kernel.name == "vmlinuz-6.1.0-8-cloud-amd64"


@pytest.mark.parametrize("stamp", [None, "", "[]", "{}", f'{{"format": {FORMAT + 1}}}'])
def test_a_folder_that_is_half_or_of_another_format_is_passed_over(
    made: Path, machine: Machine, stamp: str | None
) -> None:
    (made / "stamp.json").unlink()
    if stamp is not None:
        (made / "stamp.json").write_text(stamp)
    machine.has_everything()
    parts = find_parts(made, system=machine.system)
    assert parts.firmware == machine.root / "OVMF.fd"
    assert parts.cryptsetup is None


def test_what_a_folder_lacks_is_taken_from_what_is_installed(made: Path, machine: Machine) -> None:
    machine.has_everything()
    (made / "firmware.fd").unlink()
    parts = find_parts(made, system=machine.system)
    assert (parts.firmware, parts.kernel) == (machine.root / "OVMF.fd", made / "vmlinuz")


def test_modules_are_not_used_with_another_kernel(made: Path, machine: Machine) -> None:
    machine.has_everything()
    (made / "vmlinuz").unlink()
    parts = find_parts(made, system=machine.system)
    assert (parts.disk_modules, parts.secret_modules) == ((), ())


def test_what_the_caller_names_is_used_before_everything(made: Path, machine: Machine) -> None:
    machine.has_everything()
    firmware = machine.has("mine.fd", amdsev_image("mine"))
    qemu = machine.has("my-qemu")
    parts = find_parts(made, qemu=qemu, firmware=firmware, system=machine.system)
    assert (parts.qemu, parts.firmware) == (qemu, firmware)


def test_a_named_image_without_room_for_secrets_is_refused_and_not_replaced(made: Path, machine: Machine) -> None:
    machine.has_everything()
    firmware = machine.has("stock.fd", STOCK_IMAGE)
    with pytest.raises(PartsMissing, match=r"stock\.fd is no firmware image with places for secrets"):
        find_parts(made, firmware=firmware, system=machine.system)


def test_a_named_qemu_that_does_not_run_is_refused_and_not_replaced(made: Path, machine: Machine) -> None:
    machine.has_everything()
    with pytest.raises(PartsMissing, match="nowhere/qemu is not there; install Debian's qemu-system-x86"):
        find_parts(made, qemu=machine.root / "nowhere" / "qemu", system=machine.system)


def test_a_bare_machine_is_told_every_package_that_it_lacks(machine: Machine) -> None:
    with pytest.raises(PartsMissing) as refusal:
        find_parts(system=machine.system)
    said = refusal.value.sentences
    packages = ("qemu-system-x86", "ovmf-amdsev", "linux-image-cloud-amd64", "busybox-static")
    assert len(said) == len(packages)
    for sentence, package in zip(said, packages, strict=True):
        assert package in sentence


@pytest.mark.parametrize(
    ("name", "content", "package"),
    [("OVMF.fd", STOCK_IMAGE, "ovmf-amdsev"), ("bin/busybox", DYNAMIC, "busybox-static")],
)
def test_what_is_installed_but_of_no_use_is_not_used(machine: Machine, name: str, content: bytes, package: str) -> None:
    machine.has_everything()
    machine.has(name, content)
    with pytest.raises(PartsMissing) as refusal:
        find_parts(system=machine.system)
    assert len(refusal.value.sentences) == 1
    assert package in refusal.value.sentences[0]


def test_only_an_image_with_both_areas_and_a_reset_block_is_an_amdsev_build(tmp_path: Path) -> None:
    image = tmp_path / "image"
    whole = (reset_entry(0x80B004), secret_entry(0x810000, 0xC00), hashes_entry(0x810C00, 0x400))
    image.write_bytes(with_footer(bytes(64), whole))
    assert is_amdsev(image)
    for left_out in whole:
        image.write_bytes(with_footer(bytes(64), tuple(entry for entry in whole if entry != left_out)))
        assert not is_amdsev(image)
    assert not is_amdsev(tmp_path / "absent")
