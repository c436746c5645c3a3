"""Release: the first well-formed measurement decides, once; what is refused leaves no key and no secret."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from common.errors import OutcomeUnknown, Reason, Refused, Unavailable
from common.sev.measurement import FirmwareVersion, MeasurementBlob
from common.sev.secret import SecretEntry
from emulator.errors import FirmwareFailed
from tests.support.chains import make_platform
from tests.support.desk import FIRMWARE, KEK, Desk, Guest, desk, refused
from tests.support.documents import CALLER, SECRET, SECRET_GUID, STRANGER, revocation, write_document
from tests.support.documents import workload as document
from verifier.documents.workload import ATTESTED_GUID, SecretSpec
from verifier.keys.base import launch_place
from verifier.keys.file import FileKey
from verifier.launches.launch import Begun, ReleaseRequest
from verifier.launches.release import Releaser
from verifier.secrets.release import read_generated
from verifier.secrets.router import Secrets
from verifier.store.rows import Known, Outcome, Packet, RequestKey, RequestRow


async def ready(d: Desk) -> tuple[Begun, Guest, bytes]:
    """A launch with a guest that was measured as it should be."""
    begun = await d.begin()
    guest = d.start(begun)
    return begun, guest, guest.measure((await d.digests())[0])


async def spent(d: Desk, begun: Begun) -> tuple[str, object]:
    """State and keys of a launch."""
    launch = await d.broker.get(CALLER, begun.launch.launch_id)
    return launch.state, await d.keys_of(begun.launch.launch_id)


def last_record(d: Desk, begun: Begun) -> dict[str, Any]:
    record = d.audit(begun.launch.launch_id)[-1]
    return {"event": record.event, "reason": record.reason, **json.loads(record.body)}


async def test_the_measured_guest_and_only_it_gets_the_secret(tmp_path: Path) -> None:
    async with desk(tmp_path) as d:
        begun, guest, blob = await ready(d)
        released = await d.release(begun.launch.launch_id, blob)
        assert guest.open(released, blob) == (SecretEntry(guid=SECRET_GUID, data=SECRET),)
        assert await spent(d, begun) == ("released", None)
        other = d.start(await d.begin())
        with pytest.raises(FirmwareFailed):
            other.open(released, blob)
        with pytest.raises(FirmwareFailed):
            guest.open(released, guest.measure(bytes(32)))


async def test_every_listed_shape_is_accepted_and_named_in_the_receipt(tmp_path: Path) -> None:
    async with desk(tmp_path) as d:
        seen = []
        for digest in await d.digests():
            begun = await d.begin()
            released = await d.release(begun.launch.launch_id, d.start(begun).measure(digest))
            receipt = d.receipt(released)
            assert receipt["digest"] == digest.hex()
            seen.append((receipt["shape"]["vcpus"], receipt["shape"]["flavour"]))
        assert seen == [(1, "legacy"), (1, "init2"), (2, "legacy"), (2, "init2"), (4, "legacy"), (4, "init2")]


async def test_the_receipt_says_what_was_released_to_what(tmp_path: Path) -> None:
    async with desk(tmp_path) as d:
        begun, _, blob = await ready(d)
        released = await d.release(begun.launch.launch_id, blob)
        receipt = d.receipt(released)
        record = last_record(d, begun)
        assert receipt["launch_id"] == str(begun.launch.launch_id)
        assert receipt["workload"]["name"] == "web"
        assert receipt["policy"]["value"] == begun.policy
        assert receipt["firmware"] == "1.55.24"
        assert receipt["platform"] == {
            "generation": "emulated",
            "emulated": True,
            "chip": d.dependencies.pseudonyms.of(d.platform.chain.cek.fingerprint.hex()),
        }
        assert receipt["secrets"] == [str(SECRET_GUID)]
        assert any("emulated" in note for note in receipt["notes"])
        assert receipt["audit_id"] == str(d.audit(begun.launch.launch_id)[-1].audit_id)
        assert record["event"] == "launch.released"
        assert SECRET.decode().strip() not in released.receipt


async def test_plain_sev_says_what_it_does_not_measure(tmp_path: Path) -> None:
    measure = {"firmware": "ovmf.fd", "kernel": "kernel"}
    async with desk(tmp_path, content=document(policy={"allow": ["no-es"]}, measure=measure)) as d:
        begun, guest, blob = await ready(d)
        released = await d.release(begun.launch.launch_id, blob)
        assert guest.open(released, blob)
        assert d.receipt(released)["shape"] == {
            "note": "plain SEV: the number of vCPUs and the CPU type are not measured"
        }


async def test_a_listed_digest_is_named_by_its_label(tmp_path: Path) -> None:
    content = document(measure=None, digests=["00" * 32, {"digest": "11" * 32, "label": "four vCPUs"}])
    async with desk(tmp_path, content=content) as d:
        begun = await d.begin()
        released = await d.release(begun.launch.launch_id, d.start(begun).measure(b"\x11" * 32))
        assert d.receipt(released)["shape"]["label"] == "four vCPUs"


async def test_without_listed_secrets_the_guest_gets_32_bytes_of_its_own(tmp_path: Path) -> None:
    async with desk(tmp_path, content=document(secrets=None)) as d:
        values = set()
        for _ in range(2):
            begun, guest, blob = await ready(d)
            (entry,) = guest.open(await d.release(begun.launch.launch_id, blob), blob)
            assert (entry.guid, len(entry.data)) == (ATTESTED_GUID, 32)
            values.add(entry.data)
            # The owner can find it again, and nobody else.
            sealed = await d.store.generated(begun.launch.launch_id)
            assert sealed is not None
            kept = FileKey(KEK).unseal(sealed, launch_place(begun.launch.launch_id, "generated"))
            assert read_generated(kept) == (entry,)
        assert len(values) == 2


async def test_a_trailing_nul_is_added_where_asked(tmp_path: Path) -> None:
    secret = {"guid": str(SECRET_GUID), "source": {"file": "secret"}, "trailing_nul": True}
    async with desk(tmp_path, content=document(secrets=[secret])) as d:
        begun, guest, blob = await ready(d)
        assert guest.open(await d.release(begun.launch.launch_id, blob), blob)[0].data == SECRET + b"\0"


async def test_a_rotated_secret_is_read_at_release(tmp_path: Path) -> None:
    async with desk(tmp_path) as d:
        begun, guest, blob = await ready(d)
        (d.documents / "secret").write_bytes(b"rotated")
        assert guest.open(await d.release(begun.launch.launch_id, blob), blob)[0].data == b"rotated"


# What is refused.


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


# Repeats.


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


# What leaves a launch open.


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


# Races.


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


async def test_ivs_and_packets_never_repeat(tmp_path: Path) -> None:
    async with desk(tmp_path) as d:
        headers = set()
        for _ in range(20):
            begun, _, blob = await ready(d)
            headers.add((await d.release(begun.launch.launch_id, blob)).header[4:20])
        assert len(headers) == 20


async def test_a_newer_version_of_the_document_counts_for_the_next_launch(tmp_path: Path) -> None:
    async with desk(tmp_path) as d:
        newer = document(secrets=[{"guid": str(UUID(int=5)), "source": {"file": "kernel"}}])
        newer["metadata"]["version"] = "2"
        write_document(d.documents, newer, "newer.yaml")
        await d.library.load()
        begun, guest, blob = await ready(d)
        assert guest.open(await d.release(begun.launch.launch_id, blob), blob)[0].data == b"the kernel"
