"""The oldest SEV firmware of each generation that is without known holes, as start values: owners can raise them.

Facts for both sides: the verifier refuses by them, the host's doctor warns by them before anybody is refused.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.sev.abi import MINIMUM_API
from common.sev.measurement import FirmwareVersion


@dataclass(frozen=True, kw_only=True)
class Floor:
    """One generation's floor.

    Attributes:
        version: the oldest firmware; None where none is known to be good.
        source: where it comes from.
    """

    version: FirmwareVersion | None
    source: str


# By the names of the roots (common/sev/certs/roots); `emulated` is every root that is not AMD's.
FLOORS: dict[str, Floor] = {
    "naples": Floor(
        version=FirmwareVersion(0, 17, 22),
        source="CVE-2019-9836: build 22 of API 0.17 ends the invalid-curve leak of the PDH's private key",
    ),
    "rome": Floor(
        version=FirmwareVersion(0, 24, 20), source="newest build published in linux-firmware (merge request 278)"
    ),
    "milan": Floor(
        version=FirmwareVersion(1, 55, 21), source="newest build published in linux-firmware (merge request 278)"
    ),
    "genoa": Floor(
        version=FirmwareVersion(1, 55, 37), source="newest build published in linux-firmware (merge request 278)"
    ),
    "turin": Floor(
        version=None, source="no build is known to be good: a document that allows Turin names its own floor"
    ),
    "emulated": Floor(
        version=FirmwareVersion(*MINIMUM_API, 0),
        source="the oldest API whose measurement covers the firmware's version",
    ),
}
