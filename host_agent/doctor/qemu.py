"""The machine's program: is it a QEMU, which, and does it know SEV guests.

Asked as a person would ask: `-version`, `-object help`, `-object sev-guest,help`. No machine is made.
Sources: QEMU's change logs: `confidential-guest-support=` 6.0, `query-sev-attestation-report` and injection without an
address 6.1, `kernel-hashes=` 6.2; shapes of `query-sev` known here: 7.2 to 10.x.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from host_agent.doctor.findings import Finding, failed, passed, skipped, warned
from host_agent.doctor.machine import Machine, Unreadable

_VERSION = re.compile(r"QEMU emulator version (\d{1,3})\.(\d{1,3})(?:\.(\d{1,3}))?")
_OLDEST = (6, 2)
_TESTED = (7, 2)
_TOO_NEW = (11, 0)
DEFAULT_PROGRAM = ("qemu-system-x86_64",)


def probe(machine: Machine, program: Sequence[str], *, of: str) -> Iterator[Finding]:
    """What the program says of itself.

    Args:
        machine: where it runs.
        program: it and its own leading arguments.
        of: whose it is, for the probe's id: a guest's name, or empty.
    """
    where = f"qemu.{of}" if of else "qemu"
    try:
        said = machine.run([*program, "-version"])
    except Unreadable as why:
        yield failed(
            f"{where}.version", why.message, "install QEMU (Debian: qemu-system-x86), or name it in agent.toml"
        )
        return
    version = _VERSION.search(said)
    if version is None:
        advice = "name qemu-system-x86_64 itself if a real guest is meant"
        yield skipped(f"{where}.version", f"{program[0]} does not say a QEMU's version", advice)
        return
    yield _version(f"{where}.version", version)
    yield from _objects(machine, program, where)


def _version(probe_id: str, found: re.Match[str]) -> Finding:
    numbers = (int(found[1]), int(found[2]))
    text = ".".join(number for number in found.groups() if number is not None)
    if numbers < _OLDEST:
        return failed(probe_id, f"QEMU {text}", "use QEMU 7.2 or newer: before 6.2 it measures no kernel hashes")
    if numbers < _TESTED or numbers >= _TOO_NEW:
        return warned(probe_id, f"QEMU {text}", "the agent was tried with QEMU 7.2 to 10.x; run the selftest")
    return passed(probe_id, f"QEMU {text}")


def _objects(machine: Machine, program: Sequence[str], where: str) -> Iterator[Finding]:
    advice = "this QEMU was built without SEV: use one for x86-64 hosts with KVM"
    try:
        kinds = machine.run([*program, "-object", "help"]).split()
        properties = machine.run([*program, "-object", "sev-guest,help"]) if "sev-guest" in kinds else ""
    except Unreadable as why:
        yield skipped(f"{where}.sev_guest", why.message)
        return
    if "sev-guest" not in kinds:
        yield failed(f"{where}.sev_guest", "does not know the object sev-guest", advice)
        return
    if "kernel-hashes=" not in properties:
        yield failed(f"{where}.sev_guest", "knows sev-guest, but not its kernel-hashes", "use QEMU 7.2 or newer")
        return
    yield passed(f"{where}.sev_guest", "knows the object sev-guest and its kernel-hashes")
