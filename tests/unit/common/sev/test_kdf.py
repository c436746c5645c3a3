"""Key derivation: the published chain for a zero key, and what makes it differ from library derivations."""

from __future__ import annotations

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.kbkdf import KBKDFHMAC, CounterLocation, Mode

from common.sev.kdf import derive

_ZERO = bytes(16)


def test_the_zero_key_derives_the_published_chain() -> None:
    master = derive(_ZERO, "sev-master-secret", _ZERO)
    assert master.hex() == "ab4d269fcc62bedb4511d56c386ce706"
    assert derive(master, "sev-kek").hex() == "b6abfbfb75ea1ea74ed8750b8afdb973"
    assert derive(master, "sev-kik").hex() == "53b524bf5669a363f365c864acba8572"


def test_label_context_and_key_all_count() -> None:
    made = {
        derive(_ZERO, "sev-kek"),
        derive(_ZERO, "sev-kik"),
        derive(_ZERO, "sev-kek", _ZERO),
        derive(bytes(48), "sev-kek", bytes(15) + b"\x01"),
        derive(b"\x01" * 16, "sev-kek"),
    }
    assert len(made) == 5
    assert {len(key) for key in made} == {16}


def test_a_big_endian_derivation_gives_another_key() -> None:
    library = KBKDFHMAC(
        algorithm=hashes.SHA256(),
        mode=Mode.CounterMode,
        length=16,
        rlen=4,
        llen=4,
        location=CounterLocation.BeforeFixed,
        label=b"sev-kek",
        context=b"",
        fixed=None,
    )
    assert library.derive(_ZERO) != derive(_ZERO, "sev-kek")
