"""The error tree: every reason has one class, and the wire's enum says the same as the code's."""

import pytest

from common.errors import CLASS_OF, LEAVES, Reason, Refused, exit_code, known_reason, rebuild
from sevattest.v1 import reason_pb2


def test_every_reason_belongs_to_exactly_one_class() -> None:
    assert set(CLASS_OF) == set(Reason)
    assert sum(len(leaf.reasons) for leaf in LEAVES) == len(Reason)


def test_the_reasons_of_the_wire_are_the_reasons_of_the_code() -> None:
    wire = {name.removeprefix("REASON_") for name in reason_pb2.Reason.keys()}  # noqa: SIM118 -- not a dict
    assert wire == {reason.value for reason in Reason} | {"UNSPECIFIED"}


def test_a_reason_of_another_class_is_refused_where_it_is_raised() -> None:
    with pytest.raises(ValueError, match="NOT_FOUND is not a reason for Refused"):
        Refused(Reason.NOT_FOUND, "no")


@pytest.mark.parametrize("reason", Reason)
def test_a_peer_rebuilds_the_error_that_was_raised(reason: Reason) -> None:
    error = rebuild(reason.value, "a sentence", {"audit_id": "7"})
    assert error is not None
    assert type(error) is CLASS_OF[reason]
    assert (error.reason, error.message, error.fields) == (reason, "a sentence", {"audit_id": "7"})


def test_a_reason_of_a_newer_peer_is_not_guessed() -> None:
    assert rebuild("SOMETHING_NEW", "a sentence", {}) is None
    assert known_reason("SOMETHING_NEW") is None
    assert known_reason(None) is None


@pytest.mark.parametrize("reason", Reason)
def test_a_reason_is_known_by_its_name(reason: Reason) -> None:
    assert known_reason(reason.value) is reason


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        (Reason.MEASUREMENT_REFUSED, 1),
        (Reason.FIRMWARE_BAD_MEASUREMENT, 1),
        (Reason.ALREADY_RELEASED, 1),
        (Reason.MALFORMED, 2),
        (Reason.NOT_FOUND, 2),
        (Reason.SESSION_STALE, 3),
        (Reason.GUEST_GONE, 3),
        (Reason.FIRMWARE_FAILED, 3),
        (Reason.UNREACHABLE, 3),
        (Reason.OUTCOME_UNKNOWN, 4),
    ],
)
def test_exit_codes_tell_refusal_from_failure(reason: Reason, code: int) -> None:
    error = rebuild(reason.value, "a sentence", {})
    assert error is not None
    assert exit_code(error) == code
