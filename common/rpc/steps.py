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
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await _end(task)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled from (None if task.cancelled() else task.exception())
    return task.result()


def _end(task: asyncio.Task[Any]) -> asyncio.Future[None]:
    """Is done when the task is. Cancelling it does not cancel the task, and it raises nothing that the task raises."""
    ended = task.get_loop().create_future()

    def note(task: asyncio.Task[Any]) -> None:
        _under_way.discard(task)
        if not ended.done():
            ended.set_result(None)

    task.add_done_callback(note)
    return ended


async def drain() -> None:
    """Wait until no step of this event loop is under way."""
    loop = asyncio.get_running_loop()
    while mine := {task for task in _under_way if task.get_loop() is loop}:
        await asyncio.wait(mine)
