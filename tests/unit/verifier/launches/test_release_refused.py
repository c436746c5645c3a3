"""What is refused at release: the owner learns why, the host learns no more, and no secret goes out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from common.errors import Reason, Refused
from common.sev.measurement import FirmwareVersion, MeasurementBlob
from common.sev.secret import SecretEntry
from tests.support.desk import FIRMWARE, Desk, Guest, desk, refused
from tests.support.documents import CALLER
from tests.support.documents import workload as document
from tests.support.releases import last_record, ready, spent
from verifier.documents.workload import SecretSpec
from verifier.launches.launch import Begun, ReleaseRequest
from verifier.launches.release import Releaser
from verifier.secrets.router import Secrets


async def wrong_digest(d: Desk, begun: Begun) -> tuple[bytes, FirmwareVersion]:
    return d.start(begun).measure(os.urandom(32)), FIRMWARE


async def lower_policy(d: Desk, begun: Begun) -> tuple[bytes, FirmwareVersion]:
    return d.start(begun).measure((await d.digests())[0], policy=begun.policy & ~1), FIRMWARE


async def no_session(d: Desk, begun: Begun) -> tuple[bytes, FirmwareVersion]:
    return Guest.without_session(begun.policy).measure((await d.digests())[0]), FIRMWARE


async def other_launch(d: Desk, _begun: Begun) -> tuple[bytes, FirmwareVersion]:
    return d.start(await d.begin()).measure((await d.digests())[0]), FIRMWARE


async def claimed_version(d: Desk, begun: Begun) -> tuple[bytes, FirmwareVersion]:
    return d.start(begun).measure((await d.digests())[0], FirmwareVersion(1, 55, 1)), FIRMWARE


async def changed_nonce(d: Desk, begun: Begun) -> tuple[bytes, FirmwareVersion]:
    blob = d.start(begun).measure((await d.digests())[0])
    return blob[:47] + bytes((blob[47] ^ 1,)), FIRMWARE


async def zeros(_d: Desk, _begun: Begun) -> tuple[bytes, FirmwareVersion]:
    return bytes(48), FIRMWARE


WRONG = [wrong_digest, lower_policy, no_session, other_launch, claimed_version, changed_nonce, zeros]


@pytest.mark.parametrize("wrong", WRONG)
async def test_a_wrong_measurement_spends_the_launch_and_the_host_learns_no_more(tmp_path: Path, wrong: Any) -> None:
    async with desk(tmp_path) as d:
        begun = await d.begin()
        blob, firmware = await wrong(d, begun)
        error = await refused(d.release(begun.launch.launch_id, blob, firmware=firmware))
        assert isinstance(error, Refused)
        assert error.reason is Reason.MEASUREMENT_REFUSED
        assert error.message == "the measurement is not one that the owner expects"
        assert set(error.fields) == {"audit_id"}
        assert await spent(d, begun) == ("refused", None)
        record = last_record(d, begun)
        assert [finding["rule"] for finding in record["findings"]] == ["launch.measurement"]
        assert record["explanation"]["sentence"]
        # The right one comes too late.
        good = d.start(begun).measure((await d.digests())[0])
        assert (await refused(d.release(begun.launch.launch_id, good))).reason is Reason.LAUNCH_REFUSED


async def test_the_owner_learns_which_neighbour_was_measured(tmp_path: Path) -> None:
    old = document(measure={**document()["spec"]["measure"], "kernel": "kernel-old"})
    new = document()
    new["metadata"]["version"] = "2"
    async with desk(tmp_path, content=[old, new]) as d:
        older = (await d.library.current()).workloads["web"][1]
        old_digest = (await d.library.prepared(older)).references[0].digest
        cases: list[tuple[bytes, dict[str, Any], str]] = [
            (old_digest, {}, "kernel 'web 1' instead of 'web 2'"),
            ((await d.digests())[0], {"policy": 0x1100000E}, "policy"),
            ((await d.digests())[0], {"firmware": FirmwareVersion(1, 55, 23)}, "SEV firmware 1.55.23"),
        ]
        for digest, how, words in cases:
            begun = await d.begin()
            await refused(d.release(begun.launch.launch_id, d.start(begun).measure(digest, **how)))
            assert words in last_record(d, begun)["explanation"]["sentence"]
        begun = await d.begin()
        blob = Guest.without_session(begun.policy).measure((await d.digests())[0])
        await refused(d.release(begun.launch.launch_id, blob))
        assert "all-zero TIK" in last_record(d, begun)["explanation"]["sentence"]


async def test_files_replaced_after_begin_are_found_by_the_search(tmp_path: Path) -> None:
    async with desk(tmp_path) as d:
        begun = await d.begin()
        (d.documents / "kernel").write_bytes(b"the next kernel")
        newer = (await d.digests())[0]
        await refused(d.release(begun.launch.launch_id, d.start(begun).measure(newer)))
        assert "kernel 'web 1'" in last_record(d, begun)["explanation"]["sentence"]


async def test_a_replayed_measurement_is_named_as_one(tmp_path: Path) -> None:
    async with desk(tmp_path) as d:
        first, _, blob = await ready(d)
        await d.release(first.launch.launch_id, blob)
        second = await d.begin()
        await refused(d.release(second.launch.launch_id, blob))
        explanation = last_record(d, second)["explanation"]
        assert explanation["replay_of"] == str(first.launch.launch_id)
        assert "replay" in explanation["sentence"]


async def test_a_refusal_is_repeated_with_its_own_audit_id(tmp_path: Path) -> None:
    async with desk(tmp_path) as d:
        begun = await d.begin()
        request_id, blob = uuid4(), d.start(begun).measure(bytes(32))
        first = await refused(d.release(begun.launch.launch_id, blob, request_id=request_id))
        again = await refused(d.release(begun.launch.launch_id, blob, request_id=request_id))
        assert (first.reason, first.fields) == (again.reason, again.fields)
        assert len(d.audit(begun.launch.launch_id)) == 2


FLOORS = [
    ("rome", (0, 24, 20)),
    ("milan", (1, 55, 21)),
    ("genoa", (1, 55, 37)),
    ("emulated", (0, 17, 0)),
]


def around(floor: tuple[int, int, int]) -> Iterator[tuple[tuple[int, int, int], bool]]:
    major, minor, build = floor
    yield floor, True
    yield (major, minor, build + 1), True
    yield (major, minor + 1, 0), True
    yield (major + 1, 0, 0), True
    if build:
        yield (major, minor, build - 1), False
    yield (major, minor - 1, 255), False


@pytest.mark.parametrize(("generation", "floor"), FLOORS)
async def test_firmware_is_held_against_the_floor_of_its_own_generation(
    tmp_path: Path, generation: str, floor: tuple[int, int, int]
) -> None:
    content = document(platforms={"generations": ["rome", "milan", "genoa", "emulated"], "chips": "any"})
    for turn, (numbers, good) in enumerate(around(floor)):
        # A platform of its own each time: keys that were used under older firmware are another matter.
        async with desk(tmp_path / str(turn), content=content, generation=generation) as d:
            version = FirmwareVersion(*numbers)
            begun = await d.begin()
            guest = d.start(begun)
            blob = guest.measure((await d.digests())[0], version)
            if good:
                assert guest.open(await d.release(begun.launch.launch_id, blob, firmware=version), blob)
            else:
                error = await refused(d.release(begun.launch.launch_id, blob, firmware=version))
                assert error.reason is Reason.FIRMWARE_TOO_OLD
                assert await spent(d, begun) == ("refused", None)


async def test_an_old_rome_does_not_pass_for_an_older_milan(tmp_path: Path) -> None:
    content = document(platforms={"generations": ["rome"], "chips": "any"})
    async with desk(tmp_path, content=content, generation="rome") as d:
        begun = await d.begin()
        version = FirmwareVersion(0, 24, 19)
        blob = d.start(begun).measure((await d.digests())[0], version)
        assert (await refused(d.release(begun.launch.launch_id, blob, firmware=version))).reason is (
            Reason.FIRMWARE_TOO_OLD
        )


async def test_a_lower_floor_with_a_reason_is_honoured_and_noted(tmp_path: Path) -> None:
    content = document(
        platforms={"generations": ["rome"], "chips": "any"},
        policy={"allow": ["key-sharing", "send"], "minimum_api": "none"},
        floors={"rome": "0.24.15"},
        accept_old_firmware="the lab's last board",
    )
    async with desk(tmp_path, content=content, generation="rome") as d:
        begun = await d.begin()
        assert begun.policy == 5
        version = FirmwareVersion(0, 24, 15)
        blob = d.start(begun).measure((await d.digests())[0], version)
        released = await d.release(begun.launch.launch_id, blob, firmware=version)
        assert any("the lab's last board" in note for note in d.receipt(released)["notes"])


@pytest.mark.parametrize("numbers", [(0, 16, 255), (0, 0, 0)])
async def test_an_api_below_0_17_is_refused_whatever_it_measured(tmp_path: Path, numbers: tuple[int, int, int]) -> None:
    async with desk(tmp_path) as d:
        begun = await d.begin()
        version = FirmwareVersion(*numbers)
        blob = d.start(begun).measure((await d.digests())[0], version)
        error = await refused(d.release(begun.launch.launch_id, blob, firmware=version))
        assert error.reason is Reason.FIRMWARE_TOO_OLD
        assert await spent(d, begun) == ("refused", None)
        assert "firmware.api" in [finding["rule"] for finding in last_record(d, begun)["findings"]]


async def test_a_chip_that_is_revoked_meanwhile_is_refused_and_so_is_the_repeat_of_a_release(tmp_path: Path) -> None:
    async with desk(tmp_path) as d:
        begun, _, blob = await ready(d)
        released_launch, _, other_blob = await ready(d)
        request_id = uuid4()
        first = await d.release(released_launch.launch.launch_id, other_blob, request_id=request_id)
        d.denied.set_owners([d.platform.chain.cek.fingerprint.hex()])
        assert (await refused(d.release(begun.launch.launch_id, blob))).reason is Reason.CHIP_REVOKED
        assert await spent(d, begun) == ("refused", None)
        repeat = d.release(released_launch.launch.launch_id, other_blob, request_id=request_id)
        assert (await refused(repeat)).reason is Reason.CHIP_REVOKED
        assert last_record(d, released_launch)["event"] == "launch.repeat_refused"
        d.denied.set_owners([])
        again = await d.release(released_launch.launch.launch_id, other_blob, request_id=request_id)
        assert (again.header, again.payload) == (first.header, first.payload)


async def test_a_workload_that_the_owner_withdraws_releases_nothing_more(tmp_path: Path) -> None:
    async with desk(tmp_path) as d:
        begun, _, blob = await ready(d)
        released_launch, _, other_blob = await ready(d)
        request_id = uuid4()
        first = await d.release(released_launch.launch.launch_id, other_blob, request_id=request_id)
        (d.documents / "web-0.yaml").rename(d.folder / "aside")
        # What the folder says counts once it was read.
        await d.library.load()
        error = await refused(d.release(begun.launch.launch_id, blob))
        assert (error.reason, set(error.fields)) == (Reason.CALLER_NOT_ALLOWED, {"audit_id"})
        assert await spent(d, begun) == ("refused", None)
        record = last_record(d, begun)
        assert [finding["rule"] for finding in record["findings"]] == ["launch.workload_withdrawn"]
        repeat = d.release(released_launch.launch.launch_id, other_blob, request_id=request_id)
        assert (await refused(repeat)).reason is Reason.CALLER_NOT_ALLOWED
        assert last_record(d, released_launch)["event"] == "launch.repeat_refused"
        (d.folder / "aside").rename(d.documents / "web-0.yaml")
        await d.library.load()
        again = await d.release(released_launch.launch.launch_id, other_blob, request_id=request_id)
        assert (again.header, again.payload) == (first.header, first.payload)


async def test_a_launch_whose_time_ran_out_while_its_secret_was_read_releases_nothing(tmp_path: Path) -> None:
    class SlowSecrets(Secrets):
        async def read(self, specs: Sequence[SecretSpec]) -> tuple[SecretEntry, ...]:
            d.clock.advance(timedelta(minutes=10))
            return await super().read(specs)

    async with desk(tmp_path) as d:
        begun, _, blob = await ready(d)
        releaser = Releaser(replace(d.dependencies, secrets=SlowSecrets()))
        request = ReleaseRequest(
            caller=CALLER,
            request_id=uuid4(),
            launch_id=begun.launch.launch_id,
            blob=MeasurementBlob.parse(blob),
            firmware=FIRMWARE,
        )
        assert (await refused(releaser.release(request))).reason is Reason.LAUNCH_EXPIRED
        assert await spent(d, begun) == ("expired", None)


async def test_refusals_that_wait_too_long_are_recorded_without_a_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("verifier.launches.release.EXPLAIN_WAIT_S", 0.01)
    async with desk(tmp_path) as d:
        begun = await d.begin()
        async with d.releaser._explaining:
            await refused(d.release(begun.launch.launch_id, d.start(begun).measure(bytes(32))))
        assert last_record(d, begun)["explanation"]["sentence"].startswith("not searched")
        assert await spent(d, begun) == ("refused", None)
