"""`sev-verifier check-config`: everything that `serve` would trip over, found without serving.

Each problem is a line with its place; what is allowed but deserves a second look is a warning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from common.amd.kds import key_service
from common.clock import SystemClock
from common.config import listen_address
from common.errors import InvalidInput, Reason, SevattestError
from common.rpc.health import socket_target
from common.rpc.tls import ServerTls, load_server
from common.telemetry.endpoint import Endpoint
from common.telemetry.log import SILENCE
from verifier.check_documents import Findings, check_documents
from verifier.config import Config, load_config
from verifier.parts import make_store, make_vault, sealing_keys, trusted_roots

_NO_KEY_SERVICE = (
    "kds: is not set: platforms whose CEK is unsigned are refused, and chips that are denied by their id are known by "
    "nothing else, which a host can leave out"
)


def check(path: Path, environ: Mapping[str, str]) -> Findings:
    """Look at a configuration and all that it names. Opens no store and no port."""
    findings = Findings()
    try:
        config = load_config(path, environ)
    except InvalidInput as error:
        findings.problems.append(error.message)
        return findings
    _check_process(config, findings)
    check_documents(config, findings)
    return findings


def _check_process(config: Config, findings: Findings) -> None:
    steps: tuple[Callable[[Config], Sequence[str]], ...] = (
        _listen,
        _key_files,
        _pkcs11,
        _store,
        _vault,
        _tls,
        _admin,
        _roots,
        _kds,
        _health,
        _metrics,
    )
    for step in steps:
        try:
            findings.warnings += step(config)
        except SevattestError as error:
            # Both listeners have one certificate.
            findings.problems += [each for each in error.sentences if each not in findings.problems]


def _listen(config: Config) -> Sequence[str]:
    _address("listen", config.listen)
    return ()


def _address(setting: str, text: str) -> None:
    try:
        listen_address(text)
    except InvalidInput as error:
        raise InvalidInput(error.reason, f"{setting}: {error.message}") from error


def _key_files(config: Config) -> Sequence[str]:
    sealing_keys(config)  # a token is not asked
    return ()


def _pkcs11(config: Config) -> Sequence[str]:
    token = config.pkcs11
    if token is None:
        return ()
    if not token.module.exists():
        raise InvalidInput(Reason.INVALID_CONFIGURATION, f"pkcs11.module: {token.module}: no such file or directory")
    return () if token.pin_file.exists() else (f"pkcs11.pin_file: {token.pin_file} is not there: no PIN is tried",)


def _vault(config: Config) -> Sequence[str]:
    make_vault(config)
    files = {} if config.vault is None else {"token_file": config.vault.token_file, "ca": config.vault.ca}
    return [
        f"vault.{name}: {file} is not there: no secret in Vault is read"
        for name, file in files.items()
        if file is not None and not file.exists()
    ]


def _store(config: Config) -> Sequence[str]:
    if config.store is not None:
        make_store(config)
    return ()


def _tls(config: Config) -> Sequence[str]:
    _listener(config.server_tls())
    return ("tls.allow_single_ca: one CA may stand for both sites",) if config.tls.allow_single_ca else ()


def _listener(tls: ServerTls) -> None:
    """Raise what is wrong with a listener's files; all that are missing, since who sets up a site has none of them."""
    missing = tuple(
        f"{file}: no such file or directory" for file in (tls.cert, tls.key, tls.client_ca) if not file.exists()
    )
    if missing:
        error = InvalidInput(Reason.INVALID_CONFIGURATION, missing[0])
        error.problems = missing
        raise error
    load_server(tls, SystemClock().now())


def _admin(config: Config) -> Sequence[str]:
    if config.admin is not None:
        _address("admin.listen", config.admin.listen)
        _listener(config.admin_tls(config.admin))
    return ()


def _roots(config: Config) -> Sequence[str]:
    _, named = trusted_roots(config)
    return [f"platforms.extra_roots: {file}: platforms under this root count as emulated" for file, _ in named]


def _kds(config: Config) -> Sequence[str]:
    if config.kds is None:
        return (_NO_KEY_SERVICE,)
    key_service(config.kds.source, config.kds.cache)
    if "://" not in config.kds.source and not Path(config.kds.source).is_dir():
        return (f"kds.source: {config.kds.source} is not a folder: no CEK is found there",)
    return ()


def _health(config: Config) -> Sequence[str]:
    if config.health is not None:
        socket_target(config.health.socket)
    return ()


def _metrics(config: Config) -> Sequence[str]:
    if config.metrics is not None:
        Endpoint(config.metrics, SILENCE)
    return ()
