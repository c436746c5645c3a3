"""The signed CEK of a chip: from AMD's key service, from a cache, or from a folder that somebody filled.

A platform's own copy of its CEK carries no signature; AMD's service has the signed one under the chip's id (GET_ID2,
64 bytes). A CEK never changes, so one that leads to a trusted root is kept for ever; nothing else is ever kept, and
what is kept is verified again when it is read, so that neither a forged answer nor a damaged file can stay. That an id
and a CEK belong together no signature says: there the service is believed, and whoever asks compares the CEK's body.

The service answers 404 or 400 for chips that it does not know, 429 with Retry-After to more than about one request in
ten seconds, and has been down for days (AMDESE/sev-tool issue 59, virtee/sevctl issue 62): whoever releases secrets
should have the CEK before. A chip's id names a machine for ever, so it stands in no message.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import logging
import os
import ssl
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Sequence
from email.message import Message
from pathlib import Path
from typing import NoReturn, Protocol
from urllib.parse import urlsplit
from weakref import WeakValueDictionary

from common.errors import InvalidInput, NotFound, Reason, SevattestError, Unavailable
from common.sev.abi import CHIP_ID_SIZE, SEV_CERT_SIZE, Usage
from common.sev.certs.roots import Root, pinned_roots
from common.sev.certs.sev import SevCertificate, verify_signature
from common.sev.errors import BadSignature, ParseError

_log = logging.getLogger("sevattest.kds")
_log.addHandler(logging.NullHandler())

# One answer takes about a second. Three attempts with these pauses stay below the 60 s that a call may last.
REQUEST_TIMEOUT = 10.0
MAX_ATTEMPTS = 3
MAX_RETRY_AFTER = 10.0
# What sevctl waits when the service names no time; the service allows about one request in ten seconds.
DEFAULT_RETRY_AFTER = 5.0
# Requests under way at once; AMD's service answers fewer than one in a second.
MAX_REQUESTS = 8
# A folder with more files than this is not searched for a certificate without its name.
MAX_FOLDER_FILES = 10_000


class KeyService(Protocol):
    """Knows the signed CEKs of chips."""

    async def signed_cek(self, chip_id: bytes) -> SevCertificate:
        """The CEK of the chip with this 64-byte id, signed, not yet verified.

        Raises:
            InvalidInput: the id has another size.
            NotFound: the service does not know the chip.
            Unavailable: KEY_SERVICE_UNAVAILABLE, there is no usable answer now.
        """
        ...


class FolderKeyService:
    """CEKs that lie in a folder as `<id in hex>.cert`; upper and lower case are both in use."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def signed_cek(self, chip_id: bytes) -> SevCertificate:
        """The CEK of the chip with this 64-byte id; see `KeyService`."""
        name = _name(chip_id)
        for candidate in (name, name.lower()):
            data = await asyncio.to_thread(_read, self._folder / f"{candidate}.cert")
            if data is not None:
                return _cek(data)
        raise self._lacks("CEK for this chip")

    async def signed_copy_of(self, cek: SevCertificate) -> SevCertificate:
        """A signed CEK with the body of `cek`, wherever in the folder it lies: for exports that name no chip.

        Raises:
            NotFound: no file holds it.
            Unavailable: the folder is not there, or cannot be read.
        """
        found = await asyncio.to_thread(self._search, cek)
        if found is None:
            raise self._lacks("signed copy of this CEK")
        return found

    def _lacks(self, what: str) -> SevattestError:
        # Without its folder the service is down: that a chip is unknown would be an answer.
        if not self._folder.is_dir():
            return _unavailable(f"there is no folder {self._folder}")
        return NotFound(Reason.NOT_FOUND, f"the folder {self._folder} holds no {what}")

    def _search(self, cek: SevCertificate) -> SevCertificate | None:
        try:
            files = sorted(self._folder.glob("*.cert"))[:MAX_FOLDER_FILES]
        except OSError as error:
            raise _unavailable(f"the folder {self._folder} cannot be read") from error
        for file in files:
            with contextlib.suppress(Unavailable):
                data = _read(file)
                if data and data.startswith(cek.body):
                    return _cek(data)
        return None


class HttpKeyService:
    """AMD's key service or one that speaks as it does: `GET <url>/cek/id/<ID>` gives 2084 bytes.

    Redirects are refused, answers are bounded, and `https` verifies the server as the system does. Even so an answer
    is believed by nobody before its signature is verified: `http` is fine for a software platform of one's own.
    """

    def __init__(
        self,
        url: str,
        cache: Path | None = None,
        *,
        roots: Sequence[Root] | None = None,
        timeout: float = REQUEST_TIMEOUT,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Remember where the service is; nothing is opened.

        Args:
            url: `http://…` or `https://…`, with or without `/cek/id` at its end.
            cache: a folder for CEKs that lead to a trusted root; made when it is needed, mode 0700.
            roots: who is trusted for the cache; AMD's pinned roots if absent.
            timeout: seconds for one request.
            sleep: waits between attempts.

        Raises:
            InvalidInput: `url` is not an address of that kind.
        """
        host = _host(url)
        self._base = url.rstrip("/").removesuffix("/cek/id") + "/cek/id/"
        self._host = host
        self._cache = cache
        self._roots = roots
        self._timeout = timeout
        self._sleep = sleep
        # One request a chip at a time: whoever comes second finds the cache filled.
        self._locks: WeakValueDictionary[bytes, asyncio.Lock] = WeakValueDictionary()
        self._threads = asyncio.Semaphore(MAX_REQUESTS)

    async def signed_cek(self, chip_id: bytes) -> SevCertificate:
        """The CEK of the chip with this 64-byte id; see `KeyService`."""
        name = _name(chip_id)
        lock = self._locks.setdefault(chip_id, asyncio.Lock())
        async with lock:
            if cached := await asyncio.to_thread(self._from_cache, name):
                return cached
            cert = _cek(await self._fetch(name))
            if self._cache and self._is_trusted(cert):
                await asyncio.to_thread(self._keep, self._cache, name, cert)
            return cert

    async def _fetch(self, name: str) -> bytes:
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                # The thread's own timeout is for each wait on the network; this one is for all of them together.
                async with asyncio.timeout(self._timeout):
                    return await self._get_apart(name)
            except TimeoutError:
                raise self._no_answer("did not answer in time") from None
            except _Busy as busy:
                if attempt == MAX_ATTEMPTS or busy.retry_after > MAX_RETRY_AFTER:
                    raise self._no_answer("asks to come back later", retry_after=f"{busy.retry_after:g}") from None
                await self._sleep(busy.retry_after)
        raise self._no_answer("asks to come back later")

    async def _get_apart(self, name: str) -> bytes:
        """`_get` in a thread of its own, which neither the event loop nor the process waits for at their end.

        A service that trickles holds its thread for hours, because the timeout of urllib is for each wait on the
        network. It must not hold the threads that other work needs too, so there is a limited number of these.
        """
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[bytes] = loop.create_future()

        def settle(data: bytes | None, error: Exception | None) -> None:
            self._threads.release()
            if answer.done():
                return  # given up meanwhile
            if error is not None:
                answer.set_exception(error)
            elif data is not None:
                answer.set_result(data)

        def work() -> None:
            data, failed = None, None
            try:
                data = self._get(name)
            except Exception as error:  # noqa: BLE001 -- raised where the answer is awaited
                failed = error
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(settle, data, failed)

        await self._threads.acquire()
        try:
            threading.Thread(target=work, name="key-service", daemon=True).start()
        except RuntimeError:
            self._threads.release()
            raise self._no_answer("cannot be asked: the system gives no thread for it") from None
        return await answer

    def _get(self, name: str) -> bytes:
        request = urllib.request.Request(self._base + name, headers={"Accept": "application/octet-stream"})  # noqa: S310 -- the scheme was checked at construction
        try:
            with _opener().open(request, timeout=self._timeout) as response:
                data: bytes = response.read(SEV_CERT_SIZE + 1)
        except urllib.error.HTTPError as error:
            with error:
                self._explain(error)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self._no_answer("cannot be reached") from error
        if len(data) != SEV_CERT_SIZE:
            raise self._no_answer("answers with something that is no CEK")
        return data

    def _explain(self, error: urllib.error.HTTPError) -> NoReturn:
        if error.code in {http.HTTPStatus.NOT_FOUND, http.HTTPStatus.BAD_REQUEST}:
            raise NotFound(Reason.NOT_FOUND, f"the key service at {self._host} does not know this chip") from None
        if error.code == http.HTTPStatus.TOO_MANY_REQUESTS:
            raise _Busy(_retry_after(error.headers)) from None
        raise self._no_answer(f"answers with HTTP status {error.code}") from None

    def _no_answer(self, what: str, **fields: str) -> Unavailable:
        return _unavailable(f"the key service at {self._host} {what}", **fields)

    def _is_trusted(self, cert: SevCertificate) -> bool:
        for root in pinned_roots() if self._roots is None else self._roots:
            with contextlib.suppress(BadSignature):
                verify_signature(cert, root.ask)
                return True
        return False

    def _from_cache(self, name: str) -> SevCertificate | None:
        if self._cache is None:
            return None
        with contextlib.suppress(Unavailable):
            data = _read(self._cache / f"{name}.cert")
            if data is not None and self._is_trusted(cert := _cek(data)):
                return cert
        return None

    def _keep(self, cache: Path, name: str, cert: SevCertificate) -> None:
        try:
            cache.mkdir(mode=0o700, parents=True, exist_ok=True)
            _write_atomically(cache, f"{name}.cert", cert.raw)
        except OSError as error:
            # The CEK is good all the same; the next launch asks the service again.
            _log.warning("a CEK could not be kept in the cache: %s", error.strerror)


def key_service(source: str, cache: Path | None = None, *, roots: Sequence[Root] | None = None) -> KeyService:
    """The key service that `source` names: `http(s)://…`, or a folder with `<ID>.cert` files.

    Raises:
        InvalidInput: `source` is another kind of address.
    """
    scheme, separator, _ = source.partition("://")
    if separator and scheme.isalnum():
        return HttpKeyService(source, cache, roots=roots)
    return FolderKeyService(Path(source))


class _Busy(Exception):
    """The service asks for a pause."""

    def __init__(self, retry_after: float) -> None:
        super().__init__(retry_after)
        self.retry_after = retry_after


def _host(url: str) -> str:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    plain = url.isascii() and url.isprintable() and " " not in url
    if parts.scheme not in {"http", "https"} or not parts.hostname or parts.query or parts.fragment or not plain:
        raise InvalidInput(
            Reason.INVALID_CONFIGURATION, "the key service's address is not http(s)://host[:port][/path]"
        )
    if parts.username or parts.password:
        raise InvalidInput(Reason.INVALID_CONFIGURATION, "the key service's address must not hold a password")
    return parts.hostname if port is None else f"{parts.hostname}:{port}"


def _opener() -> urllib.request.OpenerDirector:
    # Put together by hand: no handler follows redirects, and none opens files. Proxies come from the environment, as
    # everywhere in a datacenter.
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(context=ssl.create_default_context()),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener


def _retry_after(headers: Message) -> float:
    text = headers.get("Retry-After", "")
    # The other form, a date, is not in use there; and no pause at all would be an invitation to hammer.
    return max(1.0, float(text)) if text.isascii() and text.isdigit() else DEFAULT_RETRY_AFTER


def _name(chip_id: bytes) -> str:
    if len(chip_id) != CHIP_ID_SIZE:
        raise InvalidInput(Reason.INVALID_ARGUMENT, f"a chip id has {CHIP_ID_SIZE} bytes, not {len(chip_id)}")
    return chip_id.hex().upper()


def _cek(data: bytes) -> SevCertificate:
    try:
        cert = SevCertificate.parse(data)
    except ParseError as error:
        raise _unavailable(f"the key service's answer is no CEK: {error.message}") from error
    if cert.usage is not Usage.CEK:
        raise _unavailable(f"the key service's answer is a {cert.usage.name}, not a CEK")
    if not cert.is_signed:
        raise _unavailable("the key service's CEK carries no signature")
    return cert


def _read(file: Path) -> bytes | None:
    try:
        with file.open("rb") as stream:
            return stream.read(SEV_CERT_SIZE + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unavailable(f"{file.parent} cannot be read: {error.strerror}") from error


def _write_atomically(folder: Path, name: str, data: bytes) -> None:
    descriptor, temporary = tempfile.mkstemp(prefix=".", suffix=".new", dir=folder)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(descriptor)
        Path(temporary).replace(folder / name)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _unavailable(message: str, **fields: str) -> Unavailable:
    return Unavailable(Reason.KEY_SERVICE_UNAVAILABLE, message, **fields)
