"""Which character device a control monitor is on, in each of QEMU's spellings. Pure code.

Sources: QEMU, chardev/char-socket.c, chardev/char.c `qemu_chr_parse_compat` (the `unix:`, `tcp:` and `stdio` of -qmp).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from emulator.errors import MachineDied
from emulator.sev_object import pairs

_ON = frozenset({"on", "yes", "true", "y"})


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
        kind: what it is.
        address: path (with a NUL in front for an abstract one), `HOST:PORT`, or number of an inherited descriptor.
        server: whether clients come to it; else it goes to its peer.
        wait: whether the machine waits for the first client.
        reconnect: seconds between attempts to reach the peer; 0 for one attempt.
        pretty: whether answers are spread over lines.
    """

    kind: Kind
    address: str = ""
    server: bool = True
    wait: bool = False
    reconnect: int = 0
    pretty: bool = False


def from_legacy(value: str, *, pretty: bool) -> ChannelSpec | None:
    """The device that `-qmp VALUE` names; None for none. `chardev:ID` is the caller's.

    Raises:
        MachineDied: it is one that the front cannot stand before.
    """
    scheme, _, rest = value.partition(":")
    if scheme in {"none", "null"}:
        return None
    if scheme == "stdio":
        return ChannelSpec(kind=Kind.STDIO, pretty=pretty)
    if scheme == "unix":
        return _socket(dict(pairs(rest, "path")), value, pretty=pretty)
    if scheme == "tcp":
        given = dict(pairs(rest, "address"))
        host, _, port = given.get("address", "").rpartition(":")
        return _socket({**given, "host": host, "port": port}, value, pretty=pretty)
    raise _beyond(value)


def from_chardev(given: Mapping[str, str], *, pretty: bool) -> ChannelSpec:
    """The device that `-chardev BACKEND,…` made, from its properties.

    Raises:
        MachineDied: it is one that the front cannot stand before.
    """
    where = f"chardev {given.get('id', '')}"
    if given.get("backend") == "stdio":
        return ChannelSpec(kind=Kind.STDIO, pretty=pretty)
    if given.get("backend") == "socket":
        return _socket(given, where, pretty=pretty)
    raise _beyond(where)


def _socket(given: Mapping[str, str], where: str, *, pretty: bool) -> ChannelSpec:
    def on(key: str, default: str) -> bool:
        return given.get(key, default) in _ON

    if on("telnet", "off") or on("websocket", "off") or "tls-creds" in given or "to" in given:
        raise _beyond(where)
    if "fd" in given:
        kind, address = Kind.FD, given["fd"]
    elif given.get("path"):
        kind, address = Kind.UNIX, ("\0" if on("abstract", "off") else "") + given["path"]
    elif given.get("port"):
        kind, address = Kind.TCP, f"{given.get('host', '')}:{given['port']}"
    else:
        raise _beyond(where)
    server = on("server", "off")
    reconnect = given.get("reconnect", "0")
    return ChannelSpec(
        kind=kind,
        address=address,
        server=server,
        wait=server and on("wait", "on"),
        reconnect=int(reconnect) if reconnect.isdecimal() else 0,
        pretty=pretty,
    )


def _beyond(where: str) -> MachineDied:
    return MachineDied(f"{where}: the front of QEMU cannot stand before a control monitor on such a device")
