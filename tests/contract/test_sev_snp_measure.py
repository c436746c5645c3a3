"""Launch digests agree with sev-snp-measure, an independent implementation, wherever it says anything.

It knows plain SEV, and SEV-ES as KVM_SEV_INIT2 makes it; the other flavours have other witnesses.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sevsnpmeasure import guest
from sevsnpmeasure.sev_mode import SevMode
from sevsnpmeasure.vcpu_types import CPU_SIGS

from common.sev.digest.compute import LaunchShape, hash_chunks, measure_firmware
from common.sev.digest.cpus import CpuType, parse_cpu
from common.sev.digest.kernel_hashes import KernelHashes
from common.sev.digest.vmsa import Flavour
from tests.support.firmware import entry, hashes_entry, reset_entry, secret_entry, with_footer

_KNOWN = {
    "00f771de-1a7e-4fcb-890e-68c77e2fb44e",
    "4c2eb361-7d9b-4cc3-8081-127c90d3d294",
    "7255371f-3a3b-4b04-927b-1da6efa8d454",
    "dc886566-984a-4798-a75e-5585a7bf67cc",  # it follows this one into the image
    "96b582de-1fb2-45f7-baea-a366c55a082d",
}
_ADDRESSES = st.integers(1, 0xFFFFFFFF)
_OTHER_ENTRIES = st.lists(
    st.builds(
        entry,
        st.uuids().map(str).filter(lambda guid: guid not in _KNOWN),
        st.binary(max_size=40),
    ),
    max_size=3,
)
# What its command line can pass on: no NUL, and valid UTF-8.
_CMDLINES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=200)


@st.composite
def _images(draw: st.DrawFn) -> bytes:
    """A firmware image with everything that SEV-ES and kernel hashes need, at random places and among others."""
    entries = [
        reset_entry(draw(_ADDRESSES)),
        secret_entry(draw(_ADDRESSES), draw(_ADDRESSES)),
        hashes_entry(draw(_ADDRESSES), draw(st.integers(176, 0x1000))),
        *draw(_OTHER_ENTRIES),
    ]
    return with_footer(draw(st.binary(max_size=3000)), draw(st.permutations(entries)))


@st.composite
def _cpus(draw: st.DrawFn) -> CpuType:
    if draw(st.booleans()):
        return parse_cpu(draw(st.sampled_from(sorted(CPU_SIGS))))
    family, model, stepping = draw(st.integers(0, 270)), draw(st.integers(0, 255)), draw(st.integers(0, 15))
    return CpuType(name="any", family=family, model=model, stepping=stepping)


@dataclass(frozen=True, kw_only=True)
class _Boot:
    """What is booted directly."""

    kernel: bytes | None
    initrd: bytes | None
    cmdline: str | None

    def hashes(self) -> KernelHashes | None:
        if self.kernel is None:
            return None
        initrd = None if self.initrd is None else hash_chunks([self.initrd])
        return KernelHashes.of(
            hash_chunks([self.kernel]), initrd, None if self.cmdline is None else self.cmdline.encode()
        )


def _witness(mode: SevMode, image: bytes, boot: _Boot, *, vcpus: int = 0, signature: int = 0) -> str:
    """What sev-snp-measure says, in hex."""
    with TemporaryDirectory() as folder:
        names = []
        for name, content in (("firmware", image), ("kernel", boot.kernel), ("initrd", boot.initrd)):
            path = Path(folder) / name
            if content is not None:
                path.write_bytes(content)
            names.append("" if content is None else str(path))
        digest: bytes = guest.calc_launch_digest(mode, vcpus, signature, *names, boot.cmdline or "", 0)
    return digest.hex()


_BLOBS = st.none() | st.binary(max_size=500)
_BOOTS = st.builds(_Boot, kernel=_BLOBS, initrd=_BLOBS, cmdline=st.none() | _CMDLINES)


@settings(max_examples=100, deadline=None, database=None)
@given(image=_images(), boot=_BOOTS)
def test_sev_digests_agree(image: bytes, boot: _Boot) -> None:
    ours = LaunchShape(firmware=measure_firmware([image]), hashes=boot.hashes()).digest()
    assert ours.hex() == _witness(SevMode.SEV, image, boot)


@settings(max_examples=100, deadline=None, database=None)
@given(image=_images(), boot=_BOOTS, vcpus=st.integers(1, 64), cpu=_cpus())
def test_sev_es_digests_agree_for_init2(image: bytes, boot: _Boot, vcpus: int, cpu: CpuType) -> None:
    firmware = measure_firmware([image])
    shape = LaunchShape(firmware=firmware, hashes=boot.hashes(), vcpus=vcpus, cpu=cpu, flavour=Flavour.INIT2)
    witness = _witness(SevMode.SEV_ES, image, boot, vcpus=vcpus, signature=cpu.signature)
    assert shape.digest().hex() == witness


@pytest.mark.parametrize("flavour", [flavour for flavour in Flavour if flavour is not Flavour.INIT2])
def test_the_other_flavours_are_other_digests(flavour: Flavour) -> None:
    image = with_footer(b"code", [reset_entry(0x80B004), entry(str(UUID(int=1)), b"x")])
    cpu = parse_cpu("EPYC-Milan")
    shape = LaunchShape(firmware=measure_firmware([image]), vcpus=2, cpu=cpu, flavour=flavour)
    assert shape.digest().hex() != _witness(
        SevMode.SEV_ES, image, _Boot(kernel=None, initrd=None, cmdline=None), vcpus=2, signature=cpu.signature
    )
