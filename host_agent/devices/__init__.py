"""Drivers for the platform's SEV device: the `Device` protocol and what implements it."""

from __future__ import annotations

from pathlib import Path

from common.errors import InvalidInput, Reason
from host_agent.devices.base import Device, PlatformStatus, pdh_fingerprint
from host_agent.devices.socket import SocketDevice

__all__ = ["DRIVERS", "Device", "PlatformStatus", "open_device", "pdh_fingerprint"]

# Name in the configuration -> driver.
DRIVERS = {"socket": SocketDevice}


def open_device(driver: str, path: Path, *, timeout: float) -> Device:
    """The device that `driver` reaches at `path`; nothing is opened before the first command.

    Args:
        driver: a key of `DRIVERS`.
        path: where the device is.
        timeout: seconds that one command may take.

    Raises:
        InvalidInput: `INVALID_CONFIGURATION`; there is no such driver.
    """
    if driver not in DRIVERS:
        raise InvalidInput(
            Reason.INVALID_CONFIGURATION,
            f"device.driver: this version has no driver {driver!r}; it has: {', '.join(sorted(DRIVERS))} "
            "(the software platform's socket)",
            key="device.driver",
        )
    return DRIVERS[driver](path, timeout=timeout)
