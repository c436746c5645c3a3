"""The launch digest: one running SHA-256 over firmware, kernel hashes and register pages, in the order of measuring.

Source: AMD document 55766, LAUNCH_UPDATE_DATA and LAUNCH_UPDATE_VMSA; formats.md section 7. SHA-256 on every
generation. Images come in as chunks, so memory does not grow with their size, and a firmware's hash state is kept, so
that every shape of launch continues from it instead of reading the image again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol, Self

from common.errors import InvalidInput, Reason
from common.sev.digest.cpus import CpuType
from common.sev.digest.kernel_hashes import TABLE_SIZE, KernelHashes
from common.sev.digest.ovmf import RESET_VECTOR_SIZE, TAIL_SIZE_MAX, Footer, parse_footer
from common.sev.digest.vmsa import Flavour, require_vcpus, vmsa_pages
from common.sev.errors import ParseError

_BLOCK = 16  # LAUNCH_UPDATE takes addresses and lengths in multiples of this
FIRMWARE_SIZE_MIN = RESET_VECTOR_SIZE + _BLOCK


class HashState(Protocol):
    """A running SHA-256, as hashlib gives it."""

    def update(self, data: bytes, /) -> None:
        """Take in more bytes."""

    def digest(self) -> bytes:
        """The hash of what came in so far."""
        ...

    def copy(self) -> Self:
        """The same state, to go on from separately."""
        ...


@dataclass(frozen=True, kw_only=True)
class MeasuredFirmware:
    """A firmware image of which only what matters is kept; `measure_firmware` makes it.

    Attributes:
        sha256: hash of the whole image, 32 bytes.
        size: the image's bytes.
        footer: the table at its end.
        state: the hash state after the image. Never update it: copy it with `resume`.
    """

    sha256: bytes
    size: int
    footer: Footer
    state: HashState = field(repr=False, compare=False)

    def resume(self) -> HashState:
        """A running hash that has taken in the image and is the caller's own."""
        return self.state.copy()


def measure_firmware(chunks: Iterable[bytes]) -> MeasuredFirmware:
    """Hash a firmware image and read its footer; holds no more than one chunk and the footer's 64 KiB.

    Raises:
        ParseError: the image's size is not a multiple of 16 bytes, or there is no room for a reset vector.
    """
    state = hashlib.sha256()
    size = 0
    tail = b""
    for chunk in chunks:
        state.update(chunk)
        size += len(chunk)
        tail = bytes(chunk[-TAIL_SIZE_MAX:]) if len(chunk) >= TAIL_SIZE_MAX else (tail + chunk)[-TAIL_SIZE_MAX:]
    if size < FIRMWARE_SIZE_MIN:
        raise ParseError(f"a firmware image has at least {FIRMWARE_SIZE_MIN} bytes, not {size}")
    if size % _BLOCK:
        raise ParseError(f"a firmware image is a multiple of {_BLOCK} bytes, not {size}")
    return MeasuredFirmware(sha256=state.digest(), size=size, footer=parse_footer(tail), state=state)


def hash_chunks(chunks: Iterable[bytes]) -> bytes:
    """SHA-256 of a file that comes in chunks, 32 bytes: for a kernel or an initrd."""
    state = hashlib.sha256()
    for chunk in chunks:
        state.update(chunk)
    return state.digest()


@dataclass(frozen=True, kw_only=True)
class LaunchShape:
    """Everything that a launch digest depends on.

    Attributes:
        firmware: the image in pflash unit 0.
        hashes: of what is booted directly; None where nothing is, or `kernel-hashes` is off.
        vcpus: 1 to 64; None for plain SEV, which does not measure it.
        cpu: the guest's CPU type; None for plain SEV.
        flavour: how the host makes register pages; None for plain SEV.

    Raises:
        InvalidInput: the firmware has no area for the hashes, only some of vcpus, cpu and flavour are given, the number
            of vCPUs is out of range, or more than one vCPU meets a firmware without a reset address.
    """

    firmware: MeasuredFirmware
    hashes: KernelHashes | None = None
    vcpus: int | None = None
    cpu: CpuType | None = None
    flavour: Flavour | None = None

    def __post_init__(self) -> None:
        if self.hashes is not None:
            require_hashes_area(self.firmware.footer)
        given = [value is not None for value in (self.vcpus, self.cpu, self.flavour)]
        if any(given) and not all(given):
            raise _invalid("an SEV-ES shape needs vCPUs, CPU type and VMSA flavour, a plain SEV shape none of them")
        if self.vcpus is not None:
            require_vcpus(self.vcpus, self.firmware.footer.reset_address)

    @property
    def is_es(self) -> bool:
        """Whether register pages are measured."""
        return self.vcpus is not None

    def digest(self) -> bytes:
        """The launch digest, 32 bytes."""
        state = self.firmware.resume()
        if self.hashes is not None:
            state.update(self.hashes.table())
        if self.vcpus is not None and self.cpu is not None and self.flavour is not None:
            reset = self.firmware.footer.reset_address
            for page in vmsa_pages(vcpus=self.vcpus, cpu=self.cpu, flavour=self.flavour, reset_address=reset):
                state.update(page)
        return state.digest()

    def describe(self) -> str:
        """One line for people: what tells this shape from the others of a workload."""
        kernel = "with kernel hashes" if self.hashes is not None else "without kernel hashes"
        if not self.is_es:
            return f"SEV {kernel}; vCPUs and CPU type are not measured"
        noun = "vCPU" if self.vcpus == 1 else "vCPUs"
        return f"SEV-ES {kernel}, {self.vcpus} {noun} {self.cpu}, VMSA {self.flavour}"


def require_hashes_area(footer: Footer) -> None:
    """Refuse a firmware that has no place for kernel hashes: it would boot any kernel, and QEMU would not start it.

    Raises:
        InvalidInput: its footer names no such area, or one that is too small.
    """
    if footer.hashes_area is None:
        raise _invalid("the firmware has no area for kernel hashes: only an AmdSev build of OVMF has one")
    if footer.hashes_area.size < TABLE_SIZE:
        raise _invalid(
            f"the firmware's area for kernel hashes has {footer.hashes_area.size} bytes, the table takes {TABLE_SIZE}"
        )


def _invalid(message: str) -> InvalidInput:
    return InvalidInput(Reason.INVALID_ARGUMENT, message)
