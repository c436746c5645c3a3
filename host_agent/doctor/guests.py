"""A guest's definition: what its firmware can take, and what on its command line would spoil a launch.

Sources: edk2's footer (common/sev/digest/ovmf.py), QEMU's options, Linux `sev_pin_memory`
(host_agent/hypervisors/memlock.py), proc(5) for /proc/net/unix.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from common.sev.digest.compute import FIRMWARE_SIZE_MIN
from common.sev.digest.kernel_hashes import TABLE_SIZE
from common.sev.digest.ovmf import TAIL_SIZE_MAX, Footer, parse_footer
from host_agent.doctor.findings import Finding, failed, passed, skipped, warned
from host_agent.doctor.machine import Machine
from host_agent.hypervisors import memlock
from host_agent.hypervisors.options import Options

_SMALL = 64  # bytes: less than the smallest table with one secret that is worth its name
_AMDSEV = "use an AmdSev build of OVMF (OvmfPkg/AmdSev/AmdSevX64.dsc), which has the areas"
_MIB = 1 << 20
# Beside RAM and flash QEMU registers some small ROMs with KVM: how large they are, only a start shows.
_ROMS = 16 * _MIB
_LISTENING = 0x10000  # SO_ACCEPTCON in /proc/net/unix
_CONNECTED = "03"


def probe(machine: Machine, name: str, firmware: Path, args: Sequence[str], *, es: bool) -> Iterator[Finding]:
    """What the definition of a guest that the agent starts means for its launch.

    Args:
        machine: where it is to run.
        name: the guest's.
        firmware: the file.
        args: QEMU's arguments.
        es: whether it is to run with SEV-ES.
    """
    where = f"guest.{name}"
    options = Options(args)
    size = yield from _firmware(where, firmware, options, es=es)
    yield _nvram(where, options)
    yield memory(machine, f"{where}.memlock", options, size)
    yield _monitors(machine, where, options.monitors)


def probe_foreign(machine: Machine, name: str, firmware: Path, monitor: str | None, *, es: bool) -> Iterator[Finding]:
    """What the definition of a guest that somebody else starts means for its launch.

    Args:
        machine: where it is to run.
        name: the guest's.
        firmware: the file.
        monitor: where its machine's monitor will be; None where the agent does not meet it there.
        es: whether it is to run with SEV-ES.
    """
    where = f"guest.{name}"
    yield from _firmware(where, firmware, None, es=es)
    yield _monitors(machine, where, [] if monitor is None else [monitor])


def read_footer(firmware: Path) -> tuple[int, Footer]:
    """Size of an image in bytes, and the table at its end.

    Raises:
        OSError: it cannot be read.
    """
    with firmware.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAIL_SIZE_MAX))
        return size, parse_footer(file.read(TAIL_SIZE_MAX))


def _firmware(where: str, path: Path, options: Options | None, *, es: bool) -> Generator[Finding, None, int]:
    """The image and its footer; returns the image's bytes. Without options nothing is known of kernel and vCPUs."""
    try:
        size, footer = read_footer(path)
    except OSError as error:
        yield failed(f"{where}.firmware", f"{path}: {error.strerror}", "name the guest's firmware file in agent.toml")
        return 0
    if size < FIRMWARE_SIZE_MIN or size % 4096:
        yield failed(f"{where}.firmware", f"{path}: {size} bytes", "a flash image is a multiple of 4096 bytes")
        return size
    yield passed(f"{where}.firmware", f"{path}: {size} bytes")
    area = footer.secret_area
    if area is None:
        yield failed(f"{where}.secret_area", "the firmware has no area for secrets (0 bytes at 0)", _AMDSEV)
    elif area.size < _SMALL:
        yield failed(f"{where}.secret_area", f"{area.size} bytes at 0x{area.base:x}", _AMDSEV)
    else:
        yield passed(f"{where}.secret_area", f"{area.size} bytes at 0x{area.base:x}")
    yield _hashes(where, footer, options)
    yield _reset(where, footer, options, es=es)
    return size


def _hashes(where: str, footer: Footer, options: Options | None) -> Finding:
    probe_id, area = f"{where}.hashes_area", footer.hashes_area
    if area is not None and area.size >= TABLE_SIZE:
        return passed(probe_id, f"{area.size} bytes at 0x{area.base:x}")
    if options is None:
        return warned(
            probe_id, "the firmware has no area for kernel hashes, so no kernel can be booted directly", _AMDSEV
        )
    if options.value("kernel") is not None:
        return failed(probe_id, "the firmware has no area for kernel hashes, and there is a -kernel", _AMDSEV)
    return passed(probe_id, "none, and no -kernel needs one")


def _reset(where: str, footer: Footer, options: Options | None, *, es: bool) -> Finding:
    probe_id = f"{where}.reset_block"
    if footer.reset_address is not None:
        return passed(probe_id, f"other processors start at 0x{footer.reset_address:x}")
    if not es or (options is not None and options.vcpus == 1):
        return passed(probe_id, "none, and nothing needs one")
    complain = warned if options is None else failed
    return complain(probe_id, "the firmware has no SEV-ES reset block, which more than one vCPU needs", _AMDSEV)


def _nvram(where: str, options: Options) -> Finding:
    if found := options.nvram:
        advice = "take it away: a second flash drive is not measured, so the host could change what the firmware reads"
        return failed(f"{where}.nvram", f"{found} is a writable or second flash drive", advice)
    return passed(f"{where}.nvram", "no flash drive beside the measured one")


def memory(machine: Machine, probe_id: str, options: Options, firmware_size: int) -> Finding:
    """Whether the guest's RAM may be pinned.

    Args:
        machine: where it is to run.
        probe_id: how the finding is called.
        options: the guest's.
        firmware_size: bytes of its firmware, which is pinned too.
    """
    wanted = memlock.pinned(options, firmware_size)
    if wanted is None:
        return skipped(probe_id, "the guest's memory size is not understood", "write it as -m 4G")
    soft, hard = machine.memlock()
    status = ""
    with suppress(OSError):
        status = machine.text("/proc/self/status")
    limit = memlock.limit_of(soft, status)
    if limit is None:
        return passed(probe_id, f"no limit for the {wanted // _MIB} MiB that a guest pins")
    seen = f"{limit >> 10} KiB may be locked, the guest pins {wanted >> 10} KiB"
    if limit >= wanted + _ROMS:
        return passed(probe_id, seen)
    advice = memlock.ADVICE + (f" (the hard limit is {hard >> 10} KiB)" if hard >= 0 else "")
    if limit >= wanted:
        return warned(probe_id, f"{seen} and its small ROMs", advice)
    return failed(probe_id, seen, advice)


def _monitors(machine: Machine, where: str, paths: Sequence[str]) -> Finding:
    if not paths:
        return passed(f"{where}.monitor", "the agent's own monitor is the only one")
    try:
        table = machine.text("/proc/net/unix")
    except OSError as error:
        return skipped(f"{where}.monitor", f"/proc/net/unix cannot be read: {error.strerror}")
    listening, connected = _sockets(table)
    for path in paths:
        if path in connected:
            advice = "let go of it: a monitor serves one client at a time, and a second one hears nothing"
            return failed(f"{where}.monitor", f"{path} is held by another client", advice)
        if path in listening:
            advice = "is the guest running already, started by somebody else? QEMU would take the socket's place"
            return warned(f"{where}.monitor", f"somebody listens at {path}", advice)
    return passed(f"{where}.monitor", f"nobody holds {' '.join(paths)}")


def _sockets(table: str) -> tuple[set[str], set[str]]:
    """Paths at which somebody listens, and paths at whose sockets somebody is connected."""
    listening, connected = set(), set()
    for line in table.splitlines()[1:]:
        words = line.split(maxsplit=7)  # Num RefCount Protocol Flags Type St Inode Path
        if len(words) < 8:
            continue
        if int(words[3], 16) & _LISTENING:
            listening.add(words[7])
        elif words[5] == _CONNECTED:
            connected.add(words[7])
    return listening, connected
