"""What is burnt into a chip, and the root above it: generation, chip id, CEK, ASK, ARK. Made once per state folder.

The root is this folder's own. Its ARK and ASK carry the key ids of the real generation, because AMD's tool tells the
generation by the ARK's id; whoever trusts an id instead of a key would take this platform for a real one.
"""

from __future__ import annotations

import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Self

from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from common.sev.abi import Algo, Usage
from common.sev.certs.amd import AmdCertificate
from common.sev.certs.amd import encode as encode_amd
from common.sev.certs.sev import SevCertificate, add_rsa_signature
from common.sev.certs.sev import encode as encode_sev
from emulator.errors import StateFolderUnusable
from emulator.state_folder import write_file

_COORDINATE_SIZE = 32  # of the chip id: two big-endian P-256 coordinates
# Every CEK seen in the field names this API, whatever the firmware is.
_CEK_API = (0, 14)


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A processor generation as this platform imitates it.

    Attributes:
        name: as AMD's files name it.
        api: firmware API, major and minor.
        build: firmware build.
        cbitpos: position of the encryption bit in a page address (CPUID 0x8000001f EBX[5:0]).
        asids: guests that can be active at once (CPUID 0x8000001f ECX).
        rsa_bits: size of ARK and ASK.
        ark_id: the real ARK's key id, 16 bytes.
        ask_id: the real ASK's key id, 16 bytes.
    """

    name: str
    api: tuple[int, int]
    build: int
    cbitpos: int
    asids: int
    rsa_bits: int
    ark_id: bytes
    ask_id: bytes


def _generation(  # noqa: PLR0917 -- one row of the table below
    name: str, api: tuple[int, int], build: int, cbitpos: int, asids: int, rsa_bits: int, ark_id: str, ask_id: str
) -> Generation:
    return Generation(
        name=name,
        api=api,
        build=build,
        cbitpos=cbitpos,
        asids=asids,
        rsa_bits=rsa_bits,
        ark_id=bytes.fromhex(ark_id),
        ask_id=bytes.fromhex(ask_id),
    )


# Builds are the newest that linux-firmware or field reports show for each generation.
GENERATIONS = MappingProxyType(
    {
        row.name: row
        for row in (
            _generation(
                "naples",
                (0, 17),
                48,
                47,
                15,
                2048,
                "1bb987c359494606b174945601c9ea5b",
                "e139970cfc464377ae61b289e2f9e96e",
            ),
            _generation(
                "rome",
                (0, 24),
                20,
                47,
                509,
                4096,
                "e6002122fb58419399d15fee7b131351",
                "c6cbcf145b3146f498e40ecb4ad4fded",
            ),
            _generation(
                "milan",
                (1, 55),
                24,
                51,
                509,
                4096,
                "94c38e4177d0479292a7ae671d083fb6",
                "73478c05cc174bfeb06e718fa75dc3c8",
            ),
            _generation(
                "genoa",
                (1, 55),
                37,
                51,
                1006,
                4096,
                "9f9d4a8fe761456599f6946c4c010f3a",
                "acbb4ad21acc436fb3e932f812cd01b0",
            ),
            _generation(
                "turin",
                (1, 55),
                54,
                51,
                1006,
                4096,
                "d05c3a8bde484904b49552422ceb3942",
                "15051693f7304d65a527b4a7f3f7cb77",
            ),
        )
    }
)
DEFAULT_GENERATION = "milan"


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One chip with the root that vouches for it.

    Attributes:
        generation: what it imitates.
        chip_id: 64 bytes, what GET_ID2 answers: x || y of a P-256 point, each 32 bytes, big-endian.
        ask: the ASK, signed by `ark`.
        ark: the ARK, self-signed.
        cek: the CEK as the firmware exports it: unsigned.
        cek_key: signs PEKs.
        folder: where the private keys of the root lie.
    """

    generation: Generation
    chip_id: bytes
    ask: AmdCertificate = field(repr=False)
    ark: AmdCertificate = field(repr=False)
    cek: SevCertificate = field(repr=False)
    cek_key: ec.EllipticCurvePrivateKey = field(repr=False)
    folder: Path = field(repr=False)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `make_chip` wrote.

        Raises:
            StateFolderUnusable: this is not such a folder.
        """
        try:
            generation = GENERATIONS[(folder / "generation").read_text(encoding="ascii").strip()]
            half = (folder / "ask_ark.cert").stat().st_size // 2
            both = (folder / "ask_ark.cert").read_bytes()
            cek_key, id_key = _load_ec(folder / "cek.pem"), _load_ec(folder / "id.pem")
        except (KeyError, ValueError, OSError) as error:
            raise StateFolderUnusable(f"{folder} does not hold a chip") from error
        return cls(
            generation=generation,
            chip_id=_chip_id(id_key),
            ask=AmdCertificate.parse(both[:half]),
            ark=AmdCertificate.parse(both[half:]),
            cek=_cek(cek_key),
            cek_key=cek_key,
            folder=folder,
        )

    def signed_cek(self) -> SevCertificate:
        """The CEK with a fresh ASK signature: another one each time, as AMD's key service gives it."""
        return add_rsa_signature(self.cek, key=_load_rsa(self.folder / "ask.pem"))


def _make_rsa(bits: int) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=bits)


def make_chip(folder: Path, generation: Generation) -> Chip:
    """Make a chip and its root in `folder`, which appears complete or not at all. Takes seconds: two large RSA keys."""
    with ThreadPoolExecutor(2) as workers:  # both at once: making them is what a first start waits for
        ark_key, ask_key = workers.map(_make_rsa, [generation.rsa_bits] * 2)
    ark = encode_amd(
        usage=Usage.ARK,
        key_id=generation.ark_id,
        certifying_id=generation.ark_id,
        public_key=ark_key.public_key(),
        signer=ark_key,
    )
    ask = encode_amd(
        usage=Usage.ASK,
        key_id=generation.ask_id,
        certifying_id=generation.ark_id,
        public_key=ask_key.public_key(),
        signer=ark_key,
    )
    keys: dict[str, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey] = {
        "ark.pem": ark_key,
        "ask.pem": ask_key,
        "cek.pem": ec.generate_private_key(ec.SECP384R1()),
        "id.pem": ec.generate_private_key(ec.SECP256R1()),
    }
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        for name, key in keys.items():
            write_file(unfinished / name, to_pem(key))
        write_file(unfinished / "ask_ark.cert", ask.raw + ark.raw)
        write_file(unfinished / "generation", generation.name.encode("ascii") + b"\n")
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return Chip.load(folder)


def to_pem(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> bytes:
    """A private key as unencrypted PKCS #8 PEM."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def publish(chip: Chip, *, ask_ark: Path, kds: Path) -> None:
    """Write what others may know where they look for it, unless it is there: ASK || ARK, and the signed CEK."""
    root = chip.ask.raw + chip.ark.raw
    if not ask_ark.exists() or ask_ark.read_bytes() != root:
        write_file(ask_ark, root, 0o644)
    kds.mkdir(mode=0o755, exist_ok=True)
    signed = kds / f"{chip.chip_id.hex().upper()}.cert"
    if not signed.exists():
        write_file(signed, chip.signed_cek().raw, 0o644)


def _cek(key: ec.EllipticCurvePrivateKey) -> SevCertificate:
    major, minor = _CEK_API
    return encode_sev(
        usage=Usage.CEK, algo=Algo.ECDSA_SHA256, public_key=key.public_key(), api_major=major, api_minor=minor
    )


def _chip_id(key: ec.EllipticCurvePrivateKey) -> bytes:
    point = key.public_key().public_numbers()
    return point.x.to_bytes(_COORDINATE_SIZE, "big") + point.y.to_bytes(_COORDINATE_SIZE, "big")


def _load_ec(path: Path) -> ec.EllipticCurvePrivateKey:
    key = load_pem_private_key(path.read_bytes(), None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise StateFolderUnusable(f"{path} is not an elliptic-curve key")
    return key


def _load_rsa(path: Path) -> rsa.RSAPrivateKey:
    # We made this key: the primality checks of a stranger's would cost more than the signature.
    key = load_pem_private_key(path.read_bytes(), None, unsafe_skip_rsa_key_validation=True)
    if not isinstance(key, rsa.RSAPrivateKey):
        raise StateFolderUnusable(f"{path} is not an RSA key")
    return key
