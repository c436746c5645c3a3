"""`sev-host-agent serve | check-config | health | doctor | selftest | proxmox-hookscript`: the agent's command line.

Errors go to stderr as `sev-host-agent: sentence`; exit codes as everywhere: 0 done, 2 usage or bad configuration,
3 not ready or failed.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from common.command import Parser, add_version, run_command

PROGRAM = "sev-host-agent"
_NOT_READY = 3
# Libraries of its own extra.
_EXTRAS = {"qemu": "agent"}
# Command, the package whose `cli` has its arguments and runs it, and its line of help. Only the one that is called is
# imported: a service that starts does not pay for the rest.
_OWN_MODULES = (
    ("doctor", "doctor", "say whether guests can be launched on this host, and what to do if not"),
    ("selftest", "selftest", "launch a guest paused, as its owner would, and check every step"),
    ("proxmox-hookscript", "hookscript", "print or install Proxmox VE's hookscript"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    # Before gRPC is imported: its own complaints about peers are noise beside our log.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")

    words = list(sys.argv[1:] if argv is None else argv)

    def command() -> int:
        args = _parser(words).parse_args(words)
        code: int = args.run(args)
        return code

    return run_command(PROGRAM, command, extras=_EXTRAS)


def _parser(words: Sequence[str]) -> Parser:
    parser = Parser(prog=PROGRAM, description="start guests paused, relay their attestation, let attested guests run")
    add_version(parser)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, run, text in (
        ("serve", _serve, "serve launches until SIGTERM"),
        ("check-config", _check_config, "check the configuration, the certificates and the guests' firmware"),
        ("health", _health, "ask the running agent whether it is ready"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--config", type=Path, required=True, metavar="FILE", help="agent.toml")
        command.set_defaults(run=lambda args, run=run: run(args.config))
    for name, module, text in _OWN_MODULES:
        command = commands.add_parser(name, help=text, description=text)
        if name in words[:1]:
            import_module(f"host_agent.{module}.cli").add_arguments(command)
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
    from common.telemetry.endpoint import Endpoint
    from common.telemetry.log import SILENCE
    from host_agent import config
    from host_agent.hypervisors.guests import read_secret_area

    loaded = config.load(path, os.environ)
    if loaded.metrics is not None:
        Endpoint(loaded.metrics, SILENCE)
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
