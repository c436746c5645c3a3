"""Waiting for what another process does, of which nobody tells this one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable


async def until(condition: Callable[[], object], within: float = 30.0) -> None:
    """Return when `condition` holds; fails after `within` seconds, which are for a loaded machine, not for timing."""
    async with asyncio.timeout(within):
        while not condition():  # noqa: ASYNC110 -- another process gives no event
            await asyncio.sleep(0.01)


def wait_until(condition: Callable[[], object], within: float = 30.0) -> None:
    """The same where no event loop runs."""
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
