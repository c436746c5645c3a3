"""`platform run`: KVM's SEV commands on real virtual machines, asked by raw system calls. Every rule of KVM's sev.c."""

from __future__ import annotations

import hmac
import os
import struct
import sys
from hashlib import sha256

import pytest
from sevsnpmeasure.sev_mode import SevMode
from sevsnpmeasure.vmsa import VMSA

from tests.support import sev_machines
from tests.support.kvm import needs_kvm
from tests.support.platform import Platform, running_platform
from tests.support.raw_sev import UNTOUCHED
from tests.support.sev_host import FIRMWARE, wait_for_no_guest
from tests.support.under import under

pytestmark = [
    pytest.mark.skipif(
        sys.platform != "linux" or os.uname().machine != "x86_64", reason="seccomp filters are written for x86-64 Linux"
    ),
    needs_kvm,
]
NOT_ASKED = UNTOUCHED  # the firmware's status where it was not called
REFUSED_EARLY = ["EINVAL", NOT_ASKED]


def test_a_launch_goes_step_by_step_and_no_other_way(platform: Platform) -> None:
    seen = under(platform, sev_machines.whole_launch)
    handle = seen["start"][2]
    assert seen["early"] == [["EBADF", NOT_ASKED]] * 2
    assert seen["start"][:2] == ["ok", 0]
    assert seen["again"] == "EINVAL"
    assert seen["status"] == [handle, 1, 1]
    assert seen["update"] == ["ok", 0]
    assert seen["updates refused"] == [["EIO", 4], REFUSED_EARLY, ["ENOMEM", NOT_ASKED]]
    assert seen["beyond"] == REFUSED_EARLY
    assert seen["no data"] == ["EFAULT", NOT_ASKED]
    assert seen["save areas"] == ["ENOTTY", NOT_ASKED]
    assert seen["question"] == ["EIO", 4, 48]
    assert seen["small"] == ["EIO", 4, 47]
    assert seen["too long"] == ["EINVAL", NOT_ASKED, 0x4001]
    assert seen["no buffer"] == ["EIO", 4, 48]
    assert seen["measure"] == ["ok", 0, 48]
    assert seen["measured"]
    assert seen["state"] == 2
    assert seen["report"] == [["EIO", 4, 208], ["ok", 0, 208]]
    assert seen["nonce"] == "n" * 16
    assert seen["finish"] == ["ok", 0]
    assert seen["finish again"] == ["EIO", 2]


def test_kvm_refuses_before_the_firmware_is_asked(platform: Platform) -> None:
    seen = under(platform, sev_machines.refusals)
    assert seen["probe"] == "ok"
    assert seen["bad pointer"] == "EFAULT"
    assert "ok" not in seen["strangers"]
    assert seen["without init"] == [["ENOTTY", NOT_ASKED]] * 8
    assert seen["region"] == "ENOTTY"
    assert seen["unknown"] == [REFUSED_EARLY] * 8
    assert seen["init"] == [["ok", 0], REFUSED_EARLY, REFUSED_EARLY]
    assert seen["data"] == ["EFAULT", NOT_ASKED]
    assert seen["not the device"] == [["EBADF", NOT_ASKED]] * 3
    assert seen["blobs"] == [["EFAULT", NOT_ASKED], REFUSED_EARLY, REFUSED_EARLY, REFUSED_EARLY]
    assert seen["read-only"] == ["EFAULT", 0]
    assert seen["then"] == ["ok", 0]
    assert seen["device closed"] == ["EBADF", NOT_ASKED]
    assert seen["init after a vCPU"] == REFUSED_EARLY


def test_memory_is_registered_once_it_belongs_to_a_guest(platform: Platform) -> None:
    seen = under(platform, sev_machines.regions)
    assert seen["bad"] == ["EINVAL", "EINVAL", "ENOMEM"]
    assert seen["pointer"] == "EFAULT"
    assert seen["unknown"] == "EINVAL"
    assert seen["round"] == ["ok", "ok", "EINVAL"]


def test_a_closed_machine_takes_its_guest_along_and_its_number_may_be_used_again(platform: Platform) -> None:
    seen = under(platform, sev_machines.many_machines, 20)
    assert seen["numbers"] == 1
    assert seen["alone"] == ["ok", 0]  # a reset, which is EBUSY while there are guests
    assert seen["handles"] == 3
    assert seen["states"] == [1, 1, 1]
    wait_for_no_guest(platform)


@pytest.mark.parametrize("vcpus", [[0], [0, 1], [0, 1, 2, 3, 4, 5, 6, 7], [5, 0]])
def test_save_areas_are_of_the_vcpus_that_were_made_with_the_processor_that_was_told(
    platform: Platform, vcpus: list[int]
) -> None:
    said, error, measured = under(platform, sev_machines.save_areas, vcpus, 5, own=("--vmsa", "init2"))
    assert (said, error) == ("ok", "0")
    blob = bytes.fromhex(measured)

    def is_measured(count: int, processor: int) -> bool:
        digest = sha256(b"".join(VMSA(SevMode.SEV_ES, 0xFFFFFFF0, processor, 0).pages(count))).digest()
        covered = bytes([0x04, *FIRMWARE]) + struct.pack("<I", 5) + digest + blob[32:]
        return hmac.digest(bytes(16), covered, "sha256") == blob[:32]  # without an owner the TIK is zero

    assert is_measured(len(vcpus), 0x00A00F11)
    assert not is_measured(len(vcpus) + 1, 0x00A00F11)
    assert not is_measured(len(vcpus), 0x00A00F10)


def test_a_platform_without_es_has_no_es_guests(tmp_path_factory: pytest.TempPathFactory) -> None:
    with running_platform(tmp_path_factory.mktemp("run") / "p", options=["--no-es"]) as served:
        assert under(served, sev_machines.inits) == [["ENOTTY", NOT_ASKED], ["ok", 0]]


def test_making_a_guest_initialises_the_platform(tmp_path_factory: pytest.TempPathFactory) -> None:
    with running_platform(tmp_path_factory.mktemp("run") / "p", options=["--no-init"]) as served:
        assert under(served, sev_machines.state_around_init) == [0, 1]
