"""Whether this machine has a /dev/kvm that makes virtual machines."""

from __future__ import annotations

import fcntl
import os

import pytest

_KVM_CREATE_VM = 0xAE01  # linux/kvm.h


def why_no_kvm() -> str:
    """Why there is none; empty where there is one."""
    try:
        kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        try:
            os.close(fcntl.ioctl(kvm, _KVM_CREATE_VM, 0))
        finally:
            os.close(kvm)
    except OSError as error:
        return f"/dev/kvm is not usable: {error.strerror}"
    return ""


needs_kvm = pytest.mark.skipif(bool(why_no_kvm()), reason=why_no_kvm() or "never")
