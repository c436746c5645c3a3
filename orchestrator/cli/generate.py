"""`sevattest generate CERT KEY`: a new OCA, with which somebody can take ownership of platforms.

CERT is the self-signed certificate, 2084 bytes; KEY its private key, DER without a passphrase, mode 0600. Both are
written when both are complete, or neither is. Needs no SEV platform. Prints nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common.errors import InvalidInput, Reason
from orchestrator.files import PRIVATE, NewFile, place_of, write_all

HELP = "make an OCA certificate and its key"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("cert", metavar="CERT", type=Path, help="file for the certificate")
    parser.add_argument("key", metavar="KEY", type=Path, help="file for the private key")


def run(args: argparse.Namespace) -> int:
    """Make and write both; returns 0."""
    from common.sev.certs.oca import encode_key, make_oca

    if place_of(args.cert) == place_of(args.key):
        raise InvalidInput(Reason.INVALID_ARGUMENT, "CERT and KEY are the same file")
    oca, key = make_oca()
    write_all(
        [
            NewFile(path=args.key, data=encode_key(key), mode=PRIVATE),
            NewFile(path=args.cert, data=oca.raw),
        ]
    )
    return 0
