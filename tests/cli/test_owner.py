"""Transcripts of `sevattest owner` against a real verifier: the log as evidence, and the way to the verifier."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.transcripts import Said, run
from tests.support.documents import grant
from tests.support.eventually import until
from tests.support.owner_cli import CHECKPOINTS, begin, name, owner, served, write
from tests.support.owner_process import OwnersVerifier, owners_verifier

__all__ = ["name", "served"]  # fixtures
pytestmark = pytest.mark.slow


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
    with owners_verifier(CHECKPOINTS) as one, owners_verifier(CHECKPOINTS) as other:
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
