"""Steps that must run to their end once begun, although the caller has gone.

In grpc.aio the end of a client's deadline cancels the servicer's coroutine, wherever it stands. A release or an
injection that has begun is run through `shielded`: the step is a task of its own, which nothing cancels; the servicer
is cancelled only after the step is done; and a server that stops waits for the steps under way (`drain`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

_T = TypeVar("_T")

# asyncio itself keeps only weak references to tasks.
_under_way: set[asyncio.Task[Any]] = set()


async def shielded(step: Coroutine[Any, Any, _T]) -> _T:
    """Run `step` to its end, whatever happens to the caller, and return what it returns.

    Raises:
        asyncio.CancelledError: the caller was cancelled; raised only when the step is done. What the step raised, if
            it did, is its `__cause__`.
    """
    task = asyncio.create_task(step)
    _under_way.add(task)
    task.add_done_callback(_under_way.discard)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            # wait() neither cancels the task when it is cancelled itself, nor raises what the task raises.
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled from (None if task.cancelled() else task.exception())
    return task.result()


async def drain() -> None:
    """Wait until no step of this event loop is under way."""
    loop = asyncio.get_running_loop()
    while mine := {task for task in _under_way if task.get_loop() is loop}:
        await asyncio.wait(mine)
