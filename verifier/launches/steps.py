"""Steps that begin, release and the rest share: finding a launch, ending an overdue one, keeping a record."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from uuid import UUID

from common.errors import InvalidInput, LimitExceeded, NotFound, PlatformFailed, Reason, WrongState
from common.sev.abi import PACKET_MAX_SIZE
from verifier.launches import ledger
from verifier.launches.allowances import STRANGERS
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


async def require_allowance(dependencies: Dependencies, caller: str, now: datetime) -> None:
    """Turn a caller away that has used its allowance up, before any work is done for it.

    Raises:
        LimitExceeded: it has (TOO_MANY_REFUSALS, with the seconds to wait in the field `retry_after`).
        Unavailable: the store has no answer.
    """
    if seconds := dependencies.allowances.wait(caller, now):
        raise await _turned_away(dependencies, caller, caller, now, seconds)


async def record(dependencies: Dependencies, row: AuditRow, who: str) -> None:
    """Write down what a caller's call came to, where nothing but the call itself made that happen.

    Args:
        dependencies: the means.
        row: the record.
        who: whose allowance it is taken from: the caller's or that of `STRANGERS`.

    Raises:
        LimitExceeded: nothing is left of it (TOO_MANY_REFUSALS, with the seconds to wait in the field `retry_after`).
        Unavailable: the store has no answer.
    """
    if seconds := dependencies.allowances.take(who, row.time):
        raise await _turned_away(dependencies, who, row.caller, row.time, seconds)
    await _record(dependencies, row)


async def _turned_away(
    dependencies: Dependencies, who: str, caller: str | None, now: datetime, seconds: int
) -> LimitExceeded:
    """The error for a caller without allowance; that it is turned away is written down now and then, not every time."""
    if dependencies.allowances.news(who, now):
        row = dependencies.records.row(
            AuditEvent.TURNED_AWAY, time=now, caller=caller, reason=Reason.TOO_MANY_REFUSALS, shared=who == STRANGERS
        )
        try:
            await _record(dependencies, row)
        except BaseException:
            dependencies.allowances.unsaid(who)
            raise
    return LimitExceeded(
        Reason.TOO_MANY_REFUSALS,
        f"too many refusals or reports of late: the next call is looked at in {seconds} seconds",
        retry_after=str(seconds),
    )


async def _record(dependencies: Dependencies, row: AuditRow) -> None:
    await dependencies.store.record(row)
    dependencies.time.stored(row.time)
    dependencies.records.log(row)


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
