"""One thread for one connection: it takes up whatever has come together meanwhile, and answers all of it at once.

A wake-up of a thread, and of the event loop by a thread, costs as much as a small transaction, and a commit more than
several of them. So what waits is taken together: first everything that reads, each by itself and seeing only what was
committed; then everything that writes, which the engine may carry out in one commit. Nobody waits for others to come:
the first to find the thread idle is served alone and at once.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, Generic, TypeVar, cast

from verifier.store.engine import Transaction

T = TypeVar("T")

TOGETHER_MAX = 64  # so that the first of them does not wait long for the last


class Job(Generic[T]):
    """Something to do on the thread, and what became of it.

    Attributes:
        future: gets the result, on the event loop that asked.
        result: what it returned; counts while there is no `error`.
        error: what it raised.
    """

    def __init__(self) -> None:
        """A job that was not done yet. On an event loop."""
        self.future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self.result: T | None = None
        self.error: BaseException | None = None

    def answer(self) -> None:
        """Hand over what became of it. On the event loop."""
        if self.future.done():  # whoever asked was cancelled
            return
        if self.error is not None:
            self.future.set_exception(self.error)
        else:
            self.future.set_result(cast("T", self.result))


class Call(Job[T]):
    """Something that goes by itself: a look at the database, opening it, closing it."""

    def __init__(self, work: Callable[[], T]) -> None:
        """Take the work. On an event loop."""
        super().__init__()
        self._work = work

    def run(self) -> None:
        """Do it; what it raises is kept for whoever asked."""
        try:
            self.result = self._work()
        except BaseException as error:  # noqa: BLE001 -- raised where somebody waits for it
            self.error = error


class Write(Job[T]):
    """A transaction to commit, perhaps together with others.

    Attributes:
        name: of its steps (`Engine`'s `on_step`).
        work: what it does in its transaction; may be run more than once.
    """

    def __init__(self, name: str, work: Callable[[Transaction], T]) -> None:
        """Take the work. On an event loop."""
        super().__init__()
        self.name = name
        self.work = work


class Worker:
    """The thread."""

    def __init__(self, name: str, write: Callable[[Sequence[Write[Any]]], None]) -> None:
        """Name the thread, which starts with its first job.

        Args:
            name: its name.
            write: carries transactions out, on the thread, and leaves in each what became of it.
        """
        self._write = write
        self._jobs: SimpleQueue[Job[Any] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._started = self._ended = False

    async def do(self, job: Job[T]) -> T:
        """Have a job done. Whoever is cancelled meanwhile does not stop it.

        Raises:
            RuntimeError: the thread has ended.
        """
        if self._ended:
            raise RuntimeError("the store is closed")
        if not self._started:
            self._started = True
            self._thread.start()
        self._jobs.put(job)
        return await job.future

    async def end(self) -> None:
        """Let what was asked for be done, and end the thread."""
        self._ended = True
        if self._started:
            self._jobs.put(None)
            await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        while (first := self._jobs.get()) is not None:
            jobs = [first]
            while len(jobs) < TOGETHER_MAX and not self._jobs.empty():
                job = self._jobs.get()
                if job is None:
                    self._jobs.put(None)  # the last one: after these jobs
                    break
                jobs.append(job)
            self._together(jobs)

    def _together(self, jobs: Sequence[Job[Any]]) -> None:
        for job in jobs:
            if isinstance(job, Call):
                job.run()
        if writes := [job for job in jobs if isinstance(job, Write)]:
            try:
                self._write(writes)
            except BaseException as error:  # noqa: BLE001 -- a defect, and no reason to leave anybody waiting
                for job in writes:
                    job.error = error
        by_loop: dict[asyncio.AbstractEventLoop, list[Job[Any]]] = {}
        for job in jobs:
            by_loop.setdefault(job.future.get_loop(), []).append(job)
        for loop, done in by_loop.items():
            with suppress(RuntimeError):  # a loop that was closed: nobody waits any more
                loop.call_soon_threadsafe(_answer, done)


def _answer(jobs: Sequence[Job[Any]]) -> None:
    for job in jobs:
        job.answer()
