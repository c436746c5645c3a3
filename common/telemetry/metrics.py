"""Metrics: what one is, and the protocol of whoever takes the figures. Knows no library and no service.

A service declares its metrics as values, in one module with what its listeners count (`common/rpc/metrics.py`);
docs/metrics.md has them all. Counters and histograms are told as things happen; a gauge is read when somebody asks.
The values of a label are a fixed set: never a caller, a launch, a chip, or anything else that a peer makes up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeAlias

# What a gauge shows: label values, in the order of its labels, and the value. What is not known is left out.
Reading: TypeAlias = Mapping[tuple[str, ...], float]


@dataclass(frozen=True, kw_only=True, eq=False)
class Metric:
    """One name on the page.

    Attributes:
        name: in full, for ever.
        meaning: a sentence without a stop.
        labels: names of its labels.
    """

    kind: ClassVar[str]

    name: str
    meaning: str
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Counter(Metric):
    """Only grows, from 0 at the process's start; its name ends in `_total`."""

    kind = "counter"


@dataclass(frozen=True, kw_only=True, eq=False)
class Histogram(Metric):
    """Durations, sorted into buckets.

    Attributes:
        buckets: their upper bounds, seconds, rising.
    """

    kind = "histogram"

    buckets: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Gauge(Metric):
    """Has a value of its own at each moment."""

    kind = "gauge"


class Meter(Protocol):
    """Takes figures; each method costs a call some microseconds at the most."""

    def add(self, counter: Counter, *labels: str, by: int = 1) -> None:
        """Count; with `by` 0 only show that there is something to be counted, so that its first time is a rise."""
        ...

    def observe(self, histogram: Histogram, value: float, *labels: str) -> None:
        """Sort one duration in."""
        ...

    def watch(self, gauge: Gauge, read: Callable[[], Reading]) -> None:
        """Have `read` called, in the event loop, whenever somebody asks; several of one gauge are shown together."""
        ...


class _Nothing:
    """A meter that keeps nothing."""

    def add(self, counter: Counter, *labels: str, by: int = 1) -> None: ...

    def observe(self, histogram: Histogram, value: float, *labels: str) -> None: ...

    def watch(self, gauge: Gauge, read: Callable[[], Reading]) -> None: ...


UNMEASURED: Meter = _Nothing()
