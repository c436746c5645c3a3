"""A revocation: what the owner accepts no longer, checked at begin and at release (docs/revocations.md)."""

from __future__ import annotations

from dataclasses import dataclass

from common.sev.measurement import FirmwareVersion


@dataclass(frozen=True, kw_only=True)
class RevokedFirmware:
    """Firmware of one generation.

    Attributes:
        generation: its name.
        versions: exactly these.
        below: everything older than this; None for nothing.
    """

    generation: str
    versions: frozenset[FirmwareVersion]
    below: FirmwareVersion | None


@dataclass(frozen=True, kw_only=True)
class RevokedWorkload:
    """Versions of one workload.

    Attributes:
        name: the workload's.
        versions: these; None for all.
    """

    name: str
    versions: frozenset[str] | None


@dataclass(frozen=True, kw_only=True)
class Revocation:
    """One version of one Revocation document; every field is valid. Each part denies by itself.

    Attributes:
        name: the document's.
        version: compares in natural order; the newest is in force.
        sha256: of the document's text, lower-case hex.
        source: the document's file, or `applied`.
        why: the owner's words, for the owner's records.
        chips: chip ids, 128 lower-case hex digits.
        ceks: fingerprints of chips' keys (SHA-256 of the CEK's signed body), 64 lower-case hex digits.
        generations: names of generations.
        firmware: builds of firmware.
        ocas: fingerprints of platform owners' certificates, 64 lower-case hex digits.
        workloads: versions of workloads.
    """

    name: str
    version: str
    sha256: str
    source: str
    why: str
    chips: frozenset[str]
    ceks: frozenset[str]
    generations: frozenset[str]
    firmware: tuple[RevokedFirmware, ...]
    ocas: frozenset[str]
    workloads: tuple[RevokedWorkload, ...]
