"""A site whose guest is a domain of a real libvirt daemon, on an unmodified QEMU and /dev/kvm."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Any

from common.sev.secret import SecretEntry, build_table
from host_agent.hypervisors.libvirt_calls import load
from orchestrator.demo.processes import Service
from tests.support.agent_site import SECRET_ID, Owner, Site
from tests.support.dev_sev_site import KvmSite
from tests.support.libvirt_daemon import Daemon
from tests.support.pki import Pki
from tests.support.platform import Platform
from tests.support.stages import domain, short_folder


class LibvirtSite(KvmSite):
    """A site whose guest is a domain.

    Attributes:
        daemon: libvirt's.
        changes: what the domain's definition has otherwise, as old and new text.
    """

    def __init__(self, root: Path, platform: Platform, pki: Pki, daemon: Daemon) -> None:
        super().__init__(root, platform, pki)
        self.by_ioctl = self.intercepted = False
        self.daemon = daemon
        self.changes: list[tuple[str, str]] = []

    @property
    def domain(self) -> str:
        """The guest's definition; what its firmware prints goes to a file."""
        text = domain(self.root).replace(
            "<devices>",
            f"<devices><serial type='file'><source path='{self.printed}'/><target type='isa-debug' port='1'/></serial>",
        )
        for old, new in self.changes:
            assert old in text
            text = text.replace(old, new, 1)
        return text

    def start(self, point: str | None = None) -> Service:
        return Site.start(self, point)

    def guest(self) -> str:
        (self.root / "web.xml").write_text(self.domain)
        return (
            f'[libvirt]\nuri = "{self.daemon.uri}"\n'
            f'[guests.web]\ndriver = "libvirt"\nfirmware = "{self.firmware}"\ndomain = "web.xml"'
        )

    @asynccontextmanager
    async def somebody(self) -> AsyncIterator[None]:
        """Nobody: the daemon starts the machine."""
        yield

    def saw(self, owner: Owner) -> bool:
        """Whether the guest has run, with the owner's secret; one that ran without it fails the test."""
        wanted = build_table([SecretEntry(guid=SECRET_ID, data=owner.secret)])
        printed = self.printed.read_bytes() if self.printed.exists() else b""
        assert printed.startswith(wanted) or wanted.startswith(printed), "a guest ran without its secret"
        return printed.startswith(wanted)

    def machines(self) -> list[int]:
        return [found.ID() for found in self._domains()]

    def domains(self) -> list[str]:
        """What the daemon has, running or only defined: their UUIDs, asked without the agent."""
        return [found.UUIDString() for found in self._domains()]

    def _domains(self) -> list[Any]:
        with closing(load().open(self.daemon.uri)) as connection:
            return list(connection.listAllDomains())


@contextmanager
def libvirt_site(platform: Platform, pki: Pki, daemon: Daemon) -> Iterator[LibvirtSite]:
    """A site; at the end the daemon has no machine, and keeps nothing for one."""
    with short_folder() as root:
        site = LibvirtSite(root, platform, pki, daemon)
        try:
            yield site
            assert site.domains() == []
            assert daemon.left_of_machines() == []
        finally:
            site.end()
