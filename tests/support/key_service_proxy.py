"""AMD's key service for programs that know no other: an HTTPS proxy on loopback that plays it.

A program that is given `environ` sends its request for the service's name through the proxy, finds a server with that
name, whose authority it trusts, and gets a software platform's answers.
"""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

NAME = "kdsintf.amd.com"
_LIMIT = 30.0


@contextmanager
def key_service_proxy(folder: Path, url: str) -> Iterator[dict[str, str]]:
    """Pass requests for AMD's key service on to the one at `url`; gives the variables that make a program use it."""
    chain = _identity(folder)
    target = urlsplit(url)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_accept, args=(listener, context, (target.hostname, target.port)), daemon=True).start()
        proxy = f"http://127.0.0.1:{listener.getsockname()[1]}"
        yield {"HTTPS_PROXY": proxy, "https_proxy": proxy, "SSL_CERT_FILE": str(chain), "NO_PROXY": "", "no_proxy": ""}
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)


def _accept(listener: socket.socket, context: ssl.SSLContext, target: tuple[str | None, int | None]) -> None:
    with suppress(OSError):
        while True:
            client, _ = listener.accept()
            with suppress(OSError), client:
                _serve(client, context, target)


def _serve(client: socket.socket, context: ssl.SSLContext, target: tuple[str | None, int | None]) -> None:
    """One tunnel, one request."""
    client.settimeout(_LIMIT)
    if not _head(client).startswith(f"CONNECT {NAME}:443 ".encode()):
        client.sendall(b"HTTP/1.1 403 Forbidden\r\n\r\n")
        return
    client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    with context.wrap_socket(client, server_side=True) as tunnel, socket.create_connection(target, _LIMIT) as service:
        asked = _head(tunnel).split(b"\r\n")[0]
        service.sendall(asked + b"\r\nHost: " + NAME.encode() + b"\r\nConnection: close\r\n\r\n")
        while part := service.recv(65536):
            tunnel.sendall(part)
        tunnel.unwrap()


def _head(stream: socket.socket) -> bytes:
    """A request up to its empty line."""
    data = b""
    while not data.endswith(b"\r\n\r\n"):
        part = stream.recv(1)
        if not part:
            raise ConnectionError
        data += part
    return data


def _identity(folder: Path) -> Path:
    """A self-signed certificate for the service's name and its key, in one PEM file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, NAME)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(NAME)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = folder / "key-service.pem"
    path.write_bytes(
        certificate.public_bytes(Encoding.PEM) + key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    return path
