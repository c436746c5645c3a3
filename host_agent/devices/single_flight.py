"""One blocking call at a time, in a thread of its own, with a time limit; a call that hangs is never joined by others.

The kernel holds one lock for the PSP, and a command that the PSP does not answer sits in it for up to 100 s
(`psp_cmd_timeout`), uninterruptible. So nothing here waits for a thread to end: a call that is late keeps its thread,
and until that thread returns every further call is refused at once instead of sending another thread after it.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from time import monotonic
from typing import TypeVar

_T = TypeVar("_T")


class NotMade(Exception):
    """The call was not made.

    Attributes:
        message: why, a sentence.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


@dataclass(frozen=True, kw_only=True)
class _Flight:
    name: str
    limit: float
    began: float = field(default_factory=monotonic)
    landed: Future[None] = field(default_factory=lambda: _under_way(Future()))

    @property
    def seconds(self) -> float:
        return monotonic() - self.began


class SingleFlight:
    """Makes one call at a time, whatever threads and event loops they are asked from."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._flight: _Flight | None = None

    async def run(self, name: str, call: Callable[[], _T], *, limit: float) -> _T:
        """Wait for a turn, make the call in a thread, and return what it returns.

        Args:
            name: what the call is, for whoever has to wait for it.
            call: blocks; what it refers to stays alive until it has returned, also when nobody waits any more.
            limit: seconds that the turn and the call may take, together.

        Raises:
            NotMade: no turn in time, another call is late, or the system gives no thread.
            TimeoutError: the call was made and is late. It goes on.
        """
        deadline = monotonic() + limit
        while (flight := self._claim(name, limit)) is None:
            await self._wait_for_turn(deadline)
        outcome = _under_way(Future[_T]())
        try:
            threading.Thread(target=self._fly, args=(flight, call, outcome), name="sev-device", daemon=True).start()
        except RuntimeError:
            self._land(flight)
            raise NotMade("the system gives no thread for it") from None
        async with asyncio.timeout(max(0.0, deadline - monotonic())):
            return await asyncio.wrap_future(outcome)

    def _claim(self, name: str, limit: float) -> _Flight | None:
        with self._lock:
            if self._flight is not None:
                return None
            self._flight = _Flight(name=name, limit=limit)
            return self._flight

    async def _wait_for_turn(self, deadline: float) -> None:
        with self._lock:
            flight = self._flight
        if flight is None:
            return
        patience = min(deadline - monotonic(), flight.limit - flight.seconds)
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, patience)):
                await asyncio.wrap_future(flight.landed)
        if not flight.landed.done():
            raise NotMade(f"{flight.name} has been under way for {flight.seconds:.1f} s")

    def _fly(self, flight: _Flight, call: Callable[[], _T], outcome: Future[_T]) -> None:
        try:
            result = call()
        except BaseException as error:  # noqa: BLE001 -- raised where the outcome is awaited
            self._land(flight)
            outcome.set_exception(error)
        else:
            self._land(flight)
            outcome.set_result(result)

    def _land(self, flight: _Flight) -> None:
        with self._lock:
            self._flight = None
        flight.landed.set_result(None)


def _under_way(future: Future[_T]) -> Future[_T]:
    """A future that nobody who gives up waiting for it can cancel."""
    future.set_running_or_notify_cancel()
    return future
