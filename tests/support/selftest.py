"""`sev-host-agent selftest` run by a test: its steps, its verdicts, what it must not leave, and a host that lies."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence

from tests.support.agent_site import REPOSITORY, Site
from tests.support.sev_host import wait_for_no_guest

AGENT = (sys.executable, "-c", "import sys; from host_agent.cli import main; sys.exit(main())")
STEPS = [
    "platform.answers",
    "chain.exported",
    "chain.links",
    "chain.root",
    "pdh.stable",
    "guest.files",
    "session.made",
    "guest.started",
    "guest.sev_state",
    "measurement.read",
    "measurement.matches",
    "secret.tampered",
    "secret.injected",
    "report.verified",
    "pdh.unchanged",
    "guest.paused",
    "guest.ended",
]
# Between the agent and the machine's program: does to its words what the test says, and becomes it.
_DISHONEST = """\
import os, subprocess, sys
words = sys.argv[2:]
def put(option, value): words[words.index(option) + 1] = value
def swap(old, new):
    assert any(old in word for word in words), (old, words)
    words[:] = [word.replace(old, new) for word in words]
exec(sys.argv[1])
os.execv(words[0], words)
"""


def selftest(site: Site, *words: object) -> tuple[int, dict[str, str], str]:
    """Run it on a site: exit code, verdict by step in their order, and everything that was printed."""
    site.write_config()
    return run_selftest([*AGENT, "selftest", "--config", str(site.config), *map(str, words)])


def run_selftest(command: list[str]) -> tuple[int, dict[str, str], str]:
    """The same of a command."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100, cwd=REPOSITORY)
    assert done.stderr == ""
    lines = re.findall(r"^(PASS|FAIL|SKIP) ([a-z_.]+): .+$", done.stdout, re.MULTILINE)
    return done.returncode, {name: verdict for verdict, name in lines}, done.stdout


def rooted(site: Site) -> list[object]:
    """The words that name the platform's root and its signed CEK."""
    return ["--kds", site.platform.kds, "--ca", site.platform.ask_ark]


def assert_nothing_is_left(site: Site) -> None:
    """No machine, no file, and no guest on the platform."""
    assert site.machines() == []
    assert [*(site.root / "state").glob("selftest-*")] == []
    wait_for_no_guest(site.platform)


def first_failure(found: dict[str, str]) -> str | None:
    """The step that failed first; None where all went well."""
    return next((name for name, verdict in found.items() if verdict == "FAIL"), None)


def dishonest(site: Site, edit: str, program: Sequence[str]) -> list[str]:
    """The program, with its words changed on the way as `edit` says."""
    script = site.root / "dishonest.py"
    script.write_text(_DISHONEST.replace("exec(", f"DEVICE = {str(site.platform.socket)!r}\nexec(", 1))
    return [sys.executable, str(script), edit, *program]
