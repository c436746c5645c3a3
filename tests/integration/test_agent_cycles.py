"""Whole launches by the dozen on one agent, every other one hostile: nothing is left of them in the end.

The agent is a process of its own, so that what it holds is counted from outside. Its machines are the fake QEMU, its
platform is the emulator's, with faults. `make soak` makes it a thousand.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from common.errors import NotFound, SevattestError
from common.sev.abi import DeviceCommand, Status
from common.sev.certs.sev import SevCertificate
from common.sev.secret import SecretPacket
from emulator.faults import Fault, Faults
from host_agent.launches.state import FINAL
from sevattest.v1 import host_agent_service_pb2 as pb
from tests.support.agent import HEADER, PAYLOAD, Script, strays
from tests.support.agent_site import Caller, Owner, Site, agent_site
from tests.support.eventually import until
from tests.support.machine_kinds import fake
from tests.support.pki import Pki
from tests.support.platform import platform_in_thread

CYCLES = int(os.environ.get("SOAK_CYCLES", "48"))
# asyncio's pool of threads, which grows as it is needed (concurrent.futures.ThreadPoolExecutor).
POOL = min(32, (os.cpu_count() or 1) + 4)
FINAL_STATES = {pb.GuestLaunchState.Value(f"GUEST_LAUNCH_STATE_{state}") for state in FINAL}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(60 + CYCLES)]

INJECT, MEASURE = "sev-inject-launch-secret", "query-sev-launch-measure"
# What the fake QEMU does; each of them ends the launch with an error, before or at its last step.
MACHINES: dict[str, dict[str, Any]] = {
    "dies at once": {"die": {"stderr": "no such file"}},
    "tells what the firmware refused": {"die": {"stderr": "sev_launch_start: LAUNCH_START ret=1 fw_error=11"}},
    "runs at once": {"run": {"status": "running", "running": True}, "sev": {"state": "running"}},
    "has another policy": {"sev": {"policy": 1}},
    "measures too little": {"blob": "AAAA"},
    "dies while it measures": {"on": {MEASURE: [{"do": "die"}]}},
    "refuses the packet": {"on": {INJECT: [{"do": "error", "desc": "sev: LAUNCH_SECRET fw_error=11"}]}},
    "dies of the packet": {"on": {INJECT: [{"do": "die"}]}},
    "dies as it is resumed": {"on": {"cont": [{"do": "die"}]}},
}
# The agent asks these again for a second or two, so they come less often.
PATIENTLY: dict[str, dict[str, Any]] = {
    "hangs up on everybody": {"mute": "close"},
    "answers by halves": {"on": {MEASURE: [{"do": "cut"}] * 9}},
    "takes the packet and is silent": {"on": {INJECT: [{"do": "close", "effect": True}]}},
    "greets in another language": {"mute": "garbage"},
    "answers with a tower of brackets": {"on": {MEASURE: [{"do": "deep"}] * 9}},
    "answers without end": {"on": {MEASURE: [{"do": "long", "size": 20_000_000}] * 9}},
}
PDH = DeviceCommand.PDH_CERT_EXPORT
DEVICES = {
    "firmware fails": Fault(errno=errno.EIO, status=Status.HWSEV_PLATFORM),
    "PSP is dead": Fault(errno=errno.ETIMEDOUT),
}
# These are launched well, and are not easy to end.
STUBBORN = {"stubborn": True, "child": True, "noise": 200_000}


@dataclass(frozen=True, kw_only=True)
class Held:
    """What the agent holds.

    Attributes:
        descriptors: that are open.
        threads: of its process.
        processes: that are its children or were started for its launches.
    """

    descriptors: int
    threads: int
    processes: int


def held(pid: int, root: Path) -> Held:
    folder = Path(f"/proc/{pid}")
    children = {int(child) for task in folder.glob("task/*/children") for child in task.read_text().split()}
    return Held(
        descriptors=len(list((folder / "fd").iterdir())),
        threads=len(list((folder / "task").iterdir())),
        processes=len((children | set(strays(root))) - {pid}),
    )


@pytest.fixture
def faults() -> Faults:
    return Faults()


@pytest.fixture
def site(tmp_path: Path, faults: Faults) -> Iterator[Site]:
    (tmp_path / "pki").mkdir()
    pki = Pki(tmp_path / "pki")
    with platform_in_thread(tmp_path / "p", faults=faults) as platform, agent_site(platform, pki) as made:
        made.program = list(fake(made.root / "script.json").program)
        made.qemu |= {"start_timeout": 5, "stop_timeout": 1}
        yield made


def hostile() -> Iterator[str]:
    """Their names, over and over."""
    slowly = cycle(PATIENTLY)
    while True:
        yield from [*MACHINES, next(slowly), *DEVICES, next(slowly)]


async def launched(caller: Caller, owner: Owner) -> None:
    """The whole launch; the fake looks at no packet."""
    await caller.start(owner)
    await caller.measure(owner)
    await caller.inject(owner, SecretPacket(header=HEADER, payload=PAYLOAD))
    assert (await caller.resume(owner)).state == pb.GUEST_LAUNCH_STATE_RESUMED


async def ended(caller: Caller, owner: Owner) -> str:
    """Give the launch up; returns the state in which it has ended."""
    with suppress(SevattestError):  # it has ended already
        await caller.abort(owner)
    try:
        state = (await caller.get(owner)).state
    except NotFound:
        return "never began"
    assert state in FINAL_STATES
    return pb.GuestLaunchState.Name(state).removeprefix("GUEST_LAUNCH_STATE_").lower()


def settled(after: Held, before: Held) -> bool:
    """Whether no more is held than before; the pool's threads come as they are needed, and stay."""
    more = after.threads - before.threads
    return after.processes == 0 and after.descriptors <= before.descriptors and more < POOL


async def test_nothing_is_left_of_launches_however_they_end(site: Site, faults: Faults) -> None:
    script = Script(site.root / "script.json")
    names, told = hostile(), Counter[str]()

    async def one(number: int) -> None:
        name = next(names) if number % 2 else ""
        script.set(**((MACHINES | PATIENTLY).get(name) or (STUBBORN if number % 20 == 10 else {})))
        script.path.with_suffix(".journal").unlink(missing_ok=True)
        owner = Owner(pdh=pdh)
        if not name:
            await launched(caller, owner)
            state = await ended(caller, owner)
            assert state == "stopped"
        else:
            if name in DEVICES:
                faults.inject(PDH, DEVICES[name])
            with pytest.raises(SevattestError):
                await launched(caller, owner)
            assert faults.take(PDH) is None
            state = await ended(caller, owner)
            assert state in ({"never began"} if name in DEVICES else {"failed", "aborted"}), name
        told[f"{'hostile' if name else 'honest'}, {state}"] += 1

    agent = site.start()
    async with site.caller(agent) as caller:
        exported = await caller("ExportChain", pb.ExportChainRequest())
        pdh = SevCertificate.parse(exported.platform.chain[:2084])
        # What is made once, for the first launches, is no leak.
        for number in range(4):
            await one(number)
        await until(lambda: held(agent.pid, site.root).processes == 0)
        before = held(agent.pid, site.root)
        begun = time.monotonic()
        for number in range(4, 4 + CYCLES):
            await one(number)
        took = time.monotonic() - begun
        with suppress(TimeoutError):
            await until(lambda: settled(held(agent.pid, site.root), before))
        after = held(agent.pid, site.root)
    sys.stdout.write(f"\n{CYCLES} launches in {took:.0f} s: {dict(told)}\nbefore: {before}\nafter:  {after}\n")
    assert settled(after, before)
    assert not site.machines()


@pytest.mark.parametrize(
    ("more", "seen"),
    [
        ("", Held(descriptors=0, threads=0, processes=0)),
        ("kept = os.open('/dev/null', os.O_RDONLY)", Held(descriptors=1, threads=0, processes=0)),
        ("threading.Thread(target=signal.pause, daemon=True).start()", Held(descriptors=0, threads=1, processes=0)),
        # The child ends with its parent, which holds the other end of its pipe.
        (
            "end, keep = os.pipe()\nif not os.fork(): os.close(keep); os.read(end, 1); os._exit(0)\nos.close(end)",
            Held(descriptors=1, threads=0, processes=1),
        ),
    ],
    ids=["nothing", "a descriptor", "a thread", "a process"],
)
def test_what_a_process_holds_more_is_counted(tmp_path: Path, more: str, seen: Held) -> None:
    code = f"import os, signal, threading\nprint(flush=True)\ninput()\n{more}\nprint(flush=True)\nsignal.pause()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdin is not None
            process.stdout.readline()
            before = held(process.pid, tmp_path)
            process.stdin.write(b"\n")
            process.stdin.flush()
            process.stdout.readline()
            after = held(process.pid, tmp_path)
        finally:
            process.kill()
    grown = {key: value - asdict(before)[key] for key, value in asdict(after).items()}
    assert grown == asdict(seen)
