"""All of the owner's desks, made of what the broker works with and the library of documents."""

from __future__ import annotations

from dataclasses import dataclass

from verifier.admin.documents import DocumentDesk
from verifier.admin.grants import GrantDesk
from verifier.admin.impact import ImpactDesk
from verifier.admin.launches import LaunchDesk
from verifier.admin.records import RecordDesk
from verifier.admin.requests import Journal
from verifier.admin.secrets import SecretDesk
from verifier.admin.simulate import SimulateDesk
from verifier.launches.dependencies import Dependencies
from verifier.library.validate import DocumentLibrary


@dataclass(frozen=True, kw_only=True)
class Desks:
    """Who does the work behind each of the owner's calls."""

    documents: DocumentDesk
    grants: GrantDesk
    impact: ImpactDesk
    launches: LaunchDesk
    records: RecordDesk
    secrets: SecretDesk
    simulate: SimulateDesk


def owner_desks(dependencies: Dependencies, library: DocumentLibrary) -> Desks:
    """The desks over the same store, keys, deny-list and time as the broker's."""
    d = dependencies
    journal = Journal(store=d.store, time=d.time, records=d.records)
    return Desks(
        documents=DocumentDesk(store=d.store, journal=journal, library=library, seal=d.seal),
        grants=GrantDesk(store=d.store, library=library, time=d.time),
        impact=ImpactDesk(store=d.store, library=library, denied=d.denied, pseudonym=d.pseudonyms.of),
        launches=LaunchDesk(d.store, pseudonym=d.pseudonyms.of),
        records=RecordDesk(d.store, d.signer),
        secrets=SecretDesk(
            store=d.store,
            journal=journal,
            library=library,
            sealing=d.sealing,
            keyed=d.pseudonyms.of,
            documents=d.seal,
        ),
        simulate=SimulateDesk(
            store=d.store,
            library=library,
            platforms=d.platforms,
            denied=d.denied,
            secrets=d.secrets,
            time=d.time,
        ),
    )
