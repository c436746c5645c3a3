"""Why a measurement was refused, in the owner's words: for the audit record, never for the host.

The search is `common.sev.explain`'s: every artefact version on file and a fixed list of slips. A measurement that
decided another launch before is named as what it is; its session's keys are gone, so nothing else could explain it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from common.sev.explain import Catalogue, Expected, explain
from common.sev.measurement import FirmwareVersion, MeasurementBlob
from common.sev.session import LaunchKeys
from verifier.appraisal.reference import Terms


@dataclass(frozen=True, kw_only=True)
class Account:
    """What an audit record says of a refused measurement.

    Attributes:
        sentence: for people.
        differences: what differs, as (what, expected, found).
        replay_of: the launch that this measurement decided before.
        tried: how many neighbours were tried; None where no search was made.
    """

    sentence: str
    differences: tuple[tuple[str, str, str], ...] = ()
    replay_of: UUID | None = None
    tried: int | None = None


NOT_SEARCHED = Account(sentence="not searched: other refusals were being explained")


def account_for_replay(launch_id: UUID) -> Account:
    """The account of a measurement that is on record."""
    return Account(
        sentence=f"this very measurement was handed in before, for launch {launch_id}: it is a replay",
        replay_of=launch_id,
    )


def account_for(
    *,
    blob: MeasurementBlob,
    keys: LaunchKeys,
    firmware: FirmwareVersion,
    terms: Terms,
    expected: Sequence[Expected],
    catalogue: Catalogue,
) -> Account:
    """Search the neighbours of what was frozen for the launch.

    Args:
        blob: the refused measurement.
        keys: the launch's keys.
        firmware: the version that the host names, 0.17 or later.
        terms: what was frozen.
        expected: the shapes behind the frozen digests, where their artefacts are still on file; else empty.
        catalogue: everything that is on file.
    """
    explanation = explain(
        blob=blob,
        keys=keys,
        firmware=firmware,
        policy=terms.guest_policy,
        expected=expected,
        catalogue=catalogue,
        digests=() if expected else terms.digests,
    )
    return Account(
        sentence=explanation.sentence,
        differences=tuple((each.what, each.expected, each.found) for each in explanation.differences),
        tried=explanation.tried,
    )
