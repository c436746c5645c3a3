"""The printed tree: sevctl's own text, for good and for broken chains."""

from __future__ import annotations

from dataclasses import replace

import pytest

from common.sev.abi import Usage
from common.sev.certs.chain import PlatformChain
from common.sev.certs.render import algorithm, describe, render_tree
from common.sev.certs.roots import pinned_roots
from common.sev.certs.verify import check_links
from tests.support.chains import bare, fresh_ca, make_platform, p384, shared_ca
from tests.support.vectors import rome_chain

# What sevctl 0.6.2 prints for this chain (formats.md section 3, walkthrough.md step 4).
ROME_TREE = """\
PDH EP384 D256 a19ef679477f2256d802ce9054ee6d1145dbeed52998c66ea97499a01d977c54
 ⬑ PEK EP384 E256 a37b51038cbaec1062f7b5f93e8caa55cc7798b1a813c26fae1cabc96320fa0a
   •⬑ OCA EP384 E256 deae2d45b8d1456c94b514fba0e6f6fb9f13afc9df9ba9670e9c9e9e54b4af6e
    ⬑ CEK EP384 E256 ce2cba2df8808d188f445192418e008ecf9bd1464db35ea64afa3b3b6966396c
       ⬑ ASK R4096 R384 d8cd9d1798c311c96e009a91552f17b4ddc4886a064ec933697734965b9ab29db803c79604e2725658f0861bfaf09ad4
         •⬑ ARK R4096 R384 3d2c1157c29ef7bd4207fc0c8b08db080e579ceba267f8c93bec8dce73f5a5e2e60d959ac37ea82176c1a0c61ae203ed

 • = self signed, ⬑ = signs, •̷ = invalid self sign, ⬑̸ = invalid signs"""  # noqa: E501 -- sevctl's line is that long


def test_a_real_rome_prints_as_sevctl_prints_it() -> None:
    links = check_links(PlatformChain.parse(rome_chain()), pinned_roots())
    assert render_tree(links) == ROME_TREE


def test_the_symbols_are_the_ones_of_sevctl() -> None:
    used = sorted({f"{ord(letter):04x}" for letter in ROME_TREE if not letter.isascii()})
    assert used == ["0337", "0338", "2022", "2b11"]
    assert "•\u0337 = invalid self sign, ⬑\u0338 = invalid signs" in ROME_TREE


def test_a_naples_key_is_shown_with_its_own_sizes() -> None:
    naples = pinned_roots()[0]
    assert describe(naples.ark) == "ARK R2048 R256 8efddcaaf84990cf6354d93637be270220cf15797332b3d918c3b8cc77349f31"
    assert algorithm(naples.ask) == "R2048 R256"
    assert algorithm(shared_ca(4096).ask) == "R4096 R384"
    assert algorithm(bare(Usage.PDH, p384())) == "EP384 D256"
    assert algorithm(bare(Usage.CEK, p384())) == "EP384 E256"


@pytest.mark.parametrize(
    ("name", "line", "symbols"),
    [
        ("pdh", 1, " ⬑̸ PEK"),
        ("pek", 3, "    ⬑̸ CEK"),
        ("oca", 2, "   •̷⬑̸ OCA"),
        ("cek", 4, "       ⬑̸ ASK"),
    ],
)
def test_a_missing_signature_is_shown_where_it_is_due(name: str, line: int, symbols: str) -> None:
    platform = make_platform()
    stripped = bare(Usage[name.upper()], p384())
    tree = render_tree(check_links(replace(platform.chain, **{name: stripped}), [platform.root]))
    assert tree.splitlines()[line].startswith(symbols)
    assert len(tree.splitlines()) == 8, "all lines are shown"


def test_a_root_that_does_not_sign_itself_is_shown() -> None:
    platform = make_platform()
    tree = render_tree(check_links(platform.chain, [replace(platform.root, ark=fresh_ca().ark)]))
    assert tree.splitlines()[4].startswith("       ⬑ ASK")
    assert tree.splitlines()[5].startswith("         •⬑̸ ARK")


def test_without_a_root_the_platforms_own_certificates_are_shown() -> None:
    tree = render_tree(check_links(make_platform().chain, pinned_roots()))
    assert [line.split()[1] for line in tree.splitlines()[1:4]] == ["PEK", "OCA", "CEK"]
    assert tree.splitlines()[4] == ""


def test_colours_change_the_symbols_only() -> None:
    links = check_links(replace(make_platform().chain, oca=make_platform().chain.oca), pinned_roots())
    coloured = render_tree(links, colour=True)
    assert "   \x1b[32m•\x1b[0m\x1b[31m⬑̸\x1b[0m OCA" in coloured
    assert coloured.replace("\x1b[32m", "").replace("\x1b[31m", "").replace("\x1b[0m", "") == render_tree(links)
