"""The platform's state machine: one table, and nothing else moves the platform's state.

Theory of operation (AMD document 55766, platform states; confirmed on AMD's published firmware source):

* UNINIT: after power-on, SHUTDOWN and reset. Only INIT, the reset, and what needs no keys are answered; the owner, ES
  and guest-count fields of PLATFORM_STATUS read as zero.
* INIT: keys are loaded (made when there are none), no guest exists. Only here may keys that guests rest on be replaced
  (PEK_GEN, PEK_CERT_IMPORT).
* WORKING: at least one guest exists. The first LAUNCH_START enters, the DECOMMISSION of the last guest leaves.

SHUTDOWN is answered everywhere and forgets every guest. PLATFORM_RESET (the kernel calls it FACTORY_RESET) wants
UNINIT; the kernel's driver shuts down first, and refuses in WORKING by itself.

A command that a state does not list is answered INVALID_PLATFORM_STATE and changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType

from common.sev.abi import PlatformState, Status
from emulator.errors import FirmwareFailed


class PlatformCommand(StrEnum):
    """What the platform's state reacts to: the firmware's commands, guest commands summed up by what they need."""

    INIT = "INIT"
    SHUTDOWN = "SHUTDOWN"
    PLATFORM_RESET = "PLATFORM_RESET"
    PLATFORM_STATUS = "PLATFORM_STATUS"
    PEK_GEN = "PEK_GEN"
    PEK_CSR = "PEK_CSR"
    PEK_CERT_IMPORT = "PEK_CERT_IMPORT"
    PDH_CERT_EXPORT = "PDH_CERT_EXPORT"
    PDH_GEN = "PDH_GEN"
    GET_ID = "GET_ID"
    GUEST_STATUS = "GUEST_STATUS"
    LAUNCH_START = "LAUNCH_START"
    GUEST_COMMAND = "GUEST_COMMAND"  # every other command on an existing guest
    LAST_DECOMMISSION = "LAST_DECOMMISSION"  # the DECOMMISSION that leaves no guest behind


_UNINIT, _INIT, _WORKING = PlatformState.UNINIT, PlatformState.INIT, PlatformState.WORKING
_C = PlatformCommand

TRANSITIONS: Mapping[PlatformState, Mapping[PlatformCommand, PlatformState]] = MappingProxyType(
    {
        _UNINIT: {
            _C.INIT: _INIT,
            _C.SHUTDOWN: _UNINIT,
            _C.PLATFORM_RESET: _UNINIT,
            _C.PLATFORM_STATUS: _UNINIT,
            _C.GET_ID: _UNINIT,
        },
        _INIT: {
            _C.SHUTDOWN: _UNINIT,
            _C.PLATFORM_STATUS: _INIT,
            _C.PEK_GEN: _INIT,
            _C.PEK_CSR: _INIT,
            _C.PEK_CERT_IMPORT: _INIT,
            _C.PDH_CERT_EXPORT: _INIT,
            _C.PDH_GEN: _INIT,
            _C.GET_ID: _INIT,
            _C.GUEST_STATUS: _INIT,
            _C.LAUNCH_START: _WORKING,
        },
        _WORKING: {
            _C.SHUTDOWN: _UNINIT,
            _C.PLATFORM_STATUS: _WORKING,
            _C.PEK_CSR: _WORKING,
            _C.PDH_CERT_EXPORT: _WORKING,
            _C.PDH_GEN: _WORKING,
            _C.GET_ID: _WORKING,
            _C.GUEST_STATUS: _WORKING,
            _C.LAUNCH_START: _WORKING,
            _C.GUEST_COMMAND: _WORKING,
            _C.LAST_DECOMMISSION: _INIT,
        },
    }
)


def next_state(state: PlatformState, command: PlatformCommand) -> PlatformState:
    """The state after `command` succeeded in `state`.

    Raises:
        FirmwareFailed: INVALID_PLATFORM_STATE; the state stays.
    """
    try:
        return TRANSITIONS[state][command]
    except KeyError:
        raise FirmwareFailed(Status.INVALID_PLATFORM_STATE) from None
