"""The guest owner's side of the run: its workloads, and the secrets that each of them is to get.

All workloads but one boot the *current* artefacts. `several` boots the *other* ones: they are on file, so that the
owner's explanation can find them as neighbours, and its own launch shows that each of them boots when it may.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID, uuid4

from orchestrator.demo.artefacts import CURRENT, OLD, Artefacts
from orchestrator.demo.site import DATACENTER_DOMAIN, ORCHESTRATOR, Site, quoted

OTHER = OLD
# The version of the initrd that opens a disk; larger, so the others do without.
WITH_DISK = "disk"
ROME, MILAN = "EPYC-Rome", "EPYC-Milan"
CPUS, VCPUS = (ROME, MILAN), (1, 4)
# GRUB and the guest's own initramfs look for the disk's passphrase under this name.
DISK_GUID = UUID("736869e5-84f0-4973-92ec-06879ce3da0b")

PLAIN, SEVERAL, DISK, WRONG_DISK, FIRMWARE_ONLY = "plain", "several", "disk", "wrong-disk", "firmware-only"
TOO_LARGE, MISJUDGED = "too-large", "misjudged"
# More than the 3072 bytes that an AmdSev build of OVMF reserves, with room to reach what lies behind them.
LARGE_SIZE = 0xC80
_ROOMY = 16384


def es(vcpus: int, cpu: str) -> str:
    """The name of the workload for a SEV-ES guest of this shape."""
    return f"es-{vcpus}-{cpu}"


@dataclass(frozen=True, kw_only=True)
class Secret:
    """A secret on file.

    Attributes:
        guid: its name in the guest.
        file: where the owner keeps it.
        trailing_nul: whether the guest gets a NUL after it.
    """

    guid: UUID
    file: Path
    trailing_nul: bool = False

    @property
    def in_the_guest(self) -> bytes:
        """The bytes as a guest reads them."""
        return self.file.read_bytes() + (b"\0" if self.trailing_nul else b"")

    def text(self) -> str:
        """The secret's part of a document."""
        return (
            f"    - guid: {self.guid}\n      source: {{file: {quoted(str(self.file))}}}\n"
            f"      trailing_nul: {str(self.trailing_nul).lower()}\n"
        )


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One workload of one version.

    Attributes:
        name: what the orchestrator asks for.
        secrets: what its guests get.
        measure: the lines that say what is measured.
        plain: whether it allows a guest without SEV-ES.
    """

    name: str
    secrets: tuple[Secret, ...]
    measure: str
    plain: bool = True

    def text(self) -> str:
        """The document."""
        return f"""\
apiVersion: sevattest/v1
kind: Workload
metadata:
  name: {self.name}
  version: "1"
spec:
  callers:
    - spiffe://{DATACENTER_DOMAIN}/orchestrator/{ORCHESTRATOR}
{self.measure}
  policy:
    allow: [{"no-es" if self.plain else ""}]
  platforms:
    generations: [emulated]
    chips: any
  secrets:
{"".join(secret.text() for secret in self.secrets)}\
  lifetime: 10m
"""


class Owner:
    """The guest owner's folder with everything that the run's workloads need.

    Attributes:
        workloads: by name.
    """

    def __init__(self, site: Site, cmdlines: dict[str, str]) -> None:
        self._site = site
        self._cmdlines = cmdlines
        self.workloads: dict[str, Workload] = {}

    def write(self, *, passphrase: bytes | None, digest: bytes) -> None:
        """Write the documents, the secrets and the verifier's configuration.

        Args:
            passphrase: of the guest's disk; None where there is no disk.
            digest: launch digest of a plain guest with the current artefacts, 32 bytes.
        """
        one = self._secret
        self._add(PLAIN, one(), measure=self._measured())
        for cpu in CPUS:
            for vcpus in VCPUS:
                self._add(es(vcpus, cpu), one(), measure=self._measured(vcpus=vcpus, cpu=cpu), plain=False)
        several = (one(size=1), one(size=32, trailing_nul=True), one(size=999))
        self._add(SEVERAL, *several, measure=self._measured(OTHER))
        if passphrase is not None:
            for name, phrase in ((DISK, passphrase), (WRONG_DISK, passphrase[:-1])):
                secret = self._on_file(DISK_GUID, phrase, trailing_nul=True)
                self._add(name, secret, measure=self._measured(initrd=WITH_DISK))
        self._add(FIRMWARE_ONLY, one(), measure=self._measured(kernel=False))
        large = one(size=LARGE_SIZE)
        self._add(TOO_LARGE, large, measure=self._measured())
        # An owner who lists a digest has to be believed about the firmware behind it; this one is wrong about it.
        self._add(MISJUDGED, large, measure=f"  digests: [{digest.hex()}]\n  secret_area: {_ROOMY}")
        for workload in self.workloads.values():
            (self._site.owner / "documents" / f"{workload.name}.yaml").write_text(workload.text())
        self._site.write_verifier()

    def _add(self, name: str, *kept: Secret, measure: str, plain: bool = True) -> None:
        self.workloads[name] = Workload(name=name, secrets=kept, measure=measure, plain=plain)

    def _secret(self, *, size: int = 32, trailing_nul: bool = False) -> Secret:
        return self._on_file(uuid4(), secrets.token_bytes(size), trailing_nul=trailing_nul)

    def _on_file(self, guid: UUID, data: bytes, *, trailing_nul: bool = False) -> Secret:
        file = self._site.owner / f"secret-{uuid4()}"
        file.touch(mode=0o600)
        file.write_bytes(data)
        return Secret(guid=guid, file=file, trailing_nul=trailing_nul)

    def _measured(
        self,
        version: str = CURRENT,
        *,
        initrd: str | None = None,
        kernel: bool = True,
        vcpus: int | None = None,
        cpu: str | None = None,
    ) -> str:
        files = self._site.artefacts(self._site.owner, version)
        ram_disk = self._site.artefacts(self._site.owner, initrd or version).initrd
        lines = [f"firmware: {quoted(str(files.firmware))}"]
        if kernel:
            lines += [f"kernel: {quoted(str(files.kernel))}", f"initrd: {quoted(str(ram_disk))}"]
            lines += [f"cmdline: {quoted(self._cmdlines[version])}"]
        if vcpus is not None and cpu is not None:
            lines += [f"vcpus: [{vcpus}]", f"cpus: [{cpu}]"]
        return "\n".join(["  measure:", *(f"    {line}" for line in lines)])


def make_other(current: Artefacts, other: Artefacts) -> None:
    """Make the other firmware and kernel: such as a host might try, that differ in a byte or two and boot as well."""
    firmware = bytearray(current.firmware.read_bytes())
    firmware[_padding(firmware)] ^= 1
    other.firmware.write_bytes(firmware)
    # What loads a kernel ignores what follows its end.
    other.kernel.write_bytes(current.kernel.read_bytes() + bytes(16))


def _padding(image: Sequence[int]) -> int:
    """Where an image has nothing but padding: the middle of the longest-looking run of one byte near its start."""
    step = 4096
    blank = (0, 0xFF)
    for at in range(0, len(image) - step, step):
        if image[at] in blank and all(byte == image[at] for byte in image[at : at + step]):
            return at + step // 2
    return len(image) // 2
