"""One notified system call: whose it is, and its answer.

Opening files is answered at once, for a program opens many. What may reach the platform goes to one worker, in order,
as the kernel's driver has one lock; so that a PSP that takes its time keeps nobody from opening a file.

SEV's own requests are answered here whatever the descriptor, and the kernel never carries them out: on a host with SEV
one may be the real device or a real guest, opened by a name that was not recognised or inherited.
"""

from __future__ import annotations

import ctypes
import errno
import os
import queue
import struct
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

from emulator.device_client import CommandFailed
from emulator.errors import KernelRefused
from emulator.intercept import dev_sev, kvm, psp_sev
from emulator.intercept.dev_sev import DeviceFile, IssuedCommand
from emulator.intercept.filter import SYS_CREAT, SYS_OPEN, SYS_OPENAT, SYS_OPENAT2
from emulator.intercept.link import Link
from emulator.intercept.machines import Machines
from emulator.intercept.memory import Memory
from emulator.intercept.processes import is_closed, process_of
from emulator.intercept.seccomp import Listener, Notification

# What could reach a real PSP.
NEVER = (
    psp_sev.SEV_ISSUE_CMD,
    kvm.KVM_MEMORY_ENCRYPT_OP,
    kvm.KVM_MEMORY_ENCRYPT_REG_REGION,
    kvm.KVM_MEMORY_ENCRYPT_UNREG_REGION,
)
REQUESTS = (*NEVER, kvm.KVM_CREATE_VM, kvm.KVM_CREATE_VCPU, kvm.KVM_SET_CPUID2)
_CREAT_FLAGS = os.O_CREAT | os.O_WRONLY | os.O_TRUNC  # creat(2)
# linux/openat2.h: struct open_how (flags, mode, resolve), and what of `resolve` changes nothing for this name.
_OPEN_HOW = struct.Struct("<QQQ")
_RESOLVE_NO_MAGICLINKS, _RESOLVE_NO_SYMLINKS, _RESOLVE_CACHED = 0x02, 0x04, 0x20
_RESOLVE_SAME = _RESOLVE_NO_MAGICLINKS | _RESOLVE_NO_SYMLINKS | _RESOLVE_CACHED
_SWEEP = 0.2  # seconds that a guest may outlive its virtual machine, where no call comes


class Calls:
    """Answers notifications. `take` is for the thread that receives them."""

    def __init__(self, listener: Listener, link: Link, *, flavour: str) -> None:
        self._listener = listener
        self._link = link
        self._file = DeviceFile()
        self._machines = Machines(link, flavour=flavour)
        self._waiting: queue.SimpleQueue[Notification | None] = queue.SimpleQueue()
        # A daemon: a platform that hangs must not keep the supervisor when the program has ended.
        self._worker = threading.Thread(target=self._work, daemon=True)
        self._worker.start()

    def take(self, call: Notification) -> None:
        """Answer a call, or hand it to the worker."""
        first, second, third, size, *_ = call.arguments
        if call.syscall == SYS_OPENAT:
            self._open(call, second, lambda: third)
        elif call.syscall == SYS_OPEN:
            self._open(call, first, lambda: second)
        elif call.syscall == SYS_CREAT:
            self._open(call, first, lambda: _CREAT_FLAGS)
        elif call.syscall == SYS_OPENAT2:
            self._open(call, second, lambda: _flags_of(Memory(call.thread), third, size))
        else:
            self._waiting.put(call)

    def close(self) -> None:
        """Nobody is left who could call: every guest ends."""
        self._waiting.put(None)
        self._worker.join(timeout=1.0)
        self._file.close()

    def _open(self, call: Notification, address: int, flags_of: Callable[[], int | None]) -> None:
        path = Memory(call.thread).path(address)
        flags = flags_of() if path is not None and dev_sev.is_path(path) else None
        if flags is None or not self._listener.is_valid(call):
            self._listener.go_on(call)
            return
        try:
            description = self._file.open(flags)
            try:
                self._listener.give(call, description, cloexec=bool(flags & os.O_CLOEXEC))
            finally:
                os.close(description)
        except OSError as error:
            self._listener.answer(call, error.errno or errno.EIO)

    def _work(self) -> None:
        while True:
            try:
                call = self._waiting.get(timeout=_SWEEP if self._machines else None)
            except queue.Empty:
                self._machines.sweep()
                continue
            if call is None:
                break
            # Before each command: a platform whose guests have ended is no longer WORKING.
            self._machines.sweep()
            self._ioctl(call)
        self._machines.close()
        self._link.close()

    def _ioctl(self, call: Notification) -> None:
        try:
            answered = self._carry_out(call)
        except (KernelRefused, CommandFailed) as refusal:
            self._listener.answer(call, refusal.errno)
        except Exception as error:  # noqa: BLE001 -- a defect must not leave the program waiting for ever
            with suppress(OSError):
                print(f"sevattest platform: ioctl 0x{call.arguments[1]:x} failed: {error!r}", file=sys.stderr)  # noqa: T201 -- a program's own stderr
            self._listener.answer(call, errno.EIO)
        else:
            if answered:
                self._listener.answer(call)
            else:
                self._listener.go_on(call)

    def _carry_out(self, call: Notification) -> bool:
        """Whether it was answered here; False leaves it to the kernel."""
        descriptor = ctypes.c_int(call.arguments[0] & 0xFFFFFFFF).value
        request, argument = call.arguments[1] & 0xFFFFFFFF, call.arguments[2]
        if request == psp_sev.SEV_ISSUE_CMD:
            self._issue_cmd(call, descriptor, argument)
            return True
        process = process_of(call.thread)
        if request in NEVER:
            if process is None or not self._machines.is_vm(process, descriptor):
                raise _not_ours(call.thread, descriptor)
            self._sev_request(call, process, request, descriptor=descriptor, argument=argument)
            return True
        if process is None:
            return False
        if request == kvm.KVM_SET_CPUID2:
            self._machines.cpuid_set(process, descriptor, argument)
            return False
        if not self._machines.is_vm(process, descriptor):
            return False  # KVM_CREATE_VM for one; it was worth a sweep, since the new one may get an old number
        if request == kvm.KVM_CREATE_VCPU:
            self._machines.vcpu_made(process, descriptor, argument)
        return False

    def _sev_request(self, call: Notification, process: int, request: int, *, descriptor: int, argument: int) -> None:
        """One of KVM's on a virtual machine."""
        if request == kvm.KVM_MEMORY_ENCRYPT_OP:
            self._machines.encrypt_op(
                process,
                descriptor,
                argument,
                self._memory(call),
                lambda number: self._file.is_behind(call.thread, number),
            )
        elif request == kvm.KVM_MEMORY_ENCRYPT_REG_REGION:
            self._machines.register(process, descriptor, argument)
        else:
            self._machines.unregister(process, descriptor, argument)

    def _issue_cmd(self, call: Notification, descriptor: int, argument: int) -> None:
        if not self._file.is_behind(call.thread, descriptor):
            raise _not_ours(call.thread, descriptor)
        writable = dev_sev.is_writable(call.thread, descriptor)
        if self._listener.is_valid(call):  # else it was somebody else's descriptor that was looked at
            IssuedCommand(self._memory(call), self._link, writable=writable).carry_out(argument)

    def _memory(self, call: Notification) -> Memory:
        return Memory(call.thread, lambda: self._listener.is_valid(call))


def _not_ours(thread: int, descriptor: int) -> KernelRefused:
    """What an ioctl fails with on a descriptor that does not know it, or is none."""
    return KernelRefused(errno.EBADF if is_closed(thread, descriptor) else errno.ENOTTY)


def _flags_of(memory: Memory, address: int, size: int) -> int | None:
    """The flags of an openat2(2); None where the kernel is to say what is wrong, or resolves names otherwise."""
    if size != _OPEN_HOW.size:
        return None
    try:
        flags, _, resolve = _OPEN_HOW.unpack(memory.read(address, size))
    except KernelRefused:
        return None
    return None if resolve & ~_RESOLVE_SAME else flags
