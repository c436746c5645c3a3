"""A grant: authority to launch a workload, as often as granted, where granted, by whom granted (docs/grants.md).

Values only; how far a grant is spent is `verifier.launches.ledger`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from verifier.documents.rate import Rate


@dataclass(frozen=True, kw_only=True)
class Grant:
    """One version of one grant; every field is valid. What is spent is counted by name, whatever the version.

    Attributes:
        name: what `BeginLaunch` may ask for.
        version: compares in natural order; the newest is in force.
        sha256: of the document's text, lower-case hex.
        source: the document's file, or `applied`.
        workload: the workload's name.
        workload_versions: those that may be launched; None for whichever is in force.
        callers: SPIFFE ids of the orchestrators that may spend it.
        platforms: names of Platform documents; None where these do not matter.
        pools: names of pools of Platform documents; None where these do not matter. With both None, any platform that
            the workload allows; else a platform in either.
        launches: how many may be released in all.
        at_once: how many may be open at once, between begin and their end.
        refusals: after so many refused launches the grant is suspended.
        rate: how many may begin in a time; None for as many as come.
        not_before: begins no launch before; None for no limit.
        not_after: begins no launch at or after; None for no limit.
        suspended: the kill switch: nothing is begun, nothing is released.
    """

    name: str
    version: str
    sha256: str
    source: str
    workload: str
    workload_versions: frozenset[str] | None
    callers: frozenset[str]
    platforms: frozenset[str] | None
    pools: frozenset[str] | None
    launches: int
    at_once: int
    refusals: int
    rate: Rate | None
    not_before: datetime | None
    not_after: datetime | None
    suspended: bool
