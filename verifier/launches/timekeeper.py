"""The verifier's time: never before what any stored transaction saw, and no decisions while the clock is far behind.

Time is max(clock, last stored), so that a clock that steps back brings no expired launch back to life, also where the
last transaction was another replica's. A clock more than ten minutes behind what is stored is broken (or the store is
from the future): begin and release are refused with CLOCK_SKEW until it has caught up. One that is more than ten
minutes ahead of what the others store is told of (`ahead`); it may as well be theirs that is wrong.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta

from common.clock import Clock
from common.errors import Reason, WrongState

SKEW_MAX = timedelta(minutes=10)


class Timekeeper:
    """Tells the time that launches live by."""

    def __init__(self, clock: Clock, last: Callable[[], Awaitable[datetime | None]]) -> None:
        """Take the machine's clock, and what asks the store for its latest time."""
        self._clock = clock
        self._ask = last
        self._last: datetime | None = None
        self._looked: tuple[datetime | None, datetime] | None = None  # what was stored, and the clock

    async def now(self) -> datetime:
        """The time, for what may happen whatever the clock says: reading, giving up, expiring.

        Raises:
            Unavailable: the store has no answer.
        """
        return self._later(self._clock.now(), self._latest(await self._ask()))

    async def now_for_decisions(self) -> datetime:
        """The time, for begin and release.

        Raises:
            WrongState: the clock is more than ten minutes behind what was stored (CLOCK_SKEW).
            Unavailable: the store has no answer.
        """
        return self.for_decisions(await self._ask())

    def for_decisions(self, stored: datetime | None) -> datetime:
        """The time, for begin and release, where the store was asked already.

        Args:
            stored: the latest time in the store, as it was just read; None in a new store, or where it was read before.

        Raises:
            WrongState: the clock is more than ten minutes behind what was stored (CLOCK_SKEW).
        """
        clock, last = self._clock.now(), self._latest(stored)
        if last is not None and last - clock > SKEW_MAX:
            raise WrongState(
                Reason.CLOCK_SKEW, "the verifier's clock went backwards, it decides nothing until it has caught up"
            )
        return self._later(clock, last)

    @property
    def behind(self) -> timedelta:
        """By how much the clock is behind the latest stored time that is known here; none where it is not."""
        return timedelta() if self._last is None else max(timedelta(), self._last - self._clock.now())

    async def ahead(self) -> timedelta | None:
        """How far the clock was ahead, at the last call, of what was stored since then; None for up to ten minutes.

        A clock that is far ahead shows in nothing else until it decides something, and then in all others being behind.

        Raises:
            Unavailable: the store has no answer.
        """
        stored, before = await self._ask(), self._looked
        self._looked = (stored, self._clock.now())
        if before is None or stored is None or stored == before[0]:
            return None
        ahead = before[1] - stored
        return ahead if ahead > SKEW_MAX else None

    def stored(self, time: datetime) -> None:
        """Take note of a time that a transaction carried."""
        self._last = time if self._last is None else max(self._last, time)

    def _latest(self, stored: datetime | None) -> datetime | None:
        if stored is not None:
            self.stored(stored)
        return self._last

    @staticmethod
    def _later(clock: datetime, last: datetime | None) -> datetime:
        return clock if last is None else max(clock, last)
