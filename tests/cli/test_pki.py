"""`sevattest pki`: what is written, what is said, and what is never overwritten."""

from __future__ import annotations

import os
import re
import shutil
import ssl
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from common.clock import SystemClock
from common.errors import InvalidInput
from common.rpc.identity import CLIENTS, SERVERS, Role, check_trust_domain
from common.rpc.pem import CLIENT_USAGE, SERVER_USAGE, read_material
from orchestrator.cli import main
from orchestrator.cli.pki import AUTHORITY_LIFE, init, issue, renew
from tests.support.pki import Pki, hostile_pem
from tests.support.rpc import SettableClock

ROLES = list(Role)


@pytest.fixture
def folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    path = tmp_path / "pki"
    assert main(["pki", "init", str(path)]) == 0
    capsys.readouterr()
    return path


def _said(capsys: pytest.CaptureFixture[str], folder: Path) -> str:
    out, err = capsys.readouterr()
    return re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d", "DATE", f"{out}{err}").replace(str(folder), "DIR")


def _certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def _uris(path: Path) -> list[str]:
    names = _certificate(path).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return names.get_values_for_type(x509.UniformResourceIdentifier)


def _state(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_init_makes_two_authorities_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new" / "pki"
    assert main(["pki", "init", str(folder), "--owner-domain", "owner.test"]) == 0
    assert _said(capsys, folder) == (
        "wrote DIR/datacenter-ca.pem: certificate authority of datacenter.example, until DATE UTC\n"
        "wrote DIR/datacenter-ca.key: its key, keep it offline\n"
        "wrote DIR/owner-ca.pem: certificate authority of owner.test, until DATE UTC\n"
        "wrote DIR/owner-ca.key: its key, keep it offline\n"
    )
    assert folder.stat().st_mode & 0o777 == 0o700
    for site, domain in (("datacenter", "datacenter.example"), ("owner", "owner.test")):
        assert (folder / f"{site}-ca.key").stat().st_mode & 0o777 == 0o600
        assert _uris(folder / f"{site}-ca.pem") == [f"spiffe://{domain}"]
    subjects = {_certificate(folder / f"{site}-ca.pem").subject for site in ("datacenter", "owner")}
    assert len(subjects) == 2


def test_authorities_are_never_overwritten_and_nothing_is_half_made(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = _state(folder)
    assert main(["pki", "init", str(folder)]) == 2
    assert _said(capsys, folder) == (
        "sevattest: DIR/datacenter-ca.key: exists already\n"
        "hint: authorities are never replaced in place: make new ones in another folder\n"
    )
    assert _state(folder) == before
    for name in ("datacenter-ca.pem", "datacenter-ca.key", "owner-ca.key"):
        (folder / name).unlink()
    left = _state(folder)
    assert main(["pki", "init", str(folder)]) == 2
    assert _state(folder) == left


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_keys_are_private_and_certificates_public_under_any_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        init(tmp_path / "pki")
        issue(tmp_path / "pki", Role.AGENT, "host1")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "pki").iterdir()}
    assert {mode for name, mode in modes.items() if name.endswith(".key")} == {0o600}
    assert {mode for name, mode in modes.items() if name.endswith(".pem")} == {0o644}


@pytest.mark.parametrize("role", ROLES)
def test_issue_makes_what_the_services_and_clients_accept(
    folder: Path, capsys: pytest.CaptureFixture[str], role: Role
) -> None:
    assert main(["pki", "issue", str(folder), role, "one"]) == 0
    site, domain = (
        ("datacenter", "datacenter.example") if role in {"agent", "orchestrator"} else ("owner", "owner.example")
    )
    at = " at localhost, 127.0.0.1" if role in SERVERS else ""
    assert _said(capsys, folder) == (
        f"wrote DIR/{role}-one.pem: spiffe://{domain}/{role}/one{at}, until DATE UTC\n"
        f"wrote DIR/{role}-one.key: its key\n"
    )
    usage = SERVER_USAGE if role in SERVERS else CLIENT_USAGE
    material = read_material(
        cert=folder / f"{role}-one.pem",
        key=folder / f"{role}-one.key",
        authorities=folder / f"{site}-ca.pem",
        usage=usage,
        now=SystemClock().now(),
    )
    assert (material.identity.role, material.identity.trust_domain) == (role, domain)
    material.leaf.verify_directly_issued_by(material.authorities[0])
    assert timedelta(days=29) < material.leaf.not_valid_after_utc - datetime.now(UTC) <= timedelta(days=30)


def test_a_server_is_called_by_the_names_that_it_is_given(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--dns", "v.owner.example", "--dns", "v2.owner.example", "--ip", "192.0.2.7", "--ip", "2001:db8::7"]
    assert main(["pki", "issue", str(folder), "verifier", "v", *words, "--days", "7"]) == 0
    assert "at v.owner.example, v2.owner.example, 192.0.2.7, 2001:db8::7, until" in _said(capsys, folder)
    names = _certificate(folder / "verifier-v.pem").extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert "localhost" not in names.value.get_values_for_type(x509.DNSName)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["agent", "../x"], "'../x' is not a name for an identity"),
        (["agent", ""], "'' is not a name for an identity"),
        (["agent", "x", "--dns", "*.example"], "'*.example' is not a DNS name (lower case, without a wildcard)"),
        (["agent", "x", "--dns", "192.0.2.7"], "'192.0.2.7' is not a DNS name (lower case, without a wildcard)"),
        (
            ["agent", "x", "--dns", "Upper.example"],
            "'Upper.example' is not a DNS name (lower case, without a wildcard)",
        ),
        (["agent", "x", "--ip", "host.example"], "'host.example' is not an IP address"),
        (["agent", "x", "--days", "0"], "a certificate is good for 1 to 398 days"),
        (["agent", "x", "--days", "399"], "a certificate is good for 1 to 398 days"),
        (
            ["owner", "x", "--dns", "a.example"],
            "an identity of the role owner calls and is not called: --dns and --ip are for servers",
        ),
        (["owner", "ca"], "an owner named 'ca' would have the files of a certificate authority"),
        (
            ["root", "x"],
            "argument ROLE: invalid choice: 'root' (choose from 'agent', 'orchestrator', 'verifier', 'owner')",
        ),
    ],
)
def test_what_cannot_be_issued_is_said_and_nothing_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    before = _state(folder)
    try:
        code = main(["pki", "issue", str(folder), *words])
    except SystemExit as error:  # argparse's own way out
        code = int(error.code or 0)
    assert code == 2
    assert _said(capsys, folder).startswith(f"sevattest: {said}\n")
    assert _state(folder) == before


def test_an_identity_is_never_issued_over_another(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    issue(folder, Role.AGENT, "host1")
    before = _state(folder)
    assert main(["pki", "issue", str(folder), "agent", "host1"]) == 2
    assert _said(capsys, folder) == (
        "sevattest: DIR/agent-host1.key: exists already\nhint: sevattest pki renew gives it a new term\n"
    )
    (folder / "agent-host1.key").unlink()
    assert main(["pki", "issue", str(folder), "agent", "host1"]) == 2
    del before["agent-host1.key"]
    assert _state(folder) == before


def test_a_link_in_the_place_of_a_key_is_not_followed(folder: Path, tmp_path: Path) -> None:
    (folder / "agent-host1.key").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InvalidInput, match="exists already"):
        issue(folder, Role.AGENT, "host1")
    assert not (tmp_path / "elsewhere").exists()


def test_without_authorities_the_hint_is_how_to_make_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pki", "issue", str(tmp_path), "agent", "x"]) == 2
    assert _said(capsys, tmp_path) == (
        "sevattest: DIR: there is no datacenter-ca.pem with its key\nhint: sevattest pki init DIR\n"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("broken", ["datacenter-ca.pem", "datacenter-ca.key"])
def test_an_authority_that_is_damaged_or_mixed_up_is_not_used(folder: Path, broken: str) -> None:
    shutil.copyfile(folder / broken.replace("datacenter", "owner"), folder / broken)
    with pytest.raises(InvalidInput, match="the key does not match the certificate"):
        issue(folder, Role.AGENT, "host1")
    (folder / broken).write_bytes(b"junk")
    with pytest.raises(InvalidInput, match="is not a"):
        issue(folder, Role.AGENT, "host1")


def test_an_identity_may_live_in_another_folder(folder: Path, tmp_path: Path) -> None:
    issued = issue(folder, Role.ORCHESTRATOR, "ci", out=tmp_path / "ci")
    assert issued.cert == tmp_path / "ci" / "orchestrator-ci.pem"
    assert (tmp_path / "ci").stat().st_mode & 0o777 == 0o700
    assert [changed for _, changed in renew(folder, force=True, out=tmp_path / "ci")] == [True]


def test_a_name_with_dots_keeps_them_in_its_files(folder: Path) -> None:
    assert issue(folder, Role.AGENT, "h1.rack").cert.name == "agent-h1.rack.pem"
    assert [issued.key.name for issued, _ in renew(folder)] == ["agent-h1.rack.key"]


def test_renew_gives_the_same_key_and_names_a_new_term(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    issue(
        folder,
        Role.VERIFIER,
        "v",
        dns=["v.owner.example"],
        days=12,
        clock=SettableClock(datetime.now(UTC) - timedelta(days=9)),
    )
    issue(folder, Role.OWNER, "alice")
    old, key = _certificate(folder / "verifier-v.pem"), (folder / "verifier-v.key").read_bytes()
    alice = (folder / "owner-alice.pem").read_bytes()
    assert main(["pki", "renew", str(folder)]) == 0
    assert _said(capsys, folder) == (
        "kept DIR/owner-alice.pem: spiffe://owner.example/owner/alice, until DATE UTC\n"
        "wrote DIR/verifier-v.pem: spiffe://owner.example/verifier/v at v.owner.example, until DATE UTC\n"
    )
    new = _certificate(folder / "verifier-v.pem")
    assert (folder / "verifier-v.key").read_bytes() == key
    assert (folder / "owner-alice.pem").read_bytes() == alice
    assert new.public_key() == old.public_key()
    assert new.serial_number != old.serial_number
    assert _names(new) == _names(old)
    assert timedelta(days=11) < new.not_valid_after_utc - datetime.now(UTC) <= timedelta(days=12)


def _names(certificate: x509.Certificate) -> x509.SubjectAlternativeName:
    return certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value


def test_renew_leaves_what_has_a_third_of_its_life_unless_it_is_forced(folder: Path) -> None:
    clock = SettableClock()
    issue(folder, Role.AGENT, "host1", days=30, clock=clock)
    clock.advance(timedelta(days=19))
    assert [changed for _, changed in renew(folder, clock=clock)] == [False]
    assert [changed for _, changed in renew(folder, ["agent-host1"], force=True, days=5, clock=clock)] == [True]
    clock.advance(timedelta(days=6))
    assert [changed for _, changed in renew(folder, clock=clock)] == [True]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["agent-none"], "sevattest: DIR/agent-none.pem: there is no such certificate\n"),
        (["../agent-none"], "sevattest: DIR/../agent-none.pem: there is no such certificate\n"),
        (["datacenter-ca"], "sevattest: DIR/datacenter-ca.pem: there is no such certificate\n"),
        ([], "sevattest: DIR: there is no certificate to renew\n"),
    ],
)
def test_renew_names_what_is_not_there_and_never_touches_an_authority(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    before = _state(folder)
    assert main(["pki", "renew", str(folder), *words]) == 2
    assert _said(capsys, folder) == said
    assert _state(folder) == before


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("version", "is not a certificate in PEM form"),
        ("extension", "the certificate's URI is not spiffe://TRUST-DOMAIN/ROLE/NAME with a known role"),
    ],
)
def test_a_certificate_that_cannot_be_read_is_named_and_not_renewed(
    folder: Path, capsys: pytest.CaptureFixture[str], what: str, said: str
) -> None:
    (folder / "agent-odd.pem").write_bytes(hostile_pem(what))
    before = _state(folder)
    assert main(["pki", "renew", str(folder), "--force"]) == 2
    assert _said(capsys, folder) == f"sevattest: DIR/agent-odd.pem: {said}\n"
    assert _state(folder) == before


@pytest.mark.parametrize("uris", [["spiffe://datacenter.example"], []])
def test_a_certificate_that_is_no_authoritys_signs_nothing(tmp_path: Path, uris: list[str]) -> None:
    pair = Pki(tmp_path / "other").forge(Role.AGENT, uris=uris)
    shutil.copyfile(pair.cert, tmp_path / "datacenter-ca.pem")
    shutil.copyfile(pair.key, tmp_path / "datacenter-ca.key")
    with pytest.raises(InvalidInput, match="is not a certificate authority's"):
        issue(tmp_path, Role.AGENT, "host1")


def test_an_authority_of_another_make_needs_no_identifier_of_its_key(tmp_path: Path) -> None:
    pair = Pki(tmp_path / "other").forge(
        Role.AGENT, uris=["spiffe://datacenter.example"], names=(), ca=True, ends=timedelta(days=3)
    )
    shutil.copyfile(pair.cert, tmp_path / "datacenter-ca.pem")
    shutil.copyfile(pair.key, tmp_path / "datacenter-ca.key")
    issued = issue(tmp_path, Role.AGENT, "host1", days=1)
    issued.certificate.verify_directly_issued_by(_certificate(tmp_path / "datacenter-ca.pem"))


def test_renew_is_all_or_nothing_over_several_certificates(folder: Path, tmp_path: Path) -> None:
    issue(folder, Role.AGENT, "a")
    init(tmp_path / "other")
    issue(tmp_path / "other", Role.AGENT, "b")
    shutil.copyfile(tmp_path / "other" / "agent-b.pem", folder / "agent-b.pem")
    before = _state(folder)
    with pytest.raises(InvalidInput, match=r"agent-b\.pem: the certificate was not issued by this authority"):
        renew(folder, force=True)
    assert _state(folder) == before


def test_an_authority_lasts_ten_years_and_no_certificate_outlives_it(folder: Path) -> None:
    authority = _certificate(folder / "owner-ca.pem")
    assert authority.not_valid_after_utc - datetime.now(UTC) > timedelta(days=3649)
    late = SettableClock(datetime.now(UTC) + AUTHORITY_LIFE - timedelta(days=10))
    with pytest.raises(InvalidInput, match="the certificate authority itself ends on"):
        issue(folder, Role.OWNER, "late", clock=late)
    issue(folder, Role.OWNER, "late", days=9, clock=late)


def test_roles_are_told_apart_by_what_their_certificates_are_good_for(folder: Path) -> None:
    for role in ROLES:
        issued = issue(folder, role, "x")
        usages = issued.certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        due = ExtendedKeyUsageOID.CLIENT_AUTH if role in CLIENTS else ExtendedKeyUsageOID.SERVER_AUTH
        assert list(usages) == [due]


@pytest.mark.parametrize("domain", ["datacenter.example", "dc", "a_b.example", "dc-1.example.com", "10.example"])
def test_openssl_accepts_the_chain_of_any_trust_domain(tmp_path: Path, domain: str) -> None:
    """OpenSSL checks the name constraint too; through Python's own copy of it, in memory."""
    init(tmp_path, datacenter_domain=check_trust_domain(domain))
    agent, client = issue(tmp_path, Role.AGENT, "a"), issue(tmp_path, Role.ORCHESTRATOR, "o")
    assert _handshake(tmp_path / "datacenter-ca.pem", agent.cert, agent.key, client.cert, client.key)


def test_an_authority_cannot_make_an_identity_of_the_other_site(tmp_path: Path) -> None:
    from tests.support.pki import Pki

    pki = Pki(tmp_path / "pki")
    agent, owner = pki.issue(Role.AGENT), pki.forge(Role.ORCHESTRATOR, domain="owner.example")
    with pytest.raises(ssl.SSLCertVerificationError, match="permitted subtree violation"):
        _handshake(pki.datacenter_ca, agent.cert, agent.key, owner.cert, owner.key)


def _handshake(authority: Path, cert: Path, key: Path, client_cert: Path, client_key: Path) -> bool:
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(cert, key)
    server_side.load_verify_locations(authority)
    server_side.verify_mode = ssl.CERT_REQUIRED
    client_side = ssl.create_default_context(cafile=str(authority))
    client_side.load_cert_chain(client_cert, client_key)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_side.wrap_bio(to_client, to_server, server_hostname="localhost")
    server = server_side.wrap_bio(to_server, to_client, server_side=True)
    waiting = [client, server, client, server]
    for side in waiting * 2:
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
    return client.version() == server.version() == "TLSv1.3"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl not found")
def test_the_openssl_program_verifies_the_chain(folder: Path) -> None:
    issued = issue(folder, Role.AGENT, "host1")
    command = [
        "openssl",
        "verify",
        "-x509_strict",
        "-purpose",
        "sslserver",
        "-CAfile",
        str(folder / "datacenter-ca.pem"),
    ]
    run = subprocess.run([*command, str(issued.cert)], check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_a_disk_that_fails_in_the_middle_leaves_no_file_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, link, calls = _state(folder), os.link, []

    def second_fails(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError(28, "No space left on device", str(target))
        link(source, target)

    monkeypatch.setattr(os, "link", second_fails)
    with pytest.raises(OSError, match="No space left"):
        issue(folder, Role.AGENT, "host1")
    assert _state(folder) == before
