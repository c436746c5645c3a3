"""Revocations joined, and what one says of a launch that has been."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest

from common.errors import Reason
from common.sev.measurement import FirmwareVersion
from tests.support import documents
from tests.support.documents import CHIP
from verifier.appraisal.revoked import Revocations, impact, join
from verifier.documents.revocation import Revocation

ID = "0f" * 64
OCA = "0c" * 32


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What revocations look at."""

    generation: str = "milan"
    fingerprint: str = CHIP
    chip_id: str | None = ID
    oca: str = OCA
    workload: str = "web"
    workload_version: str = "1.0"
    firmware: tuple[int, int, int] | None = (1, 55, 24)


def revocation(name: str = "incident", **spec: Any) -> Revocation:
    found = documents.read(documents.revocation(name, **{"ceks": None, **spec}))
    assert isinstance(found, Revocation)
    return found


def firmware(**member: Any) -> dict[str, Any]:
    return {"firmware": [{"generation": "milan", **member}]}


TOUCHING = [
    ({"ceks": [CHIP]}, "launch.chip_revoked", Reason.CHIP_REVOKED),
    ({"chips": [ID]}, "launch.chip_revoked", Reason.CHIP_REVOKED),
    ({"generations": ["milan"]}, "launch.revoked", Reason.REVOKED),
    ({"ocas": [OCA]}, "launch.revoked", Reason.REVOKED),
    ({"workloads": [{"name": "web", "versions": ["1.0"]}]}, "launch.revoked", Reason.REVOKED),
    ({"workloads": [{"name": "web", "versions": ["1.00"]}]}, "launch.revoked", Reason.REVOKED),
    ({"workloads": [{"name": "web", "versions": "any"}]}, "launch.revoked", Reason.REVOKED),
    (firmware(versions=["1.55.24"]), "launch.revoked", Reason.REVOKED),
    (firmware(below="1.55.25"), "launch.revoked", Reason.REVOKED),
    (firmware(versions=["1.55.1"], below="2.0.0"), "launch.revoked", Reason.REVOKED),
]
PASSING: list[dict[str, Any]] = [
    {"ceks": ["cd" * 32]},
    {"chips": ["1f" * 64]},
    {"generations": ["rome"]},
    {"ocas": ["1c" * 32]},
    {"workloads": [{"name": "web", "versions": ["2"]}]},
    {"workloads": [{"name": "db", "versions": "any"}]},
    firmware(versions=["1.55.23"]),
    firmware(below="1.55.24"),
    {"firmware": [{"generation": "rome", "below": "2.0.0", "versions": ["1.55.24"]}]},
]


@pytest.mark.parametrize(("spec", "rule", "reason"), TOUCHING)
def test_what_is_revoked_touches_the_launch(spec: dict[str, Any], rule: str, reason: Reason) -> None:
    found = impact(revocation(**spec), Launch())
    assert found is not None
    assert (found.rule, found.reason) == (rule, reason)
    assert "revocation incident 1: " in found.message
    assert found.message.endswith(": sold")


@pytest.mark.parametrize("spec", PASSING)
def test_what_is_not_revoked_does_not(spec: dict[str, Any]) -> None:
    assert impact(revocation(**spec), Launch()) is None


def test_firmware_that_is_not_proven_counts_as_nothing() -> None:
    assert impact(revocation(**firmware(below="2.0.0")), replace(Launch(), firmware=None)) is None


def test_a_chip_without_an_id_is_told_by_its_key_alone() -> None:
    assert impact(revocation(chips=[ID]), replace(Launch(), chip_id=None)) is None
    assert impact(revocation(ceks=[CHIP]), replace(Launch(), chip_id=None)) is not None


@pytest.mark.parametrize(("spec", "rule", "reason"), TOUCHING)
def test_all_revocations_count_together(spec: dict[str, Any], rule: str, reason: Reason) -> None:
    del reason
    others = [revocation(f"other-{index}", **each) for index, each in enumerate(PASSING)]

    def against(revocations: Revocations) -> str | None:
        launch = Launch()
        return (
            revocations.against_chip(launch.fingerprint, launch.chip_id)
            if rule == "launch.chip_revoked"
            else revocations.against_rest(
                generation=launch.generation,
                oca=launch.oca,
                workload=launch.workload,
                workload_version=launch.workload_version,
                firmware=FirmwareVersion(1, 55, 24),
            )
        )

    assert against(join(others)) is None
    assert against(join([*others, revocation(**spec)])) is not None
    assert against(join([revocation(**spec), *others])) is not None


def test_the_deny_list_gets_the_union_of_chips_and_keys() -> None:
    joined = join([revocation(ceks=[CHIP], chips=[ID]), revocation("more", ceks=["cd" * 32])])
    assert joined.chips == {CHIP, ID, "cd" * 32}
    assert Revocations().chips == frozenset()
