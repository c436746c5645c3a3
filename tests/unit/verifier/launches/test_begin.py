"""Begin: who may, on which platform, and that a repeat gives the same answer and nothing new."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from common.errors import Reason, Unavailable
from common.sev.abi import Status
from common.sev.certs.sev import SevCertificate
from emulator.errors import FirmwareFailed
from tests.support.chains import fresh_ca, make_platform
from tests.support.desk import Guest, desk, refused
from tests.support.documents import CALLER, SECRET_GUID, STRANGER, write_document
from tests.support.documents import workload as document
from tests.unit.verifier.launches.test_platforms import FakeKeyService


async def test_a_launch_begins_with_a_session_that_only_this_platform_opens(tmp_path: Path) -> None:
    async with desk(tmp_path) as d:
        begun = await d.begin()
        assert d.start(begun).channel.tik != bytes(16)
        assert begun.launch.state == "open"
        assert begun.launch.expire_time - begun.launch.create_time == timedelta(minutes=10)
        assert begun.pdh_fingerprint == d.platform.chain.pdh.fingerprint
        assert SevCertificate.parse(begun.godh).is_signed is False
        with pytest.raises(FirmwareFailed):
            Guest.start(make_platform(), begun)


async def test_the_policy_is_the_documents_and_the_platform_enforces_it(tmp_path: Path) -> None:
    async with desk(tmp_path, content=document(policy={"allow": ["send"], "minimum_api": "0.24"})) as d:
        begun = await d.begin()
        assert begun.policy == 0x18000007
        for lower in (0x18000006, 0x17000007, 0x07, 0x1800000F):
            with pytest.raises(FirmwareFailed) as caught:
                Guest.start(d.platform, begun, policy=lower)
            assert caught.value.status is Status.BAD_MEASUREMENT


@pytest.mark.parametrize(("generation", "policy"), [("rome", 0x1800000F), ("milan", 0x3701000F)])
async def test_the_generations_floor_goes_into_the_policy(tmp_path: Path, generation: str, policy: int) -> None:
    content = document(platforms={"generations": ["rome", "milan"], "chips": "any"})
    async with desk(tmp_path, content=content, generation=generation) as d:
        begun = await d.begin()
        assert (begun.policy, begun.launch.generation) == (policy, generation)


async def test_a_repeat_gives_the_same_session_until_the_launch_expires(tmp_path: Path) -> None:
    async with desk(tmp_path) as d:
        request_id = uuid4()
        first = await d.begin(request_id=request_id)
        d.clock.advance(timedelta(minutes=9, seconds=59))
        assert await d.begin(request_id=request_id) == first
        assert len(d.audit()) == 1
        d.clock.advance(timedelta(seconds=1))
        assert (await refused(d.begin(request_id=request_id))).reason is Reason.LAUNCH_EXPIRED
        assert await d.keys_of(first.launch.launch_id) is None


async def test_a_repeat_after_release_gives_the_session_still(tmp_path: Path) -> None:
    async with desk(tmp_path) as d:
        request_id = uuid4()
        first = await d.begin(request_id=request_id)
        await d.release(first.launch.launch_id, d.start(first).measure((await d.digests())[0]))
        again = await d.begin(request_id=request_id)
        assert (again.godh, again.session) == (first.godh, first.session)
        assert again.launch.state == "released"


async def test_a_repeat_after_another_end_is_told_so(tmp_path: Path) -> None:
    async with desk(tmp_path) as d:
        ids = uuid4(), uuid4()
        gone = await d.begin(request_id=ids[0])
        await d.abandon(gone.launch.launch_id)
        assert (await refused(d.begin(request_id=ids[0]))).reason is Reason.LAUNCH_ABANDONED
        bad = await d.begin(request_id=ids[1])
        await refused(d.release(bad.launch.launch_id, d.start(bad).measure(bytes(32))))
        assert (await refused(d.begin(request_id=ids[1]))).reason is Reason.LAUNCH_REFUSED


async def test_a_request_id_with_other_content_is_refused(tmp_path: Path) -> None:
    async with desk(tmp_path) as d:
        request_id = uuid4()
        await d.begin(request_id=request_id)
        for changed in (
            {"workload": "other"},
            {"chip_id": bytes(64)},
            {"chain": make_platform(ca=d.platform.ca).chain.to_bytes()},
            {"grant": "g"},
        ):
            error = await refused(d.begin(request_id=request_id, **changed))
            assert error.reason is Reason.REQUEST_ID_REUSED
        assert len(d.audit()) == 1


async def test_one_request_that_comes_many_times_at_once_is_one_launch(tmp_path: Path) -> None:
    async with desk(tmp_path) as d:
        request_id = uuid4()
        answers = await asyncio.gather(*(d.begin(request_id=request_id) for _ in range(16)))
        assert len({answer.launch.launch_id for answer in answers}) == 1
        assert len({answer.session for answer in answers}) == 1
        assert len(d.audit()) == 1


async def test_the_same_request_id_of_another_caller_is_another_request(tmp_path: Path) -> None:
    async with desk(tmp_path, content=document(callers=[CALLER, STRANGER])) as d:
        request_id = uuid4()
        one = await d.begin(request_id=request_id)
        other = await d.begin(request_id=request_id, caller=STRANGER)
        assert one.launch.launch_id != other.launch.launch_id
        assert one.session != other.session


async def test_an_unknown_workload_is_not_found_and_an_unnamed_caller_is_not_allowed(tmp_path: Path) -> None:
    async with desk(tmp_path) as d:
        assert (await refused(d.begin(workload="none"))).reason is Reason.NOT_FOUND
        assert d.audit() == []
        stranger = await refused(d.begin(caller=STRANGER))
        assert stranger.reason is Reason.CALLER_NOT_ALLOWED
        (record,) = d.audit()
        assert (record.event, record.caller, record.reason) == (
            "launch.begin_refused",
            STRANGER,
            "CALLER_NOT_ALLOWED",
        )
        assert str(record.audit_id) == stranger.fields["audit_id"]
        assert [each["rule"] for each in json.loads(record.body)["findings"]] == ["workload.caller"]
        assert (await refused(d.begin(caller=CALLER + "x"))).reason is Reason.CALLER_NOT_ALLOWED


async def test_a_grant_that_does_not_exist_is_not_found(tmp_path: Path) -> None:
    async with desk(tmp_path) as d:
        error = await refused(d.begin(grant="weekend"))
        assert (error.reason, error.fields["field"]) == (Reason.NOT_FOUND, "grant")


async def test_a_chain_under_a_strangers_root_is_refused_with_amds_own_key_ids(tmp_path: Path) -> None:
    async with desk(tmp_path) as d:
        forged = make_platform(ca=fresh_ca())
        assert forged.ca.ark.key_id == d.platform.ca.ark.key_id
        error = await refused(d.begin(chain=forged.chain.to_bytes()))
        assert error.reason is Reason.UNTRUSTED_ROOT
        (record,) = d.audit()
        assert (record.event, record.reason) == ("launch.begin_refused", "UNTRUSTED_ROOT")
        assert str(record.audit_id) == error.fields["audit_id"]


async def test_a_mixed_chain_is_refused(tmp_path: Path) -> None:
    async with desk(tmp_path) as d:
        other = make_platform(ca=d.platform.ca)
        for mixed in ({"pdh": other.chain.pdh}, {"pek": other.chain.pek}, {"oca": other.chain.oca}):
            chain = replace(d.platform.chain, **mixed)
            assert (await refused(d.begin(chain=chain.to_bytes()))).reason is Reason.BAD_SIGNATURE


async def test_an_unsigned_cek_is_completed_or_refused(tmp_path: Path) -> None:
    platform = make_platform()
    keys = FakeKeyService({platform.chip_id: platform.chain.cek})
    chain = platform.unsigned_chain.to_bytes()
    async with desk(tmp_path, platform=platform, key_service=keys) as d:
        assert (await refused(d.begin(chain=chain))).reason is Reason.CEK_UNSIGNED
        assert (await refused(d.begin(chain=chain, chip_id=bytes(64)))).reason is Reason.CEK_UNSIGNED
        keys.known = {b"\1" * 64: make_platform().chain.cek}
        assert (await refused(d.begin(chain=chain, chip_id=b"\1" * 64))).reason is Reason.CEK_MISMATCH
        keys.known = {platform.chip_id: platform.chain.cek}
        await d.begin(chain=chain, chip_id=platform.chip_id)


@pytest.mark.parametrize("bad", [b"", bytes(8336), b"\x01" * 8336])
async def test_bytes_that_are_no_chain_are_malformed(tmp_path: Path, bad: bytes) -> None:
    async with desk(tmp_path) as d:
        assert (await refused(d.begin(chain=bad))).reason is Reason.MALFORMED


async def test_a_generation_that_is_not_listed_is_refused(tmp_path: Path) -> None:
    content = document(platforms={"generations": ["milan"], "chips": "any"})
    async with desk(tmp_path, content=content) as d:
        error = await refused(d.begin())
        assert error.reason is Reason.GENERATION_NOT_ALLOWED
        assert "milan" not in error.message


async def test_a_chip_must_be_listed_where_any_is_not_written(tmp_path: Path) -> None:
    platform = make_platform()
    fingerprint = platform.chain.cek.fingerprint.hex()
    good = document(platforms={"generations": ["emulated"], "chips": [fingerprint]})
    bad = document(platforms={"generations": ["emulated"], "chips": ["00" * 32]})
    bad["metadata"] = {"name": "bad", "version": "1"}
    async with desk(tmp_path, content=[good, bad], platform=platform) as d:
        await d.begin()
        assert (await refused(d.begin(workload="bad"))).reason is Reason.CHIP_NOT_ALLOWED
        # The same root, another chip: its signatures are as good.
        other = make_platform(ca=platform.ca)
        assert (await refused(d.begin(chain=other.chain.to_bytes()))).reason is Reason.CHIP_NOT_ALLOWED


async def test_a_denied_chip_is_refused_although_every_signature_is_good(tmp_path: Path) -> None:
    platform = make_platform()
    async with desk(tmp_path, platform=platform, denied=[platform.chain.cek.fingerprint.hex()]) as d:
        assert (await refused(d.begin())).reason is Reason.CHIP_REVOKED
        d.denied.set_owners([])
        await d.begin()
        d.denied.set_owners([platform.chip_id.hex()])
        assert (await refused(d.begin(chip_id=platform.chip_id))).reason is Reason.CHIP_REVOKED


async def test_open_launches_are_capped_per_caller(tmp_path: Path) -> None:
    async with desk(tmp_path, content=document(callers=[CALLER, STRANGER]), open_cap=2) as d:
        first = await d.begin()
        await d.begin()
        assert (await refused(d.begin())).reason is Reason.TOO_MANY_LAUNCHES
        await d.begin(caller=STRANGER)
        await d.abandon(first.launch.launch_id)
        await d.begin()
        assert (await refused(d.begin())).reason is Reason.TOO_MANY_LAUNCHES
        d.clock.advance(timedelta(minutes=10))
        await d.begin()


async def test_secrets_that_do_not_fit_are_refused_and_nothing_is_begun(tmp_path: Path) -> None:
    async with desk(tmp_path) as d:
        # 20 bytes of table, 20 of the entry: 3032 fill the area of 3072 bytes.
        (d.documents / "secret").write_bytes(bytes(3032))
        await d.begin()
        (d.documents / "secret").write_bytes(bytes(3033))
        assert (await refused(d.begin())).reason is Reason.SECRET_TOO_LARGE
        assert len(d.audit()) == 1


async def test_listed_digests_bring_their_area(tmp_path: Path) -> None:
    small = document(measure=None, digests=["00" * 32], secret_area=64)
    async with desk(tmp_path, content=small) as d:
        (d.documents / "secret").write_bytes(bytes(24))
        await d.begin()
        (d.documents / "secret").write_bytes(bytes(25))
        assert (await refused(d.begin())).reason is Reason.SECRET_TOO_LARGE


async def test_a_firmware_without_an_area_for_secrets_is_refused(tmp_path: Path) -> None:
    from tests.support.firmware import hashes_entry, reset_entry, with_footer

    async with desk(tmp_path) as d:
        entries = [reset_entry(0x80B004), hashes_entry(0x810C00, 0x400)]
        (d.documents / "ovmf.fd").write_bytes(with_footer(b"x" * 4000, entries))
        assert (await refused(d.begin())).reason is Reason.NO_SECRET_AREA


async def test_a_secret_without_a_source_is_an_outage_and_nothing_is_begun(tmp_path: Path) -> None:
    async with desk(tmp_path) as d:
        secret = d.documents / "secret"
        for spoil in (lambda: secret.write_bytes(b""), secret.unlink, secret.mkdir):
            spoil()
            error = await refused(d.begin())
            assert error.reason is Reason.SECRET_UNAVAILABLE
            assert str(tmp_path) not in error.message
        assert d.audit() == []
        # The owner's log says which one.
        assert {event.fields["file"] for event in d.log.named("source.unavailable")} == {str(secret)}


async def test_an_unusable_workload_is_refused_without_its_reason(tmp_path: Path) -> None:
    async with desk(tmp_path) as d:
        (d.documents / "initrd").unlink()
        error = await refused(d.begin())
        assert error.reason is Reason.INVALID_CONFIGURATION
        assert "initrd" not in error.message


async def test_a_clock_far_behind_begins_nothing(tmp_path: Path) -> None:
    async with desk(tmp_path) as d:
        begun = await d.begin()
        d.clock.advance(-timedelta(minutes=11))
        assert (await refused(d.begin())).reason is Reason.CLOCK_SKEW
        assert (await d.broker.get(CALLER, begun.launch.launch_id)).state == "open"
        d.clock.advance(timedelta(minutes=11))
        await d.begin()


async def test_the_skew_is_found_after_a_restart_too(tmp_path: Path) -> None:
    async with desk(tmp_path) as d:
        await d.begin()
        clock = d.clock
    clock.advance(-timedelta(minutes=11))
    async with desk(tmp_path, clock=clock) as d:
        assert (await refused(d.begin())).reason is Reason.CLOCK_SKEW


async def test_a_launch_is_its_callers_only(tmp_path: Path) -> None:
    async with desk(tmp_path, content=document(callers=[CALLER, STRANGER])) as d:
        begun = await d.begin()
        launch_id = begun.launch.launch_id
        assert await d.broker.get(CALLER, launch_id) == begun.launch
        others = await refused(d.broker.get(STRANGER, launch_id))
        unknown = await refused(d.broker.get(STRANGER, UUID(int=1)))
        assert (others.reason, others.message, others.fields) == (unknown.reason, unknown.message, unknown.fields)
        assert (await refused(d.abandon(launch_id, caller=STRANGER))).reason is Reason.NOT_FOUND
        assert (await d.broker.get(CALLER, launch_id)).state == "open"


async def test_the_record_of_begin_says_what_was_agreed(tmp_path: Path) -> None:
    async with desk(tmp_path) as d:
        begun = await d.begin()
        (record,) = d.audit(begun.launch.launch_id)
        body = json.loads(record.body)
        assert (record.event, record.caller) == ("launch.begun", CALLER)
        assert body["workload"]["name"] == "web"
        chip = d.dependencies.pseudonyms.of(begun.launch.fingerprint)
        assert body["platform"] == {"generation": "emulated", "chip": chip}
        (line,) = d.log.named("launch.begun")
        assert line.fields["launch_id"] == str(begun.launch.launch_id)


async def test_a_changed_document_changes_no_launch_that_has_begun(tmp_path: Path) -> None:
    async with desk(tmp_path) as d:
        begun = await d.begin()
        digest = (await d.digests())[0]
        stricter = document(measure=None, digests=["00" * 32], callers=[STRANGER])
        stricter["metadata"]["version"] = "2"
        write_document(d.documents, stricter, "newer.yaml")
        await d.library.load()
        assert (await refused(d.begin())).reason is Reason.CALLER_NOT_ALLOWED
        guest = d.start(begun)
        blob = guest.measure(digest)
        released = await d.release(begun.launch.launch_id, blob)
        assert released.launch.workload_version == "1"
        assert guest.open(released, blob)[0].guid == SECRET_GUID


async def test_a_secret_file_that_is_far_too_large_is_refused_without_its_size_in_memory(tmp_path: Path) -> None:
    import tracemalloc

    async with desk(tmp_path) as d:
        with (d.documents / "secret").open("wb") as file:
            file.truncate(1 << 30)
        tracemalloc.start()
        error = await refused(d.begin())
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert error.reason is Reason.SECRET_TOO_LARGE
        assert peak < 8 << 20


async def test_a_key_services_own_words_stay_with_the_owner(tmp_path: Path) -> None:
    platform = make_platform()
    down = FakeKeyService({}, Unavailable(Reason.KEY_SERVICE_UNAVAILABLE, "/owner/ceks cannot be read"))
    async with desk(tmp_path, platform=platform, key_service=down) as d:
        error = await refused(d.begin(chain=platform.unsigned_chain.to_bytes(), chip_id=platform.chip_id))
        assert error.reason is Reason.KEY_SERVICE_UNAVAILABLE
        assert "/owner" not in error.message
        (line,) = d.log.named("key_service.unavailable")
        assert "/owner/ceks" in str(line.fields["error"])
