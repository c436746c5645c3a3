"""The filter's program, run by an interpreter of the three instructions that it has."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emulator.intercept.calls import NEVER, REQUESTS
from emulator.intercept.filter import INSTRUCTION, program

X86_64, I386 = 0xC000003E, 0x40000003
ALLOW, NOTIFY, PRETEND, NO_TTY = 0x7FFF0000, 0x7FC00000, 0x00050000, 0x00050019
OPEN, IOCTL, CREAT, PRCTL, OPENAT, OPENAT2 = 2, 16, 85, 157, 257, 437
X32 = 0x40000000
IOCTL_X32, IOCTL_I386 = X32 | 514, 54


def verdict(number: int, *arguments: int, arch: int = X86_64) -> int:
    """What the kernel would do with a system call."""
    registers = (*arguments, *[0] * (6 - len(arguments)))
    data = struct.pack("<iIQ6Q", number, arch, 0, *registers)
    code = list(INSTRUCTION.iter_unpack(program(REQUESTS, NEVER)))
    at = accumulator = 0
    while True:
        opcode, if_equal, if_not, value = code[at]
        at += 1
        if opcode == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, value)
        elif opcode == 0x15:
            at += if_equal if accumulator == value else if_not
        else:
            assert opcode == 0x06
            return int(value)


@pytest.mark.parametrize("number", [OPEN, CREAT, OPENAT, OPENAT2])
def test_opening_a_file_is_asked_about(number: int) -> None:
    assert verdict(number) == NOTIFY


@pytest.mark.parametrize("request_number", REQUESTS)
def test_the_requests_of_sev_are_asked_about_whatever_the_descriptor(request_number: int) -> None:
    assert verdict(IOCTL, 7, request_number) == NOTIFY
    assert verdict(IOCTL, 0xFFFFFFFF, request_number | 0xABCD << 32) == NOTIFY  # the kernel takes the low half
    assert verdict(IOCTL, 7, request_number ^ 1) == ALLOW
    assert verdict(IOCTL, request_number, 0) == ALLOW


SPECIAL = {OPEN, IOCTL, CREAT, PRCTL, OPENAT, OPENAT2, IOCTL_X32}


@given(
    number=st.integers(-(1 << 31), (1 << 31) - 1).filter(lambda n: n not in SPECIAL)
    | st.integers(0, 500).filter(lambda n: n not in SPECIAL)
)
def test_every_other_system_call_is_left_alone(number: int) -> None:
    assert verdict(number, 4, REQUESTS[0]) == ALLOW


@given(request_number=st.integers(0, (1 << 32) - 1).filter(lambda n: n not in REQUESTS))
def test_every_other_request_is_left_alone(request_number: int) -> None:
    assert verdict(IOCTL, 3, request_number) == ALLOW


def test_a_process_stays_readable_and_believes_that_it_is_not() -> None:
    assert verdict(PRCTL, 4, 0) == PRETEND
    assert verdict(PRCTL, 3) == ALLOW


@pytest.mark.parametrize(("number", "arch"), [(IOCTL_X32, X86_64), (IOCTL_I386, I386)], ids=["x32", "32 bits"])
def test_what_could_reach_a_real_psp_is_no_request_in_another_abi(number: int, arch: int) -> None:
    for request in NEVER:
        assert verdict(number, 7, request, arch=arch) == NO_TTY
        assert verdict(number, 7, request ^ 1, arch=arch) == ALLOW
        assert verdict(number, request, 0, arch=arch) == ALLOW
    for request in set(REQUESTS) - set(NEVER):
        assert verdict(number, 7, request, arch=arch) == ALLOW


@pytest.mark.parametrize("number", [OPEN, IOCTL, CREAT, PRCTL, OPENAT, OPENAT2])
def test_calls_of_another_abi_are_left_alone(number: int) -> None:
    assert verdict(number, 4, REQUESTS[0], arch=I386) == ALLOW
    assert verdict(number | X32, 4, REQUESTS[0]) == ALLOW
