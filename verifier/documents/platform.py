"""A platform that the owner knows: its chip, its pools, and the callers that may use it (docs/platforms.md)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class KnownPlatform:
    """One version of one Platform document; every field is valid.

    Attributes:
        name: what grants name.
        version: compares in natural order; the newest is in force.
        sha256: of the document's text, lower-case hex.
        source: the document's file, or `applied`.
        fingerprint: of its chip's key (SHA-256 of the CEK's signed body), lower-case hex; no two documents in
            force name the same.
        pools: names of the pools that it is in.
        callers: SPIFFE ids of those that may launch on it; None for everybody whom a workload or grant allows.
        oca: SHA-256 of its owner's certificate body, lower-case hex; None where it does not matter.
    """

    name: str
    version: str
    sha256: str
    source: str
    fingerprint: str
    pools: frozenset[str]
    callers: frozenset[str] | None
    oca: str | None
