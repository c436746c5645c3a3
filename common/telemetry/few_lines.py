"""Lines that anybody can have written by calling: the first of each caller, and how many more there were.

Whoever is turned away costs the log `LINES` lines in `PERIOD_S`, and then one for each kind of line that was left out,
which says how many. Callers who are not known by a name count as one; so do those beyond the first `CALLERS_MAX`, since
whoever has a CA makes any number of identities. So a flood fills some 10 MB a day, and one by everybody some 300.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

LINES = 20
PERIOD_S = 60.0
CALLERS_MAX = 32
OTHERS = "others"  # no SPIFFE id


@dataclass
class _Period:
    ends: float
    lines: int = 0
    left_out: Counter[tuple[str, tuple[tuple[str, object], ...]]] = field(default_factory=Counter)


class FewLines:
    """Writes few lines for each caller. Needs a running event loop, unless `later` is given."""

    def __init__(
        self,
        write: Callable[..., Any],
        *,
        clock: Callable[[], float] = time.monotonic,
        later: Callable[[float, Callable[[], None]], object] | None = None,
    ) -> None:
        """Nobody has had a line.

        Args:
            write: of a log, at the level of these lines.
            clock: seconds that only grow.
            later: calls a function after so many seconds; the running event loop's if absent.
        """
        self._write = write
        self._clock = clock
        self._later = later
        self._periods: dict[str | None, _Period] = {}  # in the order in which they end

    def write(self, event: str, *, caller: str | None, like: Mapping[str, object], **fields: object) -> None:
        """Write a line, or count it.

        Args:
            event: its name; what was left out is named `EVENT.more`.
            caller: whose line it is; None for all who have no name.
            like: fields that are alike in lines that are counted together: few values, none of a caller's choice.
            fields: the others.
        """
        whose, period = self._period(caller)
        if period.lines < LINES:
            period.lines += 1
            self._write(event, caller=caller, **like, **fields)
            return
        if not period.left_out:
            (self._later or asyncio.get_running_loop().call_later)(
                max(period.ends - self._clock(), 0.0), lambda: self._end(whose, period)
            )
        period.left_out[event, tuple(like.items())] += 1

    def flush(self) -> None:
        """Say now what was left out so far: the process ends."""
        for whose, period in tuple(self._periods.items()):
            self._end(whose, period)

    def _period(self, caller: str | None) -> tuple[str | None, _Period]:
        now = self._clock()
        if (period := self._periods.get(caller)) is not None and now < period.ends:
            return caller, period
        for whose, each in tuple(self._periods.items()):
            if now < each.ends:
                break
            self._end(whose, each)
        if len(self._periods) >= CALLERS_MAX:
            caller = OTHERS
        return caller, self._periods.setdefault(caller, _Period(ends=now + PERIOD_S))

    def _end(self, whose: str | None, period: _Period) -> None:
        if self._periods.get(whose) is not period:
            return  # it has ended already
        del self._periods[whose]
        for (event, like), count in period.left_out.items():
            self._write(f"{event}.more", caller=whose, **dict(like), more=count, seconds=int(PERIOD_S))
