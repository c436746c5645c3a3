"""Any order of calls, by any caller, with any repeats: at most one packet per launch, and states only move forward."""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from random import Random
from uuid import UUID, uuid4

from common.errors import SevattestError
from tests.support.desk import Desk, Guest, desk
from tests.support.documents import CALLER, STRANGER
from tests.support.documents import workload as document
from verifier.launches.launch import Begun

SEEDS = 12
STEPS = 40


@dataclass(kw_only=True)
class Story:
    """One launch as an outsider saw it."""

    begun: Begun
    guest: Guest
    good: bytes
    caller: str
    packets: set[tuple[bytes, bytes]] = field(default_factory=set)
    states: list[str] = field(default_factory=lambda: ["open"])


async def begin(d: Desk, caller: str, digest: bytes) -> Story:
    begun = await d.begin(caller=caller)
    guest = d.start(begun)
    return Story(begun=begun, guest=guest, good=guest.measure(digest), caller=caller)


async def step(d: Desk, random: Random, story: Story, request_id: UUID, blob: bytes) -> None:
    """One call, by whoever."""
    launch_id, caller = story.begun.launch.launch_id, random.choice((CALLER, CALLER, STRANGER))
    match random.choice(("release", "release", "abandon", "get", "time", "sweep", "deny")):
        case "release":
            released = await d.release(launch_id, blob, caller=caller, request_id=request_id)
            assert caller == story.caller
            assert story.guest.open(released, blob)
            story.packets.add((released.header, released.payload))
        case "abandon" if random.random() < 0.2:
            await d.abandon(launch_id, caller=caller, request_id=request_id)
            assert caller == story.caller
        case "get":
            assert (await d.broker.get(caller, launch_id)).launch_id == launch_id
            assert caller == story.caller
        case "time":
            d.clock.advance(timedelta(seconds=random.choice((-120, 30, 90, 240))))
        case "sweep":
            await d.broker.expire_overdue()
        case "deny":
            d.denied.set_owners(random.choice(([], [], [], [d.platform.chain.cek.fingerprint.hex()])))


async def look(d: Desk, story: Story) -> None:
    """Take down the launch's state; keys exist in an open launch only."""
    row = await d.store.launch(story.begun.launch.launch_id)
    assert row is not None
    assert (row.keys is None) == (row.state != "open")
    if row.state != story.states[-1]:
        story.states.append(row.state)


def judge(d: Desk, story: Story) -> str:
    """The launch's end, after everything that must hold of any launch."""
    assert len(story.packets) <= 1
    assert len(story.states) <= 2, story.states
    assert not story.packets or story.states == ["open", "released"]
    events = [record.event for record in d.audit(story.begun.launch.launch_id)]
    ends = {"launch.released", "launch.refused", "launch.abandoned", "launch.expired"}
    assert sum(event in ends for event in events) == len(story.states) - 1
    return story.states[-1]


async def test_any_order_of_calls_releases_at_most_one_packet_to_its_own_guest(tmp_path: Path) -> None:
    reached: Counter[str] = Counter()
    for seed in range(SEEDS):
        random = Random(seed)  # noqa: S311 -- a reproducible story
        async with desk(tmp_path / str(seed), content=document(callers=[CALLER, STRANGER], lifetime="3m")) as d:
            digest = (await d.digests())[0]
            stories = [await begin(d, caller, digest) for caller in (CALLER, CALLER, STRANGER)]
            request_ids: dict[UUID, list[UUID]] = defaultdict(lambda: [uuid4(), uuid4()])
            for _ in range(STEPS):
                story, other = random.choice(stories), random.choice(stories)
                request_id = random.choice(request_ids[random.choice((story, other)).begun.launch.launch_id])
                blobs = (story.good, other.good, story.guest.measure(digest), bytes(48))
                with contextlib.suppress(SevattestError):
                    await step(d, random, story, request_id, random.choices(blobs, (8, 1, 1, 0.2))[0])
                for each in stories:
                    await look(d, each)
            reached.update(judge(d, story) for story in stories)
    # A story in which nothing happens proves nothing.
    assert set(reached) >= {"released", "refused", "abandoned", "expired"}, reached
