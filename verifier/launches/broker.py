"""The broker: begins launches, ends them, and shows them to the caller that began them.

A launch belongs to its caller: to anybody else it does not exist (NOT_FOUND), exactly as an unknown id does not. What a
caller may not learn is in the audit record and nowhere in an error. Release has a module of its own
(`verifier.launches.release`).

Numbered steps of begin, repeated in the code:

1. the clock is not far behind what is stored;
2. the request id was not used before: if it was, for the same content, the stored answer is given again;
3. the caller's allowance of refusals is not used up; the workload exists, and the caller has authority to launch it:
   its own, or a grant, which is not spent as far as can be seen before anything is done;
4. the platform is genuine;
5. the platform is acceptable;
6. the secrets would fit;
7. keys are made, sealed, bound to all that is frozen, and stored together with the launch, its terms, the request, the
   grant's reservation and the audit record.

What was judged by documents that changed meanwhile is not stored: then everything is judged again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from uuid import UUID

from common.errors import LimitExceeded, NotFound, Reason, Refused
from common.sev.certs.verify import VerifiedPlatform
from verifier.appraisal import authority
from verifier.appraisal.appraise import appraise_platform
from verifier.appraisal.evidence import Finding
from verifier.appraisal.reference import Terms
from verifier.documents.grant import Grant
from verifier.documents.workload import Workload
from verifier.keys.session import fresh_session
from verifier.launches import ledger
from verifier.launches.allowances import STRANGERS
from verifier.launches.dependencies import Dependencies, changing, refusal_for
from verifier.launches.gather import platform_evidence
from verifier.launches.launch import AbandonRequest, BeginRequest, Begun, Launch, view
from verifier.launches.records import AuditEvent
from verifier.launches.sealed import seal_keys
from verifier.launches.state import Event, State, after, ended
from verifier.launches.steps import (
    ABANDON,
    BEGIN,
    expire,
    owned_launch,
    record,
    require_allowance,
    require_room,
    reused,
    settle,
)
from verifier.library.documents import Documents
from verifier.store.rows import LaunchRow, Move, Opening, Outcome, RequestKey, RequestRow, Spending

_SWEEP_MAX = 500  # launches that a sweep finds at once
# An owner changes documents by hand or by a pipeline: who meets this many changes in a row asks again.
JUDGED_MAX = 8


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    """A launch that may begin, judged by documents that may have changed since."""

    documents: Documents
    workload: Workload
    grant: Grant | None
    platform: VerifiedPlatform
    terms: Terms


class Broker:
    """Begins, shows and ends launches."""

    def __init__(self, dependencies: Dependencies) -> None:
        """Take the means."""
        self._d = dependencies

    # Begin.

    async def begin(self, request: BeginRequest) -> Begun:
        """Open a launch, or give the answer to this request again.

        Raises:
            InvalidInput: the request id was used with other content, the chain is malformed, the workload cannot be
                used now, or several grants could be spent.
            NotFound: there is no such workload or grant.
            Refused: the caller has no authority, its grant cannot be spent, or the platform is not genuine or not
                acceptable.
            WrongState: the secrets do not fit; the clock is behind; or, on a repeat, the launch has ended.
            LimitExceeded: the caller or the grant has too many open launches, or begins too many in a time; or too
                many of the caller's begins were refused.
            Unavailable: the key service, a secret's source, the sealing key or the store has no answer; nothing was
                begun.
        """
        key = RequestKey(caller=request.caller, method=BEGIN, request_id=request.request_id)
        content = request.content()
        swept = False
        for _ in range(JUDGED_MAX):
            likely = self._d.library.likely_grant(request.workload, request.caller, request.grant)
            known = await self._d.store.known(key, grant=likely)
            now = self._d.time.for_decisions(known.time)  # step 1
            if known.request is not None:  # step 2
                return await self._begun_again(known.request, content, now)
            await require_allowance(self._d, request.caller, now)  # step 3
            documents = await self._d.library.current(known.revision)
            workload, grant = await self._authority(request, documents, now)
            try:
                if grant is not None and grant.name == likely:
                    ledger.begin(known.ledger, grant, now)
            except (LimitExceeded, Refused) as error:
                await self._make_room(error, request, grant, now, swept=swept, platform=None)
                swept = True
                continue
            candidate = await self._judge(request, documents, workload, grant, now)  # steps 4 to 6
            self._d.on_step("begin:judged")
            try:
                begun = await self._open(
                    request=request, key=key, content=content, candidate=candidate, now=now
                )  # step 7
            except (LimitExceeded, Refused) as error:
                await self._make_room(error, request, grant, now, swept=swept, platform=candidate.platform)
                swept = True
            else:
                if begun is not None:
                    return begun
        raise changing()

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

    async def _make_room(
        self,
        error: LimitExceeded | Refused,
        request: BeginRequest,
        grant: Grant | None,
        now: datetime,
        *,
        swept: bool,
        platform: VerifiedPlatform | None,
    ) -> None:
        """Refuse or put off a begin that its grant or the caller's open launches have no room for, unless some is made.

        Launches whose time ran out still hold their reservations until somebody looks.
        """
        if isinstance(error, Refused):
            raise await self._refuse_begin(request, [authority.finding(error)], now, platform=platform) from error
        if swept or error.reason is not Reason.GRANT_BUSY or not await self._sweep(grant, now):
            self._d.records.log_refusal("launch.begin_postponed", request.caller, error)
            raise error

    async def _judge(
        self, request: BeginRequest, documents: Documents, workload: Workload, grant: Grant | None, now: datetime
    ) -> _Candidate:
        platform = await self._genuine(request, now)  # step 4
        evidence = platform_evidence(  # step 5
            documents=documents,
            denied=self._d.denied,
            workload=workload,
            grant=grant,
            platform=platform,
            chip_id=request.chip_id,
            caller=request.caller,
        )
        findings = appraise_platform(evidence)
        if findings:
            raise await self._refuse_begin(request, findings, now, platform=platform)
        # Only now is a file looked at: a caller without authority makes no work for it.
        prepared = await self._d.library.in_force(documents, workload.name)
        if prepared is None:
            raise _no_workload()
        recognized = workload.chips is not None or evidence.known is not None
        terms = prepared.terms(platform.generation, recognized=recognized)
        sizes = await self._d.secrets.sizes(workload.secrets)
        require_room(workload.table_size(sizes), terms.secret_area)  # step 6
        return _Candidate(documents=documents, workload=workload, grant=grant, platform=platform, terms=terms)

    async def _authority(
        self, request: BeginRequest, documents: Documents, now: datetime
    ) -> tuple[Workload, Grant | None]:
        workload = documents.workload(request.workload)
        if workload is None:
            raise _no_workload()
        try:
            grant = authority.choose(
                workload=workload, caller=request.caller, named=request.grant, grants=documents.grants, now=now
            )
        except Refused as error:
            raise await self._refuse_begin(request, [authority.finding(error)], now, platform=None) from error
        return workload, grant

    async def _genuine(self, request: BeginRequest, now: datetime) -> VerifiedPlatform:
        try:
            return await self._d.platforms.verify(request.chain, request.chip_id)
        except Refused as error:
            finding = Finding(rule="platform.genuine", reason=error.reason, message=error.message)
            raise await self._refuse_begin(request, [finding], now, platform=None) from error

    async def _refuse_begin(
        self, request: BeginRequest, findings: Sequence[Finding], now: datetime, platform: VerifiedPlatform | None
    ) -> Refused:
        """Write the refusal down, as far as the caller's allowance goes; the error to raise."""
        row = self._d.records.row(
            AuditEvent.BEGIN_REFUSED,
            time=now,
            caller=request.caller,
            reason=findings[0].reason,
            findings=findings,
            workload=request.workload,
            grant=request.grant,
            platform=None if platform is None else self._platform(platform),
        )
        strange = findings[0].reason in authority.STRANGE
        await record(self._d, row, STRANGERS if strange else request.caller)
        return refusal_for(findings, row.audit_id)

    async def _open(
        self, *, request: BeginRequest, key: RequestKey, content: bytes, candidate: _Candidate, now: datetime
    ) -> Begun | None:
        """Write the launch down; None where the documents changed meanwhile."""
        launch_id, workload, terms, platform = self._d.new_id(), candidate.workload, candidate.terms, candidate.platform
        session, keys = fresh_session(platform.chain.pdh, terms.guest_policy, self._d.random)
        terms_id, body = terms.encoded
        chain = platform.chain.to_bytes()
        grant = candidate.grant
        row = LaunchRow(
            launch_id=launch_id,
            caller=request.caller,
            state=State.OPEN.value,
            workload=workload.name,
            workload_version=workload.version,
            terms_id=terms_id,
            platform_id=platform.chain.digest,
            generation=platform.generation,
            fingerprint=platform.chip_fingerprint.hex(),
            policy=terms.policy,
            godh=session.godh.raw,
            session=session.blob,
            pdh_fingerprint=platform.pdh_fingerprint,
            keys=None,
            create_time=now,
            expire_time=now + workload.lifetime,
            grant=None if grant is None else grant.name,
            chip_id=request.chip_id.hex() or None,
            oca=platform.chain.oca.fingerprint.hex(),
        )
        row = replace(row, keys=seal_keys(self._d.sealing, row, keys))
        audit = self._d.records.row(
            AuditEvent.BEGUN,
            time=now,
            caller=request.caller,
            launch_id=launch_id,
            workload=_workload(workload),
            grant=None if grant is None else {"name": grant.name, "version": grant.version},
            platform=self._platform(platform),
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
                revision=candidate.documents.revision,
                spending=None
                if grant is None
                else Spending(grant=grant.name, change=lambda ledger_row: ledger.begin(ledger_row, grant, now)),
            )
        )
        if outcome is Outcome.CAP_REACHED:
            raise LimitExceeded(
                Reason.TOO_MANY_LAUNCHES, f"the caller has {self._d.open_cap} open launches, which is all it may have"
            )
        if outcome is not Outcome.DONE:
            # The same request came twice at once and the other one was first; or the documents changed.
            return None
        self._d.time.stored(now)
        self._d.records.log(audit)
        self._d.on_step("begin:stored")
        return _begun(row)

    async def _sweep(self, grant: Grant | None, now: datetime) -> int:
        """End the launches of a grant whose time has run out; how many."""
        if grant is None:
            return 0
        due = await self._d.store.overdue(now, State.OPEN.value, _SWEEP_MAX, grant=grant.name)
        return sum([await expire(self._d, launch_id, now) for launch_id in due])

    def _platform(self, platform: VerifiedPlatform) -> dict[str, str]:
        return {
            "generation": platform.generation,
            "chip": self._d.pseudonyms.of(platform.chip_fingerprint.hex()),
        }

    # Reading and ending.

    async def get(self, caller: str, launch_id: UUID) -> Launch:
        """One launch of the caller's.

        Raises:
            NotFound: there is none, or it is somebody else's.
            Unavailable: the store has no answer.
        """
        return view(await owned_launch(self._d, launch_id, caller, await self._d.time.now()))

    async def abandon(self, request: AbandonRequest) -> Launch:
        """Give a launch up; its keys are erased.

        Raises:
            NotFound: there is none, or it is somebody else's.
            InvalidInput: the request id was used with other content.
            WrongState: the launch has ended already; the reason says how.
            Unavailable: the store has no answer; nothing was changed.
        """
        now = await self._d.time.now()
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
            spending=settle(row, ledger.returned),
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
        now = await self._d.time.now()
        ended_now = 0
        while due := await self._d.store.overdue(now, State.OPEN.value, _SWEEP_MAX):
            done = sum([await expire(self._d, launch_id, now) for launch_id in due])
            ended_now += done
            # Whoever begins launches only to leave them must not outrun the sweep; what others end is theirs.
            if len(due) < _SWEEP_MAX or not done:
                break
        return ended_now


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
