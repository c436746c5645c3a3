"""How many refusals and reports of each caller are recorded: an allowance that fills again by a rate, in memory.

Whatever a caller can have written to the audit log by merely calling (a begin that is refused, a repeat that is
refused, a report) is taken from its allowance, so that nobody fills the owner's disk or drowns what matters in its log.
What a launch does of its own (begin, release, refusal, end) is not: launches are bounded elsewhere, and one that has
begun must be able to end.

All callers that nobody gave any authority share one allowance: whoever has the datacenter's authority can make any
number of identities, and none of them is the owner's business. An allowance lives as long as this process, and each
replica has its own.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from datetime import datetime

from verifier.documents.rate import Rate

# Whose allowance it is: a caller's SPIFFE id, or this for all callers without authority.
STRANGERS = ""
# Callers that the owner's documents name, some hundred bytes each. Beyond it, who was quiet longest starts afresh.
ACCOUNTS_MAX = 4096


@dataclass
class _Account:
    arrival: int = 0
    said: datetime | None = None  # when it was last written down that it is used up


class Allowances:
    """What is left to each caller."""

    def __init__(self, rate: Rate) -> None:
        """Nobody has used any.

        Args:
            rate: how many in which time, for each caller.
        """
        self._rate = rate
        self._accounts: OrderedDict[str, _Account] = OrderedDict()

    def wait(self, who: str, now: datetime) -> int:
        """Seconds until there is something left, rounded up; 0 where there is now."""
        account = self._accounts.get(who)
        return 0 if account is None else self._rate.wait(account.arrival, now)

    def take(self, who: str, now: datetime) -> int:
        """Take one; seconds to wait where nothing is left, 0 where one was taken."""
        account = self._accounts.setdefault(who, _Account())
        self._accounts.move_to_end(who)
        while len(self._accounts) > ACCOUNTS_MAX:
            self._accounts.popitem(last=False)
        seconds = self._rate.wait(account.arrival, now)
        if not seconds:
            account.arrival = self._rate.arrival(account.arrival, now)
        return seconds

    def news(self, who: str, now: datetime) -> bool:
        """Whether to write down that nothing is left: once in a period of the rate, and whoever asks first does it."""
        account = self._accounts[who]
        if account.said is not None and now - account.said < self._rate.period:
            return False
        account.said = now
        return True

    def unsaid(self, who: str) -> None:
        """It could not be written down: it is news again."""
        if (account := self._accounts.get(who)) is not None:
            account.said = None
