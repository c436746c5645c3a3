"""What the firmware must measure of a configured guest, from the files and words of its definition."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common.errors import InvalidInput, Reason
from common.sev.digest.compute import LaunchShape, MeasuredFirmware, hash_chunks, measure_firmware
from common.sev.digest.cpus import CpuType, parse_cpu
from common.sev.digest.kernel_hashes import KernelHashes
from common.sev.digest.vmsa import Flavour
from common.sev.errors import ParseError
from common.sev.explain import Catalogue, Expected
from host_agent.hypervisors.base import GuestDefinition
from host_agent.hypervisors.options import Options

_CHUNK = 1 << 20  # bytes read at a time
_FILE, _COMMAND_LINE = "as configured", "as configured"  # labels of the only version of each that is on file
_DEFAULT_CPU = "15-107-1"  # QEMU's qemu64, the model without -cpu (target/i386/cpu.c)
_OF_THE_HOST = frozenset({"host", "max"})


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """What may be measured.

    Attributes:
        firmware: the image.
        expected: one shape for each VMSA flavour, or one alone without SEV-ES.
        catalogue: the parts, for the explanation of a mismatch.
    """

    firmware: MeasuredFirmware
    expected: tuple[Expected, ...]
    catalogue: Catalogue


def expect(definition: GuestDefinition, *, es: bool, host_cpu: CpuType | None) -> Expectation:
    """Compute it.

    Args:
        definition: the guest's.
        es: whether it runs with SEV-ES.
        host_cpu: this host's processor, for `-cpu host`; None where not known.

    Raises:
        InvalidInput: a file cannot be read, or the definition says what cannot be measured here.
    """
    options = Options(definition.args)
    firmware = measure_firmware(_chunks(definition.firmware))
    hashes = _hashes(options)
    shapes = _shapes(firmware, hashes, options, host_cpu) if es else [LaunchShape(firmware=firmware, hashes=hashes)]
    initrd, cmdline = options.value("initrd"), options.value("append")
    expected = tuple(
        Expected(
            shape=shape,
            firmware=_FILE,
            kernel=None if hashes is None else _FILE,
            initrd=None if hashes is None or initrd is None else _FILE,
            cmdline=None if hashes is None or cmdline is None else _COMMAND_LINE,
        )
        for shape in shapes
    )
    catalogue = Catalogue(
        firmwares={_FILE: firmware},
        kernels={} if hashes is None else {_FILE: hashes.kernel},
        initrds={} if hashes is None or initrd is None else {_FILE: hashes.initrd},
        cmdlines={} if hashes is None or cmdline is None else {_COMMAND_LINE: cmdline.encode()},
    )
    return Expectation(firmware=firmware, expected=expected, catalogue=catalogue)


def _shapes(
    firmware: MeasuredFirmware, hashes: KernelHashes | None, options: Options, host_cpu: CpuType | None
) -> list[LaunchShape]:
    vcpus = options.vcpus
    if vcpus is None:
        raise _unusable(f"-smp {options.value('smp')}: how many vCPUs that is, is not understood; write -smp N")
    cpu = _cpu(options.cpu, host_cpu)
    return [LaunchShape(firmware=firmware, hashes=hashes, vcpus=vcpus, cpu=cpu, flavour=flavour) for flavour in Flavour]


def _cpu(model: str | None, host_cpu: CpuType | None) -> CpuType:
    if model in _OF_THE_HOST:
        if host_cpu is None:
            raise _unusable(f"-cpu {model}: this host's processor cannot be read, so name an EPYC model")
        return host_cpu
    try:
        return parse_cpu(_DEFAULT_CPU if model is None else model)
    except ParseError as error:
        raise _unusable(f"-cpu {model}: {error.message}") from error


def _hashes(options: Options) -> KernelHashes | None:
    kernel, initrd, cmdline = (options.value(name) for name in ("kernel", "initrd", "append"))
    if kernel is None:
        return None
    return KernelHashes.of(
        hash_chunks(_chunks(Path(kernel))),
        None if initrd is None else hash_chunks(_chunks(Path(initrd))),
        None if cmdline is None else cmdline.encode(),
    )


def _chunks(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                yield chunk
    except OSError as error:
        raise _unusable(f"{path}: {error.strerror}") from error


def _unusable(message: str) -> InvalidInput:
    return InvalidInput(Reason.INVALID_CONFIGURATION, message)
