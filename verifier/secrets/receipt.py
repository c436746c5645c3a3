"""Receipts: what was released to what, as the claims of a signed token that a third party can check.

The form is an EAT Attestation Result (draft-ietf-rats-ear-04); the trustworthiness vector and its values are AR4SI's
(draft-ietf-rats-ar4si-09 section 2.3). What is known beyond that stands in `ear_verifier_claims`.
docs/receipt.md says what each claim means and why no claim is better than it is here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from common.sev.abi import PolicyBit
from common.sev.measurement import FirmwareVersion
from common.sev.policy import GuestPolicy

EAR_PROFILE = "tag:ietf.org,2026:rats/ear#04"
SUBMODULE = "sev"
DEVELOPER = "sevattest"

# AR4SI's values, by what they say of each claim.
_RECOGNIZED = 2  # instance-identity: known, and not known to be compromised
_APPROVED = 2  # configuration: all recognised and approved
_KNOWN_WEAKNESS = 32  # configuration, hardware: known vulnerabilities
_UNSUPPORTABLE = 96  # configuration: exposes unacceptable vulnerabilities
_UNRECOGNIZED_HARDWARE = 97
_APPROVED_BOOT = 3  # executables: only what is approved was loaded during boot
_ENCRYPTED = 2  # runtime-opaque: opaque to the hypervisor
_ISOLATED = 32  # runtime-opaque: out of other guests' reach
_VISIBLE = 96  # runtime-opaque: visible on the host

# Without one of these the host has a way around the measurement or into the guest (docs/workload.md).
_STRICT = PolicyBit.NOKS | PolicyBit.ES | PolicyBit.NOSEND


def receipt_claims(
    *,
    issuer: str,
    build: str,
    launch_id: UUID,
    audit_id: UUID,
    time: datetime,
    caller: str,
    grant: str | None,
    workload: Mapping[str, str],
    policy: GuestPolicy,
    shape: Mapping[str, Any],
    digest: bytes,
    firmware: FirmwareVersion,
    generation: str,
    emulated: bool,
    chip: str,
    recognized: bool,
    guids: Sequence[UUID],
    notes: Sequence[str],
) -> dict[str, Any]:
    """The claims of a receipt, to be signed as a token of the kind `common.audit.jws.RECEIPT_TYPE`.

    Args:
        issuer: who signs.
        build: the verifier's program and version.
        launch_id: the launch.
        audit_id: the audit record of the release; becomes the token's id.
        time: when it was decided.
        caller: who asked, as a SPIFFE id.
        grant: name of the grant that was spent; None for none.
        workload: `name`, `version` and `document_sha256`.
        policy: the guest policy that the firmware enforces.
        shape: which of the allowed launches was measured.
        digest: the launch digest, 32 bytes.
        firmware: the version that the measurement proved.
        generation: of the root that the chip's key leads to.
        emulated: that root is not AMD's.
        chip: the chip's pseudonym (`verifier.keys.signer.Pseudonyms`).
        recognized: the owner named this very chip, in a workload or a platform document.
        guids: of what was released.
        notes: what the owner accepted with this launch.
    """
    vector = trustworthiness(policy=policy, emulated=emulated, recognized=recognized)
    policy_id = f"{workload['name']}/{workload['version']}#sha256:{workload['document_sha256']}"
    return {
        "eat_profile": EAR_PROFILE,
        "iat": int(time.timestamp()),
        "iss": issuer,
        "jti": str(audit_id),
        "ear_verifier_id": {"build": build, "developer": DEVELOPER},
        "ear_status": status(vector),
        "submods": {
            SUBMODULE: {
                "ear_status": status(vector),
                "ear_trustworthiness_vector": vector,
                "ear_appraisal_policy_ids": [policy_id],
                "ear_verifier_claims": {
                    "sevattest.launch_id": str(launch_id),
                    "sevattest.audit_id": str(audit_id),
                    "sevattest.time": time.isoformat().replace("+00:00", "Z"),
                    "sevattest.caller": caller,
                    "sevattest.grant": grant,
                    "sevattest.workload": dict(workload),
                    "sevattest.policy": {"value": policy.value, "text": str(policy)},
                    "sevattest.shape": dict(shape),
                    "sevattest.digest": digest.hex(),
                    "sevattest.firmware": str(firmware),
                    "sevattest.platform": {"generation": generation, "emulated": emulated, "chip": chip},
                    "sevattest.secrets": [str(guid) for guid in guids],
                    "sevattest.notes": list(notes),
                },
            }
        },
    }


def trustworthiness(*, policy: GuestPolicy, emulated: bool, recognized: bool) -> dict[str, int]:
    """AR4SI's vector for a guest whose measurement was accepted; what nothing can be said of is left out."""
    visible = emulated or PolicyBit.NODBG not in policy.bits
    vector: dict[str, int] = {}
    if recognized and not emulated:
        vector["instance-identity"] = _RECOGNIZED
    if PolicyBit.NODBG not in policy.bits:
        vector["configuration"] = _UNSUPPORTABLE
    else:
        vector["configuration"] = _APPROVED if _STRICT in policy.bits else _KNOWN_WEAKNESS
    vector["executables"] = _APPROVED_BOOT
    # Genuine at best: every generation with SEV or SEV-ES has weaknesses that no firmware ends (`notes` lists them).
    vector["hardware"] = _UNRECOGNIZED_HARDWARE if emulated else _KNOWN_WEAKNESS
    if visible:
        vector["runtime-opaque"] = _VISIBLE
    else:  # plain SEV leaves the registers to the host, but not to other guests
        vector["runtime-opaque"] = _ENCRYPTED if policy.requires_es else _ISOLATED
    return vector


def status(vector: Mapping[str, int]) -> str:
    """The tier of the worst claim (AR4SI section 2.3.2): `affirming`, `warning` or `contraindicated`."""
    worst = max(vector.values())
    if worst >= 96:
        return "contraindicated"
    return "warning" if worst >= 32 else "affirming"
