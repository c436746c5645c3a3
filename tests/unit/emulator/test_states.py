"""Every pair of state and command, against a list written here from AMD's text, not from the tables."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest

from common.sev.abi import GuestState, PlatformState, Status
from emulator import guest_state, platform_state
from emulator.errors import FirmwareFailed
from emulator.guest_state import GuestCommand
from emulator.platform_state import PlatformCommand
from emulator.psp import Psp
from tests.support.software_psp import started

G, P = GuestCommand, PlatformCommand
GUEST_ALLOWED = {
    (GuestState.UNINIT, G.LAUNCH_START): GuestState.LUPDATE,
    (GuestState.LUPDATE, G.LAUNCH_UPDATE_DATA): GuestState.LUPDATE,
    (GuestState.LUPDATE, G.LAUNCH_UPDATE_VMSA): GuestState.LUPDATE,
    (GuestState.LUPDATE, G.LAUNCH_MEASURE): GuestState.LSECRET,
    (GuestState.LSECRET, G.LAUNCH_SECRET): GuestState.LSECRET,
    (GuestState.LSECRET, G.LAUNCH_FINISH): GuestState.RUNNING,
    (GuestState.LSECRET, G.ATTESTATION): GuestState.LSECRET,
    (GuestState.RUNNING, G.ATTESTATION): GuestState.RUNNING,
    (GuestState.SUPDATE, G.ATTESTATION): GuestState.SUPDATE,
    (GuestState.SENT, G.ATTESTATION): GuestState.SENT,
}
ANY = (PlatformState.UNINIT, PlatformState.INIT, PlatformState.WORKING)
UP = ANY[1:]
PLATFORM_ALLOWED = {
    P.INIT: {PlatformState.UNINIT: PlatformState.INIT},
    P.SHUTDOWN: dict.fromkeys(ANY, PlatformState.UNINIT),
    P.PLATFORM_RESET: {PlatformState.UNINIT: PlatformState.UNINIT},
    P.PLATFORM_STATUS: {state: state for state in ANY},
    P.PEK_GEN: {PlatformState.INIT: PlatformState.INIT},
    P.PEK_CSR: {state: state for state in UP},
    P.PEK_CERT_IMPORT: {PlatformState.INIT: PlatformState.INIT},
    P.PDH_CERT_EXPORT: {state: state for state in UP},
    P.PDH_GEN: {state: state for state in UP},
    P.GET_ID: {state: state for state in ANY},
    P.GUEST_STATUS: {state: state for state in UP},
    P.LAUNCH_START: dict.fromkeys(UP, PlatformState.WORKING),
    P.GUEST_COMMAND: {PlatformState.WORKING: PlatformState.WORKING},
    P.LAST_DECOMMISSION: {PlatformState.WORKING: PlatformState.INIT},
}


@pytest.mark.parametrize(("state", "command"), list(product(GuestState, GuestCommand)))
def test_a_guest_moves_as_the_specification_says(state: GuestState, command: GuestCommand) -> None:
    if (state, command) in GUEST_ALLOWED:
        assert guest_state.next_state(state, command) is GUEST_ALLOWED[state, command]
    else:
        with pytest.raises(FirmwareFailed) as failure:
            guest_state.next_state(state, command)
        assert failure.value.status is Status.INVALID_GUEST_STATE


@pytest.mark.parametrize(("state", "command"), list(product(PlatformState, PlatformCommand)))
def test_the_platform_moves_as_the_specification_says(state: PlatformState, command: PlatformCommand) -> None:
    allowed = PLATFORM_ALLOWED[command]
    if state in allowed:
        assert platform_state.next_state(state, command) is allowed[state]
    else:
        with pytest.raises(FirmwareFailed) as failure:
            platform_state.next_state(state, command)
        assert failure.value.status is Status.INVALID_PLATFORM_STATE


def _guest_in(psp: Psp, state: GuestState) -> int:
    handle, owner = started(psp)
    if state is GuestState.LUPDATE:
        return handle
    measurement = psp.launch_measure(handle, 48)[:32]
    psp.packet = owner.packet(b"t" * 32, measurement)  # type: ignore[attr-defined]  # for the command below
    if state is GuestState.RUNNING:
        psp.launch_finish(handle)
    return handle


def _secret(psp: Psp, handle: int) -> None:
    packet = getattr(psp, "packet", None)
    header, payload = (packet.header, packet.payload) if packet else (bytes(52), bytes(16))
    psp.launch_secret(handle, address=0x810000, header=header, payload=payload, guest_length=len(payload))


COMMANDS: dict[GuestCommand, Callable[[Psp, int], object]] = {
    G.LAUNCH_UPDATE_DATA: lambda psp, handle: psp.launch_update_data(handle, 0, bytes(16)),
    G.LAUNCH_UPDATE_VMSA: lambda psp, handle: psp.launch_update_vmsa(handle, 0, bytes(4096)),
    G.LAUNCH_MEASURE: lambda psp, handle: psp.launch_measure(handle, 48),
    G.LAUNCH_SECRET: _secret,
    G.LAUNCH_FINISH: lambda psp, handle: psp.launch_finish(handle),
    G.ATTESTATION: lambda psp, handle: psp.attestation(handle, bytes(16), 208),
}


@pytest.mark.parametrize(
    ("state", "command"), list(product((GuestState.LUPDATE, GuestState.LSECRET, GuestState.RUNNING), COMMANDS))
)
def test_each_command_of_a_real_launch_obeys_the_table(psp: Psp, state: GuestState, command: GuestCommand) -> None:
    handle = _guest_in(psp, state)
    assert psp.guest_status(handle) == (0x7, 1, state)
    if (state, command) in GUEST_ALLOWED:
        COMMANDS[command](psp, handle)
        assert psp.guest_status(handle)[2] is GUEST_ALLOWED[state, command]
    else:
        with pytest.raises(FirmwareFailed) as failure:
            COMMANDS[command](psp, handle)
        assert failure.value.status is Status.INVALID_GUEST_STATE
        assert psp.guest_status(handle)[2] is state


PLATFORM_COMMANDS: dict[PlatformCommand, Callable[[Psp], object]] = {
    P.INIT: lambda psp: psp.init(),
    P.SHUTDOWN: lambda psp: psp.shutdown(),
    P.PLATFORM_RESET: lambda psp: psp.platform_reset(),
    P.PLATFORM_STATUS: lambda psp: psp.platform_status(),
    P.PEK_GEN: lambda psp: psp.pek_gen(),
    P.PEK_CSR: lambda psp: psp.pek_csr(2084),
    P.PDH_CERT_EXPORT: lambda psp: psp.pdh_cert_export(2084, 6252),
    P.PDH_GEN: lambda psp: psp.pdh_gen(),
    P.GET_ID: lambda psp: psp.get_id(64),
    P.GUEST_STATUS: lambda psp: psp.guest_status(1),
    P.LAUNCH_START: lambda psp: psp.launch_start(policy=1),
}


@pytest.mark.parametrize(("state", "command"), list(product(PlatformState, PLATFORM_COMMANDS)))
def test_each_platform_command_obeys_the_table(psp: Psp, state: PlatformState, command: PlatformCommand) -> None:
    if state is not PlatformState.UNINIT:
        psp.init()
    if state is PlatformState.WORKING:
        psp.launch_start(policy=1)
    allowed = PLATFORM_ALLOWED[command]
    if state in allowed:
        PLATFORM_COMMANDS[command](psp)
        assert psp.state is allowed[state]
    else:
        with pytest.raises(FirmwareFailed) as failure:
            PLATFORM_COMMANDS[command](psp)
        assert failure.value.status is Status.INVALID_PLATFORM_STATE
        assert psp.state is state
