"""All secrets of one launch or none: each from its own source, at the same time, and told to nobody but the owner."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path
from uuid import UUID

import pytest

from common.errors import Reason, SevattestError, Unavailable
from common.telemetry.log import configure
from tests.support.recording_log import RecordingLog
from tests.support.secret_rows import SecretRowsInMemory
from tests.support.spellings import shown_in
from verifier.documents.sources import FileSource, GeneratedSource, Source, StoredSource, VaultSource
from verifier.documents.workload import SecretSpec
from verifier.keys.file import FileKey
from verifier.secrets.put import secret_to_put
from verifier.secrets.router import Secrets
from verifier.secrets.stored import StoredSecrets
from verifier.store.rows import StoredSecret

KEY = FileKey(bytes(range(32)))
SECRET = b"the stored one, which nobody sees"


def spec(number: int, source: Source, *, nul: bool = False) -> SecretSpec:
    return SecretSpec(guid=UUID(int=number), source=source, trailing_nul=nul)


def rows() -> SecretRowsInMemory:
    made = SecretRowsInMemory()
    made.put("disk", secret_to_put("disk", SECRET, KEY), len(SECRET))
    return made


async def refused(secrets: Secrets, *specs: SecretSpec) -> SevattestError:
    """What both questions end with."""
    with pytest.raises(SevattestError) as caught:
        await secrets.sizes(specs)
    with pytest.raises(SevattestError) as again:
        await secrets.read(specs)
    assert (again.value.reason, again.value.message) == (caught.value.reason, caught.value.message)
    return again.value


async def test_each_secret_comes_from_its_own_source_in_order(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"of a file\n")
    specs = [
        spec(1, GeneratedSource(form="passphrase", size=24)),
        spec(2, StoredSource(name="disk"), nul=True),
        spec(3, FileSource(path=str(tmp_path / "file"))),
    ]
    secrets = Secrets(stored=StoredSecrets(rows(), KEY), random=bytes)
    assert await secrets.sizes(specs) == (24, len(SECRET), 10)
    entries = await secrets.read(specs)
    assert [(entry.guid.int, entry.data) for entry in entries] == [
        (1, b"a" * 24),
        (2, SECRET + b"\0"),
        (3, b"of a file\n"),
    ]


async def test_one_without_an_answer_keeps_the_others_back_and_every_one_is_logged(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"good")
    log = RecordingLog()
    good = spec(1, FileSource(path=str(tmp_path / "file")))
    bad: list[tuple[SecretSpec, dict[str, object]]] = [
        (spec(2, FileSource(path=str(tmp_path / "none"))), {"file": str(tmp_path / "none")}),
        (spec(3, StoredSource(name="missing", version=4)), {"stored": "missing", "version": 4}),
        (spec(4, VaultSource(mount="kv", path="a/b", field="key")), {"vault": "kv/a/b#key", "version": None}),
    ]
    secrets = Secrets(stored=StoredSecrets(rows(), KEY), log=log)
    error = await refused(secrets, good, *(each for each, _ in bad))
    assert isinstance(error, Unavailable)
    assert error.reason is Reason.SECRET_UNAVAILABLE
    for name in (str(tmp_path), "missing", "a/b", "none"):
        assert name not in f"{error!r} {error.fields}"
    for each, fields in bad:
        logged = [event.fields for event in log.events if event.fields["guid"] == str(each.guid)]
        assert [fields | {"guid": str(each.guid), "error": line["error"]} for line in logged] == logged
        assert len(logged) == 2  # one for each question
    assert await secrets.sizes([good]) == (4,)


@pytest.mark.parametrize("reason", [Reason.KEY_UNAVAILABLE, Reason.STORE_UNAVAILABLE])
async def test_what_the_store_and_the_key_say_is_passed_on_and_logged(reason: Reason) -> None:
    log, store = RecordingLog(), rows()
    store.fails = Unavailable(reason, "out of reach")
    error = await refused(Secrets(stored=StoredSecrets(store, KEY), log=log), spec(1, StoredSource(name="disk")))
    assert error is store.fails
    assert {event.fields["stored"] for event in log.named("source.unavailable")} == {"disk"}


class Waiting(SecretRowsInMemory):
    """A store that answers once as many ask as it waits for."""

    def __init__(self, parties: int) -> None:
        super().__init__()
        self.barrier = asyncio.Barrier(parties)
        self.most = 0  # that waited at the same time

    async def secret(self, name: str, version: int | None) -> StoredSecret | None:
        self.most = max(self.most, self.barrier.n_waiting + 1)
        await self.barrier.wait()
        return await super().secret(name, version)


async def test_sources_are_asked_at_the_same_time() -> None:
    store = Waiting(3)
    for name in ("a", "b", "c"):
        store.put(name, secret_to_put(name, name.encode(), KEY), 1)
    entries = await Secrets(stored=StoredSecrets(store, KEY)).read(
        [spec(number + 1, StoredSource(name=name)) for number, name in enumerate("abc")]
    )
    assert [entry.data for entry in entries] == [b"a", b"b", b"c"]


async def test_one_limit_counts_for_all_that_do_not_answer() -> None:
    log = RecordingLog()
    store = Waiting(99)
    secrets = Secrets(stored=StoredSecrets(store, KEY), log=log, time_limit=0.05)
    with pytest.raises(Unavailable) as caught:
        await secrets.read([spec(number, StoredSource(name=str(number))) for number in range(1, 21)])
    assert caught.value.reason is Reason.SECRET_UNAVAILABLE
    assert store.most == 20  # so the limit ran for all of them at once
    assert len(log.events) == 20
    assert store.barrier.n_waiting == 0  # nobody is left asking


async def test_nothing_secret_is_in_a_log_line_or_an_error() -> None:
    stream = io.StringIO()
    store = rows()
    store.put("broken", lambda _: store.rows["disk", 1].sealed, len(SECRET))
    secrets = Secrets(stored=StoredSecrets(store, KEY), log=configure("test", stream))
    specs = [spec(1, StoredSource(name="disk")), spec(2, StoredSource(name="broken"))]
    with pytest.raises(Unavailable) as caught:
        await secrets.read(specs)
    entries = await secrets.read(specs[:1])
    line = json.loads(stream.getvalue())
    assert (line["stored"], line["error"]["reason"]) == ("broken", "STORE_UNAVAILABLE")
    shown = f"{stream.getvalue()} {caught.value!r} {caught.value.fields} {entries!r} {secrets!r}"
    assert not shown_in(SECRET, shown)
    assert entries[0].data == SECRET
