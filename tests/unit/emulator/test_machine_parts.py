"""What the stand-in machine is made of: save areas, hashes table, footer, memory, command line, guest."""

from __future__ import annotations

import errno
import struct
from hashlib import sha256
from pathlib import Path
from uuid import UUID

import pytest
from sevsnpmeasure import vmsa as outside_vmsa
from sevsnpmeasure.sev_hashes import SevHashes
from sevsnpmeasure.sev_mode import SevMode
from sevsnpmeasure.vmm_types import VMMType

from emulator import guest, vmsa
from emulator.cpu_models import find_model
from emulator.device_client import CommandFailed
from emulator.errors import MachineDied
from emulator.firmware_image import IMAGE_SIZE, build_image, write_image
from emulator.footer import Area, Footer
from emulator.guest_memory import GuestMemory, NotMapped
from emulator.kernel_hashes import BootHashes
from emulator.qemu_options import MachineOptions, parse
from emulator.qemu_words import decode_base64, kvm_outcome
from tests.support.vectors import vectors

# Save areas.


def _areas(flavour: str, vcpus: int = 3, signature: int = 0x00A00F11) -> list[bytes]:
    return list(vmsa.save_areas(vcpus=vcpus, cpu_signature=signature, reset_address=0x80B004, flavour=flavour))


def test_legacy_save_areas_are_sevctls() -> None:
    # sha256 of sevctl's tests/data/vmsa0.bin and vmsa1.bin: family 25, model 1, stepping 1, AmdSev firmware.
    boot, ap, last = _areas("legacy")
    assert sha256(boot).hexdigest() == "f8b52f775502472e5797d2674d9de21f6abc05dc05e9bc49cbb7b6a13688d5e7"
    assert sha256(ap).hexdigest() == "bcee5cb289f72882da17abd8dca5e8a7e9f8e2033e7ad96b4db0ab1a383a6487"
    assert ap == last


def test_init2_save_areas_are_sev_snp_measures() -> None:
    signature = vmsa.signature(23, 49, 0)
    theirs = outside_vmsa.VMSA(SevMode.SEV_ES, 0x80B004, signature, 0, VMMType.QEMU)
    assert _areas("init2", 3, signature) == [bytes(page) for page in theirs.pages(3)]


@pytest.mark.parametrize(
    ("flavour", "boot", "ap"),
    [
        ("legacy", {}, {}),
        ("legacy+debug-swap", {0x3B0: 0x20}, {0x3B0: 0x20}),
        ("init2", {0x408: 0x1F80, 0x410: 0x37F}, {0x408: 0x1F80, 0x410: 0x37F}),
        ("init2+debug-swap", {0x408: 0x1F80, 0x410: 0x37F, 0x3B0: 0x20}, {0x408: 0x1F80, 0x410: 0x37F, 0x3B0: 0x20}),
        ("init2-ap-zero", {0x408: 0x1F80, 0x410: 0x37F}, {}),
    ],
)
def test_flavours_differ_in_these_fields_alone(flavour: str, boot: dict[int, int], ap: dict[int, int]) -> None:
    for page, base, fields in zip(_areas(flavour, 2), _areas("legacy", 2), (boot, ap), strict=True):
        changed = bytearray(base)
        for at, value in fields.items():
            struct.pack_into("<H", changed, at, value)
        assert page == bytes(changed)


@pytest.mark.parametrize(
    ("family", "model", "stepping", "signature"), [(25, 1, 1, 0x00A00F11), (23, 1, 2, 0x00800F12), (15, 1, 0, 0xF10)]
)
def test_the_signature_is_cpuids(family: int, model: int, stepping: int, signature: int) -> None:
    assert vmsa.signature(family, model, stepping) == signature


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("EPYC", (23, 1, 2)),
        ("EPYC-v4", (23, 1, 2)),
        ("EPYC-Rome", (23, 49, 0)),
        ("EPYC-Milan-v2", (25, 1, 1)),
        ("EPYC-Genoa", (25, 17, 0)),
        ("EPYC-Turin", (26, 0, 0)),
        ("host", (23, 49, 0)),
    ],
)
def test_cpu_models_have_their_numbers(name: str, numbers: tuple[int, int, int]) -> None:
    model = find_model(name, generation="rome")
    assert model is not None
    assert (model.family, model.model, model.stepping) == numbers


@pytest.mark.parametrize("name", ["", "EPYC-", "epyc", "EPYC-v", "EPYC-v0", "NoSuch", "EPYC-Rome-v2-v3"])
def test_other_names_are_no_model(name: str) -> None:
    assert find_model(name, generation="milan") is None


# The hashes table.


@pytest.mark.parametrize("initrd", [b"", b"initrd" * 100])
@pytest.mark.parametrize("append", ["", "console=ttyS0 loglevel=7", " trailing "])
def test_the_hashes_table_is_sev_snp_measures(tmp_path: Path, initrd: bytes, append: str) -> None:
    (tmp_path / "kernel").write_bytes(b"kernel" * 1000)
    (tmp_path / "initrd").write_bytes(initrd)
    ours = BootHashes.of(tmp_path / "kernel", tmp_path / "initrd" if initrd else None, append.encode() or None)
    theirs = SevHashes(str(tmp_path / "kernel"), str(tmp_path / "initrd") if initrd else "", append)
    assert ours.table() == bytes(theirs.construct_table())


def test_the_firmware_boots_only_what_its_table_vouches_for(tmp_path: Path) -> None:
    (tmp_path / "k").write_bytes(b"k")
    (tmp_path / "i").write_bytes(b"i")
    hashes = BootHashes.of(tmp_path / "k", tmp_path / "i", b"quiet")
    assert hashes.accepted_by(hashes.table())
    assert hashes.accepted_by(hashes.table().ljust(0x400, b"\0"))
    for other in (
        BootHashes.of(tmp_path / "i", tmp_path / "i", b"quiet"),
        BootHashes.of(tmp_path / "k", None, b"quiet"),
        BootHashes.of(tmp_path / "k", tmp_path / "i", b"quiet "),
        BootHashes.of(tmp_path / "k", tmp_path / "i", None),
    ):
        assert not hashes.accepted_by(other.table())
    assert not hashes.accepted_by(bytes(0x400))
    assert not hashes.accepted_by(b"")
    for at in (0, 16, 18, 34, 60):
        table = bytearray(hashes.table())
        table[at] ^= 0x40
        assert not hashes.accepted_by(bytes(table))


# The footer.


def test_the_image_of_ours_has_an_amdsev_footer(tmp_path: Path) -> None:
    write_image(tmp_path / "fw", "firmware 1")
    image = (tmp_path / "fw").read_bytes()
    assert len(image) == IMAGE_SIZE
    assert Footer.read(image) == Footer(
        reset_address=0x80B004, secret=Area(base=0x810000, size=0xC00), hashes=Area(base=0x810C00, size=0x400)
    )
    assert image == build_image("firmware 1") != build_image("firmware 2")


def test_entries_may_be_missing_or_name_nothing() -> None:
    bare = Footer.read(build_image("x", reset_address=None, secret_area=None, hashes_area=None, size=4096))
    assert bare == Footer(reset_address=None, secret=None, hashes=None)
    stock = Footer.read(build_image("x", secret_area=(0, 0), hashes_area=(0, 0), size=4096))
    assert (stock.secret, stock.hashes) == (Area(base=0, size=0), Area(base=0, size=0))
    assert Footer.read(b"") == bare
    assert Footer.read(bytes(4096)) == bare


def test_firmware_from_before_the_table_has_a_reset_block() -> None:
    block = struct.pack("<IH", 0x80B004, 22) + UUID("00f771de-1a7e-4fcb-890e-68c77e2fb44e").bytes_le
    assert Footer.read(bytes(64) + block + bytes(32)).reset_address == 0x80B004


@pytest.mark.parametrize(
    ("name", "secret", "hashes", "reset"),
    [
        ("ovmf_AmdSev_suffix.bin", (0x810000, 0xC00), (0x810C00, 0x400), 0x80B004),
        ("ovmf_OvmfX64_suffix.bin", (0, 0), (0, 0), 0x80B004),
        ("amdsev-20220126-last-4096.bin", (0x80C000, 0xC00), (0x80CC00, 0x400), 0x80B004),
    ],
)
def test_the_footers_of_real_firmware_are_read(
    name: str, secret: tuple[int, int], hashes: tuple[int, int], reset: int
) -> None:
    footer = Footer.read((vectors() / "ovmf" / name).read_bytes())
    found = [(area.base, area.size) if area else (0, 0) for area in (footer.secret, footer.hashes)]
    assert found == [secret, hashes]
    assert footer.reset_address == reset


# Memory.


def test_memory_is_ram_below_and_above_the_hole() -> None:
    memory = GuestMemory(0xC0000000, bytes(4096))
    memory.write(0x810000, b"low")
    memory.write((1 << 32) + 5, b"high")
    assert memory.read(0x810000, 3) == b"low"
    assert memory.read((1 << 32) + 5, 4) == b"high"
    memory.close()


@pytest.mark.parametrize(
    ("address", "size", "words"),
    [
        (0x10000000, 1, "No memory is mapped at address 0x10000000"),
        (0x0FFFFFF0, 32, "Size of memory region at 0xffffff0 exceeded."),
        (0xFFFFF000, 16, "Memory at address 0xfffff000 is not RAM"),
        (0xFFFFFFFFFFFFFFFF, 1, "No memory is mapped at address 0xffffffffffffffff"),
    ],
)
def test_what_is_no_ram_is_refused_in_qemus_words(address: int, size: int, words: str) -> None:
    memory = GuestMemory(256 << 20, bytes(4096))
    with pytest.raises(NotMapped, match=f"^{words}$"):
        memory.write(address, bytes(size))
    memory.close()


@pytest.mark.parametrize("size", [1 << 47, 99999999 << 40])
def test_memory_that_nobody_has_is_refused_in_qemus_words(size: int) -> None:
    with pytest.raises(MachineDied) as death:
        GuestMemory(size)
    assert death.value.lines == ("cannot set up guest memory 'pc.ram': Cannot allocate memory",)


# The guest.

TABLE = UUID("1e74f542-71dd-4d66-963e-ef4287ff173b").bytes_le
GUIDS = [UUID(int=number) for number in range(1, 70)]


def _table(*entries: tuple[UUID, bytes], length: int | None = None, area: int = 0xC00) -> bytes:
    body = b"".join(guid.bytes_le + struct.pack("<I", 20 + len(data)) + data for guid, data in entries)
    total = 20 + len(body) if length is None else length
    return (TABLE + struct.pack("<I", total) + body).ljust(area, b"\0")


def test_the_guest_reads_every_secret_as_efi_secret_would() -> None:
    area = _table((GUIDS[0], b"one"), (UUID(int=0), b"deleted"), (GUIDS[1], b""))
    assert list(guest.read_secrets(area)) == [f"secret {GUIDS[0]} 3 {b'one'.hex()}", f"secret {GUIDS[1]} 0 "]


def test_a_padded_table_length_reads_the_same() -> None:
    entries = ((GUIDS[0], b"x" * 5),)
    assert list(guest.read_secrets(_table(*entries, length=48))) == list(guest.read_secrets(_table(*entries)))


def test_efi_secret_shows_sixty_four_files_at_most() -> None:
    area = _table(*((guid, b"") for guid in GUIDS), area=0x1000)
    assert len(list(guest.read_secrets(area))) == 64


@pytest.mark.parametrize("area", [b"", bytes(0xC00), _table(area=0)[:19], b"\1" + _table()[1:]])
def test_without_a_table_there_is_no_secret_area(area: bytes) -> None:
    assert list(guest.read_secrets(area)) == [guest.NO_AREA]


@pytest.mark.parametrize(
    "area",
    [
        _table((GUIDS[0], b"one"), length=19),
        _table((GUIDS[0], b"one"), length=0xC01),
        _table((GUIDS[0], b"one"), length=42),
        TABLE + struct.pack("<I", 60) + GUIDS[0].bytes_le + struct.pack("<I", 19) + bytes(100),
        TABLE + struct.pack("<I", 0x40) + GUIDS[0].bytes_le + struct.pack("<I", 0xFFFFFFFF) + bytes(100),
    ],
)
def test_a_table_that_lies_about_lengths_shows_nothing(area: bytes) -> None:
    assert list(guest.read_secrets(area)) == [guest.CORRUPTED]


def test_one_bad_entry_hides_the_good_ones_before_it() -> None:
    good = GUIDS[0].bytes_le + struct.pack("<I", 23) + b"one"
    bad = GUIDS[1].bytes_le + struct.pack("<I", 5)
    area = TABLE + struct.pack("<I", 20 + len(good) + len(bad)) + good + bad
    assert list(guest.read_secrets(area)) == [guest.CORRUPTED]


def test_a_kernel_without_a_table_is_not_booted_by_amdsev_firmware_but_by_others(tmp_path: Path) -> None:
    (tmp_path / "k").write_bytes(b"k")
    hashes = BootHashes.of(tmp_path / "k", None, None)
    amdsev = Footer.read(build_image("x", size=4096))
    stock = Footer.read(build_image("x", secret_area=(0, 0), hashes_area=(0, 0), size=4096))
    memory = GuestMemory(64 << 20)
    assert guest.boot(memory, amdsev, hashes) == [guest.NOT_BOOTED]
    assert guest.boot(memory, stock, hashes) == [guest.NO_AREA]
    memory.write(0x810C00, hashes.table())
    assert guest.boot(memory, amdsev, hashes) == [guest.NO_AREA]
    memory.write(0x810000, _table((GUIDS[0], b"s")))
    assert guest.boot(memory, amdsev, hashes) == [f"secret {GUIDS[0]} 1 73"]
    memory.close()


# The command line.

SEV = "sev-guest,id=sev0,cbitpos=51,reduced-phys-bits=1"


def test_qemus_words_are_understood(tmp_path: Path) -> None:
    firmware = tmp_path / "fw,1"
    firmware.write_bytes(b"x")
    options = parse(
        [
            *("-machine", "q35,confidential-guest-support=sev0,vmport=off", "-accel", "kvm", "-nodefaults"),
            *("-object", f"{SEV},policy=0x7,dh-cert-file=/a,session-file=/b,kernel-hashes=on", "-S", "-no-reboot"),
            *("-drive", f"if=pflash,format=raw,unit=0,readonly=on,file={str(firmware).replace(',', ',,')}"),
            *(
                "-kernel",
                "/k",
                "-initrd",
                "/i",
                "-append",
                "a,b=c",
                "-smp",
                "4,maxcpus=8",
                "-cpu",
                "EPYC-Rome,+x,family=1",
            ),
            *(
                "-m",
                "size=2G",
                "-qmp",
                "unix:/q,server=on,wait=off",
                "-serial",
                "file:/s",
                "-name",
                "n",
                "-display",
                "none",
            ),
        ]
    )
    assert options.sev is not None
    assert (options.sev.policy, options.sev.cbitpos, options.sev.kernel_hashes) == (7, 51, True)
    assert (options.sev.godh_file, options.sev.session_file) == (Path("/a"), Path("/b"))
    assert (options.firmware, options.kernel, options.initrd) == (firmware, Path("/k"), Path("/i"))
    assert (options.append, options.vcpus, options.cpu, options.memory) == ("a,b=c", 4, "EPYC-Rome", 2 << 30)
    assert (options.paused, options.no_reboot, options.qmp, options.serial) == (True, True, Path("/q"), "file:/s")
    assert options.cpu_flags["family"] == "1"


def test_older_and_newer_spellings_mean_the_same() -> None:
    old = parse(["-machine", "q35,memory-encryption=sev0", "-object", SEV, "-qmp", "unix:/q,server,nowait"])
    json = '{"qom-type": "sev-guest", "id": "sev0", "cbitpos": 51, "reduced-phys-bits": 1, "kernel-hashes": false}'
    new = parse(
        ["--machine", "type=q35,confidential-guest-support=sev0", "--object", json, "-qmp", "unix:/q,server=on"]
    )
    assert old == new
    assert old.sev is not None
    assert old.sev.policy == 1


@pytest.mark.parametrize(
    ("words", "vcpus"),
    [("4", 4), ("cpus=2,maxcpus=8", 2), ("maxcpus=8", 8), ("sockets=2,cores=3,threads=2", 12), ("cores=4", 4)],
)
def test_a_topology_has_as_many_vcpus_as_in_qemu(words: str, vcpus: int) -> None:
    # hw/core/machine-smp.c: cpus, else maxcpus, else the product. Each vCPU of an ES guest is measured.
    assert parse(["-smp", words]).vcpus == vcpus


def test_without_an_object_in_use_the_machine_has_no_sev() -> None:
    assert parse(["-object", SEV]).sev is None
    assert parse([]) == MachineOptions()


def test_a_second_flash_is_not_measured(tmp_path: Path) -> None:
    for name in ("code", "vars"):
        (tmp_path / name).write_bytes(b"x")
    options = parse(
        ["-drive", f"if=pflash,unit=0,file={tmp_path / 'code'}", "-drive", f"if=pflash,unit=1,file={tmp_path / 'vars'}"]
    )
    assert options.firmware == tmp_path / "code"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["-nope"], "-nope: invalid option"),
        (["-bios", "x"], "-bios: invalid option"),
        (["-m"], "-m: requires an argument"),
        (["-m", "lots"], "-m lots: Parameter 'size' expects a size"),
        (["-smp", "9" * 5000], f"-smp {'9' * 5000}: Parameter 'cpus' expects a number"),
        (["-smp", "2,cores=x"], "-smp 2,cores=x: Parameter 'cores' expects a number"),
        (["-qmp", "unix:server=on"], "-qmp unix:server=on: None or one of 'path', 'fd' or 'host' option required."),
        (["-smp", "0"], "-smp 0: Invalid CPU topology: CPU counts must be greater than zero"),
        (["-machine", "q35,confidential-guest-support=nope"], "Device 'nope' not found"),
        (["-append", "x"], "-append only allowed with -kernel option"),
        (["-initrd", "x"], "-initrd only allowed with -kernel option"),
        (["-object", "sev-guest,id=sev0"], "-object sev-guest,id=sev0: Parameter 'reduced-phys-bits' is missing"),
        (["-object", f"{SEV},launch-secret=x"], f"-object {SEV},launch-secret=x: Invalid parameter 'launch-secret'"),
        (
            ["-object", f"{SEV},kernel-hashes=1"],
            f"-object {SEV},kernel-hashes=1: Parameter 'kernel-hashes' expects 'on' or 'off'",
        ),
        (["-object", f"{SEV},policy=-1"], f"-object {SEV},policy=-1: Parameter 'policy' expects uint32"),
        (["-object", "{"], "-object {: JSON parse error, expecting value"),
        (
            ["-object", "sev-snp-guest,id=sev0"],
            "-object sev-snp-guest,id=sev0: Parameter 'qom-type' does not accept value 'sev-snp-guest'",
        ),
        (
            ["-drive", "if=pflash,file=/nowhere"],
            "-drive if=pflash,file=/nowhere: Could not open '/nowhere': No such file or directory",
        ),
        (["-serial", "pty"], "-serial pty: 'pty' is not a valid char driver"),
        (["disk.img"], "disk.img: Could not open 'disk.img': No such file or directory"),
    ],
)
def test_other_words_are_refused_as_qemu_refuses_them(words: list[str], line: str) -> None:
    with pytest.raises(MachineDied) as death:
        parse(words)
    assert death.value.lines[0] == line


# QEMU's words for what the firmware answers.


@pytest.mark.parametrize(
    ("status", "words"), [(0x0B, "ret=-5 fw_error=11 'Bad measurement'"), (0x27, "ret=-5 fw_error=39 'unknown error'")]
)
def test_a_status_is_told_as_qemu_tells_it(status: int, words: str) -> None:
    assert kvm_outcome(CommandFailed(errno.EIO, status)) == words


# GLib's base64.


@pytest.mark.parametrize(
    ("text", "data"),
    [
        ("aGVsbG8=", b"hello"),
        ("aGVs\nbG8=\n", b"hello"),
        ("a!G V*s bG8=", b"hello"),
        ("aGVsbG8", b"hel"),
        ("!!", b""),
        ("", b""),
        ("AA==", b"\0"),
    ],
)
def test_base64_is_read_as_tolerantly_as_glib_does(text: str, data: bytes) -> None:
    assert decode_base64(text) == data
