"""Rows for the tests of stores: a launch, its end, and what the owner asks, each complete and easy to vary."""

from __future__ import annotations

import hmac
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

from verifier.library.sealed import DocumentSeal
from verifier.store.rows import (
    AdminRequest,
    AuditRow,
    DocumentRow,
    DocumentSet,
    LaunchRow,
    Move,
    Opening,
    Packet,
    PdhSighting,
    RequestKey,
    RequestRow,
    SealedKeys,
    Spending,
)

NOW = datetime(2026, 3, 1, tzinfo=UTC)
OWNER = "spiffe://owner.example/admin"


def _tag(words: bytes) -> bytes:
    return hmac.digest(b"d" * 32, words, "sha256")


class OneByOne(DocumentSeal):
    """Revisions that a test can count."""

    def next_revision(self, changed: DocumentSet) -> int:
        """One more."""
        return changed.revision + 1


SEAL = OneByOne(_tag)
KEY_ID, OTHER_KEY_ID = b"12345678", b"abcdefgh"


def sealed(words: bytes, key_id: bytes = KEY_ID) -> bytes:
    """What looks like a blob that `verifier.keys` sealed: version, key id, the rest."""
    return b"\1" + key_id + b"n" * 12 + words


TEK, TIK, GENERATED = sealed(b"sealed TEK" * 4), sealed(b"sealed TIK" * 4), sealed(b"sealed generated")


def audit(
    event: str = "launch.begun", launch_id: UUID | None = None, time: datetime = NOW, body: str = '{"a":1}'
) -> AuditRow:
    """An audit record."""
    return AuditRow(audit_id=uuid4(), time=time, event=event, launch_id=launch_id, caller="c", reason=None, body=body)


def opening(
    *,
    caller: str = "c",
    create: datetime = NOW,
    expire: datetime = NOW + timedelta(minutes=10),
    cap: int = 10,
    revision: int = 0,
    spending: Spending | None = None,
    workload: str = "web",
) -> Opening:
    """A new launch."""
    launch_id = uuid4()
    launch = LaunchRow(
        launch_id=launch_id,
        caller=caller,
        state="open",
        workload=workload,
        workload_version="1",
        terms_id=b"t" * 32,
        platform_id=b"p" * 32,
        generation="milan",
        fingerprint="f" * 64,
        policy=0xFFFF000F,
        godh=b"g" * 2084,
        session=b"s" * 128,
        pdh_fingerprint=b"h" * 32,
        keys=SealedKeys(key_id=KEY_ID, tek=TEK, tik=TIK),
        create_time=create,
        expire_time=expire,
        grant=None if spending is None else spending.grant,
        chip_id="c" * 128,
        oca="0" * 64,
    )
    key = RequestKey(caller=caller, method="BeginLaunch", request_id=uuid4())
    return Opening(
        launch=launch,
        terms=b"{}",
        chain=b"c" * 8336,
        request=RequestRow(key=key, content=b"0" * 32, launch_id=launch_id),
        audit=audit(launch_id=launch_id, time=create),
        open_cap=cap,
        revision=revision,
        spending=spending,
    )


def release(
    launch_id: UUID,
    *,
    time: datetime = NOW,
    caller: str = "c",
    revision: int | None = 0,
    spending: Spending | None = None,
    sighting: PdhSighting | None = None,
) -> Move:
    """The release of a launch."""
    key = RequestKey(caller=caller, method="ReleaseSecret", request_id=uuid4())
    return Move(
        launch_id=launch_id,
        expected="open",
        to="released",
        time=time,
        in_time=True,
        measurement=b"m" * 48,
        digest=b"d" * 32,
        packet=Packet(header=b"H" * 52, payload=b"P" * 64, receipt="{}"),
        generated=GENERATED,
        request=RequestRow(key=key, content=b"1" * 32, launch_id=launch_id),
        audit=audit("launch.released", launch_id, time),
        revision=revision,
        spending=spending,
        firmware=(1, 55, 24),
        sighting=sighting,
    )


def expiry(launch_id: UUID, *, time: datetime = NOW, spending: Spending | None = None) -> Move:
    """The end of a launch whose time has run out."""
    return Move(
        launch_id=launch_id,
        expected="open",
        to="expired",
        time=time,
        overdue=True,
        audit=audit("launch.expired", launch_id, time),
        spending=spending,
    )


def admin_request(method: str = "ApplyDocument") -> AdminRequest:
    """A request of the owner's."""
    key = RequestKey(caller=OWNER, method=method, request_id=uuid4())
    return AdminRequest(key=key, content=b"2" * 32, answer='{"ok":true}')


def document(
    name: str = "web", version: str = "1", text: bytes = b"kind: Workload", *, kind: str = "Workload"
) -> DocumentRow:
    """A document."""
    return DocumentRow(kind=kind, name=name, version=version, text=text, is_json=False, apply_time=NOW)
