"""The agent as a process: the one place that picks implementations and puts them together.

Life: records read and machines found again (before anybody is served), listener up, one line on stdout, work until
SIGTERM or SIGINT, calls under way finished. Paused and running guests are left alone: the next start finds them. SIGHUP
reads the guests' definitions again; everything else in the configuration takes a restart.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common.clock import Clock, SystemClock
from common.errors import SevattestError
from common.rpc.server import Server
from common.telemetry.endpoint import Endpoint
from common.telemetry.log import Log
from common.telemetry.metrics import UNMEASURED, Meter, Reading
from host_agent import metrics
from host_agent.config import AgentConfig, DeviceTable
from host_agent.devices import Device, open_device
from host_agent.devices.counted import CountedDevice
from host_agent.devices.qmp import QmpDevice
from host_agent.hypervisors import unit
from host_agent.hypervisors.fleet import Fleet
from host_agent.hypervisors.qmp import monitor
from host_agent.launches.custody import Custody, Observer
from host_agent.launches.ledger import Ledger
from host_agent.launches.runner import Runner
from host_agent.launches.state import LaunchState
from host_agent.launches.supervisor import Supervisor
from host_agent.service import HostAgentService, add_HostAgentServiceServicer_to_server
from host_agent.store.folders import LaunchFolders

_CGROUP = Path("/proc/self/cgroup")
_PATIENCE = 5.0  # seconds for systemctl to answer
_TICK = 1.0  # seconds between two rounds of the supervisor
_DEVICE_PROBE = 15.0  # seconds between two looks whether the SEV device answers
_GRACE = 30.0  # seconds that calls under way have at the end


@dataclass(frozen=True, kw_only=True)
class Agent:
    """The parts that a process is made of."""

    folders: LaunchFolders
    device: Device
    hypervisor: Fleet
    custody: Custody
    runner: Runner
    supervisor: Supervisor
    server: Server
    metrics: Endpoint | None
    log: Log


def build(config: AgentConfig, *, log: Log, clock: Clock | None = None, observe: Observer | None = None) -> Agent:
    """Put an agent together; nothing is opened yet but the certificates.

    Args:
        config: checked.
        log: takes its events.
        clock: the machine's own when None.
        observe: told of each point that a step passes; the log when None.

    Raises:
        InvalidInput: `INVALID_CONFIGURATION`.
    """
    clock = clock or SystemClock()

    def note(point: str, launch_id: object, /) -> None:
        log.info("launch.step", step=point, launch_id=launch_id)

    endpoint = None if config.metrics is None else Endpoint(config.metrics, log)
    meter = UNMEASURED if endpoint is None else endpoint.meter
    folders = LaunchFolders(config.state_dir)
    ledger = Ledger(folders, meter)
    custody = Custody(ledger=ledger, clock=clock, log=log, observe=observe or note)
    hypervisor = Fleet(
        config.definitions(),
        config.qemu_settings(),
        proxmox=config.proxmox_settings(),
        libvirt=config.libvirt_settings(),
        lock_limit=config.lock_limit(),
    )
    device = CountedDevice(make_device(config.device), meter)
    runner = Runner(ledger=ledger, custody=custody, hypervisor=hypervisor, device=device, clock=clock)
    supervisor = Supervisor(
        ledger=ledger, custody=custody, hypervisor=hypervisor, clock=clock, log=log, limits=config.limits()
    )
    server = Server(
        listen=config.listen,
        tls=config.server_tls(),
        log=log,
        health_socket=config.health.socket,
        clock=clock,
        meter=meter,
    )
    server.add(add_HostAgentServiceServicer_to_server, HostAgentService(runner=runner, device=device))
    _watch_launches(meter, ledger, custody)
    return Agent(
        folders=folders,
        device=device,
        hypervisor=hypervisor,
        custody=custody,
        runner=runner,
        supervisor=supervisor,
        server=server,
        metrics=endpoint,
        log=log,
    )


def _watch_launches(meter: Meter, ledger: Ledger, custody: Custody) -> None:
    def launches() -> Reading:
        found = ledger.count()
        return {(state.value,): found[state] for state in LaunchState}

    meter.watch(metrics.LAUNCHES, launches)
    meter.watch(metrics.MACHINES, lambda: {(): custody.machines})


def warn_of_unit(config: AgentConfig, *, log: Log) -> None:
    """Say it in the log where this process is a service's whose end would take the machines along.

    Blocks while systemctl answers, for some seconds at the most.
    """
    guests = unit.at_risk(config.started_programs())
    try:
        service = unit.service_of(_CGROUP.read_text(encoding="utf-8"))
        if service is None or not guests or shutil.which(service.question[0]) is None:
            return
        asked = subprocess.run(  # noqa: S603 -- fixed words and a unit's name behind `--`
            service.question, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_PATIENCE, check=False
        )
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return
    mode = unit.kill_mode(asked.stdout)
    if mode is not None and unit.takes_along(mode):
        log.warning("agent.machines_end_with_unit", unit=service.name, kill_mode=mode, guests=guests, text=unit.ADVICE)


def make_device(table: DeviceTable) -> Device:
    """The platform's device; nothing is opened before the first command."""
    if table.driver != QmpDevice.name:
        return open_device(table.driver, table.path, timeout=table.timeout)

    async def ask(command: str) -> object:
        async with monitor(table.path.parent, table.path.name, limit=table.timeout) as session:
            return await session.execute(command)

    return QmpDevice(ask)


async def serve(agent: Agent, *, ready: Callable[[str], None], reload: Callable[[], AgentConfig]) -> None:
    """Serve until SIGTERM or SIGINT; on SIGHUP, take the guests of a changed configuration.

    Args:
        agent: built.
        ready: called once with the address, when calls are answered.
        reload: reads the configuration again.

    Raises:
        InvalidInput: `INVALID_CONFIGURATION`; state or address cannot be used.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, _reload, agent, reload)
    agent.folders.open()
    try:
        await agent.supervisor.recover()
        if agent.metrics is not None:
            await agent.metrics.start()
        address = await agent.server.start()
        background = [
            asyncio.create_task(agent.supervisor.run(_TICK)),
            asyncio.create_task(_probe_device(agent)),
        ]
        agent.log.info("agent.serving", address=address)
        ready(address)
        await stop.wait()
        agent.log.info("agent.stopping")
        agent.runner.end_watches()
        await agent.server.stop(_GRACE)
        for task in background:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
    finally:
        if agent.metrics is not None:
            await agent.metrics.stop()
        await agent.supervisor.close()
        agent.custody.close()
        agent.hypervisor.close()
        agent.folders.close()


def _reload(agent: Agent, reload: Callable[[], AgentConfig]) -> None:
    """Take the guests of the configuration as it is now; one that cannot be used changes nothing."""
    try:
        definitions = reload().definitions()
    except SevattestError as error:
        agent.log.warning("config.reload_failed", text=error.message)
        return
    agent.hypervisor.define(definitions)
    agent.log.info("config.reloaded", guests=sorted(definitions))


async def _probe_device(agent: Agent) -> None:
    """Not ready while the SEV device gives no answer: a hung PSP blocks every launch of the host."""
    while True:
        try:
            await agent.device.status()
        except SevattestError as error:
            agent.log.warning("device.silent", error=error)
            agent.server.health.set("device", ready=False)
        else:
            agent.server.health.set("device", ready=True)
        await asyncio.sleep(_DEVICE_PROBE)
