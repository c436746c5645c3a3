"""The kernel between a file descriptor and the firmware: the rules of drivers/crypto/ccp/sev-dev.c and KVM's sev.c.

`Driver.open` gives a `Descriptor`, which is to a connection what an open /dev/sev and a VM descriptor are to a process:
it knows whether it may write, owns at most one guest, and takes the guest along when it is closed. No socket here.

Rules (Linux 6.1): an unknown command is EINVAL; commands that change state want a writable descriptor (EPERM); the
platform is initialised when a command needs it; FACTORY_RESET is EBUSY while guests exist and shuts down first; blobs
above 16 KiB are EFAULT (CSR, export) or EINVAL (import); a firmware status other than SUCCESS is EIO, with the lengths
filled in that the firmware wants.
"""

from __future__ import annotations

import errno
import json
import struct
from collections.abc import Callable
from typing import NamedTuple

from common.sev.abi import (
    CHIP_ID_SIZE,
    NO_FIRMWARE_CALL,
    PACKET_MAX_SIZE,
    DeviceCommand,
    PlatformState,
    Status,
)
from emulator import protocol
from emulator.errors import FirmwareFailed, KernelRefused
from emulator.protocol import GuestRequest
from emulator.psp import Psp

_BLOB_MAX = PACKET_MAX_SIZE  # SEV_FW_BLOB_MAX_SIZE
_ID_MAX = 2 * CHIP_ID_SIZE
# GET_ID and GET_ID2 came with this API; the kernel answers ENOTSUPP (524, not in errno.h) below it.
_GET_ID_SINCE = (0, 16)
_ENOTSUPP = 524


class Reply(NamedTuple):
    """What a request is answered: `errno` 0 or positive, the firmware's status, the bytes that the command returns."""

    errno: int
    status: int
    payload: bytes


class Driver:
    """The one driver of one platform."""

    def __init__(self, psp: Psp) -> None:
        self.psp = psp

    def open(self, flags: int) -> Descriptor:
        """A descriptor; `flags` is READ_ONLY or READ_WRITE.

        Raises:
            KernelRefused: EINVAL for other flags.
        """
        if flags not in {protocol.READ_ONLY, protocol.READ_WRITE}:
            raise KernelRefused(errno.EINVAL)
        return Descriptor(self.psp, writable=flags == protocol.READ_WRITE)

    def init(self) -> None:
        """Initialise the platform, as the driver does when it is loaded (`psp_init_on_probe`)."""
        if self.psp.state is PlatformState.UNINIT:
            self.psp.init()


class Descriptor:
    """One connection's view of the platform."""

    def __init__(self, psp: Psp, *, writable: bool) -> None:
        self._psp = psp
        self._writable = writable
        self._guest: int | None = None
        self._commands: dict[int, Callable[[bytes], bytes]] = {
            DeviceCommand.FACTORY_RESET: self._factory_reset,
            DeviceCommand.PLATFORM_STATUS: self._platform_status,
            DeviceCommand.PEK_GEN: self._pek_gen,
            DeviceCommand.PEK_CSR: self._pek_csr,
            DeviceCommand.PDH_GEN: self._pdh_gen,
            DeviceCommand.PDH_CERT_EXPORT: self._pdh_cert_export,
            DeviceCommand.PEK_CERT_IMPORT: self._pek_cert_import,
            DeviceCommand.GET_ID: self._get_id,
            DeviceCommand.GET_ID2: self._get_id2,
            GuestRequest.LAUNCH_START: self._launch_start,
            GuestRequest.LAUNCH_UPDATE_DATA: self._launch_update_data,
            GuestRequest.LAUNCH_UPDATE_VMSA: self._launch_update_vmsa,
            GuestRequest.LAUNCH_MEASURE: self._launch_measure,
            GuestRequest.LAUNCH_SECRET: self._launch_secret,
            GuestRequest.LAUNCH_FINISH: self._launch_finish,
            GuestRequest.ATTESTATION: self._attestation,
            GuestRequest.GUEST_STATUS: self._guest_status,
            GuestRequest.DECOMMISSION: self._decommission,
            GuestRequest.DESCRIBE: self._describe,
        }

    def issue(self, command: int, payload: bytes) -> Reply:
        """Carry out one command. Never raises for what a caller sends."""
        handler = self._commands.get(command)
        if handler is None:
            return Reply(errno.EINVAL, NO_FIRMWARE_CALL, b"")
        try:
            return Reply(0, Status.SUCCESS, handler(payload))
        except KernelRefused as refusal:
            return Reply(refusal.errno, NO_FIRMWARE_CALL, b"")
        except FirmwareFailed as failure:
            lengths = b"".join(map(protocol.LENGTH.pack, failure.lengths))
            return Reply(errno.EIO, failure.status, lengths)

    def close(self) -> None:
        """End the guest of this descriptor, as the kernel does when a VM's last descriptor goes."""
        if self._guest is None:
            return
        handle, self._guest = self._guest, None
        if any(guest.handle == handle for guest in self._psp.guests):
            self._psp.deactivate(handle)
            self._psp.decommission(handle)

    # Device commands.

    def _factory_reset(self, payload: bytes) -> bytes:
        self._want_writable()
        _exactly(payload, 0)
        if self._psp.state is PlatformState.WORKING:
            raise KernelRefused(errno.EBUSY)
        if self._psp.state is PlatformState.INIT:
            self._psp.shutdown()
        self._psp.platform_reset()
        return b""

    def _platform_status(self, payload: bytes) -> bytes:
        _exactly(payload, 0)
        return self._psp.platform_status()

    def _pek_gen(self, payload: bytes) -> bytes:
        self._want_writable()
        _exactly(payload, 0)
        self._initialise()
        self._psp.pek_gen()
        return b""

    def _pdh_gen(self, payload: bytes) -> bytes:
        self._want_writable()
        _exactly(payload, 0)
        self._initialise()
        self._psp.pdh_gen()
        return b""

    def _pek_csr(self, payload: bytes) -> bytes:
        self._want_writable()
        (length,) = protocol.LENGTH.unpack(_exactly(payload, protocol.LENGTH.size))
        if length > _BLOB_MAX:
            raise KernelRefused(errno.EFAULT)
        self._initialise()
        csr = self._psp.pek_csr(length)
        return protocol.LENGTH.pack(len(csr)) + csr

    def _pdh_cert_export(self, payload: bytes) -> bytes:
        # Reading the certificates needs no write access, bringing the platform up to read them does.
        if self._psp.state is PlatformState.UNINIT:
            self._want_writable()
        pdh_length, chain_length = protocol.TWO_LENGTHS.unpack(_exactly(payload, protocol.TWO_LENGTHS.size))
        if not pdh_length or not chain_length:
            pdh_length = chain_length = 0  # a question for the lengths
        if pdh_length > _BLOB_MAX or chain_length > _BLOB_MAX:
            raise KernelRefused(errno.EFAULT)
        self._initialise()
        pdh, chain = self._psp.pdh_cert_export(pdh_length, chain_length)
        return protocol.TWO_LENGTHS.pack(len(pdh), len(chain)) + pdh + chain

    def _pek_cert_import(self, payload: bytes) -> bytes:
        self._want_writable()
        (pek_length, oca_length), rest = _head(payload, protocol.TWO_LENGTHS)
        if not 0 < pek_length <= _BLOB_MAX or not 0 < oca_length <= _BLOB_MAX:
            raise KernelRefused(errno.EINVAL)
        _exactly(rest, pek_length + oca_length)
        self._initialise()
        self._psp.pek_cert_import(rest[:pek_length], rest[pek_length:])
        return b""

    def _get_id(self, payload: bytes) -> bytes:
        self._want_get_id()
        _exactly(payload, 0)
        return self._psp.get_id(_ID_MAX)

    def _get_id2(self, payload: bytes) -> bytes:
        self._want_get_id()
        (length,) = protocol.LENGTH.unpack(_exactly(payload, protocol.LENGTH.size))
        chip_id = self._psp.get_id(length)
        return protocol.LENGTH.pack(len(chip_id)) + chip_id

    # Guest commands.

    def _launch_start(self, payload: bytes) -> bytes:
        self._want_writable()
        (shared, policy, godh_length, session_length), rest = _head(payload, protocol.LAUNCH_START)
        if self._guest is not None or godh_length > _BLOB_MAX or session_length > _BLOB_MAX:
            raise KernelRefused(errno.EINVAL)
        _exactly(rest, godh_length + session_length)
        self._initialise()
        asid = self._free_asid()
        godh = rest[:godh_length] if godh_length else None
        handle = self._psp.launch_start(policy=policy, shared=shared, godh=godh, session=rest[godh_length:])
        self._psp.activate(handle, asid)
        self._guest = handle
        return protocol.LENGTH.pack(handle)

    def _launch_update_data(self, payload: bytes) -> bytes:
        (address,), data = _head(payload, protocol.UPDATE)
        self._psp.launch_update_data(self._own_guest(), address, data)
        return b""

    def _launch_update_vmsa(self, payload: bytes) -> bytes:
        (address,), vmsa = _head(payload, protocol.UPDATE)
        self._psp.launch_update_vmsa(self._own_guest(), address, vmsa)
        return b""

    def _launch_measure(self, payload: bytes) -> bytes:
        guest = self._own_guest()
        (length,) = protocol.LENGTH.unpack(_exactly(payload, protocol.LENGTH.size))
        if length > _BLOB_MAX:
            raise KernelRefused(errno.EINVAL)
        blob = self._psp.launch_measure(guest, length)
        return protocol.LENGTH.pack(len(blob)) + blob

    def _launch_secret(self, payload: bytes) -> bytes:
        guest = self._own_guest()
        (address, header_length, guest_length, packet_length), rest = _head(payload, protocol.LAUNCH_SECRET)
        for length in (header_length, packet_length):
            if not 0 < length <= _BLOB_MAX:
                raise KernelRefused(errno.EINVAL)
        _exactly(rest, header_length + packet_length)
        header, packet = rest[:header_length], rest[header_length:]
        return self._psp.launch_secret(guest, address=address, header=header, payload=packet, guest_length=guest_length)

    def _launch_finish(self, payload: bytes) -> bytes:
        guest = self._own_guest()
        _exactly(payload, 0)
        self._psp.launch_finish(guest)
        return b""

    def _attestation(self, payload: bytes) -> bytes:
        guest = self._own_guest()
        nonce, length = protocol.ATTESTATION.unpack(_exactly(payload, protocol.ATTESTATION.size))
        if length > _BLOB_MAX:
            raise KernelRefused(errno.EINVAL)
        report = self._psp.attestation(guest, nonce, length)
        return protocol.LENGTH.pack(len(report)) + report

    def _guest_status(self, payload: bytes) -> bytes:
        guest = self._own_guest()
        _exactly(payload, 0)
        return protocol.GUEST_STATUS.pack(*self._psp.guest_status(guest))

    def _decommission(self, payload: bytes) -> bytes:
        self._own_guest()
        _exactly(payload, 0)
        self.close()
        return b""

    def _describe(self, payload: bytes) -> bytes:
        _exactly(payload, 0)
        return json.dumps(describe(self._psp)).encode("ascii")

    # What the rules need.

    def _want_writable(self) -> None:
        if not self._writable:
            raise KernelRefused(errno.EPERM)

    def _want_get_id(self) -> None:
        if self._psp.chip.generation.api < _GET_ID_SINCE:
            raise KernelRefused(_ENOTSUPP)

    def _initialise(self) -> None:
        if self._psp.state is PlatformState.UNINIT:
            self._psp.init()

    def _own_guest(self) -> int:
        # A shutdown by another descriptor would leave a handle that the firmware no longer knows; it says so itself.
        if self._guest is None:
            raise KernelRefused(errno.ENOTTY)
        return self._guest

    def _free_asid(self) -> int:
        taken = {guest.asid for guest in self._psp.guests}
        limit = self._psp.chip.generation.asids
        free = next((asid for asid in range(1, limit + 1) if asid not in taken), None)
        if free is None:
            raise KernelRefused(errno.EBUSY)
        return free


def describe(psp: Psp) -> dict[str, object]:
    """The platform for people: states, versions, guests, fingerprints in hex. No key, nothing secret."""
    generation, identity = psp.chip.generation, psp.identity
    prints: dict[str, bytes] = {}
    owner = None
    if identity is not None:
        owner = "external" if identity.external else "self"
        prints |= {
            "pdh": identity.pdh.fingerprint,
            "pek": identity.pek.fingerprint,
            "oca": identity.oca.fingerprint,
        }
    chip = psp.chip
    prints |= {"cek": chip.cek.fingerprint, "ask": chip.ask.fingerprint, "ark": chip.ark.fingerprint}
    return {
        "generation": generation.name,
        "api": f"{generation.api[0]}.{generation.api[1]}",
        "build": generation.build,
        "cbitpos": generation.cbitpos,
        "chip_id": psp.chip.chip_id.hex(),
        "state": psp.state.name,
        "owner": owner,
        "guests": [
            {"handle": guest.handle, "asid": guest.asid, "policy": f"0x{guest.policy:08x}", "state": guest.state.name}
            for guest in psp.guests
        ],
        "fingerprints": {name: value.hex() for name, value in prints.items()},
    }


def _exactly(data: bytes, size: int) -> bytes:
    if len(data) != size:
        raise KernelRefused(errno.EINVAL)
    return data


def _head(payload: bytes, layout: struct.Struct) -> tuple[tuple[int, ...], bytes]:
    if len(payload) < layout.size:
        raise KernelRefused(errno.EINVAL)
    return layout.unpack_from(payload), payload[layout.size :]
