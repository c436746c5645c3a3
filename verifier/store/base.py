"""What the verifier asks of a store, and the rows that go in and out.

A store keeps launches, the requests that made them move, what was frozen for them, and the audit records. It judges
nothing: states are text that `verifier.launches.state` gives a meaning to, and sealed keys are bytes that only
`verifier.keys` can open. Each method is one transaction, durable when it returns. Every failure of the store itself is
`Unavailable(STORE_UNAVAILABLE)`: the transaction was kept as a whole or not at all, and not at all unless the disk
failed in the very commit. Whoever repeats the request finds out.

The embedded store is `verifier.store.sqlite`; a store for replicas implements the same Protocol, which is why a move is
a compare-and-set that says what it expects, and never a read followed by a write.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from typing import Protocol
from uuid import UUID


@dataclass(frozen=True, kw_only=True)
class RequestKey:
    """A request id in the scope that it is unique in: one caller, one method."""

    caller: str
    method: str
    request_id: UUID


@dataclass(frozen=True, kw_only=True)
class RequestRow:
    """A request that changed something.

    Attributes:
        key: who asked, what, under which id.
        content: SHA-256 of what was asked, 32 bytes.
        launch_id: the launch that it changed.
    """

    key: RequestKey
    content: bytes
    launch_id: UUID


@dataclass(frozen=True, kw_only=True)
class AuditRow:
    """One audit record.

    Attributes:
        audit_id: its id, which refusals carry.
        time: when it was written.
        event: what happened, for example `launch.released`.
        launch_id: the launch, where there is one.
        caller: who asked, as a SPIFFE id; None for what the verifier does by itself.
        reason: the reason's name, where the event is a refusal.
        body: everything else, as a JSON object, without secrets.
    """

    audit_id: UUID
    time: datetime
    event: str
    launch_id: UUID | None
    caller: str | None
    reason: str | None
    body: str


@dataclass(frozen=True, kw_only=True)
class SealedKeys:
    """TEK and TIK of an open launch, as `verifier.keys` sealed them."""

    key_id: bytes
    tek: bytes = field(repr=False)
    tik: bytes = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Packet:
    """What was released: ciphertext for one guest, and the words that go with it.

    Attributes:
        header: 52 bytes.
        payload: a multiple of 16 bytes.
        receipt: the receipt, a JSON object.
    """

    header: bytes = field(repr=False)
    payload: bytes = field(repr=False)
    receipt: str


@dataclass(frozen=True, kw_only=True)
class LaunchRow:
    """One launch, as it is stored.

    Attributes:
        launch_id: a random UUID.
        caller: the only caller that sees it, as a SPIFFE id.
        state: a value of `verifier.launches.state.State`.
        reason: why it ended early, a reason's name.
        terms_id: SHA-256 of the terms that were frozen for it.
        platform_id: SHA-256 of the verified chain (PDH, PEK, OCA, CEK) that it is bound to.
        keys: TEK and TIK, sealed; None unless the launch is open.
        end_time: when it reached a final state.
        measurement: the measurement blob that decided, 48 bytes.
        digest: the launch digest that it proved, 32 bytes; None unless the launch is released.
        packet: what was released; None before, and again a day after.
        audit_id: the audit record of how it ended.
    """

    launch_id: UUID
    caller: str
    state: str
    reason: str | None = None
    workload: str
    workload_version: str
    terms_id: bytes
    platform_id: bytes
    generation: str
    fingerprint: str
    policy: int
    godh: bytes = field(repr=False)
    session: bytes = field(repr=False)
    pdh_fingerprint: bytes
    keys: SealedKeys | None
    create_time: datetime
    expire_time: datetime
    end_time: datetime | None = None
    measurement: bytes | None = None
    digest: bytes | None = None
    packet: Packet | None = None
    audit_id: UUID | None = None


@dataclass(frozen=True, kw_only=True)
class Opening:
    """A new launch with all that comes into being with it.

    Attributes:
        launch: the launch.
        terms: what was frozen for it; stored once for all launches that share it.
        chain: the verified chain, 8336 bytes; stored once for all launches on that platform.
        request: the request that opens it.
        audit: the record of it.
        open_cap: how many open launches its caller may have, this one included.
    """

    launch: LaunchRow
    terms: bytes
    chain: bytes
    request: RequestRow
    audit: AuditRow
    open_cap: int


@dataclass(frozen=True, kw_only=True)
class Move:
    """The end of a launch: a compare-and-set, the erasure of its keys and the audit record, in one transaction.

    Attributes:
        launch_id: the launch.
        expected: the state that it must be in.
        to: the state that it gets.
        time: now; becomes the launch's end.
        in_time: the launch must not have expired at `time`.
        overdue: the launch must have expired at `time`.
        reason: a reason's name, where the end is a refusal or the caller's claim.
        measurement: the measurement blob that decided.
        digest: the launch digest that it proved.
        packet: what is released.
        generated: a generated secret, sealed, for the owner to find again.
        request: the request that asked for it; None for what the verifier does by itself.
        audit: the record of it.
    """

    launch_id: UUID
    expected: str
    to: str
    time: datetime
    in_time: bool = False
    overdue: bool = False
    reason: str | None = None
    measurement: bytes | None = None
    digest: bytes | None = None
    packet: Packet | None = None
    generated: bytes | None = field(default=None, repr=False)
    request: RequestRow | None = None
    audit: AuditRow


class Outcome(Enum):
    """What became of a transaction that others may race for."""

    DONE = "done"
    LOST = "lost"  # the launch was not in the expected state, or its time was not as expected
    REQUEST_TAKEN = "request taken"  # the request id is on file already
    CAP_REACHED = "cap reached"


class Store(Protocol):
    """Launches, requests, frozen terms and audit records, durable and atomic."""

    async def last_time(self) -> datetime | None:
        """The latest time that any transaction carried; None in a new store."""
        ...

    async def request(self, key: RequestKey) -> RequestRow | None:
        """The request that was kept under `key`."""
        ...

    async def launch(self, launch_id: UUID) -> LaunchRow | None:
        """One launch."""
        ...

    async def terms(self, terms_id: bytes) -> bytes:
        """The terms that were frozen under this id."""
        ...

    async def chain(self, platform_id: bytes) -> bytes:
        """The verified chain of a platform, 8336 bytes."""
        ...

    async def open_launch(self, opening: Opening) -> Outcome:
        """Write a new launch down. `DONE`, `REQUEST_TAKEN` or `CAP_REACHED`; only the first changes anything."""
        ...

    async def move(self, move: Move) -> Outcome:
        """End a launch. `DONE`, `LOST` or `REQUEST_TAKEN`; only the first changes anything."""
        ...

    async def record(self, audit: AuditRow) -> None:
        """Write an audit record that belongs to no move."""
        ...

    async def overdue(self, time: datetime, state: str, limit: int) -> Sequence[UUID]:
        """Launches in `state` whose expiry is not after `time`, oldest first."""
        ...

    async def measured_before(self, measurement: bytes, besides: UUID) -> UUID | None:
        """The first other launch that this very measurement blob decided."""
        ...

    async def sealing_keys(self) -> frozenset[bytes]:
        """Ids of the keys under which TEKs and TIKs are sealed now."""
        ...

    async def erase_packets(self, before: datetime) -> int:
        """Erase the packets of launches that ended before a time; how many."""
        ...

    async def flush_erased(self) -> None:
        """Make sure that what was erased is gone from the files too."""
        ...

    async def check(self) -> None:
        """Return if the store can be written.

        Raises:
            Unavailable: it cannot.
        """
        ...

    async def close(self) -> None:
        """Let go of the store. Nothing else may be called afterwards."""
        ...
