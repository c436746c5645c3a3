"""A guest's state machine: one table, and nothing else moves a guest's state.

Theory of operation (AMD document 55766, guest states; confirmed on AMD's published firmware source):

* UNINIT: no such guest. LAUNCH_START creates one.
* LUPDATE: contents are added; each is hashed into the launch digest. LAUNCH_MEASURE closes the digest, so nothing can
  be added after the owner has seen the measurement, and there is one measurement and one nonce per launch.
* LSECRET: secrets may be placed, any number of times; the keys of the owner's channel still exist.
* RUNNING: LAUNCH_FINISH has closed the channel; TEK and TIK are gone, so no packet can be opened any more.
* SUPDATE, RUPDATE, SENT belong to migration, which this platform does not do: no command here leads to them. They stand
  in the table because ATTESTATION names two of them.

A command that a state does not list is answered INVALID_GUEST_STATE and changes nothing. GUEST_STATUS, ACTIVATE,
DEACTIVATE and DECOMMISSION do not look at this state.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType

from common.sev.abi import GuestState, Status
from emulator.errors import FirmwareFailed


class GuestCommand(StrEnum):
    """The firmware's commands that depend on a guest's state."""

    LAUNCH_START = "LAUNCH_START"
    LAUNCH_UPDATE_DATA = "LAUNCH_UPDATE_DATA"
    LAUNCH_UPDATE_VMSA = "LAUNCH_UPDATE_VMSA"
    LAUNCH_MEASURE = "LAUNCH_MEASURE"
    LAUNCH_SECRET = "LAUNCH_SECRET"  # noqa: S105 -- a command's name
    LAUNCH_FINISH = "LAUNCH_FINISH"
    ATTESTATION = "ATTESTATION"


_S = GuestState
_C = GuestCommand

TRANSITIONS: Mapping[GuestState, Mapping[GuestCommand, GuestState]] = MappingProxyType(
    {
        _S.UNINIT: {_C.LAUNCH_START: _S.LUPDATE},
        _S.LUPDATE: {
            _C.LAUNCH_UPDATE_DATA: _S.LUPDATE,
            _C.LAUNCH_UPDATE_VMSA: _S.LUPDATE,
            _C.LAUNCH_MEASURE: _S.LSECRET,
        },
        _S.LSECRET: {
            _C.LAUNCH_SECRET: _S.LSECRET,
            _C.LAUNCH_FINISH: _S.RUNNING,
            _C.ATTESTATION: _S.LSECRET,
        },
        _S.RUNNING: {_C.ATTESTATION: _S.RUNNING},
        _S.SUPDATE: {_C.ATTESTATION: _S.SUPDATE},
        _S.RUPDATE: {},
        _S.SENT: {_C.ATTESTATION: _S.SENT},
    }
)


def next_state(state: GuestState, command: GuestCommand) -> GuestState:
    """The state after `command` succeeded in `state`.

    Raises:
        FirmwareFailed: INVALID_GUEST_STATE; the state stays.
    """
    try:
        return TRANSITIONS[state][command]
    except KeyError:
        raise FirmwareFailed(Status.INVALID_GUEST_STATE) from None
