"""A device whose failures are counted, whichever driver reaches it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from common.errors import SevattestError
from common.telemetry.metrics import Meter
from host_agent.devices.base import Device, PlatformStatus
from host_agent.firmware_errors import status_in
from host_agent.metrics import DEVICE_ERRORS


class CountedDevice:
    """Is a `Device`."""

    def __init__(self, device: Device, meter: Meter) -> None:
        self._device = device
        self._meter = meter

    async def status(self) -> PlatformStatus:
        """See `Device`."""
        with self._counted():
            return await self._device.status()

    async def export_chain(self) -> bytes:
        """See `Device`."""
        with self._counted():
            return await self._device.export_chain()

    async def chip_id(self) -> bytes:
        """See `Device`."""
        with self._counted():
            return await self._device.chip_id()

    @contextmanager
    def _counted(self) -> Iterator[None]:
        try:
            yield
        except SevattestError as error:
            self._meter.add(DEVICE_ERRORS, error.reason.value, status_in(error.fields))
            raise
