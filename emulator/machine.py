"""The stand-in machine: QEMU's launch of a SEV guest without QEMU, on the software PSP.

What QEMU does beside `sev_launch`: firmware and kernel are loaded (hw/i386/x86.c, hw/i386/pc_sysfw.c), the machine runs
and stops. Guest memory lives in this process; what boots in it is `guest`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path

from emulator import guest, vmsa
from emulator.cpu_models import CpuModel, find_model
from emulator.errors import CommandError, MachineDied
from emulator.footer import Footer
from emulator.guest_memory import GuestMemory
from emulator.kernel_hashes import BootHashes
from emulator.qemu_options import MachineOptions
from emulator.sev_launch import Processor, SevLaunch

_FLASH_SECTOR = 4096
_FLASH_MAX = 8 << 20  # hw/i386/pc_sysfw.c, FLASH_SIZE_LIMIT


class RunState(StrEnum):
    """`query-status`."""

    PRELAUNCH = "prelaunch"
    RUNNING = "running"
    PAUSED = "paused"


class Machine:
    """One machine, from its command line to its end.

    Attributes:
        options: what the command line asked for.
        processor: what CPUID says.
        platform: the device socket.
        sev: the launch, where the machine uses SEV.
        run_state: whether it runs.
        emit: told of events; the monitor sets it.
        schedule: runs something later; the event loop's owner sets it.
    """

    def __init__(
        self,
        options: MachineOptions,
        *,
        platform: Path,
        processor: Processor,
        flavour: str,
        version: tuple[int, int] = (7, 2),
    ) -> None:
        self.options = options
        self.processor = processor
        self.platform = platform
        self.run_state = RunState.PRELAUNCH
        self.emit: Callable[[str, dict[str, object] | None], None] = lambda name, data: None  # noqa: ARG005 -- until QMP
        self.schedule: Callable[[Callable[[], None]], object] = lambda action: action()
        self.sev = (
            None
            if options.sev is None
            else SevLaunch(options.sev, platform=platform, cbitpos=processor.cbitpos, version=version)
        )
        self._flavour = flavour
        self._footer = Footer.read(b"")
        self._memory = GuestMemory(options.memory)
        self._hashes: BootHashes | None = None
        self._serial = _open_serial(options.serial)
        self._cpu = self._find_cpu()

    @property
    def is_es(self) -> bool:
        """Whether the guest's registers are protected too."""
        return self.sev is not None and self.sev.is_es

    def launch(self) -> None:
        """Everything before the QMP socket opens.

        Raises:
            MachineDied: as QEMU would.
        """
        if self.sev is not None:
            self.sev.start()
        self._load_firmware()
        self._load_kernel()
        if self.sev is not None:
            self.sev.measure(self._save_areas() if self.sev.is_es else ())
        if not self.options.paused:
            self.cont()

    def cont(self) -> None:
        """Run. The first time, the launch is finished and the guest boots.

        Raises:
            MachineDied: LAUNCH_FINISH failed.
        """
        if self.run_state is RunState.RUNNING:
            return
        first = self.run_state is RunState.PRELAUNCH
        if self.sev is not None:
            self.sev.finish()
        self.run_state = RunState.RUNNING
        self.emit("RESUME", None)
        if first:
            self.schedule(self._boot)

    def stop(self) -> None:
        """Pause a running machine."""
        if self.run_state is RunState.RUNNING:
            self.run_state = RunState.PAUSED
            self.emit("STOP", None)

    def inject(self, *, header: str, secret: str, address: int | None) -> None:
        """Open a secret packet into guest memory.

        Raises:
            CommandError: with QEMU's words.
        """
        if self.sev is None:
            raise CommandError("SEV not enabled for guest")
        self.sev.inject(self._memory, header=header, secret=secret, address=address)

    def report(self, nonce: str) -> str:
        """An attestation report as base64.

        Raises:
            CommandError: with QEMU's words.
        """
        if self.sev is None:
            raise CommandError("SEV is not enabled")
        return self.sev.report(nonce)

    def close(self) -> None:
        """End: the PSP forgets the guest, memory and serial line are given back."""
        if self.sev is not None:
            self.sev.close()
        self._memory.close()
        if self._serial not in {None, 1}:
            os.close(self._serial)
        self._serial = None

    # The steps of a launch.

    def _find_cpu(self) -> CpuModel:
        model = find_model(self.options.cpu, generation=self.processor.generation)
        if model is None:
            raise MachineDied(f"unable to find CPU model '{self.options.cpu}'")
        return model

    def _load_firmware(self) -> None:
        if self.options.firmware is None:
            return
        image = _flash_image(self.options.firmware)
        self._footer = Footer.read(image)
        self._memory.close()
        self._memory = GuestMemory(self.options.memory, image)
        if self.sev is not None:
            self.sev.add_firmware(image)

    def _load_kernel(self) -> None:
        options = self.options
        if options.kernel is None:
            return
        append = None if options.append is None else os.fsencode(options.append)
        self._hashes = read_boot_files(options.kernel, options.initrd, append)
        if self.sev is not None:
            self.sev.add_kernel(self._hashes, self._memory)

    def _save_areas(self) -> list[bytes]:
        given = self.options.cpu_flags
        return list(
            vmsa.save_areas(
                vcpus=self.options.vcpus,
                cpu_signature=vmsa.signature(
                    _number(given.get("family"), self._cpu.family),
                    _number(given.get("model"), self._cpu.model),
                    _number(given.get("stepping"), self._cpu.stepping),
                ),
                reset_address=self._footer.reset_address or 0,
                flavour=self._flavour,
            )
        )

    def _boot(self) -> None:
        lines = guest.boot(self._memory, self._footer, self._hashes)
        if self._serial is not None:
            os.write(self._serial, "".join(f"{line}\r\n" for line in lines).encode("ascii"))


def read_boot_files(kernel: Path, initrd: Path | None, append: bytes | None) -> BootHashes:
    """Hashes of what is handed over for a direct boot.

    Raises:
        MachineDied: a file cannot be read.
    """
    try:
        return BootHashes.of(kernel, initrd, append)
    except OSError as error:
        what = "initrd" if error.filename == str(initrd) else "kernel"
        raise MachineDied(f"could not open {what} file '{error.filename}': {error.strerror}") from error


def _flash_image(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if not size or size % _FLASH_SECTOR:
            raise MachineDied(
                f"system firmware block device pflash0 has invalid size {size}",
                f"its size must be a non-zero multiple of 0x{_FLASH_SECTOR:x}",
            )
        if size > _FLASH_MAX:
            raise MachineDied(f"combined size of system firmware exceeds {_FLASH_MAX} bytes")
        return path.read_bytes()
    except OSError as error:
        raise MachineDied(f"-drive if=pflash,file={path}: Could not open '{path}': {error.strerror}") from error


def _open_serial(wanted: str | None) -> int | None:
    if wanted in {None, "none", "null"}:
        return None
    if wanted.endswith("stdio"):
        return 1
    path = wanted.removeprefix("file:")
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise MachineDied(f"-serial {wanted}: Could not open '{path}': {error.strerror}") from error


def _number(text: str | None, default: int) -> int:
    try:
        return default if text is None else int(text, 0)
    except ValueError:
        return default
