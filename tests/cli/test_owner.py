"""Transcripts of `sevattest owner` against a real verifier: the owner's day, and what goes wrong in it."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml

from common.errors import SevattestError
from common.rpc.client import call
from orchestrator.demo.processes import script
from sevattest.v1 import platform_pb2, verifier_service_pb2
from tests.cli.transcripts import Said, run
from tests.support.documents import CALLER, SECRET_GUID, grant, platform, revocation, workload
from tests.support.eventually import until
from tests.support.owner_process import OwnersVerifier, owners_verifier
from tests.support.spellings import shown_in

pytestmark = pytest.mark.slow
_CHECKPOINTS = "[audit]\ncheckpoint_records = 1\n\n[limits]\nsweep_interval = 1\n"


@pytest.fixture(scope="module")
def served() -> Iterator[OwnersVerifier]:
    with owners_verifier(_CHECKPOINTS) as serving:
        yield serving


@pytest.fixture
def name() -> str:
    """A name of the test's own: the verifier is shared."""
    return f"n-{uuid4().hex[:12]}"


def owner(served: OwnersVerifier, *words: str | Path) -> Said:
    return run("owner", *words, environ=served.environ)


def write(folder: Path, content: dict[str, Any], file: str = "document.yaml") -> Path:
    path = folder / file
    path.write_text(json.dumps(content) if file.endswith(".json") else yaml.safe_dump(content, sort_keys=False))
    return path


def begin(served: OwnersVerifier, name: str, *, release: bool = False) -> str:
    """A launch of `web` by the orchestrator `name`; with `release` it is refused for its measurement."""

    async def ask() -> str:
        async with served.site.channel(served.launches, name=name) as channel:
            stub = served.site.stub(channel)
            request = verifier_service_pb2.BeginLaunchRequest(
                request_id=str(uuid4()),
                platform=platform_pb2.PlatformEvidence(chain=served.site.platform.chain.to_bytes()),
                workload="web",
            )
            begun = await call(stub.BeginLaunch, request, timeout=20, mutating=True)
            if release:
                measured = verifier_service_pb2.ReleaseSecretRequest(
                    request_id=str(uuid4()),
                    launch_id=begun.launch.launch_id,
                    measurement=bytes(48),
                    firmware=platform_pb2.FirmwareVersion(api_major=1, api_minor=55, build=24),
                )
                with pytest.raises(SevattestError):
                    await call(stub.ReleaseSecret, measured, timeout=20, mutating=True)
            return str(begun.launch.launch_id)

    return asyncio.run(ask())


def orchestrator(name: str) -> str:
    return f"spiffe://datacenter.example/orchestrator/{name}"


# Documents.


def test_a_document_is_applied_shown_and_deleted(served: OwnersVerifier, tmp_path: Path, name: str) -> None:
    file = write(tmp_path, grant(name))
    assert owner(served, "apply", "-f", file) == Said(out=f"grant {name} 1: applied\n", err="", code=0)
    assert owner(served, "apply", "-f", file) == Said(out=f"grant {name} 1: unchanged\n", err="", code=0)
    shown = yaml.safe_load(owner(served, "get", "grant", name).out)
    assert shown["spec"]["launches"] == 10
    assert shown == json.loads(owner(served, "get", "grants", name, "-o", "json").out)
    assert owner(served, "delete", "Grant", name) == Said(out=f"grant {name}: deleted\n", err="", code=0)
    gone = owner(served, "get", "grant", name)
    assert gone == Said(out="", err=f"sevattest: there is no Grant {name}\n", code=2)
    assert owner(served, "delete", "grant", name).code == 2


def test_a_list_shows_what_is_in_force_and_where_it_is_from(served: OwnersVerifier, tmp_path: Path, name: str) -> None:
    for version in ("1", "2"):
        owner(served, "apply", "-f", write(tmp_path, grant(name, version)))
    head, *rows = owner(served, "get", "grant").out.splitlines()
    assert head.split() == ["NAME", "VERSION", "FROM", "APPLIED", "SHA256"]
    assert [row.split()[:3] for row in rows if row.startswith(name)] == [[name, "2", "applied"]]
    rows = owner(served, "get", "grant", "--all-versions").out.splitlines()
    assert [row.split()[1] for row in rows if row.startswith(name)] == ["2", "1"]
    assert "web   1        web.yaml" in owner(served, "get", "workloads").out
    assert name in [each["metadata"]["name"] for each in json.loads(owner(served, "get", "grant", "--json").out)]


def test_every_kind_and_json_can_be_applied_together(served: OwnersVerifier, tmp_path: Path, name: str) -> None:
    files = [
        write(tmp_path, workload(name), "w.yaml"),
        write(tmp_path, platform(name, cek=uuid4().hex * 2), "p.json"),
        write(tmp_path, revocation(name, ceks=["cd" * 32]), "r.yaml"),
    ]
    said = owner(served, "apply", "-f", *files)
    assert said.out.splitlines() == [f"{each} {name} 1: applied" for each in ("workload", "platform", "revocation")]
    objects = json.loads(owner(served, "apply", "--json", "-f", *files).out)
    assert [each["changed"] for each in objects] == [False, False, False]


def test_one_bad_file_leaves_the_others_unapplied(served: OwnersVerifier, tmp_path: Path, name: str) -> None:
    good, bad = write(tmp_path, grant(name), "good.yaml"), write(tmp_path, grant(name, launches=0), "bad.yaml")
    said = owner(served, "apply", "-f", good, bad)
    assert (said.out, said.code) == ("", 2)
    assert said.err.startswith(f"sevattest: {bad}: spec.launches: ")
    assert owner(served, "get", "grant", name).code == 2


def test_a_dry_run_changes_nothing(served: OwnersVerifier, tmp_path: Path, name: str) -> None:
    file = write(tmp_path, grant(name))
    assert owner(served, "apply", "--dry-run", "-f", file).out == f"grant {name} 1: would be applied\n"
    assert owner(served, "get", "grant", name).code == 2
    owner(served, "apply", "-f", file)
    assert owner(served, "apply", "--dry-run", "-f", file).out == f"grant {name} 1: would stay as it is\n"
    conflict = owner(served, "apply", "--dry-run", "-f", write(tmp_path, grant(name, launches=11)))
    assert conflict.code == owner(served, "apply", "-f", file.with_name("document.yaml")).code == 1
    assert "give it another metadata.version" in conflict.err


def test_what_is_no_document_is_refused_before_anybody_is_asked(served: OwnersVerifier, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    (tmp_path / "a.json").write_text("kind: Grant")
    for file, sentence in (
        ("empty", "is empty"),
        ("bytes", "is not UTF-8 text"),
        ("a.json", "is no JSON object"),
    ):
        path = tmp_path / file
        assert owner(served, "apply", "-f", path) == Said(out="", err=f"sevattest: {path}: {sentence}\n", code=2)
    missing = owner(served, "apply", "-f", tmp_path / "none")
    assert missing == Said(out="", err=f"sevattest: {tmp_path}/none: No such file or directory\n", code=2)


def test_warnings_go_to_stderr(served: OwnersVerifier, tmp_path: Path, name: str) -> None:
    said = owner(served, "apply", "-f", write(tmp_path, workload(name, policy={"allow": ["debug"]})))
    assert said.out == f"workload {name} 1: applied\n"
    assert "warning: spec.policy.allow: the policy allows debugging: the host can read the guest's memory\n" in said.err


def test_a_diff_shows_what_would_change_and_ends_with_1(served: OwnersVerifier, tmp_path: Path, name: str) -> None:
    file = write(tmp_path, grant(name))
    new = owner(served, "diff", "-f", file)
    assert new.code == 1
    assert f"--- grant {name} (none)" in new.out
    owner(served, "apply", "-f", file)
    assert owner(served, "diff", "-f", file) == Said(out="", err="", code=0)
    changed = owner(served, "diff", "-f", write(tmp_path, grant(name, "2", launches=12)))
    assert changed.code == 1
    lines = changed.out.splitlines()
    assert "-  launches: 10" in lines
    assert "+  launches: 12" in lines
    same_version = owner(served, "diff", "-f", write(tmp_path, grant(name, launches=13)))
    assert same_version.code == 1
    assert "+  launches: 13" in same_version.out
    assert "give it another metadata.version" in same_version.err


def test_a_grant_is_described_with_what_is_spent(served: OwnersVerifier, tmp_path: Path, name: str) -> None:
    owner(served, "apply", "-f", write(tmp_path, grant(name, callers=[orchestrator(name)])))
    begin(served, name)
    lines = owner(served, "describe", "grant", name).out.splitlines()
    assert lines[:3] == [f"grant {name}", "  can be spent", "  released 0 of 10, open 1 of 2, refused 0"]
    assert json.loads(owner(served, "describe", "grant", name, "--json").out)["status"]["open"] == 1
    assert f"  grants: {name}" in owner(served, "describe", "workload", "web").out or name in (
        owner(served, "describe", "workload", "web").out
    )
    owner(served, "delete", "grant", name)
    lines = owner(served, "describe", "grant", name).out.splitlines()
    assert lines[1:] == [
        f"  deleted: no version of Grant {name} is on file, so nothing is begun under it; its ledger stays",
        "  released 0, open 1, refused 0",
    ]
    assert owner(served, "describe", "grant", f"{name}-other").code == 2
    assert owner(served, "describe", "platform", name).code == 2


# Secrets.


def test_a_secret_goes_in_and_never_comes_out(served: OwnersVerifier, tmp_path: Path, name: str) -> None:
    value = os.urandom(32)
    file = tmp_path / "secret"
    file.write_bytes(value)
    said = [owner(served, "secret", "put", name, "--file", file)]
    assert said[0] == Said(out=f"secret {name}: version 1, 32 bytes\n", err="", code=0)
    said.append(owner(served, "secret", "put", name, "--file", file))
    assert said[1].out == f"secret {name}: version 2, 32 bytes\n"
    said.append(owner(served, "secret", "list"))
    assert re.search(rf"^{name} +2 +32 +20", said[2].out, re.MULTILINE)
    said.append(owner(served, "secret", "list", "--json"))
    said.append(owner(served, "audit", "list"))
    assert "secret.put" in said[4].out
    said.append(owner(served, "secret", "delete", name))
    assert said[5] == Said(out=f"secret {name}: erased, with all its versions (2)\n", err="", code=0)
    assert owner(served, "secret", "delete", name).code == 2
    assert shown_in(value, *(each.out + each.err for each in said), served.log) == []


def test_a_secret_that_a_workload_names_is_not_erased_by_a_slip(
    served: OwnersVerifier, tmp_path: Path, name: str
) -> None:
    value = tmp_path / "secret"
    value.write_bytes(b"once and never again")
    assert owner(served, "secret", "put", name, "--file", value).code == 0
    secret = {"guid": str(SECRET_GUID), "source": {"stored": name}}
    file = write(tmp_path, workload(name, secrets=[secret]))
    assert owner(served, "apply", "-f", file).code == 0
    said = owner(served, "secret", "delete", name)
    assert (said.out, said.code) == ("", 1)
    assert f"secret {name} is named by workloads on file: {name} 1; nothing was erased" in said.err
    assert "hint: withdraw those workloads first; --allow-used" in said.err
    assert f"\n{name} " in owner(served, "secret", "list").out
    said = owner(served, "secret", "delete", name, "--allow-used")
    assert said == Said(out=f"secret {name}: erased, with all its versions (1)\n", err="", code=0)
    assert f"\n{name} " not in owner(served, "secret", "list").out


def test_a_secret_comes_from_standard_input_too(served: OwnersVerifier, name: str) -> None:
    command = [*script("sevattest"), "owner", "secret", "put", name, "-", "--json"]
    environ = {**os.environ, **served.environ}
    done = subprocess.run(command, input=b"passphrase\n", capture_output=True, check=False, env=environ, timeout=60)
    assert json.loads(done.stdout) == {"name": name, "version": 1, "size": 11}
    assert done.stderr == b"warning: the secret ends with a line's end, which is part of it\n"


def test_a_secret_is_no_argument_and_no_terminal_shows_one(served: OwnersVerifier, tmp_path: Path, name: str) -> None:
    argument = owner(served, "secret", "put", name, "hunter2")
    assert (argument.code, "a secret is no argument" in argument.err, "hunter2" in argument.err) == (2, True, False)
    assert owner(served, "secret", "put", name).code == 2
    empty = tmp_path / "empty"
    empty.touch()
    assert owner(served, "secret", "put", name, "--file", empty).code == 2
    assert owner(served, "secret", "put", name, "-", "--file", empty).code == 2
    large = tmp_path / "large"
    large.write_bytes(bytes(16385))
    assert owner(served, "secret", "put", name, "--file", large).err == (
        f"sevattest: {large}: is larger than 16384 bytes\n"
    )
    leader, follower = pty.openpty()
    try:
        command = [*script("sevattest"), "owner", "secret", "put", name, "-"]
        environ = {**os.environ, **served.environ}
        done = subprocess.run(command, stdin=follower, capture_output=True, check=False, env=environ, timeout=60)
    finally:
        os.close(leader)
        os.close(follower)
    assert done.returncode == 2
    assert b"standard input is a terminal" in done.stderr


# Launches.


def test_launches_are_listed_and_shown(served: OwnersVerifier) -> None:
    launch_id = begin(served, "cluster", release=True)
    listed = owner(served, "launches", "list", "--state", "refused")
    head, *rows = listed.out.splitlines()
    assert head.split() == ["LAUNCH", "STATE", "WORKLOAD", "CALLER", "GRANT", "PLATFORM", "BEGAN", "WHY"]
    [row] = [row for row in rows if row.startswith(launch_id)]
    assert row.split()[1:5] == ["refused", "web", "1", "cluster"]
    assert row.endswith("MEASUREMENT_REFUSED")
    assert launch_id not in owner(served, "launches", "list", "--state", "released").out
    shown = owner(served, "launches", "get", launch_id).out
    assert shown.startswith(f"launch {launch_id}: refused (MEASUREMENT_REFUSED)\n")
    assert "  launch.measurement: " in shown
    assert "  explanation  " in shown
    [found] = [
        each for each in json.loads(owner(served, "launches", "list", "--json").out) if each["launch_id"] == launch_id
    ]
    assert found["caller"] == CALLER
    assert re.fullmatch(r"chip:[0-9a-f]{32}", found["chip"])
    assert f"  in records   {found['chip']}\n" in shown
    assert found["chip"] in owner(served, "audit", "list", "--launch", launch_id, "--json").out
    assert len(json.loads(owner(served, "launches", "list", "--limit", "1", "--json").out)) == 1
    assert owner(served, "launches", "get", str(uuid4())).code == 2
    assert owner(served, "launches", "get", "garbage").code == 2


def test_a_watch_prints_each_change_until_it_is_stopped(served: OwnersVerifier) -> None:
    command = [*script("sevattest"), "owner", "launches", "watch", "--interval", "0.1", "--json"]
    environ = {**os.environ, **served.environ}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ) as process:
        launch_id = begin(served, "cluster", release=True)
        assert process.stdout is not None
        seen = []
        for line in process.stdout:
            launch = json.loads(line)
            if launch["launch_id"] == launch_id:
                seen.append(launch["state"])
            if seen[-1:] == ["refused"]:
                break
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert seen in (["refused"], ["open", "refused"])
    assert (process.returncode, err) == (130, "")


def test_a_watch_on_a_terminal_draws_a_table_over_itself(served: OwnersVerifier) -> None:
    begin(served, "cluster")
    leader, follower = pty.openpty()
    command = [*script("sevattest"), "owner", "launches", "watch", "--interval", "0.1"]
    environ = {**os.environ, **served.environ, "COLUMNS": "80", "LINES": "5"}
    process = subprocess.Popen(command, stdout=follower, stderr=subprocess.PIPE, env=environ)
    os.close(follower)
    try:
        drawn = b""
        while drawn.count(b"\x1b[H") < 3:
            drawn += os.read(leader, 65536)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        _, err = process.communicate(timeout=30)
    finally:
        os.close(leader)
        if process.poll() is None:
            process.kill()
            process.communicate()
    assert (process.returncode, err) == (130, b"")
    frame = drawn.split(b"\x1b[H")[1].replace(b"\x1b[K", b"").replace(b"\x1b[J", b"").decode()
    lines = frame.splitlines()
    assert lines[0].split()[:3] == ["LAUNCH", "STATE", "WHY"]
    assert len(lines) <= 4
    assert max(map(len, lines)) <= 80


# Judgement.


def test_the_impact_of_a_revocation_is_known_before_it_is_applied(
    served: OwnersVerifier, tmp_path: Path, name: str
) -> None:
    launch_id = begin(served, "cluster")
    cek = served.site.platform.chain.cek.fingerprint.hex()
    file = write(tmp_path, revocation(name, ceks=[cek]))
    head, *rows = owner(served, "revocation", "impact", "-f", file).out.splitlines()
    assert head.split() == ["LAUNCH", "STATE", "WORKLOAD", "WHY"]
    [row] = [row for row in rows if row.startswith(launch_id)]
    assert f"revocation {name} 1: the chip: sold" in row
    assert owner(served, "get", "revocation", name).code == 2
    assert (
        json.loads(owner(served, "revocation", "impact", "-f", write(tmp_path, revocation(name)), "--json").out) == []
    )
    assert owner(served, "revocation", "impact", name).code == 2
    assert owner(served, "revocation", "impact").code == 2


def test_a_launch_is_simulated_with_a_verdict_as_exit_code(served: OwnersVerifier, tmp_path: Path, name: str) -> None:
    chain = tmp_path / "chain.cert"
    chain.write_bytes(served.site.platform.chain.to_bytes())
    words = ["simulate", "--workload", "web", "--caller", CALLER, "--chain", str(chain)]
    good = owner(served, *words, "--firmware", "1.55.24")
    assert good == Said(out="accepted: workload version 1\n", err="", code=0)
    unknown = owner(served, *words)
    assert unknown.code == 1
    assert unknown.out.startswith("refused: workload version 1\n  simulate.firmware: ")
    cek = served.site.platform.chain.cek.fingerprint.hex()
    file = write(tmp_path, revocation(name, ceks=[cek]))
    revoked = owner(served, *words, "--firmware", "1.55.24", "-f", file, "--json")
    assert revoked.code == 1
    assert [each["rule"] for each in json.loads(revoked.out)["findings"]] == [
        "platform.chip_revoked",
        "launch.chip_revoked",
    ]
    past = owner(served, "simulate", "--launch", begin(served, "cluster", release=True), "--firmware", "1.55.24")
    assert past.code == 1
    assert "simulate.unproven" in past.out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--workload", "web"], "--caller is needed"),
        (["--launch", "7"], "argument --launch: must be a launch's id, a UUID in lower case"),
        (["--launch", "5f0f2f04-6c3e-4a62-a3f1-52f3cf1f6a0b", "--workload", "web"], "--launch has its own workload"),
        (["--digest", "ab"], "argument --digest: must be a launch digest: 64 hex digits"),
        (["--firmware", "new"], "argument --firmware: "),
    ],
)
def test_a_simulation_that_cannot_be_says_why(served: OwnersVerifier, words: list[str], sentence: str) -> None:
    said = owner(served, "simulate", *words)
    assert (said.out, said.code) == ("", 2)
    assert said.err.startswith(f"sevattest: {sentence}")


# Evidence.


def test_the_log_is_verified_with_kept_keys_and_checkpoints(served: OwnersVerifier, tmp_path: Path, name: str) -> None:
    keys, kept = tmp_path / "jwks.json", tmp_path / "checkpoint"
    keys.write_text(owner(served, "keys").out)
    owner(served, "apply", "-f", write(tmp_path, grant(name)))

    def signed() -> bool:
        said = owner(served, "audit", "verify", "--jwks", keys, "--keep", kept, "--json")
        assert said.code == 0, said.err
        seen = json.loads(said.out)
        return bool(seen["covered"] == seen["records"]) and said.err == ""  # nothing is signed yet, it says at first

    asyncio.run(until(signed))
    again = owner(served, "audit", "verify", "--jwks", keys, "--checkpoint", kept)
    assert again.code == 0
    assert again.out.startswith("the audit log is whole: records 1 to ")
    since = owner(served, "audit", "verify", "--jwks", keys, "--since-checkpoint", kept, "--json")
    number = json.loads(owner(served, "audit", "verify", "--json").out)["records"]
    assert 1 < json.loads(since.out)["first"] <= number + 1


def test_a_log_under_other_keys_or_without_a_kept_checkpoint_is_refused(tmp_path: Path) -> None:
    with owners_verifier(_CHECKPOINTS) as one, owners_verifier(_CHECKPOINTS) as other:
        keys, kept = tmp_path / "jwks.json", tmp_path / "checkpoint"
        keys.write_text(owner(one, "keys").out)
        owner(one, "apply", "-f", write(tmp_path, grant()))

        def signed() -> bool:
            assert owner(one, "audit", "verify", "--keep", kept).code == 0
            return kept.exists()

        asyncio.run(until(signed))
        begin(other, "cluster")
        asyncio.run(until(lambda: json.loads(owner(other, "audit", "verify", "--json").out)["covered"] > 0))
        replaced = owner(other, "audit", "verify", "--jwks", keys)
        assert replaced.code == 1
        assert "a token is signed with a key that is not in the key set" in replaced.err
        assert owner(one, "audit", "verify", "--jwks", keys, "--checkpoint", kept).code == 0


def test_records_are_printed_oldest_first(served: OwnersVerifier, tmp_path: Path, name: str) -> None:
    assert owner(served, "apply", "-f", write(tmp_path, grant(name))).code == 0
    launch_id = begin(served, "cluster", release=True)
    listed = owner(served, "audit", "list", "--json")
    assert (listed.code, listed.err) == (0, "")
    records = [json.loads(line) for line in listed.out.splitlines()]
    assert [each["number"] for each in records] == list(range(1, len(records) + 1))
    assert re.search(rf"  document.applied  Grant  {name}  1  spiffe://", owner(served, "audit", "list").out)
    [applied] = [each for each in records if each.get("name") == name]
    assert (applied["event"], applied["kind"]) == ("document.applied", "Grant")
    said = owner(served, "audit", "list", "--launch", launch_id).out
    assert "launch.begun" in said
    assert "  launch.measurement: " in said
    assert name not in said


def test_the_record_that_a_refusal_names_is_found_by_its_id(served: OwnersVerifier) -> None:
    begin(served, "cluster", release=True)
    records = [json.loads(line) for line in owner(served, "audit", "list", "--json").out.splitlines()]
    refusal = next(each for each in records if each["event"] == "launch.refused")
    found = owner(served, "audit", "list", "--id", refusal["audit_id"], "--json")
    assert ([json.loads(line) for line in found.out.splitlines()], found.code) == ([refusal], 0)
    said = owner(served, "audit", "list", "--id", refusal["audit_id"]).out
    assert said.startswith(f"{refusal['number']}  ")
    assert "  launch.measurement: " in said
    nobody = "00000000-0000-4000-8000-000000000000"
    missed = owner(served, "audit", "list", "--id", nobody)
    assert (missed.out, missed.err, missed.code) == ("", f"sevattest: there is no record {nobody}\n", 2)
    assert owner(served, "audit", "list", "--id", "17").code == 2


# The way there.


def test_a_mistyped_line_pays_for_no_network() -> None:
    code = (
        "import sys, orchestrator.cli; orchestrator.cli.main(['owner', 'frobnicate']);"
        "print([m for m in ('asyncio', 'cryptography', 'google', 'grpc') if m in sys.modules])"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert loaded.stdout == "[]\n"
    assert "invalid choice: 'frobnicate'" in loaded.stderr


@pytest.mark.parametrize("address", ["nowhere", "nowhere.example:", "unix:/run/x:1", "a b:1", "http://x:1"])
def test_what_is_no_address_is_not_called(served: OwnersVerifier, address: str) -> None:
    said = owner(served, "keys", "--admin", address)
    assert said == Said(out="", err=f"sevattest: '{address}' is not an address to call (HOST:PORT)\n", code=2)


def test_a_change_at_a_name_that_leads_nowhere_was_not_made(served: OwnersVerifier, tmp_path: Path, name: str) -> None:
    said = owner(served, "apply", "-f", write(tmp_path, grant(name)), "--admin", "nowhere.invalid:1")
    assert (said.out, said.code) == ("", 3)
    assert "the service cannot be reached: " in said.err


def test_what_is_missing_is_named(served: OwnersVerifier) -> None:
    assert run("owner", "keys") == Said(
        out="", err="sevattest: --admin is needed\nhint: give it, or set SEVATTEST_OWNER_ADMIN\n", code=2
    )
    assert run("owner").code == 2
    assert run("owner", "keys", "--admin", "x:1").err.startswith("sevattest: --tls-cert is needed\n")
    assert owner(served, "keys", "--timeout", "0").code == 2


def test_options_come_before_the_environment(served: OwnersVerifier) -> None:
    said = owner(served, "keys", "--admin", "127.0.0.1:1", "--timeout", "5")
    assert said.code == 3
    assert said.err.startswith("sevattest: the service cannot be reached: ")


def test_an_owner_at_the_orchestrators_listener_is_told_that_it_may_be_the_wrong_one(
    served: OwnersVerifier, tmp_path: Path, name: str
) -> None:
    file = write(tmp_path, grant(name))
    said = owner(served, "apply", "-f", file, "--admin", served.launches, "--timeout", "5")
    assert (said.out, said.code) == ("", 3)
    assert "this is the wrong listener: a verifier has one for orchestrators and another for owners" in said.err
    assert owner(served, "apply", "-f", file).err == ""


def test_an_orchestrators_identity_is_turned_away(served: OwnersVerifier) -> None:
    from common.rpc.identity import Role

    pair = served.site.pki.issue(Role.ORCHESTRATOR, "cluster")
    said = owner(served, "keys", "--tls-cert", str(pair.cert), "--tls-key", str(pair.key), "--timeout", "5")
    assert said.code == 3
    assert "it does not accept this client's certificate" in said.err
    assert "Traceback" not in said.err
