"""Reference values: the launch digests that a workload allows, and the terms that are frozen when a launch begins.

The terms are everything that release decides by, taken from the owner's document at begin and never looked up again:
what the document says later, and whatever the host says, changes nothing for a launch that has begun. They are stored
by their SHA-256, so that launches under the same terms share them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from uuid import UUID

import msgspec

from common.sev.digest.compute import LaunchShape, MeasuredFirmware
from common.sev.digest.kernel_hashes import KernelHashes
from common.sev.measurement import FirmwareVersion
from common.sev.policy import GuestPolicy
from verifier.documents.generations import GENERATIONS
from verifier.documents.sources import Source
from verifier.documents.workload import Artefacts, ListedDigest, SecretSpec, Workload


class Reference(msgspec.Struct, frozen=True, kw_only=True):
    """One launch digest that is accepted.

    Attributes:
        digest: 32 bytes.
        vcpus: number of vCPUs; None where it is not measured or not known.
        cpu: CPU type; None in the same cases.
        flavour: how the register pages are made; None in the same cases.
        label: the owner's name for a listed digest.
    """

    digest: bytes
    vcpus: int | None = None
    cpu: str | None = None
    flavour: str | None = None
    label: str | None = None


class SecretTerms(msgspec.Struct, frozen=True, kw_only=True):
    """One secret to release: which, from where, not what. Members as in `SecretSpec`."""

    guid: UUID
    source: Source
    trailing_nul: bool


class Terms(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """What was frozen for a launch. Launches share them, so what follows from them is kept.

    Attributes:
        workload: the workload's name.
        version: its version.
        document: SHA-256 of the document's text, lower-case hex.
        generation: the platform's.
        policy: the guest policy's word.
        floor: the oldest accepted firmware.
        secret_area: bytes that the guest's firmware reserves for secrets; 0 for none.
        plain_sev: whether vCPUs and CPU go unmeasured.
        references: what is accepted.
        secrets: what is released.
        notes: what the owner accepts with this launch, for the receipt.
        recognized: the owner named this very chip, in the workload or in a Platform document.
    """

    workload: str
    version: str
    document: str
    generation: str
    policy: int
    floor: tuple[int, int, int]
    secret_area: int
    plain_sev: bool
    references: tuple[Reference, ...]
    secrets: tuple[SecretTerms, ...]
    notes: tuple[str, ...]
    recognized: bool

    @cached_property
    def guest_policy(self) -> GuestPolicy:
        """The policy as a value."""
        return GuestPolicy.parse(self.policy)

    @cached_property
    def firmware_floor(self) -> FirmwareVersion:
        """The floor as a value."""
        return FirmwareVersion(*self.floor)

    @cached_property
    def digests(self) -> tuple[bytes, ...]:
        """The accepted launch digests."""
        return tuple(reference.digest for reference in self.references)

    @cached_property
    def secret_specs(self) -> tuple[SecretSpec, ...]:
        """The secrets as the sources want them."""
        return tuple(
            SecretSpec(guid=secret.guid, source=secret.source, trailing_nul=secret.trailing_nul)
            for secret in self.secrets
        )

    @cached_property
    def encoded(self) -> tuple[bytes, bytes]:
        """SHA-256 and bytes of the terms, as they are stored."""
        body = msgspec.json.encode(self)
        return hashlib.sha256(body).digest(), body


def decode_terms(body: bytes) -> Terms:
    """The terms that were stored."""
    return msgspec.json.decode(body, type=Terms)


def shapes(
    artefacts: Artefacts, firmware: MeasuredFirmware, kernel: bytes | None, initrd: bytes | None
) -> tuple[LaunchShape, ...]:
    """Every shape that a workload allows: vCPU counts by CPU types by flavours, or the one shape of plain SEV.

    Args:
        artefacts: what the document says.
        firmware: the measured image.
        kernel: SHA-256 of the kernel, None where none is booted directly.
        initrd: SHA-256 of the initrd, None where there is none.

    Raises:
        InvalidInput: the firmware does not fit to what is asked of it.
    """
    hashes = None if kernel is None else KernelHashes.of(kernel, initrd, artefacts.cmdline)
    if not artefacts.vcpus:
        return (LaunchShape(firmware=firmware, hashes=hashes),)
    return tuple(
        LaunchShape(firmware=firmware, hashes=hashes, vcpus=vcpus, cpu=cpu, flavour=flavour)
        for vcpus in artefacts.vcpus
        for cpu in artefacts.cpus
        for flavour in artefacts.flavours
    )


def measured_references(allowed: Sequence[LaunchShape]) -> tuple[Reference, ...]:
    """The launch digest of every shape; of two shapes with one digest, the first."""
    references: dict[bytes, Reference] = {}
    for shape in allowed:
        digest = shape.digest()
        reference = Reference(
            digest=digest,
            vcpus=shape.vcpus,
            cpu=None if shape.cpu is None else shape.cpu.name,
            flavour=None if shape.flavour is None else shape.flavour.value,
        )
        references.setdefault(digest, reference)
    return tuple(references.values())


def listed_references(digests: Sequence[ListedDigest]) -> tuple[Reference, ...]:
    """The launch digests that the owner listed."""
    return tuple(Reference(digest=each.digest, label=each.label) for each in digests)


def freeze(
    workload: Workload, *, generation: str, references: tuple[Reference, ...], secret_area: int, recognized: bool
) -> Terms:
    """The terms of a launch of `workload` on a platform of `generation`, which the workload allows."""
    policy = workload.guest_policy(generation)
    return Terms(
        workload=workload.name,
        version=workload.version,
        document=workload.sha256,
        generation=generation,
        policy=policy.value,
        floor=workload.floors[generation],
        secret_area=secret_area,
        plain_sev=not policy.requires_es,
        references=references,
        secrets=tuple(
            SecretTerms(guid=secret.guid, source=secret.source, trailing_nul=secret.trailing_nul)
            for secret in workload.secrets
        ),
        notes=(*workload.risks, *GENERATIONS[generation].risks),
        recognized=recognized,
    )
