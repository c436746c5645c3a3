"""The verifier's time: never before what any stored transaction saw, and no decisions while the clock is far behind.

Time is max(clock, last stored), so that a clock that steps back brings no expired launch back to life. A clock more
than ten minutes behind what is stored is broken (or the store is from the future): begin and release are refused with
CLOCK_SKEW until it has caught up.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from common.clock import Clock
from common.errors import Reason, WrongState

SKEW_MAX = timedelta(minutes=10)


class Timekeeper:
    """Tells the time that launches live by."""

    def __init__(self, clock: Clock, last: datetime | None) -> None:
        """Start from the machine's clock and the latest stored time."""
        self._clock = clock
        self._last = last

    def now(self) -> datetime:
        """The time, for what may happen whatever the clock says: reading, giving up, expiring."""
        clock = self._clock.now()
        return clock if self._last is None else max(clock, self._last)

    def now_for_decisions(self) -> datetime:
        """The time, for begin and release.

        Raises:
            WrongState: the clock is more than ten minutes behind what was stored (CLOCK_SKEW).
        """
        clock = self._clock.now()
        if self._last is not None and self._last - clock > SKEW_MAX:
            raise WrongState(
                Reason.CLOCK_SKEW, "the verifier's clock went backwards, it decides nothing until it has caught up"
            )
        return self.now()

    def stored(self, time: datetime) -> None:
        """Take note of a time that a transaction carried."""
        self._last = time if self._last is None else max(self._last, time)
