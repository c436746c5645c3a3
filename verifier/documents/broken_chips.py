"""Chips whose endorsement keys are public, so that anybody can speak for them: every signature of theirs verifies.

Chip ids (GET_ID2, 64 bytes) as published in PSPReverse/amd-sp-glitch, `attack-proof/attack-proof.md`, with signatures
by the extracted keys as proof (arXiv 2108.04575). A host can leave a chip's id out, never its CEK: the verifier asks
the key service for these ids' CEKs and denies those, too (`verifier.launches.platforms`).
"""

from __future__ import annotations

BROKEN_CHIPS: dict[str, str] = {
    "ded5992ef2ed25e5325748671b6114e5cfac801d7420b3d289c833db2bf755ea"
    "735bbe1092e5cd33bc4e31af1a2880ad8d1fbf640c8f80dc02ba464e6c6c9395": "an EPYC 7272 (Rome), arXiv 2108.04575",
    "91c44a33162d17b3a04ff6b631b6f6bc735b1b81cc103b69dced1c72b15a376c"
    "486a36da75e1d9239f1a18a62bd52b14a5e31af999472dbc068d22728181a0d7": "an EPYC 72F3 (Milan), arXiv 2108.04575",
}
