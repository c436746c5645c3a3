"""The launch of a real machine's guest, with the real QEMU's word on what the machine is, and its answers afterwards.

The firmware is measured as the machine has it in its flash, whichever way it came there; save areas are made for the
processors that the machine has, and held against its reset state; hashes and secrets go into its own RAM.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from emulator import vmsa
from emulator.capabilities import read_capabilities
from emulator.errors import CommandError, MachineDied
from emulator.footer import Footer
from emulator.front.boot_files import BootFiles
from emulator.front.command_line import Plan
from emulator.front.real_qemu import Control
from emulator.front.registers import ap_differences, differences, reset_state
from emulator.front.relay import Message
from emulator.guest_memory import GuestMemory
from emulator.sev_launch import SEV_TYPE_SINCE, Processor, SevLaunch, SevState, query_sev

_FOUR_GIB = 1 << 32
_PROBE_AT, _PROBE_SIZE = 0x10000, 32  # RAM that nobody has written to before the machine runs
_FLASH = ("pflash0", "/machine/system.flash0")  # `device` of -drive if=pflash, `qdev` of -machine pflash0=
# What a QEMU without SEV answers where one with SEV would do as it was told.
_NO_SEV = frozenset(
    {
        "KVM not enabled",
        "SEV is not enabled",
        "SEV is not enabled in KVM",
        "SEV launch measurement is not available",
        "SEV not enabled for guest",
    }
)


class GuestLaunch:
    """See the module; `SevSide` of the relays.

    Attributes:
        death: why the machine cannot go on, if it cannot.
        on_death: told of it.

    Args:
        plan: what the command line asked for.
        platform: the device socket.
        processor: what CPUID says.
        flavour: of save areas; None: as the sev-guest object says.
        memory: the machine's RAM.
        boot: what it boots directly, if anything.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        platform: Path,
        processor: Processor,
        flavour: str | None,
        memory: GuestMemory,
        boot: BootFiles | None,
    ) -> None:
        self.death: MachineDied | None = None
        self.on_death: Callable[[MachineDied], None] = lambda _death: None
        self._plan = plan
        self._platform = platform
        self._processor = processor
        self._flavour = flavour or ("init2" if plan.sev.legacy_vm_type == "off" else "legacy")
        self._memory = memory
        self._boot = boot
        self._sev: SevLaunch | None = None
        self._control: Control | None = None
        self._save_areas = 0
        self._finishing: set[asyncio.Task[bool]] = set()

    @property
    def runs(self) -> bool:
        """Whether the launch is finished."""
        return self._sev is not None and self._sev.state is SevState.RUNNING

    async def run(self, control: Control, scratch: int) -> None:
        """Everything before the machine's monitors open.

        Args:
            control: our monitor on the machine, which stands still.
            scratch: descriptor of an empty file that the machine may write to.

        Raises:
            MachineDied: as QEMU would, or because a save area and the machine's reset state differ.
        """
        try:
            await self._launch(control, scratch)
        except CommandError as error:
            raise MachineDied(str(error)) from error

    async def _launch(self, control: Control, scratch: int) -> None:
        guest = self._plan.sev
        if guest.legacy_vm_type is not None and control.version < SEV_TYPE_SINCE:
            raise MachineDied("-object sev-guest: Invalid parameter 'legacy-vm-type'")
        if (await control.execute("query-kvm"))["enabled"]:
            raise MachineDied("the machine runs under KVM, and the front is for TCG alone")
        await self._check_ram(control, scratch)
        self._control = control
        self._sev = sev = SevLaunch(
            guest, platform=self._platform, cbitpos=self._processor.cbitpos, version=control.version
        )
        sev.start()
        control.on_event = self._on_event
        footer = Footer.read(b"")
        if image := await _flash_image(control, scratch):
            footer = sev.add_firmware(image)
        if self._boot is not None:
            sev.add_kernel(self._boot.measured, self._memory, shown=self._boot.shown)
        pages = await self._make_save_areas(control, footer) if sev.is_es else []
        self._save_areas = len(pages)
        sev.measure(pages)

    async def finish(self) -> bool:
        """LAUNCH_FINISH, if it was not yet; false: the machine cannot go on, and `on_death` was told."""
        sev, control = self._sev, self._control
        if sev is None or control is None or self.runs:
            return self.death is None
        there = len(await control.execute("query-cpus-fast")) if sev.is_es else self._save_areas
        if there != self._save_areas:
            self._die(MachineDied(f"the machine has {there} vCPUs, of which {self._save_areas} were measured"))
            return False
        try:
            sev.finish()
        except MachineDied as death:
            self._die(death)
        return self.death is None

    def _die(self, death: MachineDied) -> None:
        self.death = self.death or death
        self.on_death(death)

    async def answer(self, command: str, arguments: dict[str, Any], reply: Message) -> Message:
        """Our reply in the place of the real QEMU's; its own where it complains of the arguments."""
        sev, control = self._sev, self._control
        if sev is None or control is None or ("error" in reply and reply["error"]["desc"] not in _NO_SEV):
            return reply
        try:
            match command:
                case "query-sev":
                    # The members and their order are those of the QEMU that answered.
                    answer: object = {**reply["return"], **query_sev(sev, control.version)}
                case "query-sev-capabilities":
                    answer = read_capabilities(self._platform, cbitpos=self._processor.cbitpos)
                case "query-sev-launch-measure" if sev.measurement is None:
                    return reply
                case "query-sev-launch-measure":
                    answer = {"data": sev.measurement}
                case "query-sev-attestation-report":
                    answer = {"data": sev.report(arguments["mnonce"])}
                case _:
                    await self._inject(control, sev, arguments)
                    answer = {}
        except CommandError as error:
            return {"error": {"class": "GenericError", "desc": str(error)}}
        return {"return": answer}

    def close(self) -> None:
        """The machine ended."""
        if self._sev is not None:
            self._sev.close()

    async def _inject(self, control: Control, sev: SevLaunch, arguments: dict[str, Any]) -> None:
        # Another monitor, or a person at the human one, may have let the machine run, or become another.
        status, migration = await control.execute("query-status"), await control.execute("query-migrate")
        if status["status"] != "prelaunch" or migration.get("status", "none") != "none":
            await self.finish()
        address = arguments.get("gpa")
        sev.inject(
            self._memory,
            header=arguments["packet-header"],
            secret=arguments["secret"],
            address=None if address is None else address & 0xFFFFFFFFFFFFFFFF,  # a negative number wraps, as in QEMU
        )

    def _on_event(self, name: str) -> None:
        if name == "RESUME":
            task = asyncio.ensure_future(self.finish())
            self._finishing.add(task)
            task.add_done_callback(self._finishing.discard)
        elif name == "RESET" and self._plan.sev.is_es:
            self._die(MachineDied("cpus are not resettable, terminating"))

    async def _check_ram(self, control: Control, scratch: int) -> None:
        """See that what is written here is what the machine has, or a secret would go nowhere."""
        probe = os.urandom(_PROBE_SIZE)
        self._memory.write(_PROBE_AT, probe)
        found = await _saved(control, scratch, _PROBE_AT, _PROBE_SIZE)
        self._memory.write(_PROBE_AT, bytes(_PROBE_SIZE))
        if found != probe:
            raise MachineDied("the front cannot reach the machine's RAM, which is given in a way that it does not know")

    async def _make_save_areas(self, control: Control, footer: Footer) -> list[bytes]:
        reset_address = footer.reset_address or 0
        processors = await control.execute("query-cpus-fast")
        # As it was made: what a model is called, or what the line says beside it, need not be all of it.
        boot = processors[0]["qom-path"]
        family, model, stepping = [
            await control.execute("qom-get", path=boot, property=name) for name in ("family", "model", "stepping")
        ]
        pages = list(
            vmsa.save_areas(
                vcpus=len(processors),
                cpu_signature=vmsa.signature(family, model, stepping),
                reset_address=reset_address,
                flavour=self._flavour,
            )
        )
        told = await control.execute("human-monitor-command", **{"command-line": "info registers"})
        found = list(differences(pages[0], reset_state(told)))
        found += [difference for page in pages[1:2] for difference in ap_differences(page, reset_address)]
        if found:
            raise MachineDied(*(f"SEV-ES save area: {difference}" for difference in found))
        return pages


async def _flash_image(control: Control, scratch: int) -> bytes:
    """What the machine has in its first flash drive; nothing where it has none."""
    size = 0
    for drive in await control.execute("query-block"):
        if drive.get("device") == _FLASH[0] or drive.get("qdev") == _FLASH[1]:
            size = drive["inserted"]["image"]["virtual-size"]
    if not size:
        return b""
    return await _saved(control, scratch, _FOUR_GIB - size, size)


async def _saved(control: Control, scratch: int, address: int, size: int) -> bytes:
    """What the machine has in its memory there."""
    await control.execute("pmemsave", val=address, size=size, filename=f"/proc/self/fd/{scratch}")
    with os.fdopen(os.dup(scratch), "rb") as file:
        file.seek(0)
        return file.read()
