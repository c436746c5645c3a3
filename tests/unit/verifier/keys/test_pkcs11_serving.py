"""A token under a verifier that serves: kept fresh, lost, back, hung, and reached by new settings."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from pkcs11 import Attribute

from common.errors import Unavailable
from common.private_file import write_private
from tests.support.eventually import until
from tests.support.recording_log import RecordingLog
from tests.support.softhsm import KEY, MISSING, PIN, SoftToken
from tests.support.token_keys import MODULE, Watched, content, make_another, path, reached, refusal, token, watched
from verifier.config import Config, Pkcs11Config, TlsConfig
from verifier.exchange import Keys
from verifier.keys import pkcs11 as wrapped_keys
from verifier.keys.file import KEK_SIZE, FileKey, read_key_file
from verifier.keys.pkcs11 import TokenKey, read_wrapped_key_file
from verifier.keys.token import Token
from verifier.parts import token_keys

__all__ = ["content", "path", "token", "watched"]  # fixtures
pytestmark = pytest.mark.skipif(MODULE is None, reason=MISSING)


async def test_the_chore_keeps_the_key_fresh_and_says_when_the_token_is_lost_and_back(
    token: SoftToken, path: Path
) -> None:
    log = RecordingLog()
    key = read_wrapped_key_file(path, replace(token.settings, keep=0.2))
    chore = asyncio.create_task(key.keep_fresh(log))
    try:
        await until(lambda: usable(key))
        token.pull()
        await until(lambda: log.named("keys.token_lost") and not usable(key))
        token.put_back()
        await until(lambda: log.named("keys.token_back") and usable(key))
    finally:
        chore.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await chore
    assert [event.name for event in log.events] == ["keys.token_lost", "keys.token_back"]
    assert log.events[0].fields["sealing"] == key.key_id.hex()


def usable(key: TokenKey) -> bool:
    try:
        key.seal(b"secret", b"place")
    except Unavailable:
        return False
    return True


async def test_a_token_that_hangs_stops_nobody_and_is_asked_once(
    token: SoftToken, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, asked = threading.Event(), 0

    class Hanging(Token):
        def decrypt(self, nonce: bytes, associated: bytes, sealed: bytes) -> bytes:
            nonlocal asked
            asked += 1
            go.wait(60)
            return super().decrypt(nonce, associated, sealed)

    monkeypatch.setattr(wrapped_keys, "PATIENCE_S", 0.05)
    key = TokenKey(content, Hanging(token.settings), keep=60)
    try:
        for _ in range(3):
            assert "does not answer" in (await refusal(key)).message
        await until(lambda: asked)
        assert "does not answer" in (await refusal(key)).message
        assert asked == 1
    finally:
        go.set()
    monkeypatch.setattr(wrapped_keys, "PATIENCE_S", 30.0)
    await key.refresh()
    assert usable(key)


class Stored:
    """A store in which one key has sealed something."""

    def __init__(self, key_id: bytes) -> None:
        self._key_id = key_id

    async def sealing_keys(self) -> frozenset[bytes]:
        return frozenset({self._key_id})


@dataclass
class Serving:
    """The keys of a verifier that serves, and which chores keep them fresh."""

    config: Config
    keys: Keys
    chores: list[asyncio.Task[None]]

    def under(self, **settings: object) -> Config:
        """The configuration with other words in `[pkcs11]`."""
        assert self.config.pkcs11 is not None
        return msgspec.structs.replace(self.config, pkcs11=msgspec.structs.replace(self.config.pkcs11, **settings))


@pytest.fixture
async def serving(token: SoftToken, path: Path, watched: Watched) -> AsyncIterator[Serving]:
    settings = token.settings
    config = Config(
        listen="127.0.0.1:0",
        documents=path.parent / "documents",
        key_file=path,
        tls=TlsConfig(cert=path, key=path, client_ca=path, trust_domain="owner.example"),
        pkcs11=Pkcs11Config(
            module=settings.module,
            token=settings.token,
            key=settings.key,
            pin_file=settings.pin_file,
            keep=settings.keep,
        ),
    )
    chores: list[asyncio.Task[None]] = []

    def spawn(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        work.close()  # it would ask the token in a thread, which may be gone by then
        chores.append(asyncio.create_task(asyncio.sleep(3600)))
        return chores[-1]

    store: Any = Stored(read_wrapped_key_file(path, settings).key_id)
    keys = Keys(config, store, RecordingLog(), spawn)
    await keys.open()
    keys.keep_fresh()
    watched.tried.clear()
    yield Serving(config, keys, chores)
    for each in chores:
        each.cancel()
    await asyncio.gather(*chores, return_exceptions=True)


async def test_a_reload_reaches_the_token_as_the_new_settings_say(
    serving: Serving, tmp_path: Path, watched: Watched
) -> None:
    await serving.keys.reload(serving.config)
    assert (watched.tried, len(serving.chores)) == ([], 1)  # nothing is new
    spare = tmp_path / "spare"
    write_private(spare, PIN.encode())
    sealed = serving.keys.ring.seal(b"secret", b"place")
    changes: tuple[dict[str, object], ...] = ({"pin_file": spare}, {"pin_file": spare, "keep": 7.0})
    for times, settings in enumerate(changes, start=1):
        await serving.keys.reload(serving.under(**settings))
        assert (watched.tried, len(serving.chores)) == ([PIN] * times, 1 + times)
        await asyncio.gather(serving.chores[-2], return_exceptions=True)
        assert serving.chores[-2].cancelled()  # who asked in the old way
        assert not serving.chores[-1].done()
    assert serving.keys.ring.unseal(sealed, b"place") == b"secret"


@pytest.mark.parametrize(
    "settings", [{"token": "none"}, {"key": "none"}, {"module": Path("none.so")}, {"pin_file": None}]
)
async def test_settings_by_which_no_token_is_reached_change_nothing(
    serving: Serving, tmp_path: Path, settings: dict[str, object]
) -> None:
    if "pin_file" in settings:
        settings = {"pin_file": tmp_path / "wrong"}
        write_private(tmp_path / "wrong", b"another")
    with pytest.raises(Unavailable):
        await serving.keys.reload(serving.under(**settings))
    assert len(serving.chores) == 1
    assert not serving.chores[0].done()
    assert serving.keys.ring.seal(b"secret", b"place")
    await serving.keys.reload(serving.config)
    assert len(serving.chores) == 1


def wrap(token: SoftToken, path: Path, kek: bytes) -> None:
    """Write a key into a file, wrapped by the key that has its name in the token now."""
    associated, nonce = b"\x01" + FileKey(kek).key_id, os.urandom(12)
    path.touch(mode=0o600)
    path.write_bytes(associated + nonce + Token(token.settings).encrypt(nonce, associated, kek, make_key=False))


def change_last(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


async def test_a_key_file_that_was_wrapped_anew_is_opened_anew(
    serving: Serving, token: SoftToken, path: Path, content: bytes
) -> None:
    sealed = serving.keys.ring.seal(b"secret", b"place")
    kek = Token(token.settings).decrypt(content[9:21], content[:9], content[21:])
    # Another key took the place of the token's, under its name: what the old one wrapped opens no more.
    reached(token.settings, lambda session: [each.destroy() for each in session.get_objects({Attribute.LABEL: KEY})])
    make_another(token)
    wrap(token, path, kek)
    await serving.keys.reload(serving.config)
    assert len(serving.chores) == 2
    await asyncio.gather(serving.chores[0], return_exceptions=True)
    assert serving.chores[0].cancelled()  # it asked for what the file held before
    (key,) = token_keys(serving.keys._keys)
    await key.refresh()
    assert serving.keys.ring.unseal(sealed, b"place") == b"secret"


async def test_a_key_file_that_the_token_does_not_open_is_noticed_before_the_restart(
    serving: Serving, path: Path
) -> None:
    change_last(path)
    with pytest.raises(Unavailable):
        await serving.keys.reload(serving.config)
    assert serving.keys.ring.seal(b"secret", b"place")
    assert not serving.chores[0].done()
    change_last(path)
    await serving.keys.reload(serving.config)
    assert len(serving.chores) == 1


async def test_a_plain_key_that_moved_into_the_token_is_out_of_reach_with_it(
    serving: Serving, token: SoftToken, path: Path
) -> None:
    plain, moved = path.with_name("plain.bin"), path.with_name("moved.bin")
    kek = os.urandom(KEK_SIZE)
    write_private(plain, kek)
    await serving.keys.reload(msgspec.structs.replace(serving.config, older_key_files=(plain,)))
    sealed = read_key_file(plain).seal(b"secret", b"place")
    wrap(token, moved, kek)
    await serving.keys.reload(msgspec.structs.replace(serving.config, older_key_files=(moved,)))
    assert serving.keys.ring.unseal(sealed, b"place") == b"secret"
    assert [type(each) for each in serving.keys._keys] == [TokenKey, TokenKey]
