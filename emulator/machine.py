"""The stand-in machine: QEMU's launch of a SEV guest without QEMU, on the software PSP.

The order of a launch and every sentence on stderr are QEMU's (target/i386/sev.c, hw/i386/x86.c, hw/i386/pc_sysfw.c):
check of the processor, LAUNCH_START, firmware image, kernel hashes table, save areas, LAUNCH_MEASURE; only then does
the QMP socket open. LAUNCH_FINISH comes when the machine is told to run.

Guest memory lives in this process and is not encrypted; the PSP returns a secret's plaintext and it is written there.
Imports no cryptography: a machine starts in a fraction of a second.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path

from common.sev.abi import (
    PLATFORM_ES,
    REPORT_SIZE,
    DeviceCommand,
    PolicyBit,
)
from emulator import guest, vmsa
from emulator.cpu_models import CpuModel, find_model
from emulator.device_client import CommandFailed, Device
from emulator.errors import CommandError, MachineDied
from emulator.footer import Footer
from emulator.guest_memory import GuestMemory, NotMapped
from emulator.kernel_hashes import TABLE_SIZE, BootHashes
from emulator.qemu_options import MachineOptions, SevGuest
from emulator.qemu_words import complain, decode_base64, firmware_status, ioctl_outcome, kvm_outcome, reason

_FLASH_SECTOR = 4096
_FLASH_MAX = 8 << 20  # hw/i386/pc_sysfw.c, FLASH_SIZE_LIMIT
_FOUR_GIB = 1 << 32
_NONCE_SIZE = 16


class SevState(StrEnum):
    """What QEMU believes of its guest, in the order of QAPI's enumeration."""

    UNINIT = "uninit"
    LAUNCH_UPDATE = "launch-update"
    LAUNCH_SECRET = "launch-secret"  # noqa: S105 -- a state's name
    RUNNING = "running"


class RunState(StrEnum):
    """`query-status`."""

    PRELAUNCH = "prelaunch"
    RUNNING = "running"
    PAUSED = "paused"


class Machine:
    """One machine, from its command line to its end."""

    def __init__(self, options: MachineOptions, *, platform: Path, generation: str, cbitpos: int, flavour: str) -> None:
        self.options = options
        self.generation = generation
        self.run_state = RunState.PRELAUNCH
        self.sev_state = SevState.UNINIT
        self.handle = 0
        self.api = (0, 0)
        self.build = 0
        self.cbitpos = cbitpos
        self.emit: Callable[[str, dict[str, object] | None], None] = lambda name, data: None  # noqa: ARG005 -- until QMP
        self.schedule: Callable[[Callable[[], None]], object] = lambda action: action()
        self.platform = platform
        self._flavour = flavour
        self._device: Device | None = None
        self._measurement: bytes | None = None
        self._footer = Footer.read(b"")
        self._memory = GuestMemory(options.memory)
        self._hashes: BootHashes | None = None
        self._serial = _open_serial(options.serial)
        self.cpu = self._find_cpu()

    @property
    def sev(self) -> SevGuest | None:
        """The SEV object, if the machine uses one."""
        return self.options.sev

    @property
    def is_es(self) -> bool:
        """Whether the guest's registers are protected too."""
        return self.sev is not None and bool(self.sev.policy & PolicyBit.ES)

    def launch(self) -> None:
        """Everything before the QMP socket opens.

        Raises:
            MachineDied: as QEMU would.
        """
        if self.sev is not None:
            self._start(self.sev)
        self._load_firmware()
        self._load_kernel()
        if self.sev is not None:
            self._measure()
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
        if self._device is not None and self.sev_state is not SevState.RUNNING:
            try:
                self._device.launch_finish()
            except (CommandFailed, OSError) as error:
                raise MachineDied(f"sev_launch_finish: LAUNCH_FINISH {kvm_outcome(error)}") from error
            self.sev_state = SevState.RUNNING
        self.run_state = RunState.RUNNING
        self.emit("RESUME", None)
        if first:
            self.schedule(self._boot)

    def stop(self) -> None:
        """Pause a running machine."""
        if self.run_state is RunState.RUNNING:
            self.run_state = RunState.PAUSED
            self.emit("STOP", None)

    def measurement(self) -> str | None:
        """The measurement blob as base64, from when it was made."""
        return None if self._measurement is None else base64.b64encode(self._measurement).decode("ascii")

    def inject(self, *, header: str, secret: str, address: int | None) -> None:
        """Let the PSP open a secret packet into guest memory. Nobody checks the secret's size, as in QEMU.

        Raises:
            CommandError: with QEMU's words.
        """
        if self._device is None:
            raise CommandError("SEV not enabled for guest")
        if address is None:
            if self._footer.secret is None:
                raise CommandError("SEV: no secret area found in OVMF, gpa must be specified.")
            address = self._footer.secret.base
        if self.sev_state is not SevState.LAUNCH_SECRET:
            number = list(SevState).index(self.sev_state)
            raise CommandError(f"SEV: Not in correct state. (LSECRET) {number:x}")
        packet_header, packet = decode_base64(header), decode_base64(secret)
        if not packet_header:
            raise CommandError("SEV: Failed to decode sequence header")
        if not packet:
            raise CommandError("SEV: Failed to decode data")
        try:
            self._memory.check(address, len(packet))
        except NotMapped as error:
            raise CommandError(f"SEV: Failed to calculate guest address: {error}") from error
        try:
            self._memory.write(address, self._device.launch_secret(address, packet_header, packet))
        except (CommandFailed, OSError) as error:
            raise CommandError(f"SEV: failed to inject secret {kvm_outcome(error)}") from error

    def report(self, nonce: str) -> str:
        """`query-sev-attestation-report`: the report as base64.

        Raises:
            CommandError: with QEMU's words.
        """
        if self._device is None:
            raise CommandError("SEV is not enabled")
        raw = decode_base64(nonce)
        if len(raw) != _NONCE_SIZE:
            raise CommandError(f"SEV: mnonce must be {_NONCE_SIZE} bytes (got {len(raw)})")
        try:
            report = self._device.attestation(raw, REPORT_SIZE)
        except (CommandFailed, OSError) as error:
            text = ioctl_outcome(error)
            raise CommandError(f"SEV: Failed to get attestation report {text}: {reason(error)}") from error
        return base64.b64encode(report).decode("ascii")

    def close(self) -> None:
        """End: the PSP forgets the guest, memory and serial line are given back."""
        if self._device is not None:
            self._device.close()
        self._memory.close()
        if self._serial not in {None, 1}:
            os.close(self._serial)
        self._serial = None

    # The steps of a launch.

    def _find_cpu(self) -> CpuModel:
        model = find_model(self.options.cpu, generation=self.generation)
        if model is None:
            raise MachineDied(f"unable to find CPU model '{self.options.cpu}'")
        return model

    def _start(self, sev: SevGuest) -> None:
        if sev.cbitpos != self.cbitpos:
            raise _kvm_died(
                f"sev_kvm_init: cbitpos check failed, host '{self.cbitpos}' requested '{sev.cbitpos}'",
            )
        if sev.reduced_phys_bits < 1:
            raise _kvm_died(
                f"sev_kvm_init: reduced_phys_bits check failed, it should be >=1, requested '{sev.reduced_phys_bits}'",
            )
        try:
            self._device = Device(self.platform)
            status = self._device.issue(DeviceCommand.PLATFORM_STATUS)
        except (CommandFailed, OSError) as error:
            raise _kvm_died(f"sev_kvm_init: Failed to open {self.platform} '{reason(error)}'") from error
        self.api, self.build = (status[0], status[1]), status[7]
        if self.is_es and not int.from_bytes(status[3:7], "little") & PLATFORM_ES:
            raise _kvm_died("sev_kvm_init: guest policy requires SEV-ES, but host SEV-ES support unavailable")
        godh, session = _owner_file(sev.godh_file), _owner_file(sev.session_file)
        if b"" in {godh, session}:
            raise _launch_not_started(0, "")  # the kernel takes no empty buffer; the PSP is not asked
        try:
            self.handle = self._device.launch_start(
                policy=sev.policy, shared=sev.handle, godh=godh or b"", session=session or b""
            )
        except (CommandFailed, OSError) as error:
            raise _launch_not_started(*firmware_status(error)) from error
        self.sev_state = SevState.LAUNCH_UPDATE

    def _load_firmware(self) -> None:
        if self.options.firmware is None:
            return
        image = _flash_image(self.options.firmware)
        self._footer = Footer.read(image)
        self._memory.close()
        self._memory = GuestMemory(self.options.memory, image)
        if self._device is None:
            return
        if self.is_es and self._footer.reset_address is None:
            raise MachineDied(
                "SEV information block/Firmware GUID Table block not found in pflash rom",
                "failed to locate and/or save reset vector",
            )
        if self.is_es and not self._footer.reset_address:
            raise MachineDied("SEV-ES reset address is zero", "failed to locate and/or save reset vector")
        self._add(_FOUR_GIB - len(image), image, "failed to encrypt pflash rom")

    def _load_kernel(self) -> None:
        options = self.options
        if options.kernel is None:
            return
        append = None if options.append is None else os.fsencode(options.append)
        try:
            self._hashes = BootHashes.of(options.kernel, options.initrd, append)
        except OSError as error:
            what = "initrd" if error.filename == str(options.initrd) else "kernel"
            raise MachineDied(f"could not open {what} file '{error.filename}': {error.strerror}") from error
        if self.sev is None or not self.sev.kernel_hashes:
            return
        area = self._footer.hashes
        if area is None:
            raise MachineDied("SEV: kernel specified but guest firmware has no hashes table GUID")
        if not area.base or area.size < TABLE_SIZE:
            raise MachineDied(
                f"SEV: guest firmware hashes table area is invalid (base=0x{area.base:x} size=0x{area.size:x})"
            )
        table = self._hashes.table()
        try:
            self._memory.write(area.base, table)
        except NotMapped as error:
            raise MachineDied("SEV: cannot map hashes table guest memory area") from error
        self._add(area.base, table, "SEV: failed to encrypt kernel hashes table")

    def _add(self, address: int, data: bytes, failed: str) -> None:
        if self._device is None:
            return
        try:
            self._device.launch_update_data(address, data)
        except (CommandFailed, OSError) as error:
            raise MachineDied(f"sev_launch_update_data: LAUNCH_UPDATE {kvm_outcome(error)}", failed) from error

    def _measure(self) -> None:
        if self._device is None:
            return
        if self.is_es:
            try:
                for page in self._save_areas():
                    self._device.launch_update_vmsa(page)
            except (CommandFailed, OSError) as error:
                raise MachineDied(f"sev_launch_update_vmsa: LAUNCH_UPDATE_VMSA {kvm_outcome(error)}") from error
        try:
            self._measurement = self._device.launch_measure()
        except (CommandFailed, OSError) as error:
            # QEMU says so and goes on; the measurement is then "not available".
            complain(f"sev_launch_get_measure: LAUNCH_MEASURE {kvm_outcome(error)}")
            return
        self.sev_state = SevState.LAUNCH_SECRET

    def _save_areas(self) -> list[bytes]:
        given = self.options.cpu_flags
        family, model, stepping = (
            _number(given.get(name), default)
            for name, default in (
                ("family", self.cpu.family),
                ("model", self.cpu.model),
                ("stepping", self.cpu.stepping),
            )
        )
        return list(
            vmsa.save_areas(
                vcpus=self.options.vcpus,
                cpu_signature=vmsa.signature(family, model, stepping),
                reset_address=self._footer.reset_address or 0,
                flavour=self._flavour,
            )
        )

    def _boot(self) -> None:
        lines = guest.boot(self._memory, self._footer, self._hashes)
        if self._serial is not None:
            os.write(self._serial, "".join(f"{line}\r\n" for line in lines).encode("ascii"))


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


def _owner_file(path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        return decode_base64(path.read_bytes().split(b"\0", 1)[0].decode("latin-1"))
    except OSError as error:
        text = f"failed to read '{path}' (Failed to open file “{path}”: {error.strerror})"
        raise _kvm_died(text, "sev_kvm_init: failed to create encryption context") from error


def _launch_not_started(code: int, text: str) -> MachineDied:
    # QEMU prints its own return value here, which is 1 whatever the kernel said.
    return _kvm_died(
        f"sev_launch_start: LAUNCH_START ret=1 fw_error={code} '{text}'",
        "sev_kvm_init: failed to create encryption context",
    )


def _kvm_died(*lines: str) -> MachineDied:
    return MachineDied(
        *(f"-accel kvm: {line}" for line in (*lines, "failed to initialize kvm: Operation not permitted"))
    )


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
