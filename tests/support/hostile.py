"""A host that lies on the way of an honest launch, over real services and two platforms that the owner finds genuine.

The flow is the orchestrator's own; `Lies` says what is said in place of the truth, and `check_refused` that both sides
said no for the same reason and that no guest is left that was given anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from common.errors import Reason
from emulator.device_client import Device
from host_agent.devices.socket import SocketDevice
from orchestrator.demo.site import GUEST, WORKLOAD, HostPlay, Site
from orchestrator.demo.stack import Stack
from orchestrator.drivers.base import Evidence, Measured, Packet, Session
from orchestrator.flow import Launch, Order, Outcome, Step
from tests.support.desk import refused
from tests.support.stack import PATIENCE, Sides, order
from verifier.store.sqlite import read_audit
from verifier.store.sqlite_file import FILE_NAME

PDH_GEN = 4  # linux/psp-sev.h: SEV_PDH_GEN
OTHER = "db"
NEWER = "on-newer-firmware"
GUESTS = {name: HostPlay() for name in (GUEST, OTHER)}
ROOTS = 'extra_roots = ["../platform/ask_ark.cert"'


def two_platforms(site: Site) -> None:
    """To the owner a second platform is as genuine as the host's; and one workload needs firmware that nobody has."""
    config = site.verifier_config.read_text()
    config = config.replace(ROOTS, f'{ROOTS}, "../impostor/ask_ark.cert"').replace('"../platform/kds"', '"kds"')
    site.verifier_config.write_text(config)
    for state in (site.platform, site.impostor):
        shutil.copytree(state / "kds", site.owner / "kds", dirs_exist_ok=True)
    model = (site.owner / "documents" / f"{WORKLOAD}-2.yaml").read_text()
    newer = model.replace(f"name: {WORKLOAD}", f"name: {NEWER}").replace(
        "  lifetime: 10m", '  floors: {emulated: "1.55.25"}\n  lifetime: 10m'
    )
    (site.owner / "documents" / f"{NEWER}.yaml").write_text(newer)


@contextlib.contextmanager
def hostile_stack() -> Iterator[Stack]:
    """All processes, ready; ended and cleared away afterwards."""
    # Not tmp_path: a unix socket's path has at most 107 bytes.
    root = Path(tempfile.mkdtemp(prefix="sevattest-test-"))
    try:
        with Stack(Site(root=root)) as running:
            running.prepare(impostor=True)
            running.site.write_host(GUESTS, running.site.platform)
            two_platforms(running.site)
            running.start_services(GUESTS)
            yield running
    finally:
        shutil.rmtree(root, ignore_errors=True)


_BUSY = 100  # tries


def honest(value: Any) -> Any:
    """The truth."""
    return value


@dataclass(kw_only=True)
class Lies:
    """What is said in place of what the other side said; the truth where nothing is given."""

    evidence: Callable[[Evidence], Evidence] = honest
    session: Callable[[Session], Session] = honest
    measured: Callable[[Measured], Measured] = honest
    packet: Callable[[Packet], Packet] = honest


class LyingHost:
    """Changes what the host is told, and what it says, on the way."""

    def __init__(self, both: Sides, lies: Lies) -> None:
        self._host, self._lies = both.host, lies

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host, name)

    async def export_chain(self, *, within: float) -> Evidence:
        return self._lies.evidence(await self._host.export_chain(within=within))

    async def start(self, session: Session, guest: str, *, request_id: UUID, within: float) -> None:
        await self._host.start(self._lies.session(session), guest, request_id=request_id, within=within)

    async def measure(self, launch_id: UUID, *, within: float) -> Measured:
        return self._lies.measured(await self._host.measure(launch_id, within=within))

    async def inject(self, launch_id: UUID, packet: Packet, *, request_id: UUID, within: float) -> None:
        await self._host.inject(launch_id, self._lies.packet(packet), request_id=request_id, within=within)


async def launched(both: Sides, asked: Order | None = None, **lies: Any) -> Outcome:
    """An honest launch but for these lies, to its end."""
    host: Any = LyingHost(both, Lies(**lies))
    for left in reversed(range(_BUSY)):
        outcome = await Launch(host=host, owner=both.owner, order=asked or order(GUEST), patience=PATIENCE).run()
        # The agent may not have noticed yet that the machine of the test before was ended.
        busy = outcome.error is not None and outcome.error.reason is Reason.GUEST_BUSY
        if not busy or asked is not None or not left:
            break
        await asyncio.sleep(0.1)
    return outcome


def owners_log(both: Sides, launch_id: UUID) -> list[tuple[str, str | None]]:
    """Events and reasons of a launch, as the owner's own log has them."""
    rows = read_audit(both.stack.site.owner / "state" / FILE_NAME, launch_id)
    return [(row.event, row.reason) for row in rows]


def check_refused(both: Sides, outcome: Outcome, step: Step, reason: Reason, *, by: str) -> None:
    """That this step ended with this reason, on both sides, and that no guest is left that was given anything."""
    assert outcome.error is not None
    assert (outcome.steps[-1].step, outcome.error.reason) == (step, reason)
    assert outcome.session is not None
    ends: dict[str, tuple[str, str | None]] = {
        "host": ("launch.abandoned", reason.value),
        "owner": ("launch.refused", reason.value),
    }
    released: list[tuple[str, str | None]] = [("launch.released", None)] if step in {Step.INJECT, Step.RESUME} else []
    # A packet that was handed out is spent; there is nothing to give up.
    last = released or [ends[by]]
    begun: list[tuple[str, str | None]] = [("launch.begun", None)]
    assert owners_log(both, outcome.session.launch_id) == begun + last
    assert not both.stack.machine_runs(GUEST)
    assert both.secrets_read(GUEST) == []


def rotate(both: Sides) -> None:
    """Have the host's platform make itself another PDH."""
    device = Device(both.stack.site.platform / "sev.sock")
    device.issue(PDH_GEN)
    device.close()


async def other_platform(both: Sides) -> Evidence:
    """What the second platform says of itself."""
    device = SocketDevice(both.stack.site.impostor / "sev.sock", timeout=20)
    return Evidence(chain=await device.export_chain(), chip_id=await device.chip_id() or b"")


async def begun(both: Sides, evidence: Evidence | None = None) -> Session:
    """Step 2, of the host's own platform or of another."""
    evidence = evidence or await both.host.export_chain(within=20)
    return await both.owner.begin(evidence, WORKLOAD, None, request_id=uuid4(), within=20)


async def start(both: Sides, session: Session, guest: str = GUEST) -> None:
    """Step 3."""
    await both.host.start(session, guest, request_id=uuid4(), within=30)


async def released(both: Sides, launch_id: UUID, measured: Measured, request_id: UUID | None = None) -> Packet:
    """Step 5."""
    return await both.owner.release(launch_id, measured, request_id=request_id or uuid4(), within=20)


async def reason_of(step: Awaitable[object]) -> Reason:
    """Why a step is refused."""
    return (await refused(step)).reason


def instead(given: Any) -> Callable[[Any], Any]:
    """The lie that is always the same."""
    return lambda _true: given


def flip(data: bytes, bit: int) -> bytes:
    """The bytes with one bit changed."""
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)
