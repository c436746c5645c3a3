"""What is exchanged while a verifier serves: chips that are denied by their ids are asked about before they count."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest

from tests.support.desk import desk
from tests.support.documents import revocation
from tests.support.eventually import until
from tests.support.verifier_process import VerifierSite
from verifier.config import Config, PlatformsConfig, load_config
from verifier.exchange import Denied

ONE, TWO = "1" * 128, "2" * 128


def configured(site: VerifierSite, *chips: str) -> Config:
    return msgspec.structs.replace(load_config(site.config, {}), platforms=PlatformsConfig(denied_chips=chips))


@pytest.fixture
def site(tmp_path: Path) -> VerifierSite:
    return VerifierSite.make(tmp_path / "site")


async def test_a_chip_that_is_denied_while_others_are_asked_about_is_asked_about_too(
    site: VerifierSite, tmp_path: Path
) -> None:
    asked, answer = list[frozenset[str]](), asyncio.Event()

    async def resolve(chips: frozenset[str]) -> None:
        asked.append(chips)
        await answer.wait()

    async with desk(tmp_path / "desk") as d:
        denied = Denied(configured(site), resolve)
        before = await d.library.current()
        await denied.revoke(before)  # the published ones
        asked.clear()
        await d.apply(revocation("incident", chips=[ONE]))
        revoking = asyncio.create_task(denied.revoke(await d.library.current()))
        await until(lambda: asked)
        denied.configure(configured(site, TWO))
        answer.set()
        await revoking
        await denied.revoke(await d.library.current())
    assert asked == [{ONE}, {TWO}]
