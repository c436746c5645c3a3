"""A guest's serial line as a person reads it."""

from __future__ import annotations

import pytest

from orchestrator.demo import console
from orchestrator.demo.story import read_secrets

# As OVMF's terminal driver and a Linux 6.1 wrote it in a real run.
BOOT = (
    "\x1b[2J\x1b[001;001H\x1b[=3h\x1b[2J\x1b[8;056;240t\x1b[2J\x1b[001;001HEFI stub: Loaded initrd\r\n"
    "[    0.000000] Linux version 6.1.0-56-cloud-amd64 (somebody@a.host) (gcc-12 12.2.0, GNU ld) #1 SMP\r\n"
    "[    0.000000] BIOS-provided physical RAM map:\r\n"
    "[    1.703822] Run /init as init process\r\n"
    "secret 43ced044-42ec-487a-88b7-261bda359f24 4 61626364\r\n"
    "guest: done\r\n"
)


def test_escape_sequences_and_line_ends_are_no_part_of_a_line() -> None:
    assert next(console.lines(BOOT)) == "EFI stub: Loaded initrd"
    assert not any(character < " " for line in console.lines(BOOT) for character in line)


def test_the_story_of_a_boot_is_its_few_telling_lines() -> None:
    assert console.telling(BOOT) == [
        "EFI stub: Loaded initrd",
        "[    0.000000] Linux version 6.1.0-56-cloud-amd64",
        "[    1.703822] Run /init as init process",
        "secret 43ced044-42ec-487a-88b7-261bda359f24 4 61626364",
        "guest: done",
    ]


@pytest.mark.parametrize("cut", range(0, len(BOOT), 7))
def test_an_unfinished_line_waits_and_nothing_is_told_twice(cut: int) -> None:
    early, whole = console.telling(BOOT[:cut]), console.telling(BOOT)
    assert whole[: len(early)] == early


def test_a_long_line_is_cut_to_a_row() -> None:
    assert console.telling(f"secret {'0' * 300}\n")[0].endswith("0…")
    assert len(console.telling(f"secret {'0' * 300}\n")[0]) == 104


def test_a_secret_is_read_behind_a_terminals_escape_sequences_and_not_from_half_a_line() -> None:
    assert [secret.data for secret in read_secrets(BOOT)] == [b"abcd"]
    assert [secret.data for secret in read_secrets("\x1b[2J" + BOOT[BOOT.index("secret") :])] == [b"abcd"]
    assert read_secrets(BOOT[: BOOT.index("61626364") + 4]) == []
