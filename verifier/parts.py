"""Which implementations a configuration asks for: store, sealing keys, secret sources, key service.

Only the composition root and the commands beside it call this. Nothing is opened here.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import UUID

from common.amd.kds import KeyService, key_service
from common.errors import InvalidInput, Reason, SevattestError, Unavailable
from common.private_file import read_private
from common.sev.certs.roots import Root, named_root, pinned_roots
from common.telemetry.log import Log
from verifier.config import Config, StoreConfig
from verifier.keys.base import SealingKey, identity_place
from verifier.keys.file import read_key_file
from verifier.keys.identities import DOCUMENTS, load_identities
from verifier.keys.keyring import Keyring
from verifier.keys.pkcs11 import TokenKey, read_any_key_file, read_wrapped_key_file
from verifier.keys.signer import DOCUMENT_KEY_SIZE, DocumentKey
from verifier.keys.token import Pkcs11Settings
from verifier.library.sealed import DocumentSeal
from verifier.secrets.generated_command import GeneratedRows
from verifier.secrets.router import Secrets
from verifier.secrets.stored import StoredSecrets
from verifier.secrets.vault import VaultSecrets, VaultSettings
from verifier.store.engine import no_step
from verifier.store.postgres import PostgresStore
from verifier.store.rows import AuditRow, ChainedRecord
from verifier.store.sql_store import SqlStore
from verifier.store.sqlite import SqliteReading, SqliteStore, read_audit
from verifier.store.sqlite_file import FILE_NAME

_PAGE = 500  # records
_DSN_MAX = 4096  # bytes


def make_store(config: Config, on_step: Callable[[str], None] = no_step) -> SqlStore:
    """The store of this configuration, not opened yet.

    Raises:
        InvalidInput: INVALID_CONFIGURATION.
    """
    if config.store is None:
        return SqliteStore(config.folder, on_step=on_step)
    return _postgres(config.store, on_step)


def _postgres(store: StoreConfig, on_step: Callable[[str], None] = no_step) -> PostgresStore:
    dsn = read_private(store.postgres, _DSN_MAX).decode("utf-8", "replace").strip()
    if not dsn:
        # To libpq this is all of its defaults: some database, of this user's name.
        raise InvalidInput(
            Reason.INVALID_CONFIGURATION, f"store.postgres: {store.postgres}: holds no connection string"
        )
    return _NamedPostgres(dsn, on_step, store)


class _NamedPostgres(PostgresStore):
    """The PostgreSQL of `[store]`: where it cannot be opened, the error says that it is this one, and nothing of it."""

    def __init__(self, dsn: str, on_step: Callable[[str], None], store: StoreConfig) -> None:
        super().__init__(dsn, on_step, schema=store.schema, connections=store.connections)
        self._file = store.postgres

    async def open(self, *, make: bool = False) -> bool:
        try:
            return await super().open(make=make)
        except Unavailable as error:
            raise self._named(error) from error

    async def open_to_read(self) -> None:
        try:
            await super().open_to_read()
        except Unavailable as error:
            raise self._named(error) from error

    def _named(self, error: Unavailable) -> Unavailable:
        where = f"the PostgreSQL of [store], as {self._file} names it"
        return Unavailable(error.reason, f"{error.message} ({where})", **error.fields)


async def init_store(config: Config) -> str:
    """Make the store of this configuration; where.

    Raises:
        InvalidInput: INVALID_CONFIGURATION; or there is one.
        Unavailable: the database has no answer, or another process serves from the folder.
    """
    store = make_store(config)
    where = str(config.folder) if config.store is None else f"the PostgreSQL of [store], schema {config.store.schema}"
    try:
        made = await store.open(make=True)
    finally:
        await store.close()
    if not made:
        raise InvalidInput(Reason.INVALID_CONFIGURATION, f"there is a store in {where} already")
    return where


def sealing_keys(config: Config) -> tuple[SealingKey, ...]:
    """The key that seals, and those that only open, in this order.

    Raises:
        InvalidInput: INVALID_CONFIGURATION.
    """
    if config.pkcs11 is None:
        return tuple(read_key_file(path) for path in (config.key_file, *config.older_key_files))
    settings = token_settings(config)
    # On the way into the token, older keys may still be plain.
    older = (read_any_key_file(path, settings) for path in config.older_key_files)
    return (read_wrapped_key_file(config.key_file, settings), *older)


def token_keys(keys: tuple[SealingKey, ...]) -> tuple[TokenKey, ...]:
    """Those of them that a token opens, and that must be kept fresh."""
    return tuple(key for key in keys if isinstance(key, TokenKey))


def token_settings(config: Config) -> Pkcs11Settings:
    """How the configured token is reached."""
    token = config.pkcs11
    if token is None:
        raise InvalidInput(Reason.INVALID_CONFIGURATION, "pkcs11: is not set")
    return Pkcs11Settings(
        module=token.module, token=token.token, key=token.key, pin_file=token.pin_file, keep=token.keep
    )


def make_secrets(
    config: Config, store: SqlStore, keyring: Keyring, random: Callable[[int], bytes], log: Log
) -> Secrets:
    """The sources of secrets.

    Raises:
        InvalidInput: INVALID_CONFIGURATION.
    """
    return Secrets(stored=StoredSecrets(store, keyring), vault=make_vault(config), random=random, log=log)


def make_vault(config: Config) -> VaultSecrets | None:
    """Vault, if the configuration names one; it is not asked yet.

    Raises:
        InvalidInput: INVALID_CONFIGURATION.
    """
    vault = config.vault
    if vault is None:
        return None
    return VaultSecrets(
        VaultSettings(
            address=vault.address,
            token_file=vault.token_file,
            ca=vault.ca,
            namespace=vault.namespace,
            timeout=vault.timeout,
        )
    )


def make_key_service(config: Config, roots: tuple[Root, ...]) -> KeyService | None:
    """Where signed CEKs come from; None for nowhere."""
    return None if config.kds is None else key_service(config.kds.source, config.kds.cache, roots=roots)


def trusted_roots(config: Config) -> tuple[tuple[Root, ...], tuple[tuple[Path, Root], ...]]:
    """All roots, and those among them that only the configuration names.

    Raises:
        InvalidInput: a file cannot be read or holds no root.
    """
    named = []
    for path in config.platforms.extra_roots:
        try:
            root = named_root(path.read_bytes())
        except OSError as error:
            raise InvalidInput(
                Reason.INVALID_CONFIGURATION, f"platforms.extra_roots: {path}: {(error.strerror or '').lower()}"
            ) from error
        except SevattestError as error:
            raise InvalidInput(
                Reason.INVALID_CONFIGURATION, f"platforms.extra_roots: {path}: {error.message}"
            ) from error
        if root.emulated:
            named.append((path, root))
    return (*pinned_roots(), *(root for _, root in named)), tuple(named)


@asynccontextmanager
async def beside(config: Config) -> AsyncIterator[tuple[GeneratedRows, Keyring]]:
    """What is kept of generated secrets, and the keys, for a command beside the process that serves.

    Raises:
        InvalidInput: INVALID_CONFIGURATION.
        Unavailable: the store or the token has no answer.
    """
    keyring = await _keyring(config)
    async with _reading(config) as store:
        yield store, keyring


@asynccontextmanager
async def _reading(config: Config) -> AsyncIterator[SqlStore]:
    """The store as it is, beside who serves: nothing is made in it, and no schema brought forward."""
    if config.store is None:
        yield SqlStore(SqliteReading(config.folder))
        return
    store = _postgres(config.store)
    try:
        await store.open_to_read()
        yield store
    finally:
        await store.close()


@asynccontextmanager
async def applied_documents(config: Config) -> AsyncIterator[tuple[SqlStore, DocumentSeal]]:
    """The store and the seal on the documents in it, beside who serves and to be read.

    Raises:
        InvalidInput: INVALID_CONFIGURATION.
        Unavailable: the store or the token has no answer.
    """
    keyring = await _keyring(config)
    async with _reading(config) as store:
        sealed = await store.identity(DOCUMENTS)
        # A seal whose key is gone is nobody's.
        key = os.urandom(DOCUMENT_KEY_SIZE) if sealed is None else keyring.unseal(sealed, identity_place(DOCUMENTS))
        yield store, DocumentSeal(DocumentKey(key).tag)


@asynccontextmanager
async def documents_to_seal(config: Config, log: Log) -> AsyncIterator[tuple[SqlStore, DocumentSeal]]:
    """The same, to be written to: beside replicas, or in place of the one process that serves from a folder.

    Raises:
        InvalidInput: INVALID_CONFIGURATION.
        Unavailable: the store or the token has no answer, or another process serves from the folder.
    """
    keyring = await _keyring(config)
    store = make_store(config)
    await store.open()
    try:
        identities = await load_identities(store, keyring, os.urandom, log)
        yield store, DocumentSeal(identities.documents.tag)
    finally:
        await store.close()


async def _keyring(config: Config) -> Keyring:
    keys = sealing_keys(config)
    for key in token_keys(keys):
        await key.refresh()
    return Keyring(keys[0], keys[1:])


async def read_records(config: Config, launch_id: UUID | None) -> Sequence[AuditRow]:
    """All audit records, or those of one launch, oldest first, also while a process serves.

    Raises:
        InvalidInput: INVALID_CONFIGURATION.
        Unavailable: the store cannot be read.
    """
    if config.store is None:
        return read_audit(config.folder / FILE_NAME, launch_id)
    found: list[ChainedRecord] = []
    async with _reading(config) as store:
        while page := await store.records(launch_id, after=found[-1].number if found else 0, limit=_PAGE):
            found += page
    return [each.record for each in found]
