"""One blocking call at a time: turns, limits, and what is left behind."""

from __future__ import annotations

import asyncio
import threading
from typing import NoReturn

import pytest

from host_agent.devices.single_flight import NotMade, SingleFlight
from tests.support.eventually import until


async def test_a_call_gives_what_it_returns_or_raises() -> None:
    flight = SingleFlight()
    assert await flight.run("ask", lambda: 7, limit=20) == 7
    with pytest.raises(ZeroDivisionError):
        await flight.run("fail", lambda: 1 // 0, limit=20)
    assert await flight.run("again", lambda: 8, limit=20) == 8, "a failure gives the turn back"


async def test_a_turn_that_does_not_come_is_refused_and_the_call_is_never_made() -> None:
    flight, released, made = SingleFlight(), threading.Event(), []
    first = asyncio.create_task(flight.run("first", lambda: released.wait(30), limit=30))
    await asyncio.sleep(0)
    with pytest.raises(NotMade, match=r"first has been under way for \d+\.\d s"):
        await flight.run("second", lambda: made.append(2), limit=0.05)
    released.set()
    assert await first
    assert made == []
    await flight.run("third", lambda: made.append(3), limit=20)
    assert made == [3]


async def test_callers_of_several_event_loops_take_turns() -> None:
    flight, released = SingleFlight(), threading.Event()
    inner = asyncio.create_task(flight.run("here", lambda: released.wait(30), limit=30))
    await asyncio.sleep(0)
    elsewhere = asyncio.create_task(
        asyncio.to_thread(lambda: asyncio.run(flight.run("there", threading.get_ident, limit=30)))
    )
    done, _ = await asyncio.wait([elsewhere], timeout=0.05)
    assert not done
    released.set()
    assert await inner
    assert await elsewhere != threading.get_ident()


async def test_a_late_call_that_fails_in_the_end_gives_the_turn_back_in_silence(
    caplog: pytest.LogCaptureFixture,
) -> None:
    flight, released = SingleFlight(), threading.Event()

    def fail() -> NoReturn:
        released.wait(30)
        raise ValueError

    with pytest.raises(TimeoutError):
        await flight.run("late", fail, limit=0.05)
    released.set()
    async with asyncio.timeout(30):
        while True:
            try:
                assert await flight.run("next", lambda: 1, limit=20) == 1
                break
            except NotMade:
                await asyncio.sleep(0.01)
    assert caplog.text == ""


def test_a_loop_that_ended_meanwhile_is_not_missed(caplog: pytest.LogCaptureFixture) -> None:
    flight, released = SingleFlight(), threading.Event()
    before = set(threading.enumerate())
    with pytest.raises(TimeoutError):
        asyncio.run(flight.run("late", lambda: released.wait(30), limit=0.2))
    [late] = set(threading.enumerate()) - before
    released.set()
    late.join(30)
    assert not late.is_alive()
    assert caplog.text == ""
    assert asyncio.run(flight.run("next", lambda: 1, limit=20)) == 1


async def test_a_system_without_threads_refuses_and_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_thread: threading.Thread) -> NoReturn:
        raise RuntimeError("can't start new thread")

    flight = SingleFlight()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(NotMade, match="no thread"):
            await flight.run("ask", lambda: 7, limit=20)
    assert await flight.run("ask", lambda: 7, limit=20) == 7
    await until(lambda: all(thread.name != "sev-device" for thread in threading.enumerate()))
