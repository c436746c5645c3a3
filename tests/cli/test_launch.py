"""Transcripts of `sevattest launch` where no service answers: what a person reads on which stream, and exit codes."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.rpc.identity import Role
from orchestrator.demo.processes import script
from tests.cli.transcripts import Said, run
from tests.support.pki import Pki


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    made = Pki(tmp_path_factory.mktemp("pki"))
    made.issue(Role.ORCHESTRATOR)
    return made


@pytest.fixture
def nowhere() -> Iterator[str]:
    """An address that nobody listens at: bound, so that nobody else gets it."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{bound.getsockname()[1]}"


def words(pki: Pki, where: str, *more: str) -> list[str]:
    pair = pki.issue(Role.ORCHESTRATOR)
    return [
        *("launch", "web", "--workload", "shop", "--agent", where, "--verifier", where),
        *("--tls-cert", str(pair.cert), "--tls-key", str(pair.key)),
        *("--agent-ca", str(pki.datacenter_ca), "--verifier-ca", str(pki.owner_ca)),
        *more,
    ]


def test_without_arguments_it_says_what_is_missing() -> None:
    assert run("launch") == Said(
        out="",
        err="sevattest: the following arguments are required: GUEST, --workload, --agent, --verifier, --tls-cert, "
        "--tls-key\nhint: sevattest launch --help\n",
        code=2,
    )


def test_without_a_ca_it_says_which_options_name_one(pki: Pki, nowhere: str) -> None:
    given = words(pki, nowhere)
    assert run(*given[: given.index("--agent-ca")]) == Said(
        out="",
        err="sevattest: the CAs of both sides are needed\n"
        "hint: give --agent-ca and --verifier-ca, or --tls-ca where one CA signs for both\n",
        code=2,
    )


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("--timeout", "0", "argument --timeout: must be more than 0 and at most 3600 seconds"),
        ("--timeout", "nan", "argument --timeout: must be more than 0 and at most 3600 seconds"),
        ("--timeout", "soon", "argument --timeout: must be more than 0 and at most 3600 seconds"),
        ("--request-id", "7", "argument --request-id: must be a UUID of 36 characters in lower case"),
    ],
)
def test_a_value_that_cannot_be_is_refused(pki: Pki, nowhere: str, option: str, value: str, sentence: str) -> None:
    said = run(*words(pki, nowhere, option, value))
    assert said == Said(out="", err=f"sevattest: {sentence}\nhint: sevattest launch --help\n", code=2)


def test_a_missing_certificate_is_named(pki: Pki, nowhere: str, tmp_path: Path) -> None:
    given = words(pki, nowhere)
    given[given.index("--tls-cert") + 1] = str(tmp_path / "none.pem")
    said = run(*given)
    assert said.code == 2
    assert said.out == ""
    assert said.err.startswith(f"sevattest: {tmp_path}/none.pem: ")
    assert "Traceback" not in said.err


def test_a_servers_certificate_is_no_orchestrators(pki: Pki, nowhere: str) -> None:
    pair = pki.issue(Role.AGENT)
    given = words(pki, nowhere)
    given[given.index("--tls-cert") + 1] = str(pair.cert)
    given[given.index("--tls-key") + 1] = str(pair.key)
    said = run(*given)
    assert said.code == 2
    assert str(pair.cert) in said.err


def test_an_agent_that_is_not_there_ends_it_with_3(pki: Pki, nowhere: str) -> None:
    said = run(*words(pki, nowhere, "--timeout", "0.4"))
    assert said.code == 3
    assert said.out.startswith("export ")
    assert said.out.endswith("failed  (attempt 2)\n")
    first, last = said.err.splitlines()
    assert first.startswith("sevattest: export: the service cannot be reached: ")
    assert first.endswith("; trying again in 0.25 s")
    assert last.startswith("sevattest: export: the service cannot be reached: ")
    assert last.endswith("(UNREACHABLE)")


def test_an_agent_that_is_not_there_is_json_too(pki: Pki, nowhere: str) -> None:
    said = run(*words(pki, nowhere, "--timeout", "0.2", "--json"))
    assert said.code == 3
    seen = json.loads(said.out)
    assert (seen["state"], seen["reason"], seen["launch_id"]) == ("failed", "UNREACHABLE", None)
    assert [step["name"] for step in seen["steps"]] == ["export"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_an_interrupted_launch_says_so_without_a_traceback(
    pki: Pki, nowhere: str, number: signal.Signals, code: int
) -> None:
    command = [*script("sevattest"), *words(pki, nowhere)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        first = process.stderr.readline()
        process.send_signal(number)
        _, rest = process.communicate(timeout=30)
    assert "trying again" in first
    assert rest.splitlines()[-1] == "sevattest: interrupted; the launch was given up"
    assert "Traceback" not in rest
    assert process.returncode == code


def test_a_hangup_that_is_ignored_ends_no_launch(pki: Pki, nowhere: str) -> None:
    ignoring = ["sh", "-c", 'trap "" HUP; exec "$@"', "sh"]
    command = [*ignoring, *script("sevattest"), *words(pki, nowhere, "--timeout", "1")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        process.stderr.readline()
        process.send_signal(signal.SIGHUP)
        process.communicate(timeout=30)
    assert process.returncode == 3


def test_a_closed_pipe_is_no_error(pki: Pki, nowhere: str) -> None:
    command = [*script("sevattest"), *words(pki, nowhere, "--timeout", "0.3", "--json")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        process.stdout.close()
        assert process.stderr
        said = process.stderr.read()
    assert "Traceback" not in said
