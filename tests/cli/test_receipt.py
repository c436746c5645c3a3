"""`sevattest receipt verify` as a person sees it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from common.audit.jws import CHECKPOINT_TYPE, RECEIPT_TYPE
from orchestrator.cli import main
from tests.unit.verifier.secrets.test_receipt import claims
from verifier.keys.signer import Signer

SIGNER = Signer(ec.derive_private_key(7, ec.SECP256R1()))


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys.json"
    path.write_text(json.dumps(SIGNER.jwks()))
    return path


@pytest.fixture
def receipt(tmp_path: Path) -> Path:
    path = tmp_path / "receipt.jwt"
    path.write_text(SIGNER.sign(claims(), typ=RECEIPT_TYPE) + "\n")
    return path


def _verify(receipt: Path | str, keys: Path, *before: str) -> int:
    return main([*before, "receipt", "verify", str(receipt), "--jwks", str(keys)])


def test_a_genuine_receipt_is_printed_and_named_genuine(
    receipt: Path, keys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _verify(receipt, keys) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == claims()
    assert err == f"sevattest: the receipt is genuine: signed with {SIGNER.kid}\n"
    assert _verify(receipt, keys, "-q") == 0
    assert capsys.readouterr() == ("", "")


def test_a_receipt_comes_through_a_pipe_too(receipt: Path, keys: Path) -> None:
    program = "import sys; from orchestrator.cli import main; sys.exit(main())"
    words = [sys.executable, "-c", program, "receipt", "verify", "-", "--jwks", str(keys)]
    done = subprocess.run(words, input=receipt.read_bytes(), capture_output=True, check=False, timeout=60)
    assert (done.returncode, json.loads(done.stdout)) == (0, claims())


@pytest.mark.parametrize(
    ("token", "code", "says"),
    [
        (Signer(ec.derive_private_key(8, ec.SECP256R1())).sign(claims(), typ=RECEIPT_TYPE), 1, "not in the key set"),
        (SIGNER.sign(claims(), typ=CHECKPOINT_TYPE), 1, "not of the kind sevattest-receipt+jwt"),
        (SIGNER.sign(claims(), typ=RECEIPT_TYPE)[:-8] + "AAAAAAAA", 1, "does not hold"),
        ("{}", 2, "has 1 parts, not 3"),
        ("", 2, "has 1 parts, not 3"),
    ],
    ids=["another key", "another kind", "changed", "JSON", "empty"],
)
def test_what_is_not_genuine_is_refused_and_not_printed(
    receipt: Path, keys: Path, capsys: pytest.CaptureFixture[str], *, token: str, code: int, says: str
) -> None:
    receipt.write_text(token)
    assert _verify(receipt, keys) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"sevattest: {receipt}: a token")
    assert says in err


def test_the_json_of_a_launch_is_no_receipt_but_holds_one(
    receipt: Path, keys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    receipt.write_text(json.dumps({"state": "running", "receipt_token": SIGNER.sign(claims(), typ=RECEIPT_TYPE)}))
    assert _verify(receipt, keys) == 2
    assert capsys.readouterr().err.endswith("hint: a receipt is what `receipt_token` holds in the JSON of a launch\n")
    receipt.write_text("no JSON")
    assert _verify(receipt, keys) == 2
    assert "hint" not in capsys.readouterr().err


def test_what_is_no_key_set_is_bad_input(receipt: Path, keys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys.write_text("{}")
    assert _verify(receipt, keys) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"sevattest: {keys}: ")
    assert "has no list of keys" in err
    assert _verify(receipt, keys.with_name("none")) == 2
    assert "No such file" in capsys.readouterr().err
