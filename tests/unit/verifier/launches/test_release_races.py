"""Releases that come at once: one packet, and one end."""

from __future__ import annotations

import asyncio
from pathlib import Path
from uuid import uuid4

from common.errors import Reason
from tests.support.desk import Guest, desk
from tests.support.releases import ready, spent
from verifier.launches.release import Releaser


async def test_thirty_two_requests_for_one_launch_are_one_packet(tmp_path: Path) -> None:
    async with desk(tmp_path) as d:
        for _ in range(3):
            begun, _, blob = await ready(d)
            ids = [uuid4() for _ in range(8)] * 4
            outcomes = await asyncio.gather(
                *(d.release(begun.launch.launch_id, blob, request_id=request_id) for request_id in ids),
                return_exceptions=True,
            )
            packets = {(o.header, o.payload) for o in outcomes if not isinstance(o, BaseException)}
            errors = [o for o in outcomes if isinstance(o, BaseException)]
            assert len(packets) == 1
            assert len(errors) == 28
            assert {getattr(error, "reason", None) for error in errors} == {Reason.ALREADY_RELEASED}


async def test_two_releasers_on_one_store_are_one_packet(tmp_path: Path) -> None:
    # Without the per-launch lock of one releaser: what is left is the compare-and-set.
    async with desk(tmp_path) as d:
        releasers = [Releaser(d.dependencies) for _ in range(32)]
        begun, guest, blob = await ready(d)
        second = Guest.start(d.platform, begun).measure((await d.digests())[1])

        async def ask(number: int) -> object:
            d.releaser = releasers[number]
            return await d.release(begun.launch.launch_id, (blob, second)[number % 2])

        outcomes = await asyncio.gather(*(ask(number) for number in range(32)), return_exceptions=True)
        packets = [o for o in outcomes if not isinstance(o, BaseException)]
        assert len(packets) == 1
        assert [record.event for record in d.audit(begun.launch.launch_id)].count("launch.released") == 1
        assert guest.policy


async def test_a_good_and_a_bad_measurement_race_to_exactly_one_end(tmp_path: Path) -> None:
    async with desk(tmp_path) as d:
        for order in (0, 1):
            begun, _, blob = await ready(d)
            tries = [blob, d.start(begun).measure(bytes(32))]
            tries = tries if order else tries[::-1]
            outcomes = await asyncio.gather(
                *(d.release(begun.launch.launch_id, each) for each in tries), return_exceptions=True
            )
            state, keys = await spent(d, begun)
            assert keys is None
            assert state in {"released", "refused"}
            assert sum(not isinstance(o, BaseException) for o in outcomes) == (state == "released")


async def test_abandon_and_release_race_to_exactly_one_end(tmp_path: Path) -> None:
    async with desk(tmp_path) as d:
        begun, _, blob = await ready(d)
        launch_id = begun.launch.launch_id
        outcomes = await asyncio.gather(d.release(launch_id, blob), d.abandon(launch_id), return_exceptions=True)
        assert sum(not isinstance(o, BaseException) for o in outcomes) == 1


async def test_ivs_and_packets_never_repeat(tmp_path: Path) -> None:
    async with desk(tmp_path) as d:
        headers = set()
        for _ in range(20):
            begun, _, blob = await ready(d)
            headers.add((await d.release(begun.launch.launch_id, blob)).header[4:20])
        assert len(headers) == 20
