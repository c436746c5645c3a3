"""Genuine platforms: completed from the key service, verified once, and the deny-list beside it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import pytest

from common.amd.kds import FolderKeyService
from common.errors import NotFound, Reason, Refused, SevattestError, Unavailable
from common.sev.certs.roots import Root, pinned_roots
from common.sev.certs.sev import SevCertificate
from common.sev.certs.verify import VerifiedPlatform
from common.sev.errors import ParseError, UnsignedCek, UntrustedRoot
from tests.support.chains import SyntheticPlatform, fresh_ca, make_platform
from tests.support.eventually import until
from tests.support.recording_log import RecordingLog
from tests.support.rpc import SettableClock
from tests.support.vectors import vectors
from verifier import chores
from verifier.documents.broken_chips import BROKEN_CHIPS
from verifier.launches import platforms
from verifier.launches.platforms import DenyList, PlatformVerifier


class FakeKeyService:
    """Knows some chips; counts its calls; raises or hangs where a test wants it."""

    def __init__(self, known: Mapping[bytes, SevCertificate], error: Exception | None = None) -> None:
        self.known = known
        self.error = error
        self.calls = 0
        self.hang = False
        self.asked, self.answers = asyncio.Event(), asyncio.Event()
        self.answers.set()

    async def signed_cek(self, chip_id: bytes) -> SevCertificate:
        self.calls += 1
        self.asked.set()
        await self.answers.wait()
        if self.hang:
            await asyncio.Event().wait()
        if self.error is not None:
            raise self.error
        try:
            return self.known[chip_id]
        except KeyError:
            raise NotFound(Reason.NOT_FOUND, "no such chip") from None


@pytest.fixture(scope="module")
def platform() -> SyntheticPlatform:
    return make_platform()


def verifying(
    roots: Sequence[Root],
    service: FakeKeyService | None,
    clock: SettableClock | None = None,
    log: RecordingLog | None = None,
) -> PlatformVerifier:
    return PlatformVerifier(roots, service, log or RecordingLog(), clock or SettableClock())


def service(platform: SyntheticPlatform) -> FakeKeyService:
    return FakeKeyService({platform.chip_id: platform.chain.cek})


async def test_a_signed_chain_needs_no_key_service(platform: SyntheticPlatform) -> None:
    verified = await verifying([platform.root], None).verify(platform.chain.to_bytes(), b"")
    assert verified.chip_fingerprint == platform.chain.cek.fingerprint


async def test_an_unsigned_cek_is_completed_once(platform: SyntheticPlatform) -> None:
    keys = service(platform)
    verifier = verifying([platform.root], keys)
    for _ in range(3):
        verified = await verifier.verify(platform.unsigned_chain.to_bytes(), platform.chip_id)
        assert verified.chain.cek.is_signed
    assert keys.calls == 1


async def test_an_unsigned_cek_without_service_id_or_knowledge_is_refused(platform: SyntheticPlatform) -> None:
    chain = platform.unsigned_chain.to_bytes()
    for verifier, chip_id in (
        (verifying([platform.root], None), platform.chip_id),
        (verifying([platform.root], service(platform)), b""),
        (verifying([platform.root], service(platform)), bytes(64)),
    ):
        with pytest.raises(UnsignedCek):
            await verifier.verify(chain, chip_id)


async def test_another_chips_cek_is_refused(platform: SyntheticPlatform) -> None:
    other = make_platform()
    keys = FakeKeyService({platform.chip_id: other.chain.cek})
    with pytest.raises(Refused) as caught:
        await verifying([platform.root], keys).verify(platform.unsigned_chain.to_bytes(), platform.chip_id)
    assert caught.value.reason is Reason.CEK_MISMATCH


async def test_a_key_service_without_an_answer_is_an_outage(
    platform: SyntheticPlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platforms, "KEY_SERVICE_TIMEOUT_S", 0.01)
    keys = service(platform)
    keys.hang = True
    verifier = verifying([platform.root], keys)
    with pytest.raises(Unavailable) as caught:
        await verifier.verify(platform.unsigned_chain.to_bytes(), platform.chip_id)
    assert caught.value.reason is Reason.KEY_SERVICE_UNAVAILABLE
    keys.hang = False
    verified = await verifier.verify(platform.unsigned_chain.to_bytes(), platform.chip_id)
    assert verified.chain.cek.is_signed


async def test_a_chip_that_the_key_service_does_not_know_is_asked_for_once_in_a_while(
    platform: SyntheticPlatform,
) -> None:
    keys, clock = FakeKeyService({}), SettableClock()
    verifier, chain = verifying([platform.root], keys, clock), platform.unsigned_chain.to_bytes()
    for _ in range(3):
        with pytest.raises(UnsignedCek, match="does not know the chip"):
            await verifier.verify(chain, platform.chip_id)
        clock.advance(platforms.UNKNOWN_FOR / 3 - timedelta(seconds=1))
    assert keys.calls == 1
    clock.advance(timedelta(seconds=3))
    keys.known = {platform.chip_id: platform.chain.cek}
    assert (await verifier.verify(chain, platform.chip_id)).chain.cek.is_signed
    assert keys.calls == 2


async def test_that_one_chip_is_not_known_says_nothing_of_another(platform: SyntheticPlatform) -> None:
    keys = service(platform)
    verifier, chain = verifying([platform.root], keys), platform.unsigned_chain.to_bytes()
    with pytest.raises(UnsignedCek):
        await verifier.verify(chain, bytes(64))
    assert (await verifier.verify(chain, platform.chip_id)).chain.cek.is_signed


async def test_a_clock_that_went_back_asks_again(platform: SyntheticPlatform) -> None:
    keys, clock = FakeKeyService({}), SettableClock()
    verifier = verifying([platform.root], keys, clock)
    for _ in range(2):
        with pytest.raises(UnsignedCek):
            await verifier.verify(platform.unsigned_chain.to_bytes(), platform.chip_id)
        clock.advance(timedelta(days=-1))
    assert keys.calls == 2


async def test_an_outage_is_not_remembered_as_an_answer(platform: SyntheticPlatform) -> None:
    keys = FakeKeyService({platform.chip_id: platform.chain.cek}, Unavailable(Reason.KEY_SERVICE_UNAVAILABLE, "down"))
    verifier, chain = verifying([platform.root], keys), platform.unsigned_chain.to_bytes()
    with pytest.raises(Unavailable):
        await verifier.verify(chain, platform.chip_id)
    keys.error = None
    assert (await verifier.verify(chain, platform.chip_id)).chain.cek.is_signed


async def test_the_memory_of_unknown_chips_is_bounded(
    platform: SyntheticPlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platforms, "UNKNOWN_MAX", 2)
    keys = FakeKeyService({})
    verifier = verifying([platform.root], keys)
    for number in (1, 2, 3, 2, 3):
        with pytest.raises(UnsignedCek):
            await verifier.verify(platform.unsigned_chain.to_bytes(), bytes([number]) * 64)
    assert keys.calls == 3
    with pytest.raises(UnsignedCek):
        await verifier.verify(platform.unsigned_chain.to_bytes(), bytes([1]) * 64)
    assert keys.calls == 4


@pytest.mark.parametrize("answer", ["known", "unknown", "down"])
async def test_who_waits_for_the_same_chip_shares_one_answer(platform: SyntheticPlatform, answer: str) -> None:
    keys, log = service(platform), RecordingLog()
    if answer == "unknown":
        keys.known = {}
    if answer == "down":
        keys.error = Unavailable(Reason.KEY_SERVICE_UNAVAILABLE, "down")
    keys.answers.clear()
    verifier, chain = verifying([platform.root], keys, log=log), platform.unsigned_chain.to_bytes()
    first = asyncio.create_task(verifier.verify(chain, platform.chip_id))
    await keys.asked.wait()
    others = [asyncio.create_task(verifier.verify(chain, platform.chip_id)) for _ in range(8)]
    await asyncio.sleep(0)
    first.cancel()  # who leaves takes the answer from nobody
    keys.answers.set()
    ended = await asyncio.gather(first, *others, return_exceptions=True)
    assert isinstance(ended[0], asyncio.CancelledError)
    expected = {"known": VerifiedPlatform, "unknown": UnsignedCek, "down": Unavailable}[answer]
    assert {type(each) for each in ended[1:]} == {expected}
    assert keys.calls == 1
    assert len(log.named("key_service.unavailable")) == (answer == "down")
    assert verifier._asking == {}


async def test_a_refused_chain_is_not_remembered_as_good(platform: SyntheticPlatform) -> None:
    verifier = verifying([fresh_ca().root], None)
    for _ in range(2):
        with pytest.raises(UntrustedRoot):
            await verifier.verify(platform.chain.to_bytes(), b"")


async def test_the_memory_of_chains_is_bounded(platform: SyntheticPlatform, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platforms, "REMEMBERED_MAX", 2)
    verifier = verifying([platform.root], None)
    for _ in range(4):
        await verifier.verify(make_platform(ca=platform.ca).chain.to_bytes(), b"")
    assert len(verifier._remembered) == 2


@pytest.mark.parametrize("size", [0, 1, 8335, 8337])
async def test_another_size_is_no_chain(platform: SyntheticPlatform, size: int) -> None:
    with pytest.raises(ParseError):
        await verifying([platform.root], None).verify(bytes(size), b"")


async def test_a_changed_bit_anywhere_in_a_chain_is_refused(platform: SyntheticPlatform) -> None:
    verifier = verifying([platform.root], None)
    chain = platform.chain.to_bytes()
    for at in range(0, len(chain), 53):
        changed = bytearray(chain)
        changed[at] ^= 1
        with pytest.raises(SevattestError) as caught:
            await verifier.verify(bytes(changed), b"")
        assert isinstance(caught.value, Refused | ParseError)


def test_the_published_broken_chips_are_denied_by_their_ids() -> None:
    denied = DenyList()
    assert len(BROKEN_CHIPS) == 2
    for chip_id, why in BROKEN_CHIPS.items():
        assert len(bytes.fromhex(chip_id)) == 64
        assert denied.why("0" * 64, bytes.fromhex(chip_id)) == why
    assert denied.why("0" * 64, bytes(64)) is None
    assert denied.why("0" * 64) is None


def test_the_owner_denies_by_fingerprint_or_id_and_takes_it_back() -> None:
    denied = DenyList(["ab" * 32, "cd" * 64])
    assert denied.why("ab" * 32) == denied.why("0" * 64, b"\xcd" * 64) == "revoked by the owner"
    denied.set_owners([])
    assert denied.why("ab" * 32) is None
    assert denied.why("0" * 64, b"\xcd" * 64) is None
    assert denied.why("0" * 64, bytes.fromhex(next(iter(BROKEN_CHIPS))))


async def test_a_denied_id_denies_the_chips_key_as_well(platform: SyntheticPlatform) -> None:
    denied = DenyList([platform.chip_id.hex()])
    fingerprint = platform.chain.cek.fingerprint.hex()
    assert denied.why(fingerprint) is None
    assert await denied.resolve(service(platform), [platform.root], RecordingLog())
    assert denied.why(fingerprint) == "revoked by the owner"
    denied.set_owners([])
    assert denied.why(fingerprint) is None


async def test_a_key_service_can_deny_no_chip_without_a_genuine_signature(platform: SyntheticPlatform) -> None:
    denied = DenyList([platform.chip_id.hex()])
    await denied.resolve(service(platform), [fresh_ca().root], RecordingLog())
    assert denied.why(platform.chain.cek.fingerprint.hex()) is None


async def test_an_outage_leaves_the_deny_list_to_be_resolved_later(platform: SyntheticPlatform, tmp_path: Path) -> None:
    denied = DenyList([platform.chip_id.hex()])
    down = FakeKeyService({}, Unavailable(Reason.KEY_SERVICE_UNAVAILABLE, "down"))
    assert not await denied.resolve(down, [platform.root], RecordingLog())
    assert await denied.resolve(FolderKeyService(tmp_path), [platform.root], RecordingLog())


async def test_a_denied_chip_that_the_key_service_comes_to_know_is_denied_by_its_key(
    platform: SyntheticPlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chores, "RESOLVE_UNKNOWN_S", 0.01)
    denied, knows = DenyList([platform.chip_id.hex()]), FakeKeyService({})
    chore = asyncio.create_task(chores.resolve_denied(denied, knows, [platform.root], asyncio.Event(), RecordingLog()))
    await until(lambda: knows.calls > len(BROKEN_CHIPS) + 1)
    fingerprint = platform.chain.cek.fingerprint.hex()
    assert denied.why(fingerprint) is None
    knows.known = {platform.chip_id: platform.chain.cek}
    await until(lambda: denied.why(fingerprint))
    chore.cancel()
    await asyncio.gather(chore, return_exceptions=True)


async def test_an_answer_that_is_not_genuine_is_no_answer_about_a_denied_chip(platform: SyntheticPlatform) -> None:
    denied, log = DenyList([platform.chip_id.hex()]), RecordingLog()
    assert not await denied.resolve(service(platform), [fresh_ca().root], log)
    assert not log.named("deny_list.resolved")[0].fields["complete"]


async def test_a_real_rome_is_verified_to_amds_pinned_root() -> None:
    chain = b"".join((vectors() / "rome" / f"{name}.cert").read_bytes() for name in ("pdh", "pek", "oca", "cek"))
    verified = await verifying(pinned_roots(), None).verify(chain, b"")
    assert (verified.generation, verified.emulated) == ("rome", False)
    with pytest.raises(UntrustedRoot):
        await verifying([root for root in pinned_roots() if root.generation != "rome"], None).verify(chain, b"")
