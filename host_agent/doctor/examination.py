"""All probes of a host, as a person would go: processor, kernel, firmware, the agent, QEMU, guests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from common import config as configuration
from common.amd.kds import KeyService
from common.errors import SevattestError
from common.sev.certs.roots import Root
from host_agent import config
from host_agent.app import make_device
from host_agent.config import AgentConfig, DeviceTable
from host_agent.devices import DEFAULT_PATH, DEV_SEV, Device
from host_agent.devices.qmp import QmpDevice
from host_agent.doctor import firmware, foreign, guests, kernel, processor, qemu, site
from host_agent.doctor.findings import Finding, failed, passed, skipped
from host_agent.doctor.machine import Machine, Unreadable
from host_agent.guest_tables import GuestTable
from host_agent.hypervisors.attach import AttachDefinition
from host_agent.hypervisors.base import GuestDefinition
from host_agent.hypervisors.options import Options

SOFTWARE_PLATFORM = "socket"  # the driver's name
# What to do about a platform that is not the kernel's and gives no answer.
_UNREACHED = {
    SOFTWARE_PLATFORM: "is it served (`sevattest platform serve`), by this user, and is device.path its socket?",
    QmpDevice.name: "does that QEMU run, as this user, and has its monitor no other client? docs/hypervisors.md has it",
}
# What a look at a host may raise beside what its probe expects: rights and files change while it goes on.
_TROUBLE = (OSError, Unreadable, SevattestError, ValueError)


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked of the doctor.

    Attributes:
        machine: the host.
        config_file: `agent.toml`; None to look at the host alone.
        environ: overrides it.
        captured: the host is one that was written down, so there is no firmware to ask.
        es: whether guests with SEV-ES are to be launched.
        key_service: where the signed CEK may be; nowhere when None.
        roots: who may have signed it.
    """

    machine: Machine
    config_file: Path | None
    environ: Mapping[str, str]
    captured: bool
    es: bool
    key_service: KeyService | None
    roots: tuple[Root, ...]


async def examine(question: Question) -> list[Finding]:
    """What all probes find; no probe raises, and none changes anything."""
    findings: list[Finding] = []
    agent = _read_config(question, findings)
    driver = DEV_SEV if agent is None else agent.device.driver
    cpu = processor.look(question.machine)
    if driver == SOFTWARE_PLATFORM:
        why = "the configured device is a software platform, for which this host needs no SEV of its own"
        findings += [skipped("cpu", why), skipped("kernel", why)]
    else:
        c_bit = None if agent is None else agent.qemu.cbitpos
        findings += _each("cpu", processor.probe(cpu, es=question.es, c_bit=c_bit))
        node = _device_node(agent)
        findings += _each("kernel", kernel.probe(question.machine, cpu, es=question.es, device=node))
    snp = driver != SOFTWARE_PLATFORM and kernel.snp_is_on(question.machine)
    if question.captured:
        findings.append(skipped("firmware.answers", "a machine that was written down has no firmware to ask"))
        findings.append(firmware.snp_mode(None, es=question.es, snp=snp))
    elif (device := _device(agent, findings)) is not None:
        answers = firmware.probe(
            device,
            generation="emulated" if driver == SOFTWARE_PLATFORM else cpu.generation,
            es=question.es,
            snp=snp,
            key_service=question.key_service,
            roots=question.roots,
            unreached=_UNREACHED.get(driver, firmware.UNREACHED),
        )
        findings += [finding async for finding in _each_answer("firmware", answers)]
    findings += _each("agent", _agent(question, agent))
    findings += _guests(question, agent)
    if agent is not None and not question.captured:
        findings += [finding async for finding in _each_answer("guest", foreign.probe(agent))]
    return findings


def _each(group: str, look: Iterator[Finding]) -> Iterator[Finding]:
    """What a group of probes finds; trouble that none of them expected is a finding too, and ends the group alone."""
    try:
        yield from look
    except _TROUBLE as error:
        yield _unseen(group, error)


async def _each_answer(group: str, look: AsyncIterator[Finding]) -> AsyncIterator[Finding]:
    """The same of probes that wait for an answer."""
    try:
        async for finding in look:
            yield finding
    except _TROUBLE as error:
        yield _unseen(group, error)


def _unseen(group: str, error: Exception) -> Finding:
    return skipped(group, f"the rest could not be looked at: {_sentence(error)}", "run this as the agent's user")


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)
    return str(getattr(error, "message", error))


def _read_config(question: Question, findings: list[Finding]) -> AgentConfig | None:
    """The configuration as far as it has a form: what the agent would refuse in it is a finding, and goes on."""
    if question.config_file is None:
        return None
    advice = "docs/host-agent.md has every key; `sev-host-agent check-config` checks it again"
    try:
        agent = configuration.load(question.config_file, AgentConfig, question.environ)
        config.load(question.config_file, question.environ)
    except _TROUBLE as error:
        findings.append(failed("agent.config", _sentence(error), advice))
        try:
            return configuration.load(question.config_file, AgentConfig, question.environ)
        except _TROUBLE:
            return None
    findings.append(passed("agent.config", f"{question.config_file} can be used"))
    return agent


def _device_node(agent: AgentConfig | None) -> str | None:
    """The kernel's device that this user must be able to open; None where only a QEMU of somebody else's does."""
    if agent is None:
        return DEFAULT_PATH
    if agent.device.driver != QmpDevice.name:
        return str(agent.device.path)
    own = {GuestDefinition.driver, AttachDefinition.driver}  # their machines run under the agent's user
    return DEFAULT_PATH if any(table.driver in own for table in agent.guests.values()) else None


def _device(agent: AgentConfig | None, findings: list[Finding]) -> Device | None:
    table = DeviceTable(driver=DEV_SEV) if agent is None else agent.device
    try:
        return make_device(table)
    except SevattestError as error:
        findings.append(failed("firmware.answers", error.message, "name a driver that this version has"))
        return None


def _agent(question: Question, agent: AgentConfig | None) -> Iterator[Finding]:
    now = datetime.now(UTC)
    written = None
    if agent is not None and question.config_file is not None:
        yield site.certificate(agent.server_tls(), now)
        yield from _each("state_dir", site.state_dir(question.machine, agent.state_dir))
        yield site.machines_outlive(question.machine, agent.started_programs())
        written = datetime.fromtimestamp(question.config_file.stat().st_mtime, UTC)
    yield site.clock(question.machine, now=now, written=written)


def _guests(question: Question, agent: AgentConfig | None) -> Iterator[Finding]:
    if agent is None:
        yield from _each("qemu", qemu.probe(question.machine, qemu.DEFAULT_PROGRAM, of=""))
        yield _lock_limit(question.machine)
        return
    if not agent.guests:
        yield skipped("guest", "the configuration has no guests", "add [guests.NAME] to agent.toml")
    asked: set[tuple[str, ...]] = set()
    for name, table in sorted(agent.guests.items()):
        program = tuple(table.program)
        if program and program not in asked:
            asked.add(program)
            yield from _each(f"qemu.{name}", qemu.probe(question.machine, program, of=name))
        if table.driver == GuestDefinition.driver:
            found = guests.probe(question.machine, name, table.firmware, table.args, es=question.es)
        else:
            monitor = _monitor(agent, table)
            found = guests.probe_foreign(question.machine, name, table.firmware, monitor, es=question.es)
        yield from _each(f"guest.{name}", found)


def _monitor(agent: AgentConfig, table: GuestTable) -> str | None:
    """Where the machine of a guest that somebody else starts has its monitor; None where the agent does not meet it."""
    if table.vmid is not None:
        return str(agent.proxmox.monitors / f"{table.vmid}.qmp")
    return None if table.monitor is None else str(table.monitor)


def _lock_limit(machine: Machine) -> Finding:
    """Without guests to compare with: the limit for QEMU's smallest, 128 MiB."""
    return guests.memory(machine, "memlock", Options([]), 0)
