"""Steps that run to their end, and who hears how they ended."""

from __future__ import annotations

import asyncio

import pytest

from common.rpc.steps import drain, shielded


async def test_the_result_and_the_error_come_back_to_a_caller_that_waits() -> None:
    async def give() -> int:
        return 7

    async def fail() -> int:
        raise LookupError

    assert await shielded(give()) == 7
    with pytest.raises(LookupError):
        await shielded(fail())


async def test_a_caller_that_is_cancelled_waits_for_the_step_however_often() -> None:
    gate, done = asyncio.Event(), asyncio.Event()

    async def step() -> None:
        await gate.wait()
        done.set()

    call = asyncio.create_task(shielded(step()))
    for _ in range(3):
        await asyncio.sleep(0)
        call.cancel()
    await asyncio.sleep(0)
    assert not call.done()
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert done.is_set()


async def test_the_end_of_a_step_without_a_caller_is_not_lost() -> None:
    gate = asyncio.Event()

    async def step() -> None:
        await gate.wait()
        raise LookupError

    call = asyncio.create_task(shielded(step()))
    await asyncio.sleep(0)
    call.cancel()
    gate.set()
    with pytest.raises(asyncio.CancelledError) as caught:
        await call
    assert isinstance(caught.value.__cause__, LookupError)


async def test_draining_waits_for_steps_whose_caller_was_never_heard_of_again() -> None:
    gate, done = asyncio.Event(), asyncio.Event()

    async def step() -> None:
        await gate.wait()
        done.set()

    call = asyncio.create_task(shielded(step()))
    await asyncio.sleep(0)
    draining = asyncio.create_task(drain())
    await asyncio.sleep(0)
    assert not draining.done()
    gate.set()
    await draining
    assert done.is_set()
    await call


async def test_draining_nothing_ends_at_once() -> None:
    await drain()
