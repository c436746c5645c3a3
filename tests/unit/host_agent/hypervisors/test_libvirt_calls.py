"""Calls to libvirt: time limits, lost answers, a daemon that hangs, a module that is not there, and the real API."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.errors import InvalidInput, OutcomeUnknown, PlatformFailed, Reason, Refused, Unavailable
from host_agent.hypervisors.libvirt_calls import LibvirtCalls, NoDomain
from tests.support.fake_libvirt import NO_DOMAIN, RPC, FakeLibvirt, LibvirtError
from tests.support.machine_kinds import fake

URI = "qemu:///system"


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeLibvirt:
    made = FakeLibvirt(folder=tmp_path, kind=fake(tmp_path / "script"))
    for name, module in made.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    return made


@pytest.fixture
def stuck() -> Iterator[threading.Event]:
    """What a hanging call waits for; let go at the end."""
    event = threading.Event()
    yield event
    event.set()


def failing(code: int, words: str) -> Any:
    def call(_connection: object) -> None:
        raise LibvirtError(code, words)

    return call


async def test_a_call_has_its_answer_from_one_connection(daemon: FakeLibvirt) -> None:
    calls = LibvirtCalls(URI, 10)
    first = await calls.run("this", lambda connection: connection)
    assert first is await calls.run("that", lambda connection: connection)
    calls.close()
    assert first is not await calls.run("that", lambda connection: connection)
    assert not daemon.away


async def test_a_lost_connection_is_opened_again(daemon: FakeLibvirt) -> None:
    calls = LibvirtCalls(URI, 10)
    first = await calls.run("this", lambda connection: connection)
    daemon.away = True
    with pytest.raises(Unavailable, match="Connection reset"):
        await calls.run("this", lambda connection: connection.lookupByUUIDString("x"))
    daemon.away = False
    first.isAlive = lambda: 0
    assert await calls.run("this", lambda connection: connection) is not first


@pytest.mark.parametrize(
    ("code", "words", "irreversible", "kind"),
    [
        (NO_DOMAIN, "Domain not found", False, NoDomain),
        (RPC, "Cannot recv data", False, Unavailable),
        (RPC, "Cannot recv data", True, OutcomeUnknown),
        (1, "internal error: no", True, PlatformFailed),
        (1, "SEV: failed to inject secret ret=-5 fw_error=11 'Bad measurement'", True, Refused),
    ],
)
@pytest.mark.usefixtures("daemon")
async def test_libvirts_errors_are_ours(code: int, words: str, irreversible: bool, kind: type[Exception]) -> None:  # noqa: FBT001 -- a column
    calls = LibvirtCalls(URI, 10)
    with pytest.raises(kind):
        await calls.run("this", failing(code, words), irreversible=irreversible)


async def test_a_connection_that_cannot_be_made_leaves_nothing_in_doubt(daemon: FakeLibvirt) -> None:
    daemon.away = True
    with pytest.raises(Unavailable):
        await LibvirtCalls(URI, 10).run("this", lambda connection: connection.resume(), irreversible=True)


@pytest.mark.usefixtures("daemon")
async def test_a_daemon_that_hangs_is_given_up_in_time_and_not_joined_for_ever(stuck: threading.Event) -> None:
    calls = LibvirtCalls(URI, 0.05)
    for turn in range(8):
        with pytest.raises(OutcomeUnknown if turn % 2 else Unavailable, match=r"no answer in 0\.05 s"):
            await calls.run("this", lambda _connection: stuck.wait(60), irreversible=bool(turn % 2))
    with pytest.raises(Unavailable, match="has not answered 8 earlier calls"):
        await calls.run("this", lambda connection: connection)
    stuck.set()


async def test_without_libvirt_python_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "libvirt", None)
    with pytest.raises(InvalidInput, match="libvirt-python is not installed") as refusal:
        await LibvirtCalls(URI, 10).run("this", lambda connection: connection)
    assert refusal.value.reason is Reason.INVALID_CONFIGURATION
    assert "sevattest[agent,libvirt]" in refusal.value.fields["hint"]


def test_importing_the_drivers_imports_no_libvirt() -> None:
    code = "import sys, host_agent.hypervisors.fleet; sys.exit('libvirt' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_the_fake_has_the_real_libvirt_python_has() -> None:
    python = "/usr/bin/python3"
    code = (
        "import inspect, json, libvirt, libvirt_qemu\n"
        "names = {'virConnect': ['createXML', 'lookupByUUIDString', 'isAlive', 'close'],\n"
        "    'virDomain': ['isActive', 'destroy', 'resume', 'launchSecurityInfo', 'setLaunchSecurityState']}\n"
        "told = {f'{kind}.{name}': list(inspect.signature(getattr(getattr(libvirt, kind), name)).parameters)[1:]\n"
        "    for kind, of in names.items() for name in of}\n"
        "told['open'] = list(inspect.signature(libvirt.open).parameters)\n"
        "told['qemuMonitorCommand'] = list(inspect.signature(libvirt_qemu.qemuMonitorCommand).parameters)\n"
        "told['numbers'] = [libvirt.VIR_DOMAIN_START_PAUSED, libvirt.VIR_DOMAIN_START_VALIDATE, \n"
        "    libvirt.VIR_ERR_NO_CONNECT, libvirt.VIR_ERR_INVALID_CONN, libvirt.VIR_ERR_SYSTEM_ERROR,\n"
        "    libvirt.VIR_ERR_RPC, libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_OPERATION_TIMEOUT]\n"
        "told['words'] = [libvirt.VIR_DOMAIN_LAUNCH_SECURITY_SEV_MEASUREMENT,\n"
        "    libvirt.VIR_DOMAIN_LAUNCH_SECURITY_SEV_SECRET_HEADER, libvirt.VIR_DOMAIN_LAUNCH_SECURITY_SEV_SECRET]\n"
        "print(json.dumps(told))\n"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip("no libvirt-python for the system's python3: install the package python3-libvirt")
    assert json.loads(done.stdout) == {
        "virConnect.createXML": ["xmlDesc", "flags"],
        "virConnect.lookupByUUIDString": ["uuidstr"],
        "virConnect.isAlive": [],
        "virConnect.close": [],
        "virDomain.isActive": [],
        "virDomain.destroy": [],
        "virDomain.resume": [],
        "virDomain.launchSecurityInfo": ["flags"],
        "virDomain.setLaunchSecurityState": ["params", "flags"],
        "open": ["name"],
        "qemuMonitorCommand": ["domain", "cmd", "flags"],
        "numbers": [1, 16, 5, 6, 38, 39, 42, 68],
        "words": ["sev-measurement", "sev-secret-header", "sev-secret"],
    }
