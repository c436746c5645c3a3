"""docs/owner.md tells the truth: its documents are applied, its commands run, and they say what the page says."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shlex
from datetime import timedelta
from pathlib import Path

import pytest

from common.errors import Refused
from tests.support.chains import make_platform
from tests.support.local_admin import LocalAdmin, local_admin
from tests.support.owner_site import sign_head
from verifier.launches.state import State

PAGE = Path(__file__).resolve().parents[3] / "docs" / "owner.md"
CALLER = "spiffe://datacenter.example/orchestrator/cluster-2"
_BLOCK = re.compile(
    r"^## (?P<section>[^\n]+)$|^```(?P<kind>yaml|console)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)


def _pattern(shown: str) -> re.Pattern[str]:
    """What the page shows, `…` standing for anything; how many spaces a column takes is no promise."""
    parts = [re.sub(r"(\\ )+", r" +", re.escape(part)) for part in shown.split("…")]
    return re.compile(r"[\s\S]*?".join(parts).replace("\n", r" *\n"))


def _commands(block: str) -> list[tuple[str, str]]:
    """The commands of a console block, each with what it prints."""
    found = [part.partition("\n") for part in f"\n{block}".split("\n$ ")[1:]]
    return [(command, shown.strip("\n")) for command, _, shown in found]


async def _launches(admin: LocalAdmin) -> None:
    """One released and one refused, as in the page's section."""
    async with admin.open() as site:
        digest = (await site.desk.digests("shop"))[0]
        for measured, expected in ((digest, State.RELEASED), (bytes(32), State.REFUSED)):
            begun = await site.desk.begin(workload="shop", caller=CALLER)
            blob = site.desk.start(begun).measure(measured)
            with contextlib.suppress(Refused):
                await site.desk.release(begun.launch.launch_id, blob, caller=CALLER)
            shown = await site.owner.launches.get(begun.launch.launch_id)
            assert shown.launch.state is expected
            site.desk.clock.advance(timedelta(seconds=1))


async def _sign(admin: LocalAdmin) -> None:
    """A checkpoint, as the verifier makes one by itself."""
    async with admin.open() as site:
        await sign_head(site)


def test_the_page_tells_a_day_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    platform = make_platform()
    admin = local_admin(tmp_path / "desk", monkeypatch, capsys, platform=platform, generation="milan")
    monkeypatch.chdir(tmp_path)
    Path("disk-passphrase").write_bytes(b"correct horse battery st")
    Path("host.cert").write_bytes(platform.chain.to_bytes())
    ran = 0
    for block in _BLOCK.finditer(PAGE.read_text(encoding="utf-8")):
        if block["section"] == "What happened":
            asyncio.run(_launches(admin))
        if block["section"] == "Evidence":
            asyncio.run(_sign(admin))
        if block["kind"] == "yaml":
            name = block["text"].splitlines()[0].removeprefix("# ")
            Path(name).write_text(block["text"], encoding="utf-8")
        if block["kind"] == "console":
            for command, shown in _commands(block["text"]):
                _run(admin, command, shown)
                ran += 1
    assert ran >= 15


def _run(admin: LocalAdmin, command: str, shown: str) -> None:
    line, _, target = command.partition(" > ")
    words = shlex.split(line)
    assert words[:2] == ["sevattest", "owner"]
    said = admin.run(*words[2:])
    assert said.code in (0, 1), said.err
    if target:
        Path(target).write_text(said.out, encoding="utf-8")
        return
    assert _pattern(shown).fullmatch((said.out + said.err).strip("\n")), f"{command}\n{said.out}{said.err}"


def test_what_the_page_does_not_say_is_told_apart() -> None:
    assert _pattern("a  b …").fullmatch("a    b c\nd")
    assert not _pattern("a b").fullmatch("a c")
    assert not _pattern("… b").fullmatch("a c")
