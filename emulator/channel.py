"""The firmware's end of the owner's channel: unwrap the session, check the policy's MAC, measure, open packets.

Written a second time on purpose, from AMD document 55766 and not from `common.sev`, so that a mistake on the owner's
side meets another opinion here. Nothing here keeps state between calls except what `Channel` holds.

    Z      = x-coordinate of ECDH(PDH private, GODH public), 48 bytes, big-endian
    KDF    = SP 800-108 counter mode, HMAC-SHA-256, counter and length u32 little-endian, 128 bits out
    master = KDF(Z, "sev-master-secret", nonce);  KEK = KDF(master, "sev-kek");  KIK = KDF(master, "sev-kik")
    TEK || TIK = AES-128-CTR(KEK, wrap_iv, wrap_tk), after HMAC(KIK, wrap_tk) = wrap_mac
    HMAC(TIK, policy) = policy_mac
    MEASURE    = HMAC(TIK, 04 || api major || api minor || build || policy || digest || nonce)
    packet MAC = HMAC(TIK, 01 || flags || iv || guest length || transport length || ciphertext || MEASURE)
"""

from __future__ import annotations

import hmac
import struct
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Self

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from common.sev.abi import (
    CURVE_P384,
    KEY_SIZE,
    MAC_MEASURE,
    MAC_SECRET,
    PACKET_HEADER_SIZE,
    Algo,
    Status,
    Usage,
)
from emulator.errors import FirmwareFailed

_P384_PRIME = 2**384 - 2**128 - 2**96 + 2**32 - 1  # FIPS 186, curve P-384
_GODH_HEAD = struct.Struct("<IBB2xIII72s72s")  # version, api, usage, algo, curve, x, y
_SESSION = struct.Struct("<16s32s16s32s32s")  # nonce, wrap_tk, wrap_iv, wrap_mac, policy_mac
_PACKET_HEADER = struct.Struct("<I16s32s")  # flags, iv, mac
_COMPRESSED = 0x1
# Firmware's own bound (20 KiB); the kernel's, 16 KiB, is met first.
_SECRET_MAX = 0x5000


@dataclass(frozen=True, kw_only=True)
class Channel:
    """Transport keys of one launch, 16 bytes each; all zero where the launch came without a session."""

    tek: bytes = field(repr=False)
    tik: bytes = field(repr=False)

    @classmethod
    def without_session(cls) -> Self:
        """What a launch without a GODH gets: zero keys, which prove nothing to anybody."""
        return cls(tek=bytes(KEY_SIZE), tik=bytes(KEY_SIZE))


def open_channel(*, pdh_key: ec.EllipticCurvePrivateKey, godh: bytes, session: bytes, policy: int) -> Channel:
    """Unwrap the owner's keys and check that the policy is the owner's.

    Args:
        pdh_key: the platform's PDH private key.
        godh: the owner's certificate, 2084 bytes, length already checked; its signatures are ignored.
        session: the 128-byte session, length already checked.
        policy: the policy word that the host asks for.

    Raises:
        FirmwareFailed: INVALID_CERTIFICATE, or BAD_MEASUREMENT for either MAC.
    """
    nonce, wrap_tk, wrap_iv, wrap_mac, policy_mac = _SESSION.unpack(session)
    shared = pdh_key.exchange(ec.ECDH(), _owner_key(godh))
    master = derive(shared, b"sev-master-secret", nonce)
    kek, kik = derive(master, b"sev-kek"), derive(master, b"sev-kik")
    _check_mac(kik, wrap_tk, wrap_mac)
    keys = _ctr(kek, wrap_iv, wrap_tk)
    channel = Channel(tek=keys[:KEY_SIZE], tik=keys[KEY_SIZE:])
    _check_mac(channel.tik, struct.pack("<I", policy), policy_mac)
    return channel


def measure(  # noqa: PLR0917 -- the fields of the MAC, in their order
    tik: bytes, api: tuple[int, int], build: int, policy: int, digest: bytes, nonce: bytes
) -> bytes:
    """The launch measurement, 32 bytes (without the nonce that travels behind it)."""
    covered = struct.pack("<BBBBI", MAC_MEASURE, *api, build, policy) + digest + nonce
    return hmac.digest(tik, covered, "sha256")


def open_packet(channel: Channel, *, header: bytes, payload: bytes, guest_length: int, measurement: bytes) -> bytes:
    """Check a secret packet and return its plaintext.

    Args:
        channel: the launch's keys.
        header: 52 bytes.
        payload: the ciphertext.
        guest_length: bytes that the host says the guest gets; must be the payload's length.
        measurement: this launch's measurement, 32 bytes: a packet for another launch fails here.

    Raises:
        FirmwareFailed: BAD_MEASUREMENT, or UNSUPPORTED for a compressed packet (after its MAC was found right).
    """
    flags, iv, mac = _PACKET_HEADER.unpack(header)
    covered = struct.pack("<BI16sII", MAC_SECRET, flags, iv, guest_length, len(payload)) + payload + measurement
    _check_mac(channel.tik, covered, mac)
    if flags & _COMPRESSED:
        raise FirmwareFailed(Status.UNSUPPORTED)
    return _ctr(channel.tek, iv, payload)


def check_packet_lengths(header: bytes, payload: bytes, guest_length: int) -> None:
    """What the firmware checks of a packet before it looks at any key or state.

    Raises:
        FirmwareFailed: INVALID_LEN.
    """
    if (
        len(header) != PACKET_HEADER_SIZE
        or guest_length != len(payload)
        or not 0 < guest_length <= _SECRET_MAX
        or guest_length % 16
    ):
        raise FirmwareFailed(Status.INVALID_LEN)


def derive(key: bytes, label: bytes, context: bytes = b"") -> bytes:
    """The firmware's key derivation: 16 bytes."""
    bits = KEY_SIZE * 8
    block = struct.pack("<I", 1) + label + b"\0" + context + struct.pack("<I", bits)
    return hmac.digest(key, block, "sha256")[:KEY_SIZE]


class LaunchDigest:
    """SHA-256 over everything that was added to the guest, in order; the same on every generation."""

    def __init__(self) -> None:
        self._running = sha256()

    def add(self, data: bytes) -> None:
        """Append what LAUNCH_UPDATE_DATA or LAUNCH_UPDATE_VMSA brought."""
        self._running.update(data)

    def value(self) -> bytes:
        """The digest so far, 32 bytes."""
        return self._running.digest()


def _owner_key(godh: bytes) -> ec.EllipticCurvePublicKey:
    version, _, _, usage, algo, curve, x_bytes, y_bytes = _GODH_HEAD.unpack_from(godh)
    if (version, usage, algo, curve) != (1, Usage.PDH, Algo.ECDH_SHA256, CURVE_P384):
        raise FirmwareFailed(Status.INVALID_CERTIFICATE)
    x, y = int.from_bytes(x_bytes, "little"), int.from_bytes(y_bytes, "little")
    if x >= _P384_PRIME or y >= _P384_PRIME:
        raise FirmwareFailed(Status.INVALID_CERTIFICATE)
    try:
        return ec.EllipticCurvePublicNumbers(x, y, ec.SECP384R1()).public_key()
    except ValueError:
        # Off the curve: answering with it would leak the private PDH bit by bit (CVE-2019-9836).
        raise FirmwareFailed(Status.INVALID_CERTIFICATE) from None


def _check_mac(key: bytes, covered: bytes, mac: bytes) -> None:
    if not hmac.compare_digest(hmac.digest(key, covered, "sha256"), mac):
        raise FirmwareFailed(Status.BAD_MEASUREMENT)


def _ctr(key: bytes, iv: bytes, data: bytes) -> bytes:
    cipher = Cipher(algorithms.AES128(key), modes.CTR(iv)).encryptor()
    return cipher.update(data) + cipher.finalize()
