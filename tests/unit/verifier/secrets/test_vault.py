"""Secrets in Vault: read as they are now, and whatever else Vault says is no secret, no wait and no leak."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from common.errors import InvalidInput, Reason, Unavailable
from common.rpc.identity import Role
from common.telemetry.log import configure
from tests.support.fake_vault import (
    FakeVault,
    fake_vault,
    say,
    say_half,
    say_nothing,
    say_slowly,
    say_without_end,
    write_token,
)
from tests.support.pki import Pair, Pki
from tests.support.spellings import shown_in
from verifier.documents.sources import VaultSource
from verifier.documents.workload import SecretSpec
from verifier.secrets.router import Secrets
from verifier.secrets.vault import VaultSecrets, VaultSettings
from verifier.secrets.vault_client import BODY_MAX, ask

TOKEN = "hvs.a-token-that-nobody-may-see"
SECRET = "a passphrase out of Vault, gr\u00fc\u00dfe"
SOURCE = VaultSource(mount="kv", path="guests/web", field="disk")
PATIENCE = 20.0  # seconds: for a loaded machine


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="module")
def pair(pki: Pki) -> Pair:
    return pki.issue(Role.VERIFIER, "vault", ip=["127.0.0.1"])


@pytest.fixture
def vault(pair: Pair) -> Iterator[FakeVault]:
    with fake_vault(pair, TOKEN) as server:
        server.secrets["kv", "guests/web"] = [{"disk": "old", "other": 7}, {"disk": SECRET, "empty": ""}]
        yield server


@pytest.fixture
def settings(pki: Pki, vault: FakeVault, tmp_path: Path) -> Callable[..., VaultSettings]:
    """Good settings, or what a test changes of them."""
    token_file = write_token(tmp_path / "token", TOKEN)

    def make(**changes: Any) -> VaultSettings:
        good: dict[str, Any] = {"address": vault.address, "token_file": token_file, "ca": pki.owner_ca}
        return VaultSettings(**{**good, "timeout": PATIENCE, **changes})

    return make


async def refused(settings: VaultSettings, source: VaultSource = SOURCE) -> str:
    """The sentence for the owner; what the host is told, and what the log says, is looked at as well."""
    stream = io.StringIO()
    secrets = Secrets(vault=VaultSecrets(settings), log=configure("test", stream))
    spec = SecretSpec(guid=UUID(int=1), source=source)
    with pytest.raises(Unavailable) as caught:
        await secrets.read([spec])
    told = caught.value
    assert (told.reason, told.message) == (Reason.SECRET_UNAVAILABLE, "a secret's source has no answer")
    cause = told.__cause__
    assert isinstance(cause, Unavailable)
    for secret in (SECRET.encode(), TOKEN.encode()):
        assert not shown_in(secret, stream.getvalue(), repr(told), repr(cause), repr(cause.__cause__))
    assert cause.message in stream.getvalue().encode().decode("unicode_escape")
    return cause.message


async def test_the_newest_version_is_read_or_the_one_that_is_named(settings: Callable[..., VaultSettings]) -> None:
    vault = VaultSecrets(settings())
    assert await vault.read(SOURCE) == SECRET.encode()
    assert await vault.size(SOURCE) == len(SECRET.encode())
    named = VaultSource(mount="kv", path="guests/web", field="disk", version=1)
    assert await vault.read(named) == b"old"


async def test_vault_is_only_read(settings: Callable[..., VaultSettings], vault: FakeVault) -> None:
    await VaultSecrets(settings()).read(SOURCE)
    assert vault.heard == [("GET", "/v1/kv/data/guests/web", TOKEN)]


async def test_a_secret_that_is_rotated_is_read_anew(settings: Callable[..., VaultSettings], vault: FakeVault) -> None:
    secrets = VaultSecrets(settings())
    assert await secrets.size(SOURCE) == len(SECRET.encode())
    vault.secrets["kv", "guests/web"].append({"disk": "rotated"})
    assert await secrets.read(SOURCE) == b"rotated"


async def test_base64_is_decoded_where_the_document_says_so(
    settings: Callable[..., VaultSettings], vault: FakeVault
) -> None:
    data = bytes(range(256))
    vault.secrets["kv", "bytes"] = [{"disk": base64.b64encode(data).decode()}, {"disk": "not base64!"}]
    secrets = VaultSecrets(settings())
    coded = VaultSource(mount="kv", path="bytes", field="disk", base64=True, version=1)
    assert await secrets.read(coded) == data
    plain = VaultSource(mount="kv", path="bytes", field="disk", version=1)
    assert await secrets.read(plain) == base64.b64encode(data)
    wrong = VaultSource(mount="kv", path="bytes", field="disk", base64=True)
    assert await refused(settings(), wrong) == "the field is not base64"


async def test_the_namespace_is_named(pki: Pki, pair: Pair, settings: Callable[..., VaultSettings]) -> None:
    with fake_vault(pair, TOKEN, namespace="team/a") as server:
        server.secrets["kv", "guests/web"] = [{"disk": SECRET}]
        there = settings(address=server.address, ca=pki.owner_ca, namespace="team/a")
        assert await VaultSecrets(there).read(SOURCE) == SECRET.encode()
        assert await refused(settings(address=server.address)) == "Vault answers 403"


async def test_the_token_is_read_anew_each_time(
    settings: Callable[..., VaultSettings], vault: FakeVault, tmp_path: Path
) -> None:
    secrets = VaultSecrets(settings())
    assert await secrets.read(SOURCE)
    vault.token = "hvs.the-next"
    with pytest.raises(Unavailable, match="Vault answers 403"):
        await secrets.read(SOURCE)
    write_token(tmp_path / "token", "hvs.the-next")
    assert await secrets.read(SOURCE) == SECRET.encode()


async def test_a_token_that_others_can_read_or_that_is_none_is_not_used(
    settings: Callable[..., VaultSettings], vault: FakeVault, tmp_path: Path
) -> None:
    path = tmp_path / "token"
    path.chmod(0o640)
    assert "can be used by others (mode 0640)" in await refused(settings())
    path.chmod(0o600)
    for content in (f"{TOKEN}\nand more", f"{TOKEN}\0", "", "t\u00f6ken", "x" * 5000):
        path.write_text(content)
        assert (await refused(settings())).startswith("token_file: ")
    path.unlink()
    assert "no such file" in await refused(settings())
    assert vault.heard == []


MISSING = [
    (VaultSource(mount="kv", path="none", field="disk"), "Vault answers 404"),
    (VaultSource(mount="other", path="guests/web", field="disk"), "Vault answers 404"),
    (VaultSource(mount="kv", path="guests/web", field="disk", version=3), "Vault answers 404"),
    (VaultSource(mount="kv", path="guests/web", field="none"), "has no such field of text"),
    (VaultSource(mount="kv", path="guests/web", field="other", version=1), "has no such field of text"),
    (VaultSource(mount="kv", path="guests/web", field="empty"), "the field is empty"),
]


@pytest.mark.parametrize(("source", "sentence"), MISSING)
async def test_what_is_not_there_is_unavailable(
    settings: Callable[..., VaultSettings], source: VaultSource, sentence: str
) -> None:
    assert await refused(settings(), source) == sentence


async def test_a_deleted_version_is_unavailable_and_an_older_one_is_not(
    settings: Callable[..., VaultSettings], vault: FakeVault
) -> None:
    vault.secrets["kv", "guests/web"][1] = None
    assert await refused(settings()) == "Vault answers 404"
    older = VaultSource(mount="kv", path="guests/web", field="disk", version=1)
    assert await VaultSecrets(settings()).read(older) == b"old"


def version(number: int, data: Any, **metadata: Any) -> dict[str, Any]:
    return {"data": {"data": data, "metadata": {"version": number, **metadata}}}


NOT_KV2 = "Vault's answer is not one of the key-value engine, version 2"
OTHER_ANSWERS: list[tuple[int, Any, str]] = [
    (403, {"errors": [SECRET, TOKEN]}, "Vault answers 403"),
    (404, b"", "Vault answers 404"),
    (429, {"errors": []}, "Vault answers 429"),
    (500, {"errors": [f"failed with {TOKEN}"]}, "Vault answers 500"),
    (500, b"[]", "Vault answers 500"),
    (503, SECRET.encode(), "Vault answers 503"),
    (204, b"", "Vault answers 204"),
    (201, version(2, {"disk": SECRET}), "Vault answers 201"),
    (200, b"", NOT_KV2),
    (200, b"\xff\xfe" + SECRET.encode(), NOT_KV2),
    (200, f'{{"data": "{SECRET}'.encode(), NOT_KV2),
    (200, b"[" * 100_000, NOT_KV2),
    (200, {"data": {"disk": SECRET}}, NOT_KV2),  # version 1
    (200, version(2, [SECRET]), NOT_KV2),
    (200, version(2, None), "that version is deleted"),
    (200, version(2, {"disk": SECRET}, destroyed=True), "that version is deleted"),
    (200, version(2, {"disk": SECRET}, deletion_time="2026-01-01T00:00:00Z"), "that version is deleted"),
    (200, version(3, {"disk": SECRET}), "Vault answers with another version"),
    (200, version(2, {"disk": {"text": SECRET}}), "has no such field of text"),
    (200, b'{"data": {"data": {"disk": "\\ud800"}, "metadata": {"version": 2}}}', NOT_KV2),
]


@pytest.mark.parametrize(("status", "body", "sentence"), OTHER_ANSWERS)
async def test_any_other_answer_is_no_secret_and_is_not_quoted(
    settings: Callable[..., VaultSettings], vault: FakeVault, status: int, body: Any, sentence: str
) -> None:
    source = VaultSource(mount="kv", path="guests/web", field="disk", version=2)
    vault.answers = lambda handler: say(handler, status, body)
    assert await refused(settings(), source) == sentence
    vault.answers = lambda handler: say(handler, 200, version(2, {"disk": SECRET}))
    assert await VaultSecrets(settings()).read(source) == SECRET.encode()


@pytest.mark.parametrize("status", [301, 302, 307, 308])
async def test_a_redirect_is_not_followed(
    settings: Callable[..., VaultSettings], vault: FakeVault, pair: Pair, status: int
) -> None:
    with fake_vault(pair, TOKEN) as elsewhere:
        elsewhere.secrets["kv", "guests/web"] = [{"disk": SECRET}]
        there = f"{elsewhere.address}/v1/kv/data/guests/web"
        vault.answers = lambda handler: say(handler, status, b"", Location=there)
        assert await refused(settings()) == f"Vault answers {status}"
        assert elsewhere.heard == []
        assert await VaultSecrets(settings(address=elsewhere.address)).read(SOURCE)  # it would have answered


@pytest.mark.parametrize("answers", [say_nothing, say_slowly])
async def test_who_does_not_come_to_an_end_is_not_waited_for(
    settings: Callable[..., VaultSettings], vault: FakeVault, answers: Callable[[BaseHTTPRequestHandler], None]
) -> None:
    vault.answers = answers
    secrets = VaultSecrets(settings(timeout=0.2))
    async with asyncio.timeout(PATIENCE):
        # More at once than there are threads.
        ends = await asyncio.gather(*(secrets.read(SOURCE) for _ in range(20)), return_exceptions=True)
    assert {end.reason for end in ends if isinstance(end, Unavailable)} == {Reason.SECRET_UNAVAILABLE}
    assert all(isinstance(end, Unavailable) for end in ends)
    vault.answers = None
    assert await VaultSecrets(settings()).read(SOURCE) == SECRET.encode()


def test_a_thread_comes_back_from_who_does_not_come_to_an_end(
    settings: Callable[..., VaultSettings], vault: FakeVault
) -> None:
    vault.answers = say_slowly
    with pytest.raises(Unavailable, match="comes too slowly"):
        ask(settings(timeout=2), TOKEN, SOURCE)  # which is also for connecting
    vault.answers = say_without_end
    with pytest.raises(Unavailable, match="is too large"):
        ask(settings(), TOKEN, SOURCE)
    vault.answers = say_half
    with pytest.raises(OSError, match="broken off"):
        ask(settings(), TOKEN, SOURCE)


async def test_no_more_is_given_on_than_can_ever_be_released(
    settings: Callable[..., VaultSettings], vault: FakeVault
) -> None:
    vault.secrets["kv", "guests/web"] = [{"disk": "x" * (BODY_MAX - 1000)}, {"disk": "x" * 0x4001}]
    assert len(await VaultSecrets(settings()).read(SOURCE)) == 0x4001
    first = VaultSource(mount="kv", path="guests/web", field="disk", version=1)
    assert len(await VaultSecrets(settings()).read(first)) == 0x4001
    vault.secrets["kv", "guests/web"].append({"disk": "x" * (BODY_MAX + 1)})
    assert await refused(settings()) == "Vault's answer is too large"


@contextmanager
def impostor(pki: Pki, how: str) -> Iterator[FakeVault]:
    """A server that would take the token and answer, and is not the one that was meant."""
    pairs: dict[str, Callable[[], Pair | None]] = {
        "another CA": lambda: pki.forge(Role.VERIFIER, authority=pki.stranger()),
        "another name": lambda: pki.forge(Role.VERIFIER, names=[]),
        "expired": lambda: pki.forge(Role.VERIFIER, ends=timedelta(minutes=-1)),
        "no TLS": lambda: None,
    }
    with fake_vault(pairs[how](), TOKEN) as server:
        server.secrets["kv", "guests/web"] = [{"disk": SECRET}]
        yield server


@pytest.mark.parametrize("how", ["another CA", "another name", "expired", "no TLS"])
async def test_who_is_not_the_vault_that_was_meant_gets_no_token(
    settings: Callable[..., VaultSettings], pki: Pki, how: str
) -> None:
    with impostor(pki, how) as server:
        assert (await refused(settings(address=server.address))).startswith("Vault cannot be asked (")
        assert server.heard == []


async def test_the_system_s_own_roots_do_not_make_up_for_a_ca_that_is_not_named(
    settings: Callable[..., VaultSettings], vault: FakeVault
) -> None:
    assert "SSLError" in await refused(settings(ca=None))
    assert vault.heard == []


async def test_the_environment_has_no_say(
    settings: Callable[..., VaultSettings], vault: FakeVault, pki: Pki, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "VAULT_ADDR"):
        monkeypatch.setenv(name, "https://127.0.0.1:9")
    monkeypatch.setenv("VAULT_TOKEN", "another")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "none"))
    assert await VaultSecrets(settings()).read(SOURCE) == SECRET.encode()
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(pki.owner_ca))
    assert "SSLError" in await refused(settings(ca=None))
    assert [token for _, _, token in vault.heard] == [TOKEN]


async def test_nobody_there_is_unavailable(settings: Callable[..., VaultSettings], pair: Pair) -> None:
    with fake_vault(pair, TOKEN) as server:
        gone = server.address
    assert await refused(settings(address=gone)) == "Vault cannot be asked (ConnectionError)"
    assert (await refused(settings(ca=Path("/none")))).startswith("Vault cannot be asked (")


@pytest.mark.parametrize(
    "address",
    [
        *("http://vault.example:8200", "vault.example", "https://", "https://user:pw@vault.example", "https://v:0"),
        *("https://v:x", "https://v/path", "https://v?x", "https://v#x", "https://\u00e4.example", "https://[v", ""),
    ],
)
def test_an_address_is_https_host_and_port(address: str) -> None:
    VaultSettings(address="https://vault.example:8200/", token_file=Path("token"))
    with pytest.raises(InvalidInput, match=r"^vault\.address: ") as caught:
        VaultSettings(address=address, token_file=Path("token"))
    assert caught.value.reason is Reason.INVALID_CONFIGURATION
