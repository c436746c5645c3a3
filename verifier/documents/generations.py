"""What is known of each processor generation: firmware floors, whether it is on by default, risks that remain.

Floors are start values that an owner can raise; going below one needs `accept_old_firmware` in the document. Numbers
and their sources: `common/sev/floors.py`. What a verifier cannot see (microcode, AGESA, the order in
which firmware places what it measured) is listed as a risk and written into every receipt of that generation.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.sev.floors import FLOORS
from common.sev.measurement import FirmwareVersion


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One processor generation.

    Attributes:
        name: as `common.sev.certs` names the root that signed its chip keys.
        floor: the oldest firmware that is accepted; None where none is known, so that a document must name one.
        source: where the floor comes from.
        caution: why a document that allows this generation gets a warning; None where there is no cause.
        risks: what attestation on this generation cannot exclude.
    """

    name: str
    floor: FirmwareVersion | None
    source: str
    caution: str | None = None
    risks: tuple[str, ...] = ()


_EVERYWHERE = (
    "CVE-2021-26311: measured blocks count in their order, not by their address, so a host may place them elsewhere",
    "CVE-2020-12966, CVE-2021-46744: ciphertext in memory may tell a watching host about the plaintext",
    "CVE-2024-56161: a host with an unpatched BIOS may load microcode of its own (Zen 1 to Zen 4)",
)

GENERATIONS: dict[str, Generation] = {
    generation.name: generation
    for generation in (
        Generation(
            name="naples",
            floor=FLOORS["naples"].version,
            source=FLOORS["naples"].source,
            caution="any Naples chip can be taken back to firmware that gives its keys away (arXiv 1908.11680)",
            risks=(
                *_EVERYWHERE,
                "arXiv 1908.11680: a Naples chip's CEK can be read out by software, so its identity proves little",
                "CVE-2021-26403: a host may learn a launch secret; the fixing build is not published",
            ),
        ),
        Generation(
            name="rome",
            floor=FLOORS["rome"].version,
            source=FLOORS["rome"].source,
            risks=(
                *_EVERYWHERE,
                "CVE-2023-20592 (CacheWarp): no microcode ends it on this generation",
                "arXiv 2108.04575: with hands on the board a chip's CEK can be taken; allow chips by fingerprint",
            ),
        ),
        Generation(
            name="milan",
            floor=FLOORS["milan"].version,
            source=FLOORS["milan"].source,
            risks=(
                *_EVERYWHERE,
                "arXiv 2605.12990: software alone may read a Milan chip's root seed; allow chips by fingerprint",
                "arXiv 2108.04575: with hands on the board a chip's CEK can be taken",
            ),
        ),
        Generation(
            name="genoa",
            floor=FLOORS["genoa"].version,
            source=FLOORS["genoa"].source,
            risks=_EVERYWHERE,
        ),
        Generation(
            name="turin",
            floor=FLOORS["turin"].version,
            source=FLOORS["turin"].source,
            caution="no firmware floor is known for Turin, the document's own counts alone",
            risks=_EVERYWHERE,
        ),
        Generation(
            name="emulated",
            floor=FLOORS["emulated"].version,
            source=FLOORS["emulated"].source,
            caution="an emulated platform protects nothing: its memory is not encrypted and its keys lie in a folder",
            risks=("the platform is emulated: its memory is not encrypted and its keys lie in a folder",),
        ),
    )
}

# Plain SEV leaves registers to the host.
PLAIN_SEV_RISK = "CVE-2021-26342 and by design: without SEV-ES the host reads and writes the guest's registers"
