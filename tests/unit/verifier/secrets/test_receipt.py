"""Receipts: every fact is in the claims, and no claim is better than SEV or SEV-ES can honestly make it."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from common.audit.jws import RECEIPT_TYPE, read_key_set, verify_jws
from common.sev.abi import PolicyBit
from common.sev.measurement import FirmwareVersion
from common.sev.policy import GuestPolicy
from tests.support.repository import ROOT
from verifier.keys.signer import Signer
from verifier.secrets.receipt import receipt_claims, status, trustworthiness

STRICT = PolicyBit.NODBG | PolicyBit.NOKS | PolicyBit.ES | PolicyBit.NOSEND
TIERS = ("affirming", "warning", "contraindicated")


def claims(**changes: Any) -> dict[str, Any]:
    members: dict[str, Any] = {
        "issuer": "spiffe://owner.example/verifier/main",
        "build": "sev-verifier 0.1.0",
        "launch_id": UUID("2328d0a6-2c77-4f1c-862c-e8a046224458"),
        "audit_id": UUID("0cb43011-9f79-4448-bffa-bb4cb0c18d72"),
        "time": datetime(2026, 3, 1, 12, 0, 0, 250, tzinfo=UTC),
        "caller": "spiffe://datacenter.example/orchestrator/cluster-1",
        "grant": "web-in-march",
        "workload": {"name": "web", "version": "1.4", "document_sha256": "be" * 32},
        "policy": GuestPolicy.build(STRICT, (1, 55)),
        "shape": {"vcpus": 2, "cpu": "EPYC-Milan", "flavour": "legacy"},
        "digest": bytes(range(32)),
        "firmware": FirmwareVersion(1, 55, 24),
        "generation": "milan",
        "emulated": False,
        "chip": "chip:" + "5f" * 16,
        "recognized": True,
        "guids": [UUID("736869e5-84f0-4973-92ec-06879ce3da0b")],
        "notes": ["a risk"],
    }
    return receipt_claims(**members | changes)


def vector(bits: PolicyBit = STRICT, *, emulated: bool = False, recognized: bool = True) -> dict[str, int]:
    return trustworthiness(policy=GuestPolicy.build(bits), emulated=emulated, recognized=recognized)


def test_the_claims_say_what_was_released_to_what() -> None:
    assert claims() == {
        "eat_profile": "tag:ietf.org,2026:rats/ear#04",
        "iat": 1772366400,
        "iss": "spiffe://owner.example/verifier/main",
        "jti": "0cb43011-9f79-4448-bffa-bb4cb0c18d72",
        "ear_verifier_id": {"build": "sev-verifier 0.1.0", "developer": "sevattest"},
        "ear_status": "warning",
        "submods": {
            "sev": {
                "ear_status": "warning",
                "ear_trustworthiness_vector": {
                    "instance-identity": 2,
                    "configuration": 2,
                    "executables": 3,
                    "hardware": 32,
                    "runtime-opaque": 2,
                },
                "ear_appraisal_policy_ids": ["web/1.4#sha256:" + "be" * 32],
                "ear_verifier_claims": {
                    "sevattest.launch_id": "2328d0a6-2c77-4f1c-862c-e8a046224458",
                    "sevattest.audit_id": "0cb43011-9f79-4448-bffa-bb4cb0c18d72",
                    "sevattest.time": "2026-03-01T12:00:00.000250Z",
                    "sevattest.caller": "spiffe://datacenter.example/orchestrator/cluster-1",
                    "sevattest.grant": "web-in-march",
                    "sevattest.workload": {"name": "web", "version": "1.4", "document_sha256": "be" * 32},
                    "sevattest.policy": {"value": 0x3701000F, "text": "0x3701000f (NODBG NOKS ES NOSEND API>=1.55)"},
                    "sevattest.shape": {"vcpus": 2, "cpu": "EPYC-Milan", "flavour": "legacy"},
                    "sevattest.digest": bytes(range(32)).hex(),
                    "sevattest.firmware": "1.55.24",
                    "sevattest.platform": {"generation": "milan", "emulated": False, "chip": "chip:" + "5f" * 16},
                    "sevattest.secrets": ["736869e5-84f0-4973-92ec-06879ce3da0b"],
                    "sevattest.notes": ["a risk"],
                },
            }
        },
    }
    assert claims(grant=None)["submods"]["sev"]["ear_verifier_claims"]["sevattest.grant"] is None


def test_the_page_names_every_claim_and_no_other() -> None:
    page = (ROOT / "docs" / "receipt.md").read_text()
    shown = json.loads(re.findall(r"```json\n(.*?)```", page, re.DOTALL)[0])
    said = claims()
    assert shown.keys() == said.keys()
    shown_appraisal, appraisal = shown["submods"]["sev"], said["submods"]["sev"]
    assert shown_appraisal.keys() == appraisal.keys()
    assert shown_appraisal["ear_verifier_claims"].keys() == appraisal["ear_verifier_claims"].keys()
    for name in (*said, *appraisal, *appraisal["ear_verifier_claims"]):
        assert f"| `{name}` |" in page
    for name in ("ear_status", "ear_trustworthiness_vector"):
        assert shown_appraisal[name] == appraisal[name]
    assert shown["ear_status"] == said["ear_status"]


def test_a_third_party_verifies_a_receipt_with_pyjwt_and_the_key_set() -> None:
    signer = Signer(ec.generate_private_key(ec.SECP256R1()))
    token = signer.sign(claims(), typ=RECEIPT_TYPE)
    key = jwt.PyJWKSet.from_dict(signer.jwks())[jwt.get_unverified_header(token)["kid"]]
    said = jwt.decode(token, key, algorithms=["ES256"], issuer="spiffe://owner.example/verifier/main")
    assert said == claims()
    assert verify_jws(token, read_key_set(json.dumps(signer.jwks()).encode()), typ=RECEIPT_TYPE).claims == said
    with pytest.raises(jwt.InvalidSignatureError):
        jwt.decode(token[:-8] + "AAAAAAAA", key, algorithms=["ES256"])


@pytest.mark.parametrize(
    ("bits", "emulated", "expected", "tier"),
    [
        (STRICT, False, {"configuration": 2, "hardware": 32, "runtime-opaque": 2}, "warning"),
        (STRICT & ~PolicyBit.NOKS, False, {"configuration": 32, "runtime-opaque": 2}, "warning"),
        (STRICT & ~PolicyBit.NOSEND, False, {"configuration": 32, "runtime-opaque": 2}, "warning"),
        (STRICT & ~PolicyBit.ES, False, {"configuration": 32, "runtime-opaque": 32}, "warning"),
        (STRICT & ~PolicyBit.NODBG, False, {"configuration": 96, "runtime-opaque": 96}, "contraindicated"),
        (PolicyBit(0), False, {"configuration": 96, "runtime-opaque": 96}, "contraindicated"),
        (STRICT, True, {"configuration": 2, "hardware": 97, "runtime-opaque": 96}, "contraindicated"),
    ],
    ids=["strict", "key sharing", "send", "plain", "debug", "nothing forbidden", "emulated"],
)
def test_the_vector_follows_policy_and_platform(
    *, bits: PolicyBit, emulated: bool, expected: dict[str, int], tier: str
) -> None:
    found = vector(bits, emulated=emulated)
    assert expected.items() <= found.items()
    assert status(found) == tier


def test_no_bit_that_is_left_out_makes_a_receipt_better() -> None:
    for bits in map(PolicyBit, range(64)):
        for missing in PolicyBit:
            if missing in bits:
                better, worse = status(vector(bits)), status(vector(bits & ~missing))
                assert TIERS.index(worse) >= TIERS.index(better)


def test_only_a_chip_that_the_owner_named_is_recognised() -> None:
    assert vector(recognized=True)["instance-identity"] == 2
    assert "instance-identity" not in vector(recognized=False)
    assert "instance-identity" not in vector(recognized=True, emulated=True)


def test_nothing_is_claimed_of_what_happens_in_the_guest() -> None:
    for name in ("file-system", "sourced-data", "storage-opaque"):
        assert name not in vector()


@pytest.mark.parametrize(("worst", "tier"), [(2, 0), (31, 0), (32, 1), (95, 1), (96, 2), (127, 2)])
def test_the_status_is_the_tier_of_the_worst_claim(worst: int, tier: int) -> None:
    assert status({"hardware": 2, "executables": worst}) == TIERS[tier]
