"""Secrets from files: read anew, bounded, and without an answer where the file is not what it should be."""

from __future__ import annotations

import os
from pathlib import Path
from uuid import UUID

import pytest

from common.errors import Reason, Unavailable
from verifier.documents.workload import ATTESTED_SIZE, SecretSpec
from verifier.secrets.file import FileSecrets

GUID = UUID(int=9)


def spec(path: Path | None, *, nul: bool = False) -> SecretSpec:
    return SecretSpec(guid=GUID, file=path, trailing_nul=nul)


async def test_a_file_is_read_anew_each_time(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    source = FileSecrets()
    for content in (b"one", b"another"):
        path.write_bytes(content)
        assert await source.sizes([spec(path)]) == (len(content),)
        (entry,) = await source.read([spec(path)])
        assert (entry.guid, entry.data) == (GUID, content)


async def test_a_nul_is_added_and_data_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"word\n")
    (entry,) = await FileSecrets().read([spec(path, nul=True)])
    assert entry.data == b"word\n\0"


async def test_a_generated_secret_is_new_with_each_call() -> None:
    source = FileSecrets()
    made = {(await source.read([spec(None)]))[0].data for _ in range(5)}
    assert len(made) == 5
    assert {len(data) for data in made} == {ATTESTED_SIZE}
    assert await source.sizes([spec(None)]) == (ATTESTED_SIZE,)


async def test_all_are_read_or_none(tmp_path: Path) -> None:
    good = tmp_path / "good"
    good.write_bytes(b"x")
    with pytest.raises(Unavailable):
        await FileSecrets().read([spec(good), spec(tmp_path / "none")])


async def test_what_is_no_file_with_content_has_no_answer_and_does_not_block(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "pipe")
    for name in ("none", "empty", "pipe", "."):
        for ask in (FileSecrets().read, FileSecrets().sizes):
            with pytest.raises(Unavailable) as caught:
                await ask([spec(tmp_path / name)])
            assert caught.value.reason is Reason.SECRET_UNAVAILABLE
            assert str(tmp_path) not in caught.value.message


async def test_no_more_is_read_than_can_ever_be_released(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(1 << 30)
    (entry,) = await FileSecrets().read([spec(path)])
    assert len(entry.data) == 0x4001
