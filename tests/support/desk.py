"""The guest owner's desk without network: broker and releaser over a real store, and a host's platform beside it.

The host's half (unwrapping the session, measuring, opening the packet) is the emulator's code, written apart from the
owner's. The clock stands still unless a test moves it.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
import yaml

from common.amd.kds import KeyService
from common.audit.jws import RECEIPT_TYPE, read_key_set, verify_jws
from common.errors import SevattestError
from common.sev.measurement import FirmwareVersion, MeasurementBlob
from common.sev.secret import SecretEntry, parse_table
from common.telemetry.log import Log
from common.telemetry.metrics import UNMEASURED, Meter
from emulator import channel
from tests.support.chains import SyntheticPlatform, make_platform
from tests.support.documents import CALLER, write_artefacts, write_document
from tests.support.documents import workload as document
from tests.support.recording_log import RecordingLog
from tests.support.rpc import SettableClock
from verifier.admin.desks import owner_desks
from verifier.admin.requests import Asked
from verifier.config import LimitsConfig
from verifier.documents.rate import Rate
from verifier.keys.file import FileKey
from verifier.keys.identities import load_identities
from verifier.launches.allowances import Allowances
from verifier.launches.broker import Broker
from verifier.launches.dependencies import Dependencies, no_step
from verifier.launches.launch import AbandonRequest, BeginRequest, Begun, Launch, Released, ReleaseRequest
from verifier.launches.platforms import DenyList, PlatformVerifier
from verifier.launches.records import Recorder
from verifier.launches.release import Releaser
from verifier.launches.reports import ReportVerifier
from verifier.launches.timekeeper import Timekeeper
from verifier.library.library import Library
from verifier.library.sealed import DocumentSeal
from verifier.secrets.router import Secrets
from verifier.secrets.stored import StoredSecrets
from verifier.store.rows import AuditRow
from verifier.store.sqlite import SqliteStore, read_audit
from verifier.store.sqlite_file import FILE_NAME

OWNER = "spiffe://owner.example/owner/alice"
VERIFIER = "spiffe://owner.example/verifier/v"
START = datetime(2026, 3, 1, 12, tzinfo=UTC)
FIRMWARE = FirmwareVersion(1, 55, 24)
KEK = bytes(range(32))
ALLOWANCE = LimitsConfig().allowance


async def refused(step: Awaitable[object]) -> SevattestError:
    """The error that a step ends with; without one the test fails."""
    with pytest.raises(SevattestError) as caught:
        await step
    return caught.value


@dataclass(kw_only=True)
class Guest:
    """A guest on the host, started from what the owner answered."""

    channel: channel.Channel
    policy: int
    nonce: bytes = field(default_factory=lambda: os.urandom(16))

    @classmethod
    def start(cls, platform: SyntheticPlatform, begun: Begun, policy: int | None = None) -> Guest:
        """LAUNCH_START; with another policy it fails as firmware fails it."""
        wanted = begun.policy if policy is None else policy
        opened = channel.open_channel(pdh_key=platform.keys.pdh, godh=begun.godh, session=begun.session, policy=wanted)
        return cls(channel=opened, policy=wanted)

    @classmethod
    def without_session(cls, policy: int) -> Guest:
        """A guest of the host's own, with the all-zero keys of a launch without a session."""
        return cls(channel=channel.Channel.without_session(), policy=policy)

    def measure(self, digest: bytes, firmware: FirmwareVersion = FIRMWARE, *, policy: int | None = None) -> bytes:
        """LAUNCH_MEASURE: the blob of 48 bytes."""
        word = self.policy if policy is None else policy
        hmac = channel.measure(self.channel.tik, firmware[:2], firmware.build, word, digest, self.nonce)
        return hmac + self.nonce

    def open(self, released: Released, blob: bytes) -> tuple[SecretEntry, ...]:
        """LAUNCH_SECRET and what Linux makes of the table; fails as firmware fails a packet for another launch."""
        table = channel.open_packet(
            self.channel,
            header=released.header,
            payload=released.payload,
            guest_length=len(released.payload),
            measurement=blob[:32],
        )
        return parse_table(table)


@dataclass(kw_only=True)
class Desk:
    """Everything of one owner, ready to be asked."""

    folder: Path
    documents: Path
    clock: SettableClock
    log: RecordingLog
    platform: SyntheticPlatform
    store: SqliteStore
    library: Library
    denied: DenyList
    dependencies: Dependencies
    broker: Broker
    releaser: Releaser
    reports: ReportVerifier

    async def begin(
        self,
        *,
        caller: str = CALLER,
        workload: str = "web",
        request_id: UUID | None = None,
        chain: bytes | None = None,
        chip_id: bytes = b"",
        grant: str | None = None,
    ) -> Begun:
        """Begin a launch on the host's platform."""
        return await self.broker.begin(
            BeginRequest(
                caller=caller,
                request_id=request_id or uuid4(),
                chain=self.platform.chain.to_bytes() if chain is None else chain,
                chip_id=chip_id,
                workload=workload,
                grant=grant,
            )
        )

    def start(self, begun: Begun) -> Guest:
        """Start a guest from the owner's answer."""
        return Guest.start(self.platform, begun)

    async def release(
        self,
        launch_id: UUID,
        blob: bytes,
        *,
        caller: str = CALLER,
        firmware: FirmwareVersion = FIRMWARE,
        request_id: UUID | None = None,
    ) -> Released:
        """Hand in a measurement."""
        return await self.releaser.release(
            ReleaseRequest(
                caller=caller,
                request_id=request_id or uuid4(),
                launch_id=launch_id,
                blob=MeasurementBlob.parse(blob),
                firmware=firmware,
            )
        )

    async def abandon(
        self, launch_id: UUID, *, caller: str = CALLER, request_id: UUID | None = None, reason: Any = None
    ) -> Launch:
        """Give a launch up."""
        return await self.broker.abandon(
            AbandonRequest(caller=caller, request_id=request_id or uuid4(), launch_id=launch_id, reason=reason)
        )

    def write(self, content: dict[str, Any]) -> None:
        """Put a document into the owner's folder, under a name of its own; it counts from the next `library.load`."""
        name = "-".join(str(content["metadata"][part]) for part in ("name", "version"))
        write_document(self.documents, content, f"{content['kind']}-{name}.yaml")

    def remove(self, kind: str, name: str) -> None:
        """Take all versions of a document out of the owner's folder."""
        for path in self.documents.glob("*.yaml"):
            content = yaml.safe_load(path.read_text())
            if (content["kind"], content["metadata"]["name"]) == (kind, name):
                path.unlink()

    async def apply(self, content: dict[str, Any]) -> None:
        """Put a document into the store, as the owner's service does; it counts at once."""
        desks = owner_desks(self.dependencies, self.library)
        asked = Asked(caller=OWNER, request_id=uuid4())
        await desks.documents.apply(asked, yaml.safe_dump(content).encode())

    async def digests(self, workload: str = "web") -> tuple[bytes, ...]:
        """What the workload in force allows."""
        prepared = await self.library.in_force(await self.library.current(), workload)
        assert prepared is not None
        return tuple(reference.digest for reference in prepared.references)

    def receipt(self, released: Released) -> dict[str, Any]:
        """What a receipt says, its signature verified; our own claims without their prefix."""
        keys = read_key_set(json.dumps(self.dependencies.signer.jwks()).encode())
        claims = verify_jws(released.receipt, keys, typ=RECEIPT_TYPE).claims
        said: dict[str, Any] = claims["submods"]["sev"]["ear_verifier_claims"]
        return {name.removeprefix("sevattest."): value for name, value in said.items()}

    def audit(self, launch_id: UUID | None = None) -> list[AuditRow]:
        """The audit records."""
        return read_audit(self.folder / "state" / FILE_NAME, launch_id)

    async def keys_of(self, launch_id: UUID) -> object:
        """The sealed keys that the store has of a launch."""
        row = await self.store.launch(launch_id)
        assert row is not None
        return row.keys


@contextlib.asynccontextmanager
async def desk(
    folder: Path,
    *,
    content: dict[str, Any] | Sequence[dict[str, Any]] | None = None,
    platform: SyntheticPlatform | None = None,
    generation: str | None = None,
    key_service: KeyService | None = None,
    denied: Sequence[str] = (),
    open_cap: int = 100,
    allowance: Rate = ALLOWANCE,
    clock: SettableClock | None = None,
    on_step: Callable[[str], None] = no_step,
    random: Callable[[int], bytes] = os.urandom,
    write_log: Log | None = None,
    meter: Meter = UNMEASURED,
) -> AsyncIterator[Desk]:
    """A desk in `folder`; what is there from an earlier desk is found again.

    Args:
        folder: the owner's; gets `documents` and `state`.
        content: the workload documents; `document()` if absent and none was written before.
        platform: the host's; its root counts as `generation`.
        generation: what the platform's root is taken for; `emulated` if absent.
        key_service: where signed CEKs come from.
        denied: the owner's deny-list.
        open_cap: open launches a caller may have.
        allowance: how many refusals and reports of a caller are recorded.
        clock: the time.
        on_step: called between steps.
        random: random bytes.
        write_log: a log in place of the recording one.
        meter: counts what is recorded.
    """
    documents = folder / "documents"
    if not documents.exists():
        write_artefacts(documents)
        contents = [document()] if content is None else [content] if isinstance(content, dict) else content
        for index, each in enumerate(contents):
            write_document(documents, each, f"web-{index}.yaml")
    host = platform or make_platform()
    root = host.root if generation is None else replace(host.root, generation=generation, emulated=False)
    clock = clock or SettableClock(START)
    recording = RecordingLog()
    log = write_log or recording
    store = SqliteStore(folder / "state", on_step=on_step)
    await store.open(make=True)
    try:
        deny_list = DenyList(denied)
        sealing = FileKey(KEK)
        identities = await load_identities(store, sealing, os.urandom, log)
        seal = DocumentSeal(identities.documents.tag)
        library = Library(documents, store, seal, log)
        await library.load()
        dependencies = Dependencies(
            store=store,
            library=library,
            platforms=PlatformVerifier([root], key_service, log, clock),
            denied=deny_list,
            sealing=sealing,
            signer=identities.signer,
            pseudonyms=identities.pseudonyms,
            seal=seal,
            issuer=VERIFIER,
            secrets=Secrets(stored=StoredSecrets(store, sealing), random=random, log=log),
            time=Timekeeper(clock, store.last_time),
            records=Recorder(log, uuid4, meter),
            allowances=Allowances(allowance),
            random=random,
            new_id=uuid4,
            open_cap=open_cap,
            on_step=on_step,
        )
        yield Desk(
            folder=folder,
            documents=documents,
            clock=clock,
            log=recording,
            platform=host,
            store=store,
            library=library,
            denied=deny_list,
            dependencies=dependencies,
            broker=Broker(dependencies),
            releaser=Releaser(dependencies),
            reports=ReportVerifier(dependencies),
        )
    finally:
        await store.close()
