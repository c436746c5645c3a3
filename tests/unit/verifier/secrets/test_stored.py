"""Secrets in the store: what the owner put is read back by name and version, and nothing opens in another's place."""

from __future__ import annotations

from dataclasses import replace

import pytest

from common.errors import InvalidInput, Reason, SevattestError, Unavailable
from tests.support.secret_rows import SecretRowsInMemory
from tests.support.spellings import shown_in
from verifier.documents.sources import StoredSource
from verifier.keys.file import FileKey
from verifier.secrets.put import SECRET_MAX, secret_to_put
from verifier.secrets.stored import StoredSecrets

KEY = FileKey(bytes(range(32)))
SECRET, NEWER = b"a passphrase that is stored", b"the one that came after it"


def store() -> SecretRowsInMemory:
    rows = SecretRowsInMemory()
    for name, value in (("disk", SECRET), ("disk", NEWER), ("other", b"somebody else's")):
        rows.put(name, secret_to_put(name, value, KEY), len(value))
    return rows


async def refused(rows: SecretRowsInMemory, source: StoredSource, key: FileKey = KEY) -> SevattestError:
    with pytest.raises(SevattestError) as caught:
        await StoredSecrets(rows, key).read(source)
    return caught.value


async def test_the_newest_version_is_read_or_the_one_that_is_named() -> None:
    stored = StoredSecrets(store(), KEY)
    assert await stored.read(StoredSource(name="disk")) == NEWER
    assert await stored.read(StoredSource(name="disk", version=1)) == SECRET
    assert await stored.size(StoredSource(name="disk")) == len(NEWER)
    assert await stored.size(StoredSource(name="disk", version=1)) == len(SECRET)


async def test_a_new_version_counts_from_the_next_reading_on() -> None:
    rows = store()
    stored = StoredSecrets(rows, KEY)
    rows.put("disk", secret_to_put("disk", b"rotated", KEY), 7)
    assert await stored.read(StoredSource(name="disk")) == b"rotated"
    assert await stored.read(StoredSource(name="disk", version=2)) == NEWER


async def test_what_is_not_there_is_unavailable() -> None:
    rows = store()
    gone = [StoredSource(name="none"), StoredSource(name="disk", version=3), StoredSource(name="disk", version=0)]
    rows.delete("other")
    for source in (*gone, StoredSource(name="other")):
        assert (await refused(rows, source)).reason is Reason.SECRET_UNAVAILABLE
        with pytest.raises(Unavailable):
            await StoredSecrets(rows, KEY).size(source)


async def test_a_version_that_was_deleted_comes_back_under_no_number() -> None:
    rows = store()
    rows.delete("disk")
    assert rows.put("disk", secret_to_put("disk", b"new", KEY), 3) == 3
    assert (await refused(rows, StoredSource(name="disk", version=1))).reason is Reason.SECRET_UNAVAILABLE
    assert await StoredSecrets(rows, KEY).read(StoredSource(name="disk")) == b"new"


@pytest.mark.parametrize("version", [None, 2])
@pytest.mark.parametrize("moved", ["row", "blob"])
@pytest.mark.parametrize("taken", [("disk", 1), ("other", 1)])
async def test_a_row_in_another_s_place_does_not_open(
    taken: tuple[str, int],
    moved: str,
    version: int | None,
) -> None:
    rows = store()
    wanted = rows.rows["disk", 2]
    row = (
        replace(rows.rows[taken], name="disk", version=2)
        if moved == "row"
        else replace(wanted, sealed=rows.rows[taken].sealed)
    )
    rows.rows["disk", 2] = row
    assert (await refused(rows, StoredSource(name="disk", version=version))).reason is Reason.STORE_UNAVAILABLE
    rows.rows["disk", 2] = wanted
    assert await StoredSecrets(rows, KEY).read(StoredSource(name="disk", version=version)) == NEWER


async def test_an_older_row_that_keeps_its_own_number_does_not_pass_for_a_version_that_was_named() -> None:
    rows = store()
    rows.rows["disk", 2] = rows.rows["disk", 1]
    assert (await refused(rows, StoredSource(name="disk", version=2))).reason is Reason.STORE_UNAVAILABLE


async def test_another_key_opens_nothing() -> None:
    error = await refused(store(), StoredSource(name="disk"), FileKey(bytes(range(1, 33))))
    assert error.reason is Reason.STORE_UNAVAILABLE


async def test_a_store_that_is_down_says_so_itself() -> None:
    rows = store()
    rows.fails = Unavailable(Reason.STORE_UNAVAILABLE, "the store is down")
    assert await refused(rows, StoredSource(name="disk")) is rows.fails


@pytest.mark.parametrize("name", ["disk", "A.b_c-9", "_", "x" * 128])
def test_names_of_secrets_are_those_of_documents(name: str) -> None:
    rows = SecretRowsInMemory()
    assert rows.put(name, secret_to_put(name, b"v", KEY), 1) == 1


@pytest.mark.parametrize("name", ["", ".", "-x", "a b", "a/b", "ä", "a\n", "a\0b", "x" * 129])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(InvalidInput, match=r"^name: ") as caught:
        secret_to_put(name, SECRET, KEY)
    assert caught.value.reason is Reason.INVALID_ARGUMENT


def test_what_no_guest_can_be_given_is_refused_and_not_quoted() -> None:
    secret_to_put("disk", bytes(SECRET_MAX), KEY)
    for value in (b"", SECRET + bytes(SECRET_MAX)):
        with pytest.raises(InvalidInput, match=r"^value: ") as caught:
            secret_to_put("disk", value, KEY)
        assert caught.value.reason is Reason.INVALID_ARGUMENT
        assert SECRET not in repr(caught.value).encode()


def test_what_is_kept_shows_nothing() -> None:
    rows = store()
    seal = secret_to_put("disk", SECRET, KEY)
    assert not shown_in(SECRET, repr((rows, seal)), *(row.sealed for row in rows.rows.values()))


def test_nothing_is_kept_when_the_key_is_out_of_reach() -> None:
    rows = SecretRowsInMemory()

    def seal(_version: int) -> bytes:
        raise Unavailable(Reason.KEY_UNAVAILABLE, "the token is unplugged")

    with pytest.raises(Unavailable):
        rows.put("disk", seal, len(SECRET))
    assert not rows.rows
    assert rows.put("disk", secret_to_put("disk", SECRET, KEY), len(SECRET)) == 1
