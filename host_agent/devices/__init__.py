"""Drivers for the platform's SEV device: the protocols, and what implements them."""

from __future__ import annotations

from pathlib import Path

from common.errors import InvalidInput, Reason
from host_agent.devices.base import AdministeredDevice, Administration, Device, PlatformStatus, pdh_fingerprint
from host_agent.devices.dev_sev import DevSevDevice
from host_agent.devices.ioctl import DEFAULT_PATH
from host_agent.devices.socket import SocketDevice

__all__ = [
    "DEFAULT_PATH",
    "DEV_SEV",
    "DRIVERS",
    "AdministeredDevice",
    "Administration",
    "Device",
    "PlatformStatus",
    "open_administration",
    "open_device",
    "pdh_fingerprint",
]

# Name in the configuration -> driver.
DEV_SEV = "dev_sev"
DRIVERS: dict[str, type[DevSevDevice | SocketDevice]] = {DEV_SEV: DevSevDevice, "socket": SocketDevice}


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
            f"device.driver: this version has no driver {driver!r}; it has: {', '.join(sorted(DRIVERS))}",
            key="device.driver",
        )
    return DRIVERS[driver](path, timeout=timeout)


def open_administration(path: Path, *, timeout: float) -> AdministeredDevice:
    """The device at `path` with its power to change the platform, for a person's commands; never for the agent.

    A unix socket is a software platform's, anything else a device node; nothing is opened before the first command.

    Args:
        path: where the device is.
        timeout: seconds that one command may take.
    """
    driver = DRIVERS["socket" if path.is_socket() else DEV_SEV]
    return driver(path, timeout=timeout)
