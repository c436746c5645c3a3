"""`sevattest pki`: the certificates of mutual TLS, for people without a PKI of their own (docs/identities.md).

Two certificate authorities, one for each site, and short-lived certificates for the four roles. A file appears whole or
not at all, keys with mode 0600, and nothing that exists is ever overwritten but a certificate by `renew`.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from secrets import token_hex

from cryptography import x509

from common.clock import Clock, SystemClock
from common.errors import InvalidInput, NotFound, Reason, SevattestError
from common.rpc.identity import DATACENTER, SERVERS, Identity, Role, parse_spiffe_id
from orchestrator.certificates import (
    Authority,
    certificate_pem,
    key_pem,
    make_authority,
    make_key,
    make_leaf,
    read_authority,
    read_certificate,
    renew_leaf,
    spiffe_uri,
)

AUTHORITY_LIFE = timedelta(days=3650)
DEFAULT_DAYS = 30
# Certificates are looked at only when a connection is made: a life of years would outlive its reason.
MAX_DAYS = 398
_SITES = {"datacenter": "datacenter-ca", "owner": "owner-ca"}
_DNS_NAME = re.compile(r"(?=.{1,253}$)[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?)*")


@dataclass(frozen=True, kw_only=True)
class Issued:
    """What was written.

    Attributes:
        cert: the certificate's file.
        key: its key's file.
        certificate: the certificate.
    """

    cert: Path
    key: Path
    certificate: x509.Certificate


def init(
    directory: Path,
    *,
    datacenter_domain: str = "datacenter.example",
    owner_domain: str = "owner.example",
    clock: Clock | None = None,
) -> tuple[Issued, ...]:
    """Make the two certificate authorities.

    Args:
        directory: made if missing, mode 0700.
        datacenter_domain: trust domain of agents and orchestrators.
        owner_domain: trust domain of verifiers and owners; another one.
        clock: the time that validity starts from.

    Raises:
        InvalidInput: a domain is none, both are the same, or a file exists already; then nothing was written.
    """
    now = (clock or SystemClock()).now()
    if datacenter_domain == owner_domain:
        raise _bad("the datacenter and the owner need different trust domains")
    made: list[Issued] = []
    files: list[tuple[Path, bytes, int]] = []
    for site, domain in (("datacenter", datacenter_domain), ("owner", owner_domain)):
        authority = make_authority(site=site, trust_domain=domain, now=now, life=AUTHORITY_LIFE)
        cert, key = _authority_files(directory, site)
        made.append(Issued(cert=cert, key=key, certificate=authority.certificate))
        files += [(key, key_pem(authority.key), 0o600), (cert, certificate_pem(authority.certificate), 0o644)]
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    _write_all(files, hint="authorities are never replaced in place: make new ones in another folder")
    return tuple(made)


def issue(
    directory: Path,
    role: Role,
    name: str,
    *,
    dns: Sequence[str] = (),
    ip: Sequence[str] = (),
    days: int = DEFAULT_DAYS,
    out: Path | None = None,
    clock: Clock | None = None,
) -> Issued:
    """Make one process's key and certificate.

    Args:
        directory: where the authorities are.
        role: what the process is; it decides which authority signs, and what the certificate is good for.
        name: which one of its role.
        dns: names that clients call it by; `localhost` if neither `dns` nor `ip` is given. Servers only.
        ip: addresses that clients call it by; 127.0.0.1 if neither is given. Servers only.
        days: how long it is good for.
        out: where the files go; `directory` when None.
        clock: the time that validity starts from.

    Raises:
        InvalidInput: a name, address or number is not usable, the authority is missing, or the files exist already;
            then nothing was written.
    """
    now = (clock or SystemClock()).now()
    authority = _authority(directory, role)
    identity = Identity(trust_domain=authority.trust_domain, role=role, name=name)
    if role not in SERVERS and (dns or ip):
        raise _bad(f"an identity of the role {role} calls and is not called: --dns and --ip are for servers")
    if f"{role}-{name}" in _SITES.values():
        raise _bad(f"an {role} named {name!r} would have the files of a certificate authority")
    if role in SERVERS and not dns and not ip:
        dns, ip = ("localhost",), ("127.0.0.1",)
    key = make_key()
    certificate = make_leaf(
        authority, key.public_key(), identity=identity, names=_names(dns, ip), now=now, ends=_end(now, days)
    )
    folder = out or directory
    # Not with_suffix: a name may hold dots.
    issued = Issued(cert=folder / f"{role}-{name}.pem", key=folder / f"{role}-{name}.key", certificate=certificate)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # The certificate last: where there is a certificate, there is its key.
    _write_all(
        [(issued.key, key_pem(key), 0o600), (issued.cert, certificate_pem(certificate), 0o644)],
        hint="sevattest pki renew gives it a new term",
    )
    return issued


def renew(
    directory: Path,
    stems: Sequence[str] = (),
    *,
    days: int | None = None,
    force: bool = False,
    out: Path | None = None,
    clock: Clock | None = None,
) -> tuple[tuple[Issued, bool], ...]:
    """Give certificates a new term: same key, same names, same length unless `days` says otherwise.

    Only the certificate's file changes, in one step, so a service that reads it at any moment finds a good pair.

    Args:
        directory: where the authorities are.
        stems: which (`agent-host1`); all that lie in the folder when empty.
        days: the new term.
        force: also those that have more than a third of their life left.
        out: where the certificates are; `directory` when None.
        clock: the time.

    Returns:
        Each certificate that was looked at, and whether it was renewed.

    Raises:
        NotFound: one that is named is not there, or there is none at all.
        InvalidInput: a file is not what it should be; then nothing was written.
    """
    now = (clock or SystemClock()).now()
    folder = out or directory
    found = sorted(path.name.removesuffix(".pem") for path in folder.glob("*.pem"))
    found = [stem for stem in found if stem not in _SITES.values()]
    wanted = list(dict.fromkeys(stem.removesuffix(".pem") for stem in stems)) or found
    if not wanted:
        raise NotFound(Reason.NOT_FOUND, f"{folder}: there is no certificate to renew")
    done: list[tuple[Issued, bool]] = []
    for stem in wanted:
        cert = folder / f"{stem}.pem"
        if stem not in found:
            raise NotFound(Reason.NOT_FOUND, f"{cert}: there is no such certificate")
        with _about(cert):
            old = read_certificate(cert.read_bytes())
        life = old.not_valid_after_utc - old.not_valid_before_utc
        due = force or old.not_valid_after_utc - now < life / 3
        ends = _end(now, max(1, round(life / timedelta(days=1))) if days is None else days)
        new = _again(directory, cert, old, now=now, ends=ends) if due else old
        done.append((Issued(cert=cert, key=folder / f"{stem}.key", certificate=new), due))
    # All are made before the first is written.
    for issued, due in done:
        if due:
            with _temporary(issued.cert, certificate_pem(issued.certificate), 0o644) as temporary:
                temporary.replace(issued.cert)
    return tuple(done)


def _again(directory: Path, cert: Path, old: x509.Certificate, *, now: datetime, ends: datetime) -> x509.Certificate:
    with _about(cert):
        identity = parse_spiffe_id(spiffe_uri(old))
    authority = _authority(directory, identity.role)
    with _about(cert):
        return renew_leaf(authority, old, identity=identity, now=now, ends=ends)


def _authority_files(directory: Path, site: str) -> tuple[Path, Path]:
    return directory / f"{_SITES[site]}.pem", directory / f"{_SITES[site]}.key"


def _authority(directory: Path, role: Role) -> Authority:
    """The authority of the role's site."""
    cert, key = _authority_files(directory, "datacenter" if role in DATACENTER else "owner")
    if not cert.exists() or not key.exists():
        raise _bad(f"{directory}: there is no {cert.name} with its key", hint=f"sevattest pki init {directory}")
    with _about(cert):
        return read_authority(certificate_pem=cert.read_bytes(), key_pem=key.read_bytes())


@contextmanager
def _about(path: Path) -> Iterator[None]:
    """Name the file in what goes wrong with it."""
    try:
        yield
    except SevattestError as error:
        raise InvalidInput(Reason.INVALID_ARGUMENT, f"{path}: {error.message}") from error


def _end(now: datetime, days: int) -> datetime:
    if not 1 <= days <= MAX_DAYS:
        raise _bad(f"a certificate is good for 1 to {MAX_DAYS} days")
    return now + timedelta(days=days)


def _names(dns: Sequence[str], ip: Sequence[str]) -> list[x509.GeneralName]:
    names: list[x509.GeneralName] = []
    for name in dns:
        if not _DNS_NAME.fullmatch(name) or _address(name) is not None:
            raise _bad(f"{name!r} is not a DNS name (lower case, without a wildcard)")
        names.append(x509.DNSName(name))
    for text in ip:
        address = _address(text)
        if address is None:
            raise _bad(f"{text!r} is not an IP address")
        names.append(x509.IPAddress(address))
    return names


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    with suppress(ValueError):
        return ipaddress.ip_address(text)
    return None


def _write_all(files: Sequence[tuple[Path, bytes, int]], *, hint: str) -> None:
    """Write all files or none; none may exist."""
    for path, _, _ in files:
        if os.path.lexists(path):
            raise _bad(f"{path}: exists already", hint=hint)
    written: list[Path] = []
    try:
        for path, data, mode in files:
            with _temporary(path, data, mode) as temporary:
                # Unlike rename, link never replaces a file that somebody made meanwhile.
                os.link(temporary, path)
            written.append(path)
    except BaseException as error:
        for path in written:
            path.unlink(missing_ok=True)
        if isinstance(error, FileExistsError):
            raise _bad(f"{path}: exists already", hint=hint) from error
        raise


@contextmanager
def _temporary(path: Path, data: bytes, mode: int) -> Iterator[Path]:
    """A complete, synced file beside `path`, gone afterwards if it has not become `path`."""
    temporary = path.with_name(f".{path.name}.{token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _bad(message: str, **fields: str) -> InvalidInput:
    return InvalidInput(Reason.INVALID_ARGUMENT, message, **fields)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define `pki`'s own commands."""
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    init_parser = commands.add_parser("init", help="make the two certificate authorities")
    init_parser.add_argument("dir", type=Path, metavar="DIR", help="folder for them, made if missing")
    for site in _SITES:
        init_parser.add_argument(
            f"--{site}-domain", default=f"{site}.example", metavar="DOMAIN", help="trust domain (%(default)s)"
        )
    init_parser.set_defaults(act=_run_init)

    issue_parser = commands.add_parser("issue", help="make one process's key and certificate")
    issue_parser.add_argument("dir", type=Path, metavar="DIR", help="folder with the authorities")
    issue_parser.add_argument("role", choices=[role.value for role in Role], metavar="ROLE", help=", ".join(Role))
    issue_parser.add_argument("name", metavar="NAME", help="which one of its role")
    issue_parser.add_argument("--dns", action="append", default=[], metavar="NAME", help="a name it is called by")
    issue_parser.add_argument("--ip", action="append", default=[], metavar="ADDRESS", help="an address it is called by")
    issue_parser.add_argument(
        "--days", type=int, default=DEFAULT_DAYS, metavar="N", help="its life in days (default: %(default)s)"
    )
    issue_parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the files, if another")
    issue_parser.set_defaults(act=_run_issue)

    renew_parser = commands.add_parser("renew", help="give certificates a new term, with their keys and names")
    renew_parser.add_argument("dir", type=Path, metavar="DIR", help="folder with the authorities")
    renew_parser.add_argument("names", nargs="*", metavar="ROLE-NAME", help="which; all that need it if none is named")
    renew_parser.add_argument("--days", type=int, metavar="N", help="the new life; as before when absent")
    renew_parser.add_argument("--force", action="store_true", help="also with more than a third of the life left")
    renew_parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the certificates, if another")
    renew_parser.set_defaults(act=_run_renew)


def run(args: argparse.Namespace) -> int:
    """Run one of `pki`'s commands."""
    act: Callable[[argparse.Namespace], int] = args.act
    return act(args)


def _run_init(args: argparse.Namespace) -> int:
    made = init(args.dir, datacenter_domain=args.datacenter_domain, owner_domain=args.owner_domain)
    for authority, domain in zip(made, (args.datacenter_domain, args.owner_domain), strict=True):
        print(f"wrote {authority.cert}: certificate authority of {domain}, {_term(authority)}")
        print(f"wrote {authority.key}: its key, keep it offline")
    return 0


def _run_issue(args: argparse.Namespace) -> int:
    role = Role(args.role)
    issued = issue(args.dir, role, args.name, dns=args.dns, ip=args.ip, days=args.days, out=args.out)
    print(f"wrote {issued.cert}: {_who(issued)}, {_term(issued)}")
    print(f"wrote {issued.key}: its key")
    return 0


def _run_renew(args: argparse.Namespace) -> int:
    for issued, renewed in renew(args.dir, args.names, days=args.days, force=args.force, out=args.out):
        print(f"{'wrote' if renewed else 'kept'} {issued.cert}: {_who(issued)}, {_term(issued)}")
    return 0


def _who(issued: Issued) -> str:
    who = spiffe_uri(issued.certificate)
    names = issued.certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    called = [str(name.value) for name in names if not isinstance(name, x509.UniformResourceIdentifier)]
    return f"{who} at {', '.join(called)}" if called else who


def _term(issued: Issued) -> str:
    return f"until {issued.certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
