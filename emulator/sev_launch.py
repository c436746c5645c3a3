"""QEMU's part in the launch of a SEV guest: which commands the firmware gets, in which order, and QEMU's sentences.

Source: QEMU, target/i386/sev.c and hw/i386/x86.c. The order is check of the processor, LAUNCH_START, firmware image,
kernel hashes table, save areas, LAUNCH_MEASURE; then secrets; LAUNCH_FINISH when the machine is told to run. Whoever
has guest memory and a monitor, the stand-in machine or the front of a real QEMU, drives it.

Memory is not encrypted: the PSP returns a secret's plaintext, and it is written into guest memory as it is. Imports no
cryptography: a machine starts in a fraction of a second.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from common.sev.abi import PLATFORM_ES, REPORT_SIZE, DeviceCommand
from emulator.device_client import CommandFailed, Device
from emulator.errors import CommandError, MachineDied
from emulator.footer import Footer
from emulator.guest_memory import GuestMemory, NotMapped
from emulator.kernel_hashes import TABLE_SIZE, BootHashes
from emulator.protocol import GuestRequest
from emulator.qemu_words import complain, decode_base64, firmware_status, ioctl_outcome, kvm_outcome, reason
from emulator.sev_object import SevGuest

_FOUR_GIB = 1 << 32
_NONCE_SIZE = 16
# From this version on the function that says so has another name, and `query-sev` tells the kind of guest.
SEV_TYPE_SINCE = (9, 1)


class SevState(StrEnum):
    """What QEMU believes of its guest, in the order of QAPI's enumeration."""

    UNINIT = "uninit"
    LAUNCH_UPDATE = "launch-update"
    LAUNCH_SECRET = "launch-secret"  # noqa: S105 -- a state's name
    RUNNING = "running"


@dataclass(frozen=True, kw_only=True)
class Processor:
    """What CPUID says on a platform.

    Attributes:
        generation: which one it imitates.
        cbitpos: position of the encryption bit.
    """

    generation: str
    cbitpos: int

    @classmethod
    def of(cls, platform: Path) -> Processor:
        """Ask the platform.

        Raises:
            OSError: nobody serves it.
            CommandFailed: it refuses.
        """
        with Device(platform, writable=False) as device:
            told = json.loads(device.issue(GuestRequest.DESCRIBE))
        return cls(generation=str(told["generation"]), cbitpos=int(told["cbitpos"]))


class SevLaunch:
    """One guest's launch, from the accelerator's initialisation to the end of the machine.

    Attributes:
        guest: the sev-guest object.
        state: how far it is.
        handle: the firmware's number of the guest; 0 before `start`.
        api: the firmware's API, major and minor.
        build: the firmware's build.
    """

    def __init__(self, guest: SevGuest, *, platform: Path, cbitpos: int, version: tuple[int, int]) -> None:
        self.guest = guest
        self.state = SevState.UNINIT
        self.handle = 0
        self.api = (0, 0)
        self.build = 0
        self._platform = platform
        self._cbitpos = cbitpos
        self._init = "sev_common_kvm_init" if version >= SEV_TYPE_SINCE else "sev_kvm_init"
        self._device: Device | None = None
        self._footer = Footer.read(b"")
        self._measurement: bytes | None = None

    @property
    def is_es(self) -> bool:
        """Whether the guest's registers are protected too."""
        return self.guest.is_es

    @property
    def measurement(self) -> str | None:
        """The measurement blob as base64, from when it was made."""
        return None if self._measurement is None else base64.b64encode(self._measurement).decode("ascii")

    def start(self) -> None:
        """Open the device, compare what was asked for with what there is, LAUNCH_START.

        Raises:
            MachineDied: as QEMU would.
        """
        guest, init = self.guest, self._init
        if guest.cbitpos != self._cbitpos:
            raise kvm_died(f"{init}: cbitpos check failed, host '{self._cbitpos}' requested '{guest.cbitpos}'")
        if guest.reduced_phys_bits < 1:
            raise kvm_died(
                f"{init}: reduced_phys_bits check failed, it should be >=1, requested '{guest.reduced_phys_bits}'",
            )
        try:
            self._device = Device(self._platform)
            status = self._device.issue(DeviceCommand.PLATFORM_STATUS)
        except (CommandFailed, OSError) as error:
            raise kvm_died(f"{init}: Failed to open {self._platform} '{reason(error)}'") from error
        self.api, self.build = (status[0], status[1]), status[7]
        if self.is_es and not int.from_bytes(status[3:7], "little") & PLATFORM_ES:
            raise kvm_died(f"{init}: guest policy requires SEV-ES, but host SEV-ES support unavailable")
        godh, session = self._owner_file(guest.godh_file), self._owner_file(guest.session_file)
        if b"" in {godh, session}:
            raise self._not_started(0, "")  # the kernel takes no empty buffer; the PSP is not asked
        try:
            self.handle = self._device.launch_start(
                policy=guest.policy, shared=guest.handle, godh=godh or b"", session=session or b""
            )
        except (CommandFailed, OSError) as error:
            raise self._not_started(*firmware_status(error)) from error
        self.state = SevState.LAUNCH_UPDATE

    def add_firmware(self, image: bytes) -> Footer:
        """Measure the firmware image; returns what its footer says.

        Raises:
            MachineDied: as QEMU would.
        """
        self._footer = Footer.read(image)
        if self.is_es and not self._footer.reset_address:
            missing = self._footer.reset_address is None
            raise MachineDied(
                "SEV information block/Firmware GUID Table block not found in pflash rom"
                if missing
                else "SEV-ES reset address is zero",
                "failed to locate and/or save reset vector",
            )
        self._add(_FOUR_GIB - len(image), image, "failed to encrypt pflash rom")
        return self._footer

    def add_kernel(self, hashes: BootHashes, memory: GuestMemory, *, shown: BootHashes | None = None) -> None:
        """Measure the hashes table and put it where the firmware looks for it; nothing without `kernel-hashes=on`.

        Args:
            hashes: of what was handed over with -kernel, -initrd and -append.
            memory: the guest's.
            shown: of what the firmware will see instead, where that is not the same to the byte.

        Raises:
            MachineDied: as QEMU would.
        """
        if not self.guest.kernel_hashes:
            return
        area = self._footer.hashes
        if area is None:
            raise MachineDied("SEV: kernel specified but guest firmware has no hashes table GUID")
        if not area.base or area.size < TABLE_SIZE:
            raise MachineDied(
                f"SEV: guest firmware hashes table area is invalid (base=0x{area.base:x} size=0x{area.size:x})"
            )
        try:
            memory.write(area.base, (shown or hashes).table())
        except NotMapped as error:
            raise MachineDied("SEV: cannot map hashes table guest memory area") from error
        self._add(area.base, hashes.table(), "SEV: failed to encrypt kernel hashes table")

    def measure(self, save_areas: Iterable[bytes] = ()) -> None:
        """Close the launch digest.

        Args:
            save_areas: of every vCPU of an SEV-ES guest, in order.

        Raises:
            MachineDied: as QEMU would.
        """
        device = self._opened()
        try:
            for page in save_areas:
                device.launch_update_vmsa(page)
        except (CommandFailed, OSError) as error:
            raise MachineDied(f"sev_launch_update_vmsa: LAUNCH_UPDATE_VMSA {kvm_outcome(error)}") from error
        try:
            self._measurement = device.launch_measure()
        except (CommandFailed, OSError) as error:
            # QEMU says so and goes on; the measurement is then "not available".
            complain(f"sev_launch_get_measure: LAUNCH_MEASURE {kvm_outcome(error)}")
            return
        self.state = SevState.LAUNCH_SECRET

    def finish(self) -> None:
        """The machine runs: LAUNCH_FINISH, the first time.

        Raises:
            MachineDied: as QEMU would.
        """
        if self.state is SevState.RUNNING:
            return
        try:
            self._opened().launch_finish()
        except (CommandFailed, OSError) as error:
            raise MachineDied(f"sev_launch_finish: LAUNCH_FINISH {kvm_outcome(error)}") from error
        self.state = SevState.RUNNING

    def inject(self, memory: GuestMemory, *, header: str, secret: str, address: int | None) -> None:
        """Let the PSP open a secret packet into guest memory. Nobody checks the secret's size, as in QEMU.

        Raises:
            CommandError: with QEMU's words.
        """
        if address is None:
            if self._footer.secret is None:
                raise CommandError("SEV: no secret area found in OVMF, gpa must be specified.")
            address = self._footer.secret.base
        if self.state is not SevState.LAUNCH_SECRET:
            number = list(SevState).index(self.state)
            raise CommandError(f"SEV: Not in correct state. (LSECRET) {number:x}")
        packet_header, packet = decode_base64(header), decode_base64(secret)
        if not packet_header:
            raise CommandError("SEV: Failed to decode sequence header")
        if not packet:
            raise CommandError("SEV: Failed to decode data")
        try:
            memory.check(address, len(packet))
        except NotMapped as error:
            raise CommandError(f"SEV: Failed to calculate guest address: {error}") from error
        try:
            memory.write(address, self._opened().launch_secret(address, packet_header, packet))
        except (CommandFailed, OSError) as error:
            raise CommandError(f"SEV: failed to inject secret {kvm_outcome(error)}") from error

    def report(self, nonce: str) -> str:
        """`query-sev-attestation-report`: the report as base64.

        Raises:
            CommandError: with QEMU's words.
        """
        raw = decode_base64(nonce)
        if len(raw) != _NONCE_SIZE:
            raise CommandError(f"SEV: mnonce must be {_NONCE_SIZE} bytes (got {len(raw)})")
        try:
            report = self._opened().attestation(raw, REPORT_SIZE)
        except (CommandFailed, OSError) as error:
            text = ioctl_outcome(error)
            raise CommandError(f"SEV: Failed to get attestation report {text}: {reason(error)}") from error
        return base64.b64encode(report).decode("ascii")

    def close(self) -> None:
        """The machine ended: the PSP forgets the guest."""
        if self._device is not None:
            self._device.close()

    def _opened(self) -> Device:
        if self._device is None:
            raise MachineDied(f"{self._init}: the launch was not started")
        return self._device

    def _add(self, address: int, data: bytes, failed: str) -> None:
        try:
            self._opened().launch_update_data(address, data)
        except (CommandFailed, OSError) as error:
            raise MachineDied(f"sev_launch_update_data: LAUNCH_UPDATE {kvm_outcome(error)}", failed) from error

    def _owner_file(self, path: Path | None) -> bytes | None:
        if path is None:
            return None
        try:
            return decode_base64(path.read_bytes().split(b"\0", 1)[0].decode("latin-1"))
        except OSError as error:
            text = f"failed to read '{path}' (Failed to open file “{path}”: {error.strerror})"
            raise kvm_died(text, f"{self._init}: failed to create encryption context") from error

    def _not_started(self, code: int, text: str) -> MachineDied:
        # QEMU prints its own return value here, which is 1 whatever the kernel said.
        return kvm_died(
            f"sev_launch_start: LAUNCH_START ret=1 fw_error={code} '{text}'",
            f"{self._init}: failed to create encryption context",
        )


def query_sev(launch: SevLaunch | None, version: tuple[int, int]) -> dict[str, object]:
    """The answer to `query-sev`, members in QEMU's order; None: no SEV guest."""
    return {
        "enabled": launch is not None,
        "api-minor": launch.api[1] if launch else 0,
        "handle": launch.handle if launch else 0,
        "state": launch.state.value if launch else SevState.UNINIT.value,
        "api-major": launch.api[0] if launch else 0,
        **({"sev-type": "sev"} if version >= SEV_TYPE_SINCE else {}),
        "build-id": launch.build if launch else 0,
        "policy": launch.guest.policy if launch else 0,
    }


def kvm_died(*lines: str) -> MachineDied:
    """The end of a machine whose accelerator could not be initialised."""
    return MachineDied(
        *(f"-accel kvm: {line}" for line in (*lines, "failed to initialize kvm: Operation not permitted"))
    )


def no_platform(platform: Path, error: CommandFailed | OSError, version: tuple[int, int]) -> MachineDied:
    """The end of a machine on a host whose SEV device does not answer."""
    init = "sev_common_kvm_init" if version >= SEV_TYPE_SINCE else "sev_kvm_init"
    return kvm_died(f"{init}: Failed to open {platform} '{reason(error)}'")
