"""Re-wrapping moves every blob that opens to the key that seals, and nothing is lost whatever happens meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from uuid import UUID

import pytest

from common.errors import Reason, Unavailable
from tests.support.recording_log import RecordingLog
from verifier.keys.base import identity_place, launch_place, secret_place
from verifier.keys.file import FileKey
from verifier.keys.keyring import Keyring
from verifier.keys.rewrap import Rewrap, place_bytes
from verifier.store.rows import SealedBlob

OLD, NEW, LOST = FileKey(b"o" * 32), FileKey(b"n" * 32), FileKey(b"x" * 32)
LAUNCH = UUID(int=7)
PLACES = {
    ("launch", str(LAUNCH), "tek"): launch_place(LAUNCH, "tek"),
    ("launch", str(LAUNCH), "tik"): launch_place(LAUNCH, "tik"),
    ("launch", str(LAUNCH), "generated"): launch_place(LAUNCH, "generated"),
    ("secret", "disk", "3"): secret_place("disk", 3),
    ("identity", "signing"): identity_place("signing"),
}


@dataclass
class Blobs:
    """A store's blobs, in memory."""

    blobs: dict[tuple[str, ...], bytes] = field(default_factory=dict)
    before_reseal: Callable[[tuple[str, ...]], None] = print

    async def sealed_under_others(self, key_id: bytes, limit: int) -> list[SealedBlob]:
        found = [SealedBlob(place=place, sealed=blob) for place, blob in self.blobs.items() if blob[1:9] != key_id]
        return found[:limit]

    async def reseal(self, place: tuple[str, ...], old: bytes, new: bytes) -> bool:
        self.before_reseal(place)
        if self.blobs.get(place) != old:
            return False
        self.blobs[place] = new
        return True


@dataclass
class Late:
    """A replica that looked at the blobs before another moved some."""

    blobs: Blobs
    seen: Sequence[SealedBlob]

    async def sealed_under_others(self, _: bytes, limit: int) -> Sequence[SealedBlob]:
        return self.seen[:limit]

    async def reseal(self, place: tuple[str, ...], old: bytes, new: bytes) -> bool:
        return await self.blobs.reseal(place, old, new)


class Away(FileKey):
    """A key whose token was pulled."""

    def unseal(self, sealed: bytes, place: bytes) -> bytes:
        raise Unavailable(Reason.KEY_UNAVAILABLE, f"no token for {len(sealed)} bytes of {place!r}")


def store(key: FileKey = OLD) -> Blobs:
    return Blobs({place: key.seal(b"secret of " + bound, bound) for place, bound in PLACES.items()})


async def test_every_blob_moves_to_its_own_place_under_the_key_that_seals() -> None:
    blobs, log = store(), RecordingLog()
    rewrap = Rewrap(blobs, Keyring(NEW, [OLD]), log)
    assert [await rewrap.some(2) for _ in range(4)] == [2, 2, 1, 0]
    for place, bound in PLACES.items():
        assert NEW.unseal(blobs.blobs[place], bound) == b"secret of " + bound
        with pytest.raises(Unavailable):
            OLD.unseal(blobs.blobs[place], bound)
    assert log.events == []


async def test_what_is_under_unknown_keys_is_named_once_left_and_keeps_nothing_else_from_moving() -> None:
    lost = {("secret", f"lost-{n}", "1"): LOST.seal(b"s", b"") for n in range(9)}
    blobs, log = Blobs(lost | store().blobs), RecordingLog()
    rewrap = Rewrap(blobs, Keyring(NEW, [OLD]), log)
    assert [await rewrap.some(2) for _ in range(5)] == [2, 2, 1, 0, 0]
    assert {place: blobs.blobs[place] for place in lost} == lost
    assert [event.fields["sealing"] for event in log.named("keys.unknown")] == [LOST.key_id.hex()]


@pytest.mark.parametrize(
    ("place", "blob"),
    [
        (("secret", "disk", "9"), OLD.seal(b"s", b"elsewhere")),
        (("secret", "disk", "9"), b"\x02" + bytes(60)),
        (("secret", "disk", "nine"), OLD.seal(b"s", b"")),
        (("secret", "disk", "-1"), OLD.seal(b"s", b"")),
        (("launch", "no-id", "tek"), OLD.seal(b"s", b"")),
        (("moon",), OLD.seal(b"s", b"")),
    ],
    ids=["moved", "format", "version", "negative", "launch", "place"],
)
async def test_what_does_not_open_is_named_once_and_left(place: tuple[str, ...], blob: bytes) -> None:
    blobs, log = Blobs({place: blob} | store().blobs), RecordingLog()
    rewrap = Rewrap(blobs, Keyring(NEW, [OLD]), log)
    assert sum([await rewrap.some(2) for _ in range(6)]) == len(PLACES)
    assert blobs.blobs[place] == blob
    assert [event.fields["place"] for event in log.named("keys.not_moved")] == ["/".join(place)]


async def test_a_launch_that_ends_meanwhile_takes_its_blobs_with_it() -> None:
    blobs = store()

    def end(place: tuple[str, ...]) -> None:
        if place[0] == "launch":
            del blobs.blobs[place]

    blobs.before_reseal = end
    assert await Rewrap(blobs, Keyring(NEW, [OLD]), RecordingLog()).some(10) == 2
    assert {place[0] for place in blobs.blobs} == {"secret", "identity"}


async def test_two_replicas_do_it_at_the_same_time() -> None:
    blobs = store()
    mine = Rewrap(Late(blobs, await blobs.sealed_under_others(NEW.key_id, 9)), Keyring(NEW, [OLD]), RecordingLog())
    assert await Rewrap(blobs, Keyring(NEW, [OLD]), RecordingLog()).some(2) == 2
    assert await mine.some(9) == 3
    assert all(NEW.unseal(blobs.blobs[place], bound) for place, bound in PLACES.items())


async def test_a_crash_between_any_two_blobs_leaves_all_of_them_open() -> None:
    for survivors in range(len(PLACES)):
        blobs, count = store(), 0

        def crash(place: tuple[str, ...], at: int = survivors) -> None:
            nonlocal count
            count += 1
            if count > at:
                raise RuntimeError(place)

        blobs.before_reseal = crash
        ring = Keyring(NEW, [OLD])
        with pytest.raises(RuntimeError):
            await Rewrap(blobs, ring, RecordingLog()).some(10)
        assert all(ring.unseal(blobs.blobs[place], bound) for place, bound in PLACES.items())
        blobs.before_reseal = print
        assert await Rewrap(blobs, ring, RecordingLog()).some(10) == len(PLACES) - survivors


async def test_a_key_out_of_reach_stops_it_and_breaks_nothing() -> None:
    blobs, log = store(), RecordingLog()
    ring = Keyring(NEW, [Away(b"o" * 32)])
    rewrap = Rewrap(blobs, ring, log)
    with pytest.raises(Unavailable, match="no token"):
        await rewrap.some(10)
    ring.reload(NEW, [OLD])
    assert await rewrap.some(10) == len(PLACES)
    assert log.events == []


async def test_broken_blobs_in_front_end_no_round_before_its_work_is_done() -> None:
    broken = {("secret", f"broken-{n}", "1"): OLD.seal(b"s", b"elsewhere") for n in range(9)}
    blobs, log = Blobs(broken | store().blobs), RecordingLog()
    rewrap = Rewrap(blobs, Keyring(NEW, [OLD]), log)
    assert [await rewrap.some(4), await rewrap.some(4), await rewrap.some(4)] == [3, 2, 0]
    assert len(log.named("keys.not_moved")) == 9


def test_every_place_of_the_store_is_the_place_that_was_sealed_for() -> None:
    assert {place: place_bytes(place) for place in PLACES} == PLACES
