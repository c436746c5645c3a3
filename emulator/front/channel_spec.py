"""Which character device a control monitor is on, in each of QEMU's spellings. Pure code.

Sources: QEMU, chardev/char-socket.c, chardev/char.c `qemu_chr_parse_compat` (the `unix:`, `tcp:` and `stdio` of -qmp).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from emulator.errors import MachineDied
from emulator.sev_object import pairs

ON = frozenset({"on", "yes", "true", "y"})
_DIGITS = 9  # of a waiting time


class Kind(StrEnum):
    """Where clients come from."""

    UNIX = "unix"
    TCP = "tcp"
    FD = "fd"
    STDIO = "stdio"


@dataclass(frozen=True, kw_only=True)
class ChannelSpec:
    """A character device that a control monitor is on.

    Attributes:
        option: the words that name it, for messages.
        kind: what it is.
        address: path (with a NUL in front for an abstract one), `HOST:PORT`, or number of an inherited descriptor.
        server: whether clients come to it; else it goes to its peer.
        wait: whether the machine waits for the first client.
        reconnect: seconds between attempts to reach the peer; None for one attempt.
        pretty: whether answers are spread over lines.
    """

    option: str = ""
    kind: Kind
    address: str = ""
    server: bool = True
    wait: bool = False
    reconnect: float | None = None
    pretty: bool = False


def from_legacy(option: str, value: str, *, pretty: bool) -> ChannelSpec | None:
    """The device that `-qmp VALUE` names; None for none. `chardev:ID` is the caller's.

    Args:
        option: all its words.
        value: the last of them.
        pretty: whether answers are spread over lines.

    Raises:
        MachineDied: it is one that the front cannot stand before.
    """
    scheme, _, rest = value.partition(":")
    if scheme in {"none", "null"}:
        return None
    if scheme == "stdio":
        return ChannelSpec(option=option, kind=Kind.STDIO, pretty=pretty)
    if scheme == "unix":
        return _socket(dict(pairs(rest, "path")), option, pretty=pretty)
    if scheme == "tcp":
        given = dict(pairs(rest, "address"))
        host, _, port = given.get("address", "").rpartition(":")
        return _socket({**given, "host": host, "port": port}, option, pretty=pretty)
    raise _beyond(option)


def from_chardev(option: str, given: Mapping[str, str], *, pretty: bool) -> ChannelSpec:
    """The device that `-chardev BACKEND,…` made.

    Args:
        option: all its words.
        given: its properties.
        pretty: whether answers are spread over lines.

    Raises:
        MachineDied: it is one that the front cannot stand before.
    """
    if given.get("backend") == "stdio":
        return ChannelSpec(option=option, kind=Kind.STDIO, pretty=pretty)
    if given.get("backend") == "socket":
        return _socket(given, option, pretty=pretty)
    raise _beyond(option)


def _socket(given: Mapping[str, str], option: str, *, pretty: bool) -> ChannelSpec:
    def on(key: str, default: str) -> bool:
        return given.get(key, default) in ON

    if on("telnet", "off") or on("websocket", "off") or "tls-creds" in given or "to" in given:
        raise _beyond(option)
    if "fd" in given:
        kind, address = Kind.FD, given["fd"]
    elif given.get("path"):
        kind, address = Kind.UNIX, ("\0" if on("abstract", "off") else "") + given["path"]
    elif given.get("port"):
        kind, address = Kind.TCP, f"{given.get('host', '')}:{given['port']}"
    else:
        raise _beyond(option)
    server = on("server", "off")
    return ChannelSpec(
        option=option,
        kind=kind,
        address=address,
        server=server,
        wait=server and on("wait", "on"),
        reconnect=_seconds(given.get("reconnect", ""), 1) or _seconds(given.get("reconnect-ms", ""), 1000),
        pretty=pretty,
    )


def _seconds(text: str, unit: int) -> float | None:
    return int(text) / unit if text.isdecimal() and len(text) <= _DIGITS and int(text) else None


def _beyond(option: str) -> MachineDied:
    return MachineDied(f"{option}: the front of QEMU cannot stand before a control monitor on such a device")
