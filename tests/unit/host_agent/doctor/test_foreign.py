"""Guests that somebody else starts: folders, Proxmox VE's command, libvirt's connection."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from host_agent.config import AgentConfig, DeviceTable, LibvirtTable, ProxmoxTable, Tls
from host_agent.doctor.findings import Finding
from host_agent.doctor.foreign import probe
from host_agent.guest_tables import GuestTable
from tests.support.fake_libvirt import RPC, LibvirtError
from tests.support.hosts import outcomes

TLS = Tls(cert=Path("c"), key=Path("k"), client_ca=Path("a"), trust_domain="datacenter.example")
FIRMWARE = Path("OVMF.fd")
LIBVIRT = GuestTable(driver="libvirt", firmware=FIRMWARE, domain=Path("web.xml"))


def look(tmp_path: Path, table: GuestTable, **tables: Any) -> list[Finding]:
    agent = AgentConfig(
        listen="127.0.0.1:0",
        state_dir=tmp_path / "state",
        tls=TLS,
        device=DeviceTable(driver="dev_sev"),
        guests={"web": table},
        **tables,
    )

    async def run() -> list[Finding]:
        return [finding async for finding in probe(agent)]

    return asyncio.run(run())


def attached(tmp_path: Path) -> dict[str, str]:
    table = GuestTable(
        driver="attach", firmware=FIRMWARE, monitor=tmp_path / "web" / "qmp.sock", inputs=tmp_path / "in" / "web"
    )
    return outcomes(look(tmp_path, table))


def test_a_guest_that_the_agent_starts_needs_none_of_it(tmp_path: Path) -> None:
    assert look(tmp_path, GuestTable(firmware=FIRMWARE, program=["qemu"])) == []


def test_folders_that_are_to_be_made_are_left_alone(tmp_path: Path) -> None:
    assert attached(tmp_path) == {"guest.web.inputs": "PASS", "guest.web.monitor_folder": "SKIP"}
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(("mode", "outcome"), [(0o700, "PASS"), (0o750, "FAIL"), (0o701, "FAIL"), (0o770, "FAIL")])
def test_the_folder_of_the_owners_files_is_judged_as_a_launch_will(tmp_path: Path, mode: int, outcome: str) -> None:
    (tmp_path / "web").mkdir()
    (tmp_path / "in" / "web").mkdir(parents=True)
    (tmp_path / "in" / "web").chmod(mode)
    assert attached(tmp_path) == {"guest.web.inputs": outcome, "guest.web.monitor_folder": "PASS"}


def test_a_link_to_a_folder_is_none(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "in" / "web").symlink_to(tmp_path / "elsewhere")
    assert attached(tmp_path)["guest.web.inputs"] == "FAIL"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_root_does_not_judge_a_folder_that_may_be_the_agents(tmp_path: Path) -> None:
    (tmp_path / "in" / "web").mkdir(parents=True, mode=0o700)
    os.chown(tmp_path / "in" / "web", 65534, 65534)
    assert attached(tmp_path)["guest.web.inputs"] == "SKIP"


@pytest.mark.parametrize(("mode", "outcome"), [(0o755, "PASS"), (0o644, "FAIL"), (None, "FAIL")])
def test_proxmoxs_command_must_be_there_and_be_one(tmp_path: Path, mode: int | None, outcome: str) -> None:
    qm = tmp_path / "qm"
    if mode is not None:
        qm.touch()
        qm.chmod(mode)
    table = GuestTable(driver="proxmox", firmware=FIRMWARE, vmid=100)
    places = ProxmoxTable(qm=qm, run=tmp_path / "run", monitors=tmp_path)
    assert outcomes(look(tmp_path, table, proxmox=places)) == {
        "proxmox.qm": outcome,
        "guest.web.inputs": "PASS",
        "guest.web.monitor_folder": "PASS",
    }


@pytest.mark.parametrize(
    ("version", "outcome", "seen"),
    [
        (9_000_000, "PASS", "libvirt 9.0.0 at qemu:///system"),
        (8_006_000, "PASS", "libvirt 8.6.0 at qemu:///system"),
        (8_005_000, "FAIL", "libvirt 8.5.0 at qemu:///system"),
        (None, "FAIL", "libvirt: its version: no socket"),
    ],
)
def test_libvirt_is_connected_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int | None, outcome: str, seen: str
) -> None:
    module = ModuleType("libvirt")
    asked: list[str] = []

    def connect(uri: str) -> Any:
        asked.append(uri)
        if version is None:
            raise LibvirtError(RPC, "no socket")
        return SimpleNamespace(getLibVersion=lambda: version, close=lambda: asked.append("close"))

    monkeypatch.setattr(module, "open", connect, raising=False)
    monkeypatch.setattr(module, "libvirtError", LibvirtError, raising=False)
    monkeypatch.setitem(sys.modules, "libvirt", module)
    (told,) = look(tmp_path, LIBVIRT, libvirt=LibvirtTable(uri="qemu:///system"))
    assert (told.probe, str(told.outcome), told.seen) == ("libvirt.connection", outcome, seen)
    assert asked == ["qemu:///system", "close"] if version else ["qemu:///system"]


def test_without_libvirt_python_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "libvirt", None)
    (told,) = look(tmp_path, LIBVIRT)
    assert (told.probe, str(told.outcome)) == ("libvirt.connection", "FAIL")
    assert "sevattest[agent,libvirt]" in told.advice
