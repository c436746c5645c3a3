"""Secrets, TEKs, TIKs, the key file and the verifier's own keys are nowhere but where they belong, whatever happens.

A verifier lives through everything that it knows: documents and secrets from its owner, launches of every end, every
source of secrets, malformed requests, outages of its store and of Vault, and crashes. Then all that it wrote and said
is looked through: its log (with all that gRPC has to say), its files or the whole of PostgreSQL's (which logs each
statement with its values), temporary files, every answer and every error to the last byte of its metadata, and what the
owner's commands print. The TEKs and TIKs are known from the host's half, which is the emulator's code.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import resource
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import grpc
import pytest
from cryptography.hazmat.primitives.serialization import load_der_private_key, load_pem_private_key

from common.rpc.identity import Role
from sevattest.v1 import platform_pb2, reason_pb2, verifier_service_pb2
from tests.cli.transcripts import run
from tests.integration.test_verifier_service import begin, release
from tests.support.desk import Guest
from tests.support.documents import CALLER, grant, revocation, workload, write_document
from tests.support.eventually import until
from tests.support.fake_vault import FakeVault, fake_vault, write_token
from tests.support.metrics import Page, scrape, where
from tests.support.owner_process import owner_environ
from tests.support.postgres import Server, start_server
from tests.support.spellings import files_in, leaks, planted
from tests.support.verifier_process import ServingVerifier, VerifierSite, proc
from verifier.config import load_config
from verifier.keys.base import identity_place
from verifier.keys.file import FileKey
from verifier.keys.identities import PSEUDONYM, SIGNING
from verifier.library.artefacts import ArtefactShelf
from verifier.library.documents import snapshot
from verifier.library.folder import read_folder
from verifier.library.prepared import prepare
from verifier.parts import make_store

pytestmark = pytest.mark.slow
TOKEN = "hvs.canary-" + os.urandom(12).hex()
GUIDS = [f"43ced044-42ec-487a-88b7-261bda359f{number:02x}" for number in range(4)]


# PostgreSQL writes every statement down, with every value that was bound to it.
TALKATIVE = ("log_statement=all", "log_min_messages=debug1", "log_parameter_max_length_on_error=-1")


@dataclass(kw_only=True)
class Life:
    """A verifier's, from its first start to its last.

    Attributes:
        site: its folder, identities and platform.
        vault: what it asks for one of the secrets.
        secrets: by name, what may show nowhere.
        said: everything that it, or a command beside it, answered.
        pages: its metrics, as they were read now and then.
        server: its PostgreSQL; None for SQLite.
    """

    site: VerifierSite
    vault: FakeVault
    server: Server | None
    secrets: dict[str, bytes] = field(default_factory=dict)
    said: list[bytes] = field(default_factory=list)
    pages: list[bytes] = field(default_factory=list)
    serving: ServingVerifier | None = None
    stub: Any = None

    @property
    def folder(self) -> Path:
        return self.site.folder

    @contextlib.asynccontextmanager
    async def served(self) -> AsyncIterator[ServingVerifier]:
        """From a start to whatever end."""
        (self.folder / "tmp").mkdir(exist_ok=True)
        environ = {"GRPC_VERBOSITY": "debug", "TMPDIR": str(self.folder / "tmp")}
        with self.site.serve(environ=environ) as serving:
            async with self.site.channel(serving.address) as channel:
                self.serving, self.stub = serving, self.site.stub(channel)
                yield serving

    async def ask(self, method: Callable[..., Any], request: Any) -> Any:
        """Call, and keep what came back to the last byte; None for an error."""
        try:
            answer = await method(request, timeout=20)
        except grpc.aio.AioRpcError as error:
            metadata = (*(error.initial_metadata() or ()), *(error.trailing_metadata() or ()))
            self.said += [repr(error).encode(), (error.details() or "").encode()]
            self.said += [part if isinstance(part, bytes) else part.encode() for pair in metadata for part in pair]
            return None
        self.said += [answer.SerializeToString(), repr(answer).encode()]
        return answer

    async def owner(self, *words: str | Path) -> int:
        """Run a command of the owner's."""
        assert self.serving is not None
        assert self.serving.admin is not None
        environ = owner_environ(self.site.pki, self.serving.admin)
        said = await asyncio.to_thread(run, "owner", *words, environ=environ)
        self.said += [said.out.encode(), said.err.encode()]
        return said.code

    async def monitored(self) -> Page:
        """Its metrics as they stand."""
        page = await scrape(where(self.folder / "log"))
        self.pages.append(page.text.encode())
        return page

    async def apply(self, content: dict[str, Any]) -> None:
        """Have the owner apply a document."""
        file = write_document(self.folder / "inputs", content, "document.yaml")
        assert await self.owner("apply", "-f", file) == 0, self.said[-1]

    async def begun(self, name: str = "web", **changes: Any) -> tuple[Any, Guest]:
        """A launch with its guest; its keys are secrets from now on."""
        begun = await self.ask(self.stub.BeginLaunch, begin(self.site, workload=name, **changes))
        assert begun is not None, self.said[-8:]
        guest = Guest.start(self.site.platform, begun)
        launch = begun.launch.launch_id
        self.secrets |= {f"TEK of {launch}": guest.channel.tek, f"TIK of {launch}": guest.channel.tik}
        return begun, guest

    def digest(self, name: str = "web") -> bytes:
        """A launch digest that the owner allows."""
        documents = snapshot(0, read_folder(self.folder / "documents"))
        return prepare(documents.workloads[name][0], ArtefactShelf()).references[0].digest

    async def release(self, begun: Any, guest: Guest, digest: bytes | None = None) -> dict[UUID, bytes]:
        """Release, and what the guest reads then; nothing where it was refused."""
        blob = guest.measure(self.digest() if digest is None else digest)
        answer = await self.ask(self.stub.ReleaseSecret, release(begun, blob))
        if answer is None:
            return {}
        return {entry.guid: entry.data for entry in guest.open(answer, blob)}

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    async def logged(self, event: str, times: int = 1) -> None:
        await until(lambda: self.log.count(f'"event":"{event}"') >= times)

    def places(self) -> dict[str, bytes]:
        """All that was written and said so far, but for the files that the owner keeps secrets in."""
        meant = ("kek.bin", "documents/secret", "vault-token", "inputs", "pki")
        folders = [self.folder] if self.server is None else [self.folder, self.server.folder]
        places = files_in(*folders, but=[self.folder / each for each in meant])
        return places | {"answers": b"\n".join(self.said), "metrics": b"\n".join(self.pages)}

    def check(self) -> None:
        """That nothing shows anywhere."""
        assert leaks(self.secrets, self.places()) == []


def make_site(folder: Path, server: Server | None) -> tuple[VerifierSite, dict[str, bytes]]:
    """Everything that a verifier needs but its Vault, with secrets that nobody else has."""
    secrets = {name: os.urandom(24) for name in ("file", "stored")}
    secrets |= {"vault": base64.b32encode(os.urandom(20)), "KEK": os.urandom(32), "Vault's token": TOKEN.encode()}
    sources: list[Any] = [
        {"file": "secret"},
        {"stored": "disk"},
        {"vault": {"mount": "kv", "path": "web", "field": "disk"}},
        {"generated": "bytes"},
    ]
    named = [{"guid": guid, "source": source} for guid, source in zip(GUIDS, sources, strict=True)]
    web = workload(secrets=named)
    site = VerifierSite.make(folder, dsn=None if server is None else server.dsn, owners=True, content=web)
    write_document(folder / "documents", workload("brief", secrets=named[:1], lifetime="10s"), "brief.yaml")
    (folder / "documents" / "secret").write_bytes(secrets["file"])
    (folder / "kek.bin").write_bytes(secrets["KEK"])
    (folder / "inputs").mkdir()
    (folder / "inputs" / "stored").write_bytes(secrets["stored"])
    key = site.pki.issue(Role.VERIFIER, "v").key.read_bytes()
    # Of PKCS#8 the last bytes are the public key, which certificates show; before it comes the private number.
    private: Any = load_pem_private_key(key, password=None)
    secrets["TLS key"] = private.private_numbers().private_value.to_bytes(private.key_size // 8, "big")
    return site, secrets


@contextlib.contextmanager
def vault_of(site: VerifierSite, secret: bytes) -> Iterator[FakeVault]:
    """A Vault that the verifier's configuration names."""
    pair = site.pki.issue(Role.VERIFIER, "vault", ip=["127.0.0.1"])
    write_token(site.folder / "vault-token", TOKEN)
    with fake_vault(pair, TOKEN) as vault:
        vault.secrets["kv", "web"] = [{"disk": secret.decode()}]
        site.config.write_text(
            f'{site.config.read_text()}\n[vault]\naddress = "{vault.address}"\ntoken_file = "vault-token"\n'
            f'ca = "{site.pki.owner_ca}"\n[limits]\nsweep_interval = 1\n[audit]\ncheckpoint_records = 1\n'
            '[metrics]\nlisten = "127.0.0.1:0"\n'
        )
        yield vault


@pytest.fixture(params=["sqlite", "postgres"])
def life(request: pytest.FixtureRequest) -> Iterator[Life]:
    # Not tmp_path: a unix socket's path has at most 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="sevattest-l-"))
    try:
        with contextlib.ExitStack() as stack:
            server = None
            if request.param == "postgres":
                server = stack.enter_context(contextlib.contextmanager(start_server)(*TALKATIVE))
            site, secrets = make_site(folder, server)
            vault = stack.enter_context(vault_of(site, secrets["vault"]))
            yield Life(site=site, vault=vault, server=server, secrets=secrets)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def owners_day(life: Life) -> None:
    """What an owner does over the network."""
    inputs = life.folder / "inputs"
    assert await life.owner("secret", "put", "disk", "--file", inputs / "stored") == 0
    await life.apply(grant())
    await life.apply(revocation())
    await life.apply(workload("shop", secrets=[{"guid": GUIDS[1], "source": {"stored": "disk"}}]))
    outside = workload("evil", secrets=[{"guid": GUIDS[0], "source": {"file": str(life.folder / "kek.bin")}}])
    assert await life.owner("apply", "-f", write_document(inputs, outside, "evil.yaml")) == 2
    # A secret in a document's place, and in a name's: neither is to be repeated.
    assert await life.owner("apply", "-f", inputs / "stored") == 2
    (inputs / "large").write_bytes(life.secrets["stored"] * 1000)
    assert await life.owner("secret", "put", "disk", "--file", inputs / "large") == 2


async def launches_of_every_end(life: Life) -> None:
    """Released, refused, abandoned; with one source away; under a grant; and requests that are none."""
    host = life.site.platform
    evidence = platform_pb2.PlatformEvidence(chain=host.chain.to_bytes(), chip_id=host.chip_id)
    begun, guest = await life.begun(platform=evidence)
    read = await life.release(begun, guest)
    assert read, life.said[-8:]
    assert [read[UUID(guid)] for guid in GUIDS[:3]] == [life.secrets[name] for name in ("file", "stored", "vault")]
    life.secrets["generated"] = read[UUID(GUIDS[3])]
    assert not await life.release(begun, guest)
    begun, guest = await life.begun()
    assert not await life.release(begun, guest, bytes(32))
    begun, guest = await life.begun()
    gone = verifier_service_pb2.AbandonLaunchRequest(
        request_id=str(uuid4()), launch_id=begun.launch.launch_id, reason=reason_pb2.REASON_GUEST_GONE
    )
    assert await life.ask(life.stub.AbandonLaunch, gone)
    begun, guest = await life.begun()
    life.vault.answers = _unwell
    assert not await life.release(begun, guest)
    life.vault.answers = None
    life.secrets["generated again"] = (await life.release(begun, guest))[UUID(GUIDS[3])]
    begun, guest = await life.begun()
    (life.folder / "documents" / "secret").write_bytes(life.secrets["file"] * 200)
    assert not await life.release(begun, guest)
    (life.folder / "documents" / "secret").write_bytes(life.secrets["file"])
    await malformed(life, begun, guest)


def _unwell(handler: Any) -> None:
    handler.send_error(500)


async def malformed(life: Life, begun: Any, guest: Guest) -> None:
    """Keys and secrets in the place of everything else."""
    key = guest.channel.tek + guest.channel.tik
    for changes in ({"measurement": key}, {"launch_id": key.hex()}, {"request_id": life.secrets["KEK"].hex()}):
        assert await life.ask(life.stub.ReleaseSecret, release(begun, bytes(48), **changes)) is None
    evidence = platform_pb2.PlatformEvidence(chain=life.secrets["file"] * 300)
    for fields in ({"platform": evidence}, {"workload": key.hex()}, {"grant": life.secrets["stored"].hex()}):
        assert await life.ask(life.stub.BeginLaunch, begin(life.site, **fields)) is None


async def outages(life: Life) -> None:
    """The store goes away under a call, and the documents and the key file are bad at a SIGHUP."""
    assert life.serving is not None
    begun, guest = await life.begun()
    if life.server is not None:
        life.server.stop()
        assert not await life.release(begun, guest)
        life.server.start(*TALKATIVE)
    else:
        # A disk that takes nothing more.
        pid = life.serving.process.pid
        before = resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        assert not await life.release(begun, guest)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)
    blob = guest.measure(life.digest())
    answer, request = None, release(begun, blob)
    async with asyncio.timeout(60):
        while answer is None:
            answer = await life.ask(life.stub.ReleaseSecret, request)
    life.secrets["generated late"] = {e.guid: e.data for e in guest.open(answer, blob)}[UUID(GUIDS[3])]
    bad = write_document(life.folder / "documents", workload("bad", callers=[life.secrets["stored"].hex()]), "bad.yaml")
    (life.folder / "kek.bin").write_bytes(life.secrets["KEK"][:31])
    life.serving.process.send_signal(signal.SIGHUP)
    await life.logged("documents.refused")
    await life.logged("keys.refused")
    (life.folder / "kek.bin").write_bytes(life.secrets["KEK"])
    bad.unlink()


async def end_of_day(life: Life) -> None:
    """What the owner reads in the evening: everything."""
    for words in (
        ("secret", "list"),
        ("launches", "list"),
        ("get", "workload"),
        ("describe", "workload", "shop"),
        ("simulate", "--workload", "web", "--caller", CALLER, "--json"),
        ("audit", "list", "--json"),
        ("audit", "verify"),
        ("keys",),
    ):
        assert await life.owner(*words) in {0, 1, 2}
    records = next(each for each in life.said if each.startswith(b"{") and b"launch.released" in each)
    assert b"secret.put" in records


async def crash(serving: ServingVerifier, number: signal.Signals) -> int:
    """End the process as a defect would; how it ended, as waitid(2) has it."""
    serving.process.send_signal(number)
    ended = await asyncio.to_thread(os.waitid, os.P_PID, serving.process.pid, os.WEXITED | os.WNOWAIT)
    assert ended is not None
    assert ended.si_status == number
    return ended.si_code


async def own_keys(life: Life) -> dict[str, bytes]:
    """The verifier's own keys, opened as only the key file opens them."""
    store = make_store(load_config(life.site.config, {}))
    await store.open()
    try:
        opened = {}
        for name in (SIGNING, PSEUDONYM):
            sealed = await store.identity(name)
            assert sealed is not None
            opened[name] = FileKey(life.secrets["KEK"]).unseal(sealed, identity_place(name))
    finally:
        await store.close()
    signing: Any = load_der_private_key(opened[SIGNING], password=None)
    return {"pseudonym": opened[PSEUDONYM], "signing": signing.private_numbers().private_value.to_bytes(32, "big")}


async def test_nothing_secret_shows_anywhere_in_a_verifiers_whole_life(life: Life) -> None:
    async with life.served() as serving:
        assert b"GRPC_VERBOSITY=debug" in proc(serving.process.pid, "environ")
        await owners_day(life)
        expiring, _ = await life.begun("brief")
        await launches_of_every_end(life)
        await outages(life)
        told = await life.monitored()
        open_still, guest = await life.begun()
        # As it is while it serves: keys of open launches in the store, a WAL that was not written back.
        life.check()
        assert await crash(serving, signal.SIGSEGV) == os.CLD_KILLED
    async with life.served() as serving:
        life.secrets["generated last"] = (await life.release(open_still, guest))[UUID(GUIDS[3])]
        await life.logged("launch.expired")
        assert expiring.launch.launch_id in life.log
        await end_of_day(life)
        await life.monitored()
        assert await crash(serving, signal.SIGABRT) == os.CLD_KILLED
    async with life.served() as serving:
        assert serving.stop() == 0
    life.secrets |= await own_keys(life)
    life.check()
    assert list(life.folder.rglob("core*")) == []
    for event in ("launch.released", "launch.refused", "launch.abandoned", "source.unavailable", "secret.put"):
        assert f'"event":"{event}"' in life.log, event
    assert len(life.secrets) > 20
    for sample in ("sevattest_audit_records_total", "sevattest_rpc_errors_total", "sevattest_audit_refusals_total"):
        assert told.of(sample) > 0, sample
    chip = {"chip id": life.site.platform.chip_id, "CEK": life.site.platform.chain.cek.fingerprint}
    assert leaks(chip, {"metrics": b"\n".join(life.pages)}) == []
    assert b"chip:" not in b"\n".join(life.pages)
    if life.server is not None:
        assert b"parameters: $1 = " in (life.server.folder / "log").read_bytes().lower()
    prove_the_scan(life)


def prove_the_scan(life: Life) -> None:
    """That each spelling of each secret would have been found, in a copy of what was looked through."""
    where, place = max(life.places().items(), key=lambda item: len(item[1]))
    half = 1 << 15  # enough of it to be found in
    for name, secret in life.secrets.items():
        for how, text in planted(secret):
            copy = {where: place[:half] + text + place[-half:]}
            assert leaks({name: secret}, copy) == [f"{name} in {where}"], how
