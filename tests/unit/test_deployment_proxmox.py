"""The agent's unit with Proxmox VE's drop-in: what systemd makes of both together."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

from host_agent.hypervisors.proxmox import ProxmoxSettings

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
UNIT = DEPLOY / "host-agent" / "sev-host-agent.service"
DROP_IN = DEPLOY / "proxmox" / "sev-host-agent-proxmox.conf"
# Where the empty value is no reset: the empty set of capabilities.
_SETS = {"CapabilityBoundingSet": "~"}
# What would be in the way of qm. Keys that a unit of ours may have besides these confine nothing that qm does.
_CONFINES = re.compile(
    r"(Private|Protect|Restrict|Inaccessible|ReadOnly|NoExec|Device|SystemCall|IPAddress|TemporaryFile|Bind)\w+"
    r"|CapabilityBoundingSet|NoNewPrivileges|LockPersonality|MemoryDenyWriteExecute|DynamicUser|RootDirectory|RootImage"
    r"|SocketBind\w+|KeyringMode|SecureBits"
)
_FREE = {"", "no", "auto", "~"}


def effective(*texts: str) -> dict[str, list[str]]:
    """Values by key: a value adds to those before, an empty one takes them back (systemd.exec(5))."""
    found: dict[str, list[str]] = defaultdict(list)
    for line in "\n".join(texts).splitlines():
        if line and line[0] not in "#;[":
            key, _, value = (part.strip() for part in line.partition("="))
            if value == _SETS.get(key, ""):
                found[key] = [value]
            else:
                found[key] = [*(before for before in found[key] if before), value]
    return found


def confined(settings: dict[str, list[str]]) -> set[str]:
    """Keys by which the unit is still confined."""
    # SystemCallErrorNumber= says what happens to calls that SystemCallFilter= stops.
    keys = {key for key in settings if _CONFINES.fullmatch(key)} - {"SystemCallErrorNumber"}
    return {key for key in keys if settings[key][-1] not in _FREE or (key in _SETS and settings[key] != [_SETS[key]])}


def both(**changed: str) -> str:
    """The drop-in, with some of its lines changed."""
    text = DROP_IN.read_text(encoding="utf-8")
    for key, value in changed.items():
        text, count = re.subn(rf"(?m)^{key}=.*\n", value, text)
        assert count == 1, key
    return text


def unit(drop_in: str = "") -> dict[str, list[str]]:
    return effective(UNIT.read_text(encoding="utf-8"), drop_in)


def test_with_the_drop_in_the_agent_is_root_and_nothing_that_qm_needs_is_kept_from_it() -> None:
    settings = unit(both())
    assert settings["User"][-1] == settings["Group"][-1] == "root"
    assert settings["SupplementaryGroups"] == [""]
    assert confined(settings) == set()


def test_without_it_the_agent_is_confined_in_all_the_ways_that_the_drop_in_takes_back() -> None:
    taken_back = {key for key in effective(both()) if _CONFINES.fullmatch(key)}
    assert confined(unit()) == taken_back
    assert {
        "CapabilityBoundingSet",
        "NoNewPrivileges",
        "SystemCallFilter",
        "DeviceAllow",
        "ProtectSystem",
    } <= taken_back


@pytest.mark.parametrize("key", sorted(key for key in effective(both()) if _CONFINES.fullmatch(key)))
def test_a_drop_in_that_forgets_one_of_them_is_noticed(key: str) -> None:
    assert confined(unit(both(**{key: ""}))) == {key}


def test_an_empty_set_of_capabilities_is_not_taken_for_all_of_them() -> None:
    assert confined(unit(both(CapabilityBoundingSet="CapabilityBoundingSet=\n"))) == {"CapabilityBoundingSet"}


def test_the_launches_folder_is_systemds_to_make_private_and_stays_when_the_agent_restarts() -> None:
    settings, made = unit(both()), ProxmoxSettings().run
    assert made.parent == Path("/run")
    assert made.name in settings["RuntimeDirectory"]
    assert made.name not in unit()["RuntimeDirectory"]
    assert settings["RuntimeDirectoryMode"] == ["0700"]
    assert settings["RuntimeDirectoryPreserve"] == ["yes"]


def test_the_agent_begins_before_the_machines_that_start_with_the_host() -> None:
    settings = unit(both())
    assert settings["Before"] == ["pve-guests.service"]
    assert "pve-cluster.service" in settings["After"]


def test_the_page_installs_the_drop_in_where_systemd_looks() -> None:
    page = (DEPLOY / "proxmox" / "README.md").read_text(encoding="utf-8")
    assert f"/etc/systemd/system/{UNIT.name}.d {DROP_IN.name}\n" in page


def exposures(folder: Path, drop_in: str) -> dict[str, bool]:
    """What systemd itself says: for each way to confine a service whether this one is."""
    folder.mkdir()
    (folder / UNIT.name).write_text(UNIT.read_text().replace("/opt/sevattest/bin/sev-host-agent", "/bin/true"))
    (folder / f"{UNIT.name}.d").mkdir()
    (folder / f"{UNIT.name}.d" / DROP_IN.name).write_text(drop_in)
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--no-pager", str(folder / UNIT.name)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "SYSTEMD_UNIT_PATH": f"{folder}:"},
    )
    assert done.stderr == ""
    rows = re.findall(r"(?m)^([\u2713\u2717]) (\w+)=", done.stdout)
    return {key: mark == "\u2713" for mark, key in rows}


def test_systemd_itself_finds_the_agent_unconfined_with_the_drop_in_and_confined_without(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze: install the package systemd")
    keys = {"CapabilityBoundingSet", "NoNewPrivileges", "ProtectSystem", "ProtectHome", "SystemCallFilter"}
    keys |= {"DeviceAllow", "RestrictAddressFamilies", "ProtectKernelModules", "ProtectControlGroups", "PrivateTmp"}
    with_it, without = exposures(tmp_path / "with", both()), exposures(tmp_path / "without", "")
    said = {key for key in keys if key in without}
    assert {"NoNewPrivileges", "PrivateTmp", "ProtectKernelModules"} <= said
    assert {key for key in said if not without[key]} <= {"DeviceAllow"}
    assert {key for key, is_set in with_it.items() if is_set} & keys == set()
