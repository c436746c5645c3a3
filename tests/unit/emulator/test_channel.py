"""The firmware's end of the channel, against figures that others published (formats.md names each source)."""

from __future__ import annotations

import hmac
from hashlib import sha256

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from common.sev.abi import Status
from emulator import channel
from emulator.channel import Channel
from emulator.errors import FirmwareFailed

ZERO = bytes(16)
# virtee/sev, session tests: every input zero, the shared secret being 16 zero bytes.
MASTER = bytes.fromhex("ab4d269fcc62bedb4511d56c386ce706")
KEK = bytes.fromhex("b6abfbfb75ea1ea74ed8750b8afdb973")
KIK = bytes.fromhex("53b524bf5669a363f365c864acba8572")
WRAPPED = bytes.fromhex("2137bc7f9bb8bd7c3e55a576a15d3454b3856b8ba27afadf46dcfee9f02c02c4")
WRAP_MAC = bytes.fromhex("3176c0752738bd9d5e86689534020f528c088f16238826b000b327dee6aeed7d")
POLICY_MAC = bytes.fromhex("aa7855e13839dd767cd5da7c1ff5036540c9264b7a803029315e55375287b4af")


def test_the_keys_derived_from_zero_are_the_published_ones() -> None:
    master = channel.derive(ZERO, b"sev-master-secret", ZERO)
    assert master == MASTER
    assert channel.derive(master, b"sev-kek") == KEK
    assert channel.derive(master, b"sev-kik") == KIK


def test_another_label_or_context_gives_another_key() -> None:
    others = {
        channel.derive(ZERO, b"sev-master-secret", b"\1" + ZERO[1:]),
        channel.derive(ZERO, b"sev-master-secret"),
        channel.derive(ZERO, b"sev-kek", ZERO),
    }
    assert MASTER not in others
    assert len(others) == 3


def test_the_published_session_for_zero_keys_is_opened() -> None:
    channel._check_mac(KIK, WRAPPED, WRAP_MAC)
    assert channel._ctr(KEK, ZERO, WRAPPED) == bytes(32)
    channel._check_mac(ZERO, bytes(4), POLICY_MAC)


@pytest.mark.parametrize("byte", [0, 16, 31])
def test_a_changed_byte_of_the_published_session_is_a_bad_measurement(byte: int) -> None:
    changed = bytearray(WRAPPED)
    changed[byte] ^= 1
    with pytest.raises(FirmwareFailed) as failure:
        channel._check_mac(KIK, bytes(changed), WRAP_MAC)
    assert failure.value.status is Status.BAD_MEASUREMENT


def test_the_shared_secret_is_the_big_endian_x_coordinate_of_rfc_5903() -> None:
    # RFC 5903, section 8.2: 384-bit random ECP group; i, gr and the shared x, big-endian as printed there.
    private = int(
        "099F3C7034D4A2C699884D73A375A67F7624EF7C6B3C0F160647B67414DCE655E35B538041E649EE3FAEF896783AB194", 16
    )
    x = int("E558DBEF53EECDE3D3FCCFC1AEA08A89A987475D12FD950D83CFA41732BC509D0D1AC43A0336DEF96FDA41D0774A3571", 16)
    y = int("DCFBEC7AACF3196472169E838430367F66EEBE3C6E70C416DD5F0C68759DD1FFF83FA40142209DFF5EAAD96DB9E6386C", 16)
    shared = bytes.fromhex(
        "11187331C279962D93D604243FD592CB9D0A926F422E47187521287E7156C5C4D603135569B9E9D09CF5D4A270F59746"
    )
    key = ec.derive_private_key(private, ec.SECP384R1())
    peer = ec.EllipticCurvePublicNumbers(x, y, ec.SECP384R1()).public_key()
    assert key.exchange(ec.ECDH(), peer) == shared
    assert len(channel.derive(shared, b"sev-master-secret", ZERO)) == 16


def test_the_published_measurement_is_made() -> None:
    # virtee/sevctl, tests/measurementbuild.rs: API 0.18 build 15, policy 0, digest of nothing.
    made = channel.measure(
        bytes.fromhex("66320db73158a35a255d051758e95ed4"),
        (0, 18),
        15,
        0,
        sha256().digest(),
        bytes.fromhex("4fbe0bedbad6c86ae8f68971d103e554"),
    )
    assert made.hex() == "6faab2daae389bcd3405a05d6cafe33c0414f7bedd0bae19ba5f38b7fd1664ea"


@pytest.mark.parametrize(
    ("api", "build", "policy"), [((1, 18), 15, 0), ((0, 17), 15, 0), ((0, 18), 14, 0), ((0, 18), 15, 1)]
)
def test_a_measurement_covers_version_and_policy(api: tuple[int, int], build: int, policy: int) -> None:
    nonce = bytes.fromhex("4fbe0bedbad6c86ae8f68971d103e554")
    tik = bytes.fromhex("66320db73158a35a255d051758e95ed4")
    made = channel.measure(tik, api, build, policy, sha256().digest(), nonce)
    assert made.hex() != "6faab2daae389bcd3405a05d6cafe33c0414f7bedd0bae19ba5f38b7fd1664ea"


def _packet(keys: Channel, payload: bytes, measurement: bytes, *, flags: int = 0) -> tuple[bytes, bytes]:
    """A packet as formats.md section 9 lays it down, made here and nowhere else."""
    iv = b"v" * 16
    ciphertext = channel._ctr(keys.tek, iv, payload)
    length = len(ciphertext).to_bytes(4, "little")
    covered = b"\1" + flags.to_bytes(4, "little") + iv + length + length + ciphertext + measurement
    mac = hmac.digest(keys.tik, covered, "sha256")
    return flags.to_bytes(4, "little") + iv + mac, ciphertext


KEYS = Channel(tek=b"e" * 16, tik=b"i" * 16)
MEASUREMENT = b"m" * 32


def test_a_packet_for_this_measurement_is_opened() -> None:
    header, payload = _packet(KEYS, b"p" * 48, MEASUREMENT)
    assert len(header) == 52
    opened = channel.open_packet(KEYS, header=header, payload=payload, guest_length=48, measurement=MEASUREMENT)
    assert opened == b"p" * 48


@pytest.mark.parametrize("what", ["flags", "iv", "mac", "payload", "measurement", "length", "tik"])
def test_a_packet_with_anything_changed_is_a_bad_measurement(what: str) -> None:
    header, payload = _packet(KEYS, b"p" * 48, MEASUREMENT)
    at = {"flags": 0, "iv": 4, "mac": 20}
    if what in at:
        header = header[: at[what]] + bytes([header[at[what]] ^ 1]) + header[at[what] + 1 :]
    keys = Channel(tek=KEYS.tek, tik=b"j" * 16) if what == "tik" else KEYS
    with pytest.raises(FirmwareFailed) as failure:
        channel.open_packet(
            keys,
            header=header,
            payload=b"q" * 48 if what == "payload" else payload,
            guest_length=32 if what == "length" else 48,
            measurement=b"n" * 32 if what == "measurement" else MEASUREMENT,
        )
    assert failure.value.status is Status.BAD_MEASUREMENT


def test_a_compressed_packet_is_unsupported_once_its_mac_is_right() -> None:
    header, payload = _packet(KEYS, b"p" * 16, MEASUREMENT, flags=1)
    with pytest.raises(FirmwareFailed) as failure:
        channel.open_packet(KEYS, header=header, payload=payload, guest_length=16, measurement=MEASUREMENT)
    assert failure.value.status is Status.UNSUPPORTED


@pytest.mark.parametrize(
    ("header", "payload", "guest"),
    [(51, 16, 16), (53, 16, 16), (52, 0, 0), (52, 15, 15), (52, 16, 32), (52, 0x5010, 0x5010)],
)
def test_lengths_are_checked_before_keys(header: int, payload: int, guest: int) -> None:
    with pytest.raises(FirmwareFailed) as failure:
        channel.check_packet_lengths(bytes(header), bytes(payload), guest)
    assert failure.value.status is Status.INVALID_LEN


@pytest.mark.parametrize("size", [16, 3072, 0x5000])
def test_lengths_that_fit_are_accepted(size: int) -> None:
    channel.check_packet_lengths(bytes(52), bytes(size), size)


def test_keys_are_not_printed() -> None:
    assert "e" * 4 not in repr(KEYS)
    assert "i" * 4 not in repr(KEYS)
