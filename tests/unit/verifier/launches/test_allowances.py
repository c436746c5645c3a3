"""What a caller can have recorded by merely calling is bounded, and nothing that has begun is held up by it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from common.errors import LimitExceeded, Reason, Unavailable
from tests.support.chains import fresh_ca, make_platform
from tests.support.desk import START, Desk, desk, refused
from tests.support.documents import CALLER, STRANGER
from tests.support.documents import workload as document
from tests.unit.verifier.launches.test_platforms import FakeKeyService
from tests.unit.verifier.launches.test_reports import NONCE, launched, signed, verify
from verifier.documents.rate import Rate
from verifier.launches import allowances
from verifier.launches.allowances import STRANGERS, Allowances
from verifier.launches.launch import Begun

OTHER = "spiffe://datacenter.example/orchestrator/other"
THREE = Rate(times=3, period=timedelta(minutes=3))
AWAY = "caller.turned_away"
# A chain that nobody vouches for, whatever its platform says of itself.
FORGED = make_platform(ca=fresh_ca()).chain.to_bytes()


def events(d: Desk) -> list[str]:
    return [record.event for record in d.audit()]


async def forged(d: Desk, **asked: Any) -> Reason:
    return (await refused(d.begin(chain=FORGED, **asked))).reason


async def used_up(d: Desk, **asked: Any) -> None:
    """Have three begins refused, which is all that is recorded, and no more."""
    for _ in range(3):
        assert await forged(d, **asked) is Reason.UNTRUSTED_ROOT
    assert d.audit()[-1].event == "launch.begin_refused"


async def test_refused_begins_are_recorded_as_far_as_the_allowance_goes(tmp_path: Path) -> None:
    async with desk(tmp_path, allowance=THREE) as d:
        await used_up(d)
        error = await refused(d.begin(chain=FORGED))
        assert isinstance(error, LimitExceeded)
        assert (error.reason, error.fields) == (Reason.TOO_MANY_REFUSALS, {"retry_after": "60"})
        for _ in range(20):
            assert await forged(d) is Reason.TOO_MANY_REFUSALS
        assert events(d) == ["launch.begin_refused"] * 3 + [AWAY]
        d.clock.advance(timedelta(seconds=59))
        assert await forged(d) is Reason.TOO_MANY_REFUSALS
        d.clock.advance(timedelta(seconds=1))
        assert await forged(d) is Reason.UNTRUSTED_ROOT
        assert await forged(d) is Reason.TOO_MANY_REFUSALS
        assert events(d) == ["launch.begin_refused"] * 3 + [AWAY, "launch.begin_refused"]


async def test_a_caller_without_allowance_begins_nothing_and_makes_no_work(tmp_path: Path) -> None:
    platform = make_platform()
    keys = FakeKeyService({platform.chip_id: platform.chain.cek})
    steps: list[str] = []
    async with desk(tmp_path, platform=platform, key_service=keys, allowance=THREE, on_step=steps.append) as d:
        await used_up(d)
        steps.clear()
        for chain in (platform.chain, platform.unsigned_chain):
            error = await refused(d.begin(chain=chain.to_bytes(), chip_id=platform.chip_id))
            assert error.reason is Reason.TOO_MANY_REFUSALS
        assert keys.calls == 0
        assert "begin:judged" not in steps
        d.clock.advance(timedelta(minutes=1))
        await d.begin(chain=platform.unsigned_chain.to_bytes(), chip_id=platform.chip_id)
        assert keys.calls == 1


async def test_as_long_as_something_is_left_good_launches_begin_and_take_none_of_it(tmp_path: Path) -> None:
    async with desk(tmp_path, allowance=THREE) as d:
        for _ in range(2):
            await forged(d)
        for _ in range(10):
            begun = await d.begin()
            await d.abandon(begun.launch.launch_id)
        assert await forged(d) is Reason.UNTRUSTED_ROOT
        assert (await refused(d.begin())).reason is Reason.TOO_MANY_REFUSALS


async def test_one_callers_refusals_hold_nobody_else_up(tmp_path: Path) -> None:
    async with desk(tmp_path, content=document(callers=[CALLER, OTHER]), allowance=THREE) as d:
        await used_up(d)
        assert await forged(d) is Reason.TOO_MANY_REFUSALS
        await d.begin(caller=OTHER)
        await used_up(d, caller=OTHER)
        assert await forged(d, caller=OTHER) is Reason.TOO_MANY_REFUSALS


async def test_what_has_begun_ends_although_its_caller_has_no_allowance_left(tmp_path: Path) -> None:
    async with desk(tmp_path, allowance=THREE) as d:
        request_ids = [uuid4() for _ in range(3)]
        good, bad, left = [await d.begin(request_id=request_id) for request_id in request_ids]
        await used_up(d)
        assert await forged(d) is Reason.TOO_MANY_REFUSALS
        assert await d.begin(request_id=request_ids[0]) == good
        guest, release_id = d.start(good), uuid4()
        blob = guest.measure((await d.digests())[0])
        released = await d.release(good.launch.launch_id, blob, request_id=release_id)
        assert guest.open(released, blob)
        again = await d.release(good.launch.launch_id, blob, request_id=release_id)
        assert (again.header, again.payload) == (released.header, released.payload)
        error = await refused(d.release(bad.launch.launch_id, d.start(bad).measure(bytes(32))))
        assert error.reason is Reason.MEASUREMENT_REFUSED
        assert (await d.abandon(left.launch.launch_id)).state == "abandoned"
        assert events(d)[-4:] == [AWAY, "launch.released", "launch.refused", "launch.abandoned"]


async def test_a_refused_repeat_is_recorded_as_far_as_the_allowance_goes(tmp_path: Path) -> None:
    async with desk(tmp_path, allowance=THREE) as d:
        begun = await d.begin()
        blob, request_id = d.start(begun).measure((await d.digests())[0]), uuid4()

        def repeat() -> Awaitable[Any]:
            return d.release(begun.launch.launch_id, blob, request_id=request_id)

        first = await repeat()
        d.denied.set_owners([d.platform.chain.cek.fingerprint.hex()])
        reasons = [(await refused(repeat())).reason for _ in range(8)]
        assert reasons == [Reason.CHIP_REVOKED] * 3 + [Reason.TOO_MANY_REFUSALS] * 5
        assert events(d)[2:] == ["launch.repeat_refused"] * 3 + [AWAY]
        d.denied.set_owners([])
        assert (await repeat()).payload == first.payload


async def reported(d: Desk, begun: Begun, digest: bytes, **asked: Any) -> Any:
    report = signed(d.platform.keys.pek, nonce=NONCE, digest=digest, policy=begun.policy)
    return await verify(d, begun.launch.launch_id, report, **asked)


@pytest.mark.parametrize("good", [True, False], ids=["good", "bad"])
async def test_reports_are_recorded_as_far_as_the_allowance_goes(tmp_path: Path, *, good: bool) -> None:
    async with desk(tmp_path, content=document(callers=[CALLER, OTHER]), allowance=THREE) as d:
        begun, digest = await launched(d)
        shown = digest if good else bytes(32)
        for _ in range(3):
            if good:
                await reported(d, begun, shown)
            else:
                assert (await refused(reported(d, begun, shown))).reason is Reason.REPORT_REFUSED
        for _ in range(5):
            error = await refused(reported(d, begun, shown))
            assert (error.reason, error.fields) == (Reason.TOO_MANY_REFUSALS, {"retry_after": "60"})
        # Not even looked at.
        for launch_id, report in ((begun.launch.launch_id, bytes(208)), (uuid4(), bytes(208))):
            assert (await refused(verify(d, launch_id, report))).reason is Reason.TOO_MANY_REFUSALS
        assert events(d)[2:] == ["report.verified" if good else "report.refused"] * 3 + [AWAY]
        # Nor does it begin anything; who has used nothing up does.
        assert (await refused(d.begin())).reason is Reason.TOO_MANY_REFUSALS
        await d.begin(caller=OTHER)
        d.clock.advance(timedelta(minutes=1))
        assert (await reported(d, begun, digest)).digest == digest


async def test_reports_of_no_launch_of_the_callers_take_nothing(tmp_path: Path) -> None:
    async with desk(tmp_path, content=document(callers=[CALLER, OTHER]), allowance=THREE) as d:
        begun, digest = await launched(d)
        for _ in range(5):
            assert (await refused(reported(d, begun, digest, caller=OTHER))).reason is Reason.NOT_FOUND
        await d.begin(caller=OTHER)
        assert AWAY not in events(d)


async def test_all_without_authority_share_one_allowance_and_take_nobodys(tmp_path: Path) -> None:
    async with desk(tmp_path, allowance=THREE) as d:
        reasons = [(await refused(d.begin(caller=f"{STRANGER}{number}"))).reason for number in range(9)]
        assert reasons == [Reason.CALLER_NOT_ALLOWED] * 3 + [Reason.TOO_MANY_REFUSALS] * 6
        assert events(d) == ["launch.begin_refused"] * 3 + [AWAY]
        notice = d.audit()[-1]
        assert (notice.caller, json.loads(notice.body)) == (f"{STRANGER}3", {"shared": True})
        await used_up(d)
        assert len(d.dependencies.allowances._accounts) == 2


async def test_that_a_caller_is_turned_away_is_said_once_in_a_period(tmp_path: Path) -> None:
    async with desk(tmp_path, allowance=THREE) as d:
        await used_up(d)
        answers = await asyncio.gather(*(refused(d.begin(chain=FORGED)) for _ in range(16)))
        assert {answer.reason for answer in answers} == {Reason.TOO_MANY_REFUSALS}
        (notice,) = (record for record in d.audit() if record.event == AWAY)
        assert (notice.caller, notice.reason, notice.time) == (CALLER, "TOO_MANY_REFUSALS", START)
        assert json.loads(notice.body) == {"shared": False}
        (line,) = d.log.named(AWAY)
        assert (line.level, line.fields["caller"]) == ("warning", CALLER)
        # Whoever goes on and on is said to do so again when the period is over, and not with each that it lets through.
        for _ in range(6):
            d.clock.advance(timedelta(minutes=1))
            assert await forged(d) is Reason.UNTRUSTED_ROOT
            assert await forged(d) is Reason.TOO_MANY_REFUSALS
        assert events(d).count(AWAY) == len(d.log.named(AWAY)) == 3


async def test_what_could_not_be_written_down_is_written_down_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with desk(tmp_path, allowance=THREE) as d:
        await used_up(d)

        async def down(*_: Any) -> None:
            raise Unavailable(Reason.STORE_UNAVAILABLE, "down")

        with monkeypatch.context() as patch:
            patch.setattr(d.store, "record", down)
            assert await forged(d) is Reason.STORE_UNAVAILABLE
        assert AWAY not in events(d)
        assert await forged(d) is Reason.TOO_MANY_REFUSALS
        assert events(d)[-1] == AWAY


async def test_many_at_once_are_recorded_no_more_than_one_after_the_other(tmp_path: Path) -> None:
    async with desk(tmp_path, allowance=THREE) as d:
        answers = await asyncio.gather(*(refused(d.begin(chain=FORGED)) for _ in range(16)))
        assert sum(answer.reason is Reason.UNTRUSTED_ROOT for answer in answers) == 3
        assert sorted(events(d)) == [AWAY] + ["launch.begin_refused"] * 3


def test_an_allowance_fills_again_by_its_rate() -> None:
    made = Allowances(THREE)
    assert [made.take("a", START) for _ in range(5)] == [0, 0, 0, 60, 60]
    assert (made.wait("a", START), made.wait("b", START)) == (60, 0)
    later = START + timedelta(minutes=1)
    assert made.wait("a", later) == 0
    assert [made.take("a", later) for _ in range(2)] == [0, 60]
    rested = later + THREE.period
    assert [made.take("a", rested) for _ in range(4)] == [0, 0, 0, 60]


def test_looking_takes_nothing() -> None:
    made = Allowances(THREE)
    assert [made.wait("a", START) for _ in range(9)] == [0] * 9
    assert made._accounts == {}
    assert [made.take("a", START) for _ in range(4)] == [0, 0, 0, 60]


@pytest.mark.parametrize("quiet", ["a", STRANGERS])
def test_the_memory_of_callers_is_bounded_and_keeps_those_who_call(quiet: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allowances, "ACCOUNTS_MAX", 3)
    made = Allowances(THREE)
    for _ in range(3):
        made.take(quiet, START)
        made.take("busy", START)
    for number in range(9):
        made.take(f"{number}", START)
        assert made.take("busy", START) == 60
        assert len(made._accounts) <= 3
    assert made.wait(quiet, START) == 0
