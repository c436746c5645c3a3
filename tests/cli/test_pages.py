"""What pages tell a person to type, typed: the commands of docs/identities.md and docs/host-commands.md."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.cli import main

DOCS = Path(__file__).resolve().parents[2] / "docs"


def block(page: str, head: str, beginning: str) -> str:
    """The block of a page's section that begins so."""
    section = (DOCS / page).read_text(encoding="utf-8").split(f"\n{head}\n")[1].split("\n## ")[0]
    blocks = re.findall(r"^```\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    [found] = [str(each) for each in blocks if each.startswith(beginning)]
    return found


def test_a_whole_site_and_its_owner_have_identities(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    commands = block("identities.md", "## Making them: `sevattest pki`", "sevattest pki init pki").splitlines()
    assert len(commands) == 5
    for command in commands:
        program, *words = shlex.split(command)
        assert (program, main(words)) == ("sevattest", 0), command
    assert {file.name for file in (tmp_path / "pki").iterdir()} == {
        f"{name}.{kind}"
        for name in (
            "datacenter-ca",
            "owner-ca",
            "verifier-main",
            "owner-alice",
            "agent-host-1",
            "orchestrator-cluster-1",
        )
        for kind in ("pem", "key")
    }
    # Nothing that exists is overwritten.
    assert main(shlex.split(commands[1])[1:]) == 2


def typed(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """What a shell makes of the lines; whatever they leave behind is ended here."""
    programs = folder / "bin"
    programs.mkdir()
    sevattest = programs / "sevattest"
    call = "import sys\nfrom orchestrator.cli import main\nsys.exit(main())\n"
    sevattest.write_text(f"#!{sys.executable}\n{call}", encoding="utf-8")
    sevattest.chmod(0o755)
    environ = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(DOCS.parent)}
    with subprocess.Popen(
        ["sh", "-uc", script],
        cwd=folder,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as shell:
        try:
            out, err = shell.communicate(timeout=60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(script, shell.returncode, out, err)


@pytest.mark.parametrize("trusted", [True, False])
def test_the_commands_of_a_host_work_without_hardware(tmp_path: Path, *, trusted: bool) -> None:
    state = tmp_path / "p"
    script = block("host-commands.md", "## Without hardware", "sevattest platform serve")
    script = re.sub(r"/tmp/p\b", str(state), script)  # noqa: S108 -- the page's own folder, which is not used
    verify = f"sevattest verify --sev host.pdh --ca {state}/ask_ark.cert"
    assert f"\n{verify}\n" in script
    instead = verify if trusted else "sevattest verify --sev host.pdh"
    said = typed(f"{script.replace(verify, f'{instead}; verdict=$?')}exit $verdict", tmp_path)
    assert said.returncode == (0 if trusted else 1), said.stderr
    assert "\n ⬑ PEK EP384 " in said.stdout
    assert ("none of the trusted roots signed the CEK" in said.stderr) is not trusted
    assert (tmp_path / "host.pdh").stat().st_size == 8336
    assert not (state / "sev.sock").exists()
