"""`sev-verifier check-config`: everything that `serve` would trip over, found without serving.

Each problem is a line with its place; what is allowed but deserves a second look is a warning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.amd.kds import key_service
from common.clock import SystemClock
from common.config import listen_address
from common.errors import InvalidInput, SevattestError
from common.rpc.health import socket_target
from common.rpc.tls import load_server
from verifier.app import trusted_roots
from verifier.config import Config, load_config
from verifier.documents.text import InvalidDocument
from verifier.documents.workload import ATTESTED_SIZE, SecretSpec, Workload
from verifier.keys.file import read_key_file
from verifier.launches.steps import require_room
from verifier.library.artefacts import ArtefactShelf, stamp
from verifier.library.folder import read_folder
from verifier.library.library import prepare

_OTHERS_READ = 0o044
_NO_KEY_SERVICE = (
    "kds: is not set: platforms whose CEK is unsigned are refused, and chips that are denied by their id are known by "
    "nothing else, which a host can leave out"
)


@dataclass(kw_only=True)
class Findings:
    """What was found.

    Attributes:
        problems: what stops the verifier or one of its workloads.
        warnings: what is allowed and deserves a second look.
        workloads: how many workloads have a version in force.
        documents: how many documents there are.
    """

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    workloads: int = 0
    documents: int = 0


def check(path: Path, environ: Mapping[str, str]) -> Findings:
    """Look at a configuration and all that it names. Opens no store and no port."""
    findings = Findings()
    try:
        config = load_config(path, environ)
    except InvalidInput as error:
        findings.problems.append(error.message)
        return findings
    _check_process(config, findings)
    _check_documents(config, findings)
    return findings


def _check_process(config: Config, findings: Findings) -> None:
    steps: tuple[Callable[[Config], Sequence[str]], ...] = (_listen, _key_file, _tls, _roots, _kds, _health)
    for step in steps:
        try:
            findings.warnings += step(config)
        except SevattestError as error:
            findings.problems.append(error.message)


def _listen(config: Config) -> Sequence[str]:
    try:
        listen_address(config.listen)
    except InvalidInput as error:
        raise InvalidInput(error.reason, f"listen: {error.message}") from error
    return ()


def _key_file(config: Config) -> Sequence[str]:
    read_key_file(config.key_file)
    return ()


def _tls(config: Config) -> Sequence[str]:
    load_server(config.server_tls(), SystemClock().now())
    return ("tls.allow_single_ca: one CA may stand for both sites",) if config.tls.allow_single_ca else ()


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


def _check_documents(config: Config, findings: Findings) -> None:
    try:
        sets = read_folder(config.documents)
    except InvalidDocument as error:
        findings.problems += error.problems
        return
    findings.workloads, findings.documents = len(sets), sum(map(len, sets.values()))
    if not sets:
        findings.warnings.append(f"documents: {config.documents} holds none: nothing can be launched")
    shelf = ArtefactShelf()
    for versions in sets.values():
        for number, workload in enumerate(versions):
            findings.warnings += [f"{workload.source}: {warning}" for warning in workload.warnings]
            # Older versions serve explanations only: what is amiss with their files stops nothing.
            problems = findings.problems if number == 0 else findings.warnings
            problems += [f"{workload.source}: {problem}" for problem in _usable(workload, shelf, findings)]


def _usable(workload: Workload, shelf: ArtefactShelf, findings: Findings) -> list[str]:
    problems = []
    prepared = prepare(workload, shelf)
    if prepared.unusable is not None:
        problems.append(f"spec.measure: {prepared.unusable}")
    sizes = []
    for index, secret in enumerate(workload.secrets):
        try:
            sizes.append(_secret_size(secret))
        except InvalidInput as error:
            problems.append(f"spec.secrets[{index}].source.file: {error.message}")
        else:
            if secret.file is not None and secret.file.stat().st_mode & _OTHERS_READ:
                findings.warnings.append(
                    f"{workload.source}: spec.secrets[{index}].source.file: {secret.file} can be read by others"
                )
    if prepared.unusable is None and len(sizes) == len(workload.secrets):
        try:
            require_room(workload.table_size(sizes), prepared.secret_area)
        except SevattestError as error:
            problems.append(f"spec.secrets: {error.message}")
    return problems


def _secret_size(secret: SecretSpec) -> int:
    return ATTESTED_SIZE if secret.file is None else stamp(secret.file)[2]
