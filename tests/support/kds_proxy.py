"""AMD's key service for unmodified clients: an HTTPS proxy that ends TLS itself and answers from a platform's folder.

The client is told of it by `HTTPS_PROXY`, and to believe it by `SSL_CERT_FILE`. Nothing leaves this machine.
"""

from __future__ import annotations

import datetime as dt
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

HOST = "kdsintf.amd.com"


@contextmanager
def key_service(folder: Path, ceks: Path) -> Iterator[dict[str, str]]:
    """Serve the CEKs in `ceks` as `https://kdsintf.amd.com/cek/id/ID`; yields the client's environment variables."""
    certificate, key = folder / "kds.pem", folder / "kds.key"
    _make_certificate(certificate, key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = threading.Thread(target=_serve, args=(listener, context, ceks))
        serving.start()
        try:
            proxy = f"http://127.0.0.1:{listener.getsockname()[1]}"
            yield {"HTTPS_PROXY": proxy, "SSL_CERT_FILE": str(certificate)}
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            serving.join()


def _serve(listener: socket.socket, context: ssl.SSLContext, ceks: Path) -> None:
    while True:
        try:
            client = listener.accept()[0]
        except OSError:
            return  # shut down
        client.settimeout(10)
        with client, suppress(OSError):
            if _head(client).startswith(f"CONNECT {HOST}:443 "):
                client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                with context.wrap_socket(client, server_side=True) as secured:
                    secured.sendall(_answer(_head(secured), ceks))


def _head(client: socket.socket) -> str:
    """Request line and headers."""
    said = b""
    while b"\r\n\r\n" not in said:
        piece = client.recv(4096)
        if not piece:
            raise ConnectionResetError
        said += piece
    return said.decode("latin-1")


def _answer(head: str, ceks: Path) -> bytes:
    file = ceks / f"{head.split()[1].rsplit('/', 1)[-1]}.cert"
    if not head.startswith("GET /cek/id/") or not file.is_file():
        return b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    content = file.read_bytes()
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%b" % (len(content), content)


def _make_certificate(certificate: Path, key_file: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, HOST)])
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(HOST)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    certificate.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
