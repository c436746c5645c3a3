"""How the guest's shell script reads secrets out of physical memory, on a file that stands for the memory."""

from __future__ import annotations

import struct
import subprocess
from importlib import resources
from pathlib import Path
from random import Random
from uuid import UUID

import pytest

from emulator import guest
from tests.unit.orchestrator.guest.shells import shell

SCRIPT = resources.files("orchestrator.demo.guest").joinpath("secrets.sh")
INIT = resources.files("orchestrator.demo.guest").joinpath("init")
TABLE = UUID("1e74f542-71dd-4d66-963e-ef4287ff173b").bytes_le
ENTRY = UUID("adf956ad-e98c-484c-ae11-b51c7d336447").bytes_le
LUKS = UUID("736869e5-84f0-4973-92ec-06879ce3da0b")
GUIDS = [UUID(int=number << 64 | 0xABCDEF) for number in range(1, 70)]
CONFIG_TABLE, POINTER, AREA = 0x1000, 0x2010, 0x3000


@pytest.fixture(params=["bash", "busybox"])
def sh(request: pytest.FixtureRequest) -> list[str]:
    return shell(str(request.param))


def _run(sh: list[str], program: str, *arguments: str) -> list[str]:
    done = subprocess.run(
        [*sh, "-c", f'. "$0"; {program}', str(SCRIPT), *arguments], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    return done.stdout.splitlines()


def _table(*entries: tuple[UUID, bytes], length: int | None = None, area: int = 0xC00) -> bytes:
    body = b"".join(guid.bytes_le + struct.pack("<I", 20 + len(data)) + data for guid, data in entries)
    total = 20 + len(body) if length is None else length
    return (TABLE + struct.pack("<I", total) + body).ljust(area, b"\0")


def _read(sh: list[str], folder: Path, area: bytes, *, entry: bytes = ENTRY, size: int | None = None) -> list[str]:
    """What the script says about a machine whose memory holds this area."""
    memory = bytearray(AREA)
    others = b"".join(UUID(int=number).bytes_le + struct.pack("<Q", 0x7000 + number) for number in range(1, 9))
    memory[CONFIG_TABLE : CONFIG_TABLE + 8 * 24] = others
    memory[CONFIG_TABLE + 8 * 24 : CONFIG_TABLE + 9 * 24] = entry + struct.pack("<Q", POINTER)
    memory[POINTER : POINTER + 16] = struct.pack("<QQ", AREA, len(area) if size is None else size)
    (folder / "mem").write_bytes(memory + area)
    (folder / "config_table").write_text(f"{CONFIG_TABLE:#x}\n")
    return _run(sh, 'read_secrets "$1" "$2"', str(folder / "mem"), str(folder / "config_table"))


def test_every_secret_is_told_as_efi_secret_would_show_it(sh: list[str], tmp_path: Path) -> None:
    area = _table((LUKS, b"hello\0"), (UUID(int=0), b"deleted"), (GUIDS[1], b""), (GUIDS[2], bytes(range(256))))
    assert _read(sh, tmp_path, area) == [
        "secret 736869e5-84f0-4973-92ec-06879ce3da0b 6 68656c6c6f00",
        f"secret {GUIDS[1]} 0 ",
        f"secret {GUIDS[2]} 256 {bytes(range(256)).hex()}",
    ]


def test_a_secret_that_fills_the_area_is_told_whole(sh: list[str], tmp_path: Path) -> None:
    data = Random(1).randbytes(0xC00 - 40)  # noqa: S311 -- not a secret
    assert _read(sh, tmp_path, _table((LUKS, data))) == [f"secret {LUKS} {len(data)} {data.hex()}"]


def test_sixty_four_secrets_are_told_at_most(sh: list[str], tmp_path: Path) -> None:
    area = _table(*((guid, b"") for guid in GUIDS), area=0x1000)
    assert _read(sh, tmp_path, area) == [f"secret {guid} 0 " for guid in GUIDS[:64]]


@pytest.mark.parametrize("area", [bytes(0xC00), _table(area=0)[:19], b"\1" + _table()[1:]])
def test_without_a_table_there_is_no_secret_area(sh: list[str], tmp_path: Path, area: bytes) -> None:
    assert _read(sh, tmp_path, area) == ["no secret area"]


def test_without_an_entry_of_the_firmware_there_is_no_secret_area(sh: list[str], tmp_path: Path) -> None:
    area = _table((LUKS, b"hello"))
    assert _read(sh, tmp_path, area, entry=b"\1" + ENTRY[1:]) == ["no secret area"]
    assert _read(sh, tmp_path, area, size=0) == ["no secret area"]


def test_a_machine_without_uefi_has_no_secret_area(sh: list[str], tmp_path: Path) -> None:
    (tmp_path / "mem").write_bytes(_table((LUKS, b"hello")))
    said = _run(sh, 'read_secrets "$1" "$2"', str(tmp_path / "mem"), str(tmp_path / "absent"))
    assert said == ["no secret area"]


def test_memory_that_cannot_be_read_is_not_taken_for_empty(sh: list[str], tmp_path: Path) -> None:
    area = _table((LUKS, b"hello"))
    assert _read(sh, tmp_path, area, size=len(area) + 1) == ["secret area cannot be read"]
    (tmp_path / "mem").write_bytes(b"")
    said = _run(sh, 'read_secrets "$1" "$2"', str(tmp_path / "mem"), str(tmp_path / "config_table"))
    assert said == ["secret area cannot be read"]


@pytest.mark.parametrize(
    "area",
    [
        _table((GUIDS[0], b"one"), length=19),
        _table((GUIDS[0], b"one"), length=0xC01),
        _table((GUIDS[0], b"one"), length=0xFFFFFFFF),
        _table((GUIDS[0], b"one"), length=42),
        TABLE + struct.pack("<I", 60) + GUIDS[0].bytes_le + struct.pack("<I", 19) + bytes(100),
        TABLE + struct.pack("<I", 0x40) + GUIDS[0].bytes_le + struct.pack("<I", 0xFFFFFFFF) + bytes(100),
        _table((GUIDS[0], b"one"), (GUIDS[1], b"two"))[:59] + struct.pack("<I", 5) + bytes(100),
    ],
)
def test_one_impossible_length_hides_everything(sh: list[str], tmp_path: Path, area: bytes) -> None:
    assert _read(sh, tmp_path, area) == ["secret area is corrupted"]


def test_damaged_tables_read_as_in_the_stand_in_guest(sh: list[str], tmp_path: Path) -> None:
    random = Random(20)  # noqa: S311 -- the same damage in every run
    areas = []
    for number in range(60):
        entries = [(GUIDS[at], random.randbytes(random.randrange(12))) for at in range(random.randrange(5))]
        area = bytearray(_table(*entries, area=160))
        for _ in range(number % 3):
            area[random.randrange(16, 100)] = random.choice((0, 1, 19, 20, 21, 60, 255))
        areas.append(bytes(area))
        (tmp_path / f"{number:02d}").write_bytes(bytes(16) + area)
    said = _run(sh, 'for file in "$1"/*; do show_area "$file" 16 160; echo .; done', str(tmp_path))
    expected = [[*guest.read_secrets(area), "."] for area in areas]
    assert said == [line for lines in expected for line in lines]
    assert ["secret area is corrupted", "."] in expected
    assert any(len(lines) > 2 for lines in expected)


def test_the_files_of_efi_secret_are_told_in_the_same_words(sh: list[str], tmp_path: Path) -> None:
    (tmp_path / str(GUIDS[0])).write_bytes(b"\0one")
    (tmp_path / str(GUIDS[1])).write_bytes(b"")
    said = _run(sh, 'read_secret_files "$1"', str(tmp_path))
    assert said == [f"secret {GUIDS[0]} 4 006f6e65", f"secret {GUIDS[1]} 0 "]


def test_a_folder_without_files_has_nothing_to_tell(sh: list[str], tmp_path: Path) -> None:
    assert _run(sh, 'read_secret_files "$1"', str(tmp_path)) == []


def test_one_secret_is_found_by_its_name_and_no_other(sh: list[str]) -> None:
    lines = f"secret {GUIDS[0]} 1 61\nsecret {LUKS} 2 6200\nsecret {GUIDS[1]} 1 63"
    program = 'if set_secret "$1" "$2"; then echo "$secret"; else echo none; fi'
    assert _run(sh, program, lines, str(LUKS)) == ["6200"]
    assert _run(sh, program, lines, str(GUIDS[0])) == ["61"]
    assert _run(sh, program, lines, str(GUIDS[5])) == ["none"]
    assert _run(sh, program, "no secret area", str(LUKS)) == ["none"]


@pytest.mark.parametrize("script", [SCRIPT, INIT])
def test_the_scripts_are_well_formed(sh: list[str], script: Path) -> None:
    done = subprocess.run([*sh, "-n", str(script)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
