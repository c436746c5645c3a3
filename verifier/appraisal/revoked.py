"""What the owner's revocations say of a launch: all of them joined, or one of them against a past launch.

Chips are told apart from the rest, because a chip is also denied by the configuration's list and by the published ones
(`verifier.launches.platforms.DenyList`), which know the fingerprints behind chip ids.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from common.errors import Reason
from common.sev.measurement import FirmwareVersion
from verifier.appraisal.evidence import Finding
from verifier.documents.revocation import Revocation
from verifier.documents.workload import among


class LaunchView(Protocol):
    """What revocations look at in a launch; `verifier.store.rows.LaunchRow` is this."""

    @property
    def generation(self) -> str:
        """The platform's."""
        ...

    @property
    def fingerprint(self) -> str:
        """Of the chip's key, lower-case hex."""
        ...

    @property
    def chip_id(self) -> str | None:
        """Lower-case hex, where the host gave one."""
        ...

    @property
    def oca(self) -> str:
        """Fingerprint of the platform owner's certificate, lower-case hex."""
        ...

    @property
    def workload(self) -> str:
        """Its name."""
        ...

    @property
    def workload_version(self) -> str:
        """Its version."""
        ...

    @property
    def firmware(self) -> tuple[int, int, int] | None:
        """The firmware's version; None where none is known yet."""
        ...


@dataclass(frozen=True, kw_only=True)
class Revocations:
    """All revocations in force, each with a say of its own.

    Attributes:
        documents: the revocations.
    """

    documents: tuple[Revocation, ...] = ()

    @property
    def chips(self) -> frozenset[str]:
        """CEK fingerprints and chip ids, as `DenyList.set_owners` takes them."""
        return frozenset().union(*(each.chips | each.ceks for each in self.documents))

    def against_chip(self, fingerprint: str, chip_id: str | None) -> str | None:
        """Why a chip is revoked, for the owner; None where it is not.

        Args:
            fingerprint: of its CEK, lower-case hex.
            chip_id: lower-case hex, where the host gives one.
        """
        for each in self.documents:
            if fingerprint in each.ceks or (chip_id is not None and chip_id in each.chips):
                return _words(each, "the chip")
        return None

    def against_rest(
        self,
        *,
        generation: str,
        oca: str,
        workload: str,
        workload_version: str,
        firmware: FirmwareVersion | None = None,
    ) -> str | None:
        """Why anything but the chip is revoked, for the owner; None where nothing is.

        Args:
            generation: the platform's.
            oca: fingerprint of the platform owner's certificate, lower-case hex.
            workload: its name.
            workload_version: the version that is, or was, launched.
            firmware: where it is proven; None where it is not, and then no firmware counts as revoked.
        """
        for each in self.documents:
            if generation in each.generations:
                return _words(each, f"generation {generation}")
            if oca in each.ocas:
                return _words(each, f"platform owner {oca}")
            if any(
                workload == one.name and (one.versions is None or among(workload_version, one.versions))
                for one in each.workloads
            ):
                return _words(each, f"workload {workload} {workload_version}")
            if firmware is not None and _revokes_firmware(each, generation, firmware):
                return _words(each, f"firmware {firmware} on {generation}")
        return None


def impact(revocation: Revocation, launch: LaunchView) -> Finding | None:
    """What a revocation says, or would have said, of a launch: a finding of the rule that would refuse it at release.

    A launch whose firmware is not known yet is not touched by revoked firmware.
    """
    one = Revocations(documents=(revocation,))
    if (message := one.against_chip(launch.fingerprint, launch.chip_id)) is not None:
        return Finding(rule="launch.chip_revoked", reason=Reason.CHIP_REVOKED, message=message)
    message = one.against_rest(
        generation=launch.generation,
        oca=launch.oca,
        workload=launch.workload,
        workload_version=launch.workload_version,
        firmware=None if launch.firmware is None else FirmwareVersion(*launch.firmware),
    )
    return None if message is None else Finding(rule="launch.revoked", reason=Reason.REVOKED, message=message)


def join(revocations: Iterable[Revocation]) -> Revocations:
    """All of them as one value, by name, so that it does not matter where they came from."""
    return Revocations(documents=tuple(sorted(revocations, key=lambda each: each.name)))


def _revokes_firmware(revocation: Revocation, generation: str, firmware: FirmwareVersion) -> bool:
    return any(
        generation == one.generation and (firmware in one.versions or (one.below is not None and firmware < one.below))
        for one in revocation.firmware
    )


def _words(revocation: Revocation, what: str) -> str:
    return f"revocation {revocation.name} {revocation.version}: {what}: {revocation.why}"
