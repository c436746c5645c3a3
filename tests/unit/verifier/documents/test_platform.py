"""Platform documents: what each key means, and what is refused with which path."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.documents import CALLER, CHIP, platform, read
from verifier.documents.platform import KnownPlatform
from verifier.documents.text import InvalidDocument


def good(**spec: Any) -> KnownPlatform:
    found = read(platform(**spec))
    assert isinstance(found, KnownPlatform)
    return found


def problems(content: dict[str, Any]) -> tuple[str, ...]:
    with pytest.raises(InvalidDocument) as caught:
        read(content)
    return caught.value.problems


def test_a_good_platform_is_read() -> None:
    found = good()
    assert (found.name, found.version, found.fingerprint) == ("host-1", "1", CHIP)
    assert found.pools == frozenset({"rack-1"})
    assert found.callers is None
    assert found.oca is None
    assert good(pools=None).pools == frozenset()


def test_callers_and_owner_are_read() -> None:
    found = good(callers=[CALLER], oca="cd" * 32)
    assert found.callers == frozenset({CALLER})
    assert found.oca == "cd" * 32


@pytest.mark.parametrize("key", ["cek", "callers"])
def test_what_absence_would_open_is_refused(key: str) -> None:
    assert problems(platform(**{key: None})) == (f"spec: object missing required field `{key}`",)


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ({"cek": "AB" * 32}, "spec.cek: must be a CEK's fingerprint"),
        ({"cek": "ab" * 64}, "spec.cek: must be a CEK's fingerprint"),
        ({"oca": "cd"}, "spec.oca: must be an OCA's fingerprint"),
        ({"pools": ["a", "a"]}, "spec.pools: a comes twice"),
        ({"pools": ["rack 1"]}, "spec.pools[0]: must be 1 to 128 of"),
        ({"callers": []}, "spec.callers: names nobody: list orchestrators, or write any"),
        ({"callers": "all"}, "spec.callers: invalid enum value 'all'"),
        ({"callers": ["spiffe://a/agent/x"]}, "spec.callers[0]: is not an orchestrator"),
        ({"rack": "1"}, "spec: object contains unknown field `rack`"),
    ],
)
def test_a_bad_key_is_refused_with_its_path(spec: dict[str, Any], problem: str) -> None:
    (found,) = problems(platform(**spec))
    assert found.startswith(problem), found


def test_all_problems_are_listed_at_once() -> None:
    found = problems(platform("", "", cek="x", oca="y", pools=["/"], callers=[]))
    assert [each.split(":")[0] for each in found] == [
        "metadata.name",
        "metadata.version",
        "spec.cek",
        "spec.oca",
        "spec.pools[0]",
        "spec.callers",
    ]
