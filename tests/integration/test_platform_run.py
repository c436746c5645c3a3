"""`platform run`: /dev/sev under unmodified programs. Every rule of the kernel's driver, asked by raw system calls."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from emulator.faults import Fault, Faults
from tests.support import sev_programs
from tests.support.nobody import NOBODY, copy_ours, nobodys_python, public_folder
from tests.support.platform import Platform, give_chip, platform_in_thread, running_platform
from tests.support.raw_sev import CSR, EXPORT, GET_ID, IMPORT, PDH_GEN, PEK_GEN, STATUS, UNTOUCHED
from tests.support.sev_host import ask_device
from tests.support.under import TIMEOUT, program_of, run_words, under

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or os.uname().machine != "x86_64", reason="seccomp filters are written for x86-64 Linux"
)
NOT_ASKED = UNTOUCHED  # the firmware's status where it was not called


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Platform]:
    """One that is not initialised."""
    with running_platform(tmp_path / "p", options=["--no-init"]) as served:
        yield served


def test_every_command_answers_what_the_device_socket_does(platform: Platform) -> None:
    seen = under(platform, sev_programs.answers)
    status = ask_device(platform, STATUS, b"")
    export = ask_device(platform, EXPORT, struct.pack("<II", 2084, 6252))[8:]
    csr = ask_device(platform, CSR, struct.pack("<I", 2084))[4:]
    ids = ask_device(platform, GET_ID, b"")
    contents = [status, export[:2084], export[2084:], csr, ids, ids[:64]]
    assert seen["contents"] == [content.hex() for content in contents]
    assert seen["said"] == [["ok", 0], ["ok", 0, 2084, 6252], ["ok", 0, 2084], ["ok", 0], ["ok", 0, 64]]
    assert csr[1044:] == (struct.pack("<II", 0x1000, 0) + bytes(512)) * 2


def test_a_buffer_that_is_missing_or_too_small_is_told_its_length(platform: Platform) -> None:
    seen = under(platform, sev_programs.lengths)
    assert seen["export"] == [["EIO", 4, 2084, 6252]] * 7
    assert seen["csr"] == [["EIO", 4, 2084]] * 4
    assert seen["id"] == [["EIO", 4, 64]] * 4
    assert seen["untouched"]
    assert seen["large"] == [["ok", 0, 2084, 6252], ["ok", 0, 2084], ["ok", 0, 128]]


def test_bad_pointers_lengths_and_commands_are_the_kernels_errors(platform: Platform) -> None:
    before = ask_device(platform, EXPORT, struct.pack("<II", 2084, 6252))
    seen = under(platform, sev_programs.bad_arguments)
    not_asked = ["EFAULT", NOT_ASKED]
    assert seen["argument"] == ["EFAULT"] * 3
    assert seen["read-only argument"] == "EFAULT"
    assert seen["data"] == [["EFAULT", 0], not_asked, not_asked, not_asked, ["EFAULT", 0], not_asked]
    assert seen["read-only data"] == ["EFAULT", 4]
    assert seen["destinations"] == [["EFAULT", 0]] * 4
    assert seen["sources"] == [not_asked] * 2
    assert seen["too long"] == [not_asked] * 3
    assert seen["import"] == [["EINVAL", NOT_ASKED]] * 6
    assert seen["junk"] == ["EIO", 6]
    assert seen["unknown"] == [["EINVAL", NOT_ASKED]] * 6
    assert ask_device(platform, EXPORT, struct.pack("<II", 2084, 6252)) == before


def test_a_descriptor_that_may_not_write_changes_nothing(platform: Platform) -> None:
    seen = under(platform, sev_programs.read_only)
    assert seen["changers"] == [["EPERM", NOT_ASKED]] * 7
    assert (seen["state"], seen["export"], seen["write-only"]) == (1, ["ok", 0], ["ok", 0])


def test_a_descriptor_that_may_not_write_does_not_initialise_the_platform_either(fresh: Platform) -> None:
    seen = under(fresh, sev_programs.read_only)
    assert (seen["state"], seen["export"]) == (0, ["EPERM", NOT_ASKED])
    assert seen["write-only"] == ["ok", 0]


def test_what_needs_an_initialised_platform_initialises_it(fresh: Platform) -> None:
    for command, said in (
        (STATUS, ["ok", 0]),
        (GET_ID, ["ok", 0]),
        (PEK_GEN, ["ok", 0]),
        (PDH_GEN, ["ok", 0]),
        (CSR, ["ok", 0]),
        (EXPORT, ["ok", 0]),
        (IMPORT, ["EIO", 4]),
    ):
        after = 0 if command in {STATUS, GET_ID} else 1
        assert under(fresh, sev_programs.implicit_init, command) == [0, said, after]
        assert under(fresh, sev_programs.reset) == ["ok", 0]


def test_a_platform_with_a_guest_is_not_reset(fresh: Platform) -> None:
    with subprocess.Popen(
        run_words(fresh, *program_of(sev_programs.ask_when_told)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as waiting:
        assert waiting.stdout is not None
        assert waiting.stdout.readline() == "ready\n"
        from emulator.device_client import Device

        with Device(fresh.socket) as device:
            device.launch_start(policy=1, shared=0, godh=b"", session=b"")
            assert under(fresh, sev_programs.reset) == ["EBUSY", NOT_ASKED]
        assert waiting.communicate("go\n", timeout=TIMEOUT)[0] == '"ok"\n'
    assert under(fresh, sev_programs.reset) == ["ok", 0]


def test_it_is_opened_as_a_device_is_and_no_other_name_is(platform: Platform) -> None:
    seen = under(platform, sev_programs.opened)
    assert seen["cloexec"] == [0, 1]
    assert seen["flags"] == [os.O_RDWR, os.O_RDONLY | os.O_NONBLOCK]
    assert seen["work"] == [1, 1]
    assert (seen["create"], seen["exclusive"], seen["folder"]) == ("ok", "EEXIST", "ENOTDIR")
    assert seen["others"] == ["ENOENT", "ENOENT", "ok"]
    assert seen["nowhere"] == -errno.EFAULT


def test_it_is_known_by_other_spellings_and_to_every_call_that_opens(platform: Platform) -> None:
    seen = under(platform, sev_programs.spelled)
    assert seen["names"] == [1] * 4
    assert seen["creat"] == [os.O_WRONLY, 1]
    assert (seen["openat2"], seen["strict"]) == ([1, 1], 1)
    # Never the device: the kernel says what is wrong.
    assert (seen["beneath"], seen["short"], seen["nowhere"]) == (-errno.EXDEV, -errno.EINVAL, -errno.EFAULT)
    assert seen["other"]


def test_sevs_requests_never_reach_a_driver_of_the_kernels(platform: Platform, tmp_path: Path) -> None:
    # The random driver says EINVAL to requests that it does not know, so that it is seen when it is asked.
    assert sev_programs.strangers("/dev/urandom") == ["EINVAL"] * 4
    (tmp_path / "file").touch()
    (tmp_path / "sev").symlink_to("/dev/urandom")
    os.mkfifo(tmp_path / "pipe")
    other_end = os.open(tmp_path / "pipe", os.O_RDWR)  # or opening it would wait for one
    try:
        for name in ("/dev/urandom", "/proc/self/root/dev/urandom", "/dev/null", *map(str, tmp_path.iterdir())):
            assert under(platform, sev_programs.strangers, name) == ["ENOTTY"] * 4, name
    finally:
        os.close(other_end)


def test_neither_do_those_of_a_program_of_32_bits(platform: Platform) -> None:
    calls = subprocess.run(
        [*program_of(sev_programs.strangers_of_another_abi, "/dev/urandom")],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    if calls.returncode or json.loads(calls.stdout) != [-errno.EINVAL] * 4:
        pytest.skip("this kernel has no calls of 32 bits, or no memory to execute")
    assert under(platform, sev_programs.strangers_of_another_abi, "/dev/urandom") == [-errno.ENOTTY] * 4


def test_neither_do_those_of_a_program_whose_memory_cannot_be_read(platform: Platform, tmp_path: Path) -> None:
    # The kernel hides the memory of a program whose file may only be executed; not from root with all its powers.
    python = tmp_path / "python"
    shutil.copyfile(os.path.realpath(sys.executable), python)
    python.chmod(0o111)
    weak: list[str] = []
    if not os.getuid():
        if shutil.which("setpriv") is None:
            pytest.skip("setpriv not found, install the Debian package util-linux")
        os.chown(python, 65534, 65534)
        weak = ["setpriv", "--bounding-set", "-sys_ptrace,-dac_override,-dac_read_search", "--"]

    code = (
        "import errno, fcntl, os\n"
        "for name in ('/dev/urandom', '/dev/sev'):\n"
        "    try: print(fcntl.ioctl(os.open(name, os.O_RDONLY), 0xC0105300, bytearray(64)))\n"
        "    except OSError as error: print(errno.errorcode[error.errno])\n"
    )
    program = ["env", f"PYTHONHOME={sys.base_prefix}", str(python), "-c", code]

    def said(words: list[str]) -> list[str]:
        ended = subprocess.run([*weak, *words], capture_output=True, text=True, timeout=TIMEOUT, check=False)
        return ended.stdout.split()

    if said(["head", "-c", "4", str(python)]):
        pytest.skip("this user reads every file")
    if said(program)[:1] != ["EINVAL"]:
        pytest.skip("a copy of this interpreter does not run")
    urandom, device = said(run_words(platform, *program))
    assert urandom == "ENOTTY"
    assert device in {"ENOENT", "EACCES", "ENOTTY"}  # whatever this host has there, it was not asked


def test_what_is_written_into_it_nobody_reads(platform: Platform) -> None:
    assert under(platform, sev_programs.left_by_another) == ["EPERM", "EPERM", "", 0, 1]


def test_a_descriptors_copies_are_the_device_and_a_closed_one_is_gone(platform: Platform) -> None:
    seen = under(platform, sev_programs.descriptors)
    assert seen["closed"] == "EBADF"
    assert seen["copies"] == [1, 1, 1, 1]
    assert seen["reader"] == "EPERM"
    assert seen["strangers"] == [["ENOTTY", NOT_ASKED]] * 2


def test_a_thousand_opens_leave_no_descriptor_anywhere(platform: Platform) -> None:
    seen = under(platform, sev_programs.come_and_go, 1000)
    assert seen["after"] == seen["before"]


def test_threads_and_processes_are_served_side_by_side(platform: Platform) -> None:
    with ThreadPoolExecutor(2) as both:
        runs = [both.submit(under, platform, sev_programs.many_threads, 8, 25) for _ in range(2)]
        assert [run.result() for run in runs] == [[25] * 8] * 2


@pytest.mark.parametrize("waits", [True, False], ids=["wait killable", "without"])
def test_a_signal_does_not_deliver_a_command_twice(tmp_path: Path, *, waits: bool) -> None:
    # Only the first of two deliveries meets the fault, so that its errno is seen when there is one delivery.
    faults = Faults()
    faults.inject(STATUS, Fault(errno=errno.ENOMEM, delay=0.3))
    with platform_in_thread(tmp_path / "p", faults=faults) as served:
        words = run_words(served, *program_of(sev_programs.alarmed))
        if not waits:  # the twin: the same filter without the flag
            careless = (
                "import functools; from emulator.intercept import spawn; "
                "spawn.install = functools.partial(spawn.install, wait_killable=False); "
            )
            words[2] = careless + words[2]
        ended = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT, check=True)
        rung, said = json.loads(ended.stdout)
    assert rung > 0
    assert said == (["ENOMEM", NOT_ASKED] if waits else ["ok", 0])


def test_a_platform_that_takes_its_time_keeps_nobody_from_opening_files(tmp_path: Path) -> None:
    faults = Faults()
    faults.inject(STATUS, Fault(errno=errno.ETIMEDOUT, delay=1.0))
    with platform_in_thread(tmp_path / "p", faults=faults) as served:
        (opened,) = under(served, sev_programs.opens_while_it_hangs)
    assert opened > 100


@pytest.mark.parametrize("number", [errno.EBUSY, errno.ETIMEDOUT, errno.ENODEV, 524])
def test_the_drivers_own_errors_pass_unchanged(tmp_path: Path, number: int) -> None:
    faults = Faults()
    faults.inject(PDH_GEN, Fault(errno=number))
    with platform_in_thread(tmp_path / "p", faults=faults) as served:
        name = errno.errorcode.get(number, "524")
        code = (
            "import ctypes, os, struct; device = os.open('/dev/sev', 2); libc = ctypes.CDLL(None, use_errno=True); "
            "block = struct.pack('<IQI', 4, 0, 7); "
            "print(libc.ioctl(device, ctypes.c_ulong(0xc0105300), block), ctypes.get_errno(), block[12])"
        )
        words = run_words(served, sys.executable, "-c", code)
        ended = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT, check=True)
    assert ended.stdout == f"-1 {number} 7\n", name


def test_a_platform_that_goes_away_is_no_device_and_its_return_is_noticed(tmp_path: Path) -> None:
    with running_platform(tmp_path / "p") as served:
        asking = subprocess.Popen(
            run_words(served, *program_of(sev_programs.ask_when_told)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert asking.stdout is not None
        assert asking.stdout.readline() == "ready\n"
    assert asking.communicate("go\n", timeout=TIMEOUT)[0] == '"ENODEV"\n'


def test_a_service_that_hides_its_memory_is_served(platform: Platform) -> None:
    assert under(platform, sev_programs.hardened) == [1]


def test_it_needs_no_privileges(tmp_path: Path) -> None:
    if os.getuid():
        pytest.skip("all other tests have shown it: this is not root")
    python = nobodys_python()
    give_chip(tmp_path / "p", "milan")
    with public_folder() as root:
        copy_ours(root)
        shutil.copytree(tmp_path / "p", root / "p")
        with running_platform(root / "p") as served:
            for entry in (served.state, served.socket):
                os.chown(entry, NOBODY, NOBODY)
            words = run_words(served, *program_of(sev_programs.hardened))
            ended = subprocess.run(
                [python if word == sys.executable else word for word in words],
                capture_output=True,
                text=True,
                timeout=TIMEOUT,
                check=False,
                cwd=root,
                env={"PYTHONPATH": str(root)},
                user=NOBODY,
                group=NOBODY,
                extra_groups=[],
            )
    assert (ended.returncode, ended.stdout) == (0, "[1]\n"), ended.stderr


def test_the_cost_of_a_call_is_bearable(platform: Platform) -> None:
    # Far above what is measured (tens of microseconds): a sleep or a poll in the way would show.
    started = time.monotonic()
    under(platform, sev_programs.come_and_go, 3000)
    assert time.monotonic() - started < 30
