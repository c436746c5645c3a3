"""`sevattest provision CERT KEY`: take ownership of the platform, with an OCA as `sevattest generate` makes it.

The platform hands out its PEK (PEK_CSR), the OCA's key signs it, and both go back (PEK_CERT_IMPORT). The platform then
has a new PDH; certificates and sessions from before are good for nothing. Prints nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import InvalidInput, Reason
from common.sev.abi import SEV_CERT_SIZE
from common.sev.errors import ParseError
from orchestrator.cli.device import add_device_argument, ask, not_understood

if TYPE_CHECKING:
    from host_agent.devices import Administration

HELP = "take ownership of the platform"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("cert", metavar="CERT", type=Path, help="the owner's OCA certificate")
    parser.add_argument("key", metavar="KEY", type=Path, help="its private key")
    add_device_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Provision; returns 0. Nothing is asked of the platform before certificate and key are known to be good."""
    from common.sev.certs.oca import MAX_KEY_SIZE, read_key, read_oca, sign_pek

    certificate, private = _read(args.cert, SEV_CERT_SIZE), _read(args.key, MAX_KEY_SIZE)
    try:
        oca = read_oca(certificate)
    except ParseError as error:
        swapped = len(private) == SEV_CERT_SIZE
        raise _bad(args.cert, error, hint="CERT comes first, then KEY" if swapped else None) from error
    try:
        key = read_key(private, oca)
    except ParseError as error:
        raise _bad(args.key, error) from error

    async def question(device: Administration) -> None:
        try:
            pek = sign_pek(await device.pek_csr(), key)
        except ParseError as error:
            raise not_understood(error) from error
        await device.pek_cert_import(pek.raw, oca.raw)

    ask(args, question)
    return 0


def _read(path: Path, size: int) -> bytes:
    with path.open("rb") as file:
        return file.read(size + 1)


def _bad(path: Path, error: ParseError, hint: str | None = None) -> InvalidInput:
    fields = {"hint": hint} if hint else {}
    return InvalidInput(Reason.MALFORMED, f"{path}: {error.message}", **fields)
