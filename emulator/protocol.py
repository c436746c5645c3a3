"""The device socket's frames and numbers (docs/software-platform.md), for both ends that live in this package.

    request   u32 command, u32 payload length, payload
    reply     i32 errno (0 or positive), u32 firmware status, u32 payload length, payload

The first request on a connection is OPEN. The device commands 0 to 8 are those of linux/psp-sev.h; guest commands stand
where KVM's `KVM_MEMORY_ENCRYPT_OP` would.
"""

from __future__ import annotations

import struct
from enum import IntEnum

REQUEST = struct.Struct("<II")
REPLY = struct.Struct("<iII")
MAX_PAYLOAD = 65536  # far above the largest command (16 KiB blobs) and small enough for any peer
OPEN = 0xFFFF0000
READ_ONLY = 0
READ_WRITE = 1

# Payload heads, each followed by the blobs that its lengths announce.
LENGTH = struct.Struct("<I")
TWO_LENGTHS = struct.Struct("<II")
LAUNCH_START = struct.Struct("<IIII")  # shared handle, policy, GODH length, session length
UPDATE = struct.Struct("<Q")  # guest physical address
LAUNCH_SECRET = struct.Struct("<QIII")  # guest physical address, header, guest and transport lengths
ATTESTATION = struct.Struct("<16sI")  # nonce, length
GUEST_STATUS = struct.Struct("<III")  # policy, ASID, state


class GuestRequest(IntEnum):
    """Guest commands of a connection's one guest, and a look at the whole platform."""

    LAUNCH_START = 0x100
    LAUNCH_UPDATE_DATA = 0x101
    LAUNCH_UPDATE_VMSA = 0x102
    LAUNCH_MEASURE = 0x103
    LAUNCH_SECRET = 0x104
    LAUNCH_FINISH = 0x105
    ATTESTATION = 0x106
    GUEST_STATUS = 0x107
    DECOMMISSION = 0x108
    DESCRIBE = 0x1F0  # the platform and its guests, as JSON; what `sevattest platform show` prints
