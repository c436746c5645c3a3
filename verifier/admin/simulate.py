"""Judges a launch again, a past one or one that nobody began, by the documents in force with others put in their place.

Nothing is changed: no launch is opened, no grant is spent, no key is made. The rules are those of begin and release,
and all of them are asked; what only the real thing could show (a measurement that was never proven, firmware that
nobody names) is a finding, so that nothing is accepted while anything is unknown.

Numbered steps, repeated in the code:

1. the documents: those in force, and in place of those of the same kind and name the ones that are given;
2. the workload is on file and can be used;
3. somebody gives the caller authority: the workload or a grant, whose ledger is asked as it stands now;
4. the platform is genuine;
5. the platform is acceptable;
6. the secrets have answers and would fit;
7. nothing that counts at release speaks against it: revocations, the kill switch, digest, firmware, PDH.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol
from uuid import UUID

from common.errors import (
    InvalidInput,
    LimitExceeded,
    NotFound,
    Reason,
    Refused,
    SevattestError,
    Unavailable,
    WrongState,
)
from common.sev.certs.verify import VerifiedPlatform
from common.sev.measurement import FirmwareVersion
from verifier.admin.cases import Case, Judgement, Supposed, past_case, supposed_case, supposed_row
from verifier.admin.filed import read_text, supposing
from verifier.appraisal import authority
from verifier.appraisal.appraise import appraise_launch, appraise_platform, appraise_standing
from verifier.appraisal.evidence import Finding
from verifier.appraisal.reference import freeze
from verifier.documents.grant import Grant
from verifier.documents.sources import source_name
from verifier.documents.workload import SecretSpec
from verifier.launches import ledger
from verifier.launches.gather import launch_evidence, platform_evidence, standing_evidence
from verifier.launches.platforms import DenyList
from verifier.launches.steps import require_room, unknown_launch
from verifier.launches.timekeeper import Timekeeper
from verifier.library.documents import Documents
from verifier.library.prepared import Prepared
from verifier.library.validate import DocumentLibrary
from verifier.secrets.base import SecretSource
from verifier.store.rows import LaunchRow, LedgerRow


class SimulateStore(Protocol):
    """What is asked of a store here."""

    async def launch(self, launch_id: UUID) -> LaunchRow | None:
        """One launch."""
        ...

    async def chain(self, platform_id: bytes) -> bytes:
        """The verified chain of a platform, 8336 bytes."""
        ...

    async def ledger(self, grant: str, *, at: datetime | None = None) -> LedgerRow:
        """How far a grant is spent, without the open launches whose time ran out by `at`."""
        ...

    async def sighted(self, pdh_fingerprint: bytes) -> tuple[int, int, int] | None:
        """The oldest firmware that a PDH was used under."""
        ...


class Genuine(Protocol):
    """Decides whether a platform is genuine; `verifier.launches.platforms.PlatformVerifier` is this."""

    async def verify(self, chain: bytes, chip_id: bytes) -> VerifiedPlatform:
        """The genuine platform behind a chain."""
        ...


@dataclass(kw_only=True)
class _Bench:
    """What is known while it is judged."""

    case: Case
    snapshot: Documents
    now: datetime
    prepared: Prepared | None = None
    grant: Grant | None = None
    platform: VerifiedPlatform | None = None
    findings: list[Finding] = field(default_factory=list)


class SimulateDesk:
    """Judges launches that are none."""

    def __init__(
        self,
        *,
        store: SimulateStore,
        library: DocumentLibrary,
        platforms: Genuine,
        denied: DenyList,
        secrets: SecretSource,
        time: Timekeeper,
    ) -> None:
        """Take the means."""
        self._store = store
        self._library = library
        self._platforms = platforms
        self._denied = denied
        self._secrets = secrets
        self._time = time

    async def past(self, launch_id: UUID, texts: Sequence[bytes], firmware: FirmwareVersion | None = None) -> Judgement:
        """Judge a launch of the past by its own evidence.

        Args:
            launch_id: the launch.
            texts: documents to put in place of those in force, or beside them.
            firmware: to suppose in place of the launch's own.

        Raises:
            NotFound: there is no such launch.
            InvalidInput: a document is bad.
            WrongState: a document would not be in force (DOCUMENT_CONFLICT).
            Unavailable: the store or the key service has no answer.
        """
        row = await self._store.launch(launch_id)
        if row is None:
            raise unknown_launch()
        case = past_case(row, await self._store.chain(row.platform_id), firmware)
        return await self._judge(case, texts)

    async def supposed(
        self, launch: Supposed, texts: Sequence[bytes], firmware: FirmwareVersion | None = None
    ) -> Judgement:
        """Judge a launch that nobody began.

        Args:
            launch: what is supposed.
            texts: documents to put in place of those in force, or beside them.
            firmware: the firmware's version; without one nothing is accepted.

        Raises:
            InvalidInput: a document is bad, or the chain is none.
            WrongState: a document would not be in force (DOCUMENT_CONFLICT).
            Unavailable: the store or the key service has no answer.
        """
        return await self._judge(supposed_case(launch, firmware), texts)

    async def _judge(self, case: Case, texts: Sequence[bytes]) -> Judgement:
        current = await self._library.current()
        given = [await asyncio.to_thread(read_text, text, self._library.folder) for text in texts]
        snapshot = supposing(current, given)  # step 1
        bench = _Bench(case=case, snapshot=snapshot, now=await self._time.now())
        await self._find_workload(bench)  # step 2
        await self._find_authority(bench)  # step 3
        await self._verify(bench)  # step 4
        bench.findings += self._platform_findings(bench)  # step 5
        bench.findings += _unresolved_chips(bench, current)
        await self._fit(bench)  # step 6
        bench.findings += await self._release_findings(bench)  # step 7
        return Judgement(
            findings=tuple(bench.findings),
            workload_version=None if bench.prepared is None else bench.prepared.workload.version,
            grant=None if bench.grant is None else bench.grant.name,
        )

    async def _find_workload(self, bench: _Bench) -> None:
        try:
            workload = bench.snapshot.workload(bench.case.workload)
        except InvalidInput as error:
            bench.findings.append(_finding("simulate.workload", error))
            return
        if workload is None:
            message = f"there is no workload {bench.case.workload}"
            bench.findings.append(Finding(rule="simulate.workload", reason=Reason.NOT_FOUND, message=message))
            return
        prepared = await self._library.prepared(workload)
        if prepared.unusable is None:
            bench.prepared = prepared
            return
        bench.findings.append(
            Finding(rule="simulate.workload", reason=Reason.INVALID_CONFIGURATION, message=prepared.unusable)
        )

    async def _find_authority(self, bench: _Bench) -> None:
        if bench.prepared is None:
            return
        case = bench.case
        try:
            bench.grant = authority.choose(
                workload=bench.prepared.workload,
                caller=case.caller,
                named=case.grant,
                grants=bench.snapshot.grants,
                now=bench.now,
            )
            if bench.grant is not None:
                ledger.begin(await self._store.ledger(bench.grant.name, at=bench.now), bench.grant, bench.now)
        except Refused as error:
            bench.findings.append(authority.finding(error))
        except LimitExceeded as error:
            busy = error.reason is Reason.GRANT_BUSY
            bench.findings.append(_finding("grant.busy" if busy else "grant.rate", error))
        except (NotFound, InvalidInput) as error:
            bench.findings.append(_finding("simulate.grant", error))

    async def _verify(self, bench: _Bench) -> None:
        try:
            bench.platform = await self._platforms.verify(bench.case.chain, bench.case.chip_id)
        except Refused as error:
            bench.findings.append(_finding("platform.genuine", error))

    def _platform_findings(self, bench: _Bench) -> Sequence[Finding]:
        if bench.platform is None or bench.prepared is None:
            return ()
        evidence = platform_evidence(
            documents=bench.snapshot,
            denied=self._denied,
            workload=bench.prepared.workload,
            grant=bench.grant,
            platform=bench.platform,
            chip_id=bench.case.chip_id,
            caller=bench.case.caller,
        )
        return appraise_platform(evidence)

    async def _fit(self, bench: _Bench) -> None:
        if bench.prepared is None:
            return
        workload = bench.prepared.workload
        answers = await asyncio.gather(*map(self._size, workload.secrets))
        if missing := [each for each in answers if isinstance(each, Finding)]:
            bench.findings += missing
            return
        sizes = [each for each in answers if isinstance(each, int)]
        try:
            require_room(workload.table_size(sizes), bench.prepared.secret_area)
        except WrongState as error:
            bench.findings.append(_finding("secrets.room", error))

    async def _size(self, secret: SecretSpec) -> int | Finding:
        """How large a secret is; or which has no answer, and why, for nobody but the owner."""
        try:
            return (await self._secrets.sizes((secret,)))[0]
        except Unavailable as error:
            why = error.__cause__ if isinstance(error.__cause__, SevattestError) else error
            called = " ".join(f"{part} {name}" for part, name in source_name(secret.source).items() if name is not None)
            message = f"secret {secret.guid} ({called}): {why.message}"
            return Finding(rule="secrets.available", reason=error.reason, message=message)

    async def _release_findings(self, bench: _Bench) -> Sequence[Finding]:
        platform, prepared, case = bench.platform, bench.prepared, bench.case
        if platform is None or prepared is None:
            return ()
        digests = [reference.digest for reference in prepared.references]
        digest = digests[0] if case.first_digest and digests else case.digest
        row = supposed_row(case, platform, prepared.workload, bench.grant)
        if digest is None or case.firmware is None or platform.generation not in prepared.workload.floors:
            # A generation without a floor was found above; the other two are unknown, and nothing was proven by them.
            standing = standing_evidence(documents=bench.snapshot, denied=self._denied, row=row, firmware=None)
            return (*appraise_standing(standing), *_unknown(digest, case.firmware))
        evidence = launch_evidence(
            documents=bench.snapshot,
            denied=self._denied,
            row=row,
            terms=freeze(
                prepared.workload,
                generation=platform.generation,
                references=prepared.references,
                secret_area=prepared.secret_area,
                recognized=False,
            ),
            matched=digests.index(digest) if digest in digests else None,
            firmware=case.firmware,
            pdh_oldest=await self._store.sighted(platform.pdh_fingerprint),
        )
        return appraise_launch(evidence)


def _unresolved_chips(bench: _Bench, current: Documents) -> Iterator[Finding]:
    """A chip id stands for a key that the key service knows, which was never asked about ids that are only supposed."""
    known = (each.chips for each in current.revocations.values())
    supposed = (each.chips for each in bench.snapshot.revocations.values())
    new = frozenset[str]().union(*supposed) - frozenset[str]().union(*known)
    if new and not bench.case.chip_id:
        yield Finding(
            rule="simulate.chip",
            reason=Reason.CHIP_REVOKED,
            message=f"the chip's id is not known, so it may be one of {len(new)} that are newly revoked by id",
        )


def _unknown(digest: bytes | None, firmware: FirmwareVersion | None) -> Iterator[Finding]:
    if digest is None:
        yield Finding(
            rule="simulate.unproven",
            reason=Reason.MEASUREMENT_REFUSED,
            message="the launch proved no launch digest, so none can be held against the documents",
        )
    if firmware is None:
        yield Finding(
            rule="simulate.firmware",
            reason=Reason.FIRMWARE_TOO_OLD,
            message="no firmware is proven or supposed, so none can be held against the floor",
        )


def _finding(rule: str, error: SevattestError) -> Finding:
    return Finding(rule=rule, reason=error.reason, message=error.message)
