"""The agent's unit, its drop-ins, the udev rule and the sample configuration, held against what the drivers need.

And the verifier's unit, against how it ends.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from collections import defaultdict
from pathlib import Path

import pytest

from common import config as configuration
from common.errors import LEAVES
from host_agent.config import AgentConfig
from host_agent.devices import DEFAULT_PATH, DEV_SEV, DRIVERS
from host_agent.devices.qmp import QmpDevice
from host_agent.hypervisors.arguments import check_definition
from host_agent.hypervisors.fleet import DRIVERS as GUEST_DRIVERS
from host_agent.hypervisors.unit import takes_along
from verifier.keys.token import PinRefused

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
FOLDER = DEPLOY / "host-agent"
UNIT = FOLDER / "sev-host-agent.service"
ATTACH, LIBVIRT = FOLDER / "drop-ins" / "attach.conf", FOLDER / "drop-ins" / "libvirt.conf"
SAMPLE = FOLDER / "agent.toml"
MACHINES_NEED = {"/dev/kvm", DEFAULT_PATH}
# What systemd makes for a service, and where.
MADE = {"StateDirectory": "/var/lib", "RuntimeDirectory": "/run", "LogsDirectory": "/var/log"}


class Unit:
    """A unit with its drop-ins, as systemd reads them: a setting of a list's adds to it."""

    def __init__(self, *texts: str) -> None:
        self.settings: dict[str, list[str]] = defaultdict(list)
        for line in "\n".join(texts).splitlines():
            if line and line[0] not in "#[":
                key, _, value = line.partition("=")
                self.settings[key].append(value)

    def words(self, key: str) -> set[str]:
        return {word for value in self.settings[key] for word in value.split()}

    def may_open(self, device: str) -> bool:
        """For reading and writing."""
        assert self.settings["DevicePolicy"] == ["closed"]
        return any(value.split() == [device, "rw"] for value in self.settings["DeviceAllow"])

    def may_write(self, path: Path) -> bool:
        assert self.settings["ProtectSystem"] == ["strict"]
        made = [Path(base) / name for key, base in MADE.items() for name in self.words(key)]
        return any(path.is_relative_to(place) for place in [*made, *map(Path, self.words("ReadWritePaths"))])


def unit(*drop_ins: Path) -> Unit:
    return Unit(*(file.read_text(encoding="utf-8") for file in (UNIT, *drop_ins)))


@pytest.fixture(scope="module")
def sample() -> AgentConfig:
    return configuration.load(SAMPLE, AgentConfig, {})


def documented_guest(driver: str) -> dict[str, str]:
    """The guest of the page's example for a driver."""
    page = (ROOT / "docs" / "hypervisors.md").read_text(encoding="utf-8")
    blocks = [tomllib.loads(block) for block in re.findall(r"```toml\n(.*?)```", page, re.DOTALL)]
    guests = [guest for block in blocks for guest in block.get("guests", {}).values()]
    found: dict[str, str] = next(guest for guest in guests if guest.get("driver") == driver)
    return found


@pytest.mark.parametrize("device", sorted(MACHINES_NEED))
def test_the_machines_may_open_what_they_need(device: str) -> None:
    assert unit().may_open(device)


@pytest.mark.parametrize("device", sorted(MACHINES_NEED))
@pytest.mark.parametrize("rights", ["", " r", " m"])
def test_a_unit_without_such_a_line_is_noticed(device: str, rights: str) -> None:
    line = f"DeviceAllow={device} rw\n"
    text = UNIT.read_text(encoding="utf-8")
    assert line in text
    assert not Unit(text.replace(line, f"DeviceAllow={device}{rights}\n" if rights else "")).may_open(device)


def test_the_verifier_is_not_started_again_after_a_pin_that_its_token_refused() -> None:
    """Nor for ever left ended after anything else."""
    settings = Unit((DEPLOY / "verifier" / "sev-verifier.service").read_text(encoding="utf-8"))
    assert settings.words("Restart") == {"on-failure"}
    assert settings.words("RestartPreventExitStatus") == {str(PinRefused.exit_code)}
    assert PinRefused.exit_code not in {leaf.exit_code for leaf in LEAVES}


def test_the_devices_group_is_the_units() -> None:
    (rule,) = [line for line in (FOLDER / "70-sev.rules").read_text().splitlines() if line and line[0] != "#"]
    said = dict(re.findall(r'(\w+)={1,2}"([^"]*)"', rule))
    assert f"/dev/{said['KERNEL']}" == DEFAULT_PATH
    assert said["MODE"] == "0660"
    assert said["GROUP"] in unit().words("SupplementaryGroups")


def test_the_sample_is_for_the_kernels_device_and_is_taken(sample: AgentConfig) -> None:
    assert (sample.device.driver, str(sample.device.path)) == (DEV_SEV, DEFAULT_PATH)
    for name, table in sample.guests.items():
        check_definition(f"guests.{name}.args", table.args, state_dir=sample.state_dir)
        assert table.args[table.args.index("-accel") + 1] == "kvm"


def test_the_unit_lets_the_sample_write_where_it_wants_to(sample: AgentConfig) -> None:
    files = [
        Path(word.removeprefix("file:"))
        for table in sample.guests.values()
        for word in table.args
        if word.startswith("file:")
    ]
    assert files
    assert sample.health.socket is not None
    places = [sample.state_dir, sample.health.socket, *files]
    assert [place for place in places if not unit().may_write(place)] == []
    assert not unit().may_write(Path("/srv/web/disk.img"))


def test_a_guests_memory_may_be_pinned_and_its_machine_outlives_the_agent() -> None:
    assert unit().settings["LimitMEMLOCK"] == ["infinity"]
    assert not takes_along(unit().settings["KillMode"][0])


def test_with_its_drop_in_the_driver_attach_reaches_what_its_page_says() -> None:
    guest = documented_guest("attach")
    places = [Path(guest["inputs"]), Path(guest["monitor"])]
    assert all(unit(ATTACH).may_write(place) for place in places)
    assert not any(unit().may_write(place) for place in places)
    # systemd would remove a running machine's monitor with the agent's folders.
    assert unit(ATTACH).settings["RuntimeDirectoryPreserve"] == ["yes"]
    assert set(unit(ATTACH).settings["RuntimeDirectoryMode"]) == {"0700"}


def test_with_its_drop_in_the_driver_libvirt_may_connect() -> None:
    assert "libvirt" in unit(LIBVIRT).words("SupplementaryGroups")
    assert "libvirt" not in unit().words("SupplementaryGroups")
    assert "AF_UNIX" in unit(LIBVIRT).words("RestrictAddressFamilies")


def test_the_page_says_of_each_driver_what_it_needs() -> None:
    page = (DEPLOY / "README.md").read_text(encoding="utf-8")
    table = [line for line in page.splitlines() if line.startswith("| ")]
    for key, drivers in {"`driver": GUEST_DRIVERS, "`device.driver": {*DRIVERS, QmpDevice.name}}.items():
        for driver in drivers:
            assert any(f'{key} = "{driver}"`' in line for line in table), driver
    for name in re.findall(r"`(host-agent/[\w./-]+)`", page):
        assert (DEPLOY / name).exists(), name


def test_the_pages_commands_find_their_files_in_its_own_folder() -> None:
    page = (DEPLOY / "README.md").read_text(encoding="utf-8")
    installed = re.findall(r"^install .*?((?:host-agent|verifier)/\S+)", page, re.MULTILINE)
    assert len(installed) > 3
    for name in installed:
        assert (DEPLOY / name).is_file(), name
    folders = re.findall(r"pip install '(\.+)\[", page)
    assert len(folders) == 2
    for folder in folders:
        assert (DEPLOY / folder / "pyproject.toml").is_file(), folder


@pytest.mark.parametrize("sample", [SAMPLE, DEPLOY / "verifier" / "verifier.toml"], ids=lambda file: file.stem)
def test_the_pages_commands_put_every_file_in_place_that_a_sample_names(sample: Path) -> None:
    page = (DEPLOY / "README.md").read_text(encoding="utf-8")
    placed = " ".join(line.partition("#")[0] for line in page.splitlines() if line.startswith(("install ", "/opt/")))
    settings = tomllib.loads(sample.read_text(encoding="utf-8"))
    named = [settings.get("key_file"), *settings["tls"].values(), settings.get("admin", {}).get("client_ca")]
    files = [Path(each) for each in named if each is not None and each.startswith("/")]
    assert len(files) >= 3
    for file in files:
        assert str(file) in placed or (file.name in placed and f"{file.parent}/ " in f"{placed} "), file


@pytest.mark.parametrize("file", [UNIT, DEPLOY / "verifier" / "sev-verifier.service"], ids=lambda file: file.stem)
def test_the_page_that_a_unit_names_is_put_where_it_says(file: Path) -> None:
    [named] = re.findall(r"^Documentation=file://(\S+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    assert (ROOT / "docs" / Path(named).name).is_file()
    commands = re.findall(
        r"^install .*-t (\S+) \.\./docs/\*\.md", (DEPLOY / "README.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert commands == [str(Path(named).parent)] * 2


@pytest.mark.parametrize("file", ["deploy/verifier/Containerfile", "deploy/host-agent/Containerfile"])
def test_nothing_that_an_image_takes_in_is_ignored(file: str) -> None:
    ignored = [line for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[:1] != "#"]
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
    words = {word for line in copied for word in line.split()}
    assert {"common", "proto", "pyproject.toml"} <= words
    assert not words & set(ignored)
    assert all((ROOT / word).exists() for word in words)


@pytest.mark.parametrize("drop_ins", [(), (ATTACH,), (LIBVIRT,), (ATTACH, LIBVIRT)], ids=len)
def test_systemd_itself_finds_no_fault(tmp_path: Path, drop_ins: tuple[Path, ...]) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze: install the package systemd")
    assert systemd_says(tmp_path, UNIT.read_text(encoding="utf-8"), *drop_ins) == ""


def test_systemd_finds_a_fault_where_there_is_one(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze: install the package systemd")
    drop_in = tmp_path / "faulty.conf"
    drop_in.write_text("[Service]\nDevicePolicy=shut\n", encoding="utf-8")
    assert "shut" in systemd_says(tmp_path, UNIT.read_text(encoding="utf-8"), drop_in)


def systemd_says(folder: Path, text: str, *drop_ins: Path) -> str:
    """What `systemd-analyze verify` complains of in a unit of this text, whose program is one that exists."""
    file = folder / UNIT.name
    file.write_text(text.replace("/opt/sevattest/bin/sev-host-agent", "/bin/true"), encoding="utf-8")
    (folder / f"{UNIT.name}.d").mkdir()
    for drop_in in drop_ins:
        shutil.copy(drop_in, folder / f"{UNIT.name}.d")
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(file)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, "SYSTEMD_LOG_LEVEL": "warning", "SYSTEMD_UNIT_PATH": f"{folder}:"},
    )
    return done.stdout + done.stderr
