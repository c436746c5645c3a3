"""The SEV firmware: version against the floors, state, SEV-ES, SNP mode, a PDH that stays, a CEK to be had.

Every command is a reading one. Exporting certificates initialises a platform that is not, which is a change, so that
is left to the selftest there. CVE-2025-48514: on a host in SNP mode firmware lets SEV-ES guests interfere with SNP
guests; since API 1.58 it refuses SEV-ES guests there instead.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

from common.amd.kds import FolderKeyService, KeyService
from common.errors import SevattestError
from common.sev.abi import MINIMUM_API, PlatformState
from common.sev.certs.chain import PlatformChain
from common.sev.certs.roots import Root
from common.sev.certs.verify import VerifiedPlatform, attach_cek, verify_platform
from common.sev.errors import ParseError
from common.sev.floors import FLOORS
from common.sev.measurement import FirmwareVersion
from host_agent.devices import Device, PlatformStatus, pdh_fingerprint
from host_agent.doctor.findings import Finding, failed, passed, skipped, warned

_REFUSES_ES_BESIDE_SNP = (1, 58)
_NOT_TOLD = "a QEMU that is asked for the platform does not tell"
_BY_DEVICE = "`sev-host-agent doctor` without --config asks /dev/sev itself"
UNREACHED = "look at `dmesg | grep -e ccp -e SEV`"
_UPDATE = "update the firmware: linux-firmware's amd/ folder and a reboot, or the BIOS"


async def probe(
    device: Device,
    *,
    generation: str | None,
    es: bool,
    snp: bool,
    key_service: KeyService | None,
    roots: tuple[Root, ...],
    unreached: str = UNREACHED,
) -> AsyncIterator[Finding]:
    """What the firmware means for launches.

    Args:
        device: reads the platform.
        generation: the processor's; `emulated` for a software platform; None for one that is not known.
        es: whether guests with SEV-ES are to be launched.
        snp: whether the host is in SNP mode.
        key_service: where to look for the signed CEK; nowhere when None.
        roots: who may have signed it.
        unreached: what to do about a device that gives no answer and has no hint of its own.
    """
    try:
        status = await device.status()
    except SevattestError as error:
        advice = error.fields.get("hint", unreached)
        yield failed("firmware.answers", error.message, advice)
        if snp:
            yield snp_mode(None, es=es, snp=snp)
        return
    yield passed("firmware.answers", _described(status))
    for finding in _version(status, generation):
        yield finding
    yield _es(status, es=es)
    yield snp_mode(status.firmware, es=es, snp=snp)
    if status.state is PlatformState.UNINIT:
        advice = "start a guest, or run `sev-host-agent selftest`, which exports the certificates"
        yield skipped("pdh.stable", "the platform is not initialised, and an export would initialise it", advice)
        yield skipped("cek.obtainable", "the platform is not initialised, and an export would initialise it", advice)
        return
    async for finding in _certificates(device, key_service, roots):
        yield finding


def _described(status: PlatformStatus) -> str:
    version = "API and build not told" if status.firmware is None else f"API and build {status.firmware}"
    if status.state is PlatformState.UNINIT:
        return f"{version}, not initialised"
    told = [version, status.state.name]
    if status.externally_owned is not None:
        told.append(f"owned by {'somebody else' if status.externally_owned else 'itself'}")
    if status.guest_count is not None:
        told.append(f"{status.guest_count} guest{'' if status.guest_count == 1 else 's'}")
    return ", ".join(told)


def _version(status: PlatformStatus, generation: str | None) -> Iterator[Finding]:
    firmware = status.firmware
    if firmware is None:
        for probe_id in ("firmware.api", "firmware.floor"):
            yield skipped(probe_id, f"{_NOT_TOLD} the firmware's version unless it runs a SEV guest", _BY_DEVICE)
        return
    if firmware[:2] < MINIMUM_API:
        oldest = ".".join(map(str, MINIMUM_API))
        yield failed("firmware.api", f"API {firmware.api_major}.{firmware.api_minor} is below {oldest}", _UPDATE)
    else:
        yield passed("firmware.api", f"API {firmware.api_major}.{firmware.api_minor}")
    floor = FLOORS.get(generation or "")
    if floor is None or floor.version is None:
        who = f"for {generation}" if generation else "for a processor that is not known"
        yield skipped("firmware.floor", f"no floor is known {who}", "ask the owners which firmware they accept")
    elif firmware < floor.version:
        seen = f"{firmware} is below {floor.version} ({floor.source})"
        yield failed("firmware.floor", seen, f"{_UPDATE}; owners refuse this platform unless they accept old firmware")
    else:
        yield passed("firmware.floor", f"{firmware}, the floor for {generation} is {floor.version}")


def _es(status: PlatformStatus, *, es: bool) -> Finding:
    if status.state is PlatformState.UNINIT:
        return skipped("firmware.es", "not to be seen before the platform is initialised")
    if status.es_enabled is None:
        return skipped("firmware.es", f"{_NOT_TOLD} whether the platform was initialised for SEV-ES; see kvm.sev_es")
    if status.es_enabled:
        return passed("firmware.es", "initialised for SEV-ES")
    complain = failed if es else warned
    advice = "see kvm.sev_es and cpu.asids; the kernel initialises the firmware for SEV-ES where both allow it"
    return complain("firmware.es", "not initialised for SEV-ES", advice)


def snp_mode(firmware: FirmwareVersion | None, *, es: bool, snp: bool) -> Finding:
    """What SNP mode means for SEV-ES guests.

    Args:
        firmware: its version; None where it does not answer.
        es: whether guests with SEV-ES are to be launched.
        snp: whether the host is in SNP mode.
    """
    if not snp:
        return passed("firmware.snp", "the host is not in SNP mode")
    advice = "switch SNP off on hosts for SEV-ES guests: kvm_amd.sev_snp=0, or SNP memory coverage in the BIOS"
    if es and firmware is not None and firmware[:2] >= _REFUSES_ES_BESIDE_SNP:
        return failed("firmware.snp", "the host is in SNP mode: this firmware refuses SEV-ES guests", advice)
    seen = "the host is in SNP mode: firmware of API 1.58 and later refuses SEV-ES guests there (CVE-2025-48514)"
    return warned("firmware.snp", seen, advice)


async def _certificates(
    device: Device, key_service: KeyService | None, roots: tuple[Root, ...]
) -> AsyncIterator[Finding]:
    try:
        first, second = await device.export_chain(), await device.export_chain()
        fingerprint = pdh_fingerprint(first)
        chain = PlatformChain.parse(first)
        same = fingerprint == pdh_fingerprint(second)
    except SevattestError as error:
        yield failed("pdh.stable", error.message, error.fields.get("hint", "run `sev-host-agent selftest`"))
        return
    if same:
        yield passed("pdh.stable", f"two exports have the same PDH, {fingerprint.hex()}")
    else:
        advice = "keep a guest running, or use a newer kernel (6.16): this one makes a new PDH for every export"
        yield failed("pdh.stable", "two exports have different PDHs, so no session would fit", advice)
    yield await _cek(device, chain, key_service, roots)


async def _cek(device: Device, chain: PlatformChain, service: KeyService | None, roots: tuple[Root, ...]) -> Finding:
    if service is None:
        advice = "--kds URL|DIR looks; AMD's is https://kdsintf.amd.com, which learns by it which chip asks"
        return skipped("cek.obtainable", "not looked for: no key service is named", advice)
    try:
        platform = await complete(device, chain, service, roots)
    except SevattestError as error:
        advice = error.fields.get("hint", "owners need this chip's signed CEK: put it into a folder for --kds")
        return failed("cek.obtainable", error.message, advice)
    whose = f"{platform.generation}, not AMD's" if platform.emulated else f"AMD's for {platform.generation}"
    return passed("cek.obtainable", f"signed, chip {platform.chip_fingerprint.hex()}, root {whose}")


async def complete(
    device: Device, chain: PlatformChain, service: KeyService | None, roots: tuple[Root, ...]
) -> VerifiedPlatform:
    """The platform with the signed CEK of its chip, verified up to a trusted root.

    Args:
        device: knows the chip's id.
        chain: what it exported.
        service: has the CEK, where the chain's is not signed.
        roots: who may have signed it.

    Raises:
        SevattestError: the CEK is not to be had, or a signature is not good.
    """
    if service is not None and not chain.cek.is_signed:
        chip_id = await device.chip_id()
        if chip_id:
            signed = await service.signed_cek(chip_id)
        elif isinstance(service, FolderKeyService):
            signed = await service.signed_copy_of(chain.cek)
        else:
            raise ParseError("the platform does not tell its chip's id, under which the key service has the CEK")
        chain = attach_cek(chain, signed)
    return verify_platform(chain, roots)
