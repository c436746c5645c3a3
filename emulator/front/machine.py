"""Composition root of the front: a real QEMU is started, launched as SEV would have it, and served until it ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from emulator.cpu_models import host_model
from emulator.device_client import CommandFailed
from emulator.errors import MachineDied
from emulator.front.boot_files import BootFiles
from emulator.front.channel_spec import ChannelSpec, Kind
from emulator.front.command_line import RAM_FD, LeftToQemu, Plan, ram_object, read
from emulator.front.launch import GuestLaunch
from emulator.front.layout import low_ram
from emulator.front.monitors import Monitors
from emulator.front.real_qemu import Control, Door, RealQemu, become
from emulator.guest_memory import GuestMemory
from emulator.qemu_words import complain, reason
from emulator.sev_launch import Processor

_RAM_ID = "sevattest-ram"
_RAM_ALIGN = 8192  # QEMU, softmmu/vl.c: RAM is a multiple of it


def run_front(words: Sequence[str], *, state: Path, program: str, flavour: str | None) -> int:
    """Run a machine with QEMU's words until it ends; returns its exit code.

    Args:
        words: QEMU's own arguments.
        state: the platform's folder.
        program: the real QEMU.
        flavour: which save areas SEV-ES guests start with (see `vmsa`); None: as the sev-guest object says.
    """
    try:
        plan = read(words)
        # Absolute: a daemon leaves the folder that it was started in.
        front = _Front(plan, platform=state.absolute() / "sev.sock", program=program, flavour=flavour)
        code = _in_background(front) if plan.daemonize else front.run(lambda: None)
    except LeftToQemu as left:
        become(program, left.words)
    except MachineDied as death:
        for line in death.lines:
            complain(line)
        return 1
    if code < 0:
        # End as the machine ended, so that whoever started us sees it.
        with contextlib.suppress(OSError, ValueError):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


@dataclass
class _Front:
    """One machine, from its command line to its end."""

    plan: Plan
    platform: Path
    program: str
    flavour: str | None

    def run(self, ready: Callable[[], None]) -> int:
        """Run the machine; `ready` is called when its monitors are open. Returns QEMU's exit code.

        Raises:
            MachineDied: it ended otherwise than by QEMU's end.
        """
        with contextlib.ExitStack() as resources:
            if self.plan.pid_file is not None:
                _write_pid(self.plan.pid_file, resources)
            return asyncio.run(self._run(ready, resources))

    async def _run(self, ready: Callable[[], None], resources: contextlib.ExitStack) -> int:
        plan = self.plan
        processor = _processor(self.platform)
        size, total = (-(-ram // _RAM_ALIGN) * _RAM_ALIGN for ram in (plan.ram, plan.total_ram))
        low = low_ram(total, plan.machine, plan.low_ram_limit)
        boot = BootFiles.read(plan.kernel, plan.initrd, plan.append, low_ram=low) if plan.kernel else None
        ram, scratch = _memfd("ram", resources), _memfd("scratch", resources)
        os.ftruncate(ram, size)
        memory = GuestMemory(size, shared=ram, low=low)
        resources.callback(memory.close)
        launch = GuestLaunch(
            plan, platform=self.platform, processor=processor, flavour=self.flavour, memory=memory, boot=boot
        )
        resources.callback(launch.close)
        doors = [Door(resources) for _ in (*plan.monitors, "our own")]
        words = [*_own_words(plan, processor, ram, size), *_monitor_words(plan.monitors, doors)]
        inherits = [ram, scratch, *(door.listener.fileno() for door in doors)]
        if boot is not None:
            inherits.append(kernel := _memfd("kernel", resources, boot.kernel))
            words += ["-kernel", f"/proc/self/fd/{kernel}"]
        # Ours stand first: the last word of the line may be an option that lacks its value.
        words += (word.replace(RAM_FD, str(ram)) for word in plan.words)
        with_stdin = not plan.daemonize and all(monitor.kind is not Kind.STDIO for monitor in plan.monitors)
        qemu = await RealQemu.start(
            self.program, words, inherits=inherits, with_stdin=with_stdin, through_us=plan.daemonize
        )
        launch.on_death = lambda _death: qemu.send(signal.SIGKILL)
        try:
            return await self._serve(qemu, launch, doors, scratch, ready)
        finally:
            qemu.send(signal.SIGKILL)
            await qemu.ended()

    async def _serve(
        self, qemu: RealQemu, launch: GuestLaunch, doors: Sequence[Door], scratch: int, ready: Callable[[], None]
    ) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, qemu.send, number)
        for door in doors:
            door.hand_over()
        with contextlib.suppress(ConnectionError):  # QEMU has ended, or is about to, and has said why
            control = await Control.open(doors[-1])
            await launch.run(control, scratch)
            async with Monitors(self.plan.monitors, doors[:-1], launch) as monitors:
                ready()
                if not self.plan.paused:
                    await monitors.wait_for_clients()
                    if await launch.finish():
                        await control.execute("cont")
                await qemu.ended()
        code = await qemu.ended()
        if launch.death is not None:
            raise launch.death
        return code


def _processor(platform: Path) -> Processor:
    """What CPUID says on this platform; on a host without one, that there is no encryption bit."""
    try:
        return Processor.of(platform)
    except (CommandFailed, OSError) as error:
        complain(f"sevattest: no platform is served on {platform}: {reason(error)}")
        return Processor(generation="milan", cbitpos=0)


def _own_words(plan: Plan, processor: Processor, ram: int, size: int) -> list[str]:
    """The real QEMU's arguments that are ours, but for monitors and kernel."""
    words: list[str] = []
    if not plan.ram_named:
        words += [
            "-object",
            ram_object(_RAM_ID, size).replace(RAM_FD, str(ram)),
            "-machine",
            f"memory-backend={_RAM_ID}",
        ]
    words += ["-accel", "tcg", "-S"]
    if plan.cpu:
        name, *flags = plan.cpu
        words += ["-cpu", ",".join([host_model(processor.generation) if name == "host" else name, *flags])]
    if plan.sev.is_es:
        # Registers of an SEV-ES guest cannot be reset from outside, so QEMU ends instead.
        words.append("-no-reboot")
    return words


def _monitor_words(monitors: Sequence[ChannelSpec], doors: Sequence[Door]) -> list[str]:
    words = []
    pretty = [*(monitor.pretty for monitor in monitors), False]
    for number, (door, spread) in enumerate(zip(doors, pretty, strict=True)):
        name = f"sevattest-qmp{number}"
        words += ["-chardev", f"socket,id={name},fd={door.listener.fileno()},server=on,wait=off"]
        words += ["-mon", f"chardev={name},mode=control,pretty={'on' if spread else 'off'}"]
    return words


def _memfd(name: str, resources: contextlib.ExitStack, data: bytes = b"") -> int:
    """A file in memory, which is gone with the last process that has it open."""
    descriptor = os.memfd_create(f"sevattest-{name}")
    resources.callback(os.close, descriptor)
    while data:
        data = data[os.write(descriptor, data) :]
    return descriptor


def _write_pid(path: Path, resources: contextlib.ExitStack) -> None:
    """-pidfile: ours, since whoever ends us ends the machine."""
    path = path.absolute()
    try:
        path.write_text(f"{os.getpid()}\n")
    except OSError as error:
        raise MachineDied(f"cannot create PID file: Could not create '{path}': {error.strerror}") from error
    resources.callback(path.unlink, missing_ok=True)


def _in_background(front: _Front) -> int:
    """-daemonize: return when the machine's monitors are open, and leave it to a process of its own."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child:
        os.close(theirs)
        with os.fdopen(ours, "rb") as said:
            return 0 if said.read(1) else 1
    os.close(ours)
    os.setsid()

    def ready() -> None:
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        os.close(null)
        os.write(theirs, b"0")
        os.close(theirs)
        os.chdir("/")

    return front.run(ready)
