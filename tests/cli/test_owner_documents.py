"""Transcripts of `sevattest owner` with documents and secrets: applied, shown, compared, erased."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
from pathlib import Path
from uuid import uuid4

import pytest
import yaml

from orchestrator.demo.processes import script
from tests.cli.transcripts import Said
from tests.support.documents import SECRET_GUID, grant, platform, revocation, workload
from tests.support.owner_cli import begin, name, orchestrator, owner, served, write
from tests.support.owner_process import OwnersVerifier
from tests.support.spellings import shown_in

__all__ = ["name", "served"]  # fixtures
pytestmark = pytest.mark.slow


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
    assert ["web", "1", "web.yaml"] in [row.split()[:3] for row in owner(served, "get", "workloads").out.splitlines()]
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
