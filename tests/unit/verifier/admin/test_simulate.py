"""Simulation: the rules of begin and release over the past or the supposed; nothing is changed, nothing guessed."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest

from common.errors import InvalidInput, NotFound, Reason, WrongState
from common.sev.errors import ParseError
from common.sev.measurement import FirmwareVersion
from tests.support.chains import fresh_ca, make_platform
from tests.support.desk import FIRMWARE, refused
from tests.support.documents import CALLER, SECRET_GUID, STRANGER, grant, platform, revocation, workload
from tests.support.owner_site import OwnerSite, asked, text
from tests.support.spellings import spellings
from verifier.admin.cases import Judgement, Supposed

OLD = FirmwareVersion(1, 49, 1)


def supposed(site: OwnerSite, **changes: Any) -> Supposed:
    """A launch that is accepted; `changes` make it another one."""
    good = Supposed(workload="web", caller=CALLER, grant=None, chain=site.desk.platform.chain.to_bytes(), digest=None)
    return replace(good, **changes)


def rules(judgement: Judgement) -> list[str]:
    return [each.rule for each in judgement.findings]


async def test_a_good_launch_that_nobody_began_is_accepted(site: OwnerSite) -> None:
    judgement = await site.owner.simulate.supposed(supposed(site), [], FIRMWARE)
    assert (judgement.accepted, judgement.findings) == (True, ())
    assert (judgement.workload_version, judgement.grant) == ("1", None)


async def test_every_digest_that_is_allowed_is_accepted_and_no_other(site: OwnerSite) -> None:
    for digest in await site.desk.digests():
        assert (await site.owner.simulate.supposed(supposed(site, digest=digest), [], FIRMWARE)).accepted
    other = await site.owner.simulate.supposed(supposed(site, digest=bytes(32)), [], FIRMWARE)
    assert rules(other) == ["launch.measurement"]


async def test_without_firmware_nothing_is_accepted(site: OwnerSite) -> None:
    judgement = await site.owner.simulate.supposed(supposed(site), [])
    assert not judgement.accepted
    assert rules(judgement) == ["simulate.firmware"]


async def test_a_released_launch_is_judged_by_what_it_proved(site: OwnerSite) -> None:
    launch_id = (await site.released()).launch.launch_id
    assert (await site.owner.simulate.past(launch_id, [])).accepted


async def test_a_changed_document_is_held_against_the_past(site: OwnerSite) -> None:
    launch_id = (await site.released()).launch.launch_id
    cek = site.desk.platform.chain.cek.fingerprint.hex()
    for content, expected in (
        (workload("web", "2", floors={"emulated": "1.55.25"}), ["firmware.floor"]),
        (workload("web", "2", digests=["ab" * 32], measure=None), ["launch.measurement"]),
        (workload("web", "2", callers=[STRANGER]), ["workload.caller"]),
        (workload("web", "2", platforms={"generations": ["milan"], "chips": "any"}), ["platform.generation"]),
        (revocation(ceks=[cek]), ["platform.chip_revoked", "launch.chip_revoked"]),
        (platform(cek=cek, callers=[STRANGER]), ["platform.caller"]),
        (revocation(ceks=[], firmware=[{"generation": "emulated", "below": "1.56.0"}]), ["launch.revoked"]),
        (workload("web", "2"), []),
    ):
        judgement = await site.owner.simulate.past(launch_id, [text(content)])
        assert rules(judgement) == expected, content


async def test_a_version_that_would_not_be_in_force_is_not_simulated_as_if_it_were(site: OwnerSite) -> None:
    await site.apply(grant("fleet", "10"))
    case = supposed(site, caller=STRANGER)
    stop = text(grant("fleet", "9", suspended=True))
    error = await refused(site.owner.simulate.supposed(case, [stop], FIRMWARE))
    assert isinstance(error, WrongState)
    assert error.reason is Reason.DOCUMENT_CONFLICT
    assert "Grant fleet 9 would NOT be in force, 10 is" in error.message
    both = [text(grant("other", "2")), text(grant("other", "1"))]
    error = await refused(site.owner.simulate.supposed(case, both, FIRMWARE))
    assert "Grant other 1 would NOT be in force, 2 is" in error.message
    for version in ("10", "11"):
        judgement = await site.owner.simulate.supposed(case, [text(grant("fleet", version, suspended=True))], FIRMWARE)
        assert rules(judgement) == ["grant.suspended"]


async def test_simulating_changes_nothing(site: OwnerSite) -> None:
    await site.apply(grant())
    launch_id = (await site.released(caller=STRANGER)).launch.launch_id
    before = (await site.desk.store.revision(), await site.desk.store.ledger("fleet"), len(site.desk.audit()))
    await site.owner.simulate.past(launch_id, [text(grant("fleet", "2", launches=50))])
    await site.owner.simulate.supposed(supposed(site, caller=STRANGER), [text(revocation())], FIRMWARE)
    after = (await site.desk.store.revision(), await site.desk.store.ledger("fleet"), len(site.desk.audit()))
    assert after == before


async def test_all_that_is_wrong_is_found_and_not_the_first_alone(site: OwnerSite) -> None:
    cek = site.desk.platform.chain.cek.fingerprint.hex()
    texts = [
        text(workload("web", "2", floors={"emulated": "1.55.25"})),
        text(platform(cek=cek, callers=[STRANGER])),
    ]
    judgement = await site.owner.simulate.supposed(supposed(site, digest=bytes(32), caller="nobody"), texts, FIRMWARE)
    assert rules(judgement) == ["workload.caller", "platform.caller", "launch.measurement"]


@pytest.mark.parametrize("end", ["refused", "open"])
async def test_a_launch_that_proved_nothing_is_never_accepted(site: OwnerSite, end: str) -> None:
    begun = await (site.refused() if end == "refused" else site.desk.begin())
    judgement = await site.owner.simulate.past(begun.launch.launch_id, [], FIRMWARE)
    assert not judgement.accepted
    assert rules(judgement) == ["simulate.unproven"]


async def test_the_hosts_word_on_its_firmware_is_not_taken_for_proven(site: OwnerSite) -> None:
    begun = await site.refused()
    judgement = await site.owner.simulate.past(begun.launch.launch_id, [])
    assert rules(judgement) == ["simulate.unproven", "simulate.firmware"]


async def test_another_firmware_may_be_supposed(site: OwnerSite) -> None:
    launch_id = (await site.released()).launch.launch_id
    floored = [text(workload("web", "2", floors={"emulated": "1.55.24"}))]
    assert (await site.owner.simulate.past(launch_id, floored)).accepted
    judgement = await site.owner.simulate.past(launch_id, floored, OLD)
    assert "firmware.floor" in rules(judgement)


async def test_a_pdh_that_predates_the_firmware_is_found(site: OwnerSite) -> None:
    launch_id = (await site.released()).launch.launch_id
    judgement = await site.owner.simulate.past(launch_id, [], FirmwareVersion(1, 55, 30))
    assert rules(judgement) == ["firmware.pdh"]


async def test_the_grant_is_chosen_as_at_begin_and_its_ledger_asked(site: OwnerSite) -> None:
    await site.apply(grant(launches=1))
    spending = supposed(site, caller=STRANGER)
    fresh = await site.owner.simulate.supposed(spending, [], FIRMWARE)
    assert (fresh.accepted, fresh.grant) == (True, "fleet")
    await site.desk.begin(caller=STRANGER)
    assert rules(await site.owner.simulate.supposed(spending, [], FIRMWARE)) == ["grant.busy"]
    more = [text(grant("fleet", "2", launches=2))]
    assert (await site.owner.simulate.supposed(spending, more, FIRMWARE)).accepted


async def test_a_reservation_whose_time_ran_out_is_given_back_as_at_begin(site: OwnerSite) -> None:
    await site.apply(grant(launches=1))
    spending = supposed(site, caller=STRANGER)
    await site.desk.begin(caller=STRANGER)
    site.desk.clock.advance(timedelta(minutes=9))
    assert rules(await site.owner.simulate.supposed(spending, [], FIRMWARE)) == ["grant.busy"]
    site.desk.clock.advance(timedelta(minutes=1))
    assert (await site.owner.simulate.supposed(spending, [], FIRMWARE)).accepted
    await site.desk.begin(caller=STRANGER)
    assert rules(await site.owner.simulate.supposed(spending, [], FIRMWARE)) == ["grant.busy"]


async def test_a_spent_grant_is_found(site: OwnerSite) -> None:
    await site.apply(grant(launches=1))
    await site.released(caller=STRANGER)
    judgement = await site.owner.simulate.supposed(supposed(site, caller=STRANGER), [], FIRMWARE)
    assert rules(judgement) == ["grant.exhausted"]


async def test_a_rate_is_found(site: OwnerSite) -> None:
    await site.apply(grant(rate="1/1h"))
    await site.released(caller=STRANGER)
    assert rules(await site.owner.simulate.supposed(supposed(site, caller=STRANGER), [], FIRMWARE)) == ["grant.rate"]


async def test_a_suspended_grant_is_found_at_begin_and_at_release(site: OwnerSite) -> None:
    await site.apply(grant())
    launch_id = (await site.released(caller=STRANGER)).launch.launch_id
    judgement = await site.owner.simulate.past(launch_id, [text(grant("fleet", "2", suspended=True))])
    assert rules(judgement) == ["grant.suspended", "launch.grant"]


async def test_a_grant_that_is_not_there_is_found(site: OwnerSite) -> None:
    assert rules(await site.owner.simulate.supposed(supposed(site, grant="none"), [], FIRMWARE))[0] == "simulate.grant"


async def test_several_grants_are_ambiguous(site: OwnerSite) -> None:
    for name in ("a", "b"):
        await site.apply(grant(name))
    spending = supposed(site, caller=STRANGER)
    assert rules(await site.owner.simulate.supposed(spending, [], FIRMWARE)) == ["simulate.grant"]
    named = replace(spending, grant="b")
    assert (await site.owner.simulate.supposed(named, [], FIRMWARE)).grant == "b"


async def test_an_unknown_workload_is_found(site: OwnerSite) -> None:
    judgement = await site.owner.simulate.supposed(supposed(site, workload="none"), [], FIRMWARE)
    assert (rules(judgement), judgement.workload_version) == (["simulate.workload"], None)
    added = [text(workload("none"))]
    assert (await site.owner.simulate.supposed(supposed(site, workload="none"), added, FIRMWARE)).accepted


async def test_a_workload_whose_files_are_missing_is_found(site: OwnerSite) -> None:
    (site.desk.documents / "kernel").unlink()
    judgement = await site.owner.simulate.supposed(supposed(site), [], FIRMWARE)
    assert rules(judgement) == ["simulate.workload"]
    assert "kernel" in judgement.findings[0].message


async def test_a_platform_that_is_not_genuine_is_found(site: OwnerSite) -> None:
    forged = make_platform(ca=fresh_ca()).chain.to_bytes()
    assert rules(await site.owner.simulate.supposed(supposed(site, chain=forged), [], FIRMWARE)) == ["platform.genuine"]


async def test_what_is_no_chain_is_refused_as_such(site: OwnerSite) -> None:
    error = await refused(site.owner.simulate.supposed(supposed(site, chain=bytes(8336)), [], FIRMWARE))
    assert isinstance(error, ParseError)


async def test_a_secret_without_an_answer_is_found(site: OwnerSite) -> None:
    (site.desk.documents / "secret").unlink()
    judgement = await site.owner.simulate.supposed(supposed(site), [], FIRMWARE)
    assert rules(judgement) == ["secrets.available"]
    assert f"secret {SECRET_GUID} (file {site.desk.documents / 'secret'}): " in judgement.findings[0].message
    # The caller of a launch learns nothing of that.
    error = await refused(site.desk.begin())
    assert error.message == "a secret's source has no answer"


async def test_each_secret_without_an_answer_is_named_and_no_secrets_value(site: OwnerSite) -> None:
    value = b"correct horse battery staple"
    await site.owner.secrets.put(asked(), "disk", value)
    sources: list[dict[str, Any]] = [
        {"stored": {"name": "disk"}},
        {"stored": {"name": "disk", "version": 2}},
        {"vault": {"mount": "kv", "path": "web/disk", "field": "key"}},
    ]
    secrets = [{"guid": str(UUID(int=number)), "source": source} for number, source in enumerate(sources, 1)]
    judgement = await site.owner.simulate.supposed(
        supposed(site), [text(workload("web", "2", secrets=secrets))], FIRMWARE
    )
    assert [(each.rule, each.reason, each.message) for each in judgement.findings] == [
        (
            "secrets.available",
            Reason.SECRET_UNAVAILABLE,
            f"secret {UUID(int=2)} (stored disk version 2): is not in the store",
        ),
        (
            "secrets.available",
            Reason.SECRET_UNAVAILABLE,
            f"secret {UUID(int=3)} (vault kv/web/disk#key): no such source is configured",
        ),
    ]
    for spelled in spellings(value):
        assert spelled not in repr(judgement).encode()


async def test_secrets_that_do_not_fit_are_found(site: OwnerSite) -> None:
    (site.desk.documents / "secret").write_bytes(bytes(16384))
    assert rules(await site.owner.simulate.supposed(supposed(site), [], FIRMWARE)) == ["secrets.room"]


async def test_chips_newly_revoked_by_id_leave_a_platform_without_an_id_in_doubt(site: OwnerSite) -> None:
    by_id = revocation(ceks=[], chips=["ab" * 64])
    judgement = await site.owner.simulate.supposed(supposed(site), [text(by_id)], FIRMWARE)
    assert rules(judgement) == ["simulate.chip"]


async def test_a_bad_document_is_no_judgement(site: OwnerSite) -> None:
    error = await refused(site.owner.simulate.supposed(supposed(site), [text(grant(launches=0))], FIRMWARE))
    assert isinstance(error, InvalidInput)


async def test_an_unknown_launch_is_not_found(site: OwnerSite) -> None:
    assert isinstance(await refused(site.owner.simulate.past(uuid4(), [])), NotFound)
