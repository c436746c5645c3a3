"""Launch digests: known answers, what a shape refuses, and that memory stays flat."""

from __future__ import annotations

import hashlib
import tracemalloc
from collections.abc import Iterator
from random import Random

import pytest

from common.errors import InvalidInput
from common.sev.digest.compute import LaunchShape, MeasuredFirmware, hash_chunks, measure_firmware
from common.sev.digest.cpus import parse_cpu
from common.sev.digest.kernel_hashes import KernelHashes
from common.sev.digest.ovmf import Area, Footer
from common.sev.digest.vmsa import Flavour, vmsa_pages
from common.sev.errors import ParseError
from tests.support.firmware import AMDSEV_ENTRIES, amdsev_image, hashes_entry, reset_entry, with_footer
from tests.support.vectors import vectors

_NOTHING = hashlib.sha256(b"").digest()
_CPU = parse_cpu("EPYC-v4")
_MIB = 1 << 20


def _suffix(name: str) -> MeasuredFirmware:
    return measure_firmware([(vectors() / "ovmf" / f"ovmf_{name}_suffix.bin").read_bytes()])


def _measured(image: bytes | None = None) -> MeasuredFirmware:
    return measure_firmware([image or amdsev_image()])


# Known answers, made by sev-snp-measure with its own fixtures.


@pytest.mark.parametrize(
    ("hashes", "digest"),
    [
        (
            KernelHashes.of(_NOTHING, _NOTHING, b"console=ttyS0 loglevel=7"),
            "82a3ee5d537c3620628270c292ae30cb40c3c878666a7890ee7ef2a08fb535ff",
        ),
        (KernelHashes.of(_NOTHING, None, None), "77f613d7bbcdf12a73782ea9e88b0172aeda50d1a54201cb903594ff52846898"),
    ],
)
def test_sev_digests_with_a_kernel_are_the_known_ones(hashes: KernelHashes, digest: str) -> None:
    assert LaunchShape(firmware=_suffix("AmdSev"), hashes=hashes).digest().hex() == digest


def test_a_sev_digest_without_a_kernel_is_the_firmwares_hash() -> None:
    firmware = _suffix("OvmfX64")
    known = "b4c021e085fb83ceffe6571a3d357b4a98773c83c474e47f76c876708fe316da"
    assert LaunchShape(firmware=firmware).digest() == firmware.sha256 == bytes.fromhex(known)


@pytest.mark.parametrize(
    ("vcpus", "digest"),
    [
        (1, "13810ae661ea11e2bb205621f582fee268f0367c8f97bc297b7fadef3e12002c"),
        (4, "0dccbcaba8e90b261bd0d2e1863a2f9da714768b7b2a19363cd6ae35aa90de91"),
    ],
)
def test_sev_es_digests_are_the_known_ones(vcpus: int, digest: str) -> None:
    hashes = KernelHashes.of(_NOTHING, None, None)
    shape = LaunchShape(firmware=_suffix("AmdSev"), hashes=hashes, vcpus=vcpus, cpu=_CPU, flavour=Flavour.INIT2)
    assert shape.digest().hex() == digest


# Reading images.


@pytest.mark.parametrize("chunk", [1, 16, 37, 4096, 70_000, 200_000])
def test_the_size_of_chunks_changes_nothing(chunk: int) -> None:
    image = amdsev_image(size=150_000)
    whole = measure_firmware([image])
    assert measure_firmware(image[at : at + chunk] for at in range(0, len(image), chunk)) == whole
    assert (whole.sha256, whole.size) == (hashlib.sha256(image).digest(), len(image))
    assert whole.footer == Footer(
        reset_address=0x80B004,
        secret_area=Area(base=0x810000, size=0xC00),
        hashes_area=Area(base=0x810C00, size=0x400),
    )


def test_the_longest_table_is_still_read() -> None:
    filler = (b"\0" * 60_000) + (60_018).to_bytes(2, "little") + bytes(16)
    image = with_footer(b"", [reset_entry(7), filler])
    assert measure_firmware(image[at : at + 999] for at in range(0, len(image), 999)).footer.reset_address == 7


@pytest.mark.parametrize("size", [0, 16, 32, 47])
def test_an_image_without_room_for_a_reset_vector_is_refused(size: int) -> None:
    with pytest.raises(ParseError, match="at least 48 bytes"):
        measure_firmware([bytes(size)])


@pytest.mark.parametrize("size", [49, 63, 4095, 4097])
def test_an_image_that_firmware_could_not_measure_is_refused(size: int) -> None:
    with pytest.raises(ParseError, match=f"multiple of 16 bytes, not {size}"):
        measure_firmware([bytes(size)])


def test_a_resumed_hash_leaves_the_firmware_as_it_was() -> None:
    firmware = _measured()
    firmware.resume().update(b"more")
    assert LaunchShape(firmware=firmware).digest() == firmware.sha256


def test_a_file_in_chunks_has_the_files_hash() -> None:
    data = Random(1).randbytes(100_000)  # noqa: S311 -- not a secret
    assert hash_chunks(data[at : at + 999] for at in range(0, len(data), 999)) == hashlib.sha256(data).digest()
    assert hash_chunks([]) == _NOTHING


def _stream(mib: int) -> Iterator[bytes]:
    for number in range(mib):
        yield bytes([number]) * _MIB


@pytest.mark.slow
def test_memory_does_not_grow_with_the_size_of_an_image() -> None:
    tracemalloc.start()
    try:
        hash_chunks(_stream(64))
        measure_firmware(_stream(64))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * _MIB


# Shapes.


def test_everything_is_hashed_in_the_order_of_measuring() -> None:
    image = amdsev_image()
    hashes = KernelHashes.of(_NOTHING, None, b"quiet")
    shape = LaunchShape(firmware=_measured(image), hashes=hashes, vcpus=3, cpu=_CPU, flavour=Flavour.LEGACY)
    pages = vmsa_pages(vcpus=3, cpu=_CPU, flavour=Flavour.LEGACY, reset_address=0x80B004)
    assert shape.digest() == hashlib.sha256(image + hashes.table() + b"".join(pages)).digest()


def test_every_part_of_a_shape_changes_the_digest() -> None:
    firmware, hashes = _measured(), KernelHashes.of(_NOTHING, None, None)
    shapes = [
        LaunchShape(firmware=firmware),
        LaunchShape(firmware=_measured(amdsev_image("two"))),
        LaunchShape(firmware=firmware, hashes=hashes),
        LaunchShape(firmware=firmware, hashes=KernelHashes.of(_NOTHING, None, b"\n")),
        *(
            LaunchShape(firmware=firmware, hashes=hashes, vcpus=vcpus, cpu=cpu, flavour=flavour)
            for vcpus in (2, 3)
            for cpu in (_CPU, parse_cpu("EPYC-Rome"))
            for flavour in Flavour
        ),
    ]
    assert len({shape.digest() for shape in shapes}) == len(shapes)


def test_kernel_hashes_need_an_area_in_the_firmware() -> None:
    hashes = KernelHashes.of(_NOTHING, None, None)
    for entries in ([], [reset_entry(1)], [hashes_entry(0, 0)]):
        firmware = _measured(with_footer(bytes(100), entries))
        with pytest.raises(InvalidInput, match="no area for kernel hashes: only an AmdSev build"):
            LaunchShape(firmware=firmware, hashes=hashes)
        assert LaunchShape(firmware=firmware).digest() == firmware.sha256


def test_an_area_too_small_for_the_table_is_refused() -> None:
    hashes = KernelHashes.of(_NOTHING, None, None)
    LaunchShape(firmware=_measured(with_footer(b"", [hashes_entry(0x810C00, 176)])), hashes=hashes)
    with pytest.raises(InvalidInput, match="has 175 bytes, the table takes 176"):
        LaunchShape(firmware=_measured(with_footer(b"", [hashes_entry(0x810C00, 175)])), hashes=hashes)


@pytest.mark.parametrize(
    "given",
    [
        {"vcpus": 1},
        {"cpu": _CPU},
        {"flavour": Flavour.LEGACY},
        {"vcpus": 1, "cpu": _CPU},
        {"vcpus": 1, "flavour": Flavour.LEGACY},
        {"cpu": _CPU, "flavour": Flavour.LEGACY},
    ],
)
def test_half_a_sev_es_shape_is_refused(given: dict[str, object]) -> None:
    with pytest.raises(InvalidInput, match="needs vCPUs, CPU type and VMSA flavour"):
        LaunchShape(firmware=_measured(), **given)  # type: ignore[arg-type]  # some of the three, on purpose


@pytest.mark.parametrize("vcpus", [0, 65, -8])
def test_a_shape_of_too_many_or_no_vcpus_is_refused(vcpus: int) -> None:
    with pytest.raises(InvalidInput, match="1 to 64"):
        LaunchShape(firmware=_measured(), vcpus=vcpus, cpu=_CPU, flavour=Flavour.LEGACY)


def test_a_second_vcpu_needs_a_reset_address() -> None:
    firmware = _measured(with_footer(b"", AMDSEV_ENTRIES[1:]))
    LaunchShape(firmware=firmware, vcpus=1, cpu=_CPU, flavour=Flavour.LEGACY)
    with pytest.raises(InvalidInput, match="no SEV-ES reset address"):
        LaunchShape(firmware=firmware, vcpus=2, cpu=_CPU, flavour=Flavour.LEGACY)


def test_shapes_describe_themselves_to_people() -> None:
    firmware, hashes = _measured(), KernelHashes.of(_NOTHING, None, None)
    es = LaunchShape(firmware=firmware, hashes=hashes, vcpus=8, cpu=parse_cpu("EPYC-Rome"), flavour=Flavour.LEGACY)
    assert es.describe() == "SEV-ES with kernel hashes, 8 vCPUs EPYC-Rome (23-49-0), VMSA legacy"
    plain = LaunchShape(firmware=firmware)
    assert plain.describe() == "SEV without kernel hashes; vCPUs and CPU type are not measured"
