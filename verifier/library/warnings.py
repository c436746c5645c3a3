"""What deserves a second look in a document beside the others: names that lead nowhere, and authority that nobody has.

None of it is refused: documents come in any order, and what a name leads to may follow. Of a version that is not in
force nothing is said but that: whatever it says, it does not happen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from datetime import datetime
from types import MappingProxyType
from typing import Any

from verifier.documents.grant import Grant
from verifier.documents.reader import Document, kind_of
from verifier.documents.revocation import Revocation
from verifier.documents.workload import Workload, among
from verifier.library.documents import Documents


def warnings_for(document: Document, documents: Documents) -> tuple[str, ...]:
    """The warnings for one document that is in force, each with its path, given all that is on file."""
    return tuple(_WARN[kind_of(document)](document, documents))


def overdue(document: Document, now: datetime) -> tuple[str, ...]:
    """The warning for a grant in force whose time is over."""
    if isinstance(document, Grant) and document.not_after is not None and document.not_after <= now:
        return ("spec.not_after: has passed: nothing is begun under this grant",)
    return ()


def superseded_by(newer: str) -> tuple[str, ...]:
    """The warnings for a version in whose place a newer one is in force."""
    return (f"metadata.version: {newer} is newer and stays in force",)


def _workload(workload: Workload, documents: Documents) -> Iterator[str]:
    yield from workload.warnings
    if not workload.callers and all(grant.workload != workload.name for grant in documents.grants.values()):
        yield "spec.callers: names nobody, and no grant is for this workload: nobody can launch it"
    for name, grant in sorted(documents.grants.items()):
        if grant.workload == workload.name and (both := workload.callers & grant.callers):
            yield f"spec.callers: {_some(both)} may launch it without a grant, so grant {name} is no limit there"


def _grant(grant: Grant, documents: Documents) -> Iterator[str]:
    versions = documents.workloads.get(grant.workload)
    if versions is None:
        yield f"spec.workload: there is no workload {grant.workload}"
    elif grant.workload_versions is not None and not among(versions[0].version, grant.workload_versions):
        yield f"spec.versions: {versions[0].version} is in force, and not among them"
    if versions is not None and (both := versions[0].callers & grant.callers):
        yield f"spec.callers: {_some(both)} may launch {grant.workload} without a grant, so this one is no limit there"
    if grant.suspended:
        yield "spec.suspended: nothing is begun or released under this grant"
    if grant.at_once > grant.launches:
        yield f"spec.at_once: is more than launches, which is {grant.launches}"
    if missing := (grant.platforms or frozenset()) - documents.platforms.keys():
        yield f"spec.platforms.names: there is no platform {_some(missing)}"
    pools = frozenset().union(*(platform.pools for platform in documents.platforms.values()))
    if missing := (grant.pools or frozenset()) - pools:
        yield f"spec.platforms.pools: no platform is in pool {_some(missing)}"


def _platform(_platform: Document, _documents: Documents) -> Iterator[str]:
    yield from ()


def _revocation(revocation: Revocation, documents: Documents) -> Iterator[str]:
    if missing := {each.name for each in revocation.workloads} - documents.workloads.keys():
        yield f"spec.workloads: there is no workload {_some(missing)}"


def _some(names: AbstractSet[str]) -> str:
    """The first of some names, and how many there are beside it: a document may hold thousands."""
    more = len(names) - 1
    return min(names) + (f" (and {more} more)" if more else "")


_WARN: Mapping[str, Callable[[Any, Documents], Iterator[str]]] = MappingProxyType(
    {"Workload": _workload, "Grant": _grant, "Platform": _platform, "Revocation": _revocation}
)
