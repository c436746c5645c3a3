"""`make bench`: ours against the unavoidable, or against another program, measured side by side.

Absolute times say more about the machine than about the code; the ratio of two things that take turns in one run does
not. Each row of the first table is the median of the pairs' ratios, with the smallest and largest beside it; the second
table is `tests.bench.serving`'s.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding
from sevsnpmeasure.guest import calc_launch_digest
from sevsnpmeasure.sev_mode import SevMode

from common.sev.abi import PolicyBit
from common.sev.certs.verify import verify_platform
from common.sev.digest.compute import LaunchShape, hash_chunks, measure_firmware
from common.sev.digest.cpus import parse_cpu
from common.sev.digest.kernel_hashes import KernelHashes
from common.sev.digest.vmsa import Flavour
from common.sev.policy import GuestPolicy
from common.sev.session import LaunchKeys, open_session
from emulator.firmware_image import write_image
from tests.bench.serving import report
from tests.support.chains import make_platform, p384

_CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison: what ours does, what it is held against, and how often to take turns."""

    name: str
    yardstick: str
    ours: Callable[[], object]
    other: Callable[[], object]
    pairs: int


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk


def _chain_row() -> Row:
    platform = make_platform(bits=4096)
    roots = [platform.root]
    key = p384()
    data = bytes(1044)
    signature = key.sign(data, ec.ECDSA(hashes.SHA256()))
    rsa_key = platform.ca.ask_key
    pss = padding.PSS(mgf=padding.MGF1(hashes.SHA384()), salt_length=48)
    rsa_signature = rsa_key.sign(data, pss, hashes.SHA384())

    def primitives() -> None:
        # What a chain needs at the least: ARK twice and ASK once; CEK, OCA (twice) and PEK once each.
        for _ in range(3):
            rsa_key.public_key().verify(rsa_signature, data, pss, hashes.SHA384())
        for _ in range(4):
            key.public_key().verify(signature, data, ec.ECDSA(hashes.SHA256()))

    return Row(
        name="verify a platform's chain",
        yardstick="its 3 RSA-4096 and 4 P-384 verifications",
        ours=lambda: verify_platform(platform.chain, roots),
        other=primitives,
        pairs=40,
    )


def _session_row() -> Row:
    platform = make_platform()
    policy = GuestPolicy.build(PolicyBit.NODBG | PolicyBit.ES, (1, 55))
    peer = p384()

    def ours() -> None:
        open_session(
            pdh=platform.chain.pdh,
            policy=policy,
            keys=LaunchKeys.generate(os.urandom),
            godh_key=ec.generate_private_key(ec.SECP384R1()),
            nonce=os.urandom(16),
            iv=os.urandom(16),
        )

    return Row(
        name="open a session",
        yardstick="one P-384 key and one ECDH",
        ours=ours,
        other=lambda: ec.generate_private_key(ec.SECP384R1()).exchange(ec.ECDH(), peer.public_key()),
        pairs=40,
    )


def _initrd_row(folder: Path) -> Row:
    initrd = folder / "initrd"
    initrd.write_bytes(os.urandom(_CHUNK) * 64)

    def whole() -> None:
        with initrd.open("rb") as file:
            hashlib.file_digest(file, "sha256")

    return Row(
        name="hash a 64 MiB initrd",
        yardstick="hashlib.file_digest",
        ours=lambda: hash_chunks(_chunks(initrd)),
        other=whole,
        pairs=7,
    )


def _digest_row(folder: Path) -> Row:
    image = folder / "OVMF.fd"
    write_image(image, "bench")
    kernel = folder / "kernel"
    kernel.write_bytes(os.urandom(1 << 20))
    cpu = parse_cpu("EPYC-Milan")

    def ours() -> bytes:
        firmware = measure_firmware(_chunks(image))
        kernel_hashes = KernelHashes.of(hash_chunks(_chunks(kernel)), None, b"console=ttyS0")
        return LaunchShape(firmware=firmware, hashes=kernel_hashes, vcpus=16, cpu=cpu, flavour=Flavour.INIT2).digest()

    def theirs() -> bytes:
        digest = calc_launch_digest(
            SevMode.SEV_ES, 16, cpu.signature, str(image), str(kernel), "", "console=ttyS0", guest_features=0
        )
        return bytes(digest)

    if ours() != theirs():
        raise SystemExit("bench: the two digests differ; nothing to compare")
    return Row(
        name="digest: 4 MiB firmware, kernel, 16 vCPUs",
        yardstick="sev-snp-measure, in process",
        ours=ours,
        other=theirs,
        pairs=15,
    )


def _peak(size: int, folder: Path) -> int:
    """Peak memory in KiB of a process that hashes a file of `size` bytes."""
    path = folder / f"blob-{size}"
    with path.open("wb") as file:
        file.truncate(size)
    program = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from tests.bench.__main__ import _chunks\n"
        "from common.sev.digest.compute import hash_chunks\n"
        "hash_chunks(_chunks(Path(sys.argv[1])))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], check=True, capture_output=True, text=True)
    path.unlink()
    return int(done.stdout)


def _pairs(folder: Path) -> None:
    print(f"{'ours':<42} {'against':<44} {'median':>7} {'min':>7} {'max':>7} {'ours, ms':>9}")
    for row in (_chain_row(), _session_row(), _initrd_row(folder), _digest_row(folder)):
        row.ours()
        row.other()
        pairs = [(_seconds(row.ours), _seconds(row.other)) for _ in range(row.pairs)]
        ratios = [ours / other for ours, other in pairs]
        milliseconds = statistics.median(ours for ours, _ in pairs) * 1000
        print(
            f"{row.name:<42} {row.yardstick:<44} {statistics.median(ratios):>7.2f} {min(ratios):>7.2f} "
            f"{max(ratios):>7.2f} {milliseconds:>9.2f}"
        )
    small, large = _peak(16 << 20, folder), _peak(1 << 30, folder)
    print(f"{'peak memory: hash 1 GiB':<42} {'hash 16 MiB':<44} {large / small:>7.2f}")


def main() -> int:
    """Print the table; 0."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--only", choices=("pairs", "serving"), help="measure only this")
    only = parser.parse_args().only
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if only != "serving":
            _pairs(folder)
        if only != "pairs":
            report(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
