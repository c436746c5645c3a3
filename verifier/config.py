"""The verifier's configuration: one frozen value from a TOML file (docs/verifier.md). Every default is the safe one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import msgspec

from common import config
from common.errors import InvalidInput, Reason
from common.rpc import MAX_STREAMS
from common.rpc.identity import Role
from common.rpc.tls import ServerTls
from common.telemetry.endpoint import MetricsConfig
from verifier.documents.rate import SPELLING, Rate, read_rate

_DENIED = re.compile(r"[0-9a-f]{64}|[0-9a-f]{128}")


class TlsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[tls]`: the verifier's own identity and whom it serves.

    Attributes:
        cert: PEM, the verifier's certificate from the owner's CA.
        key: PEM, its key.
        client_ca: PEM, the datacenter's CA.
        trust_domain: the datacenter's.
        allow_single_ca: accept one CA for both sites; every banner and receipt says so.
    """

    cert: Path
    key: Path
    client_ca: Path
    trust_domain: str
    allow_single_ca: bool = False


class HealthConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[health]`: where probes ask.

    Attributes:
        socket: a Unix socket to make.
    """

    socket: Path


class AdminConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[admin]`: the owner's own listener; without it nobody administers over the network.

    Attributes:
        listen: `HOST:PORT`; port 0 takes any that is free.
        client_ca: PEM, the owner's CA.
        trust_domain: the owner's.
    """

    listen: str
    client_ca: Path
    trust_domain: str


class StoreConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[store]`: where replicas meet; without it, one SQLite file in `state_dir`.

    Attributes:
        postgres: a file that holds a PostgreSQL connection string (libpq's form), readable by its owner alone.
        connections: to it from this process, 2 to 64: one writes, the others read.
        schema: the schema in the database that holds the tables; `sev-verifier init` makes it.
    """

    postgres: Path
    connections: int = 4
    schema: str = "sevattest"

    def __post_init__(self) -> None:
        """Refuse what would serve nobody."""
        if not 2 <= self.connections <= 64:
            raise InvalidInput(Reason.INVALID_CONFIGURATION, "connections: must be 2 to 64")


class Pkcs11Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[pkcs11]`: the token whose key the key files are wrapped with.

    Attributes:
        module: the token's library.
        token: its label.
        key: label of the AES key in it.
        pin_file: holds the user PIN.
        keep: seconds that an unwrapped key is kept in memory before the token is asked again, 1 to 86400.
    """

    module: Path
    token: str
    key: str
    pin_file: Path
    keep: float = 60.0

    def __post_init__(self) -> None:
        """Refuse what would ask the token all the time, or never."""
        if not 1 <= self.keep <= 86_400:
            raise InvalidInput(Reason.INVALID_CONFIGURATION, "keep: must be 1 to 86400")


class VaultConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[vault]`: HashiCorp Vault or OpenBao, where workloads name secrets in it.

    Attributes:
        address: `https://HOST:PORT`.
        token_file: holds the token, read anew for each request.
        ca: PEM, the CA of its certificate; none takes the system's.
        namespace: of the enterprise edition.
        timeout: seconds that a request may take, 1 to 30.
    """

    address: str
    token_file: Path
    ca: Path | None = None
    namespace: str | None = None
    timeout: float = 5.0

    def __post_init__(self) -> None:
        """Refuse what would wait longer than a call may last."""
        if not 1 <= self.timeout <= 30:
            raise InvalidInput(Reason.INVALID_CONFIGURATION, "timeout: must be 1 to 30")


class AuditConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[audit]`: when the log's head is signed.

    Attributes:
        checkpoint_records: after so many records, 1 to 1000000; looked at with each sweep.
        checkpoint_interval: after so many seconds in which there was a record, 1 to 86400.
    """

    checkpoint_records: int = 1000
    checkpoint_interval: float = 300.0

    def __post_init__(self) -> None:
        """Refuse what would sign nothing."""
        if not 1 <= self.checkpoint_records <= 1_000_000:
            raise InvalidInput(Reason.INVALID_CONFIGURATION, "checkpoint_records: must be 1 to 1000000")
        if not 1 <= self.checkpoint_interval <= 86_400:
            raise InvalidInput(Reason.INVALID_CONFIGURATION, "checkpoint_interval: must be 1 to 86400")


class PlatformsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[platforms]`: which chips are genuine and which are never accepted.

    Attributes:
        extra_roots: files of ASK and ARK beside AMD's own; their platforms count as emulated.
        denied_chips: lower-case hex of CEK fingerprints (64 digits) or chip ids (128 digits).
    """

    extra_roots: tuple[Path, ...] = ()
    denied_chips: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what would deny nothing."""
        for index, text in enumerate(self.denied_chips):
            if not _DENIED.fullmatch(text):
                raise InvalidInput(
                    Reason.INVALID_CONFIGURATION,
                    f"denied_chips[{index}]: must be 64 (fingerprint) or 128 (chip id) lower-case hex digits",
                )


class KdsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[kds]`: where signed CEKs come from.

    Attributes:
        source: a folder of `<ID>.cert` files, or the address of a key service.
        cache: a folder where fetched CEKs are kept for ever; none keeps them nowhere.
    """

    source: str
    cache: Path | None = None


class LimitsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[limits]`.

    Attributes:
        open_launches: open launches that one caller may have, 1 to 100000.
        calls: calls of one caller at once, 1 to 1000.
        refusals: how many refusals and reports of one caller are recorded in a time, as a `Rate` is spelled.
        sweep_interval: seconds between two looks for launches whose time ran out, 1 to 3600.
    """

    open_launches: int = 1000
    calls: int = MAX_STREAMS  # fewer would refuse a caller with one connection
    # Twice the launches that a caller may have open: all of them refused and all of them reported, at one moment. A
    # record takes 500 bytes or a few more, so a caller that never stops fills some 30 MB a day.
    refusals: str = "2000/1h"
    sweep_interval: float = 15.0

    def __post_init__(self) -> None:
        """Refuse what would serve nobody or everybody."""
        for name, value, most in (
            ("open_launches", self.open_launches, 100_000),
            ("calls", self.calls, 1000),
            ("sweep_interval", self.sweep_interval, 3600),
        ):
            if not 1 <= value <= most:
                raise InvalidInput(Reason.INVALID_CONFIGURATION, f"{name}: must be 1 to {most}")
        _ = self.allowance

    @property
    def allowance(self) -> Rate:
        """What `refusals` says.

        Raises:
            InvalidInput: it is no rate.
        """
        rate = read_rate(self.refusals)
        if rate is None:
            raise InvalidInput(Reason.INVALID_CONFIGURATION, f"refusals: must be a number in a period, {SPELLING}")
        return rate


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file.

    Attributes:
        listen: `HOST:PORT`; port 0 takes any that is free.
        state_dir: where launches and audit records are kept; goes without where `[store]` names a database.
        documents: the folder of documents that the owner keeps as files, and what relative paths start at.
        key_file: 32 bytes that seal what is stored; `sev-verifier keygen` makes one.
        older_key_files: key files that only open what was sealed before.
        tls: see `TlsConfig`.
        admin: see `AdminConfig`; without it, documents come from files alone.
        store: see `StoreConfig`; without it, SQLite.
        pkcs11: see `Pkcs11Config`; with it, key files are wrapped by a token.
        vault: see `VaultConfig`.
        audit: see `AuditConfig`.
        health: see `HealthConfig`.
        metrics: see `MetricsConfig`; without it, nothing is measured.
        platforms: see `PlatformsConfig`.
        kds: see `KdsConfig`; without one, a platform whose CEK is unsigned is refused.
        limits: see `LimitsConfig`.
    """

    listen: str
    documents: Path
    key_file: Path
    tls: TlsConfig
    state_dir: Path | None = None
    older_key_files: tuple[Path, ...] = ()
    admin: AdminConfig | None = None
    store: StoreConfig | None = None
    pkcs11: Pkcs11Config | None = None
    vault: VaultConfig | None = None
    audit: AuditConfig = AuditConfig()
    health: HealthConfig | None = None
    metrics: MetricsConfig | None = None
    platforms: PlatformsConfig = PlatformsConfig()
    kds: KdsConfig | None = None
    limits: LimitsConfig = LimitsConfig()

    @property
    def folder(self) -> Path:
        """`state_dir` where it is needed.

        Raises:
            InvalidInput: it is not set (INVALID_CONFIGURATION).
        """
        if self.state_dir is None:
            raise InvalidInput(Reason.INVALID_CONFIGURATION, "state_dir: is not set, and [store] names no database")
        return self.state_dir

    def admin_tls(self, admin: AdminConfig) -> ServerTls:
        """The TLS settings as the owner's listener wants them."""
        return ServerTls(
            cert=self.tls.cert,
            key=self.tls.key,
            client_ca=admin.client_ca,
            trust_domain=admin.trust_domain,
            role=Role.VERIFIER,
            callers=frozenset({Role.OWNER}),
            strangers_ca=self.tls.client_ca,
            allow_single_ca=self.tls.allow_single_ca,
        )

    def server_tls(self) -> ServerTls:
        """The TLS settings as the listener wants them."""
        return ServerTls(
            cert=self.tls.cert,
            key=self.tls.key,
            client_ca=self.tls.client_ca,
            trust_domain=self.tls.trust_domain,
            role=Role.VERIFIER,
            callers=frozenset({Role.ORCHESTRATOR}),
            allow_single_ca=self.tls.allow_single_ca,
        )


def _require_apart(loaded: Config) -> None:
    """Refuse private files in the folder of documents: an applied document could name them as a guest's secrets."""
    private: dict[str, Path | None] = {
        "key_file": loaded.key_file,
        **{f"older_key_files[{index}]": each for index, each in enumerate(loaded.older_key_files)},
        "tls.key": loaded.tls.key,
        "state_dir": loaded.state_dir,
        "store.postgres": None if loaded.store is None else loaded.store.postgres,
        "pkcs11.pin_file": None if loaded.pkcs11 is None else loaded.pkcs11.pin_file,
        "metrics.key": None if loaded.metrics is None else loaded.metrics.key,
        "vault.token_file": None if loaded.vault is None else loaded.vault.token_file,
    }
    folder = loaded.documents.resolve()
    for key, file in private.items():
        if file is not None and file.resolve().is_relative_to(folder):
            raise InvalidInput(
                Reason.INVALID_CONFIGURATION,
                f"{key}: lies in the folder of documents, where an applied document could name it as a guest's secret",
            )


# What SIGHUP puts in force.
_RELOADED = frozenset({"key_file", "older_key_files", "pkcs11", "denied_chips"})


def until_restart(serving: Config, new: Config) -> list[str]:
    """The settings in which two configurations differ and that a serving process does not take over."""
    return _differing(serving, new, "")


def _differing(old: object, new: object, within: str) -> list[str]:
    if not (isinstance(old, msgspec.Struct) and isinstance(new, type(old))):
        return [] if old == new else [within.removesuffix(".")]
    return [
        path
        for name in old.__struct_fields__
        if name not in _RELOADED
        for path in _differing(getattr(old, name), getattr(new, name), f"{within}{name}.")
    ]


def load_config(path: Path, environ: Mapping[str, str]) -> Config:
    """Read the configuration.

    Raises:
        InvalidInput: INVALID_CONFIGURATION, with the key's path.
    """
    loaded = config.load(path, Config, environ)
    if loaded.store is None:
        _ = loaded.folder
    elif loaded.state_dir is not None:
        raise InvalidInput(
            Reason.INVALID_CONFIGURATION, f"{path}: state_dir: is set beside [store]: which counts would be a guess"
        )
    _require_apart(loaded)
    kds = loaded.kds
    if kds is not None and (not kds.source or "\0" in kds.source):
        raise InvalidInput(Reason.INVALID_CONFIGURATION, f"{path}: kds.source: names no folder and no address")
    if kds is not None and "://" not in kds.source:
        # A folder, and like every path in the file relative to it.
        folder = path.absolute().parent / kds.source
        loaded = msgspec.structs.replace(loaded, kds=msgspec.structs.replace(kds, source=str(folder)))
    return loaded
