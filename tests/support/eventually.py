"""Waiting for what another process does, of which nobody tells this one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


async def until(condition: Callable[[], object], within: float = 30.0) -> None:
    """Return when `condition` holds; fails after `within` seconds, which are for a loaded machine, not for timing."""
    async with asyncio.timeout(within):
        while not condition():  # noqa: ASYNC110 -- another process gives no event
            await asyncio.sleep(0.01)
