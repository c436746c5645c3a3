"""`agent.toml`: what is accepted, and a sentence for everything that is not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest

from common.errors import InvalidInput, Reason
from common.rpc.identity import Role
from host_agent import cli
from host_agent.config import AgentConfig, load
from host_agent.hypervisors.attach import AttachDefinition
from host_agent.hypervisors.base import GuestDefinition
from host_agent.hypervisors.libvirt import LibvirtDefinition
from host_agent.hypervisors.proxmox import ProxmoxDefinition
from tests.support.firmware import amdsev_image, secret_entry, with_footer
from tests.support.pki import DATACENTER_DOMAIN, Pki
from tests.support.stages import domain

MINIMAL = """
listen = "127.0.0.1:0"
state_dir = "state"
[tls]
cert = "agent.pem"
key = "agent.key"
client_ca = "ca.pem"
trust_domain = "datacenter.example"
[device]
driver = "socket"
path = "sev.sock"
"""
GUEST = """
[guests.web]
program = ["/bin/true", "--own"]
firmware = "OVMF.fd"
args = ["-m", "1G"]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "OVMF.fd").write_bytes(amdsev_image())
    return tmp_path


def read(folder: Path, text: str, environ: Mapping[str, str] | None = None) -> AgentConfig:
    path = folder / "agent.toml"
    path.write_text(text)
    return load(path, environ or {})


def test_a_small_configuration_has_safe_defaults(folder: Path) -> None:
    config = read(folder, MINIMAL)
    assert config.state_dir == folder / "state"
    assert config.definitions() == {}
    assert config.limits().lifetime == timedelta(minutes=15)
    assert config.qemu_settings().start_timeout == 30
    assert config.health.socket is None
    assert config.metrics is None
    assert config.server_tls().role is Role.AGENT


def test_the_kernels_device_is_where_the_kernel_puts_it_and_a_socket_has_no_such_place(folder: Path) -> None:
    kernel = MINIMAL.replace('driver = "socket"\npath = "sev.sock"', 'driver = "dev_sev"')
    assert read(folder, kernel).device.path == Path("/dev/sev")
    for driver in ("socket", "qmp"):
        with pytest.raises(InvalidInput, match=rf"device\.path: /dev/sev is the kernel's device: the {driver} driver"):
            read(folder, MINIMAL.replace('path = "sev.sock"\n', "").replace('"socket"', f'"{driver}"'))
    assert read(folder, MINIMAL.replace('"socket"', '"qmp"')).device.path == folder / "sev.sock"


def test_a_guest_is_defined_by_program_firmware_and_arguments(folder: Path) -> None:
    guest = read(folder, MINIMAL + GUEST).definitions()["web"]
    assert isinstance(guest, GuestDefinition)
    assert guest.program == ("/bin/true", "--own")
    assert guest.firmware == folder / "OVMF.fd"
    assert guest.args == ("-m", "1G")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (MINIMAL.replace('driver = "socket"', 'driver = "ioctl"'), "device.driver: this version has no driver 'ioctl'"),
        (MINIMAL.replace('driver = "socket"\n', ""), "device.driver"),
        (MINIMAL.replace("127.0.0.1:0", "localhost"), "address"),
        (MINIMAL + "[qemu]\nstart_timeout = 0\n", "qemu.start_timeout"),
        (MINIMAL + "[qemu]\nstart_timeout = 61\n", "qemu.start_timeout"),
        (MINIMAL + "[qemu]\ncbitpos = 64\n", "qemu.cbitpos"),
        (MINIMAL + "[launches]\nlifetime = 0\n", "launches.lifetime"),
        (MINIMAL + "[launches]\nretain_count = -1\n", "launches.retain_count"),
        (MINIMAL + "[surprise]\n", "surprise"),
        (MINIMAL + '[metrics]\nlisten = "0.0.0.0:9464"\n', "metrics: listen: 0.0.0.0:9464 is not an address of this"),
        (MINIMAL + '[metrics]\nlisten = "127.0.0.1:0"\nkey = "k"\n', "metrics: cert, key and client_ca go together"),
        (MINIMAL + GUEST + "policy = 5\n", "guests.web.policy"),
        (MINIMAL + GUEST + 'session = "s.b64"\n', "guests.web.session"),
        (MINIMAL + GUEST + "handle = 1\n", "guests.web.handle"),
        (MINIMAL + GUEST.replace("[guests.web]", '[guests."../web"]'), "a guest's name"),
        (MINIMAL + GUEST.replace("[guests.web]", '[guests.""]'), "a guest's name"),
        (MINIMAL + GUEST.replace('["/bin/true", "--own"]', "[]"), "guests.web.program: names no program"),
        (
            MINIMAL + GUEST.replace('"/bin/true"', '"bin/true"'),
            "guests.web.program: bin/true: must be an absolute path",
        ),
        (
            MINIMAL + GUEST.replace('"/bin/true"', '"/no/such"'),
            "guests.web.program: /no/such: there is no such program",
        ),
        (MINIMAL + GUEST.replace('"--own"', '"a\\u0000b"'), "guests.web.program: holds a zero byte"),
        (MINIMAL + GUEST.replace("OVMF.fd", "nope.fd"), "guests.web.firmware: .*nope.fd: there is no such file"),
        (MINIMAL + GUEST.replace("OVMF.fd", "o" * 256), "guests.web.firmware: .*o: File name too long"),
        (MINIMAL + GUEST.replace('"-m", "1G"', '"-bios", "x"'), r"guests.web.args\[0\]: -bios is not measured"),
        (
            MINIMAL + GUEST.replace('"-m", "1G"', '"-object", "sev-guest,id=a"'),
            r"guests.web.args\[0\]: -object sev-guest",
        ),
    ],
)
def test_what_cannot_be_used_is_refused_by_its_key(folder: Path, text: str, words: str) -> None:
    with pytest.raises(InvalidInput, match=words) as refusal:
        read(folder, text)
    assert refusal.value.reason is Reason.INVALID_CONFIGURATION


ATTACH = """
[guests.web]
driver = "attach"
firmware = "OVMF.fd"
monitor = "run/qmp.sock"
inputs = "run/in"
"""
PROXMOX = """
[guests.web]
driver = "proxmox"
firmware = "OVMF.fd"
vmid = 100
"""
LIBVIRT = """
[guests.web]
driver = "libvirt"
firmware = "OVMF.fd"
domain = "web.xml"
"""


def test_each_driver_has_its_definition(folder: Path) -> None:
    (folder / "web.xml").write_text(domain(folder))
    attach = read(folder, MINIMAL + ATTACH).definitions()["web"]
    assert isinstance(attach, AttachDefinition)
    assert (attach.monitor, attach.inputs, attach.start) == (folder / "run/qmp.sock", folder / "run/in", ())
    proxmox = read(folder, MINIMAL + PROXMOX).definitions()["web"]
    assert isinstance(proxmox, ProxmoxDefinition)
    assert proxmox.vmid == 100
    libvirt = read(folder, MINIMAL + LIBVIRT).definitions()["web"]
    assert isinstance(libvirt, LibvirtDefinition)
    assert libvirt.domain == domain(folder)


def test_where_proxmox_and_libvirt_are_can_be_said(folder: Path) -> None:
    config = read(folder, MINIMAL)
    assert str(config.proxmox_settings().run) == "/run/sevattest"
    assert config.libvirt_settings().uri == "qemu:///system"
    config = read(folder, MINIMAL + '[proxmox]\nqm = "qm"\n[libvirt]\nuri = "qemu:///session"\n')
    assert config.proxmox_settings().qm == folder / "qm"
    assert config.libvirt_settings().uri == "qemu:///session"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (ATTACH.replace('"attach"', '"xen"'), "guests.web.driver: there is no driver 'xen'; there are attach, "),
        (ATTACH.replace('monitor = "run/qmp.sock"\n', ""), "guests.web.monitor: must be there"),
        (ATTACH.replace('inputs = "run/in"\n', ""), "guests.web.inputs: must be there"),
        (ATTACH.replace("run/in", "state/in"), "guests.web.inputs: .* outside of state_dir"),
        (ATTACH.replace("run/qmp", "state/launches/x/qmp"), "guests.web.monitor: .* outside of state_dir"),
        (ATTACH + 'start = ["no/such"]\n', "guests.web.start: no/such: must be an absolute path"),
        (ATTACH + "vmid = 100\n", "guests.web.vmid: is a key of the driver proxmox, and the guest has attach"),
        (ATTACH + 'program = ["/bin/true"]\n', "guests.web.program: is a key of the driver qemu"),
        (ATTACH + ATTACH.replace("web", "db"), "guests.db.monitor: .* is the guest web's"),
        (
            ATTACH + ATTACH.replace("web", "db").replace("run/", "run/../run/"),
            "guests.db.monitor: .* is the guest web's",
        ),
        (PROXMOX.replace("vmid = 100\n", ""), "guests.web.vmid: must be there"),
        (PROXMOX.replace("100", "99"), "guests.web.vmid"),
        (PROXMOX + 'args = ["-m", "1G"]\n', "guests.web.args: is a key of the driver qemu"),
        (PROXMOX + PROXMOX.replace("web", "db"), "guests.db.vmid: 100 is the guest web's"),
        (PROXMOX.replace("OVMF.fd", "nope.fd"), "guests.web.firmware: .* no such file"),
        (LIBVIRT, "guests.web.domain: .*web.xml: No such file"),
        (LIBVIRT.replace("web.xml", "OVMF.fd"), "guests.web.domain: .* is not UTF-8 text"),
        (LIBVIRT.replace('domain = "web.xml"\n', ""), "guests.web.domain: must be there"),
        (LIBVIRT.replace("web.xml", "agent.toml"), "guests.web.domain: is not XML"),
    ],
)
def test_what_a_driver_cannot_use_is_refused_by_its_key(folder: Path, text: str, words: str) -> None:
    with pytest.raises(InvalidInput, match=words) as refusal:
        read(folder, MINIMAL + text)
    assert refusal.value.reason is Reason.INVALID_CONFIGURATION


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="no setpriv: install the package util-linux")
@pytest.mark.parametrize("command", ["check-config", "selftest"])
def test_a_firmware_in_a_folder_that_this_user_cannot_search_is_a_sentence_with_its_key(
    folder: Path, command: str
) -> None:
    shut = folder / "shut"
    shut.mkdir()
    (folder / "OVMF.fd").rename(shut / "OVMF.fd")
    (folder / "agent.toml").write_text(MINIMAL + GUEST.replace("OVMF.fd", "shut/OVMF.fd"))
    words = [sys.executable, "-m", "host_agent.cli", command, "--config", str(folder / "agent.toml")]
    if os.geteuid() == 0:
        os.chown(shut, 65534, 65534)  # root without root's rights stands for any user
        words = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search", *words]
    shut.chmod(0o700 if os.geteuid() == 0 else 0)
    try:
        done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=60)
    finally:
        shut.chmod(0o700)
    said = f"sev-host-agent: guests.web.firmware: {shut / 'OVMF.fd'}: Permission denied\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)


@pytest.mark.parametrize(
    "text", [GUEST, ATTACH, ATTACH.replace("run/in", "loop/in"), ATTACH.replace("run/q", "loop/q")]
)
def test_a_folder_that_is_a_link_to_itself_is_left_to_who_opens_it(folder: Path, text: str) -> None:
    (folder / "loop").symlink_to("loop")
    config = read(folder, MINIMAL.replace('"state"', '"loop/state"') + text)
    assert list(config.definitions()) == ["web"]


def test_a_socket_in_the_agents_folder_is_refused_however_it_is_spelt(folder: Path) -> None:
    path = f"{folder}/state/launches/x/qmp.sock"
    with pytest.raises(InvalidInput, match="agent's own monitor"):
        read(folder, MINIMAL + GUEST.replace('"-m", "1G"', f'"-qmp", "unix:{path},server=on"'))
    roundabout = MINIMAL.replace('"state"', '"other/../state"') + GUEST
    with pytest.raises(InvalidInput, match="agent's own monitor"):
        read(folder, roundabout.replace('"-m", "1G"', f'"-qmp", "unix:{path},server=on"'))


def test_variables_override_the_file(folder: Path) -> None:
    config = read(folder, MINIMAL + GUEST, {"SEVATTEST_LAUNCHES__LIFETIME": "60", "SEVATTEST_LISTEN": "127.0.0.1:1"})
    assert config.limits().lifetime == timedelta(minutes=1)
    assert config.listen == "127.0.0.1:1"


@pytest.fixture
def complete(folder: Path) -> Path:
    """A configuration with certificates that can be used."""
    pki = Pki(folder / "pki")
    pair = pki.issue(Role.AGENT, ip=["127.0.0.1"])
    text = MINIMAL.replace("agent.pem", str(pair.cert)).replace("agent.key", str(pair.key))
    text = text.replace("ca.pem", str(pki.datacenter_ca)).replace("datacenter.example", DATACENTER_DOMAIN)
    (folder / "agent.toml").write_text(text + GUEST + '[health]\nsocket = "health.sock"\n')
    return folder / "agent.toml"


def test_check_config_says_what_it_found(complete: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check-config", "--config", str(complete)]) == 0
    out = capsys.readouterr().out
    assert "identity: spiffe://datacenter.example/agent/test" in out
    assert "guest web: " in out
    assert "secrets at 0x810000, 3072 bytes" in out


def test_check_config_says_which_firmware_takes_no_secrets(complete: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (complete.parent / "OVMF.fd").write_bytes(with_footer(b"code", [secret_entry(0, 0)]))
    assert cli.main(["check-config", "--config", str(complete)]) == 0
    assert "NO AREA FOR SECRETS" in capsys.readouterr().out


def test_check_config_looks_at_the_files_for_metrics(complete: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = complete.read_text()
    complete.write_text(text + '[metrics]\nlisten = "127.0.0.1:9464"\n')
    assert cli.main(["check-config", "--config", str(complete)]) == 0
    complete.write_text(text + '[metrics]\nlisten = "[::]:9464"\ncert = "c"\nkey = "k"\nclient_ca = "ca"\n')
    assert cli.main(["check-config", "--config", str(complete)]) == 2
    assert capsys.readouterr().err == f"sev-host-agent: {complete.parent}/k: no such file or directory\n"


def test_a_bad_configuration_ends_with_2_and_a_sentence(complete: Path, capsys: pytest.CaptureFixture[str]) -> None:
    complete.write_text(complete.read_text() + "surprise = 1\n")
    for command in ("check-config", "serve", "health"):
        if command == "serve":
            continue  # hardens the process; the integration tests run it
        assert cli.main([command, "--config", str(complete)]) == 2
        assert "surprise" in capsys.readouterr().err
    assert cli.main(["check-config", "--config", str(complete.parent / "nope.toml")]) == 2


def test_health_of_an_agent_that_does_not_run_is_3(complete: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["health", "--config", str(complete)]) == 3
    assert capsys.readouterr().err.startswith("sev-host-agent: nobody answers on the health socket ")


def test_health_of_an_agent_that_runs_and_is_not_ready_is_3_too(
    complete: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def says(_path: Path, *, ready: bool) -> bool:
        return ready

    for ready, code, out, err in ((False, 3, "", "sev-host-agent: not ready\n"), (True, 0, "ready\n", "")):
        monkeypatch.setattr("common.rpc.health.probe", partial(says, ready=ready))
        assert cli.main(["health", "--config", str(complete)]) == code
        assert capsys.readouterr() == (out, err)


def test_usage_errors_end_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["fly"], ["serve"]):
        assert cli.main(words) == 2
    assert capsys.readouterr().err.startswith("sev-host-agent: ")


def test_help_imports_no_grpc() -> None:
    code = "import sys; from host_agent.cli import _parser; _parser([]); sys.exit('grpc' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


DEV_SEV = MINIMAL.replace('driver = "socket"\npath = "sev.sock"', 'driver = "dev_sev"')


def test_memory_is_counted_where_kvm_pins_it_and_nowhere_else(folder: Path) -> None:
    assert read(folder, DEV_SEV).lock_limit() is not None
    assert read(folder, DEV_SEV + "[qemu]\ncheck_memlock = false\n").lock_limit() is None
    assert read(folder, MINIMAL).lock_limit() is None


def test_a_machine_may_be_started_in_a_scope_and_not_in_a_service(folder: Path) -> None:
    runner = folder / "systemd-run"
    runner.write_text("#!/bin/sh\n")
    runner.chmod(0o755)

    def program(*words: str) -> str:
        return GUEST.replace('["/bin/true", "--own"]', str([str(runner), *words]))

    config = read(folder, MINIMAL + program("--scope", "--", "/bin/true"))
    assert config.started_programs() == {"web": [str(runner), "--scope", "--", "/bin/true"]}
    with pytest.raises(InvalidInput, match=r"guests\.web\.program: systemd-run without --scope"):
        read(folder, MINIMAL + program("--", "/bin/true", "--scope"))
