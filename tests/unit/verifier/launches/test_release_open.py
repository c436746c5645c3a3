"""What leaves a launch open at release, what its time ends, and what its caller gives up."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from common.errors import Reason, Unavailable
from common.sev.secret import SecretEntry
from tests.support.desk import KEK, desk, refused
from tests.support.documents import CALLER, STRANGER
from tests.support.documents import workload as document
from tests.support.releases import last_record, ready, spent
from verifier.documents.workload import SecretSpec
from verifier.keys.file import FileKey
from verifier.secrets.router import Secrets


async def test_other_callers_and_unknown_launches_are_not_found_and_spend_nothing(tmp_path: Path) -> None:
    async with desk(tmp_path, content=document(callers=[CALLER, STRANGER])) as d:
        begun, guest, blob = await ready(d)
        stolen = await refused(d.release(begun.launch.launch_id, blob, caller=STRANGER))
        wrong = await refused(d.release(begun.launch.launch_id, bytes(48), caller=STRANGER))
        unknown = await refused(d.release(UUID(int=1), blob, caller=STRANGER))
        assert stolen.reason is Reason.NOT_FOUND
        assert len({(error.reason, error.message) for error in (stolen, wrong, unknown)}) == 1
        assert guest.open(await d.release(begun.launch.launch_id, blob), blob)


class FlakySecrets(Secrets):
    """Secrets whose source goes away."""

    down = False

    async def read(self, specs: Sequence[SecretSpec]) -> tuple[SecretEntry, ...]:
        if self.down:
            raise Unavailable(Reason.SECRET_UNAVAILABLE, "down")
        return await super().read(specs)


async def test_a_source_without_an_answer_spends_nothing(tmp_path: Path) -> None:
    async with desk(tmp_path) as d:
        begun, guest, blob = await ready(d)
        (d.documents / "secret").rename(d.documents / "aside")
        request_id = uuid4()
        error = await refused(d.release(begun.launch.launch_id, blob, request_id=request_id))
        assert error.reason is Reason.SECRET_UNAVAILABLE
        assert (await spent(d, begun))[0] == "open"
        (d.documents / "aside").rename(d.documents / "secret")
        released = await d.release(begun.launch.launch_id, blob, request_id=request_id)
        assert guest.open(released, blob)


async def test_secrets_that_grew_too_large_spend_nothing(tmp_path: Path) -> None:
    async with desk(tmp_path) as d:
        begun, guest, blob = await ready(d)
        (d.documents / "secret").write_bytes(bytes(3033))
        assert (await refused(d.release(begun.launch.launch_id, blob))).reason is Reason.SECRET_TOO_LARGE
        (d.documents / "secret").write_bytes(bytes(20_000))
        assert (await refused(d.release(begun.launch.launch_id, blob))).reason is Reason.SECRET_TOO_LARGE
        (d.documents / "secret").write_bytes(b"smaller")
        assert guest.open(await d.release(begun.launch.launch_id, blob), blob)[0].data == b"smaller"


async def test_a_store_without_an_answer_spends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with desk(tmp_path) as d:
        begun, guest, blob = await ready(d)

        async def down(_move: object) -> object:
            raise Unavailable(Reason.STORE_UNAVAILABLE, "down")

        with monkeypatch.context() as patch:
            patch.setattr(d.store, "move", down)
            assert (await refused(d.release(begun.launch.launch_id, blob))).reason is Reason.STORE_UNAVAILABLE
            wrong = await refused(d.release(begun.launch.launch_id, bytes(48)))
            assert wrong.reason is Reason.STORE_UNAVAILABLE
        assert guest.open(await d.release(begun.launch.launch_id, blob), blob)


async def test_another_sealing_key_spends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with desk(tmp_path) as d:
        begun, guest, blob = await ready(d)
        with monkeypatch.context() as patch:
            patch.setattr(d.dependencies.sealing, "unseal", FileKey(KEK[::-1]).unseal)
            assert (await refused(d.release(begun.launch.launch_id, blob))).reason is Reason.STORE_UNAVAILABLE
        assert guest.open(await d.release(begun.launch.launch_id, blob), blob)


async def test_an_expired_launch_releases_nothing_and_its_keys_are_gone(tmp_path: Path) -> None:
    async with desk(tmp_path) as d:
        begun, _, blob = await ready(d)
        d.clock.advance(timedelta(minutes=10))
        assert (await refused(d.release(begun.launch.launch_id, blob))).reason is Reason.LAUNCH_EXPIRED
        assert await spent(d, begun) == ("expired", None)
        d.clock.advance(-timedelta(minutes=9))
        assert (await refused(d.release(begun.launch.launch_id, blob))).reason is Reason.LAUNCH_EXPIRED


async def test_the_last_moment_is_in_time(tmp_path: Path) -> None:
    async with desk(tmp_path) as d:
        begun, guest, blob = await ready(d)
        d.clock.advance(timedelta(minutes=10) - timedelta(microseconds=1))
        assert guest.open(await d.release(begun.launch.launch_id, blob), blob)


async def test_a_clock_set_back_brings_no_launch_back(tmp_path: Path) -> None:
    async with desk(tmp_path) as d:
        begun, _, blob = await ready(d)
        d.clock.advance(timedelta(minutes=10))
        await d.begin()
        d.clock.advance(-timedelta(minutes=5))
        assert (await refused(d.release(begun.launch.launch_id, blob))).reason is Reason.LAUNCH_EXPIRED


async def test_a_clock_far_behind_releases_nothing_and_spends_nothing(tmp_path: Path) -> None:
    async with desk(tmp_path) as d:
        begun, guest, blob = await ready(d)
        d.clock.advance(-timedelta(hours=1))
        assert (await refused(d.release(begun.launch.launch_id, blob))).reason is Reason.CLOCK_SKEW
        assert (await refused(d.release(begun.launch.launch_id, bytes(48)))).reason is Reason.CLOCK_SKEW
        d.clock.advance(timedelta(hours=1))
        assert guest.open(await d.release(begun.launch.launch_id, blob), blob)


async def test_the_sweep_erases_what_expired_and_leaves_what_is_open(tmp_path: Path) -> None:
    async with desk(tmp_path) as d:
        old = await d.begin()
        d.clock.advance(timedelta(minutes=5))
        young, guest, blob = await ready(d)
        d.clock.advance(timedelta(minutes=5))
        assert await d.broker.expire_overdue() == 1
        assert await spent(d, old) == ("expired", None)
        assert last_record(d, old)["event"] == "launch.expired"
        assert guest.open(await d.release(young.launch.launch_id, blob), blob)
        assert await d.broker.expire_overdue() == 0


# Abandoning.


async def test_an_abandoned_launch_has_no_keys_and_releases_nothing(tmp_path: Path) -> None:
    async with desk(tmp_path) as d:
        begun, _, blob = await ready(d)
        request_id = uuid4()
        launch = await d.abandon(begun.launch.launch_id, request_id=request_id, reason=Reason.GUEST_GONE)
        assert (launch.state, launch.reason) == ("abandoned", Reason.GUEST_GONE)
        assert await d.abandon(begun.launch.launch_id, request_id=request_id, reason=Reason.GUEST_GONE) == launch
        assert await spent(d, begun) == ("abandoned", None)
        assert (await refused(d.release(begun.launch.launch_id, blob))).reason is Reason.LAUNCH_ABANDONED
        assert (await refused(d.abandon(begun.launch.launch_id))).reason is Reason.LAUNCH_ABANDONED
        reused = await refused(d.abandon(begun.launch.launch_id, request_id=request_id))
        assert reused.reason is Reason.REQUEST_ID_REUSED


async def test_a_launch_that_has_ended_cannot_be_abandoned(tmp_path: Path) -> None:
    async with desk(tmp_path) as d:
        released, _, blob = await ready(d)
        await d.release(released.launch.launch_id, blob)
        assert (await refused(d.abandon(released.launch.launch_id))).reason is Reason.ALREADY_RELEASED
        expired = await d.begin()
        d.clock.advance(timedelta(minutes=10))
        assert (await refused(d.abandon(expired.launch.launch_id))).reason is Reason.LAUNCH_EXPIRED
