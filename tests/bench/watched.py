"""`sev-verifier serve` that looks at itself: what its cryptography takes, and where the rest of its CPU time goes.

A program to put in front of the command (`VerifierSite.serve(under=…)`); at the end, what it saw is in a file.

The making of each P-384 key and each ECDH are timed by the thread's own CPU clock, which costs two microseconds for a
launch. Between SIGUSR1 and SIGUSR2, each 4 ms of CPU time (a tick of the kernel's) a signal shows where the main thread
stands, and every thread's own CPU clock tells how much of that time was its. That costs about a hundredth of the time
that it looks at.
"""

from __future__ import annotations

import runpy
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
from cryptography.hazmat.primitives.asymmetric import ec

from verifier.keys import session

_TICK_S = 0.004

_BOUND = "P-384 key and ECDH: the bound"
_SESSION = "the rest of a session: certificate, wrapping"
_STORE = "store: statements, commits"
_JUDGING = "judging: documents, rules, secrets, records"
_RECEIPT = "receipt: claims, signature"
_SEALING = "sealing of keys at rest"
_LOG = "log lines"
_MESSAGES = "messages: protobuf, checks of fields"
_GATE = "gatekeeper"
_LOOP = "event loop, gRPC's Python"
_GRPC = "gRPC's own threads: TLS, HTTP/2"
# What a line belongs to, by the innermost frame that says so: a part of a path in the checkout or the environment.
_PARTS: tuple[tuple[str, str], ...] = (
    ("/tests/bench/", _BOUND),
    ("/common/sev/session.py", _SESSION),
    ("/common/sev/kdf.py", _SESSION),
    ("/common/sev/certs/", _SESSION),
    ("/verifier/keys/session.py", _SESSION),
    ("/verifier/keys/signer.py", _RECEIPT),
    ("/verifier/secrets/receipt.py", _RECEIPT),
    ("/verifier/keys/", _SEALING),
    ("/verifier/store/", _STORE),
    ("/common/audit/", _STORE),
    ("/psycopg", _STORE),
    ("/common/telemetry/", _LOG),
    ("/verifier/service.py", _MESSAGES),
    ("/common/wire.py", _MESSAGES),
    ("/common/ids.py", _MESSAGES),
    ("/google/", _MESSAGES),
    ("/common/rpc/", _GATE),
    ("/verifier/", _JUDGING),
    ("/common/sev/", _JUDGING),
    ("/grpc/", _LOOP),
    ("/asyncio/", _LOOP),
    ("/concurrent/", _LOOP),
    ("/selectors.py", _LOOP),
    ("/threading.py", _LOOP),
)


def part_of(frame: FrameType | None) -> str:
    """What the line belongs to at which a thread stands."""
    while frame is not None:
        path = frame.f_code.co_filename
        for piece, part in _PARTS:
            if piece in path:
                return part
        frame = frame.f_back
    return "other"


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker saw of itself.

    Attributes:
        keys: P-384 keys that it made.
        key_seconds: CPU time for them and the ECDH with each.
        parts: CPU time by part while it looked, seconds.
    """

    keys: int
    key_seconds: float
    parts: dict[str, float]


class _TimedKey:
    """A private key whose work is timed."""

    def __init__(self, watch: Watch) -> None:
        start = time.thread_time()
        self._key = ec.generate_private_key(ec.SECP384R1())
        self._watch = watch
        watch.keys += 1
        watch.key_seconds += time.thread_time() - start

    @property
    def curve(self) -> ec.EllipticCurve:
        return self._key.curve

    def public_key(self) -> ec.EllipticCurvePublicKey:
        return self._key.public_key()

    def exchange(self, algorithm: ec.ECDH, peer: ec.EllipticCurvePublicKey) -> bytes:
        start = time.thread_time()
        shared = self._key.exchange(algorithm, peer)
        self._watch.key_seconds += time.thread_time() - start
        return shared


class _TimedKeys:
    """`cryptography`'s module `ec`, as far as a session needs it."""

    SECP384R1 = ec.SECP384R1

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def generate_private_key(self, _curve: ec.EllipticCurve) -> _TimedKey:
        return _TimedKey(self._watch)


class Watch:
    """Counts CPU time by part."""

    def __init__(self) -> None:
        self.keys, self.key_seconds = 0, 0.0
        self.parts: dict[str, float] = Counter()  # type: ignore[assignment]  # counts seconds
        self._clocks: dict[int, float] = {}
        self._all = time.process_time()

    def start(self, _number: int, _frame: FrameType | None) -> None:
        """Look from now on; the handler of SIGUSR1."""
        self._all = time.process_time()
        self._clocks = {thread: _clock(thread) for thread in sys._current_frames()}
        signal.setitimer(signal.ITIMER_PROF, _TICK_S, _TICK_S)

    def stop(self, _number: int, _frame: FrameType | None) -> None:
        """Look no more; the handler of SIGUSR2."""
        signal.setitimer(signal.ITIMER_PROF, 0)

    def look(self, _number: int, frame: FrameType | None) -> None:
        """Take one sample; the handler of SIGPROF, on the main thread."""
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        main, python = threading.main_thread().ident, 0.0
        for thread in sys._current_frames():
            now = _clock(thread)
            used, self._clocks[thread] = now - self._clocks.get(thread, now), now
            python += used
            if thread == main:
                self.parts[part_of(frame)] += used
            else:
                # gRPC has one thread that Python knows of, and it runs no Python.
                self.parts[_STORE if names.get(thread, "").startswith("store") else _GRPC] += used
        everything = time.process_time()
        self.parts[_GRPC] += max(0.0, everything - self._all - python)
        self._all = everything

    def seen(self) -> Seen:
        """What it saw."""
        return Seen(keys=self.keys, key_seconds=self.key_seconds, parts=dict(self.parts))


def _clock(thread: int) -> float:
    return time.clock_gettime(time.pthread_getcpuclockid(thread))


def main(out: str, words: list[str]) -> None:
    """Run `python -m MODULE ARGUMENTS` in this process, and leave what was seen in `out`."""
    module = words.index("-m") + 1
    watch = Watch()
    keys: Any = _TimedKeys(watch)
    vars(session)["ec"] = keys
    signal.signal(signal.SIGUSR1, watch.start)
    signal.signal(signal.SIGUSR2, watch.stop)
    signal.signal(signal.SIGPROF, watch.look)
    sys.argv = words[module:]
    try:
        runpy.run_module(words[module], run_name="__main__", alter_sys=True)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        Path(out).write_bytes(msgspec.json.encode(watch.seen()))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
