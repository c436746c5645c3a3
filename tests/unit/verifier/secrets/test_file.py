"""Secrets from files: read anew, bounded, and without an answer where the file is not what it should be."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from common.errors import Reason, Unavailable
from verifier.documents.sources import FileSource
from verifier.secrets.file import FileSecrets


async def test_a_file_is_read_anew_each_time(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    files, source = FileSecrets(), FileSource(path=str(path))
    for content in (b"one", b"another\n"):
        path.write_bytes(content)
        assert await files.size(source) == len(content)
        assert await files.read(source) == content


async def test_what_is_no_file_with_content_has_no_answer_and_does_not_block(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "pipe")
    files = FileSecrets()
    for name in ("none", "empty", "pipe", "."):
        for ask in (files.read, files.size):
            with pytest.raises(Unavailable) as caught:
                await ask(FileSource(path=str(tmp_path / name)))
            assert caught.value.reason is Reason.SECRET_UNAVAILABLE


async def test_no_more_is_read_than_can_ever_be_released(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(1 << 30)
    assert await FileSecrets().size(FileSource(path=str(path))) == 1 << 30
    assert len(await FileSecrets().read(FileSource(path=str(path)))) == 0x4001
