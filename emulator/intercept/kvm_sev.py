"""KVM_MEMORY_ENCRYPT_OP and its companions on one virtual machine.

Which argument is looked at when, and which errno that gives, is KVM's (arch/x86/kvm/svm/sev.c, Linux 6.1). Memory is
not encrypted: LAUNCH_UPDATE_DATA reads the caller's pages, LAUNCH_SECRET writes the plaintext into them. The registers
stay KVM's, so LAUNCH_UPDATE_VMSA measures save areas of our own, of as many vCPUs as were made, with the processor's
signature from KVM_SET_CPUID2 and the APs' reset vector from the firmware that was measured.

Understood are the commands of a launch. KVM_SEV_INIT2 is EINVAL, as it is on every virtual machine whose type is not a
SEV one, and a KVM without SEV makes no others. So are migration and debugging.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, field

from common.sev.abi import (
    NO_FIRMWARE_CALL,
    PACKET_MAX_SIZE,
    PLATFORM_ES,
    DeviceCommand,
    Status,
)
from emulator import protocol, vmsa
from emulator.device_client import CommandFailed, Device
from emulator.errors import KernelRefused
from emulator.footer import Footer
from emulator.intercept import kvm
from emulator.intercept.dev_sev import read_blob
from emulator.intercept.link import Link, in_kernel_numbers
from emulator.intercept.memory import Memory
from emulator.protocol import GuestRequest

_RESET_VECTOR = 0xFFFFFFF0
_ADDRESS_END = 1 << 64


@dataclass(kw_only=True)
class Vm:
    """What is known of one virtual machine.

    Attributes:
        vcpus: ids of its vCPUs.
        device: the connection that holds its guest; None before KVM_SEV_INIT.
        is_es: whether KVM_SEV_ES_INIT made it.
        handle: the firmware's number of the guest; 0 before LAUNCH_START.
        sev: the descriptor of /dev/sev that LAUNCH_START named; the later commands go through it, whatever they name.
        regions: encrypted regions that were registered, as address and size.
        reset_address: where its APs start.
    """

    vcpus: set[int] = field(default_factory=set)
    device: Device | None = None
    is_es: bool = False
    handle: int = 0
    sev: int = -1
    regions: set[tuple[int, int]] = field(default_factory=set)
    reset_address: int = _RESET_VECTOR

    def close(self) -> None:
        """It is gone, and with it its guest."""
        if self.device is not None:
            self.device.close()


class EncryptOp:
    """One KVM_MEMORY_ENCRYPT_OP on its way.

    Args:
        vm: the virtual machine.
        memory: its process's.
        link: the platform.
        is_device: whether a descriptor of the caller is an open /dev/sev.
        cpu_signature: CPUID leaf 1 EAX as its process has told KVM.
        flavour: which save areas (`emulator.vmsa`).
    """

    def __init__(
        self,
        vm: Vm,
        memory: Memory,
        link: Link,
        *,
        is_device: Callable[[int], bool],
        cpu_signature: int,
        flavour: str,
    ) -> None:
        self._vm = vm
        self._memory = memory
        self._link = link
        self._is_device = is_device
        self._cpu_signature = cpu_signature
        self._flavour = flavour
        self._data = 0
        self._error = 0
        self._sev = 0
        self._commands: dict[int, Callable[[], None]] = {
            kvm.SevCommand.INIT: lambda: self._init(es=False),
            kvm.SevCommand.ES_INIT: lambda: self._init(es=True),
            kvm.SevCommand.LAUNCH_START: self._launch_start,
            kvm.SevCommand.LAUNCH_UPDATE_DATA: self._launch_update_data,
            kvm.SevCommand.LAUNCH_UPDATE_VMSA: self._launch_update_vmsa,
            kvm.SevCommand.LAUNCH_SECRET: self._launch_secret,
            kvm.SevCommand.LAUNCH_MEASURE: self._launch_measure,
            kvm.SevCommand.LAUNCH_FINISH: self._launch_finish,
            kvm.SevCommand.GUEST_STATUS: self._guest_status,
            kvm.SevCommand.GET_ATTESTATION_REPORT: self._attestation_report,
        }

    def carry_out(self, argument: int) -> None:
        """Do what the `struct kvm_sev_cmd` at this address says, and write it back with the firmware's status.

        Raises:
            KernelRefused: what the ioctl fails with; CommandFailed likewise, EIO for the firmware's refusal.
        """
        command, self._data, self._error, self._sev = kvm.SEV_CMD.unpack(self._memory.read(argument, kvm.SEV_CMD.size))
        carry_out = self._commands.get(command)
        if carry_out is None:
            raise KernelRefused(errno.EINVAL)
        try:
            with in_kernel_numbers():
                carry_out()
        except CommandFailed as failure:
            if failure.status != NO_FIRMWARE_CALL:
                self._error = failure.status
            raise
        finally:
            self._memory.write(argument, kvm.SEV_CMD.pack(command, self._data, self._error, self._sev))

    def _init(self, *, es: bool) -> None:
        vm = self._vm
        if vm.vcpus or vm.device is not None:
            raise KernelRefused(errno.EINVAL)
        device = self._link.connect()
        try:
            # A question for lengths: the platform is initialised before the firmware says that they are missing.
            device.issue(DeviceCommand.PDH_CERT_EXPORT, protocol.TWO_LENGTHS.pack(0, 0))
        except CommandFailed as failure:
            if failure.status != Status.INVALID_LEN:
                device.close()
                raise
        status = device.issue(DeviceCommand.PLATFORM_STATUS)
        if es and not int.from_bytes(status[3:7], "little") & PLATFORM_ES:
            device.close()
            raise KernelRefused(errno.ENOTTY)
        vm.device, vm.is_es, self._error = device, es, Status.SUCCESS

    def _launch_start(self) -> None:
        device = self._guest()
        layout = kvm.LAUNCH_START
        given = layout.unpack(self._memory.read(self._data, layout.size))
        handle, policy, godh_at, godh_length, session_at, session_length = given
        godh = read_blob(self._memory, godh_at, godh_length) if godh_at else b""
        session = read_blob(self._memory, session_at, session_length) if session_at else b""
        self._want_device(self._sev)
        handle = device.launch_start(policy=policy, shared=handle, godh=godh, session=session)
        self._error = Status.SUCCESS
        try:
            self._memory.write(self._data, layout.pack(handle, *given[1:]))
        except KernelRefused:
            device.issue(GuestRequest.DECOMMISSION)
            raise
        self._vm.handle, self._vm.sev = handle, self._sev

    def _launch_update_data(self) -> None:
        device = self._guest()
        layout = kvm.LAUNCH_UPDATE_DATA
        address, length = layout.unpack(self._memory.read(self._data, layout.size))
        data = self._pinned(address, length)
        self._want_device(self._vm.sev)
        device.launch_update_data(address, data)
        self._error = Status.SUCCESS
        reset_address = Footer.read(data).reset_address
        if reset_address:
            self._vm.reset_address = reset_address

    def _launch_update_vmsa(self) -> None:
        device = self._guest()
        if not self._vm.is_es:
            raise KernelRefused(errno.ENOTTY)
        self._want_device(self._vm.sev)
        pages = vmsa.save_areas(
            vcpus=len(self._vm.vcpus),
            cpu_signature=self._cpu_signature,
            reset_address=self._vm.reset_address,
            flavour=self._flavour,
        )
        for _, page in zip(self._vm.vcpus, pages, strict=False):
            device.launch_update_vmsa(page)
            self._error = Status.SUCCESS

    def _launch_secret(self) -> None:
        device = self._guest()
        layout = kvm.LAUNCH_SECRET
        given = layout.unpack(self._memory.read(self._data, layout.size))
        header_at, header_length, guest_at, guest_length, packet_at, packet_length = given
        self._memory.write(guest_at, self._pinned(guest_at, guest_length))  # pinned for writing, before all else
        packet = read_blob(self._memory, packet_at, packet_length)
        header = read_blob(self._memory, header_at, header_length)
        self._want_device(self._vm.sev)
        head = protocol.LAUNCH_SECRET.pack(guest_at, len(header), guest_length, len(packet))
        plaintext = device.issue(GuestRequest.LAUNCH_SECRET, head + header + packet)
        self._error = Status.SUCCESS
        self._memory.write(guest_at, plaintext)

    def _launch_measure(self) -> None:
        layout = kvm.LAUNCH_MEASURE
        device = self._guest()
        address, length = layout.unpack(self._memory.read(self._data, layout.size))
        wanted = self._buffer(address, length)
        self._want_device(self._vm.sev)
        self._fill(
            lambda: device.issue(GuestRequest.LAUNCH_MEASURE, protocol.LENGTH.pack(wanted)),
            (address, length),
            lambda filled: layout.pack(address, filled),
        )

    def _launch_finish(self) -> None:
        device = self._guest()
        self._want_device(self._vm.sev)
        device.launch_finish()
        self._error = Status.SUCCESS

    def _guest_status(self) -> None:
        device = self._guest()
        self._want_device(self._vm.sev)
        policy, _, state = protocol.GUEST_STATUS.unpack(device.issue(GuestRequest.GUEST_STATUS))
        self._error = Status.SUCCESS
        self._memory.write(self._data, kvm.GUEST_STATUS.pack(self._vm.handle, policy, state))

    def _attestation_report(self) -> None:
        layout = kvm.ATTESTATION_REPORT
        device = self._guest()
        nonce, address, length = layout.unpack(self._memory.read(self._data, layout.size))
        wanted = self._buffer(address, length)
        self._want_device(self._vm.sev)
        self._fill(
            lambda: device.issue(GuestRequest.ATTESTATION, protocol.ATTESTATION.pack(nonce, wanted)),
            (address, length),
            lambda filled: layout.pack(nonce, address, filled),
        )

    def _fill(self, ask: Callable[[], bytes], buffer: tuple[int, int], pack: Callable[[int], bytes]) -> None:
        """A command with one buffer. Only who gave no length is told it when the firmware refuses."""
        address, length = buffer
        try:
            blob = ask()[protocol.LENGTH.size :]
        except CommandFailed as failure:
            if not length and failure.payload:
                self._memory.write(self._data, pack(*protocol.LENGTH.unpack(failure.payload)))
            raise
        self._error = Status.SUCCESS
        self._memory.write(address, blob.ljust(length, b"\0"))
        self._memory.write(self._data, pack(len(blob)))

    def _guest(self) -> Device:
        if self._vm.device is None:
            raise KernelRefused(errno.ENOTTY)
        return self._vm.device

    def _want_device(self, descriptor: int) -> None:
        # The kernel looks at it when the firmware is called, after the arguments were read.
        if not self._is_device(descriptor):
            raise KernelRefused(errno.EBADF)

    def _pinned(self, address: int, length: int) -> bytes:
        """Guest memory, which the kernel would pin: what is not there is ENOMEM, not EFAULT."""
        check_range(address, length)
        try:
            return self._memory.read(address, length)
        except KernelRefused as refusal:
            raise KernelRefused(errno.ENOMEM) from refusal

    @staticmethod
    def _buffer(address: int, length: int) -> int:
        """The length that the firmware gets to see: none without an address."""
        if address and length > PACKET_MAX_SIZE:
            raise KernelRefused(errno.EINVAL)
        return length if address else 0


def check_range(address: int, size: int) -> None:
    """Refuse a range of memory that is empty or ends beyond the last address, as sev_pin_memory.

    Raises:
        KernelRefused: EINVAL.
    """
    if not size or address + size > _ADDRESS_END:
        raise KernelRefused(errno.EINVAL)
