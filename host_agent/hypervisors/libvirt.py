"""A guest as a libvirt domain: transient, started paused, with the owner's session in its XML.

`domain_xml.py` makes the XML, `libvirt_calls.py` the calls. A domain is known by its UUID, which is the launch's id:
the agent never looks one up by name, and touches no other. Measurement and secret go through libvirt's launch security
API. That does not tell whether a paused guest has run before; QEMU does, so `query-status` and `query-sev` are asked
through libvirt (`virDomainQemuMonitorCommand`), and so is the report, for which libvirt has no call at all.
"""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar
from uuid import UUID

from common.errors import PlatformFailed, Reason, SevattestError, Unavailable
from host_agent.firmware_errors import printable
from host_agent.hypervisors import qapi
from host_agent.hypervisors.arguments import MachineOptions
from host_agent.hypervisors.base import Inspection, Machine, StartOrder, Trace
from host_agent.hypervisors.domain_xml import launch_xml
from host_agent.hypervisors.guests import Guests
from host_agent.hypervisors.libvirt_calls import LibvirtCalls, NoDomain, load
from host_agent.hypervisors.monitored import QemuSettings

_T = TypeVar("_T")
_WATCH = 0.5  # seconds between looks whether a domain is there
_QUESTIONS = frozenset({"query-status", "query-sev", "query-sev-attestation-report"})


@dataclass(frozen=True, kw_only=True)
class LibvirtDefinition:
    """A guest as a domain, already checked.

    Attributes:
        firmware: the guest's firmware image.
        domain: the domain's XML.
    """

    driver: ClassVar[str] = "libvirt"
    firmware: Path
    domain: str


@dataclass(frozen=True, kw_only=True)
class LibvirtSettings:
    """Where libvirt is.

    Attributes:
        uri: of the connection.
    """

    uri: str = "qemu:///system"


class LibvirtHypervisor(Guests[LibvirtDefinition]):
    """Has the guests of the configuration started by libvirt."""

    def __init__(
        self, guests: Mapping[str, LibvirtDefinition], settings: QemuSettings, libvirt: LibvirtSettings
    ) -> None:
        super().__init__(guests)
        self._settings = settings
        self._start = LibvirtCalls(libvirt.uri, settings.start_timeout)
        self._calls = LibvirtCalls(libvirt.uri, settings.command_timeout)

    async def create(self, order: StartOrder) -> Machine:
        """See `Hypervisor`."""
        definition = self.definition(order.guest)
        load()
        xml = launch_xml(
            definition.domain,
            MachineOptions(
                firmware=definition.firmware,
                cbitpos=self._settings.cbitpos,
                reduced_phys_bits=self._settings.reduced_phys_bits,
                policy=order.policy,
            ),
            launch=order.launch,
            godh=order.godh,
            session=order.session,
        )
        return LibvirtMachine(order.launch, self._calls, start=self._start, xml=xml)

    async def find(self, trace: Trace) -> Machine | None:
        """See `Hypervisor`."""
        machine = LibvirtMachine(trace.launch, self._calls)
        with suppress(SevattestError):  # libvirt is away; the domain may be there
            await machine.look()
        if machine.alive:
            return machine
        machine.close()
        return None

    async def sweep(self, trace: Trace) -> None:
        """See `Hypervisor`."""

    def close(self) -> None:
        """Let go of libvirt; domains go on."""
        self._start.close()
        self._calls.close()


class LibvirtMachine:
    """One domain; see `Machine`. Must be made on the event loop that watches it."""

    def __init__(
        self, launch: UUID, calls: LibvirtCalls, *, start: LibvirtCalls | None = None, xml: str | None = None
    ) -> None:
        self._launch = launch
        self._calls = calls
        self._start = start
        self._xml = xml
        self._created = threading.Event()  # libvirt's answer to the start is there, whatever it was
        self._turn = threading.Lock()  # of asking for the domain, or giving it up
        self._asked = self._given_up = False
        self._gone = asyncio.Event()
        self._watch: asyncio.Task[None] | None = None
        if xml is None:
            self._created.set()
            self._begin_watch()

    @property
    def identity(self) -> None:
        """See `Machine`: the launch's id says it."""

    @property
    def alive(self) -> bool:
        """See `Machine`."""
        return not self._gone.is_set()

    def release(self) -> None:
        """See `Machine`: libvirt is asked by `wait_ready`."""

    async def wait_ready(self) -> None:
        """See `Machine`."""
        xml, self._xml = self._xml, None
        if xml is None or self._start is None:
            return  # found again; libvirt has created it, or knows no such domain
        self._begin_watch()
        try:
            await self._start.run("to start the domain", lambda connection: self._create(connection, xml))
        except NoDomain:
            raise PlatformFailed(Reason.HYPERVISOR_FAILED, "libvirt: the domain ended as it was started") from None

    def _create(self, connection: Any, xml: str) -> None:
        libvirt = load()
        with self._turn:
            if self._given_up:
                raise NoDomain
            self._asked = True
        try:
            connection.createXML(xml, libvirt.VIR_DOMAIN_START_PAUSED | libvirt.VIR_DOMAIN_START_VALIDATE)
        finally:
            self._created.set()

    async def inspect(self) -> Inspection:
        """See `Machine`."""
        status = await self._ask("query-status")
        return qapi.inspection(status, await self._ask("query-sev"))

    async def measurement(self) -> bytes:
        """See `Machine`."""
        info = await self._domain("launchSecurityInfo", lambda domain: domain.launchSecurityInfo())
        told = info.get("sev-measurement") if isinstance(info, dict) else None
        return qapi.measurement({"data": told})

    async def inject(self, header: bytes, payload: bytes) -> None:
        """See `Machine`."""
        secret = {
            "sev-secret-header": base64.b64encode(header).decode(),
            "sev-secret": base64.b64encode(payload).decode(),
            # No sev-secret-set-address: QEMU takes the area in the firmware that it measured.
        }
        await self._domain(
            "setLaunchSecurityState", lambda domain: domain.setLaunchSecurityState(secret), irreversible=True
        )

    async def resume(self) -> None:
        """See `Machine`."""
        await self._domain("resume", lambda domain: domain.resume(), irreversible=True)

    async def report(self, nonce: bytes) -> bytes:
        """See `Machine`."""
        return qapi.report(await self._ask("query-sev-attestation-report", mnonce=base64.b64encode(nonce).decode()))

    async def look(self) -> None:
        """See whether the domain is there.

        Raises:
            SevattestError: libvirt does not say.
        """
        if not await self._domain("isActive", lambda domain: domain.isActive()):
            self._set_gone()

    def forget_inputs(self) -> None:
        """See `Machine`: libvirt has them."""

    def trim_log(self) -> None:
        """See `Machine`: libvirt's log is libvirt's."""

    async def wait_gone(self) -> None:
        """See `Machine`."""
        await self._gone.wait()

    async def end(self) -> None:
        """See `Machine`."""
        self._xml = None
        if self._watch is None:
            self._gone.set()  # it was never asked for
        if self._gone.is_set():
            return
        with self._turn:
            self._given_up = True
            if not self._asked:
                self._created.set()  # libvirt could not be reached, and will not be asked any more
        # Looked at before the domain is looked for: it may come into being in between.
        created = self._created.is_set()
        with suppress(NoDomain):
            await self._calls.run("destroy", lambda connection: self._lookup(connection).destroy())
        if not created:
            raise Unavailable(Reason.PLATFORM_UNAVAILABLE, "libvirt: the domain may still come into being")
        self._set_gone()

    def close(self) -> None:
        """See `Machine`."""
        if self._watch is not None:
            self._watch.cancel()

    async def _ask(self, question: str, **arguments: str) -> object:
        """What QEMU answers; libvirt hands back its whole reply as text."""
        assert question in _QUESTIONS  # noqa: S101 -- nothing that changes anything goes this way
        command = json.dumps({"execute": question, **({"arguments": arguments} if arguments else {})})
        ask: Callable[[Any, str, int], str] = load("libvirt_qemu").qemuMonitorCommand
        text = await self._domain(question, lambda domain: ask(domain, command, 0))
        try:
            reply = json.loads(text)
        except (ValueError, RecursionError, TypeError):
            reply = None
        if isinstance(reply, dict) and isinstance(error := reply.get("error"), dict):
            said = printable(str(error.get("desc", "")))
            raise PlatformFailed(Reason.HYPERVISOR_FAILED, f"the machine refused {question}: {said}")
        return reply.get("return") if isinstance(reply, dict) else None

    async def _domain(self, what: str, call: Callable[[Any], _T], *, irreversible: bool = False) -> _T:
        try:
            return await self._calls.run(
                what, lambda connection: call(self._lookup(connection)), irreversible=irreversible
            )
        except NoDomain:
            self._set_gone()
            raise Unavailable(Reason.PLATFORM_UNAVAILABLE, "libvirt: the domain is gone") from None

    def _lookup(self, connection: Any) -> Any:
        return connection.lookupByUUIDString(str(self._launch))

    def _begin_watch(self) -> None:
        self._watch = asyncio.create_task(self._watch_domain())

    async def _watch_domain(self) -> None:
        """Notice the domain's end. A question twice a second, since libvirt's events want a loop of their own."""
        while not self._gone.is_set():
            await asyncio.sleep(_WATCH)
            if self._created.is_set():
                with suppress(SevattestError):
                    await self.look()

    def _set_gone(self) -> None:
        self._gone.set()
        if self._watch is not None:
            self._watch.cancel()
