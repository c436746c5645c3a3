"""The real sevctl 0.6.2 agrees with the commands of a host, both ways, on the software platform.

Both programs run unmodified under `sevattest platform run`, through the ioctl. The program is found on the PATH or
named by SEVATTEST_SEVCTL; `cargo install sevctl --version 0.6.2 --locked` makes it (Debian: libssl-dev, pkg-config).
`sevctl export` knows AMD's key service only, so a proxy stands in for that.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from common.sev.certs.oca import read_key, read_oca
from tests.support.kds_proxy import key_service
from tests.support.platform import SEVATTEST, Platform, running_platform

Words = list[str | Path]
_LIMIT = 60.0
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")  # sevctl's, also where nobody sees it


@dataclass(frozen=True, kw_only=True)
class Host:
    """A platform and the two programs on it."""

    platform: Platform
    sevctl: tuple[str, ...]
    environ: dict[str, str]

    def ours(self, *words: str | Path) -> tuple[int, str]:
        """Exit code and stdout of `sevattest`."""
        return self._run(*SEVATTEST, *words)

    def theirs(self, *words: str | Path) -> tuple[int, str]:
        """Exit code and stdout of sevctl."""
        return self._run(*self.sevctl, *words)

    def export(self, target: Path) -> Path:
        """The platform's certificates, by ours."""
        words: Words = ["export", "--kds", self.platform.kds, "--ca", self.platform.ask_ark, target]
        assert self.ours(*words) == (0, "")
        return target

    def _run(self, *words: str | Path) -> tuple[int, str]:
        front: Words = [*SEVATTEST, "platform", "run", "--state", self.platform.state, "--"]
        environ = os.environ | self.environ
        done = subprocess.run(
            [*front, *words], check=False, capture_output=True, text=True, timeout=_LIMIT, env=environ
        )
        return done.returncode, done.stdout


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    program = os.environ.get("SEVATTEST_SEVCTL") or shutil.which("sevctl")
    if program is None:
        pytest.skip("sevctl not found: `cargo install sevctl --version 0.6.2 --locked`, or set SEVATTEST_SEVCTL")
    version = subprocess.run([program, "--version"], check=True, capture_output=True, text=True).stdout
    if version != "sevctl 0.6.2\n":
        pytest.skip(f"this is about sevctl 0.6.2, not {version.strip()}")
    with (
        running_platform(tmp_path_factory.mktemp("p")) as platform,
        key_service(tmp_path_factory.mktemp("kds"), platform.kds) as environ,
    ):
        host = Host(platform=platform, sevctl=(program,), environ=environ | {"NO_PROXY": "", "no_proxy": ""})
        if host._run("true")[0]:
            pytest.skip("system calls cannot be intercepted here (seccomp user notification)")
        yield host


@pytest.fixture
def host(served: Host) -> Host:
    """The platform after a reset."""
    assert served.ours("reset") == (0, "")
    return served


def _pair(folder: Path, name: str) -> tuple[Path, Path]:
    return folder / f"{name}.cert", folder / f"{name}.key"


def test_both_show_the_same_to_the_letter(host: Host, tmp_path: Path) -> None:
    pair = _pair(tmp_path, "oca")
    assert host.ours("generate", *pair) == (0, "")
    for change in (["rotate"], ["provision", *pair], ["reset"]):
        assert host.ours(*change) == (0, "")
        for what in ("flags", "guests", "identifier", "version"):
            shown = host.ours("show", what)
            assert shown == host.theirs("show", what)
            assert shown[0] == 0
    code, _ = host.theirs("show", "nonsense")
    assert code == host.ours("show", "nonsense")[0] == 2


def test_sevctl_verifies_what_ours_exports_and_refuses_it_under_another_root(host: Host, tmp_path: Path) -> None:
    chain = host.export(tmp_path / "sev.pdh")
    words: Words = ["verify", "--sev", chain, "--ca", host.platform.ask_ark]
    code, tree = host.theirs(*words)
    assert code == 0
    assert "\N{COMBINING SHORT SOLIDUS OVERLAY}" not in tree.split("\n\n")[0]
    assert host.ours(*words)[0] == 0
    damaged = bytearray(chain.read_bytes())
    damaged[1052] ^= 1  # in the PDH's signature; at a damaged key sevctl panics
    (tmp_path / "damaged").write_bytes(damaged)
    assert host.theirs("verify", "--sev", tmp_path / "damaged", "--ca", host.platform.ask_ark)[0] == 1
    assert host.theirs("verify", "--sev", chain)[0] == 1


def test_both_export_the_same_bytes(host: Host, tmp_path: Path) -> None:
    ours, theirs, other = (tmp_path / name for name in ("ours", "theirs", "other"))
    # With the key service that is the default of both.
    assert host.ours("export", "--ca", host.platform.ask_ark, "--cache", tmp_path / "cache", ours) == (0, "")
    assert host.theirs("export", theirs) == (0, "")
    assert ours.read_bytes() == theirs.read_bytes()
    assert host.ours("rotate") == (0, "")
    assert host.theirs("export", other) == (0, "")
    assert other.read_bytes() != theirs.read_bytes()


def test_both_verify_the_host_that_they_are_on(host: Host) -> None:
    words: Words = ["verify", "--ca", host.platform.ask_ark]
    code, tree = host.ours(*words)
    their_code, their_tree = host.theirs(*words)
    assert code == their_code == 0
    assert tree.splitlines() == _COLOUR.sub("", their_tree).splitlines()
    assert host.theirs("verify")[0] == host.ours("verify")[0] == 1, "not AMD's"


def test_quiet_is_as_quiet(host: Host, tmp_path: Path) -> None:
    chain = host.export(tmp_path / "sev.pdh")
    for words in (
        ["verify", "--sev", chain, "--ca", host.platform.ask_ark],
        ["verify", "--sev", chain],
        ["show", "version"],
    ):
        assert host.ours("-q", *words) == host.theirs("-q", *words)


@pytest.mark.parametrize("maker", ["ours", "theirs"])
@pytest.mark.parametrize("taker", ["ours", "theirs"])
def test_an_owner_that_one_makes_takes_the_platform_by_the_other(
    host: Host, tmp_path: Path, maker: str, taker: str
) -> None:
    programs = {"ours": host.ours, "theirs": host.theirs}
    pair, stranger = _pair(tmp_path, "oca"), _pair(tmp_path, "stranger")
    assert programs[maker]("generate", *pair) == (0, "")
    assert programs[maker]("generate", *stranger) == (0, "")
    assert [path.stat().st_size for path in pair] == [2084, 167]
    read_key(pair[1].read_bytes(), read_oca(pair[0].read_bytes()))

    assert programs[taker]("provision", pair[0], stranger[1])[0] != 0
    assert "owned" not in host.theirs("show", "flags")[1]
    assert programs[taker]("provision", *pair) == (0, "")
    assert host.theirs("show", "flags") == (0, "owned\nes\n")
    assert programs[taker]("provision", *pair)[0] != 0, "once"

    chain = host.export(tmp_path / "sev.pdh")
    named: Words = ["verify", "--sev", chain, "--ca", host.platform.ask_ark, "--oca"]
    assert chain.read_bytes()[2 * 2084 : 3 * 2084] == pair[0].read_bytes()
    for verify in programs.values():
        assert verify(*named, pair[0])[0] == 0
        assert verify(*named, stranger[0])[0] == 1


@pytest.mark.parametrize("program", ["ours", "theirs"])
def test_rotate_and_reset_are_the_same_command(host: Host, tmp_path: Path, program: str) -> None:
    run = {"ours": host.ours, "theirs": host.theirs}[program]
    first = host.export(tmp_path / "1").read_bytes()
    assert run("rotate") == (0, "")
    second = host.export(tmp_path / "2").read_bytes()
    assert run("reset") == (0, "")
    third = host.export(tmp_path / "3").read_bytes()
    assert first[:2084] != second[:2084]
    assert first[2084:] == second[2084:]
    assert second[2084 : 2 * 2084] != third[2084 : 2 * 2084]
