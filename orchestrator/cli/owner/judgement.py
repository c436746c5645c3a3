"""`sevattest owner revocation impact` and `simulate`: what a change would do, before it is made."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING

from common.command import clean
from common.errors import InvalidInput, Reason
from common.ids import canonical_uuid
from common.sev.errors import ParseError
from orchestrator.cli.owner.connection import connected
from orchestrator.cli.owner.files import about, read, read_document
from orchestrator.cli.owner.text import as_json, table
from orchestrator.drivers.admin_values import Judgement, SupposedLaunch

if TYPE_CHECKING:
    from common.sev.measurement import FirmwareVersion
    from orchestrator.drivers.admin import VerifierAdmin

_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
_CONTAINER_MAX = 1 << 20


def add_impact(parser: argparse.ArgumentParser) -> None:
    """The command line of `revocation impact`."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="of a revocation that is in force")
    parser.add_argument("-f", "--file", metavar="FILE", help="a revocation that need not be")
    parser.add_argument("--json", action="store_true", help="print a JSON array instead of a table")


def run_impact(args: argparse.Namespace) -> int:
    """List the launches that a revocation touches."""
    if (args.file is None) == (args.name is None):
        raise InvalidInput(Reason.INVALID_ARGUMENT, "give either the NAME of a revocation, or -f FILE")
    text = "" if args.file is None else read_document(args.file)

    async def work(admin: VerifierAdmin) -> int:
        try:
            found = await admin.impact(text=text, name=args.name or "")
        except InvalidInput as error:
            raise (error if args.file is None else about(args.file, error)) from error
        if args.json:
            print(as_json(found))
            return 0
        rows = [
            [each.launch_id, each.state, f"{each.workload} {each.workload_version}", each.findings[0].message]
            for each in found
        ]
        print("\n".join(table(["LAUNCH", "STATE", "WORKLOAD", "WHY"], rows)))
        return 0

    return connected(args, work)


def add_simulate(parser: argparse.ArgumentParser) -> None:
    """The command line of `simulate`."""
    parser.add_argument("--launch", type=_uuid, metavar="ID", help="judge this launch of the past again")
    parser.add_argument("--workload", metavar="NAME", help="or suppose a launch of this workload")
    parser.add_argument("--caller", metavar="SPIFFE-ID", help="by this orchestrator")
    parser.add_argument(
        "--chain", metavar="FILE", help="on this platform: its certificates, as sevattest export has them"
    )
    parser.add_argument("--grant", metavar="NAME", help="under this grant, where there is more than one")
    parser.add_argument(
        "--digest", type=_digest, metavar="HEX", help="measured so; the first that is allowed unless given"
    )
    parser.add_argument("--firmware", type=_firmware, metavar="1.55.24", help="by this firmware")
    parser.add_argument(
        "-f",
        "--file",
        dest="files",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="judged by these, too",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")


def _uuid(text: str) -> str:
    if canonical_uuid(text) is None:
        raise argparse.ArgumentTypeError("must be a launch's id, a UUID in lower case")
    return text


def _digest(text: str) -> bytes:
    if not _DIGEST.fullmatch(text):
        raise argparse.ArgumentTypeError("must be a launch digest: 64 hex digits")
    return bytes.fromhex(text)


def _firmware(text: str) -> FirmwareVersion:
    from common.sev.measurement import FirmwareVersion

    try:
        return FirmwareVersion.parse(text)
    except ParseError as error:
        raise argparse.ArgumentTypeError(error.message) from None


def run_simulate(args: argparse.Namespace) -> int:
    """Judge a launch; 1 where it is refused."""
    supposed = _supposed(args)
    texts = [read_document(name) for name in args.files]

    async def work(admin: VerifierAdmin) -> int:
        judgement = await admin.simulate(
            launch_id=args.launch or "", supposed=supposed, texts=texts, firmware=args.firmware
        )
        if args.json:
            print(as_json(judgement))
        else:
            print("\n".join(_lines(judgement)))
        return 0 if judgement.accepted else 1

    return connected(args, work)


def _supposed(args: argparse.Namespace) -> SupposedLaunch | None:
    needed = {"--workload": args.workload, "--caller": args.caller, "--chain": args.chain}
    others = {**needed, "--grant": args.grant, "--digest": args.digest}
    if args.launch is not None:
        if given := [option for option, value in others.items() if value is not None]:
            raise InvalidInput(Reason.INVALID_ARGUMENT, f"--launch has its own {given[0].removeprefix('--')}")
        return None
    if missing := [option for option, value in needed.items() if value is None]:
        raise InvalidInput(
            Reason.INVALID_ARGUMENT,
            f"{missing[0]} is needed",
            hint="give --launch ID, or --workload, --caller and --chain",
        )
    return SupposedLaunch(
        workload=args.workload,
        caller=args.caller,
        grant=args.grant or "",
        chain=_chain(args.chain),
        digest=args.digest or b"",
    )


def _chain(name: str) -> bytes:
    """PDH, PEK, OCA and CEK from any container that has them."""
    from common.sev.certs.chain import read_container

    try:
        return read_container(read(name, _CONTAINER_MAX)).platform().to_bytes()
    except ParseError as error:
        raise about(name, error) from error


def _lines(judgement: Judgement) -> list[str]:
    version = judgement.workload_version
    by = "no workload" if version is None else f"workload version {version}"
    grant = "" if judgement.grant is None else f", grant {judgement.grant}"
    verdict = "accepted" if judgement.accepted else "refused"
    return [f"{verdict}: {by}{grant}", *(f"  {clean(each.rule)}: {clean(each.message)}" for each in judgement.findings)]
