"""A workload: what may run, on which platforms, for whom, and which secrets it gets (docs/workload.md).

Values only: `verifier.documents.reader` makes them from a document's text, and whatever it makes is valid.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal
from uuid import UUID

from common.sev.abi import PACKET_MAX_SIZE, PolicyBit
from common.sev.digest.cpus import CpuType
from common.sev.digest.vmsa import Flavour
from common.sev.measurement import FirmwareVersion
from common.sev.policy import GuestPolicy
from common.sev.secret import SecretEntry, build_table
from common.versions import version_order
from verifier.documents.sources import Source

DIGESTS_MAX = 512  # decisions.md 5: the list that is frozen for each launch
SECRET_AREA_DEFAULT = 0xC00  # what OvmfPkg/AmdSev reserves; listed digests say nothing of the firmware's own

# What a guest without listed secrets gets: 32 random bytes, made for each launch, that only an attested guest can know.
ATTESTED_GUID = UUID("47949596-8327-4686-b9d5-318339dc2596")
ATTESTED_SIZE = 32

# Whose platforms are allowed: anybody's, nobody's (the firmware made the owner's certificate), or those of the owners
# whose certificates have these fingerprints (lower-case hex).
Ownership = Literal["any", "self"] | frozenset[str]


@dataclass(frozen=True, kw_only=True)
class Artefacts:
    """Files to measure, and the shapes in which they may be launched.

    Attributes:
        firmware: the image in pflash unit 0.
        kernel: booted directly; with it, the hashes of all three are measured.
        initrd: beside the kernel.
        cmdline: beside the kernel, as bytes, verbatim.
        vcpus: allowed numbers of vCPUs; empty for plain SEV.
        cpus: allowed CPU types; empty for plain SEV.
        flavours: allowed kinds of register pages; empty for plain SEV.
    """

    firmware: Path
    kernel: Path | None
    initrd: Path | None
    cmdline: bytes | None
    vcpus: tuple[int, ...]
    cpus: tuple[CpuType, ...]
    flavours: tuple[Flavour, ...]

    @property
    def files(self) -> tuple[Path, ...]:
        """All files, firmware first."""
        return tuple(path for path in (self.firmware, self.kernel, self.initrd) if path is not None)


@dataclass(frozen=True, kw_only=True)
class ListedDigest:
    """A launch digest that the owner computed elsewhere.

    Attributes:
        digest: 32 bytes.
        label: what the owner calls it.
    """

    digest: bytes
    label: str


@dataclass(frozen=True, kw_only=True)
class SecretSpec:
    """One secret to release.

    Attributes:
        guid: its name in the guest.
        source: where it is read from at release, or how it is made for the launch.
        trailing_nul: whether a NUL is added, as GRUB wants it for a disk's passphrase.
    """

    guid: UUID
    source: Source
    trailing_nul: bool = False

    def entry(self, data: bytes) -> SecretEntry:
        """The table entry for the secret's bytes."""
        return SecretEntry(guid=self.guid, data=data + b"\0" if self.trailing_nul else data)

    def data(self, entry: SecretEntry) -> bytes:
        """The secret's bytes in its table entry."""
        return entry.data[:-1] if self.trailing_nul else entry.data


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One version of one workload; every field is valid.

    Attributes:
        name: what `BeginLaunch` asks for.
        version: compares in natural order; the newest is in force.
        sha256: of the document's text, lower-case hex: what receipts name.
        source: the document's file, for logs.
        callers: SPIFFE ids of the orchestrators that may launch it without a grant; may be empty.
        artefacts: files to measure; None where digests are listed.
        digests: listed digests; empty where artefacts are measured.
        secret_area: bytes that listed digests' firmware reserves for secrets; None where artefacts are measured.
        bits: flags of the guest policy.
        minimum_api: lowest API for the policy beside the floor's own; None writes no API into the policy.
        generations: allowed generations.
        chips: allowed chips by fingerprint (lower-case hex); None allows any.
        ownership: whose platforms are allowed.
        floors: for each allowed generation, the oldest accepted firmware.
        accept_old_firmware: the owner's reason to go below the table; None where it is kept.
        secrets: what is released; at least one.
        lifetime: from begin until a measurement may come.
        risks: what the document accepts beyond the defaults, for receipts.
        warnings: what deserves a second look, for the log and `check-config`.
    """

    name: str
    version: str
    sha256: str
    source: str
    callers: frozenset[str]
    artefacts: Artefacts | None
    digests: tuple[ListedDigest, ...]
    secret_area: int | None
    bits: PolicyBit
    minimum_api: tuple[int, int] | None
    generations: frozenset[str]
    chips: frozenset[str] | None
    ownership: Ownership
    floors: Mapping[str, FirmwareVersion]
    accept_old_firmware: str | None
    secrets: tuple[SecretSpec, ...]
    lifetime: timedelta
    risks: tuple[str, ...]
    warnings: tuple[str, ...]

    def guest_policy(self, generation: str) -> GuestPolicy:
        """The policy that a guest on this generation is started with."""
        if self.minimum_api is None:
            return GuestPolicy.build(self.bits)
        return GuestPolicy.build(self.bits, max(self.minimum_api, self.floors[generation][:2]))

    def table_size(self, sizes: Sequence[int]) -> int:
        """Bytes of the secret table, given each secret's size in the order of `secrets`.

        A secret that no packet could hold counts as one that just does not fit, so that a disk image in a secret's
        place takes no memory.
        """
        capped = (min(size, PACKET_MAX_SIZE) for size in sizes)
        return len(build_table([s.entry(bytes(n)) for s, n in zip(self.secrets, capped, strict=True)]))


def among(version: str, versions: Iterable[str]) -> bool:
    """Whether a version is one of these, however it is spelled: `1.0` and `1.00` are one."""
    return version_order(version) in {version_order(each) for each in versions}
