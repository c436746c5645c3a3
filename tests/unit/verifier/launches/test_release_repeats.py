"""Repeats of a release: the same bytes to the same request, and nothing to any other."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from common.errors import OutcomeUnknown, Reason
from common.sev.measurement import FirmwareVersion, MeasurementBlob
from common.sev.secret import SecretEntry
from tests.support.chains import make_platform
from tests.support.desk import FIRMWARE, Guest, desk, refused
from tests.support.documents import CALLER, SECRET, SECRET_GUID, revocation
from tests.support.releases import ready
from verifier.launches.launch import ReleaseRequest
from verifier.store.rows import Known, Outcome, Packet, RequestKey, RequestRow


async def test_a_repeat_gives_the_same_bytes_for_a_day(tmp_path: Path) -> None:
    async with desk(tmp_path) as d:
        begun, _, blob = await ready(d)
        request_id = uuid4()
        first = await d.release(begun.launch.launch_id, blob, request_id=request_id)
        d.clock.advance(timedelta(hours=24) - timedelta(seconds=1))
        assert await d.release(begun.launch.launch_id, blob, request_id=request_id) == first
        d.clock.advance(timedelta(seconds=1))
        late = await refused(d.release(begun.launch.launch_id, blob, request_id=request_id))
        assert late.reason is Reason.ALREADY_RELEASED
        assert len(d.audit(begun.launch.launch_id)) == 2


async def test_a_repeat_is_answered_only_once_the_release_is_confirmed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with desk(tmp_path) as d:
        begun, _, blob = await ready(d)
        request_id = uuid4()
        first = await d.release(begun.launch.launch_id, blob, request_id=request_id)

        async def nobody(*_what: object) -> Outcome:
            raise OutcomeUnknown(Reason.OUTCOME_UNKNOWN, "the standby is away")

        monkeypatch.setattr(d.store, "confirm", nobody)
        again = await refused(d.release(begun.launch.launch_id, blob, request_id=request_id))
        assert again.reason is Reason.OUTCOME_UNKNOWN
        monkeypatch.undo()
        assert await d.release(begun.launch.launch_id, blob, request_id=request_id) == first


@pytest.mark.parametrize(
    ("outcome", "words"),
    [
        (Outcome.LOST, "the release is not in the store that answers now"),
        (Outcome.DOCUMENTS_CHANGED, "the owner's documents change faster"),
    ],
)
async def test_a_repeat_that_is_never_confirmed_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outcome: Outcome, words: str
) -> None:
    async with desk(tmp_path) as d:
        begun, _, blob = await ready(d)
        request_id = uuid4()
        first = await d.release(begun.launch.launch_id, blob, request_id=request_id)

        async def confirm(*_what: object) -> Outcome:
            return outcome

        monkeypatch.setattr(d.store, "confirm", confirm)
        again = await refused(d.release(begun.launch.launch_id, blob, request_id=request_id))
        assert again.reason is Reason.STORE_UNAVAILABLE
        assert again.message.startswith(words)
        monkeypatch.undo()
        assert await d.release(begun.launch.launch_id, blob, request_id=request_id) == first


async def test_a_repeat_whose_release_was_lost_with_a_server_is_decided_by_what_the_next_one_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with desk(tmp_path) as d:
        begun, guest, blob = await ready(d)
        request = ReleaseRequest(
            caller=CALLER,
            request_id=uuid4(),
            launch_id=begun.launch.launch_id,
            blob=MeasurementBlob.parse(blob),
            firmware=FIRMWARE,
        )
        # What the server of before says, once; the launch is open in the store, which is the next one's.
        key = RequestKey(caller=CALLER, method="ReleaseSecret", request_id=request.request_id)
        known = await d.store.known(key, request.launch_id)
        assert known.launch is not None
        gone = replace(
            known.launch,
            state="released",
            end_time=d.clock.now(),
            audit_id=uuid4(),
            packet=Packet(header=bytes(52), payload=bytes(16), receipt="lost"),
        )
        row = RequestRow(key=key, content=request.content(), launch_id=request.launch_id)

        async def before(*_asked: object, **_more: object) -> Known:
            monkeypatch.undo()
            return replace(known, launch=gone, request=row)

        monkeypatch.setattr(d.store, "known", before)
        released = await d.releaser.release(request)
        assert guest.open(released, blob) == (SecretEntry(guid=SECRET_GUID, data=SECRET),)
        assert await d.releaser.release(request) == released


async def test_what_is_taken_back_while_a_repeat_is_confirmed_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with desk(tmp_path) as d:
        begun, _, blob = await ready(d)
        request_id = uuid4()
        await d.release(begun.launch.launch_id, blob, request_id=request_id)
        confirm = d.store.confirm

        async def late(launch_id: UUID, audit_id: UUID, revision: int) -> Outcome:
            monkeypatch.undo()
            await d.apply(revocation("incident", workloads=[{"name": "web", "versions": "any"}]))
            return await confirm(launch_id, audit_id, revision)

        monkeypatch.setattr(d.store, "confirm", late)
        again = await refused(d.release(begun.launch.launch_id, blob, request_id=request_id))
        assert again.reason is Reason.REVOKED


async def test_a_repeat_after_a_restart_gives_the_same_bytes(tmp_path: Path) -> None:
    request_id, platform = uuid4(), make_platform()
    async with desk(tmp_path, platform=platform) as d:
        begun, _, blob = await ready(d)
        first = await d.release(begun.launch.launch_id, blob, request_id=request_id)
    async with desk(tmp_path, platform=platform) as d:
        assert await d.release(begun.launch.launch_id, blob, request_id=request_id) == first


async def test_a_launch_begun_before_a_restart_is_released_after_it(tmp_path: Path) -> None:
    platform = make_platform()
    async with desk(tmp_path, platform=platform) as d:
        begun, guest, blob = await ready(d)
    async with desk(tmp_path, platform=platform) as d:
        assert guest.open(await d.release(begun.launch.launch_id, blob), blob)


async def test_an_erased_packet_is_not_made_again(tmp_path: Path) -> None:
    async with desk(tmp_path) as d:
        begun, _, blob = await ready(d)
        request_id = uuid4()
        await d.release(begun.launch.launch_id, blob, request_id=request_id)
        await d.store.erase_packets(d.clock.now())
        late = await refused(d.release(begun.launch.launch_id, blob, request_id=request_id))
        assert late.reason is Reason.ALREADY_RELEASED


async def test_another_request_or_measurement_gets_no_second_packet(tmp_path: Path) -> None:
    async with desk(tmp_path) as d:
        begun, guest, blob = await ready(d)
        request_id = uuid4()
        await d.release(begun.launch.launch_id, blob, request_id=request_id)
        second = Guest.start(d.platform, begun)
        second_blob = second.measure((await d.digests())[0])
        assert second_blob != blob
        assert (await refused(d.release(begun.launch.launch_id, blob))).reason is Reason.ALREADY_RELEASED
        assert (await refused(d.release(begun.launch.launch_id, second_blob))).reason is Reason.ALREADY_RELEASED
        reused = await refused(d.release(begun.launch.launch_id, second_blob, request_id=request_id))
        assert reused.reason is Reason.REQUEST_ID_REUSED
        other_version = d.release(
            begun.launch.launch_id, blob, request_id=request_id, firmware=FirmwareVersion(1, 55, 25)
        )
        assert (await refused(other_version)).reason is Reason.REQUEST_ID_REUSED
        assert guest.policy == begun.policy


async def test_one_request_id_serves_one_launch(tmp_path: Path) -> None:
    async with desk(tmp_path) as d:
        one, _, one_blob = await ready(d)
        two, guest, two_blob = await ready(d)
        request_id = uuid4()
        await d.release(one.launch.launch_id, one_blob, request_id=request_id)
        error = await refused(d.release(two.launch.launch_id, two_blob, request_id=request_id))
        assert error.reason is Reason.REQUEST_ID_REUSED
        assert guest.open(await d.release(two.launch.launch_id, two_blob), two_blob)
