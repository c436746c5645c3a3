"""Makes a small LUKS2 volume with content in a file: no root, no device-mapper, no loop device.

cryptsetup writes the header for a volume key that it is given; what dm-crypt would do with the data (AES-XTS, sectors
of 512 bytes numbered from 0) is done here. A real kernel opens the result in the guest.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import tempfile
from pathlib import Path

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from common.errors import InvalidInput, Reason

_SECTOR = 512
_KEY_SIZE = 64  # two AES-256 keys
_METADATA_SIZE = 16 * 1024  # of each of the two headers, the smallest
_JSON_AT = 4096  # behind the binary header (LUKS2 On-Disk Format, section 2)
_FORMAT = (
    *("--type", "luks2", "--cipher", "aes-xts-plain64", "--key-size", "512", "--sector-size", "512"),
    # Its passphrase is a generated secret, so there is nothing to stretch; the guest runs under emulation.
    *("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--hash", "sha256"),
    *("--luks2-metadata-size", "16k", "--luks2-keyslots-size", "256k"),
)


def cryptsetup_command(folder: Path | None) -> list[str]:
    """The words that run cryptsetup: the one in a folder as `make guest` makes it, else the one on the PATH.

    Args:
        folder: with `cryptsetup`, `ld.so` and libraries; None where there is none.

    Raises:
        InvalidInput: there is neither.
    """
    if folder is not None and (folder / "ld.so").is_file():
        return [str(folder / "ld.so"), "--library-path", str(folder), str(folder / "cryptsetup")]
    found = shutil.which("cryptsetup", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
    if found is None:
        raise InvalidInput(
            Reason.INVALID_CONFIGURATION, "cryptsetup is not there; `make guest` gets it, or install Debian's package"
        )
    return [found]


def make_volume(path: Path, passphrase: bytes, content: bytes, *, cryptsetup: Path | None = None) -> None:
    """Write a volume that opens with `passphrase` and starts with `content`, padded with NUL to whole sectors.

    Args:
        path: the file, which is replaced.
        passphrase: as cryptsetup is to be given it, without a NUL at its end. Up to 64 bytes a volume opens with such
            a NUL too, because HMAC pads its key with them; only a longer one shows that it was taken off.
        content: what the opened volume starts with.
        cryptsetup: a folder with the program; the one on the PATH by default.

    Raises:
        InvalidInput: cryptsetup is not there, or does not do it.
    """
    plain = content + bytes(-len(content) % _SECTOR)
    key = secrets.token_bytes(_KEY_SIZE)
    with tempfile.TemporaryDirectory() as folder:
        key_file = Path(folder) / "volume-key"
        key_file.write_bytes(key)
        with path.open("wb") as file:
            file.truncate(1 << 20)  # room for the header; the data makes it grow
        format_it = [*cryptsetup_command(cryptsetup), "luksFormat", "--batch-mode", "--disable-locks", *_FORMAT]
        done = subprocess.run(
            [*format_it, "--volume-key-file", str(key_file), "--key-file", "-", str(path)],
            input=passphrase,
            capture_output=True,
            check=False,
        )
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()
        raise InvalidInput(Reason.INVALID_CONFIGURATION, f"cryptsetup makes no volume: {said}")
    with path.open("r+b") as file:
        file.seek(_data_offset(path))
        file.write(_encrypt(key, plain))


def _data_offset(path: Path) -> int:
    with path.open("rb") as file:
        file.seek(_JSON_AT)
        metadata = json.loads(file.read(_METADATA_SIZE - _JSON_AT).split(b"\0", 1)[0])
    return int(metadata["segments"]["0"]["offset"])


def _encrypt(key: bytes, plain: bytes) -> bytes:
    """What dm-crypt's aes-xts-plain64 writes: each sector on its own, its number as the tweak."""
    written = b""
    for at in range(0, len(plain), _SECTOR):
        tweak = (at // _SECTOR).to_bytes(16, "little")
        encryptor = Cipher(algorithms.AES(key), modes.XTS(tweak)).encryptor()
        written += encryptor.update(plain[at : at + _SECTOR]) + encryptor.finalize()
    return written
