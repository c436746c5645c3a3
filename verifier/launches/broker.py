"""The broker: begins launches, ends them, and shows them to the caller that began them.

A launch belongs to its caller: to anybody else it does not exist (NOT_FOUND), exactly as an unknown id does not. What a
caller may not learn is in the audit record and nowhere in an error. Release has a module of its own
(`verifier.launches.release`).

Numbered steps of begin, repeated in the code:

1. the clock is not far behind what is stored;
2. the request id was not used before: if it was, for the same content, the stored answer is given again;
3. the workload exists and names the caller;
4. the platform is genuine;
5. the platform is acceptable;
6. the secrets would fit;
7. keys are made, sealed and stored together with the launch, its terms, the request and the audit record.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from uuid import UUID

from common.errors import LimitExceeded, NotFound, Reason, Refused
from common.sev.certs.verify import VerifiedPlatform
from verifier.appraisal.appraise import appraise_platform
from verifier.appraisal.evidence import Finding, PlatformEvidence
from verifier.appraisal.reference import Terms, freeze
from verifier.documents.workload import Workload
from verifier.keys.session import fresh_session
from verifier.launches.dependencies import Dependencies, refusal_for
from verifier.launches.launch import AbandonRequest, BeginRequest, Begun, Launch, view
from verifier.launches.records import AuditEvent
from verifier.launches.state import Event, State, after, ended
from verifier.launches.steps import (
    ABANDON,
    BEGIN,
    TEK_COLUMN,
    TIK_COLUMN,
    expire,
    owned_launch,
    require_room,
    reused,
    unknown_launch,
)
from verifier.library.library import Prepared
from verifier.store.rows import LaunchRow, Move, Opening, Outcome, RequestKey, RequestRow, SealedKeys

_SWEEP_MAX = 500  # launches that one sweep ends, so that no transaction waits long behind it


class Broker:
    """Begins, shows and ends launches."""

    def __init__(self, dependencies: Dependencies) -> None:
        """Take the means."""
        self._d = dependencies

    # Begin.

    async def begin(self, request: BeginRequest) -> Begun:
        """Open a launch, or give the answer to this request again.

        Raises:
            InvalidInput: the request id was used with other content, the chain is malformed, or the workload cannot be
                used now.
            NotFound: there is no such workload or grant.
            Refused: the workload does not name the caller, or the platform is not genuine or not acceptable.
            WrongState: the secrets do not fit; the clock is behind; or, on a repeat, the launch has ended.
            LimitExceeded: the caller has too many open launches.
            Unavailable: the key service, a secret's source or the store has no answer; nothing was begun.
        """
        now = self._d.time.now_for_decisions()  # step 1
        content = request.content()
        key = RequestKey(caller=request.caller, method=BEGIN, request_id=request.request_id)
        earlier = await self._d.store.request(key)  # step 2
        if earlier is not None:
            return await self._begun_again(earlier, content, now)
        prepared = await self._workload(request, now)  # step 3
        platform = await self._genuine(request, now)  # step 4
        await self._acceptable(request, prepared.workload, platform, now)  # step 5
        terms = freeze(
            prepared.workload,
            generation=platform.generation,
            references=prepared.references,
            secret_area=prepared.secret_area,
        )
        await self._fits(prepared.workload, terms)  # step 6
        self._d.on_step("begin:judged")
        return await self._open(  # step 7
            request=request,
            key=key,
            content=content,
            workload=prepared.workload,
            terms=terms,
            platform=platform,
            now=now,
        )

    async def _begun_again(self, earlier: RequestRow, content: bytes, now: datetime) -> Begun:
        if earlier.content != content:
            raise reused()
        row = await owned_launch(self._d, earlier.launch_id, earlier.key.caller, now)
        state = State(row.state)
        if state not in {State.OPEN, State.RELEASED}:
            raise ended(state)
        if now >= row.expire_time:
            # Released, but too long ago for its session to start anything that could still be measured in time.
            raise ended(State.EXPIRED)
        return _begun(row)

    async def _workload(self, request: BeginRequest, now: datetime) -> Prepared:
        if request.grant is not None:
            # Grants have a place in the contract ahead of their service: one that does not exist cannot be spent.
            raise NotFound(Reason.NOT_FOUND, "there is no such grant", field="grant")
        # Before any file is looked at: a caller that a workload does not name makes no work for it.
        document = self._d.workloads.document(request.workload)
        if document is None:
            raise _no_workload()
        await self._require_named(request, document, now)
        prepared = await self._d.workloads.in_force(request.workload)
        if prepared is None:
            raise _no_workload()
        # Another set may have come into force while files were measured.
        await self._require_named(request, prepared.workload, now)
        return prepared

    async def _require_named(self, request: BeginRequest, workload: Workload, now: datetime) -> None:
        if request.caller not in workload.callers:
            finding = Finding(
                rule="workload.caller",
                reason=Reason.CALLER_NOT_ALLOWED,
                message=f"{workload.name} {workload.version} does not name this caller",
            )
            raise await self._refuse_begin(request, [finding], now, platform=None)

    async def _genuine(self, request: BeginRequest, now: datetime) -> VerifiedPlatform:
        try:
            return await self._d.platforms.verify(request.chain, request.chip_id)
        except Refused as error:
            finding = Finding(rule="platform.genuine", reason=error.reason, message=error.message)
            raise await self._refuse_begin(request, [finding], now, platform=None) from error

    async def _acceptable(
        self, request: BeginRequest, workload: Workload, platform: VerifiedPlatform, now: datetime
    ) -> None:
        fingerprint = platform.chip_fingerprint.hex()
        findings = appraise_platform(
            PlatformEvidence(
                generation=platform.generation,
                fingerprint=fingerprint,
                denied=self._d.denied.why(fingerprint, request.chip_id),
                generations=workload.generations,
                chips=workload.chips,
                floor_known=platform.generation in workload.floors,
            )
        )
        if findings:
            raise await self._refuse_begin(request, findings, now, platform=platform)

    async def _refuse_begin(
        self, request: BeginRequest, findings: Sequence[Finding], now: datetime, platform: VerifiedPlatform | None
    ) -> Refused:
        """Write the refusal down; the error to raise."""
        row = self._d.records.row(
            AuditEvent.BEGIN_REFUSED,
            time=now,
            caller=request.caller,
            reason=findings[0].reason,
            findings=findings,
            workload=request.workload,
            platform=None if platform is None else _platform(platform.generation, platform.chip_fingerprint.hex()),
        )
        await self._d.store.record(row)
        self._d.time.stored(now)
        self._d.records.log(row)
        return refusal_for(findings, row.audit_id)

    async def _fits(self, workload: Workload, terms: Terms) -> None:
        require_room(workload.table_size(await self._d.secrets.sizes(workload.secrets)), terms.secret_area)

    async def _open(
        self,
        *,
        request: BeginRequest,
        key: RequestKey,
        content: bytes,
        workload: Workload,
        terms: Terms,
        platform: VerifiedPlatform,
        now: datetime,
    ) -> Begun:
        launch_id = self._d.new_id()
        session, keys = fresh_session(platform.chain.pdh, terms.guest_policy, self._d.random)
        sealed = SealedKeys(
            key_id=self._d.sealing.key_id,
            tek=self._d.sealing.seal(keys.tek, launch_id=launch_id, column=TEK_COLUMN),
            tik=self._d.sealing.seal(keys.tik, launch_id=launch_id, column=TIK_COLUMN),
        )
        terms_id, body = terms.encode()
        chain = platform.chain.to_bytes()
        row = LaunchRow(
            launch_id=launch_id,
            caller=request.caller,
            state=State.OPEN.value,
            workload=workload.name,
            workload_version=workload.version,
            terms_id=terms_id,
            platform_id=hashlib.sha256(chain).digest(),
            generation=platform.generation,
            fingerprint=platform.chip_fingerprint.hex(),
            policy=terms.policy,
            godh=session.godh.raw,
            session=session.blob,
            pdh_fingerprint=platform.pdh_fingerprint,
            keys=sealed,
            create_time=now,
            expire_time=now + workload.lifetime,
        )
        audit = self._d.records.row(
            AuditEvent.BEGUN,
            time=now,
            caller=request.caller,
            launch_id=launch_id,
            workload=_workload(workload),
            platform=_platform(row.generation, row.fingerprint),
            pdh_fingerprint=row.pdh_fingerprint.hex(),
            policy=str(terms.guest_policy),
            launch_digests=len(terms.references),
            expire_time=row.expire_time,
        )
        self._d.on_step("begin:keys-made")
        outcome = await self._d.store.open_launch(
            Opening(
                launch=row,
                terms=body,
                chain=chain,
                request=RequestRow(key=key, content=content, launch_id=launch_id),
                audit=audit,
                open_cap=self._d.open_cap,
            )
        )
        if outcome is Outcome.CAP_REACHED:
            raise LimitExceeded(
                Reason.TOO_MANY_LAUNCHES, f"the caller has {self._d.open_cap} open launches, which is all it may have"
            )
        if outcome is Outcome.REQUEST_TAKEN:
            # The same request came twice at once; the other one was first.
            earlier = await self._d.store.request(key)
            if earlier is None:
                raise unknown_launch()
            return await self._begun_again(earlier, content, now)
        self._d.time.stored(now)
        self._d.records.log(audit)
        self._d.on_step("begin:stored")
        return _begun(row)

    # Reading and ending.

    async def get(self, caller: str, launch_id: UUID) -> Launch:
        """One launch of the caller's.

        Raises:
            NotFound: there is none, or it is somebody else's.
            Unavailable: the store has no answer.
        """
        return view(await owned_launch(self._d, launch_id, caller, self._d.time.now()))

    async def abandon(self, request: AbandonRequest) -> Launch:
        """Give a launch up; its keys are erased.

        Raises:
            NotFound: there is none, or it is somebody else's.
            InvalidInput: the request id was used with other content.
            WrongState: the launch has ended already; the reason says how.
            Unavailable: the store has no answer; nothing was changed.
        """
        now = self._d.time.now()
        content = request.content()
        key = RequestKey(caller=request.caller, method=ABANDON, request_id=request.request_id)
        row = await owned_launch(self._d, request.launch_id, request.caller, now)
        if await self._abandoned_before(key, content):
            return view(row)
        to = after(State(row.state), Event.ABANDON)
        audit = self._d.records.row(
            AuditEvent.ABANDONED,
            time=now,
            caller=request.caller,
            launch_id=row.launch_id,
            reason=request.reason,
            claimed=True,
        )
        move = Move(
            launch_id=row.launch_id,
            expected=row.state,
            to=to.value,
            time=now,
            in_time=True,
            reason=None if request.reason is None else request.reason.value,
            request=RequestRow(key=key, content=content, launch_id=row.launch_id),
            audit=audit,
        )
        self._d.on_step("abandon:judged")
        outcome = await self._d.store.move(move)
        if outcome is Outcome.DONE:
            self._d.time.stored(now)
            self._d.records.log(audit)
            return view(replace(row, state=move.to, reason=move.reason, end_time=now, keys=None))
        # Somebody was faster: the same request, another one, or the launch's own end.
        row = await owned_launch(self._d, request.launch_id, request.caller, now)
        if await self._abandoned_before(key, content):
            return view(row)
        raise ended(State(row.state))

    async def _abandoned_before(self, key: RequestKey, content: bytes) -> bool:
        earlier = await self._d.store.request(key)
        if earlier is not None and earlier.content != content:
            raise reused()
        return earlier is not None

    async def expire_overdue(self) -> int:
        """End the launches whose time has run out, erasing their keys; how many."""
        now = self._d.time.now()
        due = await self._d.store.overdue(now, State.OPEN.value, _SWEEP_MAX)
        return sum([await expire(self._d, launch_id, now) for launch_id in due])


def _no_workload() -> NotFound:
    return NotFound(Reason.NOT_FOUND, "there is no such workload", field="workload")


def _begun(row: LaunchRow) -> Begun:
    return Begun(
        launch=view(row),
        policy=row.policy,
        godh=row.godh,
        session=row.session,
        pdh_fingerprint=row.pdh_fingerprint,
    )


def _workload(workload: Workload) -> dict[str, str]:
    return {"name": workload.name, "version": workload.version, "document_sha256": workload.sha256}


def _platform(generation: str, fingerprint: str) -> dict[str, str]:
    return {"generation": generation, "fingerprint": fingerprint}
