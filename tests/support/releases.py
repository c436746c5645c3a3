"""A launch that is about to be released, and what became of it."""

from __future__ import annotations

import json
from typing import Any

from tests.support.desk import Desk, Guest
from tests.support.documents import CALLER
from verifier.launches.launch import Begun


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
