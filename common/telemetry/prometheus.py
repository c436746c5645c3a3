"""The meter over prometheus-client, and the page that it shows. Imported only where metrics are configured.

Nothing here is global but one switch of the library's: each meter has a registry of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence

import prometheus_client as library
from prometheus_client.core import GaugeMetricFamily, Metric

from common.telemetry.metrics import Counter, Gauge, Histogram, Reading

CONTENT_TYPE = library.CONTENT_TYPE_PLAIN_0_0_4

# A second series beside each, with the time of its first figure: nobody asks for it.
library.disable_created_metrics()  # type: ignore[no-untyped-call]  # the library has no types here


class PrometheusMeter:
    """Keeps figures; is a `Meter`."""

    def __init__(self) -> None:
        self._registry = library.CollectorRegistry()
        self._counters: dict[Counter, library.Counter] = {}
        self._histograms: dict[Histogram, library.Histogram] = {}
        self._gauges: dict[Gauge, list[Callable[[], Reading]]] = {}
        # One for each combination of labels that came, kept: to have the library find it takes longer than to count.
        self._counting: dict[tuple[Counter, tuple[str, ...]], library.Counter] = {}
        self._sorting: dict[tuple[Histogram, tuple[str, ...]], library.Histogram] = {}

    def add(self, counter: Counter, *labels: str, by: int = 1) -> None:
        """See `Meter`."""
        child = self._counting.get((counter, labels)) or self._new_counter(counter, labels)
        child.inc(by)

    def observe(self, histogram: Histogram, value: float, *labels: str) -> None:
        """See `Meter`."""
        child = self._sorting.get((histogram, labels)) or self._new_histogram(histogram, labels)
        child.observe(value)

    def watch(self, gauge: Gauge, read: Callable[[], Reading]) -> None:
        """See `Meter`."""
        self._gauges.setdefault(gauge, []).append(read)

    async def page(self) -> bytes:
        """All figures, in Prometheus's text format.

        Gauges are read here, in the event loop that their values belong to. The text is made in a thread: of some
        thousand lines it takes ten milliseconds, which calls need not wait.
        """
        readings = {gauge: _joined(reads) for gauge, reads in self._gauges.items()}
        return await asyncio.to_thread(library.generate_latest, _Page(self._registry, readings))

    def _new_counter(self, counter: Counter, labels: tuple[str, ...]) -> library.Counter:
        family = self._counters.get(counter)
        if family is None:
            family = library.Counter(counter.name, counter.meaning, counter.labels, registry=self._registry)
            self._counters[counter] = family
        child = self._counting[counter, labels] = family.labels(*labels) if labels else family
        return child

    def _new_histogram(self, histogram: Histogram, labels: tuple[str, ...]) -> library.Histogram:
        family = self._histograms.get(histogram)
        if family is None:
            family = library.Histogram(
                histogram.name, histogram.meaning, histogram.labels, registry=self._registry, buckets=histogram.buckets
            )
            self._histograms[histogram] = family
        child = self._sorting[histogram, labels] = family.labels(*labels) if labels else family
        return child


class _Page:
    """What the library writes out: the registry's figures, and gauges that were just read."""

    def __init__(self, registry: library.CollectorRegistry, readings: Mapping[Gauge, Reading]) -> None:
        self._registry = registry
        self._readings = readings

    def collect(self) -> Iterator[Metric]:
        """What the library asks of a collector."""
        for gauge, reading in self._readings.items():
            family = GaugeMetricFamily(gauge.name, gauge.meaning, labels=gauge.labels)
            for labels, value in reading.items():
                family.add_metric(labels, value)
            yield family
        yield from self._registry.collect()


def _joined(reads: Sequence[Callable[[], Reading]]) -> Reading:
    return {labels: value for read in reads for labels, value in read().items()}
