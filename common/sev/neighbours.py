"""Launches that are almost the expected one: what `common.sev.explain` searches, in the order in which it searches.

Pure enumeration and hashing; nothing here compares a measurement or words a sentence. A neighbour differs from an
expected launch in artefacts that the owner has on file, in the shape of the machine, in the policy, in the firmware's
version, or in the key that measured. A measurement belongs to one launch, so the order decides only what a limit cuts
off: single differences come first, then what a host may do that ignores the session, then pairs, and at the end what
firmware would hardly let through.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import combinations, islice, product, zip_longest
from typing import NamedTuple

from common.sev.abi import MINIMUM_API, PolicyBit
from common.sev.digest.compute import HashState, MeasuredFirmware
from common.sev.digest.cpus import CPU_TYPES, CpuType
from common.sev.digest.kernel_hashes import NO_INITRD, TABLE_SIZE, KernelHashes, hash_cmdline
from common.sev.digest.vmsa import VCPUS_MAX, Flavour, ap_page, boot_page
from common.sev.measurement import FirmwareVersion

_LOW_BITS = 0x3F
_API_FLOOR = 0xFFFF0000
_BYTE = 0xFF
# Kernel, initrd and command line of different versions, tried where none was expected.
_MIXTURES_MAX = 256
_USUAL_ES = (0x5, 0x7, 0x4, 0xF)
# How far a version may be off where something else differs too; alone, every byte is tried.
_NEAR = 4


class Key(Enum):
    """Which key made the measurement."""

    TIK = "TIK"
    TEK = "TEK"
    ZERO = "zero"


class Launch(NamedTuple):
    """One imagined launch, by what it is made of."""

    digest: bytes | None  # the launch digest itself, where the owner listed only that; then there are no parts
    firmware: bytes  # SHA-256
    kernel: bytes | None  # SHA-256; None, like the next two, with kernel hashes off
    initrd: bytes | None
    cmdline: bytes | None
    vcpus: int | None  # None, like the next two, for plain SEV
    cpu: int | None  # signature
    flavour: Flavour | None
    policy: int
    version: FirmwareVersion
    key: Key

    @property
    def has_hashes(self) -> bool:
        """Whether kernel hashes are on."""
        return self.kernel is not None

    @property
    def is_es(self) -> bool:
        """Whether register pages are measured."""
        return self.vcpus is not None


Axis = Callable[[Launch], Iterable[Launch]]


@dataclass(frozen=True, kw_only=True)
class Material:
    """Everything that launches may be made of, by its SHA-256.

    Attributes:
        firmwares: images.
        kernels: hashes of kernels.
        initrds: hashes of initrds.
        cmdlines: command lines (raw, without NUL) by the hash that QEMU would make.
        versions: artefacts that carry the same label, as (firmware, kernel, initrd, cmdline), None where the label
            names none.
        cpus: CPU types by signature.
    """

    firmwares: Mapping[bytes, MeasuredFirmware]
    kernels: Sequence[bytes]
    initrds: Sequence[bytes]
    cmdlines: Mapping[bytes, bytes]
    versions: Sequence[tuple[bytes | None, bytes | None, bytes | None, bytes | None]]
    cpus: Mapping[int, CpuType]


def known_cpus(extra: Iterable[CpuType]) -> dict[int, CpuType]:
    """One CPU type for each signature; the owner's own names first."""
    by_signature: dict[int, CpuType] = {}
    for cpu in (*extra, *CPU_TYPES.values()):
        by_signature.setdefault(cpu.signature, cpu)
    return by_signature


def cmdline_slips(cmdline: bytes) -> Iterator[tuple[bytes, str]]:
    """What a slip of the pen makes of a command line: the hash that is then measured, and what happened."""
    yield hash_cmdline(cmdline + b"\n"), "with a newline at its end"
    yield hash_cmdline(cmdline + b"\0"), "with two NULs at its end"
    yield hashlib.sha256(cmdline).digest(), "without a NUL at its end"
    yield hash_cmdline(cmdline.strip()), "without white space around it"
    yield hash_cmdline(cmdline + b" "), "with a space at its end"
    yield hash_cmdline(cmdline + b"\r\n"), "with a carriage return and newline at its end"


class DigestCache:
    """Launch digests of imagined launches; every hash state is computed once and continued.

    Attributes:
        pages: register pages hashed so far.
    """

    def __init__(self, material: Material) -> None:
        self.pages = 0
        self._material = material
        self._prefixes: dict[tuple[bytes, bytes | None, bytes | None, bytes | None], HashState | None] = {}
        self._runs: dict[tuple[HashState, int, Flavour], _Run] = {}
        self._page_cache: dict[tuple[int, Flavour, int | None], bytes] = {}

    def digest(self, launch: Launch) -> bytes | None:
        """The launch digest, None for a launch that QEMU would not start with this firmware."""
        if launch.digest is not None:
            return launch.digest
        prefix = self._prefix(launch)
        if prefix is None:
            return None
        if launch.vcpus is None or launch.cpu is None or launch.flavour is None:
            return prefix.digest()
        reset = self._material.firmwares[launch.firmware].footer.reset_address
        if reset is None and launch.vcpus > 1:
            return None
        key = (prefix, launch.cpu, launch.flavour)
        run = self._runs.get(key)
        if run is None:
            run = self._runs[key] = _Run(state=prefix.copy())
        while len(run.digests) < launch.vcpus:
            at = None if not run.digests else reset
            run.state.update(self._page(launch.cpu, launch.flavour, at))
            run.digests.append(run.state.digest())
            self.pages += 1
        return run.digests[launch.vcpus - 1]

    def _prefix(self, launch: Launch) -> HashState | None:
        key = launch[1:5]
        if key in self._prefixes:
            return self._prefixes[key]
        firmware = self._material.firmwares[launch.firmware]
        area = firmware.footer.hashes_area
        state: HashState | None = None
        if launch.kernel is None or launch.initrd is None or launch.cmdline is None:
            state = firmware.resume()
        elif area is not None and area.size >= TABLE_SIZE:
            state = firmware.resume()
            state.update(KernelHashes(kernel=launch.kernel, initrd=launch.initrd, cmdline=launch.cmdline).table())
        self._prefixes[key] = state
        return state

    def _page(self, signature: int, flavour: Flavour, reset: int | None) -> bytes:
        key = (signature, flavour, reset)
        page = self._page_cache.get(key)
        if page is None:
            cpu = self._material.cpus[signature]
            page = (
                boot_page(cpu=cpu, flavour=flavour)
                if reset is None
                else ap_page(cpu=cpu, flavour=flavour, reset_address=reset)
            )
            self._page_cache[key] = page
        return page


@dataclass(kw_only=True)
class _Run:
    """A hash that goes on from vCPU to vCPU; `digests[n - 1]` is the digest with n of them."""

    state: HashState
    digests: list[bytes] = field(default_factory=list)


def neighbours(bases: Sequence[Launch], material: Material) -> Iterator[Launch]:
    """Every neighbour of the expected launches, the likeliest first. The same launch may come more than once."""
    axes = _Axes(material)
    artefacts: tuple[Axis, ...] = (axes.hashes, axes.kernel, axes.initrd, axes.firmware, axes.cmdline)
    machine: tuple[Axis, ...] = (axes.flavour, axes.cpu, axes.vcpus)
    parts = (*artefacts, *machine)
    # Without SEV-ES all shapes of the same artefacts are one launch, so these stay few however many shapes there are.
    plain = tuple(dict.fromkeys(launch._replace(vcpus=None, cpu=None, flavour=None) for launch in bases))
    plan: list[tuple[Sequence[Launch], tuple[Axis, ...]]] = [
        # One difference; a whole other version of the workload is the likeliest way for several artefacts to differ.
        *((bases, (axis,)) for axis in (axes.key, *parts, axes.whole_version)),
        # The session ignored, and so any policy.
        (plain, (axes.unbound_plain,)),
        *((plain, (axes.unbound_plain, artefact)) for artefact in (*artefacts, axes.whole_version)),
        *((bases, (axis,)) for axis in (axes.unbound_usual_es, axes.near_policy, axes.near_version, axes.unbound_es)),
        # Two differences.
        *((bases, pair) for pair in combinations(artefacts, 2)),
        *((bases, (axes.key, part)) for part in parts),
        *((bases, pair) for pair in product(artefacts, machine)),
        *((bases, pair) for pair in combinations(machine, 2)),
        *((bases, pair) for pair in product((axes.near_policy, axes.near_version), parts)),
        # The session ignored, and something else.
        *((bases, (axes.unbound_es, part)) for part in (*parts, axes.whole_version)),
        # A session binds its policy, and a host that reports a wrong version gains nothing.
        (bases, (axes.policy,)),
        (bases, (axes.version,)),
    ]
    for launches, changes in plan:
        yield from _spread(launches, changes)


def _spread(launches: Iterable[Launch], axes: tuple[Axis, ...]) -> Iterator[Launch]:
    """Change every launch along every axis; the launches take turns, so that each one's nearest come first."""
    for turn in zip_longest(*(_change(launch, axes) for launch in launches)):
        yield from (launch for launch in turn if launch is not None)


def _change(launch: Launch, axes: tuple[Axis, ...]) -> Iterator[Launch]:
    if not axes:
        yield launch
        return
    for changed in axes[0](launch):
        yield from _change(changed, axes[1:])


class _Axes:
    """The ways in which a launch may differ, each yielding the launch with one thing changed."""

    def __init__(self, material: Material) -> None:
        self._material = material

    def key(self, launch: Launch) -> Iterator[Launch]:
        """Without the session, whose place an all-zero key takes; or with the session's keys swapped."""
        yield launch._replace(key=Key.ZERO)
        yield launch._replace(key=Key.TEK)

    def unbound_plain(self, launch: Launch) -> Iterator[Launch]:
        """Without the session, under any policy that asks for no SEV-ES."""
        for policy in _policies(launch):
            if not policy & PolicyBit.ES:
                yield launch._replace(key=Key.ZERO, policy=policy)

    def unbound_usual_es(self, launch: Launch) -> Iterator[Launch]:
        """Without the session, under a policy that people write by hand for SEV-ES."""
        if launch.is_es or launch.digest is not None:
            for policy in _USUAL_ES:
                yield launch._replace(key=Key.ZERO, policy=policy)

    def unbound_es(self, launch: Launch) -> Iterator[Launch]:
        """Without the session, under any policy that asks for SEV-ES."""
        if launch.is_es or launch.digest is not None:
            for policy in _policies(launch):
                if policy & PolicyBit.ES:
                    yield launch._replace(key=Key.ZERO, policy=policy)

    def hashes(self, launch: Launch) -> Iterator[Launch]:
        """Kernel hashes off; or on, with anything on file, where none was expected."""
        if launch.digest is not None:
            return
        if launch.has_hashes:
            yield launch._replace(kernel=None, initrd=None, cmdline=None)
            return
        for _, kernel, initrd, cmdline in self._material.versions:
            if kernel is not None:
                yield launch._replace(kernel=kernel, initrd=initrd or NO_INITRD, cmdline=cmdline or hash_cmdline(None))
        initrds = (NO_INITRD, *self._material.initrds)
        cmdlines = (hash_cmdline(None), *self._material.cmdlines)
        for kernel, initrd, cmdline in islice(product(self._material.kernels, initrds, cmdlines), _MIXTURES_MAX):
            yield launch._replace(kernel=kernel, initrd=initrd, cmdline=cmdline)

    def kernel(self, launch: Launch) -> Iterator[Launch]:
        if launch.has_hashes:
            for kernel in self._material.kernels:
                if kernel != launch.kernel:
                    yield launch._replace(kernel=kernel)

    def initrd(self, launch: Launch) -> Iterator[Launch]:
        if launch.has_hashes:
            for initrd in (*self._material.initrds, NO_INITRD):
                if initrd != launch.initrd:
                    yield launch._replace(initrd=initrd)

    def cmdline(self, launch: Launch) -> Iterator[Launch]:
        """Another command line on file, a slip in the expected one, or none."""
        if launch.cmdline is None:
            return
        raw = self._material.cmdlines.get(launch.cmdline)
        slips = () if raw is None else tuple(digest for digest, _ in cmdline_slips(raw))
        for cmdline in (*self._material.cmdlines, *slips, hash_cmdline(None)):
            if cmdline != launch.cmdline:
                yield launch._replace(cmdline=cmdline)

    def firmware(self, launch: Launch) -> Iterator[Launch]:
        if launch.digest is None:
            for firmware in self._material.firmwares:
                if firmware != launch.firmware:
                    yield launch._replace(firmware=firmware)

    def whole_version(self, launch: Launch) -> Iterator[Launch]:
        """Every artefact of one label: beside the expected ones that it does not name, and without them."""
        if launch.digest is not None:
            return
        for firmware, kernel, initrd, cmdline in self._material.versions:
            changed = launch._replace(firmware=firmware or launch.firmware)
            if launch.has_hashes:
                yield changed._replace(
                    kernel=kernel or launch.kernel,
                    initrd=initrd or launch.initrd,
                    cmdline=cmdline or launch.cmdline,
                )
            if kernel is None:
                yield changed._replace(kernel=None, initrd=None, cmdline=None)
            else:
                yield changed._replace(kernel=kernel, initrd=initrd or NO_INITRD, cmdline=cmdline or hash_cmdline(None))

    def vcpus(self, launch: Launch) -> Iterator[Launch]:
        if launch.vcpus is not None:
            for vcpus in _nearest(launch.vcpus, range(1, VCPUS_MAX + 1)):
                yield launch._replace(vcpus=vcpus)

    def cpu(self, launch: Launch) -> Iterator[Launch]:
        if launch.is_es:
            for cpu in self._material.cpus:
                if cpu != launch.cpu:
                    yield launch._replace(cpu=cpu)

    def flavour(self, launch: Launch) -> Iterator[Launch]:
        if launch.is_es:
            for flavour in Flavour:
                if flavour is not launch.flavour:
                    yield launch._replace(flavour=flavour)

    def policy(self, launch: Launch) -> Iterator[Launch]:
        """Every combination of bits, with the API floor and without."""
        for policy in _policies(launch):
            yield from self._with_policy(launch, policy)

    def near_policy(self, launch: Launch) -> Iterator[Launch]:
        """One bit changed, or the API floor dropped."""
        for bit in PolicyBit:
            yield from self._with_policy(launch, launch.policy ^ bit)
        yield from self._with_policy(launch, launch.policy & ~_API_FLOOR)

    def _with_policy(self, launch: Launch, policy: int) -> Iterator[Launch]:
        if policy == launch.policy:
            return
        changed = launch._replace(policy=policy)
        if not policy & PolicyBit.ES:
            # No register page is measured then.
            yield changed._replace(vcpus=None, cpu=None, flavour=None)
        elif launch.is_es or launch.digest is not None:
            yield changed

    def version(self, launch: Launch) -> Iterator[Launch]:
        """Another build, minor or major number than the host reports: any of a byte's, the nearest first."""
        yield from self._with_versions(launch, build=_BYTE, minor=_BYTE, major=1)

    def near_version(self, launch: Launch) -> Iterator[Launch]:
        """A build or minor number close to the one that the host reports."""
        yield from self._with_versions(launch, build=_NEAR, minor=_NEAR, major=0)

    def _with_versions(self, launch: Launch, *, build: int, minor: int, major: int) -> Iterator[Launch]:
        version = launch.version
        candidates = (
            *(version._replace(build=number) for number in _around(version.build, build)),
            *(version._replace(api_minor=number) for number in _around(version.api_minor, minor)),
            *(version._replace(api_major=number) for number in _around(version.api_major, major)),
        )
        for candidate in candidates:
            if candidate[:2] >= MINIMUM_API:
                yield launch._replace(version=candidate)


def _policies(launch: Launch) -> Iterator[int]:
    """Every combination of the six bits: without an API floor, and with the launch's own."""
    for floor in (0, launch.policy & _API_FLOOR):
        for bits in range(_LOW_BITS + 1):
            yield floor | bits


def _around(value: int, distance: int) -> list[int]:
    """The other bytes that are no further than `distance` away, the nearest first."""
    return _nearest(value, range(max(value - distance, 0), min(value + distance, _BYTE) + 1))


def _nearest(value: int, numbers: range) -> list[int]:
    """The other numbers, the nearest first."""
    return sorted((number for number in numbers if number != value), key=lambda number: abs(number - value))
