"""Steps that begin, release and the rest share: finding the caller's launch, ending one whose time ran out."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from uuid import UUID

from common.errors import InvalidInput, NotFound, PlatformFailed, Reason, WrongState
from common.sev.abi import PACKET_MAX_SIZE
from verifier.launches import ledger
from verifier.launches.dependencies import Dependencies
from verifier.launches.records import AuditEvent
from verifier.launches.state import Event, State, after
from verifier.store.rows import AuditRow, LaunchRow, LedgerRow, Move, Outcome, Spending

# Scopes of request ids, stored: they are for ever.
BEGIN, RELEASE, ABANDON = "BeginLaunch", "ReleaseSecret", "AbandonLaunch"
# Places of sealed secrets, part of what they are sealed to: they are for ever.
TEK_COLUMN, TIK_COLUMN, GENERATED_COLUMN = "tek", "tik", "generated"


def unknown_launch() -> NotFound:
    """The error for a launch that does not exist, or belongs to somebody else."""
    return NotFound(Reason.NOT_FOUND, "there is no such launch")


def reused() -> InvalidInput:
    """The error for a request id that came before with other content."""
    return InvalidInput(
        Reason.REQUEST_ID_REUSED, "the request_id was used before with other content", field="request_id"
    )


async def owned_launch(dependencies: Dependencies, launch_id: UUID, caller: str, now: datetime) -> LaunchRow:
    """The caller's launch as it stands at `now`: one whose time has run out is expired before anybody looks.

    Raises:
        NotFound: there is none, or it is somebody else's.
    """
    row = await dependencies.store.launch(launch_id)
    if row is None or row.caller != caller:
        raise unknown_launch()
    if row.state == State.OPEN and now >= row.expire_time:
        await expire(dependencies, launch_id, now)
        row = await dependencies.store.launch(launch_id)
        if row is None:
            raise unknown_launch()
    return row


async def expire(dependencies: Dependencies, launch_id: UUID, now: datetime) -> bool:
    """End an open launch whose time has run out, erasing its keys; whether it was this call that did it.

    A grant's ledger that knows of no open launch was tampered with. That keeps neither this launch's keys on the disk
    nor others' launches from ending: it ends without the ledger, and the log and its record say so.

    Raises:
        Unavailable: the store has no answer.
    """
    row = await dependencies.store.launch(launch_id)
    if row is None:
        return False
    audit = dependencies.records.row(AuditEvent.EXPIRED, time=now, caller=None, launch_id=launch_id)
    spending = settle(row, ledger.returned)
    try:
        done = await _expire(dependencies, audit, spending)
    except PlatformFailed as error:
        audit = dependencies.records.row(
            AuditEvent.EXPIRED, time=now, caller=None, launch_id=launch_id, grant=row.grant, settled=False
        )
        done = await _expire(dependencies, audit, None)
        if done:
            dependencies.records.log_unsettled(audit, row.grant, error)
    return done


async def _expire(dependencies: Dependencies, audit: AuditRow, spending: Spending | None) -> bool:
    assert audit.launch_id is not None  # noqa: S101 -- the record of a launch's end
    move = Move(
        launch_id=audit.launch_id,
        expected=State.OPEN.value,
        to=after(State.OPEN, Event.EXPIRE).value,
        time=audit.time,
        overdue=True,
        audit=audit,
        spending=spending,
    )
    done = await dependencies.store.move(move) is Outcome.DONE
    if done:
        dependencies.time.stored(audit.time)
        dependencies.records.log(audit)
    return done


def settle(row: LaunchRow, change: Callable[[LedgerRow], LedgerRow]) -> Spending | None:
    """What the end of a launch does to its grant's ledger."""
    return None if row.grant is None else Spending(grant=row.grant, change=change)


def require_room(table_size: int, area_size: int) -> None:
    """Refuse secrets that the guest's firmware has no room for.

    Raises:
        WrongState: there is no area (NO_SECRET_AREA), or it is too small (SECRET_TOO_LARGE).
    """
    if area_size <= 0:
        raise WrongState(Reason.NO_SECRET_AREA, "the workload's firmware sets no area aside for secrets")
    limit = min(area_size, PACKET_MAX_SIZE)
    if table_size > limit:
        raise WrongState(
            Reason.SECRET_TOO_LARGE,
            f"the workload's secrets take {table_size} bytes, its firmware has room for {limit}",
        )
