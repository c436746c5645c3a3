"""One notified system call: whose it is, and its answer.

Opening files is answered at once, for a program opens many. What may reach the platform goes to one worker, in order,
as the kernel's driver has one lock; so that a PSP that takes its time keeps nobody from opening a file.
"""

from __future__ import annotations

import ctypes
import errno
import os
import queue
import sys
import threading
from contextlib import suppress

from emulator.device_client import CommandFailed
from emulator.errors import KernelRefused
from emulator.intercept import dev_sev, kvm, psp_sev
from emulator.intercept.dev_sev import DeviceFile, IssuedCommand
from emulator.intercept.filter import SYS_OPEN, SYS_OPENAT
from emulator.intercept.link import Link
from emulator.intercept.machines import Machines
from emulator.intercept.memory import Memory
from emulator.intercept.processes import process_of
from emulator.intercept.seccomp import Listener, Notification

REQUESTS = (
    psp_sev.SEV_ISSUE_CMD,
    kvm.KVM_CREATE_VM,
    kvm.KVM_CREATE_VCPU,
    kvm.KVM_SET_CPUID2,
    kvm.KVM_MEMORY_ENCRYPT_OP,
    kvm.KVM_MEMORY_ENCRYPT_REG_REGION,
    kvm.KVM_MEMORY_ENCRYPT_UNREG_REGION,
)
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
        if call.syscall == SYS_OPENAT:
            self._open(call, call.arguments[1], call.arguments[2])
        elif call.syscall == SYS_OPEN:
            self._open(call, call.arguments[0], call.arguments[1])
        else:
            self._waiting.put(call)

    def close(self) -> None:
        """Nobody is left who could call: every guest ends."""
        self._waiting.put(None)
        self._worker.join(timeout=1.0)
        self._file.close()

    def _open(self, call: Notification, path: int, flags: int) -> None:
        if not Memory(call.thread).is_text(path, dev_sev.PATH) or not self._listener.is_valid(call):
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
                print(f"sevattest platform: ioctl 0x{call.arguments[1]:x} failed: {error!r}", file=sys.stderr)  # noqa: T201
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
            return self._issue_cmd(call, descriptor, argument)
        process = process_of(call.thread)
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
        if request == kvm.KVM_MEMORY_ENCRYPT_OP:
            self._machines.encrypt_op(
                process, descriptor, argument, lambda number: self._file.is_behind(call.thread, number)
            )
        elif request == kvm.KVM_MEMORY_ENCRYPT_REG_REGION:
            self._machines.register(process, descriptor, argument)
        else:
            self._machines.unregister(process, descriptor, argument)
        return True

    def _issue_cmd(self, call: Notification, descriptor: int, argument: int) -> bool:
        if not self._file.is_behind(call.thread, descriptor):
            return False
        writable = dev_sev.is_writable(call.thread, descriptor)
        if self._listener.is_valid(call):  # else it was somebody else's descriptor that was looked at
            IssuedCommand(Memory(call.thread), self._link, writable=writable).carry_out(argument)
        return True
