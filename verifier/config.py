"""The verifier's configuration: one frozen value from a TOML file (docs/verifier.md). Every default is the safe one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import msgspec

from common import config
from common.errors import InvalidInput, Reason
from common.rpc.identity import Role
from common.rpc.tls import ServerTls

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
        sweep_interval: seconds between two looks for launches whose time ran out, 1 to 3600.
    """

    open_launches: int = 1000
    calls: int = 32
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


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file.

    Attributes:
        listen: `HOST:PORT`; port 0 takes any that is free.
        state_dir: where launches and audit records are kept.
        documents: the folder of workload documents.
        key_file: 32 bytes that seal what is stored; `sev-verifier keygen` makes one.
        tls: see `TlsConfig`.
        health: see `HealthConfig`.
        platforms: see `PlatformsConfig`.
        kds: see `KdsConfig`; without one, a platform whose CEK is unsigned is refused.
        limits: see `LimitsConfig`.
    """

    listen: str
    state_dir: Path
    documents: Path
    key_file: Path
    tls: TlsConfig
    health: HealthConfig | None = None
    platforms: PlatformsConfig = PlatformsConfig()
    kds: KdsConfig | None = None
    limits: LimitsConfig = LimitsConfig()

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


def load_config(path: Path, environ: Mapping[str, str]) -> Config:
    """Read the configuration.

    Raises:
        InvalidInput: INVALID_CONFIGURATION, with the key's path.
    """
    loaded = config.load(path, Config, environ)
    kds = loaded.kds
    if kds is not None and (not kds.source or "\0" in kds.source):
        raise InvalidInput(Reason.INVALID_CONFIGURATION, f"{path}: kds.source: names no folder and no address")
    if kds is not None and "://" not in kds.source:
        # A folder, and like every path in the file relative to it.
        folder = path.absolute().parent / kds.source
        loaded = msgspec.structs.replace(loaded, kds=msgspec.structs.replace(kds, source=str(folder)))
    return loaded
