"""All launches of this host: in memory for reading, on disk before anything is done.

A launch is replaced in memory only when its new record is on the disk. Its caller alone sees it. Request ids count per
caller and method (AIP-155): the same id with the same content is the same request, with other content an error.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from datetime import datetime, timedelta
from uuid import UUID
from weakref import WeakValueDictionary

from common.errors import InvalidInput, LimitExceeded, NotFound, Reason
from common.sev.errors import ParseError
from common.telemetry.metrics import UNMEASURED, Meter
from host_agent.firmware_errors import status_in
from host_agent.launches.launch import REQUESTS_MAX, Launch, Request, decode
from host_agent.launches.state import TRANSITIONS, LaunchState
from host_agent.metrics import FAILURES, MOVES
from host_agent.store.folders import LaunchFolders

# An id that was given up before its launch was started is remembered so long: no call has a deadline further away than
# 60 s, so a StartLaunch that is still on its way arrives by then. So many at once, because callers can invent ids.
_GIVEN_UP_FOR = timedelta(minutes=5)
GIVEN_UP_MAX = 4096


class _Watcher:
    """One reader of changes: per launch the newest, so that a slow reader costs no more than the launches there are."""

    def __init__(self, caller: str) -> None:
        self.caller = caller
        self.pending: dict[UUID, Launch] = {}
        self.changed = asyncio.Event()

    def tell(self, launch: Launch) -> None:
        if launch.caller == self.caller:
            self.pending.pop(launch.launch_id, None)
            self.pending[launch.launch_id] = launch
            self.changed.set()


class Ledger:
    """The launches, their locks, and who watches them."""

    def __init__(self, folders: LaunchFolders, meter: Meter = UNMEASURED) -> None:
        self.folders = folders
        self._meter = meter
        self._show_moves()
        self._launches: dict[UUID, Launch] = {}
        self._requests: dict[tuple[str, str, UUID], tuple[UUID, bytes]] = {}
        # A lock lives while somebody holds or awaits it: a caller can invent ids for ever.
        self._locks: WeakValueDictionary[UUID, asyncio.Lock] = WeakValueDictionary()
        self.given_up: dict[tuple[str, UUID], datetime] = {}
        self._watchers: set[_Watcher] = set()
        self._watching = True

    def _show_moves(self) -> None:
        """Have every move that there can be shown before its first time."""
        self._meter.add(MOVES, "", LaunchState.STARTING, by=0)
        for state, events in TRANSITIONS.items():
            for target in events.values():
                self._meter.add(MOVES, state, target, by=0)

    def load(self) -> None:
        """Read every record.

        A record that cannot be read stops the agent: it may tell of a paused guest, or of one that runs and must not,
        and only a person can find out.

        Raises:
            InvalidInput: `INVALID_CONFIGURATION`; names the file.
        """
        for launch_id, path, data in self.folders.records():
            try:
                launch = decode(data, launch_id)
            except ParseError as error:
                raise InvalidInput(
                    Reason.INVALID_CONFIGURATION,
                    f"{path}: {error.message}",
                    hint="see that no machine of this launch is left, then move its folder away",
                ) from error
            self._index(launch)

    def lock(self, launch_id: UUID) -> asyncio.Lock:
        """What a step on the launch holds from its first look to its last write."""
        lock = self._locks.get(launch_id)
        if lock is None:
            lock = self._locks[launch_id] = asyncio.Lock()
        return lock

    def get(self, caller: str, launch_id: UUID) -> Launch:
        """The caller's launch.

        Raises:
            NotFound: there is none, or it is another's.
        """
        launch = self._launches.get(launch_id)
        if launch is None or launch.caller != caller:
            raise NotFound(Reason.NOT_FOUND, "no such launch", launch_id=str(launch_id))
        return launch

    def find(self, launch_id: UUID) -> Launch | None:
        """The launch, whoever's it is."""
        return self._launches.get(launch_id)

    def of(self, caller: str) -> list[Launch]:
        """The caller's launches, newest first."""
        mine = (launch for launch in self._launches.values() if launch.caller == caller)
        return sorted(mine, key=age, reverse=True)

    def unfinished(self) -> list[Launch]:
        """Every launch that has not ended."""
        return [launch for launch in self._launches.values() if not launch.is_final]

    def count(self) -> Counter[LaunchState]:
        """How many launches there are in each state."""
        return Counter(launch.state for launch in self._launches.values())

    def ended(self) -> list[Launch]:
        """Every launch that has ended and is not forgotten yet."""
        return [launch for launch in self._launches.values() if launch.is_final]

    def of_guest(self, guest: str) -> Launch | None:
        """The launch that the guest is busy with."""
        return next((launch for launch in self.unfinished() if launch.guest == guest), None)

    def give_up(self, caller: str, launch_id: UUID, now: datetime) -> None:
        """Remember for a while that the caller wants no launch of this id, which was not started."""
        self.given_up.pop((caller, launch_id), None)
        self.given_up[caller, launch_id] = now
        if len(self.given_up) > GIVEN_UP_MAX:
            del self.given_up[next(iter(self.given_up))]

    def was_given_up(self, caller: str, launch_id: UUID, now: datetime) -> bool:
        """Whether the caller gave this id up a short while ago, before its launch was started."""
        when = self.given_up.get((caller, launch_id))
        return when is not None and abs(now - when) <= _GIVEN_UP_FOR

    def repeated(self, caller: str, request: Request) -> UUID | None:
        """The launch that this very request was taken on for; None for a new one.

        Raises:
            InvalidInput: `REQUEST_ID_REUSED`; the id was used with other content.
        """
        known = self._requests.get((caller, request.method, request.request_id))
        if known is None:
            return None
        launch_id, content = known
        if content != request.content:
            raise InvalidInput(Reason.REQUEST_ID_REUSED, f"the request_id was used before for another {request.method}")
        return launch_id

    def with_request(self, launch: Launch, request: Request) -> Launch:
        """The launch, remembering the request; to be saved by the caller.

        Raises:
            InvalidInput: `REQUEST_ID_REUSED`.
            LimitExceeded: it remembers as many as it can.
        """
        if self.repeated(launch.caller, request) is not None:
            return launch
        if len(launch.requests) >= REQUESTS_MAX:
            raise LimitExceeded(Reason.TOO_MANY_REQUESTS, f"more than {REQUESTS_MAX} different requests for one launch")
        return launch.amended(requests=(*launch.requests, request))

    async def save(self, launch: Launch) -> Launch:
        """Write the launch down; when this returns it is on the disk, and everybody sees it.

        Raises:
            Unavailable: `STORE_UNAVAILABLE`; nothing has changed.
        """
        await asyncio.to_thread(self.folders.save, launch.launch_id, launch.encode())
        self._count(self._launches.get(launch.launch_id), launch)
        self._index(launch)
        for watcher in self._watchers:
            watcher.tell(launch)
        return launch

    async def forget_old(self, *, now: datetime, age_limit: timedelta, count_limit: int) -> int:
        """Remove final launches that are too old, and the oldest of too many; returns how many."""
        final = sorted(self.ended(), key=_ended, reverse=True)
        old = [launch for i, launch in enumerate(final) if i >= count_limit or now - launch.update_time > age_limit]
        for launch in old:
            await asyncio.to_thread(self.folders.remove, launch.launch_id)
            del self._launches[launch.launch_id]
            for request in launch.requests:
                self._requests.pop((launch.caller, request.method, request.request_id), None)
        return len(old)

    async def watch(self, caller: str) -> AsyncGenerator[Launch, None]:
        """The caller's launches, oldest first, then each that changes; a slow reader sees the newest of each.

        Ends when the agent stops.
        """
        watcher = _Watcher(caller)
        self._watchers.add(watcher)
        try:
            for launch in reversed(self.of(caller)):
                watcher.tell(launch)
            while True:
                for launch in _taken(watcher):
                    yield launch
                if not self._watching:
                    return
                await watcher.changed.wait()
        finally:
            self._watchers.discard(watcher)

    def end_watches(self) -> None:
        """End every watch, and each new one after what there is to tell."""
        self._watching = False
        for watcher in self._watchers:
            watcher.changed.set()

    def _count(self, before: Launch | None, launch: Launch) -> None:
        state = None if before is None else before.state
        if state is launch.state:
            return
        self._meter.add(MOVES, state or "", launch.state)
        if launch.failure is not None:
            self._meter.add(FAILURES, launch.failure.reason, status_in(launch.failure.fields))

    def _index(self, launch: Launch) -> None:
        self._launches[launch.launch_id] = launch
        for request in launch.requests:
            key = (launch.caller, request.method, request.request_id)
            self._requests[key] = (launch.launch_id, request.content)


def age(launch: Launch) -> tuple[datetime, UUID]:
    """Sorts launches by when they were written down."""
    return (launch.create_time, launch.launch_id)


def _ended(launch: Launch) -> tuple[datetime, UUID]:
    return (launch.update_time, launch.launch_id)


def _taken(watcher: _Watcher) -> Iterator[Launch]:
    watcher.changed.clear()
    while watcher.pending:
        yield watcher.pending.pop(next(iter(watcher.pending)))
