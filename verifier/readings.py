"""What the verifier's gauges show: read from its parts when somebody asks, and from the store now and then.

Only the composition root calls this, and only where metrics are configured.
"""

from __future__ import annotations

import asyncio
from typing import NoReturn

from common.errors import SevattestError
from common.telemetry.metrics import Meter, Reading
from verifier import metrics
from verifier.chores import Checkpoints
from verifier.documents.reader import KINDS
from verifier.launches.dependencies import Dependencies
from verifier.library.library import Library


class Readings:
    """The values of gauges."""

    def __init__(self, dependencies: Dependencies, library: Library, checkpoints: Checkpoints) -> None:
        """Take the parts; the store is not asked yet."""
        self._d = dependencies
        self._library = library
        self._checkpoints = checkpoints
        self._open: int | None = None
        self._older: int | None = None

    def watch_with(self, meter: Meter) -> None:
        """Have them shown."""
        library, checkpoints = self._library, self._checkpoints
        meter.watch(metrics.AUDIT_NUMBER, lambda: _known(checkpoints.number))
        meter.watch(metrics.SIGNED_NUMBER, lambda: {(): checkpoints.signed.number} if checkpoints.signed else {})
        meter.watch(
            metrics.SIGNED_TIME,
            lambda: {(): checkpoints.signed_time.timestamp()} if checkpoints.signed_time else {},
        )
        meter.watch(metrics.OPEN_LAUNCHES, lambda: _known(self._open))
        meter.watch(metrics.OLDER_KEYS, lambda: _known(self._older))
        meter.watch(metrics.REVISION, lambda: {(): library.documents.revision} if library.documents else {})
        meter.watch(metrics.UNUSABLE, self._unusable)
        meter.watch(metrics.CLOCK_BEHIND, lambda: {(): self._d.time.behind.total_seconds()})

    def _unusable(self) -> Reading:
        return {(kind,): count for kind, count in {**dict.fromkeys(KINDS, 0), **self._library.unusable()}.items()}

    async def keep(self, interval: float) -> NoReturn:
        """Ask the store every `interval` seconds until cancelled. What it does not answer is not shown."""
        while True:
            try:
                self._open = await self._d.store.count_open()
                self._older = len(await self._d.store.sealing_keys() - {self._d.sealing.key_id})
            except SevattestError:  # the sweep says so, and that the verifier is not ready
                self._open = self._older = None
            await asyncio.sleep(interval)


def _known(value: float | None) -> Reading:
    return {} if value is None else {(): value}
