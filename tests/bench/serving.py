"""The verifier under load: launches per second beside the cryptography that none of them can do without.

Each worker is a `sev-verifier serve` on a port of its own, behind mutual TLS, with durable commits. Its own CPU time
counts, by the kernel's clock of its process: whoever calls it and the database beside it cost it nothing. Beside it the
same run measures the bound: the CPU time of one P-384 key and one ECDH for each launch. docs/performance.md says what
each column means.
"""

from __future__ import annotations

import signal
import statistics
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.bench.site import Site, Window, make_site, serving
from tests.support.postgres import MISSING, find_programs, start_server

_AT_ONCE = 32
_WARM_UP = 300
_WINDOWS, _LAUNCHES = 5, 500
_HALF_LOAD_S = 5.0
_OPEN = 10_000
_SAMPLED = 1500


@dataclass(kw_only=True)
class Figures:
    """What was measured of some workers over one store.

    Attributes:
        name: of the store, and how many workers.
        windows: each with the same number of launches.
        half: launches that came at half the rate that the windows reached.
        open_bytes: memory that 10,000 open launches took; None where it was not measured.
        key_seconds: CPU time of the bound's cryptography for one launch, inside of the workers.
        parts: CPU time of one launch by part, seconds.
    """

    name: str
    windows: list[Window] = field(default_factory=list)
    half: Window | None = None
    open_bytes: int | None = None
    key_seconds: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Launches per second."""
        return statistics.median([_LAUNCHES / window.result.seconds for window in self.windows])

    @property
    def cpu(self) -> float:
        """CPU time of one launch, seconds."""
        return statistics.median([window.cpu / _LAUNCHES for window in self.windows])

    @property
    def bound(self) -> float:
        """CPU time of the bound, seconds."""
        return statistics.median([window.bound for window in self.windows])

    @property
    def of_bound(self) -> float:
        """Launches per second of CPU time, as a share of what the bound would allow."""
        return statistics.median([window.bound * _LAUNCHES / window.cpu for window in self.windows])


def _measure(name: str, folder: Path, dsn: str | None, workers: int) -> Figures:
    figures = Figures(name=f"{name}, {workers} worker{'s' if workers > 1 else ''}")
    with serving(make_site(folder, dsn), workers) as site:
        site.run("launch", _WARM_UP, _AT_ONCE)
        figures.windows = [site.run("launch", _LAUNCHES, _AT_ONCE) for _ in range(_WINDOWS)]
        half = figures.rate / 2
        figures.half = site.run("launch", int(half * _HALF_LOAD_S), _AT_ONCE, half)
        if workers == 1:
            site.signal(signal.SIGUSR1)
            sampled = site.run("launch", _SAMPLED, _AT_ONCE)
            site.signal(signal.SIGUSR2)
            figures.open_bytes = _open_bytes(site)
        seen = site.end()
    figures.key_seconds = sum(each.key_seconds for each in seen) / sum(each.keys for each in seen)
    if workers == 1:
        total: Counter[str] = Counter()
        for each in seen:
            total.update(each.parts)
        scale = sampled.cpu / _SAMPLED / sum(total.values())
        figures.parts = {part: seconds * scale for part, seconds in total.most_common()}
    return figures


def _measure_bare(folder: Path) -> Figures:
    """What is left of the bound by gRPC and the messages alone."""
    figures = Figures(name="no verifier, only gRPC")
    with serving(make_site(folder, None), 1, bare=True) as site:
        site.run("calls", _WARM_UP, _AT_ONCE)
        figures.windows = [site.run("calls", _LAUNCHES, _AT_ONCE) for _ in range(_WINDOWS)]
        site.end()
    return figures


def _open_bytes(site: Site) -> int:
    before = site.resident()
    site.run("begin", _OPEN, _AT_ONCE)
    return site.resident() - before


def report(folder: Path) -> None:
    """Measure and print."""
    print("\nverifier: BeginLaunch and ReleaseSecret over mutual TLS, durable commits; CPU time of the workers alone")
    print(
        f"{'':<24} {'launches/s':>10} {'bound/s':>8} {'CPU, ms':>8} {'of bound':>9} {'keys, ms':>9} {'their part':>10}"
        f" {'p99 at half load, ms':>21} {'10,000 open':>12}"
    )
    _printed(_measure_bare(folder / "bare"))
    measured = [_printed(_measure("SQLite", folder / "sqlite", None, 1))]
    if find_programs() is None:
        print(MISSING)
    else:
        with contextmanager(start_server)() as server:
            for workers in (1, 2):
                server.sql("DROP SCHEMA IF EXISTS sevattest CASCADE")
                figures = _measure("PostgreSQL", folder / f"postgres-{workers}", server.dsn, workers)
                measured.append(_printed(figures))
    for figures in measured:
        if figures.parts:
            print(f"\n{figures.name}: where the CPU time of a launch goes, ms (sampled)")
            for part, seconds in figures.parts.items():
                print(f"  {part:<46} {seconds * 1000:>6.3f} {seconds / sum(figures.parts.values()):>6.1%}")


def _printed(figures: Figures) -> Figures:
    line = (
        f"{figures.name:<24} {figures.rate:>10.0f} {1 / figures.bound:>8.0f} {figures.cpu * 1000:>8.2f} "
        f"{figures.of_bound:>9.3f}"
    )
    if figures.half is not None:
        begin, release = (
            statistics.quantiles(values, n=100)[98]
            for values in (figures.half.result.begin_ms, figures.half.result.release_ms)
        )
        memory = "" if figures.open_bytes is None else f"{figures.open_bytes / (1 << 20):.1f} MiB"
        line += (
            f" {figures.key_seconds * 1000:>9.3f} {figures.key_seconds / figures.cpu:>10.3f} "
            f"{f'{begin:.1f} + {release:.1f}':>21} {memory:>12}"
        )
    print(line, flush=True)
    return figures
