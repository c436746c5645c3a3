"""The chip and its root: real key ids, an own key, and a chain that verifies only under the root that is named."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from common.sev.certs.chain import PlatformChain
from common.sev.certs.roots import named_root, pinned_roots
from common.sev.certs.sev import SevCertificate
from common.sev.certs.verify import attach_cek, verify_platform
from common.sev.errors import UnsignedCek, UntrustedRoot
from emulator.errors import StateFolderUnusable
from emulator.identity import IdentityFile
from emulator.keys import GENERATIONS, Chip, publish
from tests.support.software_psp import make_psp

# formats.md section 2: key ids as AMD's files carry them.
ARK_IDS = {
    "naples": "1bb987c359494606b174945601c9ea5b",
    "rome": "e6002122fb58419399d15fee7b131351",
    "milan": "94c38e4177d0479292a7ae671d083fb6",
    "genoa": "9f9d4a8fe761456599f6946c4c010f3a",
    "turin": "d05c3a8bde484904b49552422ceb3942",
}


def test_every_generation_carries_its_real_key_ids() -> None:
    assert {name: generation.ark_id.hex() for name, generation in GENERATIONS.items()} == ARK_IDS
    real = {root.generation: (root.ark.key_id, root.ask.key_id) for root in pinned_roots()}
    assert {name: (row.ark_id, row.ask_id) for name, row in GENERATIONS.items()} == real


def test_the_firmware_is_new_enough_for_amds_tool_and_for_a_session() -> None:
    for generation in GENERATIONS.values():
        assert generation.api >= (0, 17)
        assert generation.api > (0, 17) or generation.build >= 22


@pytest.mark.parametrize("name", ["naples", "milan"])
def test_the_chain_verifies_under_the_named_root_and_no_other(tmp_path: Path, name: str) -> None:
    psp = make_psp(tmp_path, name)
    publish(psp.chip, ask_ark=tmp_path / "ask_ark.cert", kds=tmp_path / "kds")
    psp.init()
    pdh, rest = psp.pdh_cert_export(2084, 6252)
    pek, oca, cek = (SevCertificate.parse(rest[at : at + 2084]) for at in (0, 2084, 4168))
    exported = PlatformChain(pdh=SevCertificate.parse(pdh), pek=pek, oca=oca, cek=cek)
    root = named_root((tmp_path / "ask_ark.cert").read_bytes())
    with pytest.raises(UnsignedCek):
        verify_platform(exported, [root])
    (signed,) = (tmp_path / "kds").iterdir()
    assert signed.name == psp.chip.chip_id.hex().upper() + ".cert"
    chain = attach_cek(exported, SevCertificate.parse(signed.read_bytes()))
    assert verify_platform(chain, [root]).emulated
    with pytest.raises(UntrustedRoot):
        verify_platform(chain, pinned_roots())
    again = attach_cek(exported, psp.chip.signed_cek())
    assert again.cek != chain.cek
    assert verify_platform(again, [root]).emulated


def test_private_keys_are_private_and_public_files_are_not(tmp_path: Path) -> None:
    psp = make_psp(tmp_path, "naples")
    publish(psp.chip, ask_ark=tmp_path / "ask_ark.cert", kds=tmp_path / "kds")
    psp.init()
    for path in [tmp_path / "identity.json", *(tmp_path / "chip").iterdir()]:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "ask_ark.cert").stat().st_mode) == 0o644


def test_a_chip_is_the_same_after_loading(tmp_path: Path) -> None:
    first = make_psp(tmp_path, "naples").chip
    again = Chip.load(tmp_path / "chip")
    assert (again.chip_id, again.ark, again.ask, again.cek) == (first.chip_id, first.ark, first.ask, first.cek)


@pytest.mark.parametrize("missing", ["generation", "ask_ark.cert", "cek.pem", "id.pem"])
def test_a_chip_with_something_missing_is_refused(tmp_path: Path, missing: str) -> None:
    make_psp(tmp_path, "naples")
    (tmp_path / "chip" / missing).unlink()
    with pytest.raises(StateFolderUnusable):
        Chip.load(tmp_path / "chip")


@pytest.mark.parametrize("content", ["", "{}", "[]", "{", '{"version": 2}', '{"version": 1, "external": false}'])
def test_an_identity_that_is_not_one_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "identity.json"
    path.write_text(content)
    with pytest.raises(StateFolderUnusable):
        IdentityFile(path).load()


def test_keys_are_not_printed(tmp_path: Path) -> None:
    psp = make_psp(tmp_path, "naples")
    psp.init()
    assert "key" not in repr(psp.identity).replace("pubkey", "")
