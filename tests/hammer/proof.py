"""What must hold after a run, judged from the store, the owner's view and the callers' own hands."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from common.audit.chain import Link, record_fields
from common.audit.checkpoint import verify_checkpoints, verify_log
from common.audit.jws import RECEIPT_TYPE, KeySet, verify_jws
from common.errors import SevattestError
from tests.hammer.plan import Answer, Plan
from verifier.store.rows import ChainedRecord, LaunchRow, LedgerRow

_ENDS = {"launch.released", "launch.refused", "launch.abandoned", "launch.expired"}


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """All that is left of a run.

    Attributes:
        plan: what was to be done.
        launches: the launches of the grant.
        ledger: the grant's.
        records: the whole audit log.
        checkpoints: all of them.
        keys: that verify receipts and checkpoints, as the owner was told.
        answers: what callers got.
        samples: open launches by rows, by the ledger, and released; at one moment each.
    """

    plan: Plan
    launches: Sequence[LaunchRow]
    ledger: LedgerRow
    records: Sequence[ChainedRecord]
    checkpoints: Sequence[str]
    keys: KeySet
    answers: Sequence[Answer]
    samples: Sequence[tuple[int, int, int]]

    def ended(self, state: str) -> list[LaunchRow]:
        """The launches that came to this end."""
        return [row for row in self.launches if row.state == state]


def complaints(evidence: Evidence) -> list[str]:
    """Everything that does not hold; empty for a run that is as it should be."""
    return [
        *_counts(evidence),
        *_open_at_any_time(evidence),
        *_once(evidence),
        *_records(evidence),
        *_receipts(evidence),
        *_log(evidence),
    ]


def _counts(evidence: Evidence) -> Iterator[str]:
    plan, ledger = evidence.plan, evidence.ledger
    states = Counter(row.state for row in evidence.launches)
    if states["released"] != plan.launches:
        yield f"{states['released']} launches were released, the grant is for {plan.launches}"
    # A refusal may come to light when its launch has ended otherwise.
    refused = states["refused"] + sum(each.record.event == "launch.refused_late" for each in evidence.records)
    if (ledger.open, ledger.released, ledger.refused) != (states["open"], states["released"], refused):
        yield f"the ledger says {ledger}, the launches are {dict(states)}"
    if states["open"]:
        yield f"{states['open']} launches are open after the end"


def _open_at_any_time(evidence: Evidence) -> Iterator[str]:
    at_once = evidence.plan.at_once
    for rows, ledger, released in evidence.samples:
        if rows != ledger:
            yield f"at one moment {rows} launches were open, and {ledger} by the ledger"
        if rows > at_once:
            yield f"at one moment {rows} launches were open, the grant allows {at_once}"
        if released + rows > evidence.plan.launches:
            yield f"at one moment {released} launches were released and {rows} open"
    # The log is in the order of the transactions themselves: it misses no moment.
    running = most = 0
    for record in evidence.records:
        running += (record.record.event == "launch.begun") - (record.record.event in _ENDS)
        most = max(most, running)
    if most > at_once:
        yield f"by the audit log {most} launches were open at once, the grant allows {at_once}"


def _once(evidence: Evidence) -> Iterator[str]:
    released = evidence.ended("released")
    for what, values in (
        ("measurement", [row.measurement for row in released]),
        ("audit record", [row.audit_id for row in released]),
        ("session", [row.session for row in evidence.launches]),
    ):
        if len(set(values)) != len(values):
            yield f"a {what} stands for more than one launch"
    rows = {str(row.launch_id): row for row in evidence.launches}
    for answer in evidence.answers:
        row = rows.get(answer.launch_id)
        if row is None or row.state != "released" or row.packet is None:
            if answer.packets:
                yield f"a packet was handed out for launch {answer.launch_id}, which was not released"
            continue
        kept = row.packet
        if not answer.packets <= {kept.header + kept.payload} or not answer.receipts <= {kept.receipt}:
            yield f"launch {answer.launch_id} has more than one packet or receipt"
        if answer.packets and not answer.opened:
            yield f"the guest of launch {answer.launch_id} could not open its packet"


def _records(evidence: Evidence) -> Iterator[str]:
    """Each launch has one record of its begin and one of its end, and the end's is the one that its row names."""
    begun: Counter[str] = Counter()
    ends: dict[str, list[Any]] = {}
    for record in (chained.record for chained in evidence.records):
        if record.event == "launch.begun":
            begun[str(record.launch_id)] += 1
        elif record.event in _ENDS:
            ends.setdefault(str(record.launch_id), []).append(record)
    for row in evidence.launches:
        launch_id = str(row.launch_id)
        if begun[launch_id] != 1:
            yield f"the begin of launch {launch_id} has {begun[launch_id]} records"
        wanted = [] if row.state == "open" else [(f"launch.{row.state}", row.audit_id)]
        if [(each.event, each.audit_id) for each in ends.get(launch_id, [])] != wanted:
            yield f"the end of launch {launch_id} ({row.state}) is not recorded exactly once"
    strangers = ({*begun} | {*ends}) - {str(row.launch_id) for row in evidence.launches}
    if strangers:
        yield f"there are records of launches that do not exist: {strangers}"


def _receipts(evidence: Evidence) -> Iterator[str]:
    for row in evidence.ended("released"):
        if row.packet is None:
            yield f"launch {row.launch_id} was released without a packet"
            continue
        try:
            claims = verify_jws(row.packet.receipt, evidence.keys, typ=RECEIPT_TYPE).claims
        except SevattestError as error:
            yield f"the receipt of launch {row.launch_id} does not verify: {error}"
            continue
        if claims["jti"] != str(row.audit_id) or str(row.launch_id) not in json.dumps(claims):
            yield f"the receipt of launch {row.launch_id} is another's"


def _log(evidence: Evidence) -> Iterator[str]:
    links = [
        Link(
            number=chained.number,
            hash=chained.hash,
            fields=record_fields(
                audit_id=chained.record.audit_id,
                time=chained.record.time,
                event=chained.record.event,
                launch_id=chained.record.launch_id,
                caller=chained.record.caller,
                reason=chained.record.reason,
                body=chained.record.body,
            ),
        )
        for chained in evidence.records
    ]
    try:
        signed = verify_checkpoints(evidence.checkpoints, evidence.keys)
        head = verify_log(links, signed)
    except SevattestError as error:
        yield f"the audit log does not hold: {error}"
        return
    if not signed or signed[-1].head != head:
        yield "the end of the audit log is not signed"
