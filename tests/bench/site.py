"""An owner's site for measurements: workers (replicas, each a process with a port of its own) and a load generator."""

from __future__ import annotations

import contextlib
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from common.rpc.identity import Role
from tests.bench.load import Result, Setting, Task
from tests.bench.proc import Bound, cpu_seconds, resident_bytes
from tests.bench.watched import Seen
from tests.support.documents import workload as document
from tests.support.pki import DATACENTER_DOMAIN
from tests.support.verifier_process import ServingVerifier, VerifierSite
from verifier.library.artefacts import ArtefactShelf
from verifier.library.documents import snapshot
from verifier.library.folder import read_folder
from verifier.library.prepared import prepare

# Ten thousand open launches, within what one caller may have by default.
CALLERS = tuple(f"cluster-{number}" for number in range(10))
# The bound is measured beside the workers, since a core that is shared is slower: some 5 % of one core.
_SLICE, _PAUSE_S = 20, 0.15
_CHECKOUT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class Window:
    """What a task took.

    Attributes:
        result: the load generator's word.
        cpu: CPU time of all workers meanwhile, seconds.
        bound: CPU time of the unavoidable cryptography of one launch, measured meanwhile on the same cores, seconds.
    """

    result: Result
    cpu: float
    bound: float


@dataclass(kw_only=True)
class Site:
    """Workers that serve, and the process that calls them."""

    workers: Sequence[ServingVerifier]
    load: subprocess.Popen[str]
    seen_files: Sequence[Path]

    def _cpu(self) -> float:
        return sum(cpu_seconds(worker.process.pid) for worker in self.workers)

    def signal(self, number: signal.Signals) -> None:
        """Send all workers a signal."""
        for worker in self.workers:
            worker.process.send_signal(number)

    def resident(self) -> int:
        """Memory of all workers, bytes."""
        return sum(resident_bytes(worker.process.pid) for worker in self.workers)

    def end(self) -> list[Seen]:
        """Stop the workers; what each saw of itself."""
        for worker in self.workers:
            worker.stop()
        return [msgspec.json.decode(path.read_bytes(), type=Seen) for path in self.seen_files]

    def run(self, kind: str, count: int, at_once: int, rate: float | None = None) -> Window:
        """Have the load generator do one task."""
        before = self._cpu()
        assert self.load.stdin is not None
        assert self.load.stdout is not None
        task = Task(kind=kind, count=count, at_once=at_once, rate=rate)
        self.load.stdin.write(msgspec.json.encode(task).decode() + "\n")
        self.load.stdin.flush()
        bound = Bound()
        bound.measure(_SLICE)
        while not select.select([self.load.stdout], [], [], _PAUSE_S)[0]:
            bound.measure(_SLICE)
        line = self.load.stdout.readline()
        if not line:
            raise SystemExit("bench: the load generator ended")
        return Window(result=msgspec.json.decode(line, type=Result), cpu=self._cpu() - before, bound=bound.seconds)


def make_site(folder: Path, dsn: str | None) -> VerifierSite:
    """Write everything that workers need; SQLite unless there is a PostgreSQL's DSN."""
    callers = [f"spiffe://{DATACENTER_DOMAIN}/{Role.ORCHESTRATOR}/{name}" for name in CALLERS]
    return VerifierSite.make(folder, content=document(callers=callers), dsn=dsn)


@contextlib.contextmanager
def serving(site: VerifierSite, workers: int, *, bare: bool = False) -> Iterator[Site]:
    """Start workers, which watch themselves, and the load generator; all are gone afterwards.

    Args:
        site: where.
        workers: how many.
        bare: whether each is a server that does no more than it must (`tests.bench.bare`), and watches nothing.
    """
    with contextlib.ExitStack() as stack:
        started = []
        seen = [] if bare else [site.folder / f"seen-{number}.json" for number in range(workers)]
        for number in range(workers):
            environ = {"SEVATTEST_HEALTH__SOCKET": f"h{number}.sock"}
            program = ["tests.bench.bare"] if bare else ["tests.bench.watched", str(seen[number])]
            under = [sys.executable, "-m", *program]
            started.append(stack.enter_context(site.serve(environ=environ, under=under)))
        load = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.load"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=_CHECKOUT,
        )
        stack.callback(_end, load)
        assert load.stdin is not None
        setting = _setting(site, [worker.address for worker in started])
        load.stdin.write(msgspec.json.encode(setting).decode() + "\n")
        yield Site(workers=started, load=load, seen_files=seen)


def _end(load: subprocess.Popen[str]) -> None:
    load.kill()
    load.communicate()


def _setting(site: VerifierSite, addresses: list[str]) -> Setting:
    workload = snapshot(0, read_folder(site.folder / "documents")).workloads["web"][0]
    pairs = [site.pki.issue(Role.ORCHESTRATOR, name) for name in CALLERS]
    return Setting(
        addresses=addresses,
        callers=[(str(pair.cert), str(pair.key)) for pair in pairs],
        server_ca=str(site.pki.owner_ca),
        chain=site.platform.chain.to_bytes(),
        pdh=site.platform.keys.pdh.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        workload=workload.name,
        digest=prepare(workload, ArtefactShelf()).references[0].digest,
    )
