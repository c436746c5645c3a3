"""Calls to libvirt: blocking ones, in threads of their own, each with a time limit, with errors of our tree.

libvirt-python is an extra (it is built against libvirt's headers) and is imported when the first call is made.
A libvirt daemon that hangs keeps the threads that wait for it; there are few, and when all hang every further call is
refused at once. The connection is opened when it is needed, and again after it was lost.
"""

from __future__ import annotations

import asyncio
import importlib
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from types import ModuleType
from typing import Any, TypeVar

from common.errors import InvalidInput, OutcomeUnknown, Reason, SevattestError, Unavailable
from host_agent.firmware_errors import hypervisor_failure, printable

_T = TypeVar("_T")
_THREADS = 8
# virErrorNumber, include/libvirt/virterror.h: the call may not have been made, or its answer got lost.
_LINK_ERRORS = frozenset({5, 6, 38, 39, 68})  # NO_CONNECT, INVALID_CONN, SYSTEM_ERROR, RPC, OPERATION_TIMEOUT
_NO_DOMAIN = 42


class NoDomain(Exception):
    """libvirt knows no such domain (any more)."""


def load(name: str = "libvirt") -> ModuleType:
    """One of libvirt-python's modules.

    Raises:
        InvalidInput: `INVALID_CONFIGURATION`; it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InvalidInput(
            Reason.INVALID_CONFIGURATION,
            "a guest wants the driver libvirt, and libvirt-python is not installed",
            hint="install the extra: pip install 'sevattest[agent,libvirt]' (needs libvirt-dev, pkg-config and gcc)",
        ) from error


class LibvirtCalls:
    """A connection to one libvirt daemon, and the threads that talk to it."""

    def __init__(self, uri: str, limit: float) -> None:
        self._uri = uri
        self._limit = limit
        self._connection: Any = None
        self._lock = threading.Lock()
        self._free = threading.Semaphore(_THREADS)

    async def run(self, what: str, call: Callable[[Any], _T], *, irreversible: bool = False) -> _T:
        """Make a call with the open connection.

        Args:
            what: the call, for messages.
            call: blocks; gets libvirt's connection.
            irreversible: silence means that nobody knows what happened.

        Raises:
            NoDomain: libvirt knows no such domain.
            InvalidInput: libvirt-python is not installed.
            Unavailable: no connection, or no answer to a call that can be repeated.
            OutcomeUnknown: no answer to a call that cannot.
            Refused: libvirt's words carry a firmware status that is a verdict.
            PlatformFailed: libvirt answered with an error.
        """
        libvirt = load()
        if not self._free.acquire(blocking=False):
            raise _silent(f"{what}: libvirt has not answered {_THREADS} earlier calls")
        outcome: Future[_T] = Future()
        outcome.set_running_or_notify_cancel()
        made = threading.Event()
        thread = threading.Thread(target=self._make, args=(call, outcome, made), name="libvirt", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            self._free.release()
            raise _silent(f"{what}: the system gives no thread for it") from None
        try:
            async with asyncio.timeout(self._limit):
                return await asyncio.wrap_future(outcome)
        except TimeoutError:
            raise self._lost(
                f"{what} had no answer in {self._limit:g} s", irreversible=irreversible and made.is_set()
            ) from None
        except libvirt.libvirtError as error:
            raise self._error(what, error, irreversible=irreversible and made.is_set()) from error

    def close(self) -> None:
        """Let go of the connection, if nothing hangs on it."""
        if self._lock.acquire(blocking=False):
            try:
                connection, self._connection = self._connection, None
                if connection is not None:
                    with suppress(Exception):
                        connection.close()
            finally:
                self._lock.release()

    def _make(self, call: Callable[[Any], _T], outcome: Future[_T], made: threading.Event) -> None:
        try:
            connection = self._open()
            made.set()
            result = call(connection)
        except BaseException as error:  # noqa: BLE001 -- raised where the outcome is awaited
            self._free.release()
            outcome.set_exception(error)
        else:
            self._free.release()
            outcome.set_result(result)

    def _open(self) -> Any:
        with self._lock:
            if self._connection is None or not self._connection.isAlive():
                self._connection = load().open(self._uri)
            return self._connection

    def _error(self, what: str, error: Any, *, irreversible: bool) -> Exception:
        code = error.get_error_code()
        if code == _NO_DOMAIN:
            return NoDomain()
        said = printable(str(error.get_error_message() or error))
        if code in _LINK_ERRORS:
            return self._lost(f"{what}: {said}", irreversible=irreversible)
        return hypervisor_failure(f"libvirt refused {what}", said)

    def _lost(self, what: str, *, irreversible: bool) -> SevattestError:
        if irreversible:
            return OutcomeUnknown(Reason.OUTCOME_UNKNOWN, f"libvirt: {what}; nobody knows whether it was done")
        return _silent(what)


def _silent(what: str) -> Unavailable:
    return Unavailable(Reason.PLATFORM_UNAVAILABLE, f"libvirt: {what}")
