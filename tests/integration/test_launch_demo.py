"""`sevattest demo`, honest and with each dishonest host: what it shows, how it ends, and that the owner is not told.

Each run is the real command in a process of its own, with `--keep`, so that what every party had on file can be read.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from emulator.firmware_image import build_image
from orchestrator.demo.artefacts import CURRENT, VERSIONS, installed_ovmf
from orchestrator.demo.site import SECRET_GUID, Site
from orchestrator.demo.tamper import Tamper
from tests.cli.transcripts import run

pytestmark = pytest.mark.slow

# What the owner's side is made of; keys, certificates, the secret and state are born anew in each run.
OWNER_FILES = ("verifier.toml", "documents", "artefacts")


@dataclass(frozen=True)
class Shown:
    """One run: its JSON, its exit code, and the folder that it left."""

    told: dict[str, Any]
    code: int
    folder: Path

    def owner_files(self) -> dict[str, bytes]:
        """The owner's configuration, documents and reference artefacts, by path."""
        owner = self.folder / "owner"
        found = [path for name in OWNER_FILES for path in [owner / name, *(owner / name).rglob("*")] if path.is_file()]
        return {str(path.relative_to(owner)): path.read_bytes() for path in found}


@pytest.fixture(scope="module")
def shown(request: pytest.FixtureRequest) -> Iterator[Shown]:
    """One run of each mode; module-scoped, so that pytest takes the tests mode by mode."""
    mode = str(request.param)
    # Not tmp_path: it is too long for the sockets that come into it.
    with tempfile.TemporaryDirectory(prefix="sev-") as folder:
        tamper = [] if mode == "honest" else [f"--tamper={mode}"]
        said = run("demo", "--machine", "builtin", "--json", "--keep", folder, *tamper, timeout=100)
        assert said.out, said.err
        yield Shown(told=json.loads(said.out), code=said.code, folder=Path(folder))


def of(*modes: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("shown", modes, indirect=True, scope="module")


REFUSED_AT_RELEASE = [str(mode) for mode in Tamper if mode is not Tamper.CHAIN]


@of("honest")
def test_an_honest_host_ends_with_the_secret_in_the_guest(shown: Shown) -> None:
    assert shown.code == 0
    launch = shown.told["launch"]
    assert launch["state"] == "running"
    assert [step["name"] for step in launch["steps"]] == [
        "export",
        "begin",
        "start",
        "measure",
        "release",
        "inject",
        "resume",
    ]
    on_file = (shown.folder / "owner" / "disk-passphrase").read_text()
    assert shown.told["secrets"] == [{"guid": SECRET_GUID, "size": len(on_file), "text": on_file}]
    receipt = launch["receipt"]["submods"]["sev"]
    assert receipt["ear_verifier_claims"]["sevattest.launch_id"] == launch["launch_id"]
    assert receipt["ear_status"] == "contraindicated"  # the platform is emulated: no claim makes up for that
    assert launch["receipt_token"].count(".") == 2
    assert shown.told["explanation"] is None


@of("honest")
def test_the_tree_leads_to_the_platforms_own_root(shown: Shown) -> None:
    kinds = [next(word for word in line.split() if word.isupper()) for line in shown.told["tree"][:6]]
    assert kinds == ["PDH", "PEK", "OCA", "CEK", "ASK", "ARK"]
    assert not any("\u0338" in line or "\u0337" in line for line in shown.told["tree"][:6])


@of("honest")
def test_no_secret_and_no_key_is_in_a_log_or_on_the_hosts_side(shown: Shown) -> None:
    secret = (shown.folder / "owner" / "disk-passphrase").read_bytes()
    kek = (shown.folder / "owner" / "kek.bin").read_bytes()
    logs = list((shown.folder / "logs").iterdir())
    host = [path for path in (shown.folder / "host").rglob("*") if path.is_file() and path.suffix != ".serial"]
    assert logs
    assert host
    for path in [*logs, *host]:
        data = path.read_bytes()
        for canary in (secret, secret.hex().encode(), kek, kek.hex().encode()):
            assert canary not in data, path


@of(*REFUSED_AT_RELEASE)
def test_a_dishonest_host_is_refused_at_release(shown: Shown) -> None:
    assert shown.code == 1
    launch = shown.told["launch"]
    assert (launch["state"], launch["reason"]) == ("refused", "MEASUREMENT_REFUSED")
    assert launch["steps"][-1]["name"] == "release"
    assert launch["receipt"] is None
    assert shown.told["explanation"]["audit_id"] == launch["audit_id"]


@of("chain")
def test_a_self_made_root_with_amds_key_ids_is_refused_at_begin(shown: Shown) -> None:
    assert shown.code == 1
    launch = shown.told["launch"]
    assert (launch["state"], launch["reason"]) == ("refused", "UNTRUSTED_ROOT")
    assert launch["steps"][-1]["name"] == "begin"
    assert launch["launch_id"] is None
    assert shown.told["explanation"]["reason"] == "UNTRUSTED_ROOT"
    impostor = (shown.folder / "impostor" / "ask_ark.cert").read_bytes()
    named = (shown.folder / "platform" / "ask_ark.cert").read_bytes()
    # The key ids (bytes 4 to 20 of each certificate) are the same real ones; the keys are not.
    assert impostor[4:20] == named[4:20]
    assert impostor != named
    assert not (shown.folder / "host" / "web.pid").exists()


@of(*map(str, Tamper))
def test_no_secret_leaves_when_the_host_is_dishonest(shown: Shown) -> None:
    assert shown.told["secrets"] == []
    evidence = shown.told["evidence"]
    assert evidence["packets"] == 0
    assert evidence["secrets_read"] == 0
    assert evidence["machine"] in {"ended", "never started"}
    assert evidence["verifier"] in {"refused", "never begun"}
    serial = shown.folder / "host" / "web.serial"
    assert not serial.exists() or serial.read_bytes() == b""


@pytest.mark.parametrize(
    ("shown", "what"),
    [("firmware", "firmware"), ("kernel", "kernel"), ("cmdline", "command line")],
    indirect=["shown"],
    scope="module",
)
def test_an_artefact_of_another_version_is_named(shown: Shown, what: str) -> None:
    explanation = shown.told["explanation"]["explanation"]
    assert explanation["sentence"] == f"the guest was measured with {what} 'shop 1' instead of 'shop 2'"


@of("policy")
def test_a_dropped_session_and_a_lowered_policy_are_named(shown: Shown) -> None:
    sentence = shown.told["explanation"]["explanation"]["sentence"]
    assert "without the session" in sentence
    assert "0x1100000e" in sentence


@of("replay")
def test_a_replayed_measurement_is_traced_to_its_launch(shown: Shown) -> None:
    explanation = shown.told["explanation"]["explanation"]
    assert explanation["replay_of"] != shown.told["launch"]["launch_id"]
    assert "replay" in explanation["sentence"]


@of("honest", *map(str, Tamper))
def test_the_owners_side_is_the_same_whatever_the_host_does(shown: Shown, tmp_path: Path) -> None:
    # Written here once more, by code that is not told what the host will do.
    site = Site(root=tmp_path)
    site.make_folders()
    site.write_owner()
    for version in VERSIONS:
        artefacts = site.artefacts(site.owner, version)
        artefacts.write_kernel_and_initrd()
        ovmf = installed_ovmf() if version == CURRENT else None
        artefacts.firmware.write_bytes(ovmf.read_bytes() if ovmf else build_image(f"firmware {version}"))
    files = shown.owner_files()
    assert len(files) == 1 + 2 + 2 * 3
    assert files == replace(shown, folder=tmp_path).owner_files()
    assert b"tamper" not in (shown.folder / "logs" / "verifier.log").read_bytes()
