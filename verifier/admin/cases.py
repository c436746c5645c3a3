"""What a simulation judges: a launch of the past by its own evidence, or one that nobody began."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from datetime import UTC, datetime
from uuid import UUID

from common.sev.certs.verify import VerifiedPlatform
from common.sev.measurement import FirmwareVersion
from verifier.appraisal.evidence import Finding
from verifier.documents.grant import Grant
from verifier.documents.workload import Workload
from verifier.launches.state import State
from verifier.store.rows import LaunchRow

_NEVER = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, kw_only=True)
class Supposed:
    """A launch that nobody began.

    Attributes:
        workload: the workload's name.
        caller: a SPIFFE id.
        grant: the grant; None to have one chosen as at begin.
        chain: the platform's, 8336 bytes.
        digest: that would be measured, 32 bytes; None for the first that the workload allows.
    """

    workload: str
    caller: str
    grant: str | None
    chain: bytes = field(repr=False)
    digest: bytes | None


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What became of it.

    Attributes:
        findings: all that speaks against it, in the order in which begin and release ask.
        workload_version: the version that it was judged by; None where there is none.
        grant: the grant that it would spend; None for none.
    """

    findings: tuple[Finding, ...]
    workload_version: str | None
    grant: str | None

    @property
    def accepted(self) -> bool:
        """Whether the secrets would be released."""
        return not self.findings


@dataclass(frozen=True, kw_only=True)
class Case:
    """One launch to judge.

    Attributes:
        workload: its name.
        caller: SPIFFE id.
        grant: that is named.
        chain: of the platform.
        chip_id: 64 bytes, or empty where no host gave one.
        digest: that was proven, or is supposed.
        first_digest: whether to suppose the first that the workload allows.
        firmware: the firmware's version, where one is proven or supposed.
    """

    workload: str
    caller: str
    grant: str | None
    chain: bytes = field(repr=False)
    chip_id: bytes
    digest: bytes | None
    first_digest: bool
    firmware: FirmwareVersion | None


def past_case(row: LaunchRow, chain: bytes, firmware: FirmwareVersion | None) -> Case:
    """A launch of the past.

    Args:
        row: the launch.
        chain: of its platform, 8336 bytes.
        firmware: to suppose in place of the launch's own; None to keep that, which is proven only if it was released.
    """
    released = row.state == State.RELEASED
    proven = FirmwareVersion(*row.firmware) if released and row.firmware is not None else None
    return Case(
        workload=row.workload,
        caller=row.caller,
        grant=row.grant,
        chain=chain,
        chip_id=bytes.fromhex(row.chip_id or ""),
        digest=row.digest if released else None,
        first_digest=False,
        firmware=firmware or proven,
    )


def supposed_case(launch: Supposed, firmware: FirmwareVersion | None) -> Case:
    """A launch that nobody began."""
    return Case(
        workload=launch.workload,
        caller=launch.caller,
        grant=launch.grant,
        chain=launch.chain,
        chip_id=b"",
        digest=launch.digest,
        first_digest=launch.digest is None,
        firmware=firmware,
    )


def supposed_row(case: Case, platform: VerifiedPlatform, workload: Workload, grant: Grant | None) -> LaunchRow:
    """The launch as it would stand in the store, as far as release looks at it."""
    chain = platform.chain.to_bytes()
    return LaunchRow(
        launch_id=UUID(int=0),
        caller=case.caller,
        state=State.OPEN.value,
        workload=workload.name,
        workload_version=workload.version,
        terms_id=b"",
        platform_id=hashlib.sha256(chain).digest(),
        generation=platform.generation,
        fingerprint=platform.chip_fingerprint.hex(),
        policy=0,
        godh=b"",
        session=b"",
        pdh_fingerprint=platform.pdh_fingerprint,
        keys=None,
        create_time=_NEVER,
        expire_time=_NEVER,
        grant=case.grant if grant is None else grant.name,
        chip_id=case.chip_id.hex() or None,
        oca=platform.chain.oca.fingerprint.hex(),
    )
