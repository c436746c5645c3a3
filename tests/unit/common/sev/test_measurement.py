"""The measurement and how it is matched against what is expected."""

from __future__ import annotations

import hashlib
import hmac
from base64 import b64decode

import pytest

from common.errors import InvalidInput, Reason, Refused
from common.sev import measurement as module
from common.sev.errors import ParseError
from common.sev.measurement import FirmwareVersion, MeasurementBlob, match, measure
from common.sev.policy import GuestPolicy
from tests.support.kbs_wire import kbs_wire

_TIK = bytes.fromhex("66320db73158a35a255d051758e95ed4")
_NONCE = bytes.fromhex("4fbe0bedbad6c86ae8f68971d103e554")
_DIGEST = hashlib.sha256(b"").digest()
_FIRMWARE = FirmwareVersion(0, 18, 15)
_POLICY = GuestPolicy.parse(0)
_MEASURE = bytes.fromhex("6faab2daae389bcd3405a05d6cafe33c0414f7bedd0bae19ba5f38b7fd1664ea")
_BLOB = MeasurementBlob(measurement=_MEASURE, nonce=_NONCE)


def _match(
    *,
    tik: bytes = _TIK,
    blob: MeasurementBlob = _BLOB,
    firmware: FirmwareVersion = _FIRMWARE,
    policy: GuestPolicy = _POLICY,
    digests: tuple[bytes, ...] = (_DIGEST,),
) -> int | None:
    return match(tik=tik, blob=blob, firmware=firmware, policy=policy, digests=digests)


def test_the_published_measurement_comes_out() -> None:
    assert measure(tik=_TIK, firmware=_FIRMWARE, policy=_POLICY, digest=_DIGEST, nonce=_NONCE) == _MEASURE


def test_the_wire_vector_of_another_project_is_the_same_measurement() -> None:
    vector = kbs_wire()["measurement"]
    blob = MeasurementBlob.parse(b64decode(vector["LaunchMeasurement"]))
    assert blob == _BLOB
    assert blob.measurement.hex() == vector["measure"]
    assert (vector["peer"], vector["tik"], vector["api"], vector["build"]) == (True, _TIK.hex(), [0, 18], 15)


def test_the_blob_of_a_real_launch_has_both_parts() -> None:
    blob = MeasurementBlob.parse(b64decode("ychmE35DRiv54GcbbM+igqxwfoshDLDVH0C7G8Ig0psQrgLNRNeZPPMzelvBwnZD"))
    assert (len(blob.measurement), len(blob.nonce)) == (32, 16)
    assert blob.measurement.hex().startswith("c9c866137e43462b")
    assert blob.nonce.hex() == "10ae02cd44d7993cf3337a5bc1c27643"


@pytest.mark.parametrize("size", [0, 32, 47, 49, 96])
def test_a_blob_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(ParseError, match="48 bytes"):
        MeasurementBlob.parse(bytes(size))


def test_a_blob_goes_back_to_its_bytes() -> None:
    assert MeasurementBlob.parse(_BLOB.to_bytes()) == _BLOB


@pytest.mark.parametrize("position", [0, 1, 5])
def test_the_index_of_the_expected_digest_is_returned(position: int) -> None:
    digests = [hashlib.sha256(bytes([n])).digest() for n in range(6)]
    digests[position] = _DIGEST
    assert _match(digests=tuple(digests)) == position


def test_of_equal_digests_the_first_counts() -> None:
    assert _match(digests=(bytes(32), _DIGEST, _DIGEST)) == 1


def test_nothing_expected_matches_nothing() -> None:
    assert _match(digests=()) is None


def test_an_unexpected_digest_matches_nothing() -> None:
    assert _match(digests=(bytes(32), hashlib.sha256(b"other").digest())) is None


@pytest.mark.parametrize(
    "changed",
    [
        {"tik": bytes(15) + b"\x01"},
        {"firmware": FirmwareVersion(0, 18, 14)},
        {"firmware": FirmwareVersion(0, 19, 15)},
        {"firmware": FirmwareVersion(1, 18, 15)},
        {"policy": GuestPolicy.parse(1)},
        {"policy": GuestPolicy.parse(0x01000000)},
        {"blob": MeasurementBlob(measurement=_MEASURE, nonce=bytes(16))},
    ],
)
def test_everything_that_is_covered_counts(changed: dict[str, object]) -> None:
    assert _match(**changed) is None  # type: ignore[arg-type]  # one keyword at a time, of any type


@pytest.mark.parametrize("position", range(32))
def test_a_flipped_byte_of_the_measurement_matches_nothing(position: int) -> None:
    wrong = bytearray(_MEASURE)
    wrong[position] ^= 1
    assert _match(blob=MeasurementBlob(measurement=bytes(wrong), nonce=_NONCE)) is None


def test_every_digest_is_compared_in_constant_time_after_a_match_too(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append(one)
        return hmac.compare_digest(one, other)

    class Spy:
        digest = staticmethod(hmac.digest)
        compare_digest = staticmethod(compare)

    monkeypatch.setattr(module, "hmac", Spy)
    assert _match(digests=(_DIGEST, bytes(32), b"\x01" * 32)) == 0
    assert len(compared) == 3


@pytest.mark.parametrize("firmware", [(0, 16, 255), (0, 0, 0), (0, 14, 15)])
def test_an_api_whose_measurement_covers_no_version_is_refused(firmware: tuple[int, int, int]) -> None:
    with pytest.raises(Refused, match=r"below API 0\.17") as caught:
        _match(firmware=FirmwareVersion(*firmware))
    assert caught.value.reason is Reason.FIRMWARE_TOO_OLD
    with pytest.raises(Refused):
        measure(tik=_TIK, firmware=FirmwareVersion(*firmware), policy=_POLICY, digest=_DIGEST, nonce=_NONCE)


@pytest.mark.parametrize(
    "version", [FirmwareVersion(0, 17, 0), FirmwareVersion(1, 0, 0), FirmwareVersion(255, 16, 255)]
)
def test_every_api_that_covers_its_version_is_accepted_from_the_oldest_on(version: FirmwareVersion) -> None:
    made = measure(tik=_TIK, firmware=version, policy=_POLICY, digest=_DIGEST, nonce=_NONCE)
    assert _match(firmware=version, blob=MeasurementBlob(measurement=made, nonce=_NONCE)) == 0


def test_the_key_of_a_launch_without_a_session_is_refused() -> None:
    made = measure(tik=bytes(16), firmware=_FIRMWARE, policy=_POLICY, digest=_DIGEST, nonce=_NONCE)
    with pytest.raises(InvalidInput, match="all zero"):
        _match(tik=bytes(16), blob=MeasurementBlob(measurement=made, nonce=_NONCE))


@pytest.mark.parametrize(
    "wrong",
    [
        {"tik": bytes(15)},
        {"digests": (bytes(31),)},
        {"blob": MeasurementBlob(measurement=_MEASURE, nonce=bytes(15))},
        {"firmware": FirmwareVersion(256, 18, 15)},
        {"firmware": FirmwareVersion(0, 18, 256)},
        {"firmware": FirmwareVersion(0, 18, -1)},
    ],
)
def test_a_wrong_size_or_number_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidInput):
        _match(**wrong)  # type: ignore[arg-type]  # one keyword at a time, of any type


def test_versions_compare_by_their_numbers_and_print_with_dots() -> None:
    assert FirmwareVersion.parse("0.24.20") < FirmwareVersion.parse("1.9.3") < FirmwareVersion.parse("1.55.24")
    assert str(FirmwareVersion.parse("1.55.24")) == "1.55.24"


@pytest.mark.parametrize(
    "text", ["", "1.55", "1.55.24.1", "1.55.256", "1.55.-1", "a.b.c", "1.55.24\n", " 1.55.24", "\u0661.\u0665.\u0662"]
)
def test_what_is_no_version_is_refused(text: str) -> None:
    with pytest.raises(ParseError, match=r"major\.minor\.build"):
        FirmwareVersion.parse(text)
