"""`sevattest platform serve|qemu|run|firmware|show`: arguments in, exit codes out. All else is imported when needed."""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from common.errors import InvalidInput, Reason

# Named here so that `--help` need not load keys; a test holds it against `keys.GENERATIONS`.
GENERATION_NAMES = ("naples", "rome", "milan", "genoa", "turin")
_QEMU_VERSIONS = ("7.2", "10.0")
_VMSA_FLAVOURS = ("legacy", "legacy+debug-swap", "init2", "init2+debug-swap", "init2-ap-zero")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the five subcommands to `parser`."""
    commands = parser.add_subparsers(
        dest="action",
        metavar="serve|qemu|run|firmware|show",
        required=True,
        parser_class=_leaving_the_rest(type(parser)),
    )
    serve = commands.add_parser("serve", help="serve a software SEV platform on DIR/sev.sock")
    _add_state(serve)
    serve.add_argument("--generation", choices=GENERATION_NAMES, help="what a new platform imitates (default: milan)")
    serve.add_argument("--kds-listen", metavar="HOST:PORT", type=_host_and_port, help="serve its key service as well")
    serve.add_argument("--kds-resign", action="store_true", help="let each answer carry a fresh signature")
    serve.add_argument("--no-init", action="store_true", help="start uninitialised (psp_init_on_probe=0)")
    serve.add_argument("--no-es", action="store_true", help="start without SEV-ES")
    serve.add_argument("--trace", action="store_true", help="tell each command on stderr")
    qemu = commands.add_parser("qemu", help="a machine; takes QEMU's own arguments", add_help=False)
    qemu.add_argument("-h", "--help", action="help")
    qemu.add_argument("--builtin", action="store_true", help="a machine without QEMU that runs no kernel")
    qemu.add_argument(
        "--qemu", metavar="PROGRAM", default="qemu-system-x86_64", help="the real QEMU (default: %(default)s)"
    )
    _add_state(qemu)
    qemu.add_argument(
        "--qemu-version", choices=_QEMU_VERSIONS, help="with --builtin: whose QMP it speaks (default: 7.2)"
    )
    qemu.add_argument(
        "--vmsa", choices=_VMSA_FLAVOURS, help="which save areas SEV-ES guests start with (default: legacy)"
    )
    qemu.usage = "%(prog)s --state DIR [--qemu PROGRAM | --builtin] [--vmsa FLAVOUR] QEMU'S-ARGUMENTS …"
    qemu.set_defaults(arguments=[])
    program = commands.add_parser("run", help="an unmodified program with /dev/sev and KVM's SEV commands")
    _add_state(program)
    program.add_argument("--vmsa", choices=_VMSA_FLAVOURS, default="legacy", help="as for qemu (default: legacy)")
    program.usage = "%(prog)s --state DIR [--vmsa FLAVOUR] -- PROGRAM ARGUMENTS …"
    program.set_defaults(arguments=[])
    firmware = commands.add_parser("firmware", help="write a firmware image with the footer of an AmdSev build")
    firmware.add_argument("file", metavar="FILE", type=Path, help="the file to write")
    firmware.add_argument("--label", metavar="TEXT", required=True, help="what its content follows from")
    show = commands.add_parser("show", help="what the platform in DIR is")
    _add_state(show)
    show.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> int:
    """Run the subcommand that was parsed; returns the exit code."""
    if args.action == "serve":
        return _serve(args)
    if args.action == "qemu":
        return _qemu(args)
    if args.action == "run":
        return _run(args)
    if args.action == "firmware":
        from emulator.firmware_image import write_image

        write_image(args.file, args.label)
        return 0
    return _show(args)


def _serve(args: argparse.Namespace) -> int:
    from emulator.app import ServeOptions, serve

    options = ServeOptions(
        state=args.state,
        generation=args.generation,
        kds_listen=args.kds_listen,
        kds_resign=args.kds_resign,
        initialise=not args.no_init,
        es=not args.no_es,
        trace=args.trace,
    )
    print("sevattest platform: software only: nothing is encrypted and nothing is protected", file=sys.stderr)
    asyncio.run(serve(options))
    return 0


def _qemu(args: argparse.Namespace) -> int:
    if args.builtin:
        from emulator.qmp_server import run_machine

        version, flavour = args.qemu_version or "7.2", args.vmsa or "legacy"
        return run_machine(args.arguments, state=args.state, qemu_version=version, flavour=flavour)
    if args.qemu_version:
        raise InvalidInput(Reason.INVALID_ARGUMENT, "--qemu-version is the built-in machine's; a real QEMU has its own")
    program = shutil.which(args.qemu)
    if program is None:
        raise InvalidInput(
            Reason.INVALID_ARGUMENT,
            f"there is no program {args.qemu}",
            hint="install QEMU (Debian: qemu-system-x86), name it with --qemu, or use --builtin, which runs no kernel",
        )
    from emulator.front.machine import run_front

    return run_front(args.arguments, state=args.state, program=program, flavour=args.vmsa)


def _run(args: argparse.Namespace) -> int:
    words = args.arguments[1:] if args.arguments[:1] == ["--"] else args.arguments
    if not words:
        raise InvalidInput(Reason.INVALID_ARGUMENT, "which program?", hint="sevattest platform run --help")
    program = shutil.which(words[0])
    if program is None:
        raise InvalidInput(Reason.INVALID_ARGUMENT, f"there is no program {words[0]}")
    from emulator.intercept.supervisor import run as run_under

    return run_under(program, words, state=args.state, flavour=args.vmsa)


def _show(args: argparse.Namespace) -> int:
    from emulator.app import look

    seen = look(args.state)
    if args.json:
        print(json.dumps(seen))
        return 0
    guests, prints = seen.pop("guests"), seen.pop("fingerprints")
    for name, value in seen.items():
        print(f"{name.replace('_', ' '):<12}{_word(value)}")
    if isinstance(prints, dict):
        for name, value in prints.items():
            print(f"{name.upper():<12}{value}")
    if isinstance(guests, list):
        for guest in guests:
            print(f"guest {guest['handle']:<6}{guest['state']} policy {guest['policy']} asid {guest['asid']}")
    return 0


def _word(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else str(value)


def _leaving_the_rest(base: type[argparse.ArgumentParser]) -> type[argparse.ArgumentParser]:
    """A parser that, where `arguments` has a default, hands over everything after its own options untouched.

    argparse cannot: it takes `-machine` for an option of its own that it does not know.
    """

    class Parser(base):  # type: ignore[valid-type,misc]  # the program's own parser class, known only when it runs
        def parse_known_args(
            self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
        ) -> tuple[argparse.Namespace, list[str]]:
            if self.get_default("arguments") is None:
                parsed: tuple[argparse.Namespace, list[str]] = super().parse_known_args(args, namespace)
                return parsed
            own, rest = _own_options(args or ())
            filled: argparse.Namespace = super().parse_known_args(own, namespace)[0]
            filled.arguments = rest
            return filled, []

    return Parser


def _own_options(words: Sequence[str]) -> tuple[list[str], list[str]]:
    at = 0
    while at < len(words):
        name, equals, _ = words[at].partition("=")
        if name in {"--builtin", "--help", "-h"}:
            at += 1
        elif name in {"--state", "--qemu", "--qemu-version", "--vmsa"}:
            at += 1 if equals else 2
        else:
            break
    return list(words[:at]), list(words[at:])


def _add_state(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--state", metavar="DIR", type=Path, required=True, help="the platform's folder")


def _host_and_port(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 0xFFFF:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    return host.strip("[]"), int(port)
