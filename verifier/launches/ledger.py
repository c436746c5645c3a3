"""How a grant is spent: pure steps from one ledger row to the next, carried out under the row's lock.

Begin reserves, release consumes, every other end returns the reservation. Counted by the grant's name, whatever its
version: a new version changes the limits and never what was spent.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

from common.errors import LimitExceeded, PlatformFailed, Reason, Refused, SevattestError
from verifier.documents.grant import Grant
from verifier.documents.rate import Rate
from verifier.launches.timekeeper import SKEW_MAX
from verifier.store.rows import LedgerRow

# These go to the caller as they are. How many launches others have open is theirs and the owner's, who asks for the
# grant's status.
_BUSY = "open launches have reserved all that the grant allows now"


def begin(row: LedgerRow, grant: Grant, now: datetime) -> LedgerRow:
    """Reserve one launch.

    Raises:
        Refused: GRANT_EXHAUSTED, all of its launches were released; GRANT_SUSPENDED, too many were refused.
        LimitExceeded: GRANT_BUSY, all that is left is reserved by open launches; GRANT_RATE_LIMITED, too soon, with
            the seconds to wait in the field `retry_after`.
    """
    if row.released >= grant.launches:
        raise Refused(Reason.GRANT_EXHAUSTED, f"all {grant.launches} launches of the grant were released")
    if row.refused >= grant.refusals:
        raise Refused(Reason.GRANT_SUSPENDED, f"{row.refused} launches of the grant were refused, which suspends it")
    if row.open >= min(grant.at_once, grant.launches - row.released):
        raise LimitExceeded(Reason.GRANT_BUSY, _BUSY)
    rate_time = row.rate_time if grant.rate is None else _arrival(row.rate_time, grant.rate, now)
    return replace(row, open=row.open + 1, rate_time=rate_time)


def released(row: LedgerRow) -> LedgerRow:
    """An open launch was released.

    Raises:
        PlatformFailed: the ledger knows of no open launch (INTERNAL).
    """
    return replace(_closed(row), released=row.released + 1)


def refused(row: LedgerRow) -> LedgerRow:
    """An open launch was refused: its reservation comes back, and the refusal is counted.

    Raises:
        PlatformFailed: the ledger knows of no open launch (INTERNAL).
    """
    return replace(_closed(row), refused=row.refused + 1)


def refused_late(row: LedgerRow) -> LedgerRow:
    """A measurement was refused for a launch that had ended otherwise by then: only the refusal is counted."""
    return replace(row, refused=row.refused + 1)


def returned(row: LedgerRow) -> LedgerRow:
    """An open launch was abandoned or expired: its reservation comes back.

    Raises:
        PlatformFailed: the ledger knows of no open launch (INTERNAL).
    """
    return _closed(row)


def reason_against(row: LedgerRow, grant: Grant, now: datetime) -> Reason | None:
    """Why one more launch could not be reserved now; None where it could. The document's own limits are not asked."""
    try:
        begin(row, grant, now)
    except SevattestError as error:
        return error.reason
    return None


def _closed(row: LedgerRow) -> LedgerRow:
    if row.open == 0:
        raise PlatformFailed(Reason.INTERNAL, "the grant's ledger knows of no open launch")
    return replace(row, open=row.open - 1)


def _arrival(earlier: int, rate: Rate, now: datetime) -> int:
    # Further ahead than this rate gets by any replica's clock: an earlier version's was slower, and it does not outlive
    # that version.
    if earlier > rate.furthest(now + SKEW_MAX):
        earlier = 0
    if seconds := rate.wait(earlier, now):
        raise LimitExceeded(
            Reason.GRANT_RATE_LIMITED,
            f"the grant's rate allows the next launch in {seconds} seconds",
            retry_after=str(seconds),
        )
    return rate.arrival(earlier, now)
