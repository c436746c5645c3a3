"""The one error tree, and the reasons that its leaves carry.

Knows no gRPC: `common.rpc.status` maps classes to statuses, `orchestrator.cli` maps them to exit codes. A reason
belongs to exactly one class, so either side of a call can rebuild what the other raised.

    SevattestError
    ├── InvalidInput         the asker's: fix the request, the file or the configuration
    ├── Unauthenticated      the asker's: no usable identity
    ├── NotFound             the asker's: no such thing, or somebody else's
    ├── Refused              the answer is no: attestation, policy, signature or role
    ├── WrongState           not now: spent, expired, stale, not paused
    ├── LimitExceeded        not so many
    ├── Unavailable          a dependency has no answer; nothing was spent
    ├── PlatformFailed       firmware, hypervisor or our own defect
    └── OutcomeUnknown       the link broke mid-step: query before repeating

Messages start in lower case, end without a stop, and never hold a secret; data goes into `fields`.
"""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar


class Reason(StrEnum):
    """Why, as a stable name: `sevattest.v1.Reason` without its prefix (proto/sevattest/v1/reason.proto)."""

    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    MALFORMED = "MALFORMED"
    REQUEST_ID_REUSED = "REQUEST_ID_REUSED"
    DEADLINE_REQUIRED = "DEADLINE_REQUIRED"
    INVALID_CONFIGURATION = "INVALID_CONFIGURATION"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    ROLE_NOT_ALLOWED = "ROLE_NOT_ALLOWED"
    CALLER_NOT_ALLOWED = "CALLER_NOT_ALLOWED"
    NOT_FOUND = "NOT_FOUND"
    UNTRUSTED_ROOT = "UNTRUSTED_ROOT"
    BAD_SIGNATURE = "BAD_SIGNATURE"
    CEK_UNSIGNED = "CEK_UNSIGNED"
    CEK_MISMATCH = "CEK_MISMATCH"
    GENERATION_NOT_ALLOWED = "GENERATION_NOT_ALLOWED"
    CHIP_NOT_ALLOWED = "CHIP_NOT_ALLOWED"
    CHIP_REVOKED = "CHIP_REVOKED"
    FIRMWARE_TOO_OLD = "FIRMWARE_TOO_OLD"
    MEASUREMENT_REFUSED = "MEASUREMENT_REFUSED"
    REPORT_REFUSED = "REPORT_REFUSED"
    FIRMWARE_BAD_MEASUREMENT = "FIRMWARE_BAD_MEASUREMENT"
    FIRMWARE_POLICY_FAILURE = "FIRMWARE_POLICY_FAILURE"
    FIRMWARE_BAD_SIGNATURE = "FIRMWARE_BAD_SIGNATURE"
    WRONG_STATE = "WRONG_STATE"
    LAUNCH_EXPIRED = "LAUNCH_EXPIRED"
    ALREADY_RELEASED = "ALREADY_RELEASED"
    LAUNCH_REFUSED = "LAUNCH_REFUSED"
    LAUNCH_ABANDONED = "LAUNCH_ABANDONED"
    SESSION_STALE = "SESSION_STALE"
    GUEST_BUSY = "GUEST_BUSY"
    GUEST_NOT_PAUSED = "GUEST_NOT_PAUSED"
    GUEST_GONE = "GUEST_GONE"
    NO_SECRET_AREA = "NO_SECRET_AREA"  # noqa: S105 -- a reason's name
    SECRET_TOO_LARGE = "SECRET_TOO_LARGE"  # noqa: S105 -- a reason's name
    PACKET_DIFFERS = "PACKET_DIFFERS"
    CLOCK_SKEW = "CLOCK_SKEW"
    TOO_MANY_REQUESTS = "TOO_MANY_REQUESTS"
    TOO_MANY_LAUNCHES = "TOO_MANY_LAUNCHES"
    UNREACHABLE = "UNREACHABLE"
    KEY_SERVICE_UNAVAILABLE = "KEY_SERVICE_UNAVAILABLE"
    SECRET_UNAVAILABLE = "SECRET_UNAVAILABLE"  # noqa: S105 -- a reason's name
    STORE_UNAVAILABLE = "STORE_UNAVAILABLE"
    PLATFORM_UNAVAILABLE = "PLATFORM_UNAVAILABLE"
    FIRMWARE_FAILED = "FIRMWARE_FAILED"
    HYPERVISOR_FAILED = "HYPERVISOR_FAILED"
    INTERNAL = "INTERNAL"
    OUTCOME_UNKNOWN = "OUTCOME_UNKNOWN"
    GRANT_REQUIRED = "GRANT_REQUIRED"
    GRANT_SUSPENDED = "GRANT_SUSPENDED"
    GRANT_EXPIRED = "GRANT_EXPIRED"
    GRANT_NOT_YET_VALID = "GRANT_NOT_YET_VALID"
    GRANT_EXHAUSTED = "GRANT_EXHAUSTED"
    GRANT_BUSY = "GRANT_BUSY"
    GRANT_RATE_LIMITED = "GRANT_RATE_LIMITED"
    GRANT_AMBIGUOUS = "GRANT_AMBIGUOUS"
    HOST_NOT_IN_POOL = "HOST_NOT_IN_POOL"
    HOST_NOT_FOR_CALLER = "HOST_NOT_FOR_CALLER"
    PLATFORM_OWNER_NOT_ALLOWED = "PLATFORM_OWNER_NOT_ALLOWED"
    REVOKED = "REVOKED"
    PDH_PREDATES_FIRMWARE = "PDH_PREDATES_FIRMWARE"
    KEY_UNAVAILABLE = "KEY_UNAVAILABLE"
    DOCUMENT_CONFLICT = "DOCUMENT_CONFLICT"
    TOO_MANY_REFUSALS = "TOO_MANY_REFUSALS"
    DOCUMENTS_NOT_SEALED = "DOCUMENTS_NOT_SEALED"
    LAUNCH_ALTERED = "LAUNCH_ALTERED"


class SevattestError(Exception):
    """Everything that sevattest raises on purpose.

    Attributes:
        reason: why, stable.
        message: a sentence for people, without secrets.
        fields: data beside the sentence (`audit_id`, `launch_id`, `fw_error`, …), without secrets.
        problems: all that is wrong, a sentence each, where that is more than one thing.
    """

    reasons: ClassVar[frozenset[Reason]] = frozenset()
    exit_code: ClassVar[int] = 3
    problems: tuple[str, ...] = ()

    def __init__(self, reason: Reason, message: str, **fields: str) -> None:
        if reason not in self.reasons:
            raise ValueError(f"{reason} is not a reason for {type(self).__name__}")
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.fields = fields

    @property
    def sentences(self) -> tuple[str, ...]:
        """What to tell people, a line each; more than the message where several things are wrong at once."""
        return self.problems or (self.message,)


class InvalidInput(SevattestError):
    """The request, file or configuration is not usable as it is."""

    reasons = frozenset(
        {
            Reason.INVALID_ARGUMENT,
            Reason.MALFORMED,
            Reason.REQUEST_ID_REUSED,
            Reason.DEADLINE_REQUIRED,
            Reason.INVALID_CONFIGURATION,
            Reason.GRANT_AMBIGUOUS,
        }
    )
    exit_code = 2


class Unauthenticated(SevattestError):
    """The caller shows no identity that can be used."""

    reasons = frozenset({Reason.UNAUTHENTICATED})
    exit_code = 1


class NotFound(SevattestError):
    """There is no such thing, or it belongs to somebody else: the two are told apart by nobody."""

    reasons = frozenset({Reason.NOT_FOUND})
    exit_code = 2


class Refused(SevattestError):
    """Attestation, policy, a signature or the caller's role says no."""

    reasons = frozenset(
        {
            Reason.ROLE_NOT_ALLOWED,
            Reason.CALLER_NOT_ALLOWED,
            Reason.UNTRUSTED_ROOT,
            Reason.BAD_SIGNATURE,
            Reason.CEK_UNSIGNED,
            Reason.CEK_MISMATCH,
            Reason.GENERATION_NOT_ALLOWED,
            Reason.CHIP_NOT_ALLOWED,
            Reason.CHIP_REVOKED,
            Reason.FIRMWARE_TOO_OLD,
            Reason.MEASUREMENT_REFUSED,
            Reason.REPORT_REFUSED,
            Reason.FIRMWARE_BAD_MEASUREMENT,
            Reason.FIRMWARE_POLICY_FAILURE,
            Reason.FIRMWARE_BAD_SIGNATURE,
            Reason.GRANT_REQUIRED,
            Reason.GRANT_SUSPENDED,
            Reason.GRANT_EXPIRED,
            Reason.GRANT_NOT_YET_VALID,
            Reason.GRANT_EXHAUSTED,
            Reason.HOST_NOT_IN_POOL,
            Reason.HOST_NOT_FOR_CALLER,
            Reason.PLATFORM_OWNER_NOT_ALLOWED,
            Reason.REVOKED,
            Reason.PDH_PREDATES_FIRMWARE,
        }
    )
    exit_code = 1


class WrongState(SevattestError):
    """The thing is not in a state that allows this step."""

    reasons = frozenset(
        {
            Reason.WRONG_STATE,
            Reason.LAUNCH_EXPIRED,
            Reason.ALREADY_RELEASED,
            Reason.LAUNCH_REFUSED,
            Reason.LAUNCH_ABANDONED,
            Reason.SESSION_STALE,
            Reason.GUEST_BUSY,
            Reason.GUEST_NOT_PAUSED,
            Reason.GUEST_GONE,
            Reason.NO_SECRET_AREA,
            Reason.SECRET_TOO_LARGE,
            Reason.PACKET_DIFFERS,
            Reason.CLOCK_SKEW,
            Reason.DOCUMENT_CONFLICT,
            Reason.LAUNCH_ALTERED,
        }
    )
    exit_code = 1


class LimitExceeded(SevattestError):
    """The caller asks for too much at once."""

    reasons = frozenset(
        {
            Reason.TOO_MANY_REQUESTS,
            Reason.TOO_MANY_LAUNCHES,
            Reason.GRANT_BUSY,
            Reason.GRANT_RATE_LIMITED,
            Reason.TOO_MANY_REFUSALS,
        }
    )


class Unavailable(SevattestError):
    """Something that is needed has no answer; nothing was spent, asking again is safe."""

    reasons = frozenset(
        {
            Reason.UNREACHABLE,
            Reason.KEY_SERVICE_UNAVAILABLE,
            Reason.SECRET_UNAVAILABLE,
            Reason.STORE_UNAVAILABLE,
            Reason.PLATFORM_UNAVAILABLE,
            Reason.KEY_UNAVAILABLE,
            Reason.DOCUMENTS_NOT_SEALED,
        }
    )


class PlatformFailed(SevattestError):
    """The firmware, the hypervisor or sevattest itself failed."""

    reasons = frozenset({Reason.FIRMWARE_FAILED, Reason.HYPERVISOR_FAILED, Reason.INTERNAL})


class OutcomeUnknown(SevattestError):
    """The link broke in the middle of a step that cannot be taken back: query the state before repeating it."""

    reasons = frozenset({Reason.OUTCOME_UNKNOWN})
    exit_code = 4


LEAVES: tuple[type[SevattestError], ...] = (
    InvalidInput,
    Unauthenticated,
    NotFound,
    Refused,
    WrongState,
    LimitExceeded,
    Unavailable,
    PlatformFailed,
    OutcomeUnknown,
)
CLASS_OF: dict[Reason, type[SevattestError]] = {reason: leaf for leaf in LEAVES for reason in leaf.reasons}

# Something changed under the launch or the machine ended: not a verdict, although the state is wrong.
_FAILURES = frozenset({Reason.SESSION_STALE, Reason.GUEST_GONE, Reason.CLOCK_SKEW, Reason.LAUNCH_ALTERED})


def exit_code(error: SevattestError) -> int:
    """The exit code that a command ends with: 1 refused, 2 bad input, 3 failed, 4 outcome unknown."""
    return 3 if error.reason in _FAILURES else type(error).exit_code


def rebuild(reason: str, message: str, fields: dict[str, str]) -> SevattestError | None:
    """The error that a peer raised, from what it sent; None for a reason that this version does not know."""
    known = known_reason(reason)
    return None if known is None else CLASS_OF[known](known, message, **fields)


def known_reason(name: str | None) -> Reason | None:
    """The reason of this name; None for none, and for one that only a newer peer or replica knows."""
    try:
        return None if name is None else Reason(name)
    except ValueError:
        return None
