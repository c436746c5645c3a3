"""A domain that is asked for: how libvirt is asked, and an end while its answer is out."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from uuid import uuid4

import pytest

from common.errors import Unavailable
from host_agent.hypervisors.libvirt import LibvirtMachine
from host_agent.hypervisors.libvirt_calls import LibvirtCalls
from tests.support.eventually import until
from tests.support.fake_libvirt import NO_DOMAIN, FakeLibvirt, LibvirtError
from tests.support.machine_kinds import fake

URI = "qemu:///system"


class Daemon(FakeLibvirt):
    """A libvirt that answers a start when it is let to, and notes what it was asked."""

    def begin(self) -> None:
        self.asked: list[tuple[str, int]] = []
        self.answer = threading.Event()
        self.there = False

    def open(self, name: str) -> SimpleNamespace:  # type: ignore[override]  # the part that is used
        assert name == URI
        self.check()
        return SimpleNamespace(isAlive=lambda: 1, createXML=self._create, lookupByUUIDString=self._lookup)

    def _create(self, xml: str, flags: int) -> None:
        self.asked.append((xml, flags))
        self.answer.wait()
        self.there = True

    def _lookup(self, _uuid: str) -> SimpleNamespace:
        if not self.there:
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


async def test_a_domain_that_libvirt_was_never_asked_for_ends_when_libvirt_is_back(daemon: Daemon) -> None:
    asked = machine()
    daemon.away = True
    with pytest.raises(Unavailable):
        await asked.wait_ready()
    daemon.away = False
    await asked.end()
    assert not asked.alive
    assert daemon.asked == []
