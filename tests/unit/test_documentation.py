"""The pages name files, tests, pages and commands that exist."""

import io
import re
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path

import pytest

import host_agent.cli
import orchestrator.cli
import verifier.cli
from tests.e2e.transcript import FOLDER, README, STORIES, block, excerpt

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "deploy").rglob("*.md")])

_LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
_TEST = re.compile(r"`(tests/[A-Za-z0-9_/.]+?)(?:::([a-z0-9_]+))?`")

PROGRAMS = {
    "sevattest": orchestrator.cli.main,
    "sev-verifier": verifier.cli.main,
    "sev-host-agent": host_agent.cli.main,
}
# A command's words end at the first that is none (a file, an option, a name in capitals), its options where a shell's
# or another program's words begin.
_COMMAND = re.compile(
    r"(?:^|(?<=[\s(])|(?<=bin/))(?<!-o )(?P<program>sevattest|sev-verifier|sev-host-agent)(?: -q)?"
    r"(?P<words>(?: [a-z][a-z-]*(?![^ ,;.)]))+)(?P<rest>[^#|&<>;]*?(?=[#|&<>;]| -- |$))"
)


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


def test_every_decision_is_listed_by_its_number_and_title() -> None:
    folder = ROOT / "docs" / "adr"
    listed = re.findall(
        r"^([0-9]+\. )\[(.+)\]\((.+)\)$", (folder / "README.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    pages = sorted(folder.glob("[0-9]*.md"))
    assert [file for _, _, file in listed] == [page.name for page in pages]
    for number, title, file in listed:
        assert (folder / file).read_text(encoding="utf-8").startswith(f"# {number}{title}\n"), file
        assert file.startswith(f"{int(number[:-2]):04}-"), file


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


@cache
def help_of(program: str, *words: str) -> str | None:
    """What a command prints of itself; None where there is no such command."""
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(io.StringIO()):
        code = PROGRAMS[program]([*words, "--help"])
    return said.getvalue() if code == 0 else None


def commands(page: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """Each command of ours in a page's code: its program, its leading words, its options."""
    fenced = re.findall(r"^ *```[a-z]*\n(.*?)^ *```", page, re.MULTILINE | re.DOTALL)
    lines = "".join(fenced).replace("\\\n", " ").splitlines()
    for text in [*lines, *re.findall(r"`([^`\n]+)`", page)]:
        for found in _COMMAND.finditer(text):
            words, options = found["words"].split(), re.findall(r"(?<= )--?[a-z][a-z-]*", found["rest"])
            yield found["program"], words, options


def wrong(page: str) -> list[str]:
    """What a page says of commands that is not so."""
    found = []
    for program, words, options in commands(page):
        told = help_of(program, *words)
        if told is None:
            found.append(f"there is no `{program} {' '.join(words)}`")
            continue
        found += [
            f"`{program} {' '.join(words)}` has no {option}"
            for option in options
            if not re.search(rf"(?<![\w-]){option}(?![\w-])", told)
        ]
    return found


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_command_that_a_page_names_exists_with_its_options(page: Path) -> None:
    assert not wrong(page.read_text(encoding="utf-8"))


def test_a_command_that_is_none_is_found() -> None:
    assert wrong("see `sevattest digest`") == ["there is no `sevattest digest`"]
    assert wrong("```\n$ sev-verifier health --config FILE --loud\n```\n") == ["`sev-verifier health` has no --loud"]
    assert not wrong("```console\n$ sevattest owner apply -f shop.yaml --dry-run\nworkload shop 1: …\n```\n")
    assert sum(1 for page in PAGES for _ in commands(page.read_text(encoding="utf-8"))) > 150
