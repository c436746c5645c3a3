"""What the firmware's codes mean to a caller."""

from __future__ import annotations

import pytest

from common.errors import PlatformFailed, Reason, Refused, SevattestError, exit_code
from common.sev.abi import Status
from host_agent.firmware_errors import (
    advice,
    find_firmware_error,
    firmware_failure,
    hypervisor_failure,
    printable,
    status_in,
)

VERDICTS = {
    Status.BAD_MEASUREMENT: Reason.FIRMWARE_BAD_MEASUREMENT,
    Status.POLICY_FAILURE: Reason.FIRMWARE_POLICY_FAILURE,
    Status.BAD_SIGNATURE: Reason.FIRMWARE_BAD_SIGNATURE,
}


@pytest.mark.parametrize("code", [*Status, 0x19, 0xFFFF])
def test_three_codes_are_verdicts_and_the_others_failures(code: int) -> None:
    error = firmware_failure(code, "LAUNCH_START")
    assert error.fields["fw_error"] == str(int(code))
    if code in VERDICTS:
        assert isinstance(error, Refused)
        assert error.reason is VERDICTS[Status(code)]
        assert exit_code(error) == 1
    else:
        assert isinstance(error, PlatformFailed)
        assert error.reason is Reason.FIRMWARE_FAILED
        assert exit_code(error) == 3


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("LAUNCH_START ret=1 fw_error=11 'Bad measurement'", 11),
        ("failed to inject secret ret=-5 fw_error=0x0b", 11),
        ("failed to initialize ret=-25 fw_error=0", None),
        ("no call fw_error=4294967295", None),
        ("fw_error=-1", None),
        ("fw_error=x", None),
        ("nothing", None),
        ("", None),
    ],
)
def test_a_firmware_status_is_found_in_qemus_words(text: str, code: int | None) -> None:
    assert find_firmware_error(text) == code


@pytest.mark.parametrize(
    ("words", "kind"),
    [("fw_error=7", Refused), ("fw_error=22", PlatformFailed), ("no", PlatformFailed), ("", PlatformFailed)],
)
def test_a_hypervisors_words_become_the_firmwares_error_or_its_own(words: str, kind: type[SevattestError]) -> None:
    error = hypervisor_failure("it died", words)
    assert isinstance(error, kind)
    assert "it died" in error.message


def test_words_from_outside_are_one_printable_line() -> None:
    assert printable("a\x00b\n\x1b[0m  c\u202e") == "a b [0m c"
    assert len(printable("x" * 10_000)) == 300


def test_every_status_has_its_advice_and_a_code_without_a_name_has_none() -> None:
    named = [status for status in Status if status is not Status.SUCCESS]
    assert [status for status in named if not advice(status)] == []
    assert len({advice(status) for status in named}) == len(named), "and its own"
    assert all(firmware_failure(status, "x").fields["hint"] == advice(status) for status in named)
    for code in (Status.SUCCESS, 0x19, 0x27, 0xFFFF):
        assert advice(code) is None
        assert "hint" not in firmware_failure(code, "x").fields


@pytest.mark.parametrize("code", Status)
def test_a_status_is_counted_by_its_name(code: Status) -> None:
    assert status_in(firmware_failure(code, "LAUNCH_START").fields) == code.name


@pytest.mark.parametrize("words", ["fw_error=25", "fw_error=0xfffe", "fw_error=9999999999"])
def test_a_number_that_a_machine_made_up_is_counted_as_other(words: str) -> None:
    assert status_in(hypervisor_failure("QEMU ended", words).fields) == "OTHER"


def test_where_the_firmware_said_nothing_no_status_is_counted() -> None:
    assert status_in(hypervisor_failure("QEMU ended", "fw_error=0").fields) == ""
