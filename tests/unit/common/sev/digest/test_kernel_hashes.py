"""The table of kernel hashes."""

from __future__ import annotations

import hashlib
from uuid import UUID

import pytest

from common.errors import InvalidInput
from common.sev.digest.kernel_hashes import KernelHashes, hash_cmdline

_KERNEL = hashlib.sha256(b"kernel").digest()
_INITRD = hashlib.sha256(b"initrd").digest()


def test_the_table_is_laid_out_as_qemu_writes_it() -> None:
    table = KernelHashes.of(_KERNEL, _INITRD, b"quiet").table()
    assert len(table) == 176
    assert table[:18] == UUID("9438d606-4f22-4cc9-b479-a793d411fd21").bytes_le + bytes([168, 0])
    entries = [table[at : at + 50] for at in (18, 68, 118)]
    assert [entry[:16] for entry in entries] == [
        UUID("97d02dd8-bd20-4c94-aa78-e7714d36ab2a").bytes_le,
        UUID("44baf731-3a2f-4bd7-9af1-41e29169781d").bytes_le,
        UUID("4de79437-abd2-427f-b835-d5b172d2045b").bytes_le,
    ]
    assert all(entry[16:18] == bytes([50, 0]) for entry in entries)
    assert [entry[18:] for entry in entries] == [hashlib.sha256(b"quiet\0").digest(), _INITRD, _KERNEL]
    assert table[168:] == bytes(8)


def test_without_initrd_and_command_line_the_hashes_are_of_nothing_and_of_one_nul() -> None:
    hashes = KernelHashes.of(_KERNEL, None, None)
    assert hashes.initrd == hashlib.sha256(b"").digest()
    assert hashes.cmdline == hashlib.sha256(b"\0").digest()
    assert hashes == KernelHashes.of(_KERNEL, hashlib.sha256(b"").digest(), b"")


@pytest.mark.parametrize("cmdline", [b"quiet\n", b" quiet", b"quiet ", b"quiet\0", b"Quiet"])
def test_the_command_line_is_hashed_verbatim(cmdline: bytes) -> None:
    assert hash_cmdline(cmdline) == hashlib.sha256(cmdline + b"\0").digest()
    assert hash_cmdline(cmdline) != hash_cmdline(b"quiet")


@pytest.mark.parametrize("name", ["kernel", "initrd", "cmdline"])
def test_a_hash_of_another_size_is_refused(name: str) -> None:
    hashes = {"kernel": _KERNEL, "initrd": _INITRD, "cmdline": bytes(32)} | {name: bytes(31)}
    with pytest.raises(InvalidInput, match="32 bytes, not 31"):
        KernelHashes(**hashes)
