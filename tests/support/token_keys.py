"""A key file that only a token opens, and a watch on the token; SoftHSM is the token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pkcs11
import pytest
from pkcs11 import Attribute, KeyType, MechanismFlag, TokenFlag

from common.errors import Reason, SevattestError, Unavailable
from tests.support.softhsm import KEY, PIN, TOKEN, SoftToken, make_token, softhsm_module
from verifier.keys.pkcs11 import TokenKey, write_wrapped_key_file

MODULE = softhsm_module()


@pytest.fixture
def token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SoftToken]:
    assert MODULE is not None
    made = make_token(tmp_path / "token", MODULE)
    monkeypatch.setenv("SOFTHSM2_CONF", made.environment["SOFTHSM2_CONF"])
    yield made
    pkcs11.lib(str(MODULE)).finalize()


@pytest.fixture
def path(token: SoftToken, tmp_path: Path) -> Path:
    write_wrapped_key_file(tmp_path / "kek.bin", token.settings, make_key=True)
    return tmp_path / "kek.bin"


@pytest.fixture
def content(path: Path) -> bytes:
    return path.read_bytes()


def reached(settings: Any, act: Callable[[Any], Any]) -> Any:
    """What an owner does with the token by other means than ours."""
    library = pkcs11.lib(str(settings.module))
    library.reinitialize()
    with library.get_token(token_label=TOKEN).open(rw=True, user_pin=PIN) as session:
        return act(session)


async def refusal(key: TokenKey) -> SevattestError:
    with pytest.raises(Unavailable) as caught:
        await key.refresh()
    assert caught.value.reason is Reason.KEY_UNAVAILABLE
    assert PIN not in caught.value.message
    return caught.value


def make_another(token: SoftToken, *, extractable: bool = False) -> None:
    reached(
        token.settings,
        lambda session: session.generate_key(
            KeyType.AES,
            256,
            label=KEY,
            store=True,
            capabilities=MechanismFlag.ENCRYPT | MechanismFlag.DECRYPT,
            template={Attribute.EXTRACTABLE: extractable, Attribute.SENSITIVE: not extractable},
        ),
    )


class Watched:
    """python-pkcs11's library: which PINs are tried, and a token that may say that one try is left."""

    def __init__(self, library: Any) -> None:
        self._library = library
        self.tried: list[str] = []
        self.final = False

    def __call__(self, so: str) -> Any:
        library = self._library(so)

        def get_token(token_label: str) -> Any:
            token = library.get_token(token_label=token_label)

            def opened(*, rw: bool, user_pin: str) -> Any:
                self.tried.append(user_pin)
                return token.open(rw=rw, user_pin=user_pin)

            last = TokenFlag.USER_PIN_FINAL_TRY if self.final else TokenFlag(0)
            return SimpleNamespace(flags=token.flags | last, open=opened)

        return SimpleNamespace(reinitialize=library.reinitialize, finalize=library.finalize, get_token=get_token)


@pytest.fixture
def watched(path: Path, monkeypatch: pytest.MonkeyPatch) -> Watched:
    """From where the key file is made on."""
    assert path.exists()
    made = Watched(pkcs11.lib)
    monkeypatch.setattr(pkcs11, "lib", made)
    return made
