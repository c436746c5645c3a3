"""What the owner keeps in the database: documents, secrets and the verifier's own keys, and the requests for them."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from uuid import UUID

from common.audit.chain import GENESIS, Head
from verifier.store.engine import Row, Transaction, Value
from verifier.store.rows import (
    AdminRequest,
    AuditRow,
    DocumentRow,
    DocumentSeal,
    DocumentSet,
    Outcome,
    RequestKey,
    SealedBlob,
    StoredSecret,
)
from verifier.store.sql_common import Decided, OverEngine, append, the_head, touch
from verifier.store.sql_rows import (
    DOCUMENT_COLUMNS,
    SECRET_COLUMNS,
    admin_request_of,
    document_of,
    key_cells,
    secret_of,
    stamp,
)


class Documents(OverEngine):
    """The part of `Store` that keeps the owner's documents."""

    async def revision(self) -> int:
        """See `Store`."""
        row = await self._row("SELECT value FROM mark WHERE name='revision'")
        return 0 if row is None else row[0]

    async def revise(self, seal: DocumentSeal) -> None:
        """See `Store`."""

        async def work(transaction: Transaction) -> None:
            _revise(transaction, _sealed(await transaction.rows(_DOCUMENTS), seal), seal)

        await self._engine.write("revise", work)

    async def documents(self) -> DocumentSet:
        """See `Store`."""
        return _documents(await self._rows(_DOCUMENTS))

    async def seal_documents(self, reviewed: DocumentSet, seal: DocumentSeal, audit: AuditRow) -> Outcome:
        """See `Store`."""

        async def work(transaction: Transaction) -> None:
            asked, head = transaction.rows(_DOCUMENTS), the_head(transaction)
            if _documents(await asked) != reviewed:
                raise Decided(Outcome.DOCUMENTS_CHANGED)
            # What was seen is sealed, whatever somebody without regard for the turn writes meanwhile.
            _revise(transaction, replace(reviewed, change=append(transaction, await head, audit)), seal)

        return await self._decide("seal", work)

    async def admin_request(self, key: RequestKey) -> AdminRequest | None:
        """See `Store`."""

        async def work(transaction: Transaction) -> AdminRequest | None:
            row = await transaction.row(
                "SELECT content, answer FROM admin_request WHERE caller=? AND method=? AND request_id=?",
                *key_cells(key),
            )
            if row is None:
                return None
            touch(transaction)
            return admin_request_of(key, row)

        return await self._engine.write("answered", work)

    async def apply_document(
        self,
        document: DocumentRow,
        request: AdminRequest,
        audit: AuditRow,
        seal: DocumentSeal,
        revision: int | None = None,
    ) -> Outcome:
        """See `Store`."""
        place = (document.kind, document.name, document.version)

        async def work(transaction: Transaction) -> Outcome:
            asked, taken, head = transaction.rows(_DOCUMENTS), _take(transaction, request), the_head(transaction)
            found = _sealed(await asked, seal)
            await _require_taken(taken)
            if revision not in {None, found.revision}:
                raise Decided(Outcome.DOCUMENTS_CHANGED)
            for row in found.rows:
                if (row.kind, row.name, row.version) == place:
                    if (row.text, row.is_json) != (document.text, document.is_json):
                        raise Decided(Outcome.CONFLICT)
                    return Outcome.UNCHANGED
            transaction.tell(
                f"INSERT INTO document ({DOCUMENT_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?)",  # noqa: S608 -- constants
                *(*place, document.text, int(document.is_json), stamp(document.apply_time)),
            )
            change = append(transaction, await head, audit)
            _revise(transaction, replace(found, rows=(*found.rows, document), change=change), seal)
            return Outcome.DONE

        try:
            return await self._engine.write("apply", work)
        except Decided as decided:
            return decided.outcome

    async def delete_document(
        self,
        kind: str,
        name: str,
        request: AdminRequest,
        audit: AuditRow,
        seal: DocumentSeal,
        *,
        revision: int | None = None,
    ) -> Outcome:
        """See `Store`."""

        async def work(transaction: Transaction) -> None:
            asked, taken, head = transaction.rows(_DOCUMENTS), _take(transaction, request), the_head(transaction)
            deleted = transaction.change("DELETE FROM document WHERE kind=? AND name=?", kind, name)
            found = _sealed(await asked, seal)
            await _require_taken(taken)
            if revision not in {None, found.revision}:
                raise Decided(Outcome.DOCUMENTS_CHANGED)
            if not await deleted:
                raise Decided(Outcome.LOST)
            left = tuple(row for row in found.rows if (row.kind, row.name) != (kind, name))
            _revise(transaction, replace(found, rows=left, change=append(transaction, await head, audit)), seal)

        return await self._decide("delete", work)


class Secrets(OverEngine):
    """The part of `Store` that keeps what is sealed: secrets, the verifier's own keys, and how all are re-wrapped."""

    async def put_secret(
        self, name: str, seal: Callable[[int], bytes], size: int, request: AdminRequest, audit: AuditRow
    ) -> tuple[Outcome, int]:
        """See `Store`."""

        async def work(transaction: Transaction) -> int:
            # The version is known only below; until then the request holds its place.
            taken = _take(transaction, request)
            named = transaction.one(
                "INSERT INTO secret_name (name, last_version) VALUES (?, 1) "
                "ON CONFLICT (name) DO UPDATE SET last_version=secret_name.last_version+1 RETURNING last_version",
                name,
            )
            head = the_head(transaction)
            await _require_taken(taken)
            version: int = (await named)[0]
            transaction.tell(
                f"INSERT INTO secret ({SECRET_COLUMNS}) VALUES (?, ?, ?, ?, ?)",  # noqa: S608 -- constants
                *(name, version, seal(version), size, stamp(audit.time)),
            )
            _answer(transaction, request, version=version)
            append(transaction, await head, replace(audit, body=_with(audit.body, version=version)))
            return version

        try:
            return Outcome.DONE, await self._engine.write("put-secret", work)
        except Decided as decided:
            return decided.outcome, 0

    async def secret(self, name: str, version: int | None) -> StoredSecret | None:
        """See `Store`."""
        if version is None:
            row = await self._row(f"{_SECRET} ORDER BY version DESC LIMIT 1", name)
        else:
            row = await self._row(f"{_SECRET} AND version=?", name, version)
        return None if row is None else secret_of(row)

    async def secrets(self, *, after: str, limit: int) -> Sequence[StoredSecret]:
        """See `Store`."""
        rows = await self._rows(
            f"SELECT {SECRET_COLUMNS} FROM secret AS one WHERE name>? AND version="  # noqa: S608 -- constants
            "(SELECT max(version) FROM secret AS other WHERE other.name=one.name) ORDER BY name LIMIT ?",
            *(after, limit),
        )
        return [secret_of(row) for row in rows]

    async def delete_secret(
        self, name: str, request: AdminRequest, audit: AuditRow, seal: DocumentSeal, revision: int | None = None
    ) -> tuple[Outcome, int]:
        """See `Store`."""

        async def work(transaction: Transaction) -> int:
            asked, taken, head = transaction.rows(_DOCUMENTS), _take(transaction, request), the_head(transaction)
            deleted = transaction.change("DELETE FROM secret WHERE name=?", name)
            found = _sealed(await asked, seal)
            await _require_taken(taken)
            if revision not in {None, found.revision}:
                raise Decided(Outcome.DOCUMENTS_CHANGED)
            versions = await deleted
            if not versions:
                raise Decided(Outcome.LOST)
            _answer(transaction, request, versions=versions)
            append(transaction, await head, replace(audit, body=_with(audit.body, versions=versions)))
            # A release that read the secret before this must not come after it.
            _revise(transaction, found, seal)
            return versions

        try:
            return Outcome.DONE, await self._engine.write("delete-secret", work)
        except Decided as decided:
            return decided.outcome, 0

    async def identity(self, name: str) -> bytes | None:
        """See `Store`."""
        row = await self._row("SELECT sealed FROM identity WHERE name=?", name)
        return None if row is None else row[0]

    async def keep_identity(self, name: str, sealed: bytes) -> bytes:
        """See `Store`."""

        async def work(transaction: Transaction) -> bytes:
            transaction.tell("INSERT INTO identity (name, sealed) VALUES (?, ?) ON CONFLICT DO NOTHING", name, sealed)
            kept: bytes = (await transaction.one("SELECT sealed FROM identity WHERE name=?", name))[0]
            return kept

        return await self._engine.write("keep-identity", work)

    async def sealing_keys(self) -> frozenset[bytes]:
        """See `Store`."""

        async def work(transaction: Transaction) -> frozenset[bytes]:
            found = {row[0] for asked in [transaction.rows(query) for query in _KEYS] for row in await asked}
            # Generated secrets stay for ever. One look into the index for each key, not for each secret.
            last = await transaction.row(_NEXT_GENERATED, b"")
            while last is not None:
                found.add(last[0])
                last = await transaction.row(_NEXT_GENERATED, last[0])
            return frozenset(found)

        return await self._engine.read(work)

    async def sealed_under_others(self, key_id: bytes, limit: int) -> Sequence[SealedBlob]:
        """See `Store`."""

        async def work(transaction: Transaction) -> list[SealedBlob]:
            found: list[SealedBlob] = []
            for query, place in _OTHERS:
                if len(found) < limit:
                    rows = await transaction.rows(query, key_id, limit - len(found))
                    found += [SealedBlob(place=place(row), sealed=row[-1]) for row in rows]
            return found

        return await self._engine.read(work)

    async def reseal(self, place: tuple[str, ...], old: bytes, new: bytes) -> bool:
        """See `Store`."""
        match place:
            case ("launch", launch_id, "tek" | "tik" | "generated" as column):
                sql = f"UPDATE launch SET {column}=? WHERE launch_id=? AND {column}=?"  # noqa: S608 -- one of three
                values: tuple[Value, ...] = (new, str(UUID(launch_id)), old)
            case ("secret", name, version):
                sql = "UPDATE secret SET sealed=? WHERE name=? AND version=? AND sealed=?"
                values = (new, name, int(version), old)
            case ("identity", name):
                sql, values = "UPDATE identity SET sealed=? WHERE name=? AND sealed=?", (new, name, old)
            case _:
                raise ValueError("no such place")
        return bool(await self._engine.write("reseal", lambda transaction: transaction.change(sql, *values)))


# One statement: all of it is of the same moment. The events are the index's.
_DOCUMENTS = (
    "SELECT mark.value, document_seal.tag, changed.number, changed.hash, "  # noqa: S608 -- constants
    f"{', '.join(f'document.{name}' for name in DOCUMENT_COLUMNS.split(', '))} FROM mark "
    "LEFT JOIN document_seal ON 1=1 LEFT JOIN (SELECT number, hash FROM audit "
    "WHERE event IN ('document.applied', 'document.deleted', 'documents.sealed') ORDER BY number DESC LIMIT 1) "
    "AS changed ON 1=1 LEFT JOIN document ON 1=1 WHERE mark.name='revision' "
    "ORDER BY kind, document.name, apply_time, version"
)
_SECRET = f"SELECT {SECRET_COLUMNS} FROM secret WHERE name=?"  # noqa: S608 -- constants

_KEYS = (
    "SELECT DISTINCT substr(tek, 2, 8) FROM launch WHERE state='open'",
    "SELECT DISTINCT substr(tik, 2, 8) FROM launch WHERE state='open'",
    "SELECT DISTINCT substr(sealed, 2, 8) FROM secret",
    "SELECT DISTINCT substr(sealed, 2, 8) FROM identity",
)
_NEXT_GENERATED = (
    "SELECT substr(generated, 2, 8) FROM launch WHERE generated IS NOT NULL AND substr(generated, 2, 8) > ? "
    "ORDER BY substr(generated, 2, 8) LIMIT 1"
)


def _others(
    place: Callable[[Row], tuple[str, ...]], columns: str, table: str, sealed: str, where: str = "1=1"
) -> list[tuple[str, Callable[[Row], tuple[str, ...]]]]:
    """Queries for what is sealed under other keys than one, and the places of what they find."""
    # `<>` would read all; two ranges of an index read what they find.
    select = f"SELECT {columns}, {sealed} FROM {table} WHERE {where} AND substr({sealed}, 2, 8)"  # noqa: S608 -- constants
    return [(f"{select} {beside} ? LIMIT ?", place) for beside in ("<", ">")]


_OTHERS = (
    *_others(lambda row: ("launch", row[0], "tek"), "launch_id", "launch", "tek", "state='open'"),
    *_others(lambda row: ("launch", row[0], "tik"), "launch_id", "launch", "tik", "state='open'"),
    *_others(lambda row: ("launch", row[0], "generated"), "launch_id", "launch", "generated", "generated IS NOT NULL"),
    *_others(lambda row: ("secret", row[0], str(row[1])), "name, version", "secret", "sealed"),
    *_others(lambda row: ("identity", row[0]), "name", "identity", "sealed"),
)


def _take(transaction: Transaction, request: AdminRequest) -> Awaitable[int]:
    return transaction.change(
        "INSERT INTO admin_request (caller, method, request_id, content, answer) VALUES (?, ?, ?, ?, ?) "
        "ON CONFLICT DO NOTHING",
        *(*key_cells(request.key), request.content, request.answer),
    )


async def _require_taken(taken: Awaitable[int]) -> None:
    if not await taken:
        raise Decided(Outcome.REQUEST_TAKEN)


def _documents(rows: Sequence[Row]) -> DocumentSet:
    """The documents in the rows of `_DOCUMENTS`."""
    revision, tag, number, digest = rows[0][:4]
    return DocumentSet(
        revision=revision,
        rows=tuple(document_of(row[4:]) for row in rows if row[4] is not None),
        change=GENESIS if number is None else Head(number=number, hash=digest),
        tag=tag,
    )


def _sealed(rows: Sequence[Row], seal: DocumentSeal) -> DocumentSet:
    """The documents in the rows of `_DOCUMENTS`; they are as they were sealed."""
    found = _documents(rows)
    seal.require(found)
    return found


def _revise(transaction: Transaction, new: DocumentSet, seal: DocumentSeal) -> None:
    """Give documents another revision, and seal them.

    `new` is what was found sealed and what this transaction did to it, not what it reads again: somebody without regard
    for the turn may have written meanwhile.
    """
    new = replace(new, revision=seal.next_revision(new))
    transaction.tell("UPDATE mark SET value=? WHERE name='revision'", new.revision)
    transaction.tell(
        "INSERT INTO document_seal (one, tag) VALUES (1, ?) ON CONFLICT (one) DO UPDATE SET tag=excluded.tag",
        seal.tag(new),
    )


def _answer(transaction: Transaction, request: AdminRequest, **known: int) -> None:
    """Put what is known only now into a request's answer."""
    transaction.tell(
        "UPDATE admin_request SET answer=? WHERE caller=? AND method=? AND request_id=?",
        *(_with(request.answer, **known), *key_cells(request.key)),
    )


def _with(text: str, **members: int) -> str:
    return json.dumps({**json.loads(text), **members})
