"""An open launch's keys as the store has them, bound to all that was frozen for the launch when it began.

    sealed TEK = seal( TEK, 16 bytes ‖ SHA-256 over what was frozen, 32 bytes )
    sealed TIK = seal( TIK, 16 bytes )

Each blob is bound to its launch's id and to its column (`verifier.keys.base`). So a launch is what it was when it
began, or its keys are not given out: who writes to the database and has no key changes none of it. Re-wrapping moves
what is sealed as it is.
"""

from __future__ import annotations

import hashlib
import hmac
from struct import Struct

from common.errors import Reason, WrongState
from common.sev.abi import KEY_SIZE
from common.sev.session import LaunchKeys
from verifier.keys.base import SealingKey, launch_place
from verifier.launches.steps import TEK_COLUMN, TIK_COLUMN
from verifier.store.rows import LaunchRow, SealedKeys
from verifier.store.sql_rows import stamp

_HEAD = Struct(">13I??3q")  # sizes, which names there are, the policy's word, times in microseconds since 1970


def seal_keys(sealing: SealingKey, row: LaunchRow, keys: LaunchKeys) -> SealedKeys:
    """The keys of a launch that begins, for its row.

    Args:
        sealing: seals them.
        row: all that is frozen; its own keys are not looked at.
        keys: the launch's.

    Raises:
        Unavailable: the sealing key is out of reach (KEY_UNAVAILABLE).
    """
    return SealedKeys(
        key_id=sealing.key_id,
        tek=sealing.seal(keys.tek + frozen_digest(row), launch_place(row.launch_id, TEK_COLUMN)),
        tik=sealing.seal(keys.tik, launch_place(row.launch_id, TIK_COLUMN)),
    )


def unseal_keys(sealing: SealingKey, row: LaunchRow) -> LaunchKeys:
    """The keys of an open launch, which is as it was when it began.

    Raises:
        WrongState: it is not, or its keys are from a version that bound them to nothing (LAUNCH_ALTERED).
        Unavailable: the sealing key is out of reach (KEY_UNAVAILABLE), or a blob does not open (STORE_UNAVAILABLE).
    """
    sealed = row.keys
    assert sealed is not None  # noqa: S101 -- the store's schema: an open launch has keys
    bound = sealing.unseal(sealed.tek, launch_place(row.launch_id, TEK_COLUMN))
    tik = sealing.unseal(sealed.tik, launch_place(row.launch_id, TIK_COLUMN))
    if len(bound) == KEY_SIZE:
        raise altered("its keys are bound to nothing, as those of an older version are")
    if not hmac.compare_digest(bound[KEY_SIZE:], frozen_digest(row)):
        raise altered("its row was changed")
    return LaunchKeys(tek=bound[:KEY_SIZE], tik=tik)


def altered(how: str) -> WrongState:
    """The error for a launch that somebody wrote to.

    It does not spend the launch. An end would be written over what there is to see, and settled with a grant that the
    row may not name any more; nobody is released anything meanwhile, and whoever puts the row back has the launch back.
    """
    return WrongState(Reason.LAUNCH_ALTERED, f"the launch in the store is not the one that was begun: {how}")


def frozen_digest(row: LaunchRow) -> bytes:
    """SHA-256 over all that a launch is begun with, 32 bytes; its id is in the places of its keys.

    No two launches are spelled alike: the size of each part stands before all of them.
    """
    parts = (
        row.caller.encode(),
        row.workload.encode(),
        row.workload_version.encode(),
        row.generation.encode(),
        row.fingerprint.encode(),
        row.oca.encode(),
        b"" if row.grant is None else row.grant.encode(),
        b"" if row.chip_id is None else row.chip_id.encode(),
        row.terms_id,
        row.platform_id,
        row.pdh_fingerprint,
        row.session,
        row.godh,
    )
    times = stamp(row.create_time), stamp(row.expire_time)
    head = _HEAD.pack(*map(len, parts), row.grant is not None, row.chip_id is not None, row.policy, *times)
    return hashlib.sha256(b"".join((head, *parts))).digest()
