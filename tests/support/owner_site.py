"""An owner at work on a desk of their own: documents go in and launches come about as in life."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from common.audit.chain import Head
from common.audit.checkpoint import checkpoint_claims
from common.audit.jws import CHECKPOINT_TYPE
from common.errors import SevattestError
from tests.support.desk import FIRMWARE, VERIFIER, Desk, desk
from verifier.admin.desks import Desks, owner_desks
from verifier.admin.documents import Applied
from verifier.admin.requests import Asked
from verifier.launches.launch import Begun
from verifier.store.rows import Checkpoint

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


async def sign_head(site: OwnerSite, head: Head | None = None) -> str:
    """Sign where the log stands, or a lie about it, as the verifier's chore does; the checkpoint."""
    if head is None:
        number, last, _ = await site.desk.store.head()
        head = Head(number=number, hash=last)
    claims = checkpoint_claims(head, time=site.desk.clock.now(), issuer=VERIFIER)
    token = site.desk.dependencies.signer.sign(claims, typ=CHECKPOINT_TYPE)
    await site.desk.store.keep_checkpoint(Checkpoint(number=head.number, token=token))
    return token


@contextlib.asynccontextmanager
async def owner_site(folder: Path, **settings: Any) -> AsyncIterator[OwnerSite]:
    """A desk in `folder` (see `desk`) with its owner's desks."""
    async with desk(folder, **settings) as opened:
        yield OwnerSite(desk=opened, owner=owner_desks(opened.dependencies, opened.library))
