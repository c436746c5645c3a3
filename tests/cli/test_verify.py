"""`sevattest verify` as a person sees it: what is printed where, and how it ends."""

from __future__ import annotations

import base64
import json
import os
import pty
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.sev.abi import Usage
from common.sev.certs.roots import pinned_roots
from orchestrator.cli import main
from tests.support.chains import SyntheticPlatform, bare, fresh_ca, make_platform, p384, with_key_ids
from tests.support.platform import Platform
from tests.support.vectors import rome_chain
from tests.unit.common.sev.certs.test_render import ROME_TREE

FAILED = "sevattest: SEV/CA certificate verification failed: "


@pytest.fixture(scope="module")
def platform() -> SyntheticPlatform:
    return make_platform()


@pytest.fixture
def sev(tmp_path: Path, platform: SyntheticPlatform) -> Path:
    return _file(tmp_path / "sev.pdh", platform.chain.to_bytes())


@pytest.fixture
def ca(tmp_path: Path, platform: SyntheticPlatform) -> Path:
    return _file(tmp_path / "ask_ark.cert", platform.ca.to_bytes())


def _file(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def _verify(*words: object) -> int:
    return main(["verify", *map(str, words)])


def _program(*words: object, **kwargs: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-c", "import sys; from orchestrator.cli import main; sys.exit(main())", "verify"]
        + [str(word) for word in words],
        capture_output=True,
        check=False,
        timeout=60,
        **kwargs,
    )


# --- a real platform ---------------------------------------------------------------------------------------------


def test_a_real_rome_is_verified_to_amds_root(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _verify("--sev", _file(tmp_path / "rome", rome_chain())) == 0
    out, err = capsys.readouterr()
    assert out == ROME_TREE + "\n"
    assert err == ""


def test_a_real_rome_as_one_json_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _verify("--sev", _file(tmp_path / "rome", rome_chain()), "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["verified"], report["generation"], report["emulated"]) == (True, "rome", False)
    assert [cert["kind"] for cert in report["certificates"]] == ["PDH", "PEK", "OCA", "CEK", "ASK", "ARK"]
    assert report["certificates"][5]["fingerprint"].startswith("3d2c1157c29ef7bd")
    assert all(link["good"] for link in report["links"])
    assert len(report["links"]) == 7
    assert (report["reason"], report["message"], report["warnings"]) == (None, None, [])


def test_naming_amds_own_ca_file_is_no_emulation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rome = pinned_roots()[1]
    ca = _file(tmp_path / "ask_ark_rome.cert", rome.ask.raw + rome.ark.raw)
    assert _verify("--sev", _file(tmp_path / "rome", rome_chain()), "--ca", ca) == 0
    assert capsys.readouterr() == (ROME_TREE + "\n", "")


def test_naming_another_generations_ca_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    milan = pinned_roots()[2]
    ca = _file(tmp_path / "ask_ark_milan.cert", milan.ask.raw + milan.ark.raw)
    assert _verify("--sev", _file(tmp_path / "rome", rome_chain()), "--ca", ca) == 1
    out, err = capsys.readouterr()
    assert "       ⬑̸ ASK R4096 R384 95cba79b" in out
    assert err.startswith(FAILED)


def test_a_full_export_of_a_real_rome_is_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rome = pinned_roots()[1]
    data = rome_chain() + rome.ask.raw + rome.ark.raw
    for container in (data, base64.b64encode(data)):
        assert _verify("--sev", _file(tmp_path / "rome", container)) == 0
        assert capsys.readouterr().out == ROME_TREE + "\n"


@pytest.mark.slow
def test_no_changed_byte_of_a_real_rome_is_accepted_or_ends_in_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Every byte is covered by tests/unit/common/sev/certs/test_every_byte.py; here, a sample goes all the way.
    rome = pinned_roots()[1]
    data = rome_chain() + rome.ask.raw + rome.ark.raw
    chosen = random.Random(2084)  # noqa: S311 -- a repeatable sample
    for at in [*range(0, 8336, 61), *chosen.sample(range(8336), 60), *chosen.sample(range(8336, len(data)), 60)]:
        changed = bytearray(data if at >= 8336 else data[:8336])
        changed[at] ^= chosen.randint(1, 255)
        code = _verify("--sev", _file(tmp_path / "changed", bytes(changed)))
        out, err = capsys.readouterr()
        assert code in {1, 2}, f"byte {at}"
        assert "sevattest: " in err
        assert "Traceback" not in err
        assert bool(out) == (code == 1), "what parses is shown"


# --- roots -------------------------------------------------------------------------------------------------------


def test_a_software_platform_is_refused_unless_its_root_is_named(
    sev: Path, ca: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _verify("--sev", sev) == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 6, "four certificates, an empty line, the legend"
    assert err == (
        f"{FAILED}none of the trusted roots signed the CEK\n"
        "hint: only AMD's roots are trusted; --ca FILE names a software platform's own\n"
    )
    assert _verify("--sev", sev, "--ca", ca) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 8
    assert err == f"sevattest: warning: the root in {ca} is not AMD's: platforms under it are emulated\n"


def test_json_says_that_a_platform_is_emulated(sev: Path, ca: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _verify("--sev", sev, "--ca", ca, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["verified"], report["generation"], report["emulated"]) == (True, "emulated", True)


@pytest.mark.parametrize("generation", range(5))
def test_a_forged_root_with_amds_key_ids_is_refused_though_it_comes_along(
    tmp_path: Path, platform: SyntheticPlatform, generation: int, capsys: pytest.CaptureFixture[str]
) -> None:
    real = pinned_roots()[generation]
    forged = with_key_ids(platform.ca, ark_key_id=real.ark.key_id, ask_key_id=real.ask.key_id)
    full = platform.chain.to_bytes() + forged.to_bytes()
    assert _verify("--sev", _file(tmp_path / "full", full)) == 1
    assert "none of the trusted roots signed the CEK" in capsys.readouterr().err


def test_a_foreign_ca_beside_a_genuine_chain_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full = rome_chain() + fresh_ca(bits=4096).to_bytes()
    assert _verify("--sev", _file(tmp_path / "full", full)) == 1
    out, err = capsys.readouterr()
    assert out == ROME_TREE + "\n", "the chain itself is good"
    assert f"{FAILED}the ASK in the file is not the trusted root's" in err


def test_a_foreign_ca_beside_a_chain_with_a_named_root_is_refused(
    tmp_path: Path, platform: SyntheticPlatform, ca: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = platform.chain.to_bytes() + fresh_ca().to_bytes()
    assert _verify("--sev", _file(tmp_path / "full", full), "--ca", ca) == 1
    assert "the ASK in the file is not the trusted root's" in capsys.readouterr().err
    good = platform.chain.to_bytes() + platform.ca.to_bytes()
    assert _verify("--sev", _file(tmp_path / "full", good), "--ca", ca) == 0


@pytest.mark.parametrize("content", [b"", b"-----BEGIN CERTIFICATE-----", bytes(3200)], ids=["empty", "pem", "zeros"])
def test_a_ca_file_that_is_none_is_bad_input(
    sev: Path, tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _verify("--sev", sev, "--ca", _file(tmp_path / "bad", content)) == 2
    assert capsys.readouterr().err.startswith("sevattest: ")


def test_a_ca_file_without_a_pair_is_bad_input(
    sev: Path, tmp_path: Path, platform: SyntheticPlatform, capsys: pytest.CaptureFixture[str]
) -> None:
    for content in (platform.ca.ark.raw, platform.chain.to_bytes()):
        assert _verify("--sev", sev, "--ca", _file(tmp_path / "bad", content)) == 2
        assert "does not hold an ASK and an ARK" in capsys.readouterr().err


def test_a_root_that_does_not_hold_together_is_refused(
    sev: Path, tmp_path: Path, platform: SyntheticPlatform, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = platform.ca.ask.raw + fresh_ca().ark.raw
    assert _verify("--sev", sev, "--ca", _file(tmp_path / "bad", mixed)) == 1
    assert "ARK did not sign this ASK" in capsys.readouterr().err


# --- the OCA -----------------------------------------------------------------------------------------------------


def test_the_platforms_own_oca_may_be_given_as_a_file(
    sev: Path, ca: Path, tmp_path: Path, platform: SyntheticPlatform
) -> None:
    assert _verify("--sev", sev, "--ca", ca, "--oca", _file(tmp_path / "oca", platform.chain.oca.raw)) == 0


def test_the_oca_of_somebody_else_did_not_sign_the_pek(
    sev: Path, ca: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = _file(tmp_path / "oca", make_platform().chain.oca.raw)
    assert _verify("--sev", sev, "--ca", ca, "--oca", other) == 1
    out, err = capsys.readouterr()
    assert out.splitlines()[2].startswith("   •⬑̸ OCA")
    assert f"{FAILED}OCA did not sign this PEK" in err


def test_a_file_without_an_oca_is_bad_input(
    sev: Path, tmp_path: Path, platform: SyntheticPlatform, capsys: pytest.CaptureFixture[str]
) -> None:
    pek = _file(tmp_path / "oca", platform.chain.pek.raw)
    assert _verify("--sev", sev, "--oca", pek) == 2
    assert capsys.readouterr().err == f"sevattest: {pek} holds no OCA\n"


# --- an unsigned CEK ---------------------------------------------------------------------------------------------


@pytest.fixture
def unsigned(tmp_path: Path, platform: SyntheticPlatform) -> Path:
    return _file(tmp_path / "unsigned.pdh", platform.unsigned_chain.to_bytes())


@pytest.fixture
def folder(tmp_path: Path, platform: SyntheticPlatform) -> Path:
    (tmp_path / "kds").mkdir()
    _file(tmp_path / "kds" / f"{platform.chip_id.hex().upper()}.cert", platform.chain.cek.raw)
    return tmp_path / "kds"


def test_an_unsigned_cek_is_refused_and_named(unsigned: Path, ca: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _verify("--sev", unsigned, "--ca", ca) == 1
    out, err = capsys.readouterr()
    assert out.splitlines()[4].startswith("       ⬑̸ ASK"), "the missing signature is the broken one"
    assert f"{FAILED}the CEK carries no signature" in err
    assert "hint: --kds URL --chip-id HEX fetches the signed CEK" in err


@pytest.mark.parametrize("with_id", [True, False])
def test_a_folder_completes_an_unsigned_cek(
    unsigned: Path, ca: Path, folder: Path, platform: SyntheticPlatform, *, with_id: bool
) -> None:
    more = ["--chip-id", platform.chip_id.hex()] if with_id else []
    assert _verify("--sev", unsigned, "--ca", ca, "--kds", folder, *more) == 0


def test_the_cek_of_another_chip_completes_nothing(
    unsigned: Path, ca: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_platform()
    _file(folder / f"{other.chip_id.hex().upper()}.cert", other.chain.cek.raw)
    assert _verify("--sev", unsigned, "--ca", ca, "--kds", folder, "--chip-id", other.chip_id.hex()) == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 8, "what is at hand is shown"
    assert f"{FAILED}the signed CEK is not this platform's" in err


def test_a_chip_that_the_folder_lacks_is_bad_input(
    unsigned: Path, ca: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _verify("--sev", unsigned, "--ca", ca, "--kds", folder, "--chip-id", "ab" * 64) == 2
    assert "holds no CEK for this chip" in capsys.readouterr().err


def test_a_key_service_that_is_down_is_a_failure_and_no_verdict(
    unsigned: Path, ca: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "*")
    # Port 1 on loopback has no listener.
    assert _verify("--sev", unsigned, "--ca", ca, "--kds", "http://127.0.0.1:1", "--chip-id", "ab" * 64) == 3
    assert "cannot be reached" in capsys.readouterr().err


def test_a_signed_cek_needs_no_key_service(sev: Path, ca: Path) -> None:
    assert _verify("--sev", sev, "--ca", ca, "--kds", "http://127.0.0.1:1", "--chip-id", "ab" * 64) == 0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--kds", "http://127.0.0.1:1"], "--kds URL needs --chip-id HEX"),
        (["--kds", "x", "--chip-id", "12"], "--chip-id takes 128 hex digits"),
        (["--kds", "x", "--chip-id", "zz" * 64], "--chip-id takes 128 hex digits"),
        (["--chip-id", "ab" * 64], "needs --kds"),
        (["--kds", "ldap://x", "--chip-id", "ab" * 64], "the key service's address is not http(s)"),
    ],
)
def test_a_question_that_cannot_be_asked_is_bad_input(
    unsigned: Path, words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _verify("--sev", unsigned, *words) == 2
    out, err = capsys.readouterr()
    assert (out, sentence in err) == ("", True)


# --- a tolerated deviation ---------------------------------------------------------------------------------------


def test_the_miswritten_slot_of_2019_is_a_warning(
    tmp_path: Path, ca: Path, platform: SyntheticPlatform, capsys: pytest.CaptureFixture[str]
) -> None:
    data = bytearray(platform.chain.to_bytes())
    at = 3 * 2084 + 1564
    data[at : at + 4] = (0x0010).to_bytes(4, "little")
    assert _verify("--sev", _file(tmp_path / "old", bytes(data)), "--ca", ca) == 0
    assert "sevattest: warning: signature slot 2 of CEK has usage 0x0010" in capsys.readouterr().err


# --- usage and texture -------------------------------------------------------------------------------------------


def test_without_a_file_this_hosts_own_certificates_are_verified(
    host: Platform, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ca = ["--ca", host.ask_ark]
    assert _verify(*ca, "--kds", host.kds) == 0
    tree = capsys.readouterr().out
    exported = _file(tmp_path / "export", b"")
    assert main(["export", "--ca", str(host.ask_ark), "--kds", str(host.kds), str(exported)]) == 0
    assert _verify(*ca, "--sev", exported) == 0
    assert capsys.readouterr().out == tree
    # Port 1 on loopback has no listener.
    assert _verify(*ca, "--kds", "http://127.0.0.1:1") == 3
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == len(tree.splitlines()), "what is at hand is shown"
    assert "cannot be reached" in err
    assert _verify("--kds", host.kds) == 1
    assert "none of the trusted roots signed the CEK" in capsys.readouterr().err
    assert _verify(*ca, "--kds", host.kds, "--device", tmp_path / "sev") == 3
    out, err = capsys.readouterr()
    assert (out, "cannot be opened for reading" in err) == ("", True)


def test_a_file_that_is_not_there_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (tmp_path / "absent", tmp_path):
        assert _verify("--sev", path) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert err.startswith(f"sevattest: {path}: ")


NO_EXPORTS = {
    "empty": b"",
    "text": b"hello",
    "zeros": bytes(8336),
    "numbers": b"\x01\0\0\0" * 2084,
    "zip": b"PK\x03\x04",
    "noise": random.Random(8336).randbytes(8336),  # noqa: S311 -- a repeatable sample
}


@pytest.mark.parametrize("content", NO_EXPORTS.values(), ids=NO_EXPORTS)
def test_what_is_no_export_is_bad_input(tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    file = _file(tmp_path / "sev", content)
    assert _verify("--sev", file) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"sevattest: {file}: ")


def test_an_export_that_lacks_certificates_names_them(
    tmp_path: Path, platform: SyntheticPlatform, capsys: pytest.CaptureFixture[str]
) -> None:
    file = _file(tmp_path / "sev", platform.chain.to_bytes()[2084:])
    assert _verify("--sev", file) == 2
    assert capsys.readouterr().err == f"sevattest: {file}: the container holds no PDH\n"


def test_a_refusal_in_json_has_a_stable_reason(
    tmp_path: Path, ca: Path, platform: SyntheticPlatform, capsys: pytest.CaptureFixture[str]
) -> None:
    chain = replace(platform.chain, pdh=bare(Usage.PDH, p384()))
    assert _verify("--sev", _file(tmp_path / "sev", chain.to_bytes()), "--ca", ca, "--json") == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["verified"], report["reason"]) == (False, "BAD_SIGNATURE")
    assert report["message"] == "PDH carries no signature by PEK"
    assert [link for link in report["links"] if not link["good"]] == [{"signer": "PEK", "signed": "PDH", "good": False}]


def test_json_names_no_generation_that_is_not_proven(sev: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _verify("--sev", sev, "--json") == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["generation"], report["emulated"], report["reason"]) == (None, None, "UNTRUSTED_ROOT")
    assert [cert["kind"] for cert in report["certificates"]] == ["PDH", "PEK", "OCA", "CEK"]


def test_the_symbols_are_utf8_whatever_the_locale_says(sev: Path, ca: Path) -> None:
    done = _program("--sev", sev, "--ca", ca, env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert done.returncode == 0
    assert "⬑".encode() in done.stdout
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("environment", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)]
)
def test_a_terminal_gets_colours_unless_it_wants_none(
    sev: Path, ca: Path, environment: dict[str, str], *, coloured: bool
) -> None:
    clean = {name: value for name, value in os.environ.items() if name not in {"NO_COLOR", "TERM"}}
    ours, theirs = pty.openpty()
    try:
        command = "import sys; from orchestrator.cli import main; sys.exit(main())"
        subprocess.run(
            [sys.executable, "-c", command, "verify", "--sev", str(sev), "--ca", str(ca)],
            stdout=theirs,
            stderr=subprocess.DEVNULL,
            env=clean | {"TERM": "xterm"} | environment,
            check=True,
            timeout=60,
        )
        shown = os.read(ours, 65536)
    finally:
        os.close(theirs)
        os.close(ours)
    assert "⬑".encode() in shown
    assert (b"\x1b[32m" in shown) is coloured


def test_a_pipe_gets_no_colours(sev: Path, ca: Path) -> None:
    done = _program("--sev", sev, "--ca", ca)
    assert done.returncode == 0
    assert b"\x1b" not in done.stdout
