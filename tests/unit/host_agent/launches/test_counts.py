"""What the agent counts of its launches and its device."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from uuid import uuid4

import pytest

from common.errors import PlatformFailed, Reason, SevattestError, Unavailable
from common.telemetry.prometheus import PrometheusMeter
from host_agent.devices.counted import CountedDevice
from host_agent.firmware_errors import firmware_failure
from host_agent.launches.state import TRANSITIONS, LaunchState
from tests.support.agent import ALICE, FakeDevice, Rig, rig
from tests.support.metrics import Page

S = LaunchState
MOVES = "sevattest_guest_launch_moves_total"
FAILURES = "sevattest_guest_launch_failures_total"


@pytest.fixture
async def agent(tmp_path: Path) -> AsyncIterator[Rig]:
    async with rig(tmp_path) as made:
        yield made


async def page_of(meter: PrometheusMeter) -> Page:
    return Page(text=(await meter.page()).decode())


async def test_a_launch_is_counted_at_each_move_and_a_repeated_request_at_none(agent: Rig) -> None:
    order = agent.order()
    await agent.runner.start(ALICE, order)
    await agent.runner.start(ALICE, order)
    launch = await agent.up_to(S.RESUMED, guest="db")
    await agent.runner.measure(ALICE, launch.launch_id)
    await agent.runner.resume(ALICE, launch.launch_id, uuid4())
    await agent.runner.abort(ALICE, launch.launch_id, uuid4())
    page = await page_of(agent.meter)
    once = [
        *((S.PAUSED, S.MEASURED), (S.MEASURED, S.INJECTING), (S.INJECTING, S.INJECTED)),
        *((S.INJECTED, S.RESUMING), (S.RESUMING, S.RESUMED), (S.RESUMED, S.STOPPED)),
    ]
    for before, after in once:
        assert page.of(MOVES, **{"from": before, "to": after}) == 1, (before, after)
    assert (
        page.of(MOVES, **{"from": "", "to": S.STARTING}) == page.of(MOVES, **{"from": S.STARTING, "to": S.PAUSED}) == 2
    )
    assert page.of(MOVES) == len(once) + 4
    assert page.of(FAILURES) == 0
    assert agent.ledger.count() == {S.PAUSED: 1, S.STOPPED: 1}
    assert agent.custody.machines == 1


async def test_every_move_of_the_table_is_shown_before_its_first_time(agent: Rig) -> None:
    page = await page_of(agent.meter)
    assert page.of(MOVES) == 0
    shown = {(found["from"], found["to"]) for found, _ in page.samples(MOVES)}
    assert shown == {("", S.STARTING), *((a, b) for a, events in TRANSITIONS.items() for b in events.values())}


@pytest.mark.parametrize(
    ("words", "reason", "status"),
    [
        ("fw_error=11", "FIRMWARE_BAD_MEASUREMENT", "BAD_MEASUREMENT"),
        ("fw_error=23", "FIRMWARE_FAILED", "RESOURCE_LIMIT"),
        ("fw_error=4711", "FIRMWARE_FAILED", "OTHER"),
        ("no such option", "HYPERVISOR_FAILED", ""),
    ],
)
async def test_a_launch_that_fails_is_counted_with_the_firmwares_word(
    agent: Rig, words: str, reason: str, status: str
) -> None:
    agent.script.set(die={"stderr": words})
    with pytest.raises(SevattestError):
        await agent.runner.start(ALICE, agent.order())
    page = await page_of(agent.meter)
    assert page.of(FAILURES, reason=reason, status=status) == page.of(FAILURES) == 1
    assert page.of(MOVES, **{"from": S.STARTING, "to": S.FAILED}) == 1


async def test_a_launch_that_its_caller_gave_up_is_no_failure(agent: Rig) -> None:
    launch = await agent.up_to(S.MEASURED)
    await agent.runner.abort(ALICE, launch.launch_id, uuid4())
    page = await page_of(agent.meter)
    assert page.of(MOVES, **{"from": S.MEASURED, "to": S.ABORTED}) == 1
    assert page.of(FAILURES) == 0


async def test_an_agent_that_starts_anew_counts_what_it_does_itself(agent: Rig, tmp_path: Path) -> None:
    await agent.up_to(S.MEASURED)
    await agent.leave()
    async with rig(tmp_path) as again:
        assert again.ledger.count() == {S.MEASURED: 1}
        assert (await page_of(again.meter)).of(MOVES) == 0


async def test_a_devices_failures_are_counted_and_passed_on() -> None:
    meter = PrometheusMeter()
    silent = Unavailable(Reason.PLATFORM_UNAVAILABLE, "no answer")
    odd = PlatformFailed(Reason.FIRMWARE_FAILED, "nonsense")
    device = FakeDevice(errors=[firmware_failure(0x16, "PLATFORM_STATUS"), silent, odd])
    counted = CountedDevice(device, meter)
    for command in (counted.status, counted.export_chain, counted.chip_id):
        with pytest.raises(SevattestError):
            await command()
    assert (await counted.status()).guest_count == 1
    assert await counted.chip_id() == await device.chip_id()
    assert await counted.export_chain() == await device.export_chain()
    page = await page_of(meter)
    name = "sevattest_device_errors_total"
    assert page.of(name, reason="FIRMWARE_FAILED", status="INVALID_PARAM") == 1
    assert page.of(name, reason="PLATFORM_UNAVAILABLE", status="") == 1
    assert page.of(name, reason="FIRMWARE_FAILED", status="") == 1
    assert page.of(name) == 3
