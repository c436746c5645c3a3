"""`sev-host-agent serve | check-config | health | doctor | selftest | proxmox-hookscript`: the agent's command line.

Errors go to stderr as `sev-host-agent: sentence`; exit codes as everywhere: 0 done, 2 usage or bad configuration,
3 not ready or failed.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from common.command import Parser, run_command
from host_agent.doctor import cli as doctor
from host_agent.hookscript import cli as hookscript
from host_agent.selftest import cli as selftest

PROGRAM = "sev-host-agent"
_NOT_READY = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    # Before gRPC is imported: its own complaints about peers are noise beside our log.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")

    def command() -> int:
        args = _parser().parse_args(argv)
        code: int = args.run(args)
        return code

    return run_command(PROGRAM, command)


def _parser() -> Parser:
    parser = Parser(prog=PROGRAM, description="start guests paused, relay their attestation, let attested guests run")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, run, text in (
        ("serve", _serve, "serve launches until SIGTERM"),
        ("check-config", _check_config, "check the configuration, the certificates and the guests' firmware"),
        ("health", _health, "ask the running agent whether it is ready"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--config", type=Path, required=True, metavar="FILE", help="agent.toml")
        command.set_defaults(run=lambda args, run=run: run(args.config))
    for name, add_arguments, text in (
        ("doctor", doctor.add_arguments, "say whether guests can be launched on this host, and what to do if not"),
        ("selftest", selftest.add_arguments, "launch a guest paused, as its owner would, and check every step"),
        ("proxmox-hookscript", hookscript.add_arguments, "print or install Proxmox VE's hookscript"),
    ):
        add_arguments(commands.add_parser(name, help=text, description=text))
    return parser


def _serve(path: Path) -> int:
    from common.hardening import harden_process
    from common.telemetry.log import configure
    from host_agent import app, config

    harden_process()
    log = configure(PROGRAM)
    loaded = config.load(path, os.environ)
    app.warn_of_unit(loaded, log=log)

    async def run() -> None:
        agent = app.build(loaded, log=log)
        await app.serve(
            agent,
            ready=lambda address: print(f"{PROGRAM}: serving on {address}", flush=True),
            reload=lambda: config.load(path, os.environ),
        )

    asyncio.run(run())
    return 0


def _check_config(path: Path) -> int:
    from common.clock import SystemClock
    from common.rpc.tls import load_server
    from host_agent import config
    from host_agent.hypervisors.guests import read_secret_area

    loaded = config.load(path, os.environ)
    identity = load_server(loaded.server_tls(), SystemClock().now()).identity
    print(f"identity: {identity}")
    print(f"serves: orchestrators of {loaded.tls.trust_domain} on {loaded.listen}")
    print(f"device: {loaded.device.driver} {loaded.device.path}")
    for name, guest in sorted(loaded.definitions().items()):
        area = read_secret_area(guest.firmware)
        where = (
            f"secrets at 0x{area.base:x}, {area.size} bytes" if area else "NO AREA FOR SECRETS: launches are refused"
        )
        print(f"guest {name}: {guest.firmware}, {where}")
    return 0


def _health(path: Path) -> int:
    from common.errors import InvalidInput, Reason
    from common.rpc.health import probe
    from host_agent import config

    loaded = config.load(path, os.environ)
    if loaded.health.socket is None:
        raise InvalidInput(Reason.INVALID_CONFIGURATION, "health.socket: not set, so there is nobody to ask")
    if asyncio.run(probe(loaded.health.socket)):
        print("ready")
        return 0
    print(f"{PROGRAM}: not ready", file=sys.stderr)
    return _NOT_READY


if __name__ == "__main__":
    sys.exit(main())
