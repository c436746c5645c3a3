"""Every number, size and offset that is used is the installed kernel headers': a C program prints what they say."""

from __future__ import annotations

import shutil
import signal
import struct
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest

from emulator.intercept import filter as call_filter
from emulator.intercept import kvm, psp_sev, seccomp, spawn, supervisor

# C expression -> what we believe it is.
NUMBERS: dict[str, int] = {
    "SEV_ISSUE_CMD": psp_sev.SEV_ISSUE_CMD,
    "sizeof(struct sev_user_data_status)": psp_sev.STATUS_SIZE,
    "sizeof(struct sev_user_data_get_id)": psp_sev.GET_ID_SIZE,
    "KVM_CREATE_VM": kvm.KVM_CREATE_VM,
    "KVM_CREATE_VCPU": kvm.KVM_CREATE_VCPU,
    "KVM_SET_CPUID2": kvm.KVM_SET_CPUID2,
    "KVM_MEMORY_ENCRYPT_OP": kvm.KVM_MEMORY_ENCRYPT_OP,
    "KVM_MEMORY_ENCRYPT_REG_REGION": kvm.KVM_MEMORY_ENCRYPT_REG_REGION,
    "KVM_MEMORY_ENCRYPT_UNREG_REGION": kvm.KVM_MEMORY_ENCRYPT_UNREG_REGION,
    **{f"KVM_SEV_{command.name}": int(command) for command in kvm.SevCommand},
    "SECCOMP_IOCTL_NOTIF_RECV": seccomp.NOTIF_RECV,
    "SECCOMP_IOCTL_NOTIF_SEND": seccomp.NOTIF_SEND,
    "SECCOMP_IOCTL_NOTIF_ID_VALID": seccomp.NOTIF_ID_VALID,
    "SECCOMP_IOCTL_NOTIF_ADDFD": seccomp.NOTIF_ADDFD,
    "SECCOMP_USER_NOTIF_FLAG_CONTINUE": seccomp._CONTINUE,
    "SECCOMP_ADDFD_FLAG_SEND": seccomp._ADDFD_SEND,
    "SECCOMP_SET_MODE_FILTER": seccomp._SET_MODE_FILTER,
    "SECCOMP_FILTER_FLAG_NEW_LISTENER": seccomp._FLAG_NEW_LISTENER,
    "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV": seccomp._FLAG_WAIT_KILLABLE_RECV,
    "SECCOMP_RET_ALLOW": call_filter.RET_ALLOW,
    "SECCOMP_RET_ERRNO": call_filter.RET_ERRNO,
    "SECCOMP_RET_USER_NOTIF": call_filter.RET_USER_NOTIF,
    "AUDIT_ARCH_X86_64": call_filter.AUDIT_ARCH_X86_64,
    "AUDIT_ARCH_I386": call_filter.AUDIT_ARCH_I386,
    "BPF_LD | BPF_W | BPF_ABS": call_filter.LOAD,
    "BPF_JMP | BPF_JEQ | BPF_K": call_filter.JUMP_IF_EQUAL,
    "BPF_RET | BPF_K": call_filter.RETURN,
    "offsetof(struct seccomp_data, nr)": call_filter._NUMBER,
    "offsetof(struct seccomp_data, arch)": call_filter._ARCH,
    "offsetof(struct seccomp_data, args)": call_filter._ARGUMENTS,
    "PR_SET_DUMPABLE": call_filter.PR_SET_DUMPABLE,
    "PR_SET_NO_NEW_PRIVS": seccomp._PR_SET_NO_NEW_PRIVS,
    "PR_SET_PDEATHSIG": spawn._PR_SET_PDEATHSIG,
    "PR_SET_CHILD_SUBREAPER": spawn._PR_SET_CHILD_SUBREAPER,
    "SI_KERNEL": supervisor._SI_KERNEL,
    "sizeof(sigset_t)": supervisor._SIGSET_SIZE,
    "SYS_open": call_filter.SYS_OPEN,
    "SYS_openat": call_filter.SYS_OPENAT,
    "SYS_openat2": call_filter.SYS_OPENAT2,
    "SYS_creat": call_filter.SYS_CREAT,
    "SYS_ioctl": call_filter.SYS_IOCTL,
    "SYS_prctl": call_filter.SYS_PRCTL,
    "SYS_seccomp": seccomp._SYS_SECCOMP,
    "SIGKILL": signal.SIGKILL,
}
# C struct -> our layout, and the members in its order.
LAYOUTS: dict[str, tuple[struct.Struct, str]] = {
    "sev_issue_cmd": (psp_sev.ISSUE_CMD, "cmd data error"),
    "sev_user_data_pek_csr": (psp_sev.PEK_CSR, "address length"),
    "sev_user_data_pdh_cert_export": (
        psp_sev.PDH_CERT_EXPORT,
        "pdh_cert_address pdh_cert_len cert_chain_address cert_chain_len",
    ),
    "sev_user_data_pek_cert_import": (
        psp_sev.PEK_CERT_IMPORT,
        "pek_cert_address pek_cert_len oca_cert_address oca_cert_len",
    ),
    "sev_user_data_get_id2": (psp_sev.GET_ID2, "address length"),
    "kvm_cpuid2": (kvm.CPUID2, "nent padding"),
    "kvm_cpuid_entry2": (kvm.CPUID_ENTRY, "function index flags eax ebx ecx edx"),
    "kvm_enc_region": (kvm.ENC_REGION, "addr size"),
    "kvm_sev_cmd": (kvm.SEV_CMD, "id data error sev_fd"),
    "kvm_sev_launch_start": (kvm.LAUNCH_START, "handle policy dh_uaddr dh_len session_uaddr session_len"),
    "kvm_sev_launch_update_data": (kvm.LAUNCH_UPDATE_DATA, "uaddr len"),
    "kvm_sev_launch_secret": (
        kvm.LAUNCH_SECRET,
        "hdr_uaddr hdr_len guest_uaddr guest_len trans_uaddr trans_len",
    ),
    "kvm_sev_launch_measure": (kvm.LAUNCH_MEASURE, "uaddr len"),
    "kvm_sev_guest_status": (kvm.GUEST_STATUS, "handle policy state"),
    "kvm_sev_attestation_report": (kvm.ATTESTATION_REPORT, "mnonce uaddr len"),
    "sock_filter": (call_filter.INSTRUCTION, "code jt jf k"),
    "seccomp_notif": (
        seccomp.NOTIF,
        "id pid flags data.nr data.arch data.instruction_pointer "
        + " ".join(f"data.args[{number}]" for number in range(6)),
    ),
    "seccomp_notif_resp": (seccomp.NOTIF_RESP, "id val error flags"),
    "seccomp_notif_addfd": (seccomp.NOTIF_ADDFD_STRUCT, "id flags srcfd newfd newfd_flags"),
    "signalfd_siginfo": (supervisor._SIGINFO, "ssi_signo ssi_errno ssi_code"),
}
HEADERS = (
    *("linux/psp-sev.h", "linux/kvm.h", "linux/seccomp.h", "linux/audit.h", "linux/filter.h", "linux/signalfd.h"),
    *("sys/prctl.h", "sys/syscall.h", "signal.h", "stddef.h", "stdio.h"),
)


@cache
def said_by_headers(expressions: tuple[str, ...]) -> dict[str, int]:
    """What the C compiler makes of each expression."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not Path("/usr/include/linux/psp-sev.h").exists():
        pytest.skip("no C compiler or no kernel headers: install the packages gcc and linux-libc-dev")
    lines = [f"#include <{header}>" for header in HEADERS]
    lines += ["int main(void) {", *(f'printf("%llu\\n", (unsigned long long)({text}));' for text in expressions), "}"]
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "headers"
        words = [compiler, "-x", "c", "-D_GNU_SOURCE", "-o", str(program), "-"]
        built = subprocess.run(words, input="\n".join(lines), capture_output=True, text=True, check=False)
        assert built.returncode == 0, built.stderr
        said = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout
    return dict(zip(expressions, map(int, said.split()), strict=True))


def members(name: str) -> tuple[str, ...]:
    return tuple(f"offsetof(struct {name}, {member})" for member in LAYOUTS[name][1].split())


def all_expressions() -> tuple[str, ...]:
    sizes = (f"sizeof(struct {name})" for name in LAYOUTS)
    return (*NUMBERS, *sizes, *(text for name in LAYOUTS for text in members(name)))


@pytest.mark.parametrize("expression", NUMBERS)
def test_a_number_is_the_headers(expression: str) -> None:
    assert said_by_headers(all_expressions())[expression] == NUMBERS[expression]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_struct_has_the_size_and_the_offsets_of_the_headers(name: str) -> None:
    layout, said = LAYOUTS[name][0], said_by_headers(all_expressions())
    assert layout.size == said[f"sizeof(struct {name})"]
    assert offsets(layout) == [said[text] for text in members(name)]


def offsets(layout: struct.Struct) -> list[int]:
    """Where each field of a layout begins: the first byte that a field set to ones changes."""
    fields = layout.unpack(bytes(layout.size))
    found = []
    for number, field in enumerate(fields):
        ones = b"\xff" * len(field) if isinstance(field, bytes) else 1
        packed = layout.pack(*fields[:number], ones, *fields[number + 1 :])
        found.append(next(at for at, byte in enumerate(packed) if byte))
    return found
