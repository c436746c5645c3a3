"""Transactions that share commits, over any engine.

Those that come while a commit is under way share the next one, each in a savepoint of its own: the disk is waited for
once, and nobody is answered before. Where a common commit does not come about for the fault of one of them, each of
them is tried alone. A caller that is cancelled leaves no transaction open.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Generic, cast

from verifier.store.engine import T, Transaction

# In one commit, so that the first does not wait long for the last. PostgreSQL's sessions remember no more savepoints
# than these without a detour by its disk.
TOGETHER_MAX = 64


class Write(Generic[T]):
    """A transaction that waits for its commit, and what became of it.

    Attributes:
        name: of its steps.
        work: what it does.
        result: what `work` returned; counts while there is no `error`.
        error: what it raised, or why it was not committed.
        answered: for whoever waits.
    """

    def __init__(self, name: str, work: Callable[[Transaction], Awaitable[T]]) -> None:
        self.name = name
        self.work = work
        self.result: T | None = None
        self.error: BaseException | None = None
        self.answered: asyncio.Future[T] = asyncio.get_running_loop().create_future()

    async def carry_out(self, transaction: Transaction, faults: tuple[type[Exception], ...], *, together: bool) -> bool:
        """Do what the transaction does.

        Args:
            transaction: of all that share the commit.
            faults: the database's own errors. They end the transaction of all.
            together: whether there are others.

        Returns:
            Whether it is to be kept; otherwise nothing of it is left, where there are others.
        """
        self.error = None
        if together:
            transaction.tell("SAVEPOINT one")
        try:
            self.result = await self.work(transaction)
        except faults:
            raise
        except BaseException as error:  # noqa: BLE001 -- raised where somebody waits for it
            self.error = error
            if together:
                transaction.tell("ROLLBACK TO one")
        if together:
            transaction.tell("RELEASE one")
        return self.error is None

    def answer(self) -> None:
        """Tell whoever waits; nobody does where the caller was cancelled."""
        if self.answered.done():
            return
        if self.error is not None:
            self.answered.set_exception(self.error)
        else:
            self.answered.set_result(cast("T", self.result))


class Together:
    """The transactions of one process, in commits one after the other."""

    def __init__(
        self, commit: Callable[[Sequence[Write[Any]]], Awaitable[int]], *, company_seconds: float = 0.0
    ) -> None:
        """Prepare; nothing is under way.

        Args:
            commit: carries transactions out in one commit. How many have their answer with that, from the first on; 0
                where certainly nothing was kept, for the fault of one of several.
            company_seconds: that a commit waits for more, as long as they come together. A caller that is alone never
                waits.
        """
        self._commit = commit
        self._company_seconds = company_seconds
        self._waiting: list[Write[Any]] = []
        self._committing: asyncio.Task[None] | None = None
        self._company = False  # whether the last commit was shared, or somebody waited for its end

    async def write(self, name: str, work: Callable[[Transaction], Awaitable[T]]) -> T:
        """Run `work` in a transaction; see `Engine`."""
        write = Write(name, work)
        self._waiting.append(write)
        if self._committing is None:
            self._committing = asyncio.create_task(self._commit_waiting())
        return await write.answered

    async def ended(self) -> None:
        """Return when nothing is under way."""
        while self._committing is not None:
            await asyncio.wait([self._committing])

    async def _commit_waiting(self) -> None:
        """Carry out all transactions that wait, and those that come meanwhile: in one commit, or else each alone."""
        while self._waiting:
            if self._company and self._company_seconds and len(self._waiting) < TOGETHER_MAX:
                await asyncio.sleep(self._company_seconds)
            writes, self._waiting = self._waiting[:TOGETHER_MAX], self._waiting[TOGETHER_MAX:]
            try:
                answered = await self._commit(writes)
                if not answered:
                    for each in writes:
                        answered += await self._commit([each])
            except BaseException as error:  # noqa: BLE001 -- a defect is no reason to leave anybody waiting
                answered = len(writes)
                for each in writes:
                    each.error = error
            for each in writes[:answered]:
                each.answer()
            self._waiting[:0] = writes[answered:]
            self._company = len(writes) + len(self._waiting) > 1
        self._committing = None
