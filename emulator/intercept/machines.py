"""Which virtual machines there are, and what their processes told KVM of the vCPUs.

A virtual machine belongs to one address space, so it is known by its process and its descriptor there. The descriptor's
name tells that it is still one; nobody notices the close itself, so `sweep` looks.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from pathlib import Path

from emulator.errors import KernelRefused
from emulator.intercept import kvm
from emulator.intercept.kvm_sev import EncryptOp, Vm, check_range
from emulator.intercept.link import Link
from emulator.intercept.memory import Memory
from emulator.intercept.processes import name_of

_VM_NAME = "anon_inode:kvm-vm"
_VCPU_NAME = re.compile(r"anon_inode:kvm-vcpu\b")
# What KVM resets RDX to where nobody told it a CPUID leaf 1 (arch/x86/kvm/x86.c, kvm_vcpu_reset).
_NO_CPUID = 0x600


class Machines:
    """The virtual machines of everything that runs under the filter. Used by one thread."""

    def __init__(self, link: Link, *, flavour: str) -> None:
        self._link = link
        self._flavour = flavour
        self._vms: dict[tuple[int, int], Vm] = {}
        self._signatures: dict[int, int] = {}

    def __bool__(self) -> bool:
        """Whether there are any, so that `sweep` has something to look at."""
        return bool(self._vms)

    def sweep(self) -> None:
        """Forget those whose descriptor or process is gone; their guests end, as with a VM's last descriptor."""
        for process, descriptor in list(self._vms):
            if name_of(process, descriptor) != _VM_NAME:
                self._vms.pop((process, descriptor)).close()
        for process in list(self._signatures):
            if not Path(f"/proc/{process}").exists():
                del self._signatures[process]

    def close(self) -> None:
        """Forget all."""
        while self._vms:
            self._vms.popitem()[1].close()

    @staticmethod
    def is_vm(process: int, descriptor: int) -> bool:
        """Whether this is a virtual machine's descriptor."""
        return name_of(process, descriptor) == _VM_NAME

    def vcpu_made(self, process: int, descriptor: int, number: int) -> None:
        """Note a KVM_CREATE_VCPU."""
        self._vm(process, descriptor).vcpus.add(number)

    def cpuid_set(self, process: int, descriptor: int, argument: int) -> None:
        """Note what a KVM_SET_CPUID2 says of the processor; processes give all their vCPUs the same."""
        if not _VCPU_NAME.match(name_of(process, descriptor)):
            return
        memory = Memory(process)
        count, _ = kvm.CPUID2.unpack(memory.read(argument, kvm.CPUID2.size))
        size = min(count, kvm.CPUID_ENTRIES_MAX) * kvm.CPUID_ENTRY.size
        for function, _, _, eax, *_ in kvm.CPUID_ENTRY.iter_unpack(memory.read(argument + kvm.CPUID2.size, size)):
            if function == 1:
                self._signatures[process] = eax

    def encrypt_op(
        self, process: int, descriptor: int, argument: int, memory: Memory, is_device: Callable[[int], bool]
    ) -> None:
        """KVM_MEMORY_ENCRYPT_OP. Without an argument it asks whether there is SEV, and there is.

        Args:
            process: whose machine.
            descriptor: of the machine.
            argument: the request's.
            memory: the caller's, which is the process's.
            is_device: whether a descriptor of the caller is an open /dev/sev.

        Raises:
            KernelRefused: what the ioctl fails with; CommandFailed likewise.
        """
        if not argument:
            return
        command = EncryptOp(
            self._vm(process, descriptor),
            memory,
            self._link,
            is_device=is_device,
            cpu_signature=self._signatures.get(process, _NO_CPUID),
            flavour=self._flavour,
        )
        command.carry_out(argument)

    def register(self, process: int, descriptor: int, argument: int) -> None:
        """KVM_MEMORY_ENCRYPT_REG_REGION: memory that shall be encrypted; nothing is done to it.

        Raises:
            KernelRefused: ENOTTY without a SEV guest, EINVAL, EFAULT, ENOMEM.
        """
        region, regions = self._region(process, descriptor, argument)
        check_range(*region)
        try:
            Memory(process).read(region[0], 1)
        except KernelRefused as refusal:
            raise KernelRefused(errno.ENOMEM) from refusal
        regions.add(region)

    def unregister(self, process: int, descriptor: int, argument: int) -> None:
        """KVM_MEMORY_ENCRYPT_UNREG_REGION.

        Raises:
            KernelRefused: ENOTTY without a SEV guest, EFAULT, EINVAL for a region that was not registered.
        """
        region, regions = self._region(process, descriptor, argument)
        if region not in regions:
            raise KernelRefused(errno.EINVAL)
        regions.remove(region)

    def _region(self, process: int, descriptor: int, argument: int) -> tuple[tuple[int, int], set[tuple[int, int]]]:
        region = kvm.ENC_REGION.unpack(Memory(process).read(argument, kvm.ENC_REGION.size))
        vm = self._vm(process, descriptor)
        if vm.device is None:
            raise KernelRefused(errno.ENOTTY)
        return region, vm.regions

    def _vm(self, process: int, descriptor: int) -> Vm:
        return self._vms.setdefault((process, descriptor), Vm())
