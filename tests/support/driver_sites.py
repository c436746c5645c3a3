"""An agent as a process with a guest of any driver: the stages of `stages.py`, on the software platform's stand-in."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from emulator.firmware_image import write_image
from tests.support.agent import QUICK
from tests.support.agent_site import SECRET_ID, Owner, Site
from tests.support.libvirt_link import serving
from tests.support.machine_kinds import builtin
from tests.support.pki import Pki
from tests.support.platform import Platform
from tests.support.stages import GUEST, STAGES, LibvirtStage, ProxmoxStage, Stage, short_folder


class StageSite(Site):
    """A site whose guest is a stage's.

    Attributes:
        stage: what is outside of the agent.
    """

    def __init__(self, root: Path, platform: Platform, pki: Pki, stage: Stage) -> None:
        super().__init__(root, platform, pki)
        self.stage = stage
        self.firmware = stage.firmware
        write_image(self.firmware, "one")

    def guest(self) -> str:
        hypervisor: Any = self.stage.hypervisor(QUICK)
        definition = hypervisor.definition(GUEST)
        table = {"driver": definition.driver}
        table |= {field.name: getattr(definition, field.name) for field in fields(definition)}
        if isinstance(self.stage, LibvirtStage):
            (self.root / "web.xml").write_text(table["domain"])
            table["domain"] = "web.xml"
        text = f"[guests.{GUEST}]\n{_toml(table)}"
        if isinstance(self.stage, ProxmoxStage):
            where = self.stage.settings
            text += f"[proxmox]\n{_toml({field.name: getattr(where, field.name) for field in fields(where)})}"
        return text

    def machines(self) -> list[int]:
        return self.stage.machines()

    @asynccontextmanager
    async def somebody(self) -> AsyncIterator[None]:
        """Whoever starts the machine, if it is not the agent, at work for one launch."""
        async with self.stage.somebody():
            yield

    def saw(self, owner: Owner) -> bool:
        """Whether the guest has run, with the owner's secret; one that ran without it fails the test."""
        said = f"secret {SECRET_ID} {len(owner.secret)} {owner.secret.hex()}"
        assert self.read_by_guest in ([], [said]), "a guest ran without its secret"
        return self.read_by_guest == [said]


@contextmanager
def stage_site(driver: str, platform: Platform, pki: Pki) -> Iterator[StageSite]:
    """A site in a short folder; nothing of it is left afterwards."""
    with short_folder() as root, ExitStack() as stack:
        stage = STAGES[driver](root=root, kind=builtin(platform))
        stack.callback(stage.end)
        site = StageSite(root, platform, pki, stage)
        stack.callback(site.end)
        if isinstance(stage, LibvirtStage):
            site.path.insert(0, str(stack.enter_context(serving(stage.daemon, root / "py"))))
        yield site


def _toml(table: dict[str, Any]) -> str:
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in table.items()}
    return "".join(f"{key} = {json.dumps(value, default=str)}\n" for key, value in plain.items() if value != [])
