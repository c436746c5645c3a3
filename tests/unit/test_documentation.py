"""The pages name files, tests and pages that exist."""

import re
from pathlib import Path

import pytest

from tests.e2e.transcript import FOLDER, README, STORIES, block, excerpt

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "deploy").rglob("*.md")])

_LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
_TEST = re.compile(r"`(tests/[A-Za-z0-9_/.]+?)(?:::([a-z0-9_]+))?`")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in _LINK.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{name(page)} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_test_that_a_page_names_exists(page: Path) -> None:
    for path, test in _TEST.findall(page.read_text(encoding="utf-8")):
        assert (ROOT / path).exists(), f"{name(page)} names {path}"
        if test:
            assert f"def {test}(" in (ROOT / path).read_text(encoding="utf-8"), f"{name(page)} names {path}::{test}"


def test_the_pages_are_read() -> None:
    assert len(PAGES) > 10
    assert any(_TEST.search(page.read_text(encoding="utf-8")) for page in PAGES)


@pytest.mark.parametrize("story", STORIES)
def test_the_readme_shows_what_the_transcripts_hold(story: str) -> None:
    transcript = (FOLDER / f"{story}.txt").read_text(encoding="utf-8")
    found = block(story).search(README.read_text(encoding="utf-8"))
    assert found, f"the README has no excerpt of {story}"
    assert found[2] == excerpt(story, transcript), "`make transcripts` renews the README's excerpts"
    assert transcript.startswith("$ make demo")
