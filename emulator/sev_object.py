"""QEMU's `key=value,…` options and the `sev-guest` object among them (qapi/qom.json, util/keyval.c)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common.sev.abi import PolicyBit
from emulator.errors import MachineDied

_PART = re.compile(r"(?:[^,]|,,)+")
_NUMBER = re.compile(r"0[xX][0-9a-fA-F]{1,16}|0[0-7]{0,21}|[1-9][0-9]{0,19}")
_SWITCH = {"on": True, "yes": True, "true": True, "y": True, "off": False, "no": False, "false": False, "n": False}


@dataclass(frozen=True, kw_only=True)
class SevGuest:
    """`-object sev-guest`. Files hold base64 text, as QEMU wants it.

    Attributes:
        identifier: the object's id.
        cbitpos: position of the encryption bit.
        reduced_phys_bits: physical address bits that encryption costs.
        policy: the guest policy, 32 bits.
        handle: of a guest to share a memory key with; 0 for none.
        godh_file: the owner's certificate.
        session_file: the owner's session.
        kernel_hashes: whether kernel, initrd and command line are measured.
        legacy_vm_type: `on`, `off`, `auto` as given to QEMU 9.1 or newer; None where it was not given.
    """

    identifier: str
    cbitpos: int
    reduced_phys_bits: int
    policy: int
    handle: int
    godh_file: Path | None
    session_file: Path | None
    kernel_hashes: bool
    legacy_vm_type: str | None = None

    @property
    def is_es(self) -> bool:
        """Whether the guest's registers are protected too."""
        return bool(self.policy & PolicyBit.ES)


def object_properties(value: str) -> tuple[str, dict[str, str]]:
    """An object's type and properties, from QEMU's key=value text or from JSON.

    Raises:
        MachineDied: it is neither, or has no type.
    """
    if value.startswith("{"):
        try:
            raw = json.loads(value)
        except (ValueError, RecursionError):
            raise MachineDied(f"-object {value}: JSON parse error, expecting value") from None
        given = {key: _text(member) for key, member in raw.items()}
    else:
        given = dict(pairs(value, "qom-type"))
    if "qom-type" not in given:
        raise MachineDied(f"-object {value}: Parameter 'qom-type' is missing")
    return given.pop("qom-type"), given


def sev_guest(value: str, identifier: str, given: dict[str, str], *, extra: frozenset[str] = frozenset()) -> SevGuest:
    """The sev-guest object with these properties.

    Args:
        value: the option's value, for messages.
        identifier: the object's id.
        given: its other properties.
        extra: properties that QEMU 7.2 does not know and this machine does.

    Raises:
        MachineDied: an unknown property, or a value that is none.
    """
    known = {"cbitpos", "reduced-phys-bits", "policy", "handle", "dh-cert-file", "session-file", "sev-device"}
    for key in given:
        if key not in known | {"kernel-hashes"} | extra:
            raise MachineDied(f"-object {value}: Invalid parameter '{key}'")
    if "reduced-phys-bits" not in given:
        raise MachineDied(f"-object {value}: Parameter 'reduced-phys-bits' is missing")

    def number(key: str, default: int) -> int:
        text = given.get(key, str(default))
        # C's notation, in which a leading zero makes it octal.
        parsed = int(text, 8 if text.startswith("0") and text.isdigit() else 0) if _NUMBER.fullmatch(text) else -1
        if not 0 <= parsed <= 0xFFFFFFFF:
            raise MachineDied(f"-object {value}: Parameter '{key}' expects uint32")
        return parsed

    hashes = given.get("kernel-hashes", "off")
    if hashes not in _SWITCH:
        raise MachineDied(f"-object {value}: Parameter 'kernel-hashes' expects 'on' or 'off'")
    return SevGuest(
        identifier=identifier,
        cbitpos=number("cbitpos", 0),
        reduced_phys_bits=number("reduced-phys-bits", 0),
        policy=number("policy", 1),
        handle=number("handle", 0),
        godh_file=Path(given["dh-cert-file"]) if "dh-cert-file" in given else None,
        session_file=Path(given["session-file"]) if "session-file" in given else None,
        kernel_hashes=_SWITCH[hashes],
        legacy_vm_type=given.get("legacy-vm-type"),
    )


def pairs(value: str, first: str) -> Iterator[tuple[str, str]]:
    """QEMU's `key=value,…`: a doubled comma is a comma; a bare first word is for `first`, a bare later one is on."""
    for number, part in enumerate(_PART.findall(value)):
        text = part.replace(",,", ",")
        key, equals, rest = text.partition("=")
        if equals:
            yield key, rest
        elif number == 0:
            yield first, text
        else:
            # "nowait" is the old spelling of wait=off.
            yield (key[2:], "off") if key.startswith("no") else (key, "on")


def _text(member: object) -> str:
    if isinstance(member, bool):
        return "on" if member else "off"
    return str(member)
