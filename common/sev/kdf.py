"""Key derivation of the SEV API: NIST SP 800-108 in counter mode with HMAC-SHA-256.

Source: AMD document 55766, key derivation; formats.md section 6. Counter and length are 32-bit **little-endian**, which
is why the big-endian derivations of common libraries give other keys and none of them is used here.
"""

from __future__ import annotations

from common.mac import hmac_sha256
from common.sev.abi import KEY_SIZE

_COUNTER = (1).to_bytes(4, "little")  # one block of 32 bytes holds the 16 that are asked for
_LENGTH_BITS = (KEY_SIZE * 8).to_bytes(4, "little")

LABEL_MASTER = "sev-master-secret"
LABEL_KEK = "sev-kek"
LABEL_KIK = "sev-kik"


def derive(key: bytes, label: str, context: bytes = b"") -> bytes:
    """A 16-byte key from `key`, for the purpose that `label` names.

    Args:
        key: the input key, any length.
        label: ASCII, without a NUL at its end.
        context: public data that the new key is bound to.

    Returns:
        16 bytes.
    """
    message = _COUNTER + label.encode("ascii") + b"\0" + context + _LENGTH_BITS
    return hmac_sha256(key, message)[:KEY_SIZE]
