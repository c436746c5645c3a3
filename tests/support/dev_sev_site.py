"""A site whose agent looks for /dev/sev, under `sevattest platform run`; its guest may be any QEMU on /dev/kvm."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest

from emulator.firmware_image import SECRET_AREA, build_image
from orchestrator.demo.processes import Service
from tests.support.agent_site import REPOSITORY, Site
from tests.support.c_bit import c_bit_of_this_machine
from tests.support.fw_cfg import read_memory
from tests.support.pki import Pki
from tests.support.platform import Platform
from tests.support.qmp import QmpClient
from tests.support.real_qemu import small_kernel
from tests.support.stages import short_folder
from tests.support.under import run_words, why_not_under

_CODE_AT = 0x8000  # offset of the guest's code in the last 64 KiB, which a processor at its reset vector can jump to
_SHOWN = 128  # bytes of the secret area that it prints
_DEBUG_PORT = 0xE9  # QEMU's isa-debugcon


class DevSevSite(Site):
    """The agent with `device.driver = "dev_sev"`; with `intercepted` it finds the software platform's device there.

    Attributes:
        intercepted: whether the agent runs under `platform run`.
        prefix: words before everything, of a program that becomes what follows.
    """

    def __init__(self, root: Path, platform: Platform, pki: Pki) -> None:
        super().__init__(root, platform, pki)
        self.intercepted = True
        self.prefix: list[str] = []
        self.use_dev_sev()

    def start(self, point: str | None = None) -> Service:
        assert point is None
        self.write_config()
        agent = [sys.executable, "-c", "import sys; from host_agent.cli import main; sys.exit(main())"]
        command = [*agent, "serve", "--config", str(self.config)]
        environ = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        words = run_words(self.platform, *command) if self.intercepted else command
        words = [*self.prefix, *words]
        service = Service("sev-host-agent", words, logs=self.root, environ=environ)
        self.services.append(service)
        service.start()
        return service


class KvmSite(DevSevSite):
    """The same, and the guest's program is an unmodified QEMU on /dev/kvm.

    Attributes:
        look: a monitor of the test's own, beside the agent's.
        printed: what the guest prints, which is the beginning of its secret area.
    """

    def __init__(self, root: Path, platform: Platform, pki: Pki) -> None:
        super().__init__(root, platform, pki)
        self.look = root / "look"
        self.printed = root / "printed"
        self.firmware.write_bytes(_printing(build_image("one")))
        self.kernel.write_bytes(small_kernel())
        # QEMU holds it against the processor's own, where a stand-in would not.
        self.qemu["cbitpos"] = c_bit_of_this_machine()
        self.more_args = ["-qmp", f"unix:{self.look},server=on,wait=off", "-debugcon", f"file:{self.printed}"]

    def use(self, qemu: str) -> None:
        """Take this QEMU, without anything in front of it."""
        self.program = [qemu, "-accel", "kvm"]

    def secret_area(self) -> bytes:
        """The guest's secret area, as QEMU itself shows it."""
        with QmpClient(self.look) as client:
            client.negotiate()
            return read_memory(client, *SECRET_AREA, self.root)


_S = TypeVar("_S", bound=DevSevSite)


@contextmanager
def dev_sev_site(kind: type[_S], platform: Platform, pki: Pki) -> Iterator[_S]:
    """A site of this kind; nothing of it is left. Skips the test where system calls cannot be intercepted."""
    if why := why_not_under(platform):
        pytest.skip(f"system calls cannot be intercepted here (seccomp user notification): {why}")
    with short_folder() as root:
        site = kind(root, platform, pki)
        try:
            yield site
        finally:
            site.end()


def _printing(image: bytes) -> bytes:
    """The image with code at its reset vector that prints the beginning of the guest's secret area, and halts.

    A processor starts in real mode with CS at 0xFFFF0000 and IP 0xFFF0, and maps the image's end there.
    """
    top = len(image) - 0x10000
    descriptors = _CODE_AT + 0x80
    code = b"".join(
        (
            b"\x66\x2e\x0f\x01\x16" + (descriptors + 16).to_bytes(2, "little"),  # lgdt cs:[…], with a base of 32 bits
            b"\x0f\x20\xc0\x0c\x01\x0f\x22\xc0",  # mov eax, cr0; or al, 1; mov cr0, eax
            b"\xbb\x08\x00\x8e\xdb",  # mov bx, 8; mov ds, bx
            b"\x66\xbe" + SECRET_AREA[0].to_bytes(4, "little"),  # mov esi, …
            b"\xb9" + _SHOWN.to_bytes(2, "little"),  # mov cx, …
            b"\x67\xac\xe6" + bytes([_DEBUG_PORT]) + b"\xe2\xfa",  # lodsb [esi]; out …, al; loop
            b"\xf4\xeb\xfd",  # hlt; jmp hlt
        )
    )
    flat = 0x00CF_9300_0000_FFFF.to_bytes(8, "little")  # data, from 0 to 4 GiB
    table = bytes(8) + flat + (15).to_bytes(2, "little") + (0xFFFF_0000 + descriptors).to_bytes(4, "little")
    made = bytearray(image)
    made[top + _CODE_AT : top + _CODE_AT + len(code)] = code
    made[top + descriptors : top + descriptors + len(table)] = table
    jump = b"\xe9" + ((_CODE_AT - 0xFFF3) & 0xFFFF).to_bytes(2, "little")
    made[top + 0xFFF0 : top + 0xFFF3] = jump
    return bytes(made)
