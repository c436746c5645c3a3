"""The PIN of a token: read from a private file, tried once, and never the last time that is left."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import Unavailable
from common.private_file import write_private
from tests.support.softhsm import MISSING, PIN, SO_PIN, TOKEN, SoftToken
from tests.support.token_keys import MODULE, Watched, content, path, refusal, token, watched
from verifier.keys.pkcs11 import TokenKey, read_wrapped_key_file, write_wrapped_key_file
from verifier.keys.token import PinRefused, Token

__all__ = ["content", "path", "token", "watched"]  # fixtures
pytestmark = pytest.mark.skipif(MODULE is None, reason=MISSING)


async def test_a_refused_pin_is_not_tried_again_until_its_file_changes(
    token: SoftToken, path: Path, watched: Watched
) -> None:
    key = read_wrapped_key_file(path, token.settings)
    token.write_pin("another")
    refusals = [await refusal(key) for _ in range(4)]
    assert watched.tried == ["another"]
    assert all(isinstance(each, PinRefused) for each in refusals)
    assert "refuses the PIN" in refusals[0].message
    assert all("not tried again" in each.message and "another" not in each.message for each in refusals[1:])
    os.utime(token.settings.pin_file)
    await refusal(key)
    assert watched.tried == ["another"] * 2
    token.write_pin(PIN)
    await key.refresh()
    assert watched.tried == ["another", "another", PIN]


async def test_a_refused_pin_is_tried_once_for_all_key_files_and_all_times_that_they_are_read(
    token: SoftToken, path: Path, tmp_path: Path, watched: Watched
) -> None:
    files = (path, tmp_path / "older-1.bin", tmp_path / "older-2.bin")
    for file in files[1:]:
        write_wrapped_key_file(file, token.settings)
    watched.tried.clear()
    token.write_pin("another")
    for _ in range(2):
        for file in files:
            await refusal(read_wrapped_key_file(file, token.settings))
        with pytest.raises(PinRefused):
            write_wrapped_key_file(tmp_path / "more.bin", token.settings)
    assert watched.tried == ["another"]
    # What was refused says nothing of another file, nor of another token.
    spare = tmp_path / "spare"
    write_private(spare, PIN.encode())
    await read_wrapped_key_file(path, replace(token.settings, pin_file=spare)).refresh()
    token.write_pin(PIN)
    for file in files:
        await read_wrapped_key_file(file, token.settings).refresh()


async def test_a_pin_that_was_accepted_and_is_refused_now_is_not_tried_again(
    token: SoftToken, path: Path, watched: Watched
) -> None:
    key = read_wrapped_key_file(path, token.settings)
    await key.refresh()
    token.tool("--init-token", "--token", TOKEN, "--label", TOKEN, "--so-pin", SO_PIN, "--pin", "8888-4444")
    for _ in range(3):
        assert isinstance(await refusal(key), PinRefused)
    assert watched.tried == [PIN, PIN]


async def test_the_last_try_that_a_token_has_left_is_never_used_whatever_was_accepted_before(
    token: SoftToken, path: Path, watched: Watched
) -> None:
    watched.final = True
    os.utime(token.settings.pin_file)  # as after a start: nothing is known of it
    key = read_wrapped_key_file(path, token.settings)
    for _ in range(3):
        error = await refusal(key)
        assert isinstance(error, PinRefused)
        assert "has one try left for the PIN" in error.message
    assert watched.tried == []
    watched.final = False  # somebody logged in
    await key.refresh()
    watched.final = True  # and somebody else did not
    assert "has one try left for the PIN" in (await refusal(key)).message
    assert watched.tried == [PIN]
    watched.final = False
    await key.refresh()
    assert watched.tried == [PIN, PIN]


async def test_replicas_leave_the_last_try_when_the_pin_is_changed_at_the_token(
    token: SoftToken, path: Path, tmp_path: Path, watched: Watched
) -> None:
    replicas = []
    for name in ("a", "b", "c"):  # each with a file of its own: what one is refused says nothing to the next
        write_private(tmp_path / name, PIN.encode())
        replicas.append(read_wrapped_key_file(path, replace(token.settings, pin_file=tmp_path / name)))
    for each in replicas:
        await each.refresh()
    token.tool("--init-token", "--token", TOKEN, "--label", TOKEN, "--so-pin", SO_PIN, "--pin", "8888-4444")
    watched.tried.clear()
    for tries_left, each in zip((3, 2, 1), replicas, strict=True):
        watched.final = tries_left == 1
        assert isinstance(await refusal(each), PinRefused)
    assert watched.tried == [PIN] * 2


async def test_without_its_file_no_pin_is_tried_while_it_is_changed(
    token: SoftToken, path: Path, watched: Watched
) -> None:
    key = read_wrapped_key_file(path, token.settings)
    await key.refresh()
    token.settings.pin_file.unlink()
    for _ in range(3):
        assert not isinstance(await refusal(key), PinRefused)
    assert watched.tried == [PIN]
    token.write_pin(PIN)
    await key.refresh()


async def test_whoever_needs_the_key_is_told_nothing_of_the_token_or_of_where_its_pin_lies(
    token: SoftToken, content: bytes
) -> None:
    now = 1000.0
    key = TokenKey(content, Token(token.settings), keep=60, monotonic=lambda: now)
    await key.refresh()
    sealed = key.seal(b"secret", b"place")
    now += 61
    pin_file = token.settings.pin_file
    for away in (False, True):
        if away:
            token.pull()
        else:
            pin_file.rename(pin_file.with_suffix(".away"))
        assert TOKEN in (told := (await refusal(key)).message) or str(pin_file) in told
        with pytest.raises(Unavailable, match=r"^the sealing key is out of reach$"):
            key.seal(b"secret", b"place")
        with pytest.raises(Unavailable, match=r"^the sealing key is out of reach$"):
            key.unseal(sealed, b"place")


@pytest.mark.parametrize("mode", [0o640, 0o604])
async def test_a_pin_file_that_others_can_read_is_not_used(token: SoftToken, path: Path, mode: int) -> None:
    key = read_wrapped_key_file(path, token.settings)
    token.settings.pin_file.chmod(mode)
    assert "can be used by others" in (await refusal(key)).message
    token.settings.pin_file.unlink()
    assert "No such file" in (await refusal(key)).message
    token.write_pin(PIN)
    await key.refresh()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"\n", "is empty"),
        (b"\r\n", "is empty"),
        (b"7" * 257, "has more than 256 bytes"),
        (b"7" * 256 + b"\n", "has more than 256 bytes"),
        (b"\xff" * 300, "has more than 256 bytes"),
        (b"\xff", "is not UTF-8"),
    ],
)
async def test_what_is_no_pin_is_not_tried(
    token: SoftToken, path: Path, watched: Watched, content: bytes, said: str
) -> None:
    key = read_wrapped_key_file(path, token.settings)
    token.settings.pin_file.write_bytes(content)
    for _ in range(2):
        error = await refusal(key)
        assert not isinstance(error, PinRefused)
        assert error.message == f"pkcs11.pin_file: {token.settings.pin_file} {said}"
    assert watched.tried == []


@pytest.mark.parametrize(
    ("ending", "tried"), [("", PIN), ("\n", PIN), ("\r\n", PIN), ("\n\n", f"{PIN}\n"), ("\r", f"{PIN}\r")]
)
async def test_one_line_break_at_the_end_is_not_of_the_pin(
    token: SoftToken, path: Path, watched: Watched, ending: str, tried: str
) -> None:
    key = read_wrapped_key_file(path, token.settings)
    token.settings.pin_file.write_bytes(f"{PIN}{ending}".encode())
    if tried == PIN:
        await key.refresh()
    else:
        assert isinstance(await refusal(key), PinRefused)
    assert watched.tried == [tried]
