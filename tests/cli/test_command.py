"""`sevattest` itself, whatever the command: how it ends where nobody listens, and where nobody can read the words."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from common.command import run_command
from common.rpc.identity import Role
from orchestrator.cli import pki
from tests.support.chains import make_platform

_PROGRAM = [sys.executable, "-c", "import sys; from orchestrator.cli import main; sys.exit(main())"]

_NOBODY = ["--admin", "127.0.0.1:1", "--tls-cert", "c", "--tls-key", "k", "--admin-ca", "a"]


@pytest.fixture(scope="module")
def forged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates that AMD never signed."""
    file = tmp_path_factory.mktemp("forged") / "sev.pdh"
    file.write_bytes(make_platform().chain.to_bytes())
    return file


@pytest.fixture
def nobody() -> Iterator[int]:
    """A pipe whose reader went away."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


def _run(
    *words: str | Path, stdout: int = subprocess.PIPE, stderr: int = subprocess.PIPE
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*_PROGRAM, *words], check=False, timeout=60, stdout=stdout, stderr=stderr)


def test_a_verdict_that_nobody_could_read_is_never_a_success(forged: Path, nobody: int) -> None:
    done = _run("verify", "--sev", forged, stdout=nobody)
    assert done.returncode not in {0, 120}  # 120: the interpreter complains while it exits
    assert done.stderr == b""


def test_a_success_that_nobody_could_read_ends_as_the_shell_says_of_a_closed_pipe(nobody: int) -> None:
    done = _run("--help", stdout=nobody)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("package", ["orchestrator", "host_agent", "verifier"])
def test_every_program_tells_a_closed_pipe_from_success_and_bad_words_from_both(package: str, nobody: int) -> None:
    program = [sys.executable, "-c", f"import sys; from {package}.cli import main; sys.exit(main())"]
    unread = subprocess.run([*program, "--help"], check=False, timeout=60, stdout=nobody, stderr=subprocess.PIPE)
    assert (unread.returncode, unread.stderr) == (141, b"")
    wrong = subprocess.run([*program, "frobnicate"], check=False, timeout=60, stdout=nobody, stderr=nobody)
    assert wrong.returncode == 2


@pytest.mark.parametrize("words", [["frobnicate"], ["verify", "--sev", "/nowhere"], ["pki", "issue"], []])
def test_bad_input_is_bad_input_though_the_complaint_cannot_be_read(words: list[str], nobody: int) -> None:
    assert _run(*words, stdout=nobody, stderr=nobody).returncode == 2


@pytest.mark.parametrize(("number", "other"), [(1, "stderr"), (2, "stdout")])
def test_a_command_that_is_started_without_a_stream_still_gives_its_verdict(
    forged: Path, number: int, other: str
) -> None:
    shell = ["sh", "-c", f'exec "$@" {number}>&-', "sh", *_PROGRAM, "verify", "--sev", str(forged)]
    done = subprocess.run(shell, check=False, capture_output=True, timeout=60)
    assert done.returncode == 1
    said: bytes = getattr(done, other)
    assert b"Traceback" not in said
    # What was meant for the missing stream does not turn up in the other one.
    assert (b"verification failed" in said, b"PDH EP384" in said) == (other == "stderr", other == "stdout")


@pytest.mark.parametrize("given", ["<&-", "</dev/null"])
def test_a_command_that_is_started_without_its_input_reads_none(given: str) -> None:
    shell = ["sh", "-c", f'exec "$@" {given}', "sh", *_PROGRAM, "owner", "apply", "-f", "-", *_NOBODY]
    done = subprocess.run(shell, check=False, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (2, b"sevattest: standard input: is empty\n")


def test_a_name_that_is_no_text_is_bad_input(tmp_path: Path) -> None:
    pki.init(tmp_path)
    owner = pki.issue(tmp_path, Role.OWNER, "o")
    reached: list[str | Path] = ["--admin", "127.0.0.1:1", "--admin-ca", tmp_path / "owner-ca.pem"]
    done = _run("owner", "get", "workload", "\udcff", *reached, "--tls-cert", owner.cert, "--tls-key", owner.key)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == b"sevattest: a word of the command is not UTF-8 text: '\\udcff'\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_words_that_the_terminal_cannot_show_are_spelt_out(encoding: str) -> None:
    done = subprocess.run(
        [*_PROGRAM, "--help"],
        check=False,
        capture_output=True,
        timeout=60,
        env=os.environ | {"PYTHONIOENCODING": encoding},
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"usage: sevattest COMMAND \\u2026" in done.stdout


def test_a_folder_whose_name_is_no_text_can_be_written_to(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/p\xff"
    done = subprocess.run(
        [*_PROGRAM, "pki", "init", folder],
        check=False,
        capture_output=True,
        timeout=60,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert len(os.listdir(folder)) == 4  # noqa: PTH208 -- the name is bytes


@pytest.mark.parametrize(
    ("package", "library", "extra", "words"),
    [
        ("verifier", "yaml", "verifier", ["check-config", "--config", "/nowhere"]),
        ("verifier", "yaml", "verifier", ["keygen", "/nowhere/kek.bin"]),
        ("host_agent", "qemu", "agent", ["check-config", "--config", "/nowhere"]),
        ("host_agent", "qemu", "agent", ["doctor"]),
    ],
)
def test_a_program_without_its_extra_says_which_and_not_where_it_fell_over(
    package: str, library: str, extra: str, words: list[str]
) -> None:
    code = f"import sys; sys.modules['{library}'] = None; from {package}.cli import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code, *words], check=False, timeout=60, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    program = {"verifier": "sev-verifier", "host_agent": "sev-host-agent"}[package]
    assert done.stderr == f"{program}: needs the extra sevattest[{extra}]\nhint: pip install 'sevattest[{extra}]'\n"


def test_a_module_that_no_extra_brings_is_missing_loudly() -> None:
    def command() -> int:
        raise ModuleNotFoundError(name="common.nothing")

    with pytest.raises(ModuleNotFoundError):
        run_command("program", command, extras={"yaml": "verifier"})


@pytest.mark.parametrize(
    ("package", "words", "said"),
    [
        ("orchestrator", ["owner", "get", "grants", "--bogus"], "sevattest owner get --help"),
        ("orchestrator", ["receipt", "verify", "file", "--jwks", "file", "--bogus"], "sevattest receipt verify --help"),
        ("orchestrator", ["launch", "web", "--bogus"], "sevattest launch --help"),
        ("verifier", ["health", "--config", "file", "--bogus"], "sev-verifier health --help"),
        ("host_agent", ["health", "--config", "file", "--bogus"], "sev-host-agent health --help"),
    ],
)
def test_a_word_that_is_too_much_is_explained_by_the_command_that_does_not_know_it(
    package: str, words: list[str], said: str
) -> None:
    program = [sys.executable, "-c", f"import sys; from {package}.cli import main; sys.exit(main())"]
    done = subprocess.run([*program, *words], check=False, timeout=60, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"hint: {said}"


@pytest.mark.parametrize(
    ("package", "program"),
    [("orchestrator", "sevattest"), ("verifier", "sev-verifier"), ("host_agent", "sev-host-agent")],
)
def test_every_program_says_its_version(package: str, program: str) -> None:
    called = [sys.executable, "-c", f"import sys; from {package}.cli import main; sys.exit(main())", "--version"]
    done = subprocess.run(called, check=False, timeout=60, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{program} {version('sevattest')}\n", "")
