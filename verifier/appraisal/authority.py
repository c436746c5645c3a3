"""Who may launch a workload, and which grant a launch spends: a pure choice over the owner's documents.

A workload's own callers have standing authority: they need no grant, and spend none unless they name one. Everybody
else needs a grant, the one that is named or the only one that fits and could be spent now. No grant is ever chosen
that was not meant for caller, workload and version; and when the last grant is gone, nobody may launch more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from types import MappingProxyType

from common.errors import InvalidInput, NotFound, Reason, Refused
from verifier.appraisal.evidence import Finding
from verifier.documents.grant import Grant
from verifier.documents.workload import Workload, among

# Rules for the owner's records, one for each reason that authority or the ledger refuses for. Ids are for ever.
RULES: Mapping[Reason, str] = MappingProxyType(
    {
        Reason.CALLER_NOT_ALLOWED: "workload.caller",
        Reason.GRANT_REQUIRED: "grant.required",
        Reason.GRANT_SUSPENDED: "grant.suspended",
        Reason.GRANT_EXPIRED: "grant.expired",
        Reason.GRANT_NOT_YET_VALID: "grant.not_yet_valid",
        Reason.GRANT_EXHAUSTED: "grant.exhausted",
    }
)
# … and those for which somebody without any authority over the workload is refused.
STRANGE = frozenset({Reason.CALLER_NOT_ALLOWED, Reason.GRANT_REQUIRED})
# Of several grants that fit and cannot be spent, the reason of the one that is nearest to it is told.
_TOLD_FIRST = (Reason.GRANT_NOT_YET_VALID, Reason.GRANT_SUSPENDED, Reason.GRANT_EXPIRED)


def choose(
    *, workload: Workload, caller: str, named: str | None, grants: Mapping[str, Grant], now: datetime
) -> Grant | None:
    """The grant that a launch spends; None for standing authority.

    Args:
        workload: the version in force.
        caller: SPIFFE id.
        named: the grant that the caller names.
        grants: those in force, by name.
        now: the time of the decision.

    Raises:
        NotFound: the named grant does not exist, or is not for this caller and workload: the two are told apart by
            nobody.
        Refused: there is no authority; the reason is a key of `RULES`, the message is for the owner alone.
        InvalidInput: several grants could be spent and none is named (GRANT_AMBIGUOUS).
    """
    if named is not None:
        return _named(workload, caller, grants.get(named), now)
    if caller in workload.callers:
        return None
    covering = [grant for grant in grants.values() if grant.workload == workload.name]
    if not covering:
        raise Refused(
            Reason.CALLER_NOT_ALLOWED, f"{workload.name} {workload.version} does not name this caller, nor does a grant"
        )
    fitting = _fitting(covering, workload, caller)
    spendable = [grant for grant in fitting if reason_against(grant, now) is None]
    if len(spendable) > 1:
        raise InvalidInput(Reason.GRANT_AMBIGUOUS, "more than one grant could be spent: name one", field="grant")
    if spendable:
        return spendable[0]
    raise _refused(fitting, workload, now)


def likely(*, workload: Workload, caller: str, named: str | None, grants: Mapping[str, Grant]) -> str | None:
    """The grant that `choose` will come to if it comes to one, as far as documents tell without the time.

    Args:
        workload: the version in force.
        caller: SPIFFE id.
        named: the grant that the caller names.
        grants: those in force, by name.

    Returns:
        Its name; None for standing authority, and where none or several would fit. A name that the caller made up is
        never one.
    """
    if named is None and caller in workload.callers:
        return None
    fitting = [each.name for each in _fitting(grants.values(), workload, caller) if named in {None, each.name}]
    return fitting[0] if len(fitting) == 1 else None


def _fitting(grants: Iterable[Grant], workload: Workload, caller: str) -> list[Grant]:
    return [
        grant
        for grant in grants
        if grant.workload == workload.name and caller in grant.callers and _fits_version(grant, workload)
    ]


def _named(workload: Workload, caller: str, grant: Grant | None, now: datetime) -> Grant:
    if grant is None or caller not in grant.callers or grant.workload != workload.name:
        raise NotFound(Reason.NOT_FOUND, "there is no such grant", field="grant")
    if not _fits_version(grant, workload):
        raise Refused(Reason.GRANT_REQUIRED, f"grant {grant.name} is not for version {workload.version}")
    if reason_against(grant, now) is not None:
        raise _refused([grant], workload, now)
    return grant


def _fits_version(grant: Grant, workload: Workload) -> bool:
    return grant.workload_versions is None or among(workload.version, grant.workload_versions)


def _refused(fitting: Iterable[Grant], workload: Workload, now: datetime) -> Refused:
    reasons = {reason_against(grant, now): grant.name for grant in fitting}
    for reason in _TOLD_FIRST:
        if reason in reasons:
            return Refused(reason, f"grant {reasons[reason]} cannot be spent now")
    return Refused(
        Reason.GRANT_REQUIRED,
        f"{workload.name} {workload.version} does not name this caller, and no grant is for both",
    )


def reason_against(grant: Grant, now: datetime) -> Reason | None:
    """Why a grant cannot be spent now, by its document alone; None where it can."""
    if grant.suspended:
        return Reason.GRANT_SUSPENDED
    if grant.not_before is not None and now < grant.not_before:
        return Reason.GRANT_NOT_YET_VALID
    if grant.not_after is not None and now >= grant.not_after:
        return Reason.GRANT_EXPIRED
    return None


def stopped(name: str | None, grant: Grant | None) -> str | None:
    """Why a launch that has begun may not be released under its grant any more; None where it may.

    Times, pools, callers and rate count at begin only.

    Args:
        name: the grant that the launch spends; None for none.
        grant: the version of it that is in force now; None where it is not on file any more.
    """
    if name is None:
        return None
    if grant is None:
        return f"grant {name} was withdrawn"
    return f"grant {name} {grant.version} is suspended" if grant.suspended else None


def finding(error: Refused) -> Finding:
    """What `choose` or the ledger refused, for the owner's records."""
    return Finding(rule=RULES[error.reason], reason=error.reason, message=error.message)
