"""Is it a genuine platform, and which one: completes a chain from the key service and verifies it, once.

A platform's own copy of its CEK carries no signature. The signed one is fetched by the chip's id and attached only
where its body is the same. What was verified is remembered by the SHA-256 of the bytes that came in: a signature does
not go bad, and what may change (the deny-list, the workload) is judged elsewhere, every time.

A host says which chip it has, so it could have the key service asked for chips that are none, again and again. It is
asked for one chip once at a time, whoever waits for the answer, and for one that it does not know once in minutes.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from functools import partial

from common.amd.kds import KeyService
from common.clock import Clock
from common.errors import NotFound, Reason, SevattestError, Unavailable
from common.sev.certs.chain import PlatformChain
from common.sev.certs.roots import Root
from common.sev.certs.sev import SevCertificate, verify_signature
from common.sev.certs.verify import VerifiedPlatform, attach_cek, verify_platform
from common.sev.errors import BadSignature, UnsignedCek
from common.telemetry.log import Log
from verifier.documents.broken_chips import BROKEN_CHIPS

# 8.3 KB of certificates each; a datacenter's worth of hosts.
REMEMBERED_MAX = 4096
KEY_SERVICE_TIMEOUT_S = 20.0  # within the 60 s that a call may last
# Long enough to spare the key service a host that is tried again and again, and short enough for an operator to wait
# who has just put the CEK into the folder. Ids of 64 bytes: of one more than so many at once the oldest is forgotten.
UNKNOWN_FOR = timedelta(minutes=5)
UNKNOWN_MAX = 4096
_FINGERPRINT_DIGITS = 64
_CHIP_ID_DIGITS = 128


class DenyList:
    """Chips that are never accepted: those whose keys are public, and those that the owner names."""

    def __init__(self, owners: Iterable[str] = ()) -> None:
        """Start with the published chips.

        Args:
            owners: lower-case hex of CEK fingerprints (64 digits) or chip ids (128 digits).
        """
        self._by_fingerprint: dict[str, str] = {}
        self._by_chip_id: dict[str, str] = {}
        self._fingerprint_of: dict[str, str] = {}
        self.set_owners(owners)

    def set_owners(self, owners: Iterable[str]) -> frozenset[str]:
        """Put another list of the owner's in place of the last; the chip ids that the last did not name."""
        before = self._by_chip_id.keys()
        named = dict.fromkeys(owners, "revoked by the owner")
        self._by_fingerprint = {each: why for each, why in named.items() if len(each) == _FINGERPRINT_DIGITS}
        self._by_chip_id = {each: why for each, why in named.items() if len(each) == _CHIP_ID_DIGITS} | BROKEN_CHIPS
        return frozenset(self._by_chip_id.keys() - before)

    def why(self, fingerprint: str, chip_id: bytes = b"") -> str | None:
        """Why this chip is denied; None where it is not.

        Args:
            fingerprint: of its CEK, lower-case hex.
            chip_id: its id, where the host gives one.
        """
        resolved = (why for each, why in self._by_chip_id.items() if self._fingerprint_of.get(each) == fingerprint)
        return self._by_fingerprint.get(fingerprint) or self._by_chip_id.get(chip_id.hex()) or next(resolved, None)

    def fingerprints(self, chip_ids: Iterable[str]) -> frozenset[str]:
        """The CEK fingerprints behind chip ids, as far as they are known; lower-case hex, like the ids."""
        return frozenset(self._fingerprint_of[each] for each in chip_ids if each in self._fingerprint_of)

    async def resolve(
        self, service: KeyService, roots: Sequence[Root], log: Log, only: frozenset[str] | None = None
    ) -> bool:
        """Learn the fingerprints behind the chip ids, which a host cannot leave out.

        Args:
            service: whom to ask.
            roots: whose signature a CEK must carry.
            log: the owner's.
            only: the ids to ask about; None for all.

        Returns:
            Whether every id that the key service knows is resolved; others it may come to know.
        """
        complete = True
        unknown = self._by_chip_id.keys() - self._fingerprint_of.keys()
        asked = unknown if only is None else unknown & only
        for chip_id in asked:
            try:
                async with asyncio.timeout(KEY_SERVICE_TIMEOUT_S):
                    cek = await service.signed_cek(bytes.fromhex(chip_id))
            except NotFound:
                continue
            except (SevattestError, TimeoutError):
                complete = False
                continue
            for root in roots:
                try:
                    verify_signature(cek, root.ask)
                except BadSignature:
                    continue
                self._fingerprint_of[chip_id] = cek.fingerprint.hex()
                break
            else:
                complete = False  # what nobody who is trusted signed is no answer
        if asked:
            log.info("deny_list.resolved", chips=len(self._fingerprint_of), complete=complete)
        return complete


class PlatformVerifier:
    """Verifies chains against pinned and named roots."""

    def __init__(self, roots: Sequence[Root], service: KeyService | None, log: Log, clock: Clock) -> None:
        """Take the trusted roots, the key service where there is one, the owner's log and the time."""
        self._roots = tuple(roots)
        self._service = service
        self._log = log
        self._clock = clock
        self._asking: dict[bytes, asyncio.Task[SevCertificate | None]] = {}
        self._unknown: dict[bytes, datetime] = {}  # chips that the key service did not know, the oldest answer first
        self._remembered: OrderedDict[bytes, VerifiedPlatform] = OrderedDict()

    async def verify(self, chain: bytes, chip_id: bytes) -> VerifiedPlatform:
        """The genuine platform behind a chain of 8336 bytes.

        Raises:
            ParseError: the bytes are no chain.
            Refused: a signature, the root or the CEK is not good.
            Unavailable: the key service has no answer.
        """
        name = hashlib.sha256(chain).digest()
        if (known := self._remembered.get(name)) is not None:
            self._remembered.move_to_end(name)
            return known
        parsed = PlatformChain.parse(chain)
        if not parsed.cek.is_signed:
            parsed = await self._complete(parsed, chip_id)
        platform = await asyncio.to_thread(verify_platform, parsed, self._roots)
        self._remembered[name] = platform
        while len(self._remembered) > REMEMBERED_MAX:
            self._remembered.popitem(last=False)
        return platform

    async def _complete(self, chain: PlatformChain, chip_id: bytes) -> PlatformChain:
        if self._service is None:
            raise UnsignedCek("the CEK carries no signature, and no key service is configured to fetch it from")
        if not chip_id:
            raise UnsignedCek("the CEK carries no signature, and the host gives no chip id to fetch it by")
        signed = await self._signed_cek(self._service, chip_id)
        if signed is None:
            raise UnsignedCek("the CEK carries no signature, and the key service does not know the chip")
        return attach_cek(chain, signed)

    async def _signed_cek(self, service: KeyService, chip_id: bytes) -> SevCertificate | None:
        """The signed CEK of a chip; None where the key service does not know it, now or a few minutes ago."""
        since = self._unknown.get(chip_id)
        # A clock that went back has forgotten: it could not tell when the time is over.
        if since is not None and timedelta() <= self._clock.now() - since < UNKNOWN_FOR:
            return None
        asking = self._asking.get(chip_id)
        if asking is None:
            asking = self._asking[chip_id] = asyncio.create_task(self._ask(service, chip_id))
            asking.add_done_callback(partial(self._asked, chip_id))
        # Whoever leaves takes the answer from nobody.
        return await asyncio.shield(asking)

    async def _ask(self, service: KeyService, chip_id: bytes) -> SevCertificate | None:
        try:
            async with asyncio.timeout(KEY_SERVICE_TIMEOUT_S):
                return await service.signed_cek(chip_id)
        except NotFound:
            self._unknown.pop(chip_id, None)
            self._unknown[chip_id] = self._clock.now()
            if len(self._unknown) > UNKNOWN_MAX:
                del self._unknown[next(iter(self._unknown))]
            return None
        except TimeoutError:
            raise Unavailable(Reason.KEY_SERVICE_UNAVAILABLE, "the key service did not answer in time") from None
        except Unavailable as error:
            # Which folder or host, and what is wrong with it, is for the owner.
            self._log.error("key_service.unavailable", error=error)
            raise Unavailable(Reason.KEY_SERVICE_UNAVAILABLE, "the key service has no answer") from error

    def _asked(self, chip_id: bytes, asking: asyncio.Task[SevCertificate | None]) -> None:
        del self._asking[chip_id]
        if not asking.cancelled():
            asking.exception()  # nobody may be left who waits for it
