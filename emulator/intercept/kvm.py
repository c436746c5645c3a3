"""linux/kvm.h: the requests that matter to a SEV guest, and the structs of KVM's SEV commands (x86-64). Pure."""

from __future__ import annotations

import struct
from enum import IntEnum

KVM_CREATE_VM = 0x0000AE01
KVM_CREATE_VCPU = 0x0000AE41
KVM_SET_CPUID2 = 0x4008AE90
KVM_MEMORY_ENCRYPT_OP = 0xC008AEBA
KVM_MEMORY_ENCRYPT_REG_REGION = 0x8010AEBB
KVM_MEMORY_ENCRYPT_UNREG_REGION = 0x8010AEBC

CPUID2 = struct.Struct("<II")  # struct kvm_cpuid2: number of entries, padding
CPUID_ENTRY = struct.Struct("<7I12x")  # struct kvm_cpuid_entry2: function, index, flags, eax, ebx, ecx, edx
CPUID_ENTRIES_MAX = 256  # KVM_MAX_CPUID_ENTRIES (arch/x86/include/asm/kvm_host.h)

ENC_REGION = struct.Struct("<QQ")  # address, size
SEV_CMD = struct.Struct("<I4xQII")  # id, data, error, descriptor of /dev/sev
LAUNCH_START = struct.Struct("<IIQI4xQI4x")  # handle, policy, GODH's address and length, session's address and length
LAUNCH_UPDATE_DATA = struct.Struct("<QI4x")  # address, length
LAUNCH_SECRET = struct.Struct("<QI4xQI4xQI4x")  # address and length of: header, place in guest memory, packet
LAUNCH_MEASURE = struct.Struct("<QI4x")  # address, length
GUEST_STATUS = struct.Struct("<III")  # handle, policy, state
ATTESTATION_REPORT = struct.Struct("<16sQI4x")  # nonce, address, length


class SevCommand(IntEnum):
    """`enum sev_cmd_id`, those that are understood here."""

    INIT = 0
    ES_INIT = 1
    LAUNCH_START = 2
    LAUNCH_UPDATE_DATA = 3
    LAUNCH_UPDATE_VMSA = 4
    LAUNCH_SECRET = 5
    LAUNCH_MEASURE = 6
    LAUNCH_FINISH = 7
    GUEST_STATUS = 16
    GET_ATTESTATION_REPORT = 20
