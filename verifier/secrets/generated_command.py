"""What `sev-verifier generated` does: show the owner what was made for one launch, at the verifier's own machine.

It needs the store and the key file; no caller and no owner gets at it over the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol
from uuid import UUID

from common.errors import InvalidInput, NotFound, Reason
from common.private_file import write_private
from common.sev.secret import SecretEntry
from verifier.keys.base import SealingKey, launch_place
from verifier.secrets.release import read_generated

_COLUMN = "generated"  # the place's last word, as the releaser seals it


class GeneratedRows(Protocol):
    """What is asked of the store."""

    async def generated(self, launch_id: UUID) -> bytes | None:
        """What was made for a launch, sealed; None where nothing was, or there is no such launch."""
        ...


async def find_generated(
    store: GeneratedRows, sealing: SealingKey, launch_id: UUID, guid: UUID | None = None
) -> tuple[SecretEntry, ...]:
    """What was made for a launch; only the secret `guid` where it is given. At least one.

    Raises:
        NotFound: nothing was made for that launch, or nothing of that GUID.
        Unavailable: the store or the key has no answer, or the blob does not open.
    """
    sealed = await store.generated(launch_id)
    if sealed is None:
        raise NotFound(Reason.NOT_FOUND, f"no secret was made for a launch {launch_id}")
    entries = read_generated(sealing.unseal(sealed, launch_place(launch_id, _COLUMN)))
    found = tuple(entry for entry in entries if guid in (None, entry.guid))
    if not found:
        raise NotFound(Reason.NOT_FOUND, f"no secret {guid} was made for launch {launch_id}")
    return found


def hand_over(entries: Sequence[SecretEntry], out: Path | None) -> tuple[str, ...]:
    """The lines to print: GUID and hex for each secret; none where the one secret goes into a new file, as it is.

    Raises:
        InvalidInput: there are several for one file, or the file exists or cannot be made.
    """
    if out is None:
        return tuple(f"{entry.guid} {entry.data.hex()}" for entry in entries)
    if len(entries) > 1:
        names = ", ".join(str(entry.guid) for entry in entries)
        raise InvalidInput(
            Reason.INVALID_ARGUMENT, f"--out: takes one secret and there are {len(entries)}: {names}", hint="--guid G"
        )
    write_private(out, entries[0].data)
    return ()
