"""An owner at work on a desk of their own: documents go in and launches come about as in life."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from common.errors import SevattestError
from tests.support.desk import FIRMWARE, Desk, desk
from verifier.admin.desks import Desks, owner_desks
from verifier.admin.documents import Applied
from verifier.admin.requests import Asked
from verifier.launches.launch import Begun

OWNER = "spiffe://owner.example/owner/alice"
OTHER_OWNER = "spiffe://owner.example/owner/bob"


def asked(request_id: UUID | None = None, *, caller: str = OWNER) -> Asked:
    """A request of the owner's, new unless an id is given."""
    return Asked(caller=caller, request_id=request_id or uuid4())


def text(content: dict[str, Any]) -> bytes:
    """A document as JSON text."""
    return json.dumps(content).encode()


@dataclass(kw_only=True)
class OwnerSite:
    """A desk and its owner's."""

    desk: Desk
    owner: Desks

    async def apply(self, content: dict[str, Any], request_id: UUID | None = None) -> Applied:
        """Apply a document."""
        return await self.owner.documents.apply(asked(request_id), text(content))

    async def released(self, **begin: Any) -> Begun:
        """A launch that was released to the first digest that its workload allows."""
        begun = await self.desk.begin(**begin)
        digest = (await self.desk.digests())[0]
        caller = {"caller": begin["caller"]} if "caller" in begin else {}
        blob = self.desk.start(begun).measure(digest)
        await self.desk.release(begun.launch.launch_id, blob, firmware=FIRMWARE, **caller)
        return begun

    async def refused(self, **begin: Any) -> Begun:
        """A launch that was refused for its measurement."""
        begun = await self.desk.begin(**begin)
        with contextlib.suppress(SevattestError):
            await self.desk.release(begun.launch.launch_id, self.desk.start(begun).measure(bytes(32)))
        return begun


@contextlib.asynccontextmanager
async def owner_site(folder: Path, **settings: Any) -> AsyncIterator[OwnerSite]:
    """A desk in `folder` (see `desk`) with its owner's desks."""
    async with desk(folder, **settings) as opened:
        yield OwnerSite(desk=opened, owner=owner_desks(opened.dependencies, opened.library))
