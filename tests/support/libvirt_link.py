"""The fake libvirt for a process that is not the test's: an agent that is killed leaves the daemon and its domains.

The test's process serves its `FakeLibvirt` on a Unix socket; a folder on the agent's path has the modules `libvirt` and
`libvirt_qemu`, whose calls go there. One line of JSON a call: a domain's UUID or nothing, the method, its arguments.
"""

from __future__ import annotations

import json
import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from tests.support.fake_libvirt import Domain, FakeLibvirt, LibvirtError

_URI = "qemu:///system"


@contextmanager
def serving(daemon: FakeLibvirt, folder: Path) -> Iterator[Path]:
    """Serve the daemon; gives the folder with the two modules."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            with suppress(ConnectionError):  # whoever asked was killed
                self.wfile.write(json.dumps(_answer(daemon, *json.loads(self.rfile.readline()))).encode() + b"\n")

    folder.mkdir()
    address = str(folder / "socket")
    (folder / "libvirt.py").write_text(
        "from tests.support.libvirt_link import LibvirtError as libvirtError, opener\n"
        f"open = opener({address!r})\n"
        "VIR_DOMAIN_START_PAUSED, VIR_DOMAIN_START_VALIDATE = 1, 16\n"
    )
    (folder / "libvirt_qemu.py").write_text(
        "def qemuMonitorCommand(domain, cmd, flags):\n    return domain.monitor(cmd, flags)\n"
    )
    with socketserver.ThreadingUnixStreamServer(address, Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield folder
        finally:
            server.shutdown()
            thread.join()


def opener(address: str) -> Any:
    """What stands for `libvirt.open`, over this socket."""

    def open_connection(name: str) -> _Remote:
        assert name == _URI
        return _Remote(address)

    return open_connection


class _Remote:
    """A connection or a domain; every method is the daemon's."""

    def __init__(self, address: str, uuid: str | None = None) -> None:
        self._address = address
        self._uuid = uuid

    def __getattr__(self, method: str) -> Any:
        return partial(self._call, method)

    def _call(self, method: str, *arguments: object) -> Any:
        with socket.socket(socket.AF_UNIX) as link:
            link.connect(self._address)
            link.sendall(json.dumps([self._uuid, method, arguments]).encode() + b"\n")
            with link.makefile("rb") as answers:
                answer = json.loads(answers.readline())
        if "error" in answer:
            raise LibvirtError(*answer["error"])
        return _Remote(self._address, answer["domain"]) if "domain" in answer else answer["result"]


def _answer(daemon: FakeLibvirt, uuid: str | None, method: str, arguments: list[Any]) -> dict[str, Any]:
    try:
        connection = daemon.open(_URI)
        target = connection if uuid is None else connection.lookupByUUIDString(uuid)
        result = getattr(target, method)(*arguments)
    except LibvirtError as error:
        return {"error": [error.get_error_code(), error.get_error_message()]}
    return {"domain": result.uuid} if isinstance(result, Domain) else {"result": result}
