"""The secret table and the secret packet."""

from __future__ import annotations

import hmac
from base64 import b64decode
from uuid import UUID

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from common.errors import InvalidInput, Reason, WrongState
from common.sev.errors import ParseError
from common.sev.secret import SecretEntry, SecretPacket, build_table, parse_table, seal_packet
from common.sev.session import LaunchKeys
from tests.support.kbs_wire import kbs_wire

_KEYS = LaunchKeys(tek=bytes(range(16)), tik=bytes.fromhex("66320db73158a35a255d051758e95ed4"))
_MEASURE = bytes.fromhex("6faab2daae389bcd3405a05d6cafe33c0414f7bedd0bae19ba5f38b7fd1664ea")
_IV = bytes(range(16, 32))
_AREA = 0xC00
_ONE = UUID("43ced044-42ec-487a-88b7-261bda359f24")
_OTHER = UUID("736869e5-84f0-4973-92ec-06879ce3da0b")


def _entry(guid: UUID = _ONE, data: bytes = b"TOP_SECRET_MESSAGE\n") -> SecretEntry:
    return SecretEntry(guid=guid, data=data)


def _seal(
    table: bytes, *, measurement: bytes = _MEASURE, iv: bytes = _IV, area_size: int = _AREA, keys: LaunchKeys = _KEYS
) -> SecretPacket:
    return seal_packet(keys=keys, table=table, measurement=measurement, iv=iv, area_size=area_size)


def _raw_table(*entries: tuple[UUID, int, bytes], length: int | None = None) -> bytes:
    body = b"".join(guid.bytes_le + size.to_bytes(4, "little") + data for guid, size, data in entries)
    header = UUID("1e74f542-71dd-4d66-963e-ef4287ff173b").bytes_le
    return header + (len(body) + 20 if length is None else length).to_bytes(4, "little") + body


# The table.


def test_a_table_holds_what_went_in() -> None:
    entries = (_entry(), _entry(_OTHER, b"\x00\xff" * 40), _entry(UUID(int=5), b""))
    assert parse_table(build_table(entries)) == entries


@pytest.mark.parametrize("size", range(33))
def test_a_table_is_padded_to_whole_blocks_and_never_by_a_whole_one(size: int) -> None:
    table = build_table([_entry(data=b"x" * size)])
    length = int.from_bytes(table[16:20], "little")
    assert length == 40 + size
    assert len(table) % 16 == 0
    assert 0 <= len(table) - length <= 15
    assert not any(table[length:])


@pytest.mark.parametrize(
    ("name", "guid", "data"),
    [
        ("table_bundle", "e6f5a162-d67f-4750-a67c-5d065f2a9910", None),
        ("table_luks", "736869e5-84f0-4973-92ec-06879ce3da0b", b"passphrase\0"),
        ("table_binary_key", "0a46e24d-478c-4eb1-8696-113eeec3aa99", None),
    ],
)
def test_tables_are_those_of_the_wire_vectors(name: str, guid: str, data: bytes | None) -> None:
    vector = bytes.fromhex(kbs_wire()[name]["hex"])
    (entry,) = parse_table(vector)
    assert entry.guid == UUID(guid)
    assert data is None or entry.data == data
    # The vectors are padded with a whole block where they are aligned already; the content is what must agree.
    assert vector.startswith(build_table([entry]))
    assert not any(vector[len(build_table([entry])) :])


def test_a_length_that_includes_the_padding_is_accepted() -> None:
    vector = kbs_wire()["table_luks"]
    padded = parse_table(bytes.fromhex(vector["hex_len_includes_padding"]))
    assert padded == parse_table(bytes.fromhex(vector["hex"]))


def test_deleted_entries_are_skipped() -> None:
    table = _raw_table((UUID(int=0), 24, b"gone"), (_ONE, 24, b"here"))
    assert parse_table(table) == (_entry(data=b"here"),)


def test_the_rest_of_the_area_is_ignored() -> None:
    assert parse_table(_raw_table((_ONE, 24, b"here")) + b"\xff" * 100) == (_entry(data=b"here"),)


def test_linux_looks_at_64_entries_and_no_further() -> None:
    raw = _raw_table(*((UUID(int=n), 21, b"x") for n in range(1, 66)))
    assert len(parse_table(raw)) == 64
    # Not even where what follows is corrupted.
    assert len(parse_table(raw[:-5] + b"\xff" * 5)) == 64


@pytest.mark.parametrize(
    "table",
    [
        b"",
        bytes(20),
        _raw_table((_ONE, 24, b"here"))[:19],
        _raw_table((_ONE, 24, b"here"), length=19),
        _raw_table((_ONE, 24, b"here"), length=45),
        _raw_table((_ONE, 19, b"here")),
        _raw_table((_ONE, 25, b"here")),
        _raw_table((_ONE, 0, b"here")),
        _raw_table((_ONE, 24, b"here"), (_OTHER, 0xFFFFFFFF, b"x")),
        _raw_table((UUID(int=0), 3, b"here")),
        _raw_table((_ONE, 24, b"here"), (_ONE, 24, b"same")),
        b"\x00" + _raw_table((_ONE, 24, b"here"))[1:],
    ],
    ids=[
        "empty",
        "zeros",
        "short",
        "length below the header",
        "length beyond the area",
        "entry below its header",
        "entry beyond the table",
        "entry of length zero",
        "second entry far beyond",
        "deleted entry too short",
        "duplicate",
        "other GUID",
    ],
)
def test_of_a_corrupted_table_nothing_is_read(table: bytes) -> None:
    with pytest.raises(ParseError):
        parse_table(table)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "at least one"),
        ([_entry(), _entry(_OTHER), _entry()], "twice"),
        ([_entry(UUID(int=0))], "zero GUID"),
        ([_entry(UUID(int=n)) for n in range(1, 66)], "at most 64"),
    ],
)
def test_a_table_that_a_guest_would_misread_is_not_built(entries: list[SecretEntry], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        build_table(entries)


def test_64_secrets_fit_into_a_table() -> None:
    entries = tuple(_entry(UUID(int=n), b"") for n in range(1, 65))
    assert parse_table(build_table(entries)) == entries


def test_a_secret_never_shows() -> None:
    assert "TOP_SECRET" not in f"{_entry()!r}{_entry()}"


# The packet.


def test_the_packet_of_the_wire_vector_comes_out() -> None:
    vector = kbs_wire()["secret_packet"]
    keys = LaunchKeys(tek=bytes.fromhex(vector["tek"]), tik=bytes.fromhex(vector["tik"]))
    packet = _seal(
        bytes.fromhex(vector["plaintext"]),
        keys=keys,
        measurement=bytes.fromhex(vector["measure"]),
        iv=bytes.fromhex(vector["iv"]),
    )
    assert packet.header == b64decode(vector["LaunchSecretHeader"])
    assert packet.payload == b64decode(vector["LaunchSecretData"])


def test_the_known_case_gives_a_header_of_52_and_a_payload_of_64_bytes() -> None:
    recorded = (
        b64decode("AAAAAKzd9a3vLYPW4fcwzlsAq+YY6Vhlqcj65QvIzqy3Mc+XPiyzEsCsmKKIpk8SfnAF7w=="),
        b64decode("s1Ua7oK6RH54g97oWgV1XWqQw4vpZLpfAL2oCVG9uLhjB+dzHxeKnQbxaiQ8ibSUedTfZx28QIz7tKaRh12mIg=="),
    )
    packet = _seal(build_table([_entry()]))
    assert (len(packet.header), len(packet.payload)) == tuple(len(part) for part in recorded) == (52, 64)
    assert packet.header[:4] == recorded[0][:4] == bytes(4)


def test_the_guest_reads_what_the_owner_sealed() -> None:
    table = build_table([_entry()])
    packet = _seal(table)
    decryptor = Cipher(algorithms.AES(_KEYS.tek), modes.CTR(packet.header[4:20])).decryptor()
    assert decryptor.update(packet.payload) + decryptor.finalize() == table
    assert b"TOP_SECRET" not in packet.payload


def test_the_mac_covers_flags_iv_lengths_payload_and_measurement() -> None:
    table = build_table([_entry()])
    packet = _seal(table)
    size = (64).to_bytes(4, "little")
    covered = b"\x01" + bytes(4) + _IV + size + size + packet.payload + _MEASURE
    assert packet.header[20:] == hmac.digest(_KEYS.tik, covered, "sha256")
    assert _seal(table, measurement=bytes(32)).header[20:] != packet.header[20:]
    assert _seal(table, iv=bytes(16)).header[20:] != packet.header[20:]


def test_a_table_that_fills_the_area_is_sealed_and_one_block_more_is_refused() -> None:
    full = build_table([_entry(data=b"x" * (_AREA - 40))])
    assert len(_seal(full).payload) == _AREA
    with pytest.raises(WrongState, match="take 3088 bytes, the guest has room for 3072") as caught:
        _seal(build_table([_entry(data=b"x" * (_AREA - 39))]))
    assert caught.value.reason is Reason.SECRET_TOO_LARGE


def test_no_area_is_larger_than_what_the_kernel_passes_on() -> None:
    assert len(_seal(bytes(0x4000), area_size=0x10000).payload) == 0x4000
    with pytest.raises(WrongState) as caught:
        _seal(bytes(0x4010), area_size=0x10000)
    assert caught.value.reason is Reason.SECRET_TOO_LARGE


def test_a_guest_without_an_area_gets_no_packet() -> None:
    with pytest.raises(WrongState) as caught:
        _seal(build_table([_entry()]), area_size=0)
    assert caught.value.reason is Reason.NO_SECRET_AREA


@pytest.mark.parametrize("size", [0, 1, 15, 17])
def test_a_payload_of_broken_blocks_is_refused(size: int) -> None:
    with pytest.raises(InvalidInput, match="multiple of 16"):
        _seal(bytes(size))


@pytest.mark.parametrize("size", [0, 15, 17])
def test_an_iv_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(InvalidInput, match="IV has 16 bytes"):
        _seal(bytes(16), iv=bytes(size))


@pytest.mark.parametrize("size", [0, 31, 48])
def test_a_measurement_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(InvalidInput, match="measurement has 32 bytes"):
        _seal(bytes(16), measurement=bytes(size))
