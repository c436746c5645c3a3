"""`sevattest generate`, `provision`, `reset`, `rotate`: who owns a platform, and with which keys."""

from __future__ import annotations

import asyncio
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from common.sev.abi import SEV_CERT_SIZE, Usage
from common.sev.certs.chain import PlatformChain
from common.sev.certs.oca import encode_key, make_oca, read_key, read_oca
from common.sev.certs.sev import SevCertificate
from emulator import protocol
from emulator.device_client import Device as Connection
from emulator.protocol import GuestRequest
from host_agent.devices import open_administration
from tests.support.chains import bare, make_platform, p384, sign, with_bytes
from tests.support.host_commands import OLD, do, export, names, write
from tests.support.platform import Platform


def test_a_new_oca_is_a_pair_and_its_key_is_private(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cert, key = tmp_path / "oca.cert", tmp_path / "oca.key"
    assert do("generate", cert, key) == 0
    assert capsys.readouterr() == ("", "")
    assert cert.stat().st_size == SEV_CERT_SIZE
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    read_key(key.read_bytes(), read_oca(cert.read_bytes()))
    first = cert.read_bytes()
    assert do("generate", cert, key) == 0, "as sevctl, it replaces what is there"
    assert cert.read_bytes() != first
    read_key(key.read_bytes(), read_oca(cert.read_bytes()))
    assert names(tmp_path) == {"oca.cert", "oca.key"}


@pytest.mark.parametrize("broken", ["CERT", "KEY"])
def test_a_pair_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, broken: str, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"CERT": write(tmp_path / "oca.cert", OLD), "KEY": write(tmp_path / "oca.key", OLD)}
    for bad in (tmp_path / "nowhere" / "oca", tmp_path):
        words = places | {broken: bad}
        assert do("generate", words["CERT"], words["KEY"]) == 2
        assert f"sevattest: {bad}: " in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"oca.cert": OLD, "oca.key": OLD}


def test_certificate_and_key_in_one_file_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert do("generate", tmp_path / "oca", tmp_path / "." / "oca") == 2
    assert capsys.readouterr().err == "sevattest: CERT and KEY are the same file\n"
    assert names(tmp_path) == set()


def test_openssl_reads_the_key(tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl not found, install the Debian package openssl")
    cert, key = tmp_path / "oca.cert", tmp_path / "oca.key"
    assert do("generate", cert, key) == 0
    words: list[str | Path] = ["openssl", "ec", "-inform", "DER", "-in", key, "-pubout", "-outform", "DER"]
    point = subprocess.run(words, check=True, capture_output=True).stdout[-96:]
    numbers = SevCertificate.parse(cert.read_bytes()).public_key.public_numbers()
    assert point == numbers.x.to_bytes(48, "big") + numbers.y.to_bytes(48, "big")
    write(key, key.read_bytes()[:-1])
    assert subprocess.run(words, check=False, capture_output=True).returncode != 0


def test_an_owner_takes_the_platform_and_a_reset_gives_it_back(
    host: Platform, tmp_path: Path, owner: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    exported = tmp_path / "sev.pdh"
    assert do("provision", *owner) == 0
    assert capsys.readouterr() == ("", "")
    assert export(host, exported) == 0
    assert PlatformChain.parse(exported.read_bytes()).oca.raw == owner[0].read_bytes()
    assert do("verify", "--sev", exported, "--ca", host.ask_ark, "--oca", owner[0]) == 0
    capsys.readouterr()

    assert do("provision", *owner) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        "sevattest: the firmware answered ALREADY_OWNED (0x05): PEK_CERT_IMPORT\n"
        "hint: the platform has an owner; `sevattest reset` gives it back, and makes new keys\n"
    )
    assert do("reset") == 0
    assert capsys.readouterr() == ("", "")
    assert export(host, exported) == 0
    after = PlatformChain.parse(exported.read_bytes())
    assert after.oca.raw != owner[0].read_bytes()
    assert do("verify", "--sev", exported, "--ca", host.ask_ark, "--oca", owner[0]) == 1
    assert do("provision", *owner) == 0


def test_rotate_makes_a_new_pdh_and_nothing_else(
    host: Platform, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chains = []
    for number in range(2):
        assert export(host, tmp_path / f"{number}.pdh") == 0
        chains.append(PlatformChain.parse((tmp_path / f"{number}.pdh").read_bytes()))
        capsys.readouterr()
        assert do("rotate") == 0
        assert capsys.readouterr() == ("", "")
    assert chains[0].pdh != chains[1].pdh
    assert chains[0].to_bytes()[SEV_CERT_SIZE:] == chains[1].to_bytes()[SEV_CERT_SIZE:]


@pytest.mark.parametrize(
    ("evil", "code", "sentence"),
    [
        ("swapped", 2, "hint: CERT comes first, then KEY"),
        ("another key", 2, "the private key is not the OCA's"),
        ("certificate cut off", 2, "a SEV certificate has 2084 bytes, not 2083"),
        ("certificate too long", 2, "a SEV certificate has 2084 bytes, not 2085"),
        ("key cut off", 2, "not a private key in DER form"),
        ("a PEK", 2, "the certificate is a PEK, not an OCA"),
        ("a foreign signature", 1, "OCA did not sign this OCA"),
        ("no such file", 2, "No such file or directory"),
    ],
)
def test_a_pair_that_does_not_belong_together_changes_nothing(
    host: Platform,
    owner: tuple[Path, Path],
    evil: str,
    code: int,
    sentence: str,
    *,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cert, key = owner
    data, private = cert.read_bytes(), key.read_bytes()
    if evil == "swapped":
        cert, key = key, cert
    elif evil == "another key":
        write(key, encode_key(p384()))
    elif evil == "certificate cut off":
        write(cert, data[:-1])
    elif evil == "certificate too long":
        write(cert, data + b"\0")
    elif evil == "key cut off":
        write(key, private[:-1])
    elif evil == "a PEK":
        write(cert, make_platform().chain.pek.raw)
    elif evil == "a foreign signature":
        write(cert, data[:1044] + make_oca()[0].raw[1044:])
    else:
        cert.unlink()
    before = asyncio.run(open_administration(host.socket, timeout=30).export_chain())
    assert do("provision", cert, key) == code
    out, err = capsys.readouterr()
    assert (out, sentence in err) == ("", True), err
    assert private.hex()[20:60] not in err
    assert asyncio.run(open_administration(host.socket, timeout=30).export_chain()) == before


def test_an_oca_as_sevctl_leaves_it_is_taken_as_it_is(
    host: Platform, tmp_path: Path, owner: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    key = read_key(owner[1].read_bytes(), read_oca(owner[0].read_bytes()))
    padded = sign(SevCertificate.parse(with_bytes(bare(Usage.OCA, key, (0, 0)), 168, b"\x40\x79\xdf")), Usage.OCA, key)
    write(owner[0], padded.raw)
    assert do("provision", *owner) == 0
    assert export(host, tmp_path / "sev.pdh") == 0
    assert "warning: the padding of the OCA key is not zero" in capsys.readouterr().err
    assert do("verify", "--sev", tmp_path / "sev.pdh", "--ca", host.ask_ark, "--oca", owner[0]) == 0


def test_a_platform_with_guests_is_left_alone(
    host: Platform, owner: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with Connection(host.socket) as connection:
        connection.issue(GuestRequest.LAUNCH_START, protocol.LAUNCH_START.pack(0, 0, 0, 0))
        assert do("reset") == 3
        assert "EBUSY" in capsys.readouterr().err
        assert do("provision", *owner) == 3
        assert "INVALID_PLATFORM_STATE (0x01)" in capsys.readouterr().err
        assert do("show", "flags") == 0
        assert capsys.readouterr().out == "es\n"
