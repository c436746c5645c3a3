"""The software PSP: the firmware's commands on platform and guests. No socket, no file, no kernel.

Each method is one command of AMD document 55766; checks stand in the firmware's order, since which status a caller gets
depends on it. What the Linux driver adds in front (INIT when needed, EPERM, EBUSY, length limits) is `driver`'s.

Memory is not encrypted: LAUNCH_UPDATE_* only hash, and LAUNCH_SECRET returns the plaintext, which the stand-in machine
puts into its guest's memory.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from common.sev.abi import (
    CHIP_ID_SIZE,
    KEY_SIZE,
    MEASUREMENT_BLOB_SIZE,
    PEK_OCA_CEK_SIZE,
    PLATFORM_ES,
    PLATFORM_OWNED,
    REPORT_SIZE,
    SESSION_SIZE,
    SEV_CERT_SIZE,
    VMSA_SIZE,
    Algo,
    GuestState,
    PlatformState,
    PolicyBit,
    Status,
    Usage,
)
from emulator import channel, guest_state, platform_state
from emulator.channel import Channel, LaunchDigest
from emulator.errors import FirmwareFailed
from emulator.guest_state import GuestCommand
from emulator.identity import Identity, IdentityFile, generate, is_of, with_new_pdh, with_owner
from emulator.keys import Chip
from emulator.platform_state import PlatformCommand

_PLATFORM_STATUS = struct.Struct("<BBBIBI")  # psp-sev.h, struct sev_user_data_status (packed)
_POLICY_RESERVED = 0xFFC0
_ATTESTATION_SINCE = (0, 23)
_SCALAR_SIZE = 72  # a P-384 number in a signature


@dataclass(kw_only=True)
class Guest:
    """What the firmware remembers of one guest."""

    handle: int
    policy: int
    state: GuestState
    channel: Channel
    digest: LaunchDigest = field(default_factory=LaunchDigest)
    asid: int = 0  # 0: not active
    launch_digest: bytes = b""
    measurement: bytes = b""


class Psp:
    """One platform's firmware, from power-on (UNINIT)."""

    def __init__(
        self, chip: Chip, flash: IdentityFile, *, es: bool = True, random: Callable[[int], bytes] = os.urandom
    ) -> None:
        self.chip = chip
        self.state = PlatformState.UNINIT
        self._flash = flash
        self._es = es
        self._random = random
        self._identity: Identity | None = None
        self._guests: dict[int, Guest] = {}
        self._next_handle = 1  # not used twice, so that nobody's late DECOMMISSION meets somebody else's guest

    @property
    def guests(self) -> tuple[Guest, ...]:
        """Every guest, in the order of handles."""
        return tuple(self._guests[handle] for handle in sorted(self._guests))

    @property
    def identity(self) -> Identity | None:
        """PEK, OCA and PDH while the platform is initialised; else what the flash keeps, if anything."""
        return self._identity or self._flash.load()

    # Platform commands.

    def init(self) -> None:
        """INIT: load the keys; make them when the flash is empty or another chip's."""
        state = platform_state.next_state(self.state, PlatformCommand.INIT)
        identity = self._flash.load()
        if identity is None or not is_of(identity, self.chip):
            identity = generate(self.chip)
            self._flash.save(identity)
        self._identity, self.state = identity, state

    def shutdown(self) -> None:
        """SHUTDOWN: forget every guest."""
        self.state = platform_state.next_state(self.state, PlatformCommand.SHUTDOWN)
        self._guests.clear()
        self._identity = None

    def platform_reset(self) -> None:
        """PLATFORM_RESET: empty the flash; the next INIT makes a self-owned platform with new keys."""
        self.state = platform_state.next_state(self.state, PlatformCommand.PLATFORM_RESET)
        self._flash.erase()

    def platform_status(self) -> bytes:
        """PLATFORM_STATUS: 12 bytes, api major, api minor, state, flags u32, build, guest count u32."""
        platform_state.next_state(self.state, PlatformCommand.PLATFORM_STATUS)
        flags = guests = 0
        if self._identity is not None:
            flags = (PLATFORM_OWNED if self._identity.external else 0) | (PLATFORM_ES if self._es else 0)
            guests = len(self._guests)
        generation = self.chip.generation
        return _PLATFORM_STATUS.pack(*generation.api, self.state, flags, generation.build, guests)

    def pek_gen(self) -> None:
        """PEK_GEN: new OCA, PEK and PDH; the platform belongs to itself again."""
        platform_state.next_state(self.state, PlatformCommand.PEK_GEN)
        self._keep(generate(self.chip))

    def pek_csr(self, length: int) -> bytes:
        """PEK_CSR: the PEK with empty signature slots, 2084 bytes, into a buffer of `length` bytes."""
        platform_state.next_state(self.state, PlatformCommand.PEK_CSR)
        if length < SEV_CERT_SIZE:
            raise FirmwareFailed(Status.INVALID_LEN, lengths=(SEV_CERT_SIZE,))
        return self._current().csr

    def pek_cert_import(self, pek: bytes, oca: bytes) -> None:
        """PEK_CERT_IMPORT: the platform belongs to the holder of the OCA's key; new PDH."""
        platform_state.next_state(self.state, PlatformCommand.PEK_CERT_IMPORT)
        if self._current().external:
            raise FirmwareFailed(Status.ALREADY_OWNED)
        if len(pek) != SEV_CERT_SIZE or len(oca) != SEV_CERT_SIZE:
            raise FirmwareFailed(Status.INVALID_LEN)
        self._keep(with_owner(self._current(), self.chip, pek=pek, oca=oca))

    def pdh_cert_export(self, pdh_length: int, chain_length: int) -> tuple[bytes, bytes]:
        """PDH_CERT_EXPORT: the PDH (2084 bytes) and PEK || OCA || CEK (6252 bytes); the CEK is unsigned."""
        platform_state.next_state(self.state, PlatformCommand.PDH_CERT_EXPORT)
        if pdh_length < SEV_CERT_SIZE or chain_length < PEK_OCA_CEK_SIZE:
            raise FirmwareFailed(Status.INVALID_LEN, lengths=(SEV_CERT_SIZE, PEK_OCA_CEK_SIZE))
        identity = self._current()
        return identity.pdh.raw, identity.pek.raw + identity.oca.raw + self.chip.cek.raw

    def pdh_gen(self) -> None:
        """PDH_GEN: another PDH under the same PEK."""
        platform_state.next_state(self.state, PlatformCommand.PDH_GEN)
        self._keep(with_new_pdh(self._current(), self.chip))

    def get_id(self, length: int) -> bytes:
        """GET_ID: 64 bytes of socket 0; 128 with the other socket, which is empty here, when there is room."""
        platform_state.next_state(self.state, PlatformCommand.GET_ID)
        if length < CHIP_ID_SIZE:
            raise FirmwareFailed(Status.INVALID_LEN, lengths=(CHIP_ID_SIZE,))
        both = self.chip.chip_id + bytes(CHIP_ID_SIZE)
        return both if length >= len(both) else self.chip.chip_id

    # Guest commands.

    def launch_start(self, *, policy: int, shared: int = 0, godh: bytes | None = None, session: bytes = b"") -> int:
        """LAUNCH_START: a new guest in LUPDATE.

        Args:
            policy: the 32-bit guest policy.
            shared: handle of a guest whose memory key the new one shall use too; 0 for a key of its own.
            godh: the owner's certificate; None for a launch without owner, whose TEK and TIK are zero.
            session: the owner's session.

        Returns:
            The new guest's handle.
        """
        next_platform = platform_state.next_state(self.state, PlatformCommand.LAUNCH_START)
        keys = Channel.without_session()
        if godh is not None:
            if len(session) != SESSION_SIZE or len(godh) != SEV_CERT_SIZE:
                raise FirmwareFailed(Status.INVALID_LEN)
            pdh_key = self._current().pdh_key
            keys = channel.open_channel(pdh_key=pdh_key, godh=godh, session=session, policy=policy)
        self._check_policy(policy)
        if shared:
            self._check_sharing(policy, shared)
        if len(self._guests) >= self.chip.generation.asids:
            raise FirmwareFailed(Status.RESOURCE_LIMIT)
        if policy & PolicyBit.ES and not self._es:
            raise FirmwareFailed(Status.UNSUPPORTED)
        handle = self._next_handle
        self._next_handle += 1
        state = guest_state.next_state(GuestState.UNINIT, GuestCommand.LAUNCH_START)
        self._guests[handle] = Guest(handle=handle, policy=policy, state=state, channel=keys)
        self.state = next_platform
        return handle

    def activate(self, handle: int, asid: int) -> None:
        """ACTIVATE: bind the guest to an ASID, without which its memory cannot be written."""
        guest = self._guest(handle)
        if not 1 <= asid <= self.chip.generation.asids:
            raise FirmwareFailed(Status.INVALID_ASID)
        if guest.asid:
            raise FirmwareFailed(Status.ACTIVE)
        if any(other.asid == asid for other in self._guests.values()):
            raise FirmwareFailed(Status.ASID_OWNED)
        guest.asid = asid

    def deactivate(self, handle: int) -> None:
        """DEACTIVATE: give the ASID back."""
        guest = self._guest(handle)
        if not guest.asid:
            raise FirmwareFailed(Status.INACTIVE)
        guest.asid = 0

    def launch_update_data(self, handle: int, address: int, data: bytes) -> None:
        """LAUNCH_UPDATE_DATA: measure guest memory; address and length are multiples of 16."""
        self._update(self._in_state(handle, GuestCommand.LAUNCH_UPDATE_DATA), address, data)

    def launch_update_vmsa(self, handle: int, address: int, vmsa: bytes) -> None:
        """LAUNCH_UPDATE_VMSA: measure one vCPU's save area, 4096 bytes; SEV-ES guests only."""
        if len(vmsa) != VMSA_SIZE:
            raise FirmwareFailed(Status.INVALID_LEN)
        guest = self._in_state(handle, GuestCommand.LAUNCH_UPDATE_VMSA)
        if not guest.policy & PolicyBit.ES:
            raise FirmwareFailed(Status.UNSUPPORTED)
        self._update(guest, address, vmsa)

    def launch_measure(self, handle: int, length: int) -> bytes:
        """LAUNCH_MEASURE: measurement || nonce, 48 bytes, into a buffer of `length` bytes; closes the digest."""
        guest = self._in_state(handle, GuestCommand.LAUNCH_MEASURE)
        if length < MEASUREMENT_BLOB_SIZE:
            raise FirmwareFailed(Status.INVALID_LEN, lengths=(MEASUREMENT_BLOB_SIZE,))
        nonce = self._random(KEY_SIZE)
        guest.launch_digest = guest.digest.value()
        generation = self.chip.generation
        guest.measurement = channel.measure(
            guest.channel.tik, generation.api, generation.build, guest.policy, guest.launch_digest, nonce
        )
        guest.state = guest_state.next_state(guest.state, GuestCommand.LAUNCH_MEASURE)
        return guest.measurement + nonce

    def launch_secret(self, handle: int, *, address: int, header: bytes, payload: bytes, guest_length: int) -> bytes:
        """LAUNCH_SECRET: the plaintext that belongs at guest physical `address`."""
        guest = self._guest(handle)
        if address % 16:
            raise FirmwareFailed(Status.INVALID_ADDRESS)
        channel.check_packet_lengths(header, payload, guest_length)
        state = guest_state.next_state(guest.state, GuestCommand.LAUNCH_SECRET)
        if not guest.asid:
            raise FirmwareFailed(Status.INACTIVE)
        plaintext = channel.open_packet(
            guest.channel, header=header, payload=payload, guest_length=guest_length, measurement=guest.measurement
        )
        guest.state = state
        return plaintext

    def launch_finish(self, handle: int) -> None:
        """LAUNCH_FINISH: the guest may run; TEK and TIK are forgotten."""
        guest = self._in_state(handle, GuestCommand.LAUNCH_FINISH)
        guest.channel = Channel.without_session()
        guest.state = guest_state.next_state(guest.state, GuestCommand.LAUNCH_FINISH)

    def attestation(self, handle: int, nonce: bytes, length: int) -> bytes:
        """ATTESTATION: 208 bytes, signed by the PEK over nonce (16 bytes), launch digest and policy; since API 0.23."""
        if self.chip.generation.api < _ATTESTATION_SINCE:
            raise FirmwareFailed(Status.INVALID_COMMAND)
        guest = self._in_state(handle, GuestCommand.ATTESTATION)
        if length < REPORT_SIZE:
            raise FirmwareFailed(Status.INVALID_LEN, lengths=(REPORT_SIZE,))
        covered = nonce + guest.launch_digest + struct.pack("<I", guest.policy)
        der = self._current().pek_key.sign(covered, ec.ECDSA(hashes.SHA256()))
        r, s = (number.to_bytes(_SCALAR_SIZE, "little") for number in decode_dss_signature(der))
        return covered + struct.pack("<III", Usage.PEK, Algo.ECDSA_SHA256, 0) + r + s

    def guest_status(self, handle: int) -> tuple[int, int, GuestState]:
        """GUEST_STATUS: policy, ASID (0: not active) and state; UNINIT for a handle that nobody has."""
        platform_state.next_state(self.state, PlatformCommand.GUEST_STATUS)
        guest = self._guests.get(handle)
        return (guest.policy, guest.asid, guest.state) if guest else (0, 0, GuestState.UNINIT)

    def decommission(self, handle: int) -> None:
        """DECOMMISSION: forget the guest, which must not be active."""
        guest = self._guest(handle)
        if guest.asid:
            raise FirmwareFailed(Status.ACTIVE)
        del self._guests[handle]
        if not self._guests:
            self.state = platform_state.next_state(self.state, PlatformCommand.LAST_DECOMMISSION)

    # Shared checks.

    def _check_policy(self, policy: int) -> None:
        wanted = (policy >> 16 & 0xFF, policy >> 24 & 0xFF)
        if policy & _POLICY_RESERVED or self.chip.generation.api < wanted:
            raise FirmwareFailed(Status.POLICY_FAILURE)

    def _check_sharing(self, policy: int, handle: int) -> None:
        if handle not in self._guests:
            raise FirmwareFailed(Status.INVALID_GUEST)
        if policy != self._guests[handle].policy or policy & PolicyBit.NOKS:
            raise FirmwareFailed(Status.POLICY_FAILURE)

    def _update(self, guest: Guest, address: int, data: bytes) -> None:
        if not guest.asid:
            raise FirmwareFailed(Status.INACTIVE)
        if address % 16:
            raise FirmwareFailed(Status.INVALID_ADDRESS)
        if not data or len(data) % 16:
            raise FirmwareFailed(Status.INVALID_LEN)
        guest.digest.add(data)

    def _guest(self, handle: int) -> Guest:
        platform_state.next_state(self.state, PlatformCommand.GUEST_COMMAND)
        try:
            return self._guests[handle]
        except KeyError:
            raise FirmwareFailed(Status.INVALID_GUEST) from None

    def _in_state(self, handle: int, command: GuestCommand) -> Guest:
        guest = self._guest(handle)
        guest_state.next_state(guest.state, command)
        return guest

    def _current(self) -> Identity:
        if self._identity is None:  # the state table lets nobody here before INIT
            raise FirmwareFailed(Status.INVALID_PLATFORM_STATE)
        return self._identity

    def _keep(self, identity: Identity) -> None:
        self._flash.save(identity)
        self._identity = identity
