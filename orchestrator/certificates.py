"""How the project's X.509 certificates are made: keys, extensions and signatures; no file, no clock.

An authority may sign identities of its own trust domain only: RFC 5280 4.2.1.10 (name constraints on the host part of
URIs), which OpenSSL and gRPC's BoringSSL both enforce, also when the authority is the trust anchor. The SPIFFE
X.509-SVID standard gives the rest: one URI in a process's certificate, the bare trust domain in an authority's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from secrets import token_hex

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.errors import InvalidInput, Reason, Unauthenticated
from common.rpc.identity import SERVERS, Identity, check_trust_domain
from common.rpc.pem import is_authority, parse_certificates

# Clocks that are a little behind must not refuse a certificate that was made a moment ago.
_BACKDATED = timedelta(minutes=5)
_NO_USAGE = dict.fromkeys(
    (
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "key_cert_sign",
        "crl_sign",
        "encipher_only",
        "decipher_only",
    ),
    False,
)


@dataclass(frozen=True, kw_only=True)
class Authority:
    """A certificate authority with its key.

    Attributes:
        certificate: self-signed.
        key: its private key.
        trust_domain: the only one that it may sign identities of.
    """

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey = field(repr=False)
    trust_domain: str


def make_key() -> ec.EllipticCurvePrivateKey:
    """A key for a process, P-256."""
    return ec.generate_private_key(ec.SECP256R1())


def make_authority(*, site: str, trust_domain: str, now: datetime, life: timedelta) -> Authority:
    """A new authority, P-384.

    Args:
        site: `datacenter` or `owner`, for people.
        trust_domain: what it may sign identities of.
        now: when it starts.
        life: how long it lasts.

    Raises:
        InvalidInput: the trust domain is none.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    # Subjects compare without regard to case; the suffix keeps two authorities of one site apart in a bundle.
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"sevattest {site} CA {token_hex(4)}")])
    domain = check_trust_domain(trust_domain)
    certificate = (
        _builder(subject, subject, key.public_key(), now=now, ends=now + life)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.KeyUsage(**_NO_USAGE | {"key_cert_sign": True, "crl_sign": True}), critical=True)
        .add_extension(
            x509.NameConstraints(permitted_subtrees=[x509.UniformResourceIdentifier(domain)], excluded_subtrees=None),
            critical=True,
        )
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"spiffe://{domain}")]), critical=False
        )
        .sign(key, hashes.SHA384())
    )
    return Authority(certificate=certificate, key=key, trust_domain=domain)


def read_authority(*, certificate_pem: bytes, key_pem: bytes) -> Authority:
    """An authority from its two files.

    Raises:
        InvalidInput: they are not an authority's certificate with its trust domain, and its key.
    """
    certificate = read_certificate(certificate_pem)
    try:
        key = load_pem_private_key(key_pem, password=None)
    except (ValueError, TypeError) as error:
        raise _bad("the key is not a private key in PEM form") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise _bad("the key does not match the certificate")
    try:
        signs = is_authority(certificate)
    except Unauthenticated as error:
        raise _bad(error.message) from error
    if not signs:
        raise _bad("the certificate is not a certificate authority's")
    domain = spiffe_uri(certificate).removeprefix("spiffe://")
    if not domain:
        raise _bad("the certificate does not name one trust domain")
    return Authority(certificate=certificate, key=key, trust_domain=check_trust_domain(domain))


def make_leaf(
    authority: Authority,
    public_key: ec.EllipticCurvePublicKey,
    *,
    identity: Identity,
    names: Sequence[x509.GeneralName],
    now: datetime,
    ends: datetime,
) -> x509.Certificate:
    """A process's certificate.

    Args:
        authority: who signs it.
        public_key: the process's.
        identity: who the process is; the role decides whether the certificate is good for a server or a client.
        names: DNS names and addresses that clients check.
        now: when it starts.
        ends: its last moment.

    Raises:
        InvalidInput: the identity is of another trust domain, or the certificate would outlive its authority.
    """
    if identity.trust_domain != authority.trust_domain:
        raise _bad(f"the authority signs for {authority.trust_domain}, not for {identity.trust_domain}")
    if ends > authority.certificate.not_valid_after_utc:
        raise _bad(f"the certificate authority itself ends on {authority.certificate.not_valid_after_utc:%Y-%m-%d}")
    usage = ExtendedKeyUsageOID.SERVER_AUTH if identity.role in SERVERS else ExtendedKeyUsageOID.CLIENT_AUTH
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{identity.role} {identity.name}"[:64])])
    return (
        _builder(subject, authority.certificate.subject, public_key, now=now, ends=ends)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(**_NO_USAGE | {"digital_signature": True}), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(_identifier_of_key(authority), critical=False)
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(identity.spiffe_id), *names]), critical=False
        )
        .sign(authority.key, hashes.SHA384())
    )


def renew_leaf(
    authority: Authority, old: x509.Certificate, *, identity: Identity, now: datetime, ends: datetime
) -> x509.Certificate:
    """The certificate once more: the same key and names, a new serial number and term.

    Raises:
        InvalidInput: `authority` did not sign it.
    """
    try:
        public_key = old.public_key()
        old.verify_directly_issued_by(authority.certificate)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm) as error:
        raise _bad("the certificate was not issued by this authority") from error
    if not isinstance(public_key, ec.EllipticCurvePublicKey):
        raise _bad("the certificate's key is of another kind than this authority signs")
    names = old.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    called = [name for name in names if not isinstance(name, x509.UniformResourceIdentifier)]
    return make_leaf(authority, public_key, identity=identity, names=called, now=now, ends=ends)


def read_certificate(data: bytes) -> x509.Certificate:
    """The first certificate of a PEM file's bytes.

    Raises:
        InvalidInput: there is none.
    """
    try:
        return parse_certificates(data)[0]
    except ValueError as error:
        raise _bad("is not a certificate in PEM form") from error


def spiffe_uri(certificate: x509.Certificate) -> str:
    """The certificate's one URI; empty where it has none, or several, or cannot be read."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension, x509.UnsupportedGeneralNameType):
        return ""
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    return uris[0] if len(uris) == 1 else ""


def certificate_pem(certificate: x509.Certificate) -> bytes:
    """The certificate as it stands in a file."""
    return certificate.public_bytes(Encoding.PEM)


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """The private key as it stands in a file: PKCS#8, not encrypted."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _identifier_of_key(authority: Authority) -> x509.AuthorityKeyIdentifier:
    """What the authority's certificate calls its key; of another make, it may not say."""
    try:
        named = authority.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    except x509.ExtensionNotFound:
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(named)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    *,
    now: datetime,
    ends: datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(ends)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _bad(message: str) -> InvalidInput:
    return InvalidInput(Reason.INVALID_ARGUMENT, message)
