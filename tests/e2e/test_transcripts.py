"""What the documents show of a real run is what a real run shows."""

from __future__ import annotations

import asyncio

import pytest

from tests.e2e.conftest import accepted, refused
from tests.e2e.scene import Scene
from tests.e2e.transcript import FOLDER, tell
from tests.support.still import still


@accepted("the demonstration, as in docs/transcripts")
async def test_a_launch_is_as_the_documents_show_it(scene: Scene, pytestconfig: pytest.Config) -> None:
    await compare(scene, pytestconfig, "launch")
    scene.saw("as in docs/transcripts/launch.txt")


@refused("the demonstration with another kernel, as in docs/transcripts")
async def test_a_refusal_is_as_the_documents_show_it(scene: Scene, pytestconfig: pytest.Config) -> None:
    await compare(scene, pytestconfig, "refused")
    scene.saw("as in docs/transcripts/refused.txt")


async def compare(scene: Scene, config: pytest.Config, name: str) -> None:
    """Hold a fresh run against the transcript."""
    if not scene.bench.real:
        pytest.skip("the transcripts are of a real machine")
    told = await asyncio.to_thread(tell, name, config.getoption("guest"), config.getoption("qemu"))
    shown = (FOLDER / f"{name}.txt").read_text(encoding="utf-8")
    assert still(told) == still(shown), "a real run shows something else; `make transcripts` renews the documents"
