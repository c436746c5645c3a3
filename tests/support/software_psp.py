"""A software PSP in this process, what it answers in values, and guest owners for it.

`make_owner` is our `common.sev`: the third opinion. `raw_session` follows the format with nothing but a cipher, for the
sessions that `common.sev` refuses to make.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from common.sev.abi import Algo, PlatformState, Status, Usage
from common.sev.certs.sev import SevCertificate, encode
from common.sev.policy import GuestPolicy
from common.sev.secret import SecretPacket, seal_packet
from common.sev.session import LaunchKeys, open_session
from emulator.errors import FirmwareFailed
from emulator.identity import IdentityFile
from emulator.keys import Chip
from emulator.psp import Psp
from tests.support.platform import give_chip


def make_psp(folder: Path, generation: str, *, es: bool = True) -> Psp:
    give_chip(folder, generation)
    return Psp(Chip.load(folder / "chip"), IdentityFile(folder / "identity.json"), es=es)


@dataclass
class Owner:
    """A guest owner with a fresh session for one platform and policy."""

    policy: int
    keys: LaunchKeys
    godh: bytes
    session: bytes

    def packet(self, table: bytes, measurement: bytes) -> SecretPacket:
        return seal_packet(keys=self.keys, table=table, measurement=measurement, iv=os.urandom(16), area_size=0xC00)


def make_owner(psp: Psp, policy: int) -> Owner:
    """An owner for the platform's present PDH."""
    pdh = SevCertificate.parse(psp.pdh_cert_export(2084, 6252)[0])
    keys = LaunchKeys.generate(os.urandom)
    session = open_session(
        pdh=pdh,
        policy=GuestPolicy(value=policy),
        keys=keys,
        godh_key=ec.generate_private_key(ec.SECP384R1()),
        nonce=os.urandom(16),
        iv=os.urandom(16),
    )
    return Owner(policy, keys, session.godh.raw, session.blob)


def started(psp: Psp, policy: int = 0x7) -> tuple[int, Owner]:
    """The handle of a guest whose launch has begun, with an ASID of the same number, and its owner."""
    if psp.state is PlatformState.UNINIT:
        psp.init()
    owner = make_owner(psp, policy)
    handle = psp.launch_start(policy=policy, godh=owner.godh, session=owner.session)
    psp.activate(handle, handle)
    return handle, owner


def raw_session(psp: Psp, policy: int, *, tik: bytes = b"i" * 16, tek: bytes = b"e" * 16) -> tuple[bytes, bytes]:
    """GODH and session for any policy word and any keys."""
    pdh = SevCertificate.parse(psp.pdh_cert_export(2084, 6252)[0])
    godh_key = ec.generate_private_key(ec.SECP384R1())

    def kdf(key: bytes, label: bytes, context: bytes = b"") -> bytes:
        return hmac.digest(key, b"\1\0\0\0" + label + b"\0" + context + b"\x80\0\0\0", "sha256")[:16]

    nonce, iv = os.urandom(16), os.urandom(16)
    master = kdf(godh_key.exchange(ec.ECDH(), pdh.public_key), b"sev-master-secret", nonce)
    wrapped = Cipher(algorithms.AES128(kdf(master, b"sev-kek")), modes.CTR(iv)).encryptor().update(tek + tik)
    wrap_mac = hmac.digest(kdf(master, b"sev-kik"), wrapped, "sha256")
    policy_mac = hmac.digest(tik, policy.to_bytes(4, "little"), "sha256")
    godh = encode(usage=Usage.PDH, algo=Algo.ECDH_SHA256, public_key=godh_key.public_key())
    return godh.raw, nonce + wrapped + iv + wrap_mac + policy_mac


def flipped(data: bytes, bit: int) -> bytes:
    """`data` with one bit changed."""
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def export(psp: Psp) -> tuple[SevCertificate, SevCertificate, SevCertificate, SevCertificate]:
    """The platform's PDH, PEK, OCA and CEK."""
    pdh, chain = psp.pdh_cert_export(2084, 6252)
    pek, oca, cek = (SevCertificate.parse(chain[at : at + 2084]) for at in (0, 2084, 4168))
    return SevCertificate.parse(pdh), pek, oca, cek


def status_fields(psp: Psp) -> tuple[int, ...]:
    """Api major, minor, state, flags, build, guests: read as psp-sev.h has them."""
    data = psp.platform_status()
    assert len(data) == 12
    return (*data[:3], int.from_bytes(data[3:7], "little"), data[7], int.from_bytes(data[8:], "little"))


def status_of(action: Callable[[], object]) -> Status:
    """The status with which the firmware refuses this."""
    with pytest.raises(FirmwareFailed) as failure:
        action()
    return failure.value.status
