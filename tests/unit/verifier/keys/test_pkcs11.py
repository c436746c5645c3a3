"""A key file that only a token opens: made, opened, lost with the token and back with it. SoftHSM is the token."""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pkcs11
import pytest
from pkcs11 import Attribute, KeyType, MechanismFlag, ObjectClass, TokenFlag

from common.errors import InvalidInput, Reason, SevattestError, Unavailable
from common.private_file import write_private
from tests.support.eventually import until
from tests.support.recording_log import RecordingLog
from tests.support.softhsm import KEY, MISSING, PIN, SO_PIN, TOKEN, SoftToken, make_token, softhsm_module
from verifier.config import Config, Pkcs11Config, TlsConfig
from verifier.exchange import Keys
from verifier.keys import pkcs11 as wrapped_keys
from verifier.keys.file import KEK_SIZE, FileKey, read_key_file, write_key_file
from verifier.keys.keyring import Keyring
from verifier.keys.pkcs11 import (
    WRAPPED_SIZE,
    TokenKey,
    read_any_key_file,
    read_wrapped_key_file,
    write_wrapped_key_file,
)
from verifier.keys.token import PinRefused, Token
from verifier.parts import token_keys

MODULE = softhsm_module()
pytestmark = pytest.mark.skipif(MODULE is None, reason=MISSING)


@pytest.fixture
def token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SoftToken]:
    assert MODULE is not None
    made = make_token(tmp_path / "token", MODULE)
    monkeypatch.setenv("SOFTHSM2_CONF", made.environment["SOFTHSM2_CONF"])
    yield made
    pkcs11.lib(str(MODULE)).finalize()


@pytest.fixture
def path(token: SoftToken, tmp_path: Path) -> Path:
    write_wrapped_key_file(tmp_path / "kek.bin", token.settings, make_key=True)
    return tmp_path / "kek.bin"


@pytest.fixture
def content(path: Path) -> bytes:
    return path.read_bytes()


def reached(settings: Any, act: Callable[[Any], Any]) -> Any:
    """What an owner does with the token by other means than ours."""
    library = pkcs11.lib(str(settings.module))
    library.reinitialize()
    with library.get_token(token_label=TOKEN).open(rw=True, user_pin=PIN) as session:
        return act(session)


async def refusal(key: TokenKey) -> SevattestError:
    with pytest.raises(Unavailable) as caught:
        await key.refresh()
    assert caught.value.reason is Reason.KEY_UNAVAILABLE
    assert PIN not in caught.value.message
    return caught.value


async def test_what_is_sealed_opens_with_the_token_and_not_before(token: SoftToken, path: Path) -> None:
    key = read_wrapped_key_file(path, token.settings)
    with pytest.raises(Unavailable) as caught:
        key.seal(b"secret", b"place")
    assert caught.value.reason is Reason.KEY_UNAVAILABLE
    await key.refresh()
    sealed = key.seal(b"secret", b"place")
    again = read_wrapped_key_file(path, token.settings)
    await again.refresh()
    assert again.unseal(sealed, b"place") == b"secret"
    assert again.key_id == key.key_id == sealed[1:9]
    with pytest.raises(Unavailable, match="does not open"):
        again.unseal(sealed, b"elsewhere")


async def test_the_file_has_the_form_that_the_page_gives(token: SoftToken, path: Path, content: bytes) -> None:
    """Opened once more with python-pkcs11 alone, and sealed with the 32 bytes that come out."""
    assert (len(content), content[0]) == (WRAPPED_SIZE, 1)

    def unwrap(session: Any) -> bytes:
        found = session.get_key(object_class=ObjectClass.SECRET_KEY, label=KEY)
        assert not found[Attribute.EXTRACTABLE]
        assert found[Attribute.SENSITIVE]
        with pytest.raises(pkcs11.AttributeSensitive):
            found[Attribute.VALUE]
        parameters = pkcs11.GCMParams(content[9:21], content[:9])
        return bytes(found.decrypt(content[21:], mechanism=pkcs11.Mechanism.AES_GCM, mechanism_param=parameters))

    kek = reached(token.settings, unwrap)
    assert len(kek) == 32
    assert kek not in content
    assert FileKey(kek).key_id == content[1:9]
    key = read_wrapped_key_file(path, token.settings)
    await key.refresh()
    assert FileKey(kek).unseal(key.seal(b"secret", b"place"), b"place") == b"secret"
    assert kek.hex() not in repr(key)


async def test_a_pulled_token_is_missed_when_the_kept_key_runs_out_and_welcome_when_it_is_back(
    token: SoftToken, content: bytes
) -> None:
    now = 1000.0
    key = TokenKey(content, Token(token.settings), keep=60, monotonic=lambda: now)
    await key.refresh()
    sealed = key.seal(b"secret", b"place")
    token.pull()
    assert "is not there" in (await refusal(key)).message
    now += 59.9
    assert key.unseal(sealed, b"place") == b"secret"
    now += 0.1
    with pytest.raises(Unavailable) as caught:
        key.unseal(sealed, b"place")
    assert caught.value.reason is Reason.KEY_UNAVAILABLE
    with pytest.raises(Unavailable):
        key.seal(b"secret", b"place")
    token.put_back()
    await key.refresh()
    assert key.unseal(sealed, b"place") == b"secret"


async def test_a_token_folder_that_is_gone_altogether_comes_back_too(token: SoftToken, path: Path) -> None:
    key = read_wrapped_key_file(path, token.settings)
    token.pull()
    (token.folder / "tokens").rmdir()
    for _ in range(3):
        assert "does not do it" in (await refusal(key)).message
    (token.folder / "tokens").mkdir()
    token.put_back()
    await key.refresh()
    assert key.seal(b"secret", b"place")


async def test_a_key_that_was_deleted_in_the_token_is_named(token: SoftToken, path: Path) -> None:
    key = read_wrapped_key_file(path, token.settings)
    reached(token.settings, lambda session: session.get_key(label=KEY).destroy())
    assert f"has no AES key {KEY}" in (await refusal(key)).message
    make_another(token)  # of the same name: it opens nothing
    assert "does not do it" in (await refusal(key)).message
    make_another(token)
    assert f"has 2 AES keys {KEY}" in (await refusal(key)).message


def make_another(token: SoftToken, *, extractable: bool = False) -> None:
    reached(
        token.settings,
        lambda session: session.generate_key(
            KeyType.AES,
            256,
            label=KEY,
            store=True,
            capabilities=MechanismFlag.ENCRYPT | MechanismFlag.DECRYPT,
            template={Attribute.EXTRACTABLE: extractable, Attribute.SENSITIVE: not extractable},
        ),
    )


class Watched:
    """python-pkcs11's library: which PINs are tried, and a token that may say that one try is left."""

    def __init__(self, library: Any) -> None:
        self._library = library
        self.tried: list[str] = []
        self.final = False

    def __call__(self, so: str) -> Any:
        library = self._library(so)

        def get_token(token_label: str) -> Any:
            token = library.get_token(token_label=token_label)

            def opened(*, rw: bool, user_pin: str) -> Any:
                self.tried.append(user_pin)
                return token.open(rw=rw, user_pin=user_pin)

            last = TokenFlag.USER_PIN_FINAL_TRY if self.final else TokenFlag(0)
            return SimpleNamespace(flags=token.flags | last, open=opened)

        return SimpleNamespace(reinitialize=library.reinitialize, finalize=library.finalize, get_token=get_token)


@pytest.fixture
def watched(path: Path, monkeypatch: pytest.MonkeyPatch) -> Watched:
    """From where the key file is made on."""
    assert path.exists()
    made = Watched(pkcs11.lib)
    monkeypatch.setattr(pkcs11, "lib", made)
    return made


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


async def test_a_library_that_is_not_there_is_a_key_out_of_reach(token: SoftToken, path: Path, tmp_path: Path) -> None:
    module = tmp_path / "none.so"
    key = read_wrapped_key_file(path, replace(token.settings, module=module))
    assert (await refusal(key)).message == f"pkcs11.module: {module}: no such file or directory"
    module.write_text("no library")
    assert (await refusal(key)).message == f"pkcs11.module: {module}: is no PKCS#11 library"
    await read_wrapped_key_file(path, token.settings).refresh()


async def test_a_changed_key_file_does_not_open(token: SoftToken, content: bytes) -> None:
    for at in range(1, WRAPPED_SIZE):
        changed = bytearray(content)
        changed[at] ^= 1
        await refusal(TokenKey(bytes(changed), Token(token.settings), keep=60))
    await TokenKey(content, Token(token.settings), keep=60).refresh()


@pytest.mark.parametrize(
    "change", [lambda _: b"", lambda data: data[:-1], lambda data: b"\x02" + data[1:]], ids=range(3)
)
def test_what_is_no_wrapped_key_is_refused(token: SoftToken, path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(InvalidInput, match="is not a key of 69 bytes"):
        read_wrapped_key_file(path, token.settings)


def test_plain_and_wrapped_key_files_are_not_taken_for_each_other(token: SoftToken, path: Path) -> None:
    with pytest.raises(InvalidInput, match="must hold 32 bytes"):
        read_key_file(path)
    write_key_file(path.with_name("plain"))
    with pytest.raises(InvalidInput, match="is not a key of 69 bytes"):
        read_wrapped_key_file(path.with_name("plain"), token.settings)


async def test_on_the_way_into_a_token_plain_and_wrapped_key_files_are_open_at_once(
    token: SoftToken, path: Path, tmp_path: Path
) -> None:
    write_key_file(tmp_path / "plain")
    plain, wrapped = (read_any_key_file(each, token.settings) for each in (tmp_path / "plain", path))
    assert isinstance(wrapped, TokenKey)
    await wrapped.refresh()
    ring = Keyring(wrapped, [plain])
    assert ring.unseal(plain.seal(b"secret", b"place"), b"place") == b"secret"
    assert ring.unseal(ring.seal(b"secret", b"place"), b"place") == b"secret"
    write_private(tmp_path / "neither", bytes(33))
    with pytest.raises(InvalidInput, match="is not a key of 69 bytes"):
        read_any_key_file(tmp_path / "neither", token.settings)


def test_keygen_makes_a_key_only_when_asked_and_overwrites_nothing(token: SoftToken, tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="has no AES key "):
        write_wrapped_key_file(tmp_path / "kek", token.settings)
    assert not (tmp_path / "kek").exists()
    key_id = write_wrapped_key_file(tmp_path / "kek", token.settings, make_key=True)
    assert (tmp_path / "kek").read_bytes()[1:9] == key_id
    assert stat.S_IMODE((tmp_path / "kek").stat().st_mode) == 0o600
    assert write_wrapped_key_file(tmp_path / "second", token.settings, make_key=True) != key_id  # with the same key
    assert len(reached(token.settings, lambda session: list(session.get_objects({Attribute.LABEL: KEY})))) == 1
    with pytest.raises(InvalidInput, match="never overwritten"):
        write_wrapped_key_file(tmp_path / "kek", token.settings)


def test_a_key_that_could_leave_the_token_wraps_nothing(token: SoftToken, tmp_path: Path) -> None:
    make_another(token, extractable=True)
    with pytest.raises(InvalidInput, match="cannot leave the token"):
        write_wrapped_key_file(tmp_path / "kek", token.settings, make_key=True)
    assert not (tmp_path / "kek").exists()


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
        assert asked == 1
    finally:
        go.set()
    monkeypatch.setattr(wrapped_keys, "PATIENCE_S", 30.0)
    await key.refresh()
    assert usable(key)


def test_without_python_pkcs11_the_extra_is_named(
    token: SoftToken, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pkcs11", None)
    with pytest.raises(InvalidInput, match=r"pkcs11: needs the extra sevattest\[pkcs11\]$") as caught:
        read_wrapped_key_file(path, token.settings)
    assert "sevattest[pkcs11]" in caught.value.fields["hint"]


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
