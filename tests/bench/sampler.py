"""`sev-verifier serve` that looks at itself: where its CPU time goes, by what the lines of code belong to.

A program to put in front of the command (`VerifierSite.serve(under=…)`). After SIGUSR1, each 4 ms of CPU time (a tick
of the kernel's) a signal shows where each Python thread stands, and every thread's own CPU clock tells how much of that
time was its; what no Python thread has used was used by gRPC's own, for TLS and HTTP/2. It costs about a hundredth of
the time that it looks at. At the end the shares are in a file.
"""

from __future__ import annotations

import json
import runpy
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import FrameType

_TICK_S = 0.004

_GRPC = "gRPC's own threads: TLS, HTTP/2"
# What a line belongs to, by the innermost frame that says so: a part of a path in the checkout or the environment.
PARTS: tuple[tuple[str, str], ...] = (
    ("/common/sev/session.py", "session: P-384, ECDH, wrapping"),
    ("/common/sev/kdf.py", "session: P-384, ECDH, wrapping"),
    ("/common/sev/certs/", "session: P-384, ECDH, wrapping"),
    ("/verifier/keys/session.py", "session: P-384, ECDH, wrapping"),
    ("/verifier/keys/signer.py", "receipt: claims, signature"),
    ("/verifier/secrets/receipt.py", "receipt: claims, signature"),
    ("/verifier/keys/", "sealing of keys at rest"),
    ("/verifier/store/", "store: statements, commits"),
    ("/common/audit/", "store: statements, commits"),
    ("/common/telemetry/", "log lines"),
    ("/structlog/", "log lines"),
    ("/verifier/", "judging: documents, rules, secrets, records"),
    ("/common/sev/", "judging: documents, rules, secrets, records"),
    ("/common/wire.py", "messages: protobuf, checks of fields"),
    ("/common/ids.py", "messages: protobuf, checks of fields"),
    ("/google/", "messages: protobuf, checks of fields"),
    ("/common/rpc/", "gatekeeper"),
    ("/grpc/", "event loop, gRPC's Python"),
    ("/asyncio/", "event loop, gRPC's Python"),
    ("/concurrent/", "event loop, gRPC's Python"),
    ("/selectors.py", "event loop, gRPC's Python"),
    ("/threading.py", "event loop, gRPC's Python"),
)


def part_of(frame: FrameType | None) -> str:
    """What the line belongs to at which a thread stands."""
    while frame is not None:
        path = frame.f_code.co_filename
        for piece, part in PARTS:
            if piece in path:
                return part
        frame = frame.f_back
    return "other"


class Sampler:
    """Counts CPU time by part and by line."""

    def __init__(self) -> None:
        self.parts: Counter[str] = Counter()
        self.lines: Counter[str] = Counter()
        self._clocks: dict[int, float] = {}
        self._all = time.process_time()

    def start(self, _number: int, _frame: FrameType | None) -> None:
        """Look from now on; the handler of SIGUSR1."""
        self._all = time.process_time()
        self._clocks = {thread: _clock(thread) for thread in sys._current_frames()}
        signal.setitimer(signal.ITIMER_PROF, _TICK_S, _TICK_S)

    def look(self, _number: int, frame: FrameType | None) -> None:
        """Take one sample; the handler of SIGPROF, on the main thread."""
        main, others = threading.main_thread().ident, 0.0
        for thread, top in sys._current_frames().items():
            now = _clock(thread)
            used = now - self._clocks.get(thread, 0.0)
            self._clocks[thread] = now
            others += used
            standing = frame if thread == main else top
            if used > 0:
                self.parts[part_of(standing)] += used  # type: ignore[assignment]  # seconds
                if standing is not None:
                    code = standing.f_code
                    self.lines[f"{code.co_filename}:{standing.f_lineno} {code.co_qualname}"] += used  # type: ignore[assignment]  # seconds
        everything = time.process_time()
        self.parts[_GRPC] += max(0.0, everything - self._all - others)  # type: ignore[assignment]  # seconds
        self._all = everything


def _clock(thread: int) -> float:
    return time.clock_gettime(time.pthread_getcpuclockid(thread))


def main(out: str, words: list[str]) -> None:
    """Run `python -m MODULE ARGUMENTS` in this process, and leave what was counted in `out`."""
    module = words.index("-m") + 1
    sampler = Sampler()
    signal.signal(signal.SIGUSR1, sampler.start)
    signal.signal(signal.SIGPROF, sampler.look)
    sys.argv = words[module:]
    try:
        runpy.run_module(words[module], run_name="__main__", alter_sys=True)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        Path(out).write_text(json.dumps({"parts": sampler.parts, "lines": sampler.lines}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
