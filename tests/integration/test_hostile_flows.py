"""A host or orchestrator that replays, reorders, mixes or lies, against the real services; how each side says no.

The flow is the orchestrator's own, with liars in between. What the host's side refuses is the agent's or the firmware's
own reason, and the owner's log has the launch given up for it; what the owner refuses has its reason in the owner's log
too. Every lie has its honest twin: `test_without_a_lie_the_guest_runs` takes the same way.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Any
from uuid import uuid4

import pytest

from common.errors import Reason
from common.ids import step_request_id
from orchestrator.demo.site import GUEST, WORKLOAD
from orchestrator.demo.stack import Stack
from orchestrator.drivers.base import Evidence, Measured, Packet, Session
from orchestrator.flow import Step
from tests.support.hostile import (
    GUESTS,
    NEWER,
    OTHER,
    begun,
    check_refused,
    flip,
    hostile_stack,
    instead,
    launched,
    other_platform,
    owners_log,
    reason_of,
    released,
    rotate,
    start,
)
from tests.support.stack import Sides, order, sides

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with hostile_stack() as running:
        yield running


@pytest.fixture
async def both(stack: Stack) -> AsyncIterator[Sides]:
    async with sides(stack) as reached:
        yield reached
    for guest in GUESTS:
        stack.end_guest(guest)
        stack.site.serial(guest).unlink(missing_ok=True)


async def test_without_a_lie_the_guest_runs(both: Sides) -> None:
    outcome = await launched(both)
    assert outcome.running, outcome.error
    assert outcome.session
    assert owners_log(both, outcome.session.launch_id) == [("launch.begun", None), ("launch.released", None)]
    assert [each.data for each in both.secrets_read(GUEST, wait=True)] == [both.stack.site.secret.read_bytes()]


# Lies about one thing, told in the middle of an honest launch.


@pytest.mark.parametrize("bit", [0, 1, 2, 3, 4, 5, 16, 24, 31])
async def test_a_lie_about_the_policy_is_the_firmwares_refusal(both: Sides, bit: int) -> None:
    outcome = await launched(both, session=lambda true: replace(true, policy=true.policy ^ 1 << bit))
    check_refused(both, outcome, Step.START, Reason.FIRMWARE_BAD_MEASUREMENT, by="host")


@pytest.mark.parametrize("byte", [0, 16, 48, 64, 96, 127])  # nonce, wrapped keys, IV, both MACs
async def test_a_session_with_one_bit_changed_is_the_firmwares_refusal(both: Sides, byte: int) -> None:
    outcome = await launched(both, session=lambda true: replace(true, blob=flip(true.blob, 8 * byte)))
    check_refused(both, outcome, Step.START, Reason.FIRMWARE_BAD_MEASUREMENT, by="host")


async def test_what_is_no_policy_or_no_key_does_not_reach_the_firmware(both: Sides) -> None:
    reserved, x_of_godh = 1 << 6, 8 * 0x18
    lies: list[Callable[[Session], Session]] = [
        lambda true: replace(true, policy=true.policy | reserved),
        lambda true: replace(true, godh=flip(true.godh, x_of_godh)),
    ]
    for lie in lies:
        outcome = await launched(both, session=lie)
        check_refused(both, outcome, Step.START, Reason.INVALID_ARGUMENT, by="host")


@pytest.mark.parametrize(
    "firmware",
    [{"api_major": 2}, {"api_major": 0}, {"api_minor": 54}, {"api_minor": 56}, {"build": 23}, {"build": 25}],
    ids=str,
)
async def test_a_lie_about_api_or_build_is_found_by_the_mac(both: Sides, firmware: dict[str, int]) -> None:
    outcome = await launched(both, measured=lambda true: replace(true, firmware=true.firmware._replace(**firmware)))
    check_refused(both, outcome, Step.RELEASE, Reason.MEASUREMENT_REFUSED, by="owner")


async def test_old_firmware_is_too_old_and_no_claim_makes_it_newer(both: Sides) -> None:
    truth = await launched(both, replace(order(GUEST), workload=NEWER))
    check_refused(both, truth, Step.RELEASE, Reason.FIRMWARE_TOO_OLD, by="owner")
    lie = await launched(
        both,
        replace(order(GUEST), workload=NEWER),
        measured=lambda true: replace(true, firmware=true.firmware._replace(build=25)),
    )
    check_refused(both, lie, Step.RELEASE, Reason.MEASUREMENT_REFUSED, by="owner")


@pytest.mark.parametrize("part", ["header", "payload"])
async def test_a_packet_with_one_bit_changed_is_the_firmwares_refusal(both: Sides, part: str) -> None:
    outcome = await launched(both, packet=lambda true: replace(true, **{part: flip(getattr(true, part), 8 * 30)}))
    check_refused(both, outcome, Step.INJECT, Reason.FIRMWARE_BAD_MEASUREMENT, by="host")


# Replays.


async def test_a_measurement_of_an_earlier_launch_is_refused_as_another_guests(both: Sides) -> None:
    first = await launched(both)
    assert first.measured is not None
    await both.end(first)
    both.stack.site.serial(GUEST).unlink(missing_ok=True)
    outcome = await launched(both, measured=instead(first.measured))
    check_refused(both, outcome, Step.RELEASE, Reason.MEASUREMENT_REFUSED, by="owner")


async def test_a_packet_of_an_earlier_launch_is_the_firmwares_refusal(both: Sides) -> None:
    packets: list[Packet] = []

    def keep(true: Packet) -> Packet:
        packets.append(true)
        return true

    first = await launched(both, packet=keep)
    await both.end(first)
    both.stack.site.serial(GUEST).unlink(missing_ok=True)
    outcome = await launched(both, packet=instead(packets[0]))
    check_refused(both, outcome, Step.INJECT, Reason.FIRMWARE_BAD_MEASUREMENT, by="host")


async def test_a_session_that_was_spent_starts_a_guest_that_is_given_nothing(both: Sides) -> None:
    first = await launched(both)
    assert first.session is not None
    await both.end(first)
    # The agent keeps ids, not sessions: under a new id it starts the guest once more.
    again = replace(first.session, launch_id=uuid4())
    await start(both, again)
    measured = await both.host.measure(again.launch_id, within=20)
    assert await reason_of(released(both, first.session.launch_id, measured)) is Reason.ALREADY_RELEASED
    assert await reason_of(released(both, again.launch_id, measured)) is Reason.NOT_FOUND
    assert owners_log(both, first.session.launch_id)[-1] == ("launch.released", None)
    # And under its own id it starts nothing.
    assert await reason_of(start(both, first.session, OTHER)) in {Reason.WRONG_STATE, Reason.REQUEST_ID_REUSED}
    await both.end(again)


async def test_of_two_guests_from_one_session_the_first_measurement_decides(both: Sides) -> None:
    session = await begun(both)
    twin = replace(session, launch_id=uuid4())
    await start(both, session)
    await start(both, twin, OTHER)
    first, second = [await both.host.measure(each.launch_id, within=20) for each in (session, twin)]
    packet = await released(both, session.launch_id, first)
    assert await reason_of(released(both, session.launch_id, second)) is Reason.ALREADY_RELEASED
    step = both.host.inject(twin.launch_id, packet, request_id=uuid4(), within=20)
    assert await reason_of(step) is Reason.FIRMWARE_BAD_MEASUREMENT
    for each in (session, twin):
        await both.end(each)


# The right messages in a wrong order.


async def test_steps_out_of_order_are_refused_by_both_sides(both: Sides) -> None:
    session = await begun(both)
    nothing = Measured(blob=bytes(48), firmware=(await _firmware(both)))
    packet = Packet(header=bytes(52), payload=bytes(64), receipt="")
    unknown: dict[str, Callable[[], Awaitable[object]]] = {
        "measure": lambda: both.host.measure(session.launch_id, within=20),
        "inject": lambda: both.host.inject(session.launch_id, packet, request_id=uuid4(), within=20),
        "resume": lambda: both.host.resume(session.launch_id, request_id=uuid4(), within=20),
    }
    for step in unknown.values():
        assert await reason_of(step()) is Reason.NOT_FOUND
    await start(both, session)
    for name in ("inject", "resume"):
        assert await reason_of(unknown[name]()) is Reason.WRONG_STATE, name
    await both.host.measure(session.launch_id, within=20)
    assert await reason_of(unknown["resume"]()) is Reason.WRONG_STATE
    assert not both.secrets_read(GUEST)
    assert owners_log(both, session.launch_id) == [("launch.begun", None)]
    # A measurement before the guest's own is a measurement: the first one decides.
    assert await reason_of(released(both, session.launch_id, nothing)) is Reason.MEASUREMENT_REFUSED
    true = await both.host.measure(session.launch_id, within=20)
    assert await reason_of(released(both, session.launch_id, true)) is Reason.LAUNCH_REFUSED
    assert owners_log(both, session.launch_id) == [
        ("launch.begun", None),
        ("launch.refused", Reason.MEASUREMENT_REFUSED.value),
    ]
    await both.end(session)


async def _firmware(both: Sides) -> Any:
    """What the host's firmware is, learned from an honest launch's measurement."""
    session = await begun(both)
    await start(both, session)
    measured = await both.host.measure(session.launch_id, within=20)
    await both.end(session)
    return measured.firmware


async def test_nothing_is_released_after_abandon_and_nothing_abandoned_after_release(both: Sides) -> None:
    session = await begun(both)
    await start(both, session)
    measured = await both.host.measure(session.launch_id, within=20)
    await both.owner.abandon(session.launch_id, None, request_id=uuid4(), within=20)
    assert await reason_of(released(both, session.launch_id, measured)) is Reason.LAUNCH_ABANDONED
    await both.end(session)
    outcome = await launched(both)
    assert outcome.session
    step = both.owner.abandon(outcome.session.launch_id, None, request_id=uuid4(), within=20)
    assert await reason_of(step) is Reason.ALREADY_RELEASED
    assert await both.owner.state(outcome.session.launch_id, within=20) == "released"


# Two launches' messages, mixed.


async def test_what_belongs_to_two_launches_does_not_go_together(both: Sides) -> None:
    a, b = await begun(both), await begun(both)
    for mixed in (replace(a, blob=b.blob), replace(a, godh=b.godh)):
        assert await reason_of(start(both, replace(mixed, launch_id=uuid4()))) is Reason.FIRMWARE_BAD_MEASUREMENT
    await start(both, a)
    await start(both, b, OTHER)
    of_a, of_b = [await both.host.measure(each.launch_id, within=20) for each in (a, b)]
    step = step_request_id(a.launch_id, Step.RELEASE)
    packet_a = await released(both, a.launch_id, of_a, step)
    assert await reason_of(released(both, b.launch_id, of_b, step)) is Reason.REQUEST_ID_REUSED
    packet_b = await released(both, b.launch_id, of_b)
    for mixed_packet in (
        packet_a,
        replace(packet_b, header=packet_a.header),
        replace(packet_b, payload=packet_a.payload),
    ):
        inject = both.host.inject(b.launch_id, mixed_packet, request_id=uuid4(), within=20)
        # The firmware refuses the first, and the agent ends that guest: it cannot be tried on again.
        assert await reason_of(inject) in {Reason.FIRMWARE_BAD_MEASUREMENT, Reason.WRONG_STATE}
    assert not both.secrets_read(OTHER)
    await both.host.inject(a.launch_id, packet_a, request_id=uuid4(), within=20)
    await both.host.resume(a.launch_id, request_id=uuid4(), within=20)
    assert [each.data for each in both.secrets_read(GUEST, wait=True)] == [both.stack.site.secret.read_bytes()]
    for each in (a, b):
        await both.end(each)


async def test_another_launchs_measurement_spends_the_launch_that_it_is_given_for(both: Sides) -> None:
    a, b = await begun(both), await begun(both)
    await start(both, a)
    of_a = await both.host.measure(a.launch_id, within=20)
    assert await reason_of(released(both, b.launch_id, of_a)) is Reason.MEASUREMENT_REFUSED
    assert owners_log(both, b.launch_id)[-1] == ("launch.refused", Reason.MEASUREMENT_REFUSED.value)
    # Its own launch is not touched by that.
    assert (await released(both, a.launch_id, of_a)).payload
    await both.end(a)


# Another platform, or another PDH, in the middle.


async def test_a_session_for_another_platform_is_stale_and_a_lie_about_it_does_not_open_it(both: Sides) -> None:
    other = await other_platform(both)
    stale = await launched(both, evidence=instead(other))
    check_refused(both, stale, Step.START, Reason.SESSION_STALE, by="host")
    mine = await begun(both)
    opened = await launched(
        both,
        evidence=instead(other),
        session=lambda true: replace(true, pdh_fingerprint=mine.pdh_fingerprint),
    )
    check_refused(both, opened, Step.START, Reason.FIRMWARE_BAD_MEASUREMENT, by="host")


async def test_a_chain_of_two_platforms_is_no_chain(both: Sides) -> None:
    mine, other = await both.host.export_chain(within=20), await other_platform(both)
    pdh = 2084  # bytes of one certificate; the PDH comes first
    for mixed, chip_id in (
        (mine.chain[:pdh] + other.chain[pdh:], other.chip_id),
        (other.chain[:pdh] + mine.chain[pdh:], mine.chip_id),
    ):
        outcome = await launched(both, evidence=instead(Evidence(chain=mixed, chip_id=chip_id)))
        assert outcome.error is not None
        assert (outcome.steps[-1].step, outcome.error.reason) == (Step.BEGIN, Reason.BAD_SIGNATURE)


async def test_a_chip_id_that_is_another_chips_leads_to_no_other_key(both: Sides) -> None:
    rotate(both)  # a chain that the owner has not seen: its CEK carries no signature, and the signed one goes by the id
    mine, other = await both.host.export_chain(within=20), await other_platform(both)
    lie = replace(mine, chip_id=other.chip_id)
    outcome = await launched(both, evidence=instead(lie))
    assert outcome.error is not None
    assert (outcome.steps[-1].step, outcome.error.reason) == (Step.BEGIN, Reason.CEK_MISMATCH)
    honest = await begun(both, mine)
    # What was verified once is known by its bytes, whatever chip it is said to be.
    outcome = await launched(both, evidence=instead(lie))
    assert outcome.running, outcome.error
    assert outcome.session
    assert outcome.session.fingerprint == honest.fingerprint


async def test_a_session_for_an_older_pdh_is_stale_and_a_newer_fingerprint_does_not_open_it(both: Sides) -> None:
    older = await both.host.export_chain(within=20)
    old = await begun(both, older)
    rotate(both)
    assert await reason_of(start(both, old)) is Reason.SESSION_STALE
    new = await begun(both)
    assert new.pdh_fingerprint != old.pdh_fingerprint
    lie = replace(old, launch_id=uuid4(), pdh_fingerprint=new.pdh_fingerprint)
    assert await reason_of(start(both, lie)) is Reason.FIRMWARE_BAD_MEASUREMENT
    # Nor does an old session go under the new launch, whose chain is the newer one.
    mixed = replace(old, launch_id=new.launch_id, pdh_fingerprint=new.pdh_fingerprint)
    outcome = await launched(both, session=lambda true: replace(mixed, launch_id=true.launch_id))
    check_refused(both, outcome, Step.START, Reason.FIRMWARE_BAD_MEASUREMENT, by="host")
    # An old chain is genuine, and what it gets is of no use.
    outcome = await launched(both, evidence=instead(older))
    check_refused(both, outcome, Step.START, Reason.SESSION_STALE, by="host")


async def test_a_request_for_an_older_chain_is_not_repeated_with_a_newer_one(both: Sides) -> None:
    older, request_id = await both.host.export_chain(within=20), uuid4()
    first = await both.owner.begin(older, WORKLOAD, None, request_id=request_id, within=20)
    rotate(both)
    newer = await both.host.export_chain(within=20)
    again = both.owner.begin(newer, WORKLOAD, None, request_id=request_id, within=20)
    assert await reason_of(again) is Reason.REQUEST_ID_REUSED
    assert await both.owner.begin(older, WORKLOAD, None, request_id=request_id, within=20) == first
