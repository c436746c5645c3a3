"""The platform's changeable identity, as the firmware keeps it in flash: PEK, OCA, PDH and who owns the platform.

Values, the steps that make new ones (AMD document 55766, PEK_GEN, PEK_CERT_IMPORT, PDH_GEN), and the file that keeps
them. The firmware signs the PEK with the OCA first and with the CEK second; after an import the owner's signature comes
first and the CEK's takes the next free slot.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from common.errors import InvalidInput, Refused
from common.sev.abi import Algo, Status, Usage
from common.sev.certs.sev import SevCertificate, add_ecdsa_signature, encode, verify_signature
from emulator.errors import FirmwareFailed, StateFolderUnusable
from emulator.keys import Chip, to_pem
from emulator.state_folder import write_file

_FILE_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Keys and certificates between two changes.

    Attributes:
        external: whether an owner outside of the platform holds the OCA.
        oca: self-signed; the platform's own or the owner's.
        pek: signed by OCA and CEK.
        pdh: signed by the PEK.
        pek_key: signs the PDH and reports.
        pdh_key: the platform's end of every owner's channel.
    """

    external: bool
    oca: SevCertificate
    pek: SevCertificate
    pdh: SevCertificate
    pek_key: ec.EllipticCurvePrivateKey = field(repr=False)
    pdh_key: ec.EllipticCurvePrivateKey = field(repr=False)

    @property
    def csr(self) -> bytes:
        """The PEK with both signature slots empty: 2084 bytes."""
        key, api = self.pek.public_key, (self.pek.api_major, self.pek.api_minor)
        return _certificate(Usage.PEK, Algo.ECDSA_SHA256, key, api).raw


def generate(chip: Chip) -> Identity:
    """A self-owned platform with new OCA, PEK and PDH: what INIT makes of an empty flash, and PEK_GEN of any."""
    api = chip.generation.api
    oca_key, pek_key = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    oca = _certificate(Usage.OCA, Algo.ECDSA_SHA256, oca_key.public_key(), api)
    oca = add_ecdsa_signature(oca, usage=Usage.OCA, key=oca_key)
    pek = _certificate(Usage.PEK, Algo.ECDSA_SHA256, pek_key.public_key(), api)
    pek = add_ecdsa_signature(pek, usage=Usage.OCA, key=oca_key)
    pek = add_ecdsa_signature(pek, usage=Usage.CEK, key=chip.cek_key)
    pdh, pdh_key = _new_pdh(chip, pek_key)
    # The OCA's private key has signed all that it ever will, and is gone: nobody can own this platform by it.
    return Identity(external=False, oca=oca, pek=pek, pdh=pdh, pek_key=pek_key, pdh_key=pdh_key)


def is_of(identity: Identity, chip: Chip) -> bool:
    """Whether this chip made the identity: real flash is sealed to its chip, and a strange one counts as empty."""
    try:
        verify_signature(identity.pek, chip.cek)
    except Refused:
        return False
    return True


def with_new_pdh(identity: Identity, chip: Chip) -> Identity:
    """The same platform with another PDH: every session made for the old one is void."""
    pdh, pdh_key = _new_pdh(chip, identity.pek_key)
    return replace(identity, pdh=pdh, pdh_key=pdh_key)


def with_owner(identity: Identity, chip: Chip, *, pek: bytes, oca: bytes) -> Identity:
    """The platform after PEK_CERT_IMPORT: owned by whoever holds the key of `oca`, with a new PDH.

    Args:
        identity: the self-owned platform.
        chip: its chip.
        pek: the CSR with the owner's signature, 2084 bytes.
        oca: the owner's self-signed certificate, 2084 bytes.

    Raises:
        FirmwareFailed: INVALID_CERTIFICATE or BAD_SIGNATURE.
    """
    try:
        owner, signed = SevCertificate.parse(oca), SevCertificate.parse(pek)
    except InvalidInput as error:
        raise FirmwareFailed(Status.INVALID_CERTIFICATE) from error
    if (owner.usage, signed.usage) != (Usage.OCA, Usage.PEK):
        raise FirmwareFailed(Status.INVALID_CERTIFICATE)
    try:
        verify_signature(owner, owner)
        verify_signature(signed, owner)
    except Refused as error:
        raise FirmwareFailed(Status.BAD_SIGNATURE) from error
    if signed.body != identity.pek.body:
        raise FirmwareFailed(Status.INVALID_CERTIFICATE)
    if not signed.slots[1].is_empty and not signed.slots[0].is_empty:
        raise FirmwareFailed(Status.INVALID_CERTIFICATE)  # no room for the CEK's signature
    signed = add_ecdsa_signature(signed, usage=Usage.CEK, key=chip.cek_key)
    return with_new_pdh(replace(identity, external=True, oca=owner, pek=signed), chip)


class IdentityFile:
    """The flash: one private file, replaced as a whole."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def load(self) -> Identity | None:
        """What is kept, or None for an empty flash.

        Raises:
            StateFolderUnusable: the file is not one of ours.
        """
        try:
            kept = json.loads(self._path.read_text(encoding="ascii"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise StateFolderUnusable(f"{self._path} is not a platform's identity") from error
        try:
            if kept["version"] != _FILE_VERSION:
                raise StateFolderUnusable(f"{self._path} is of a version that this program does not know")
            return Identity(
                external=kept["external"] is True,
                oca=SevCertificate.parse(base64.b64decode(kept["oca"])),
                pek=SevCertificate.parse(base64.b64decode(kept["pek"])),
                pdh=SevCertificate.parse(base64.b64decode(kept["pdh"])),
                pek_key=_private(kept["pek_key"]),
                pdh_key=_private(kept["pdh_key"]),
            )
        except (KeyError, TypeError, ValueError, InvalidInput) as error:
            raise StateFolderUnusable(f"{self._path} is not a platform's identity") from error

    def save(self, identity: Identity) -> None:
        """Keep `identity` instead of what was kept."""
        kept = {
            "version": _FILE_VERSION,
            "external": identity.external,
            "oca": base64.b64encode(identity.oca.raw).decode("ascii"),
            "pek": base64.b64encode(identity.pek.raw).decode("ascii"),
            "pdh": base64.b64encode(identity.pdh.raw).decode("ascii"),
            "pek_key": to_pem(identity.pek_key).decode("ascii"),
            "pdh_key": to_pem(identity.pdh_key).decode("ascii"),
        }
        write_file(self._path, json.dumps(kept, indent=1).encode("ascii"))

    def erase(self) -> None:
        """Empty the flash."""
        self._path.unlink(missing_ok=True)


def _new_pdh(chip: Chip, pek_key: ec.EllipticCurvePrivateKey) -> tuple[SevCertificate, ec.EllipticCurvePrivateKey]:
    key = ec.generate_private_key(ec.SECP384R1())
    pdh = _certificate(Usage.PDH, Algo.ECDH_SHA256, key.public_key(), chip.generation.api)
    return add_ecdsa_signature(pdh, usage=Usage.PEK, key=pek_key), key


def _certificate(usage: Usage, algo: Algo, key: ec.EllipticCurvePublicKey, api: tuple[int, int]) -> SevCertificate:
    return encode(usage=usage, algo=algo, public_key=key, api_major=api[0], api_minor=api[1])


def _private(pem: str) -> ec.EllipticCurvePrivateKey:
    key = load_pem_private_key(pem.encode("ascii"), None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise TypeError("not an elliptic-curve key")
    return key
