"""A chip has a pseudonym in records and in the log, and no other name, whatever is said against it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from common.errors import Reason
from tests.support.desk import desk, refused
from tests.support.documents import CALLER, grant
from tests.support.documents import workload as document

_ELSEWHERE = "11" * 32


def _other_chips() -> list[dict[str, Any]]:
    return [document(platforms={"generations": ["emulated"], "chips": [_ELSEWHERE]})]


def _no_platform() -> list[dict[str, Any]]:
    return [document(callers=[]), grant("g", callers=[CALLER], platforms={"pools": ["here"]})]


def _denied() -> list[dict[str, Any]]:
    return [document()]


@pytest.mark.parametrize(
    ("documents", "reason"),
    [
        (_other_chips, Reason.CHIP_NOT_ALLOWED),
        (_no_platform, Reason.HOST_NOT_IN_POOL),
        (_denied, Reason.CHIP_REVOKED),
    ],
)
async def test_a_chip_that_is_refused_is_recorded_and_logged_under_its_pseudonym_only(
    tmp_path: Path, documents: Any, reason: Reason
) -> None:
    async with desk(tmp_path, content=documents()) as d:
        fingerprint = d.platform.chain.cek.fingerprint.hex()
        if reason is Reason.CHIP_REVOKED:
            d.denied.set_owners([fingerprint, d.platform.chip_id.hex()])
        assert (await refused(d.begin(chip_id=d.platform.chip_id))).reason is reason
        record = d.audit()[-1]
        assert json.loads(record.body)["platform"]["chip"] == d.dependencies.pseudonyms.of(fingerprint)
        for told in (record.body, repr(d.log.events)):
            assert fingerprint not in told
            assert d.platform.chip_id.hex() not in told
