"""What KVM would pin of a guest, against what may be locked: by the numbers, by this process, and at StartLaunch."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import InvalidInput, Reason
from host_agent.hypervisors import memlock
from host_agent.hypervisors.base import GuestDefinition
from host_agent.hypervisors.options import Options
from host_agent.hypervisors.qemu import QemuHypervisor
from host_agent.launches.state import LaunchState
from tests.support.agent import ALICE, QUICK, rig, strays

RAM, FLASH = 256 << 20, 4 << 20
NOTHING, IPC_LOCK, ALL_BUT_IPC_LOCK = "0000000000000000", "0000000000004000", "000001ffffffbfff"


def status(capabilities: str) -> str:
    return f"Name:\tx\nCapInh:\t{IPC_LOCK}\nCapPrm:\t{IPC_LOCK}\nCapEff:\t{capabilities}\nCapBnd:\t{IPC_LOCK}\n"


@pytest.mark.parametrize(
    ("soft", "text", "limit"),
    [
        (8 << 20, status(NOTHING), 8 << 20),
        (8 << 20, status(ALL_BUT_IPC_LOCK), 8 << 20),
        (8 << 20, "", 8 << 20),
        (0, status(NOTHING), 0),
        (8 << 20, status(IPC_LOCK), None),
        (-1, status(NOTHING), None),
    ],
)
def test_a_limit_holds_unless_it_is_infinite_or_the_process_may_lock_memory(
    soft: int, text: str, limit: int | None
) -> None:
    assert memlock.limit_of(soft, text) == limit


def test_ram_and_flash_are_pinned_and_a_size_that_is_not_understood_is_none() -> None:
    assert memlock.pinned(Options(["-m", "256M"]), FLASH) == RAM + FLASH
    assert memlock.pinned(Options([]), FLASH) == (128 << 20) + FLASH
    assert memlock.pinned(Options(["-m", "much"]), FLASH) is None


@pytest.fixture
def firmware(tmp_path: Path) -> Path:
    path = tmp_path / "OVMF.fd"
    path.write_bytes(bytes(FLASH))
    return path


def test_what_just_fits_is_started_and_one_byte_less_is_refused_with_what_to_do(firmware: Path) -> None:
    args = ["-m", "256M"]
    memlock.check("web", args, firmware, RAM + FLASH)
    memlock.check("web", args, firmware, None)
    memlock.check("web", ["-m", "much"], firmware, 0)
    with pytest.raises(
        InvalidInput, match=r"guests\.web: .*here 266240 KiB of RAM and flash, .* lock 266239 KiB"
    ) as error:
        memlock.check("web", args, firmware, RAM + FLASH - 1)
    assert error.value.reason is Reason.INVALID_CONFIGURATION
    assert "LimitMEMLOCK=infinity" in error.value.fields["hint"]


def test_this_process_says_what_the_kernel_holds_it_to() -> None:
    # In a child, which gives up the limit for good; the capability, where it has one, it keeps.
    code = (
        "import resource; from host_agent.hypervisors.memlock import own_limit;"
        "resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536)); print(own_limit())"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    capabilities = Path("/proc/self/status").read_text().partition("CapEff:")[2].split()[0]
    assert told == ("None" if int(capabilities, 16) & 1 << 14 else "65536")
    if resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] < 0:
        assert memlock.own_limit() is None


async def test_a_guest_that_cannot_be_pinned_is_refused_before_anything_is_started(tmp_path: Path) -> None:
    allowed = [RAM]  # without room for the flash
    async with rig(tmp_path) as agent:
        guests: dict[str, GuestDefinition] = {"web": agent.hypervisor.definition("web")}  # type: ignore[attr-defined]
    hypervisor = QemuHypervisor(guests, QUICK, lambda: allowed[0])
    async with rig(tmp_path, hypervisor=hypervisor) as agent:
        with pytest.raises(InvalidInput, match="RLIMIT_MEMLOCK"):
            await agent.runner.start(ALICE, agent.order())
        assert not agent.script.started
        assert not any(strays(tmp_path))
        # The limit is asked for anew: prlimit(1) may have raised it.
        allowed[0] = RAM + FLASH
        launch = await agent.runner.start(ALICE, agent.order())
        assert launch.state is LaunchState.PAUSED
