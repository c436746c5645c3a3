"""`sev-host-agent selftest`: a checklist that only a host with a SEV device can pass; docs/selftest.md explains it.

Exit code 0: every line passed, or was skipped for a reason that it says. 1: a line failed. 2: the command or the
configuration cannot be used.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import InvalidInput, Reason

if TYPE_CHECKING:
    from host_agent.doctor.findings import Finding
    from host_agent.hypervisors.base import GuestDefinition
    from host_agent.selftest.steps import Subject

# What owners ask for at least: no debugging, no key sharing, SEV-ES, no migration; and the same without SEV-ES.
_POLICIES = {"es": 0x0F, "sev": 0x0B}
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--config", metavar="FILE", type=Path, required=True, help="agent.toml")
    parser.add_argument("--guest", metavar="NAME", help="which of its guests (default: the only one)")
    parser.add_argument(
        "--for", dest="kind", choices=tuple(_POLICIES), default="es", help="with SEV-ES or without (%(default)s)"
    )
    parser.add_argument("--kds", metavar="URL|DIR", help="look there for the chip's signed CEK (default: nowhere)")
    parser.add_argument("--ca", metavar="FILE", type=Path, help="ASK and ARK to trust in place of AMD's built-in ones")
    parser.add_argument("--resume", action="store_true", help="let the guest run at the end, before it is ended")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Go through the steps; 0 if none failed, 1 if one did."""
    from common.hardening import harden_process

    harden_process()
    subject = _subject(args)

    def tell(finding: Finding) -> None:
        for line in [json.dumps(finding.as_json())] if args.json else finding.lines:
            print(line, flush=True)

    good = asyncio.run(_run(subject, tell))
    if not args.json:
        print("the selftest passed" if good else "the selftest failed: the first FAIL says where")
    return 0 if good else 1


async def _run(subject: Subject, tell: Callable[[Finding], None]) -> bool:
    """Run it; a signal ends it, the guest first, which no further signal hurries."""
    from host_agent.selftest.steps import Selftest

    task = asyncio.ensure_future(Selftest(subject, tell).run())
    received: list[signal.Signals] = []

    def end(number: signal.Signals) -> None:
        received.append(number)
        task.cancel()  # each time: `asyncio.wait_for` of Python 3.11 may swallow one

    for number in _ENDING:
        # What is ignored was made so by nohup, or by a shell that runs this in the background.
        if signal.getsignal(number) is not signal.SIG_IGN:
            asyncio.get_running_loop().add_signal_handler(number, end, number)
    try:
        return await task
    except (asyncio.CancelledError, OSError):
        # With a terminal that has hung up, a line cannot be printed either.
        if not received:
            raise
        raise SystemExit(128 + received[0]) from None


def _subject(args: argparse.Namespace) -> Subject:
    from common.amd.kds import key_service
    from common.sev.policy import GuestPolicy
    from host_agent import config
    from host_agent.app import make_device
    from host_agent.doctor import open_machine
    from host_agent.doctor.processor import look
    from host_agent.doctor.roots import trusted
    from host_agent.hypervisors.base import GuestDefinition
    from host_agent.hypervisors.qemu import QemuHypervisor
    from host_agent.selftest.steps import Subject

    loaded = config.load(args.config, os.environ)
    # The others' guests are started by somebody else.
    definitions = {name: each for name, each in loaded.definitions().items() if isinstance(each, GuestDefinition)}
    guest = _guest(args.guest, definitions)
    roots = trusted(args.ca)
    return Subject(
        device=make_device(loaded.device),
        hypervisor=QemuHypervisor(definitions, loaded.qemu_settings(), loaded.lock_limit()),
        guest=guest,
        definition=definitions[guest],
        state_dir=loaded.state_dir,
        policy=GuestPolicy.parse(_POLICIES[args.kind]),
        host_cpu=look(open_machine(None)).type,
        key_service=None if args.kds is None else key_service(args.kds, roots=roots),
        roots=roots,
        resume=args.resume,
    )


def _guest(asked: str | None, definitions: Mapping[str, GuestDefinition]) -> str:
    if asked is None and len(definitions) == 1:
        return next(iter(definitions))
    if asked in definitions:
        return str(asked)
    known = ", ".join(sorted(definitions)) or "none"
    what = "--guest is needed" if asked is None else f"there is no guest {asked!r}"
    raise InvalidInput(Reason.INVALID_ARGUMENT, f"{what}; the configuration's guests for QEMU are: {known}")
