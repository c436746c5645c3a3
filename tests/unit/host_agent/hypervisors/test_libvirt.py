"""A domain that is asked for: how libvirt is asked, and an end while its answer is out."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from uuid import uuid4

import pytest

from common.errors import PlatformFailed, Unavailable
from host_agent.hypervisors.libvirt import LibvirtMachine
from host_agent.hypervisors.libvirt_calls import LibvirtCalls
from tests.support.eventually import until
from tests.support.fake_libvirt import INTERNAL_ERROR, NO_DOMAIN, FakeLibvirt, LibvirtError
from tests.support.machine_kinds import fake

URI = "qemu:///system"


class Daemon(FakeLibvirt):
    """A libvirt that answers a start when it is let to, and notes what it was asked."""

    def begin(self) -> None:
        self.asked: list[tuple[str, int]] = []
        self.answer = threading.Event()
        self.there = self.refuses = False
        self.after_lookup: Callable[[], None] | None = None
        self.connecting, self.gate = threading.Event(), threading.Event()
        self.gate.set()

    def open(self, name: str) -> SimpleNamespace:  # type: ignore[override]  # the part that is used
        assert name == URI
        self.check()
        if not self.gate.is_set() and not self.connecting.is_set():
            self.connecting.set()
            self.gate.wait()
        return SimpleNamespace(isAlive=lambda: 1, createXML=self._create, lookupByUUIDString=self._lookup)

    def _create(self, xml: str, flags: int) -> None:
        self.asked.append((xml, flags))
        self.answer.wait()
        if self.refuses:
            raise LibvirtError(INTERNAL_ERROR, "no such machine type")
        self.there = True

    def _lookup(self, _uuid: str) -> SimpleNamespace:
        if not self.there:
            if self.after_lookup is not None:
                self.after_lookup()
            raise LibvirtError(NO_DOMAIN, "Domain not found")
        return SimpleNamespace(destroy=self._destroy, isActive=lambda: int(self.there))

    def _destroy(self) -> None:
        self.there = False


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Daemon]:
    made = Daemon(folder=tmp_path, kind=fake(tmp_path / "script"))
    made.begin()
    for name, module in made.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    yield made
    made.answer.set()
    made.gate.set()


def machine(limit: float = 10) -> LibvirtMachine:
    return LibvirtMachine(uuid4(), LibvirtCalls(URI, 10), start=LibvirtCalls(URI, limit), xml="<domain/>")


async def test_a_domain_is_started_paused_and_checked_against_libvirts_schema(daemon: Daemon) -> None:
    daemon.answer.set()
    asked = machine()
    await asked.wait_ready()
    assert daemon.asked == [("<domain/>", 1 | 16)]
    await asked.end()
    assert not daemon.there


async def test_a_domain_that_may_still_come_is_not_said_to_be_gone(daemon: Daemon) -> None:
    asked = machine(limit=0.1)
    with pytest.raises(Unavailable, match="no answer"):
        await asked.wait_ready()
    with pytest.raises(Unavailable, match="may still come into being"):
        await asked.end()
    assert asked.alive
    daemon.answer.set()
    await until(lambda: daemon.there)
    async with asyncio.timeout(10):
        while asked.alive:
            try:
                await asked.end()
            except Unavailable:
                await asyncio.sleep(0.01)
    assert not daemon.there


async def test_a_domain_that_comes_just_after_it_was_looked_for_is_not_said_to_be_gone(daemon: Daemon) -> None:
    asked = machine(limit=0.1)
    with pytest.raises(Unavailable, match="no answer"):
        await asked.wait_ready()

    def come() -> None:
        daemon.after_lookup = None
        daemon.answer.set()
        asked._created.wait()

    daemon.after_lookup = come
    with pytest.raises(Unavailable, match="may still come into being"):
        await asked.end()
    assert daemon.there
    await asked.end()
    assert not daemon.there
    assert not asked.alive


async def test_a_domain_that_libvirt_refused_is_ended_without_more_ado(daemon: Daemon) -> None:
    daemon.refuses = True
    daemon.answer.set()
    asked = machine()
    with pytest.raises(PlatformFailed, match="no such machine type"):
        await asked.wait_ready()
    await asked.end()
    assert not asked.alive


async def test_a_domain_that_was_given_up_while_libvirt_was_away_is_not_asked_for_afterwards(daemon: Daemon) -> None:
    asked = machine()
    daemon.answer.set()
    daemon.gate.clear()
    starting = asyncio.create_task(asked.wait_ready())
    await until(daemon.connecting.is_set)
    await asked.end()
    assert not asked.alive
    daemon.gate.set()
    with pytest.raises(PlatformFailed, match="ended as it was started"):
        await starting
    assert daemon.asked == []


async def test_a_domain_that_libvirt_was_never_asked_for_ends_when_libvirt_is_back(daemon: Daemon) -> None:
    asked = machine()
    daemon.away = True
    with pytest.raises(Unavailable):
        await asked.wait_ready()
    daemon.away = False
    await asked.end()
    assert not asked.alive
    assert daemon.asked == []


async def test_the_end_of_a_domain_that_was_found_again_is_noticed(daemon: Daemon) -> None:
    daemon.there = True
    found = LibvirtMachine(uuid4(), LibvirtCalls(URI, 10))
    await found.look()
    assert found.alive
    daemon.there = False
    async with asyncio.timeout(10):
        await found.wait_gone()
    found.close()
