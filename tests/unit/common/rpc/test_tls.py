"""What a listener and a client demand of their own files before they start, and after the files have changed."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID

from common.clock import SystemClock
from common.errors import InvalidInput, Reason
from common.rpc.identity import Role
from common.rpc.tls import CertificateWatch, ClientTls, ServerTls, load_client, load_server, single_ca
from tests.support.pki import DATACENTER_DOMAIN, Pair, Pki, hostile_pem, renew
from tests.support.recording_log import RecordingLog
from tests.support.rpc import SettableClock

NOW = SystemClock().now()


def _refusal(load: Callable[[], object]) -> str:
    with pytest.raises(InvalidInput) as caught:
        load()
    assert caught.value.reason is Reason.INVALID_CONFIGURATION
    return caught.value.message


def _setting(name: str, value: object) -> dict[str, Any]:
    return {name: value}


def _with_pair(pki: Pki, pair: Pair, **changes: Any) -> ServerTls:
    return pki.server_tls(Role.AGENT, **{"cert": pair.cert, "key": pair.key} | changes)


@pytest.mark.parametrize(("role", "name"), [(Role.AGENT, "one"), (Role.VERIFIER, "one")])
def test_a_good_listener_is_loaded_and_knows_who_it_is(pki: Pki, role: Role, name: str) -> None:
    tls = pki.server_tls(role, name)
    material = load_server(tls, NOW)
    assert (material.identity.role, material.identity.name) == (role, name)
    assert not single_ca(tls, material)


def test_the_owners_listener_lives_under_its_own_callers_authority(pki: Pki) -> None:
    tls = pki.admin_tls()
    assert not single_ca(tls, load_server(tls, NOW))


def test_a_good_client_is_loaded(pki: Pki) -> None:
    assert load_client(pki.client_tls(Role.OWNER, server=Role.VERIFIER), NOW).identity.role is Role.OWNER


@pytest.mark.parametrize("which", ["cert", "key", "client_ca"])
def test_a_missing_file_is_named(pki: Pki, tmp_path: Path, which: str) -> None:
    tls = pki.server_tls(Role.AGENT, **_setting(which, tmp_path / "gone.pem"))
    assert _refusal(lambda: load_server(tls, NOW)) == f"{tmp_path}/gone.pem: no such file or directory"


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("cert", "is not a certificate in PEM form"),
        ("key", "is not a private key in PEM form"),
        ("client_ca", "is not a certificate in PEM form"),
    ],
)
@pytest.mark.parametrize("content", [b"", b"junk", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_a_file_without_what_it_should_hold_is_named(
    pki: Pki, tmp_path: Path, which: str, message: str, content: bytes
) -> None:
    path = tmp_path / "file.pem"
    path.touch(mode=0o600)
    path.write_bytes(content)
    assert (
        _refusal(lambda: load_server(pki.server_tls(Role.AGENT, **_setting(which, path)), NOW)) == f"{path}: {message}"
    )


@pytest.mark.parametrize("which", ["cert", "client_ca"])
def test_a_certificate_of_an_unknown_version_is_named(pki: Pki, tmp_path: Path, which: str) -> None:
    path = tmp_path / "file.pem"
    path.write_bytes(hostile_pem("version"))
    tls = pki.server_tls(Role.AGENT, **_setting(which, path))
    assert _refusal(lambda: load_server(tls, NOW)) == f"{path}: is not a certificate in PEM form"


def test_an_extension_that_comes_twice_is_not_read(pki: Pki, tmp_path: Path) -> None:
    path = tmp_path / "file.pem"
    path.write_bytes(hostile_pem("extension"))
    tls = pki.server_tls(Role.AGENT, client_ca=path)
    assert _refusal(lambda: load_server(tls, NOW)) == f"{path}: the certificate's extensions cannot be read"


def test_a_folder_a_pipe_and_a_huge_file_are_no_certificates(pki: Pki, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    with (tmp_path / "huge").open("wb") as file:
        file.truncate((1 << 20) + 1)
    for name, message in (("", "is not a file"), ("pipe", "is not a file"), ("huge", "is too large for a PEM file")):
        path = tmp_path / name
        assert _refusal(partial(load_server, pki.server_tls(Role.AGENT, cert=path), NOW)) == f"{path}: {message}"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o610])
def test_a_key_that_others_can_read_is_refused_with_the_command_that_mends_it(
    pki: Pki, tmp_path: Path, mode: int
) -> None:
    key = tmp_path / "own.key"
    key.write_bytes(pki.issue(Role.AGENT).key.read_bytes())
    key.chmod(mode)
    with pytest.raises(InvalidInput, match="the key can be read by others than its owner") as caught:
        load_server(pki.server_tls(Role.AGENT, key=key), NOW)
    assert caught.value.fields["hint"] == f"chmod 600 {key}"
    key.chmod(0o600)
    load_server(pki.server_tls(Role.AGENT, key=key), NOW)


def test_a_key_of_another_certificate_is_refused(pki: Pki) -> None:
    other = pki.issue(Role.AGENT, "other")
    message = _refusal(lambda: load_server(pki.server_tls(Role.AGENT, key=other.key), NOW))
    assert message.startswith(f"{other.key}: the key does not match the certificate in ")


def test_a_key_under_a_passphrase_is_refused(pki: Pki, tmp_path: Path) -> None:
    key = tmp_path / "own.key"
    key.touch(mode=0o600)
    private = ec.generate_private_key(ec.SECP256R1())
    key.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"words")))
    assert "the key is encrypted" in _refusal(lambda: load_server(pki.server_tls(Role.AGENT, key=key), NOW))


@pytest.mark.parametrize(
    ("forge", "message"),
    [
        ({"starts": timedelta(hours=-2), "ends": timedelta(hours=-1)}, "the certificate expired at "),
        ({"starts": timedelta(hours=1), "ends": timedelta(hours=2)}, "the certificate is not valid before "),
        ({"ca": True}, "the certificate is of a certificate authority, not of a process"),
        ({"usages": ()}, "the certificate is not for a server and nothing else (extended key usage)"),
        ({"usages": (ExtendedKeyUsageOID.CLIENT_AUTH,)}, "the certificate is not for a server and nothing else"),
        (
            {"usages": (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)},
            "the certificate is not for a server and nothing else",
        ),
        ({"uris": ()}, "the certificate must carry exactly one URI, its SPIFFE id"),
        ({"uris": ("spiffe://datacenter.example/agent/a", "spiffe://datacenter.example/agent/b")}, "exactly one URI"),
        ({"uris": ("spiffe://datacenter.example/agent",)}, "is not spiffe://TRUST-DOMAIN/ROLE/NAME"),
        ({"uris": (), "names": ()}, "the certificate must carry exactly one URI"),
        ({"domain": "elsewhere.example"}, "the certificate's trust domain is elsewhere.example, the callers' is "),
    ],
)
def test_a_servers_own_certificate_is_held_to_the_rules_for_a_server(
    pki: Pki, forge: dict[str, Any], message: str
) -> None:
    pair = pki.forge(Role.AGENT, **forge)
    refusal = _refusal(lambda: load_server(_with_pair(pki, pair), NOW))
    assert refusal.startswith(f"{pair.cert}: ")
    assert message in refusal


def test_a_certificate_of_another_role_is_refused(pki: Pki) -> None:
    pair = pki.forge(Role.AGENT, uris=("spiffe://datacenter.example/verifier/x",))
    assert "the certificate is for the role verifier, not agent" in _refusal(
        lambda: load_server(_with_pair(pki, pair), NOW)
    )


def test_a_bundle_may_hold_an_expired_authority_but_not_only_expired_ones(pki: Pki, tmp_path: Path) -> None:
    far = NOW + timedelta(hours=2)
    short_lived = pki.write_authority(pki.stranger())
    bundle = tmp_path / "bundle.pem"
    bundle.write_bytes(short_lived.read_bytes() + pki.datacenter_ca.read_bytes())
    material = load_server(pki.server_tls(Role.AGENT, client_ca=bundle), far)
    assert len(material.authorities) == 1
    assert "has expired or is not valid yet" in _refusal(
        lambda: load_server(pki.server_tls(Role.AGENT, client_ca=short_lived), far)
    )


def test_a_process_certificate_is_no_authority(pki: Pki) -> None:
    tls = pki.server_tls(Role.AGENT, client_ca=pki.issue(Role.ORCHESTRATOR).cert)
    assert "holds a certificate that is not of a certificate authority" in _refusal(lambda: load_server(tls, NOW))


def test_a_verifier_under_its_callers_authority_is_refused_unless_that_is_wanted(pki: Pki) -> None:
    pair = pki.forge(
        Role.VERIFIER, uris=("spiffe://datacenter.example/verifier/v",), authority=pki.authority("datacenter")
    )
    settings: dict[str, Any] = {"cert": pair.cert, "key": pair.key, "client_ca": pki.datacenter_ca}
    with pytest.raises(InvalidInput, match="in its callers' own trust domain") as caught:
        load_server(pki.server_tls(Role.VERIFIER, **settings), NOW)
    assert "allow_single_ca" in caught.value.fields["hint"]
    tls = pki.server_tls(Role.VERIFIER, **settings, allow_single_ca=True)
    assert single_ca(tls, load_server(tls, NOW))


def test_one_authority_with_two_trust_domains_is_a_single_one_too(pki: Pki) -> None:
    stranger = pki.stranger()
    pair, bundle = pki.forge(Role.VERIFIER, authority=stranger), pki.write_authority(stranger)
    settings: dict[str, Any] = {"cert": pair.cert, "key": pair.key, "client_ca": bundle}
    with pytest.raises(InvalidInput, match="which issues its callers too"):
        load_server(pki.server_tls(Role.VERIFIER, **settings), NOW)
    tls = pki.server_tls(Role.VERIFIER, **settings, allow_single_ca=True)
    assert single_ca(tls, load_server(tls, NOW))


def test_an_owners_listener_that_lets_the_datacenter_in_is_refused_unless_that_is_wanted(
    pki: Pki, tmp_path: Path
) -> None:
    root = pki.stranger()
    own, below = pki.write_authority(root), pki.forge(Role.ORCHESTRATOR, authority=root, ca=True).cert
    for shared, theirs in ((own, own), (own, below), (below, below)):
        bundle = tmp_path / "owners.pem"
        bundle.write_bytes(pki.owner_ca.read_bytes() + shared.read_bytes())
        settings: dict[str, Any] = {"client_ca": bundle, "strangers_ca": theirs}
        with pytest.raises(InvalidInput, match="lets in whoever has a certificate from a CA in") as caught:
            load_server(pki.admin_tls(**settings), NOW)
        assert "allow_single_ca" in caught.value.fields["hint"]
        tls = pki.admin_tls(**settings, allow_single_ca=True)
        assert single_ca(tls, load_server(tls, NOW))


def test_owners_of_two_authorities_are_let_in_where_none_is_the_datacenters(pki: Pki, tmp_path: Path) -> None:
    bundle = tmp_path / "owners.pem"
    bundle.write_bytes(pki.owner_ca.read_bytes() + pki.write_authority(pki.stranger()).read_bytes())
    tls = pki.admin_tls(client_ca=bundle)
    assert not single_ca(tls, load_server(tls, NOW))


def test_a_datacenters_authority_that_owners_come_from_is_not_taken_over_later(pki: Pki, tmp_path: Path) -> None:
    theirs, log = tmp_path / "datacenter.pem", RecordingLog()
    theirs.write_bytes(pki.datacenter_ca.read_bytes())
    watch = CertificateWatch(pki.admin_tls(strangers_ca=theirs), log=log)
    renew(theirs, pki.owner_ca.read_bytes())
    assert not watch.poll()
    assert not watch.healthy
    (event,) = log.named("tls.reload_failed")
    assert "lets in whoever has a certificate from a CA in" in event.fields["text"]


def test_a_trust_domain_that_is_none_is_refused(pki: Pki) -> None:
    tls = pki.server_tls(Role.AGENT, trust_domain="Not A Domain")
    assert _refusal(lambda: load_server(tls, NOW)) == "tls.trust_domain: 'Not A Domain' is not a trust domain"


@pytest.mark.parametrize(
    "settings", [{"role": Role.OWNER}, {"callers": frozenset()}, {"callers": frozenset({Role.AGENT})}]
)
def test_a_listener_that_nobody_meant_cannot_be_made(pki: Pki, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="a listener is an agent's or a verifier's"):
        load_server(replace(pki.server_tls(Role.AGENT), **settings), NOW)


def test_a_client_with_a_servers_certificate_is_refused(pki: Pki) -> None:
    pair = pki.issue(Role.AGENT)
    tls = ClientTls(cert=pair.cert, key=pair.key, server_ca=pki.datacenter_ca)
    assert "the certificate is not for a client and nothing else" in _refusal(lambda: load_client(tls, NOW))


def test_no_key_is_in_what_a_material_prints(pki: Pki) -> None:
    material = load_server(pki.server_tls(Role.AGENT), NOW)
    assert "PRIVATE" not in repr(material)


def test_a_watch_takes_a_good_change_and_keeps_the_last_good_over_a_bad_one(pki: Pki, tmp_path: Path) -> None:
    first, second = pki.forge(Role.AGENT, name="first"), pki.forge(Role.AGENT, name="second")
    own = first.copy_to(tmp_path)
    log = RecordingLog()
    watch = CertificateWatch(_with_pair(pki, own), log=log)
    assert not watch.poll()
    renew(own.cert, b"junk")
    assert not watch.poll()
    assert not watch.poll()  # said once, not at every look
    assert (watch.material.identity.name, watch.healthy) == ("first", False)
    renew(own.key, second.key.read_bytes())
    assert not watch.poll()
    renew(own.cert, second.cert.read_bytes())
    assert watch.poll()
    assert (watch.material.identity.name, watch.healthy) == ("second", True)
    own.cert.unlink()
    assert not watch.poll()
    assert watch.material.identity.name == "second"
    assert [event.name for event in log.events] == [*["tls.reload_failed"] * 2, "tls.reloaded", "tls.reload_failed"]
    assert "own.pem" in log.events[0].fields["text"]


def test_each_listener_is_given_new_files_once_and_never_the_same_ones_again(
    pki: Pki, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetchers: list[Callable[[], object]] = []

    def credentials(_first: object, fetch: Callable[[], object], *, require_client_authentication: bool) -> None:
        assert require_client_authentication
        fetchers.append(fetch)

    monkeypatch.setattr(grpc, "dynamic_ssl_server_credentials", credentials)
    own = pki.forge(Role.AGENT, name="first").copy_to(tmp_path)
    watch = CertificateWatch(_with_pair(pki, own), log=RecordingLog())
    watch.credentials()
    watch.credentials()
    # What gRPC is given again it builds again, under the hands of connections that are being made: it crashes.
    assert [fetch() for fetch in fetchers * 2] == [None] * 4
    second = pki.forge(Role.AGENT, name="second")
    renew(own.key, second.key.read_bytes())
    renew(own.cert, second.cert.read_bytes())
    assert watch.poll()
    first_time, again = [fetch() for fetch in fetchers], [fetch() for fetch in fetchers]
    assert [type(each) for each in first_time] == [grpc.ServerCertificateConfiguration] * 2
    assert again == [None, None]


def test_a_certificate_that_starts_later_is_taken_when_it_starts(pki: Pki, tmp_path: Path) -> None:
    clock = SettableClock()
    own = pki.forge(Role.AGENT, name="first", ends=timedelta(days=2)).copy_to(tmp_path)
    log = RecordingLog()
    watch = CertificateWatch(_with_pair(pki, own), log=log, clock=clock)
    # Whoever issued it has a clock that is ahead of ours.
    later = pki.forge(Role.AGENT, name="later", starts=timedelta(minutes=10), ends=timedelta(days=2))
    renew(own.key, later.key.read_bytes())
    renew(own.cert, later.cert.read_bytes())
    assert [watch.poll() for _ in range(3)] == [False] * 3
    assert (watch.material.identity.name, watch.healthy) == ("first", False)
    clock.advance(timedelta(minutes=11))
    assert watch.poll()
    assert (watch.material.identity.name, watch.healthy) == ("later", True)
    assert [event.name for event in log.events] == ["tls.reload_failed", "tls.reloaded"]


def test_a_change_of_the_callers_authority_is_taken(pki: Pki, tmp_path: Path) -> None:
    bundle = tmp_path / "callers.pem"
    bundle.write_bytes(pki.datacenter_ca.read_bytes())
    watch = CertificateWatch(pki.server_tls(Role.AGENT, client_ca=bundle), log=RecordingLog())
    renew(bundle, bundle.read_bytes() + pki.write_authority(pki.stranger()).read_bytes())
    assert watch.poll()
    assert len(watch.material.authorities) == 2


def test_a_change_to_another_trust_domain_is_not_taken(pki: Pki, tmp_path: Path) -> None:
    own = pki.forge(Role.AGENT, name="first").copy_to(tmp_path)
    watch = CertificateWatch(_with_pair(pki, own), log=RecordingLog())
    foreign = pki.forge(Role.AGENT, domain="elsewhere.example")
    renew(own.key, foreign.key.read_bytes())
    renew(own.cert, foreign.cert.read_bytes())
    assert not watch.poll()
    assert watch.material.identity.trust_domain == DATACENTER_DOMAIN


def test_an_hour_before_its_end_a_certificate_is_near_its_end(pki: Pki) -> None:
    clock = SettableClock()
    pair = pki.forge(Role.AGENT, ends=timedelta(hours=3))
    watch = CertificateWatch(_with_pair(pki, pair), log=RecordingLog(), clock=clock)
    assert not watch.expires_soon()
    clock.advance(timedelta(hours=2, minutes=1))
    assert watch.expires_soon()
