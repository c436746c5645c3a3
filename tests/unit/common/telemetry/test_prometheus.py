"""The meter: what is told is what is shown, and what is not known is not."""

from __future__ import annotations

import pytest

from common.telemetry.metrics import Counter, Gauge, Histogram, Reading
from common.telemetry.prometheus import PrometheusMeter
from tests.support.metrics import Page

ENDS = Counter(name="ends_total", meaning="how things end", labels=("how",))
ALL = Counter(name="all_total", meaning="everything")
TOOK = Histogram(name="took_seconds", meaning="how long", labels=("what",), buckets=(0.1, 1.0))
HEIGHT = Gauge(name="height", meaning="how high", labels=("where",))


async def page_of(meter: PrometheusMeter) -> Page:
    return Page(text=(await meter.page()).decode())


async def test_what_is_counted_is_shown() -> None:
    meter = PrometheusMeter()
    meter.add(ENDS, "well")
    meter.add(ENDS, "well", by=2)
    meter.add(ENDS, "badly")
    meter.add(ALL)
    for seconds in (0.05, 0.5, 5.0):
        meter.observe(TOOK, seconds, "step")
    page = await page_of(meter)
    assert page.families() == {"ends_total": "counter", "all_total": "counter", "took_seconds": "histogram"}
    assert (page.of("ends_total", how="well"), page.of("ends_total", how="badly"), page.of("all_total")) == (3, 1, 1)
    assert [page.of("took_seconds_bucket", what="step", le=le) for le in ("0.1", "1.0", "+Inf")] == [1, 2, 3]
    assert page.of("took_seconds_count") == 3
    assert page.of("took_seconds_sum") == pytest.approx(5.55)
    assert "# HELP ends_total how things end\n# TYPE ends_total counter\n" in page.text
    assert "_created" not in page.text


async def test_what_can_be_counted_is_shown_before_its_first_time() -> None:
    meter = PrometheusMeter()
    meter.add(ENDS, "well", by=0)
    assert 'ends_total{how="well"} 0.0\n' in (await page_of(meter)).text


async def test_a_gauge_is_read_when_somebody_asks_and_only_what_is_known_is_shown() -> None:
    meter = PrometheusMeter()
    known: dict[tuple[str, ...], float] = {}

    def here() -> Reading:
        return known

    meter.watch(HEIGHT, here)
    meter.watch(HEIGHT, lambda: {("there",): 7.0})
    assert (await page_of(meter)).text.count("\nheight{") == 1
    known["here",] = 3.0
    page = await page_of(meter)
    assert (page.of("height", where="here"), page.of("height", where="there")) == (3, 7)
    assert page.text.count("# TYPE height gauge\n") == 1


async def test_meters_of_one_process_know_nothing_of_each_other() -> None:
    one, other = PrometheusMeter(), PrometheusMeter()
    one.add(ALL, by=5)
    other.add(ALL)
    assert ((await page_of(one)).of("all_total"), (await page_of(other)).of("all_total")) == (5, 1)
