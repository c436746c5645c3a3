"""Release: the first well-formed measurement from the bound caller decides, once, for ever.

Numbered steps, repeated in the code:

1. the clock is not far behind what is stored;
2. the launch exists and is the caller's;
3. the request id was not used before: if it was, for the same content, the same answer is given again, after another
   look at what the owner has taken back, until 24 hours after release;
4. the launch is open and in time;
5. its keys are unsealed, which shows that nothing that was frozen for it was changed in the store since; then the
   measurement is tried against every digest that was frozen for it, under the frozen policy: nothing that the host says
   selects or adds anything;
6. the rules are asked; whatever they find spends the launch: keys erased, findings and explanation recorded;
7. the secrets are read and the packet is built, in memory; a source without an answer spends nothing;
8. one transaction moves the launch from open to released by compare-and-set, keeps packet and receipt, erases the keys,
   consumes the grant's reservation, writes the audit record and the request; who loses the race starts over at step 2
   and finds what the winner left, and so does whoever judged by documents that changed meanwhile. A refusal that loses
   to another end is recorded and counted all the same: an explanation takes a second to search, in which a launch could
   be given up, or released by another replica, to escape it.

A launch is decided behind a lock of its own, but only so that one explanation is searched at a time: what keeps a
second packet from leaving is the compare-and-set of step 8. The lock is its caller's too: to nobody else it exists.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from uuid import UUID
from weakref import WeakValueDictionary

from common.errors import WrongState, known_reason
from common.sev.abi import MINIMUM_API
from common.sev.measurement import FirmwareVersion, match
from common.sev.secret import SecretPacket
from common.sev.session import LaunchKeys
from verifier.appraisal.appraise import appraise_launch, appraise_standing
from verifier.appraisal.evidence import Finding
from verifier.appraisal.explain import NOT_SEARCHED, Account, account_for, account_for_replay
from verifier.appraisal.reference import Reference, Terms, decode_terms
from verifier.appraisal.rules import STANDING_RULES
from verifier.keys.base import launch_place
from verifier.launches import ledger
from verifier.launches.broker import JUDGED_MAX
from verifier.launches.dependencies import Dependencies, changing, lost, refusal, refusal_for
from verifier.launches.gather import launch_evidence, standing_evidence
from verifier.launches.launch import Launch, Released, ReleaseRequest, view
from verifier.launches.records import AuditEvent
from verifier.launches.sealed import altered, unseal_keys
from verifier.launches.state import Event, State, after, ended
from verifier.launches.steps import (
    GENERATED_COLUMN,
    RELEASE,
    expire,
    record,
    reused,
    settle,
    unknown_launch,
)
from verifier.launches.testimony import notes, platform_words, shape_words, signed_receipt, workload_words
from verifier.library.documents import Documents
from verifier.secrets.release import build_packet, generated_secrets
from verifier.store.rows import (
    AuditRow,
    Known,
    LaunchRow,
    Move,
    Outcome,
    Packet,
    PdhSighting,
    RequestKey,
    RequestRow,
    Spending,
)

REPEATS = timedelta(hours=24)
# A search takes about a second of one core; whoever waits longer for its turn is recorded without one.
EXPLAIN_WAIT_S = 5.0
# Terms that are kept in memory, at most some 50 KB each: an owner's workloads that are launched now.
TERMS_MAX = 64


@dataclass(frozen=True, kw_only=True)
class _Case:
    """One measurement before the judge."""

    request: ReleaseRequest
    key: RequestKey
    content: bytes
    row: LaunchRow
    terms: Terms
    keys: LaunchKeys
    documents: Documents
    pdh_oldest: tuple[int, int, int] | None
    now: datetime


class Releaser:
    """Judges measurements and releases secrets."""

    def __init__(self, dependencies: Dependencies) -> None:
        """Take the means."""
        self._d = dependencies
        self._locks: WeakValueDictionary[tuple[str, UUID], asyncio.Lock] = WeakValueDictionary()
        self._explaining = asyncio.Semaphore(1)
        self._terms: dict[bytes, Terms] = {}

    async def release(self, request: ReleaseRequest) -> Released:
        """Answer with the secret packet for this measurement, or refuse it for good.

        Raises:
            NotFound: there is no such launch, or it is somebody else's; nothing was spent.
            InvalidInput: the request id was used with other content, or a document of the owner's cannot be read;
                nothing was spent.
            Refused: the measurement, the firmware or the chip is not accepted; the launch is spent.
            WrongState: the launch has ended already, or its time ran out; the secrets do not fit, the clock is behind
                or somebody else wrote to the launch in the store, and nothing was spent.
            LimitExceeded: a repeat is refused, and too much of this caller is recorded already (TOO_MANY_REFUSALS).
            Unavailable: the store, the sealing key or a secret's source has no answer, or the owner's documents are not
                as they were sealed; nothing was spent.
        """
        key = RequestKey(caller=request.caller, method=RELEASE, request_id=request.request_id)
        content = request.content()
        lock = self._locks.setdefault((request.caller, request.launch_id), asyncio.Lock())
        async with lock:
            late = changing()
            for _ in range(JUDGED_MAX):
                known = await self._d.store.known(key, request.launch_id)
                now = self._d.time.for_decisions(known.time)  # step 1
                row = known.launch  # step 2
                if row is None or row.caller != request.caller:
                    raise unknown_launch()
                if known.request is not None:  # step 3
                    if known.request.content != content:
                        raise reused()
                    again = await self._again(row, known.revision, now)
                    if isinstance(again, Released):
                        return again
                    late = lost() if again is Outcome.LOST else changing()
                    continue
                state = State(row.state)  # step 4
                if state is not State.OPEN:
                    raise ended(state)
                if now >= row.expire_time:
                    await expire(self._d, row.launch_id, now)
                    continue
                released = await self._decide(
                    await self._case(request, key=key, content=content, row=row, known=known, now=now)
                )
                if released is not None:
                    return released
                late = changing()
            raise late

    async def _again(self, row: LaunchRow, revision: int, now: datetime) -> Released | Outcome:
        """The answer that this request got before; or why it has to be looked for again, as `Store.confirm` says."""
        reason = known_reason(row.reason)  # a newer replica's own reads as LAUNCH_REFUSED, below
        if row.state == State.REFUSED and reason is not None and row.audit_id is not None:
            raise refusal(reason, row.audit_id)
        if row.state != State.RELEASED or row.packet is None or row.end_time is None or now - row.end_time >= REPEATS:
            raise ended(State(row.state))
        documents = await self._d.library.current(revision)
        evidence = standing_evidence(
            documents=documents,
            denied=self._d.denied,
            row=row,
            firmware=None if row.firmware is None else FirmwareVersion(*row.firmware),
        )
        findings = appraise_standing(evidence)
        if findings:
            audit = self._d.records.row(
                AuditEvent.REPEAT_REFUSED,
                time=now,
                caller=row.caller,
                launch_id=row.launch_id,
                reason=findings[0].reason,
                findings=findings,
            )
            await record(self._d, audit, row.caller)
            raise refusal_for(findings, audit.audit_id)
        # The release itself may not be confirmed yet: whoever asked first was told nothing then.
        assert row.audit_id is not None  # noqa: S101 -- a released launch has a record
        outcome = await self._d.store.confirm(row.launch_id, row.audit_id, revision)
        return _released(view(row), row.packet) if outcome is Outcome.DONE else outcome

    async def _case(
        self, request: ReleaseRequest, *, key: RequestKey, content: bytes, row: LaunchRow, known: Known, now: datetime
    ) -> _Case:
        try:
            keys = unseal_keys(self._d.sealing, row)  # step 5
            terms = await self._terms_of(row)
        except WrongState as error:
            self._d.records.log_altered(row.launch_id, error)
            raise
        return _Case(
            request=request,
            key=key,
            content=content,
            row=row,
            terms=terms,
            keys=keys,
            documents=await self._d.library.current(known.revision),
            pdh_oldest=known.pdh_oldest,
            now=now,
        )

    async def _terms_of(self, row: LaunchRow) -> Terms:
        """What was frozen for a launch. Terms are kept by their hash: those of an id never change."""
        terms = self._terms.get(row.terms_id)
        if terms is None:
            body = await self._d.store.terms(row.terms_id)
            if hashlib.sha256(body).digest() != row.terms_id:
                raise altered("its terms were changed")
            terms = decode_terms(body)
            if len(self._terms) >= TERMS_MAX:
                del self._terms[next(iter(self._terms))]
            self._terms[row.terms_id] = terms
        return terms

    async def _decide(self, case: _Case) -> Released | None:
        """Release or refuse; None where another request has ended the launch meanwhile."""
        request, terms = case.request, case.terms
        matched = None
        if request.firmware[:2] >= MINIMUM_API:  # below, a match would prove nothing: not even tried
            matched = match(  # step 5
                tik=case.keys.tik,
                blob=request.blob,
                firmware=request.firmware,
                policy=terms.guest_policy,
                digests=terms.digests,
            )
        evidence = launch_evidence(  # step 6
            documents=case.documents,
            denied=self._d.denied,
            row=case.row,
            terms=terms,
            matched=matched,
            firmware=request.firmware,
            pdh_oldest=case.pdh_oldest,
        )
        findings = appraise_launch(evidence)
        self._d.on_step("release:judged")
        if findings or matched is None:
            await self._refuse(case, findings, proven=matched is not None)
            return None
        specs = terms.secret_specs
        entries = await self._d.secrets.read(specs)  # step 7
        packet = build_packet(
            keys=case.keys,
            entries=entries,
            blob=request.blob,
            area_size=terms.secret_area,
            random=self._d.random,
        )
        self._d.on_step("release:packet-built")
        # A source may take its time: what counts is when the secret leaves.
        now = self._d.time.for_decisions(None)
        return await self._hand_out(case, now, terms.references[matched], packet, generated_secrets(specs, entries))

    async def _hand_out(
        self, case: _Case, now: datetime, reference: Reference, sealed: SecretPacket, generated: bytes | None
    ) -> Released | None:
        row, audit_id = case.row, self._d.records.new_id()
        launch_id = row.launch_id
        firmware = case.request.firmware
        receipt = signed_receipt(self._d, row, case.terms, reference, audit_id=audit_id, time=now, firmware=firmware)
        packet = Packet(header=sealed.header, payload=sealed.payload, receipt=receipt)
        audit = self._d.records.row(
            AuditEvent.RELEASED,
            time=now,
            caller=row.caller,
            launch_id=launch_id,
            audit_id=audit_id,
            workload=workload_words(case.terms),
            grant=row.grant,
            platform=platform_words(self._d, row),
            policy=str(case.terms.guest_policy),
            firmware=str(firmware),
            shape=shape_words(case.terms, reference),
            launch_digest=reference.digest.hex(),
            guids=[str(secret.guid) for secret in case.terms.secrets],
            notes=notes(self._d, case.terms),
        )
        move = Move(  # step 8
            launch_id=launch_id,
            expected=row.state,
            to=after(State(row.state), Event.RELEASE).value,
            time=now,
            in_time=True,
            measurement=case.request.blob.to_bytes(),
            digest=reference.digest,
            packet=packet,
            generated=None
            if generated is None
            else self._d.sealing.seal(generated, launch_place(launch_id, GENERATED_COLUMN)),
            request=RequestRow(key=case.key, content=case.content, launch_id=launch_id),
            audit=audit,
            revision=case.documents.revision,
            spending=settle(row, ledger.released),
            firmware=firmware,
            sighting=PdhSighting(pdh_fingerprint=row.pdh_fingerprint, firmware=firmware),
        )
        if await self._commit(move) is not Outcome.DONE:
            return None
        self._d.on_step("release:stored")
        return _released(view(row, State.RELEASED, end_time=now), packet)

    async def _refuse(self, case: _Case, findings: Sequence[Finding], *, proven: bool) -> None:
        row, reason, firmware = case.row, findings[0].reason, case.request.firmware
        # What the owner has taken back since is not the host's doing, and suspends no grant.
        blamed = any(finding.rule not in STANDING_RULES for finding in findings)
        account = await self._account(case, findings)
        audit = self._d.records.row(
            AuditEvent.REFUSED,
            time=case.now,
            caller=row.caller,
            launch_id=row.launch_id,
            reason=reason,
            findings=findings,
            workload=workload_words(case.terms),
            grant=row.grant,
            platform=platform_words(self._d, row),
            policy=str(case.terms.guest_policy),
            claimed_firmware=str(firmware),
            explanation=None if account is None else asdict(account),
        )
        move = Move(
            launch_id=row.launch_id,
            expected=row.state,
            to=after(State(row.state), Event.REFUSE).value,
            time=case.now,
            in_time=True,
            reason=reason.value,
            measurement=case.request.blob.to_bytes(),
            request=RequestRow(key=case.key, content=case.content, launch_id=row.launch_id),
            audit=audit,
            revision=case.documents.revision,
            spending=settle(row, ledger.refused if blamed else ledger.returned),
            firmware=firmware,
            sighting=PdhSighting(pdh_fingerprint=row.pdh_fingerprint, firmware=firmware) if proven else None,
        )
        outcome = await self._commit(move)
        if outcome is Outcome.LOST:
            await self._refuse_late(row, audit, settle(row, ledger.refused_late) if blamed else None)
        elif outcome is not Outcome.DONE:
            return
        raise refusal_for(findings, audit.audit_id)

    async def _refuse_late(self, row: LaunchRow, audit: AuditRow, spending: Spending | None) -> None:
        """Record and count the refusal of a launch that ended otherwise meanwhile."""
        now = await self._d.store.launch(row.launch_id)
        if now is None or now.state == State.REFUSED:
            raise ended(State.REFUSED)
        late = replace(audit, event=AuditEvent.REFUSED_LATE.value)
        await self._d.store.record(late, spending)
        self._d.time.stored(late.time)
        self._d.records.log(late)

    async def _account(self, case: _Case, findings: Sequence[Finding]) -> Account | None:
        """Why the measurement does not match, where that is what is wrong with it."""
        if all(finding.rule != "launch.measurement" for finding in findings):
            return None
        before = await self._d.store.measured_before(case.request.blob.to_bytes(), case.row.launch_id)
        if before is not None:
            return account_for_replay(before)
        try:
            async with asyncio.timeout(EXPLAIN_WAIT_S):
                await self._explaining.acquire()
        except TimeoutError:
            return NOT_SEARCHED
        try:
            return await asyncio.to_thread(
                account_for,
                blob=case.request.blob,
                keys=case.keys,
                firmware=case.request.firmware,
                terms=case.terms,
                expected=self._d.library.expected(case.terms),
                catalogue=self._d.library.catalogue(),
            )
        finally:
            self._explaining.release()

    async def _commit(self, move: Move) -> Outcome:
        outcome = await self._d.store.move(move)
        if outcome is Outcome.DONE:
            self._d.time.stored(move.time)
            self._d.records.log(move.audit)
        return outcome


def _released(launch: Launch, packet: Packet) -> Released:
    return Released(launch=launch, header=packet.header, payload=packet.payload, receipt=packet.receipt)
