"""What a caller or a host might try around a refusal: to escape its count, to have it forgotten, to gain by waiting."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from common.errors import Reason
from common.sev.measurement import FirmwareVersion
from common.sev.secret import SecretEntry
from tests.support.desk import OWNER, START, Desk, desk, refused
from tests.support.documents import CALLER, SECRET, SECRET_GUID, STRANGER
from tests.support.documents import workload as document
from tests.support.rpc import SettableClock
from verifier.admin.desks import owner_desks
from verifier.admin.requests import Asked
from verifier.appraisal.explain import Account
from verifier.documents.workload import SecretSpec
from verifier.launches.broker import Broker
from verifier.launches.launch import Begun
from verifier.launches.release import Releaser
from verifier.secrets.router import Secrets
from verifier.secrets.stored import StoredSecrets
from verifier.store.rows import LedgerRow

_DEADLINE_S = 30.0


def grant(**changes: Any) -> dict[str, Any]:
    """A grant of two refusals."""
    spec = {"workload": "web", "callers": [CALLER], "platforms": "any", "launches": 9, "at_once": 9, "refusals": 2}
    return {
        "apiVersion": "sevattest/v1",
        "kind": "Grant",
        "metadata": {"name": "g", "version": "1"},
        "spec": spec | changes,
    }


class Search:
    """A search for an explanation that goes on until the test lets it end."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._begun, self._end = threading.Event(), threading.Event()
        monkeypatch.setattr("verifier.launches.release.account_for", self._search)

    def _search(self, **_: object) -> Account:
        self._begun.set()
        assert self._end.wait(_DEADLINE_S)
        return Account(sentence="found")

    async def begun(self) -> None:
        """Return when somebody searches."""
        assert await asyncio.to_thread(self._begun.wait, _DEADLINE_S)

    def end(self) -> None:
        """Let it end."""
        self._end.set()


async def _measured(d: Desk) -> tuple[Begun, bytes, bytes]:
    """A launch under the grant; a measurement that is good and one that is not."""
    begun = await d.begin(grant="g")
    guest = d.start(begun)
    return begun, guest.measure((await d.digests())[0]), guest.measure(bytes(32))


async def _abandon(d: Desk, launch_id: UUID, _good: bytes) -> None:
    await d.abandon(launch_id)


async def _release_elsewhere(d: Desk, launch_id: UUID, good: bytes) -> None:
    elsewhere = replace(d, releaser=Releaser(d.dependencies))  # a replica: it shares nothing but the store
    await elsewhere.release(launch_id, good)


async def _expire(d: Desk, _launch_id: UUID, _good: bytes) -> None:
    d.clock.time += timedelta(hours=1)
    assert await Broker(d.dependencies).expire_overdue() == 1


@pytest.mark.parametrize(
    ("escape", "state", "ledger"),
    [
        (_abandon, "abandoned", LedgerRow(refused=1)),
        (_release_elsewhere, "released", LedgerRow(refused=1, released=1)),
        (_expire, "expired", LedgerRow(refused=1)),
    ],
)
async def test_a_refusal_is_counted_and_recorded_although_the_launch_ends_otherwise_while_it_is_explained(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    escape: Callable[[Desk, UUID, bytes], Awaitable[None]],
    state: str,
    ledger: LedgerRow,
) -> None:
    async with desk(tmp_path) as d:
        await d.apply(grant())
        search = Search(monkeypatch)
        begun, good, bad = await _measured(d)
        launch_id = begun.launch.launch_id
        trying = asyncio.create_task(refused(d.release(launch_id, bad)))
        await search.begun()
        await escape(d, launch_id, good)
        search.end()
        error = await trying
        assert error.reason is Reason.MEASUREMENT_REFUSED
        assert (await d.broker.get(CALLER, launch_id)).state == state
        assert await d.store.ledger("g") == ledger
        record = d.audit(launch_id)[-1]
        assert (record.event, record.reason) == ("launch.refused_late", "MEASUREMENT_REFUSED")
        assert str(record.audit_id) == error.fields["audit_id"]
        assert json.loads(record.body)["explanation"]["sentence"] == "found"


async def test_a_launch_that_two_replicas_refuse_at_once_is_refused_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with desk(tmp_path) as d:
        await d.apply(grant())
        search = Search(monkeypatch)
        begun, _, bad = await _measured(d)
        launch_id = begun.launch.launch_id
        first = asyncio.create_task(refused(d.release(launch_id, bad)))
        await search.begun()
        elsewhere = replace(d, releaser=Releaser(d.dependencies))
        second = asyncio.create_task(refused(elsewhere.release(launch_id, bad)))
        search.end()
        reasons = sorted([(await first).reason, (await second).reason])
        assert reasons == [Reason.LAUNCH_REFUSED, Reason.MEASUREMENT_REFUSED]
        assert await d.store.ledger("g") == LedgerRow(refused=1)
        assert [record.event for record in d.audit(launch_id)] == ["launch.begun", "launch.refused"]


async def test_keys_that_were_refused_for_their_firmware_are_refused_after_its_update_too(tmp_path: Path) -> None:
    old, new = FirmwareVersion(1, 55, 20), FirmwareVersion(1, 55, 25)
    content = document(platforms={"generations": ["milan"], "chips": "any"})
    async with desk(tmp_path, content=content, generation="milan") as d:
        digest = (await d.digests())[0]
        reasons = []
        for version in (old, new):
            begun = await d.begin()
            blob = d.start(begun).measure(digest, version)
            reasons.append((await refused(d.release(begun.launch.launch_id, blob, firmware=version))).reason)
        assert reasons == [Reason.FIRMWARE_TOO_OLD, Reason.PDH_PREDATES_FIRMWARE]


async def test_firmware_that_is_only_claimed_spoils_no_keys(tmp_path: Path) -> None:
    content = document(platforms={"generations": ["milan"], "chips": "any"})
    async with desk(tmp_path, content=content, generation="milan") as d:
        claimed = await d.begin()
        # Whoever may hand a measurement in could otherwise make somebody's platform need new keys.
        blob, old = d.start(claimed).measure((await d.digests())[0]), FirmwareVersion(1, 55, 20)
        error = await refused(d.release(claimed.launch.launch_id, blob, firmware=old))
        assert error.reason is Reason.MEASUREMENT_REFUSED
        begun = await d.begin()
        await d.release(begun.launch.launch_id, d.start(begun).measure((await d.digests())[0]))


async def test_nobody_learns_by_waiting_that_somebody_elses_launch_is_being_decided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with desk(tmp_path) as d:
        await d.apply(grant())
        search = Search(monkeypatch)
        begun, _, bad = await _measured(d)
        trying = asyncio.create_task(refused(d.release(begun.launch.launch_id, bad)))
        await search.begun()
        try:
            async with asyncio.timeout(_DEADLINE_S / 3):
                for launch_id in (begun.launch.launch_id, uuid4()):
                    error = await refused(d.release(launch_id, bad, caller=STRANGER))
                    assert error.reason is Reason.NOT_FOUND
        finally:
            search.end()
        assert (await trying).reason is Reason.MEASUREMENT_REFUSED


async def test_one_sweep_ends_all_launches_whose_time_ran_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("verifier.launches.broker._SWEEP_MAX", 2)
    clock = SettableClock(START)
    async with desk(tmp_path, clock=clock) as d:
        ran_out = [(await d.begin()).launch.launch_id for _ in range(5)]
        clock.time += timedelta(minutes=5)
        young = (await d.begin()).launch.launch_id
        clock.time += timedelta(minutes=6)
        assert await d.broker.expire_overdue() == 5
        assert [await d.keys_of(launch_id) for launch_id in ran_out] == [None] * 5
        assert await d.keys_of(young) is not None


class Erasing(Secrets):
    """Reads secrets; the owner erases one as soon as it was read for the first time."""

    def __init__(self, d: Desk, erase: str) -> None:
        super().__init__(stored=StoredSecrets(d.store, d.dependencies.sealing))
        self._desk, self._erase = d, erase

    async def read(self, specs: Sequence[SecretSpec]) -> tuple[SecretEntry, ...]:
        """See `Secrets`."""
        entries = await super().read(specs)
        if self._erase:
            erase, self._erase = self._erase, ""
            owner = owner_desks(self._desk.dependencies, self._desk.library)
            await owner.secrets.delete(Asked(caller=OWNER, request_id=uuid4()), erase, allow_used=True)
        return entries


@pytest.mark.parametrize(("erased", "releases"), [("disk", False), ("another", True)])
async def test_a_secret_that_was_erased_leaves_with_no_release_after_that(
    tmp_path: Path, erased: str, *, releases: bool
) -> None:
    content = document(secrets=[{"guid": str(SECRET_GUID), "source": {"stored": "disk"}}])
    async with desk(tmp_path, content=content) as d:
        owner = owner_desks(d.dependencies, d.library)
        for name in ("disk", "another"):
            await owner.secrets.put(Asked(caller=OWNER, request_id=uuid4()), name, SECRET)
        begun = await d.begin()
        guest = d.start(begun)
        blob = guest.measure((await d.digests())[0])
        step = replace(d, releaser=Releaser(replace(d.dependencies, secrets=Erasing(d, erased)))).release(
            begun.launch.launch_id, blob
        )
        if releases:
            assert guest.open(await step, blob) == (SecretEntry(guid=SECRET_GUID, data=SECRET),)
        else:
            assert (await refused(step)).reason is Reason.SECRET_UNAVAILABLE
            assert (await d.broker.get(CALLER, begun.launch.launch_id)).state == "open"  # nothing is spent
