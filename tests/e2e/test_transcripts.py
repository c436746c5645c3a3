"""What the documents show of a real run is what a real run shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.bench import Bench
from tests.e2e.conftest import accepted, refused
from tests.e2e.scene import Scene
from tests.e2e.transcript import FOLDER, tell
from tests.support.still import still


@pytest.fixture
def guest(pytestconfig: pytest.Config) -> Path:
    folder: Path = pytestconfig.getoption("guest")
    return folder


def shown(name: str) -> str:
    return still((FOLDER / f"{name}.txt").read_text(encoding="utf-8"))


@accepted("the demonstration, as in docs/transcripts")
def test_a_launch_is_as_the_documents_show_it(
    scene: Scene, bench: Bench, guest: Path, pytestconfig: pytest.Config
) -> None:
    if not bench.real:
        pytest.skip("the transcripts are of a real machine")
    told = tell("launch", guest, pytestconfig.getoption("qemu"))
    assert still(told) == shown("launch"), "a real run shows something else; `make transcripts` renews the documents"
    scene.saw("read 32 bytes, as on file")


@refused("the demonstration with another kernel, as in docs/transcripts")
def test_a_refusal_is_as_the_documents_show_it(
    scene: Scene, bench: Bench, guest: Path, pytestconfig: pytest.Config
) -> None:
    if not bench.real:
        pytest.skip("the transcripts are of a real machine")
    told = tell("refused", guest, pytestconfig.getoption("qemu"))
    assert still(told) == shown("refused"), "a real run shows something else; `make transcripts` renews the documents"
    scene.saw("never ran")
