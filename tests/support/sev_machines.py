"""Programs for `platform run` that make virtual machines on /dev/kvm and launch SEV guests in them by raw calls."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Sequence
from typing import Any

from tests.support import raw_sev
from tests.support.raw_sev import (
    ES_INIT,
    FINISH,
    GUEST_STATUS,
    INIT,
    INIT2,
    MEASURE,
    REPORT,
    SECRET,
    START,
    UPDATE_DATA,
    UPDATE_VMSA,
    Memory,
    ReadOnlyPage,
    sev_op,
)

_NOWHERE = 16  # nothing is mapped there
_LIMIT = 0x4000
_SIGNATURE = 0x00A00F11


class _Guest:
    """A virtual machine with a launched guest, and the calls that carry on."""

    def __init__(self, *, policy: int = 1, es: bool = False) -> None:
        self.sev = os.open("/dev/sev", os.O_RDWR | os.O_CLOEXEC)
        self.kvm, self.vm = raw_sev.new_vm()
        assert sev_op(self.vm, ES_INIT if es else INIT, sev=self.sev) == ("ok", 0)
        self.policy = policy

    def start(self, handle: int = 0) -> tuple[str, int, int]:
        data = Memory(struct.pack("<IIQI4xQI4x", handle, self.policy, 0, 0, 0, 0))
        return *self.op(START, data), int.from_bytes(data.bytes[:4], "little")

    def op(self, command: int, data: Memory | ReadOnlyPage | None = None) -> tuple[str, int]:
        return sev_op(self.vm, command, data or 0, self.sev)

    def update(self, address: int, length: int) -> tuple[str, int]:
        return self.op(UPDATE_DATA, Memory(struct.pack("<QI4x", address, length)))

    def measure(self, address: int, length: int) -> tuple[str, int, int]:
        data = Memory(struct.pack("<QI4x", address, length))
        return *self.op(MEASURE, data), struct.unpack("<QI4x", data.bytes)[1]

    def status(self) -> tuple[int, int, int]:
        data = Memory(12)
        assert self.op(GUEST_STATUS, data) == ("ok", 0)
        handle, policy, state = struct.unpack("<III", data.bytes)
        return handle, policy, state

    def close(self) -> None:
        for descriptor in (self.vm, self.kvm, self.sev):
            os.close(descriptor)


def whole_launch() -> dict[str, Any]:
    """A launch without an owner, step by step, and each step's twin in the wrong order or with a bad pointer."""
    guest = _Guest()
    code = Memory(b"code" * 1024)
    blob = Memory(64)
    seen: dict[str, Any] = {"early": [guest.op(FINISH), guest.update(code.at & ~15, 16)]}
    seen["start"] = guest.start()
    seen["again"] = guest.start()[0]
    seen["status"] = guest.status()
    aligned = (code.at + 15) & ~15
    seen["update"] = guest.update(aligned, 2048)
    seen["updates refused"] = [guest.update(*given) for given in ((aligned, 15), (aligned, 0), (_NOWHERE, 16))]
    seen["beyond"] = guest.update((1 << 64) - 16, 32)
    seen["no data"] = guest.op(UPDATE_DATA)
    seen["save areas"] = guest.op(UPDATE_VMSA)
    seen["question"] = guest.measure(0, 0)
    seen["small"] = guest.measure(blob.at, 47)
    seen["too long"] = guest.measure(blob.at, _LIMIT + 1)
    seen["no buffer"] = guest.measure(0, 48)
    seen["measure"] = guest.measure(blob.at, 64)
    seen["measured"] = bool(any(blob.bytes[:48])) and not any(blob.bytes[48:])
    seen["state"] = guest.status()[2]
    report = Memory(208)
    questions = [Memory(struct.pack("<16sQI4x", b"n" * 16, at, length)) for at, length in ((0, 0), (report.at, 208))]
    seen["report"] = [(*guest.op(REPORT, data), int.from_bytes(data.bytes[24:28], "little")) for data in questions]
    seen["nonce"] = report.bytes[:16].decode()
    seen["finish"] = guest.op(FINISH)
    seen["finish again"] = guest.op(FINISH)
    return seen


def refusals() -> dict[str, Any]:
    """What KVM refuses before the firmware is asked."""
    kvm, vm = raw_sev.new_vm()
    sev = os.open("/dev/sev", os.O_RDWR)
    null = os.open("/dev/null", os.O_RDWR)
    region = Memory(struct.pack("<QQ", Memory(4096).at, 4096))
    seen: dict[str, Any] = {
        "probe": raw_sev.ioctl(vm, raw_sev.KVM_MEMORY_ENCRYPT_OP, 0),
        "bad pointer": raw_sev.ioctl(vm, raw_sev.KVM_MEMORY_ENCRYPT_OP, _NOWHERE),
        "strangers": [raw_sev.ioctl(number, raw_sev.KVM_MEMORY_ENCRYPT_OP, 0) for number in (kvm, sev, null, 999)],
        "without init": [
            sev_op(vm, command, 0, sev)
            for command in (START, UPDATE_DATA, UPDATE_VMSA, SECRET, MEASURE, FINISH, GUEST_STATUS, REPORT)
        ],
        "region": raw_sev.ioctl(vm, raw_sev.KVM_MEMORY_ENCRYPT_REG_REGION, region),
        "unknown": [sev_op(vm, command, 0, sev) for command in (8, 17, 18, 19, 21, INIT2, 23, 999)],
        "init": [sev_op(vm, command, 0, sev) for command in (INIT, INIT, ES_INIT)],
        "data": sev_op(vm, START, _NOWHERE, sev),
    }
    start = struct.pack("<IIQI4xQI4x", 0, 1, 0, 0, 0, 0)
    seen["not the device"] = [sev_op(vm, START, Memory(start), number) for number in (null, -1, 999)]
    bad_blobs = [(_NOWHERE, 2084, 0, 0), (sev, 0, 0, 0), (region.at, _LIMIT + 1, 0, 0), (0, 0, region.at, 0)]
    seen["blobs"] = [sev_op(vm, START, Memory(struct.pack("<IIQI4xQI4x", 0, 1, *blob)), sev) for blob in bad_blobs]
    seen["read-only"] = sev_op(vm, START, ReadOnlyPage(start), sev)
    seen["then"] = sev_op(vm, START, Memory(start), sev)
    os.close(sev)
    seen["device closed"] = sev_op(vm, FINISH, 0, 0)
    other = raw_sev.new_vm()[1]
    assert raw_sev.syscall(16, other, raw_sev.KVM_CREATE_VCPU, 0) >= 0
    seen["init after a vCPU"] = sev_op(other, INIT)
    return seen


def regions() -> dict[str, Any]:
    """Registering memory."""
    guest = _Guest()
    page = mmap.mmap(-1, 8192)
    import ctypes

    at = ctypes.addressof(ctypes.c_char.from_buffer(page))

    def ask(request: int, *given: int) -> str:
        return raw_sev.ioctl(guest.vm, request, Memory(struct.pack("<QQ", *given)))

    register, unregister = raw_sev.KVM_MEMORY_ENCRYPT_REG_REGION, raw_sev.KVM_MEMORY_ENCRYPT_UNREG_REGION
    return {
        "bad": [ask(register, at, 0), ask(register, (1 << 64) - 1, 2), ask(register, _NOWHERE, 4096)],
        "pointer": raw_sev.ioctl(guest.vm, register, _NOWHERE),
        "unknown": ask(unregister, at, 4096),
        "round": [ask(register, at, 8192), ask(unregister, at, 8192), ask(unregister, at, 8192)],
    }


def many_machines(times: int) -> dict[str, Any]:
    """Machines that come and go in one process, with one number, and several at once."""
    numbers = set()
    for _ in range(times):
        guest = _Guest()
        numbers.add(guest.vm)
        assert guest.start()[0] == "ok"
        guest.close()
    alone = raw_sev.issue(os.open("/dev/sev", os.O_RDWR), raw_sev.RESET)
    several = [_Guest() for _ in range(3)]
    handles = [guest.start()[2] for guest in several]
    return {
        "numbers": len(numbers),
        "alone": alone,
        "handles": len(set(handles)),
        "states": [guest.status()[2] for guest in several],
    }


def save_areas(vcpus: Sequence[int], policy: int) -> list[str]:
    """An SEV-ES launch with these vCPU ids; the handle and what each step said, the measurement last."""
    guest = _Guest(policy=policy, es=True)
    assert guest.start()[0] == "ok"
    entries = [struct.pack("<7I12x", function, 0, 0, eax, 0, 0, 0) for function, eax in ((0, 16), (1, _SIGNATURE))]
    cpuid = Memory(struct.pack("<II", len(entries), 0) + b"".join(entries))
    for number in vcpus:
        vcpu = raw_sev.syscall(16, guest.vm, raw_sev.KVM_CREATE_VCPU, number)
        assert vcpu >= 0
        raw_sev.ioctl(vcpu, raw_sev.KVM_SET_CPUID2, cpuid)
    said = guest.op(UPDATE_VMSA)
    blob = Memory(48)
    assert guest.measure(blob.at, 48) == ("ok", 0, 48)
    return [*map(str, said), blob.bytes.hex()]


def inits() -> list[Any]:
    """What KVM_SEV_ES_INIT says, and then KVM_SEV_INIT of the same machine."""
    vm = raw_sev.new_vm()[1]
    return [sev_op(vm, ES_INIT), sev_op(vm, INIT)]


def state_around_init() -> list[int]:
    """The platform's state before and after KVM_SEV_INIT."""
    sev = os.open("/dev/sev", os.O_RDWR)
    before = raw_sev.state(sev)
    _Guest()
    return [before, raw_sev.state(sev)]
