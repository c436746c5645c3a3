"""A rate: so many in a period, kept in one number that whoever counts by it carries along. Pure.

It is kept by the generic cell rate algorithm (GCRA): the number is the theoretical arrival time, in microseconds since
1970, and zero at first. Each that is let through moves it on by one interval (period / times), and none is let through
that would put it further ahead of the clock than one period. So who rested gets all of them at once, and then one per
interval; in any time t there are no more than `times` + t / interval. That holds for a time that does not go back, as
`verifier.launches.timekeeper` makes of any clock.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from verifier.documents.problems import duration

TIMES_MAX = 1_000_000  # in a period: one a microsecond of the shortest period
SPELLING = f'as in "10/1m": 1 to {TIMES_MAX} in 1s, 10m or 24h'

_TEXT = re.compile(r"(?P<times>\d{1,7})/(?P<period>.*)", re.ASCII)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_SECOND = 1_000_000  # microseconds


@dataclass(frozen=True, kw_only=True)
class Rate:
    """So many in a period, all at once or spread over it.

    Attributes:
        times: how many, at least 1.
        period: in which time, at least one second.
    """

    times: int
    period: timedelta

    def arrival(self, earlier: int, now: datetime) -> int:
        """The number after one more at `now`, whether or not there is room for it."""
        return max(earlier, (now - _EPOCH) // _MICROSECOND) + self._interval

    def wait(self, earlier: int, now: datetime) -> int:
        """Seconds until there is room for one more, rounded up; 0 where there is now."""
        ahead = self.arrival(earlier, now) - (now - _EPOCH) // _MICROSECOND
        return max(0, -(-(ahead - self._interval * self.times) // _SECOND))

    def furthest(self, now: datetime) -> int:
        """The number of whoever has had all that there is at `now`: none that was kept by this rate is larger."""
        return (now - _EPOCH) // _MICROSECOND + self._interval * self.times

    @property
    def _interval(self) -> int:
        # Rounded up, so that rounding never lets one more through.
        return -(-(self.period // _MICROSECOND) // self.times)


def read_rate(text: str) -> Rate | None:
    """What `10/1m` spells; None for anything that `SPELLING` does not describe."""
    match = _TEXT.fullmatch(text)
    times = int(match["times"]) if match else 0
    period = duration(match["period"]) if match else None
    if not 1 <= times <= TIMES_MAX or period is None or period < timedelta(seconds=1):
        return None
    return Rate(times=times, period=period)
