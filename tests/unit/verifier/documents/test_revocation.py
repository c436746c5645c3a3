"""Revocation documents: what each key means, and what is refused with which path."""

from __future__ import annotations

from typing import Any

import pytest

from common.sev.measurement import FirmwareVersion
from tests.support.documents import CHIP, read, revocation
from verifier.documents.revocation import Revocation, RevokedFirmware, RevokedWorkload
from verifier.documents.text import InvalidDocument

ID = "0f" * 64


def good(**spec: Any) -> Revocation:
    found = read(revocation(**spec))
    assert isinstance(found, Revocation)
    return found


def problems(content: dict[str, Any]) -> tuple[str, ...]:
    with pytest.raises(InvalidDocument) as caught:
        read(content)
    return caught.value.problems


def test_a_good_revocation_is_read() -> None:
    found = good()
    assert (found.name, found.version, found.why) == ("incident", "1", "sold")
    assert found.ceks == frozenset({CHIP})
    assert found.chips == found.generations == found.ocas == frozenset()
    assert (found.firmware, found.workloads) == ((), ())


def test_every_key_is_read() -> None:
    found = good(
        chips=[ID],
        generations=["naples"],
        firmware=[
            {"generation": "milan", "versions": ["1.55.24"], "below": "1.55.21"},
            {"generation": "rome", "below": "0.24.20"},
        ],
        ocas=["cd" * 32],
        workloads=[{"name": "web", "versions": ["1", "2"]}, {"name": "old", "versions": "any"}],
    )
    assert found.chips == frozenset({ID})
    assert found.generations == frozenset({"naples"})
    assert found.firmware == (
        RevokedFirmware(
            generation="milan",
            versions=frozenset({FirmwareVersion(1, 55, 24)}),
            below=FirmwareVersion(1, 55, 21),
        ),
        RevokedFirmware(generation="rome", versions=frozenset(), below=FirmwareVersion(0, 24, 20)),
    )
    assert found.ocas == frozenset({"cd" * 32})
    assert found.workloads == (
        RevokedWorkload(name="web", versions=frozenset({"1", "2"})),
        RevokedWorkload(name="old", versions=None),
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("chips", [ID]),
        ("ceks", [CHIP]),
        ("generations", ["naples"]),
        ("firmware", [{"generation": "rome", "below": "0.24.20"}]),
        ("ocas", ["cd" * 32]),
        ("workloads", [{"name": "old", "versions": "any"}]),
    ],
)
def test_each_part_is_enough_and_none_is_not(key: str, value: Any) -> None:
    assert getattr(good(**{"ceks": None, key: value}), key)
    assert problems(revocation(**{"ceks": None, key: []}))[0].startswith("spec: revokes nothing")


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ({"why": None}, "spec: object missing required field `why`"),
        ({"why": " "}, "spec.why: is a reason, in words"),
        ({"why": "x" * 1025}, "spec.why: is a reason, in words, at most 1024 bytes"),
        ({"why": "漏" * 342}, "spec.why: is a reason, in words, at most 1024 bytes"),
        ({"chips": [CHIP]}, "spec.chips[0]: must be a chip's id: 128"),
        ({"ceks": [ID]}, "spec.ceks[0]: must be a CEK's fingerprint"),
        ({"ceks": [CHIP, CHIP]}, f"spec.ceks: {CHIP} comes twice"),
        ({"ocas": ["CD" * 32]}, "spec.ocas[0]: must be an OCA's fingerprint"),
        ({"generations": ["zen"]}, "spec.generations[0]: must be one of naples"),
        ({"generations": ["rome", "rome"]}, "spec.generations: rome comes twice"),
        ({"firmware": [{"generation": "zen", "below": "1.0.0"}]}, "spec.firmware[0].generation: must be one of"),
        ({"firmware": [{"generation": "rome"}]}, "spec.firmware[0]: revokes nothing"),
        ({"firmware": [{"generation": "rome", "versions": []}]}, "spec.firmware[0]: revokes nothing"),
        (
            {"firmware": [{"generation": "rome", "versions": ["24"]}]},
            "spec.firmware[0].versions[0]: a firmware version",
        ),
        ({"firmware": [{"generation": "rome", "versions": ["1.2.3"] * 2}]}, "spec.firmware[0].versions: 1.2.3 comes"),
        ({"firmware": [{"generation": "rome", "below": "0.24.256"}]}, "spec.firmware[0].below: a firmware version"),
        ({"workloads": [{"name": "web"}]}, "spec.workloads[0]: object missing required field `versions`"),
        ({"workloads": [{"name": "web", "versions": []}]}, "spec.workloads[0].versions: names no version"),
        ({"workloads": [{"name": "/", "versions": "any"}]}, "spec.workloads[0].name: must be 1 to 128 of"),
        ({"peks": [CHIP]}, "spec: object contains unknown field `peks`"),
    ],
)
def test_a_bad_key_is_refused_with_its_path(spec: dict[str, Any], problem: str) -> None:
    (found,) = problems(revocation(**spec))
    assert found.startswith(problem), found


def test_all_problems_are_listed_at_once() -> None:
    found = problems(revocation("", why=" ", ceks=["x"], generations=["zen"], firmware=[{"generation": "zen"}]))
    assert [each.split(":")[0] for each in found] == [
        "metadata.name",
        "spec.why",
        "spec.ceks[0]",
        "spec.generations[0]",
        "spec.firmware[0].generation",
        "spec.firmware[0]",
    ]
