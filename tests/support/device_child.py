"""The ioctl driver in a process of its own, so that the process can be put on a software platform unmodified.

As a program it opens /dev/sev and answers one JSON line a call on stdin. `ChildDevice` is the other end: a device whose
every method is called over there, and whose errors arrive here as what they were.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import CLASS_OF, Reason, SevattestError
from common.sev.abi import PlatformState
from common.sev.measurement import FirmwareVersion
from host_agent.devices import DEFAULT_PATH, PlatformStatus, open_administration

_CHILD = [sys.executable, "-m", "tests.support.device_child"]
_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class ChildDevice:
    """A device whose driver runs in a child process."""

    process: subprocess.Popen[str]

    async def status(self) -> PlatformStatus:
        told = await self._call("status")
        return PlatformStatus(
            firmware=FirmwareVersion(*told.pop("firmware")), state=PlatformState(told.pop("state")), **told
        )

    async def export_chain(self) -> bytes:
        return bytes.fromhex(await self._call("export_chain"))

    async def chip_id(self) -> bytes:
        return bytes.fromhex(await self._call("chip_id"))

    async def factory_reset(self) -> None:
        await self._call("factory_reset")

    async def pek_gen(self) -> None:
        await self._call("pek_gen")

    async def pdh_gen(self) -> None:
        await self._call("pdh_gen")

    async def pek_csr(self) -> bytes:
        return bytes.fromhex(await self._call("pek_csr"))

    async def pek_cert_import(self, pek: bytes, oca: bytes) -> None:
        await self._call("pek_cert_import", pek, oca)

    async def _call(self, method: str, *blobs: bytes) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([method, *(blob.hex() for blob in blobs)]) + "\n")
        self.process.stdin.flush()
        said = await asyncio.to_thread(self.process.stdout.readline)
        assert said, "the child has ended"
        answer = json.loads(said)
        if "reason" in answer:
            reason = Reason(answer["reason"])
            raise CLASS_OF[reason](reason, answer["message"], **answer["fields"])
        return answer["returned"]


@contextmanager
def child_device(before: Sequence[str]) -> Iterator[ChildDevice]:
    """Start the child behind the words `before`, and end it by closing its stdin."""
    with subprocess.Popen(
        [*before, *_CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=_ROOT
    ) as process:
        try:
            yield ChildDevice(process)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                raise


async def _serve() -> None:
    device = open_administration(Path(DEFAULT_PATH), timeout=30)
    for line in sys.stdin:
        method, *blobs = json.loads(line)
        try:
            returned = await getattr(device, method)(*map(bytes.fromhex, blobs))
        except SevattestError as error:
            answer: dict[str, object] = {"reason": error.reason, "message": error.message, "fields": error.fields}
        else:
            answer = {"returned": _plain(returned)}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _plain(returned: bytes | PlatformStatus | None) -> object:
    if isinstance(returned, bytes):
        return returned.hex()
    if returned is None:
        return None
    assert returned.firmware is not None
    return vars(returned) | {"firmware": list(returned.firmware)}


if __name__ == "__main__":
    asyncio.run(_serve())
