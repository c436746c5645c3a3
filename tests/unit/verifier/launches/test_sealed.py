"""An open launch is what it was when it began, or its keys are not given out: whoever writes to the database."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from common.errors import NotFound, Reason, SevattestError
from common.sev.session import LaunchKeys
from tests.support.desk import KEK, Desk, desk, refused
from tests.support.documents import CALLER, STRANGER
from tests.support.documents import workload as document
from tests.support.recording_log import RecordingLog
from tests.support.store_rows import opening
from verifier.keys.base import launch_place
from verifier.keys.file import FileKey
from verifier.keys.keyring import Keyring
from verifier.keys.rewrap import Rewrap
from verifier.launches.launch import Begun
from verifier.launches.release import Releaser
from verifier.launches.sealed import frozen_digest, seal_keys, unseal_keys
from verifier.store.engine import Value
from verifier.store.rows import LaunchRow

# What a launch gets or loses after it began, and its id, which the places of its keys hold.
LATER = {"launch_id", "state", "reason", "keys", "end_time", "measurement", "digest", "packet", "audit_id", "firmware"}
FROZEN = sorted({each.name for each in fields(LaunchRow)} - LATER)
COLUMNS = {name: "grant_name" if name == "grant" else name for name in FROZEN}


def other(value: Any) -> Any:
    """Another value of the same kind."""
    match value:
        case None:
            return "g"
        case str():
            return value + "0"
        case bytes():
            return value[:-1] + bytes((value[-1] ^ 1,))
        case int():
            return value ^ 1
        case datetime():
            return value + timedelta(microseconds=1)
    raise AssertionError(value)


async def sql(site: Desk, statement: str, *values: Value) -> None:
    """Write to the database as somebody who has no key."""

    async def work(transaction: Any) -> None:
        assert await transaction.change(statement, *values) == 1

    await site.store._engine.write("vandal", work)


async def cell(site: Desk, launch_id: UUID, column: str) -> Any:
    """What a launch has in a column."""

    async def work(transaction: Any) -> Any:
        return (await transaction.one(f"SELECT {column} FROM launch WHERE launch_id=?", str(launch_id)))[0]  # noqa: S608 -- ours

    return await site.store._engine.read(work)


async def put(site: Desk, launch_id: UUID, column: str, value: Any) -> None:
    """Put something else there."""
    await sql(site, f"UPDATE launch SET {column}=? WHERE launch_id=?", value, str(launch_id))  # noqa: S608 -- ours


async def measured(site: Desk, begun: Begun) -> bytes:
    """The blob that its honest guest makes."""
    return site.start(begun).measure((await site.digests())[0])


async def altered(site: Desk, begun: Begun, how: str, caller: str = CALLER) -> None:
    """That the honest measurement is given nothing, and the launch stays as it is with a line in the log."""
    before, lines = len(site.audit()), len(site.log.named("launch.altered"))
    error = await refused(site.release(begun.launch.launch_id, await measured(site, begun), caller=caller))
    assert (error.reason, how in error.message) == (Reason.LAUNCH_ALTERED, True)
    row = await site.store.launch(begun.launch.launch_id)
    assert row is not None
    assert (row.state, row.packet) == ("open", None)
    assert len(site.audit()) == before
    (line,) = site.log.named("launch.altered")[lines:]
    assert line.level == "error"
    assert line.fields["launch_id"] == str(begun.launch.launch_id)


async def released(site: Desk, begun: Begun) -> bool:
    return bool((await site.release(begun.launch.launch_id, await measured(site, begun))).payload)


@pytest.mark.parametrize("name", FROZEN)
async def test_whatever_is_changed_of_an_open_launch_keeps_its_secrets_until_it_is_put_back(
    tmp_path: Path, name: str
) -> None:
    async with desk(tmp_path) as site:
        begun, twin = await site.begin(chip_id=os.urandom(64)), await site.begin()
        launch_id, column = begun.launch.launch_id, COLUMNS[name]
        was = await cell(site, launch_id, column)
        now = STRANGER if name == "caller" else other(was)
        if name in {"terms_id", "platform_id"}:  # the schema wants one that there is
            now = os.urandom(32)
            await sql(site, "INSERT INTO terms VALUES (?, ?)", now, b"{}")
            await sql(site, "INSERT INTO platform VALUES (?, ?)", now, bytes(8336))
        await put(site, launch_id, column, now)
        await altered(site, begun, "its row", caller=STRANGER if name == "caller" else CALLER)
        if name == "caller":
            assert isinstance(await refused(site.release(launch_id, await measured(site, begun))), NotFound)
        await put(site, launch_id, column, was)
        assert await released(site, begun)
        assert await released(site, twin)


async def test_two_launches_do_not_swap_their_terms(tmp_path: Path) -> None:
    contents = [document(), document("other", policy={"allow": ["send"]})]
    async with desk(tmp_path, content=contents) as site:
        a, b = await site.begin(), await site.begin(workload="other")
        ids = [await cell(site, each.launch.launch_id, "terms_id") for each in (a, b)]
        assert ids[0] != ids[1]
        for each, terms_id in zip((a, b), reversed(ids), strict=True):
            await put(site, each.launch.launch_id, "terms_id", terms_id)
        for each in (a, b):
            await altered(site, each, "its row")


async def test_terms_that_are_not_what_their_id_says_are_not_judged_by(tmp_path: Path) -> None:
    async with desk(tmp_path) as site:
        begun = await site.begin()
        terms_id = await cell(site, begun.launch.launch_id, "terms_id")
        body = await site.store.terms(terms_id)
        for changed in (body.replace(b'"floor":[', b'"floor":[ '), b"{}", b""):
            await sql(site, "UPDATE terms SET body=? WHERE terms_id=?", changed, terms_id)
            await altered(site, begun, "its terms")
        await sql(site, "UPDATE terms SET body=? WHERE terms_id=?", body, terms_id)
        assert await released(site, begun)


async def test_keys_of_another_launch_do_not_open_here(tmp_path: Path) -> None:
    async with desk(tmp_path) as site:
        a, b = await site.begin(), await site.begin()
        for column in ("tek", "tik"):
            own, others = [await cell(site, each.launch.launch_id, column) for each in (a, b)]
            await put(site, a.launch.launch_id, column, others)
            error = await refused(site.release(a.launch.launch_id, await measured(site, a)))
            assert error.reason is Reason.STORE_UNAVAILABLE
            await put(site, a.launch.launch_id, column, own)
        assert await released(site, a)


async def test_keys_that_are_bound_to_nothing_are_those_of_an_older_version_and_open_nothing(tmp_path: Path) -> None:
    """Whoever kept such a blob could put any terms beside it."""
    async with desk(tmp_path) as site:
        begun = await site.begin()
        launch_id = begun.launch.launch_id
        sealing, place = site.dependencies.sealing, launch_place(launch_id, "tek")
        tek = sealing.unseal(await cell(site, launch_id, "tek"), place)
        assert len(tek) == 48
        await put(site, launch_id, "tek", sealing.seal(tek[:16], place))
        await altered(site, begun, "older version")


async def test_a_launch_that_has_ended_is_released_once_more_within_its_time_and_to_its_own_guest_only(
    tmp_path: Path,
) -> None:
    """What the seal does not catch, as docs/threat-model.md says: the keys were kept while the launch was open."""
    async with desk(tmp_path) as site:
        begun = await site.begin()
        launch_id = begun.launch.launch_id
        tek, tik = [await cell(site, launch_id, column) for column in ("tek", "tik")]
        assert await released(site, begun)

        async def revive() -> None:
            await sql(
                site,
                "UPDATE launch SET state='open', end_time=NULL, tek=?, tik=?, packet_header=NULL, packet_payload=NULL, "
                "receipt=NULL WHERE launch_id=?",
                *(tek, tik, str(launch_id)),
            )

        await revive()
        assert await released(site, begun)
        assert [row.event for row in site.audit(launch_id)].count("launch.released") == 2
        await revive()
        site.clock.advance(begun.launch.expire_time - site.clock.now())
        error = await refused(site.release(launch_id, await measured(site, begun)))
        assert error.reason is Reason.LAUNCH_EXPIRED


async def test_another_releaser_after_a_restart_finds_the_launch_as_it_was(tmp_path: Path) -> None:
    async with desk(tmp_path) as site:
        begun = await site.begin(chip_id=os.urandom(64))
        blob = await measured(site, begun)
    async with desk(tmp_path, platform=site.platform) as again:
        assert again.releaser is not site.releaser
        assert (await again.release(begun.launch.launch_id, blob)).payload


async def test_keys_that_moved_to_a_new_key_file_are_bound_as_before(tmp_path: Path) -> None:
    async with desk(tmp_path) as site:
        a, b = await site.begin(), await site.begin()
        keyring = Keyring(FileKey(b"n" * 32), [FileKey(KEK)])
        assert await Rewrap(site.store, keyring, RecordingLog()).some(100) >= 4
        site.releaser = Releaser(replace(site.dependencies, sealing=Keyring(FileKey(b"n" * 32))))
        assert await released(site, a)
        await put(site, b.launch.launch_id, "policy", 0)
        await altered(site, b, "its row")


# The digest.


def launch(**changes: Any) -> LaunchRow:
    """A launch; its id stays the same."""
    return replace(opening().launch, launch_id=UUID(int=7), **changes)


@pytest.mark.parametrize("name", FROZEN)
def test_everything_that_a_launch_is_begun_with_counts(name: str) -> None:
    row = launch()
    assert frozen_digest(replace(row, **{name: other(getattr(row, name))})) != frozen_digest(row)


@pytest.mark.parametrize(
    "changes",
    [
        {"state": "released", "end_time": datetime(2026, 1, 1, tzinfo=UTC)},
        {"measurement": b"m" * 48, "digest": b"d" * 32, "firmware": (1, 2, 3)},
        {"keys": None, "audit_id": uuid4(), "reason": "x"},
    ],
)
def test_what_comes_later_does_not(changes: dict[str, Any]) -> None:
    assert frozen_digest(launch(**changes)) == frozen_digest(launch())


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ({"workload": "ab", "workload_version": "c"}, {"workload": "a", "workload_version": "bc"}),
        ({"caller": "c\0", "workload": "w"}, {"caller": "c", "workload": "\0w"}),
        ({"grant": None, "chip_id": "g"}, {"grant": "g", "chip_id": None}),
        ({"grant": None}, {"grant": ""}),
        ({"chip_id": None}, {"chip_id": ""}),
        ({"session": b"s" * 127}, {"session": b"s" * 127, "godh": b"g" * 2083}),
        ({"terms_id": b"x" * 31, "platform_id": b"x" * 33}, {"terms_id": b"x" * 33, "platform_id": b"x" * 31}),
    ],
)
def test_no_two_launches_are_spelled_alike(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert frozen_digest(launch(**one)) != frozen_digest(launch(**two))


def test_sealed_keys_show_nothing_and_open_with_their_launch_alone() -> None:
    keys, sealing = LaunchKeys(tek=b"t" * 16, tik=b"i" * 16), FileKey(KEK)
    row = launch()
    sealed = seal_keys(sealing, row, keys)
    row = replace(row, keys=sealed)
    assert unseal_keys(sealing, row) == keys
    assert keys.tek not in sealed.tek
    changes: list[Callable[[LaunchRow], LaunchRow]] = [
        lambda it: replace(it, launch_id=UUID(int=8)),
        lambda it: replace(it, grant="g"),
        lambda it: replace(it, expire_time=it.expire_time + timedelta(hours=1)),
    ]
    for change in changes:
        with pytest.raises(SevattestError):
            unseal_keys(sealing, change(row))
