"""All drivers behind one: each guest has the driver of its definition, each machine the one on its launch's record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, TypeAlias, cast

from common.errors import InvalidInput, NotFound, Reason
from common.sev.digest.ovmf import Area
from host_agent.hypervisors.attach import AttachDefinition, AttachHypervisor
from host_agent.hypervisors.base import GuestDefinition, Hypervisor, Machine, StartOrder, Trace
from host_agent.hypervisors.libvirt import LibvirtDefinition, LibvirtHypervisor, LibvirtSettings
from host_agent.hypervisors.memlock import LockLimit
from host_agent.hypervisors.monitored import QemuSettings
from host_agent.hypervisors.proxmox import ProxmoxDefinition, ProxmoxHypervisor, ProxmoxSettings
from host_agent.hypervisors.qemu import QemuHypervisor

AnyDefinition: TypeAlias = GuestDefinition | AttachDefinition | ProxmoxDefinition | LibvirtDefinition
DRIVERS: frozenset[str] = frozenset(
    kind.driver for kind in (GuestDefinition, AttachDefinition, ProxmoxDefinition, LibvirtDefinition)
)


class Driver(Hypervisor, Protocol):
    """A hypervisor of some of the guests."""

    def define(self, guests: Mapping[str, object]) -> None:
        """Take other definitions, all of them for this driver."""
        ...


class Fleet:
    """The hypervisor of all guests; see `Hypervisor`."""

    def __init__(
        self,
        guests: Mapping[str, AnyDefinition],
        settings: QemuSettings,
        *,
        proxmox: ProxmoxSettings,
        libvirt: LibvirtSettings,
        lock_limit: LockLimit | None,
    ) -> None:
        self._drivers = cast(
            "dict[str, Driver]",
            {
                GuestDefinition.driver: QemuHypervisor({}, settings, lock_limit),
                AttachDefinition.driver: AttachHypervisor({}, settings),
                ProxmoxDefinition.driver: ProxmoxHypervisor({}, settings, proxmox),
                LibvirtDefinition.driver: LibvirtHypervisor({}, settings, libvirt),
            },
        )
        self._guests: Mapping[str, AnyDefinition] = {}
        self.define(guests)

    def define(self, guests: Mapping[str, AnyDefinition]) -> None:
        """Take other definitions, for the machines that are started from now on."""
        self._guests = guests
        for name, driver in self._drivers.items():
            driver.define({guest: definition for guest, definition in guests.items() if definition.driver == name})

    def driver(self, guest: str) -> str:
        """See `Hypervisor`."""
        if guest not in self._guests:
            raise NotFound(Reason.NOT_FOUND, "no such guest", guest=guest)
        return self._guests[guest].driver

    def secret_area(self, guest: str) -> Area | None:
        """See `Hypervisor`."""
        return self._drivers[self.driver(guest)].secret_area(guest)

    async def create(self, order: StartOrder) -> Machine:
        """See `Hypervisor`."""
        return await self._drivers[self.driver(order.guest)].create(order)

    async def find(self, trace: Trace) -> Machine | None:
        """See `Hypervisor`."""
        return await self._recorded(trace).find(trace)

    async def sweep(self, trace: Trace) -> None:
        """See `Hypervisor`."""
        await self._recorded(trace).sweep(trace)

    def _recorded(self, trace: Trace) -> Driver:
        if trace.driver not in self._drivers:
            raise InvalidInput(
                Reason.INVALID_CONFIGURATION,
                f"launch {trace.launch} was started by the driver {trace.driver!r}, which this version does not have",
            )
        return self._drivers[trace.driver]

    def close(self) -> None:
        """Let go of what the drivers hold open; machines go on."""
        driver = self._drivers[LibvirtDefinition.driver]
        assert isinstance(driver, LibvirtHypervisor)  # noqa: S101 -- so it was made
        driver.close()
