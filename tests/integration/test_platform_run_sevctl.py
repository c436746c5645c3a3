"""`platform run`: sevctl, a third party's tool of another language, drives the software PSP by its own code.

It looks for a binary in SEVATTEST_SEVCTL, then on the PATH.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.kds_proxy import key_service
from tests.support.platform import Platform, running_platform
from tests.support.sev_host import ask_device, exported_pdh
from tests.support.under import TIMEOUT, run_words

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or os.uname().machine != "x86_64", reason="seccomp filters are written for x86-64 Linux"
)


@pytest.fixture(scope="module")
def sevctl() -> str:
    program = os.environ.get("SEVATTEST_SEVCTL") or shutil.which("sevctl")
    if program is None:
        pytest.skip(
            "no sevctl: `cargo install --root DIR sevctl --version 0.6.2`, then SEVATTEST_SEVCTL=DIR/bin/sevctl"
        )
    return program


@pytest.fixture
def platform(tmp_path: Path) -> Iterator[Platform]:
    with running_platform(tmp_path / "p") as served:
        yield served


def sevctl_says(
    sevctl: str, platform: Platform, *words: str, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """One command of sevctl on this platform, in the folder above the platform's."""
    return subprocess.run(
        run_words(platform, sevctl, *words),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
        cwd=platform.state.parent,
        env={**os.environ, "RUST_BACKTRACE": "0", **(env or {})},
    )


def done(sevctl: str, platform: Platform, *words: str, env: dict[str, str] | None = None) -> str:
    ended = sevctl_says(sevctl, platform, *words, env=env)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_it_shows_what_the_platform_is(sevctl: str, platform: Platform) -> None:
    assert done(sevctl, platform, "show", "version") == "1.55.24\n"
    assert done(sevctl, platform, "show", "flags") == "es\n"
    assert done(sevctl, platform, "show", "guests") == "0\n"
    chip = ask_device(platform, 8, b"\x40\0\0\0")[4:]
    assert done(sevctl, platform, "show", "identifier") == f"{chip.hex().upper()}\n"


def test_its_checks_of_the_device_pass_where_the_processor_lets_it_come_to_them(
    sevctl: str, platform: Platform
) -> None:
    said = sevctl_says(sevctl, platform, "ok").stdout
    lines = [line for line in said.splitlines() if "/dev/sev" in line]
    assert len(lines) == 2
    assert all("PASS" in line or "SKIP" in line for line in lines)


def test_it_exports_a_chain_that_it_verifies_and_no_altered_one(
    sevctl: str, platform: Platform, tmp_path: Path
) -> None:
    with key_service(tmp_path, platform.kds) as env:
        done(sevctl, platform, "export", "chain", env=env)
    chain = (tmp_path / "chain").read_bytes()
    assert len(chain) == 4 * 2084
    assert chain[:2084] == exported_pdh(platform).raw
    verify = ("verify", "--sev", "chain", "--ca", str(platform.ask_ark))
    assert "PDH EP384" in done(sevctl, platform, *verify)
    for at in (100, 2084 + 100, 3 * 2084 + 1100):
        altered = bytearray(chain)
        altered[at] ^= 1
        (tmp_path / "chain").write_bytes(altered)
        # 1 with a sentence, or 101 where a point is off the curve, at which it panics.
        assert sevctl_says(sevctl, platform, *verify).returncode in {1, 101}
    with key_service(tmp_path, tmp_path) as env:  # a service that knows no chip
        assert sevctl_says(sevctl, platform, "export", "other", env=env).returncode != 0


def test_it_gives_the_platform_another_pdh(sevctl: str, platform: Platform) -> None:
    before = exported_pdh(platform)
    chain = ask_device(platform, 5, (2084).to_bytes(4, "little") + (6252).to_bytes(4, "little"))[8 + 2084 :]
    done(sevctl, platform, "rotate")
    assert exported_pdh(platform) != before
    assert ask_device(platform, 5, (2084).to_bytes(4, "little") + (6252).to_bytes(4, "little"))[8 + 2084 :] == chain


def test_it_owns_the_platform_once_and_gives_it_back(sevctl: str, platform: Platform, tmp_path: Path) -> None:
    done(sevctl, platform, "generate", "oca.cert", "oca.key")
    before = exported_pdh(platform)
    done(sevctl, platform, "provision", "oca.cert", "oca.key")
    assert done(sevctl, platform, "show", "flags") == "owned\nes\n"
    assert exported_pdh(platform) != before
    with key_service(tmp_path, platform.kds) as env:
        done(sevctl, platform, "export", "chain", env=env)
    verify = ("verify", "--sev", "chain", "--ca", str(platform.ask_ark), "--oca", "oca.cert")
    assert "OCA EP384" in done(sevctl, platform, *verify)
    again = sevctl_says(sevctl, platform, "provision", "oca.cert", "oca.key")
    assert again.returncode != 0
    assert "AlreadyOwned" in again.stderr
    done(sevctl, platform, "reset")
    assert done(sevctl, platform, "show", "flags") == ""  # not initialised: the firmware tells no flags
    done(sevctl, platform, "rotate")
    assert done(sevctl, platform, "show", "flags") == "es\n"


def test_an_owners_certificate_that_is_not_self_signed_is_refused(
    sevctl: str, platform: Platform, tmp_path: Path
) -> None:
    done(sevctl, platform, "generate", "oca.cert", "oca.key")
    altered = bytearray((tmp_path / "oca.cert").read_bytes())
    altered[1044 + 8] ^= 1  # in its own signature
    (tmp_path / "oca.cert").write_bytes(altered)
    refused = sevctl_says(sevctl, platform, "provision", "oca.cert", "oca.key")
    assert refused.returncode != 0
    assert "BadSignature" in refused.stderr
    assert done(sevctl, platform, "show", "flags") == "es\n"
