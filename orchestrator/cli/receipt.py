"""`sevattest receipt verify`: whether a receipt was signed by the guest owner's verifier, and what it says.

Works offline, for anybody: it needs the receipt and the verifier's public keys, a JWK set that the owner gives away.
The claims are on stdout, the verdict on stderr. What they say is not judged: docs/receipt.md has what to look at.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from common.audit.jws import KEY_SET_MAX, RECEIPT_TYPE, TOKEN_MAX, read_key_set, untrusted_claims, verify_jws
from common.errors import SevattestError
from orchestrator.cli.owner.files import about

HELP = "verify a receipt and print what it says"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    verify = actions.add_parser("verify", help="verify a receipt's signature and print its claims")
    verify.add_argument(
        "file", metavar="FILE", help="the receipt: `receipt_token` of `sevattest launch --json`; - for stdin"
    )
    verify.add_argument(
        "--jwks", metavar="FILE", type=Path, required=True, help="the verifier's public keys, from the guest owner"
    )


def run(args: argparse.Namespace) -> int:
    """Verify and print; 0 if the signature holds."""
    try:
        keys = read_key_set(_read(args.jwks, KEY_SET_MAX))
    except SevattestError as error:
        raise about(str(args.jwks), error) from error
    token = sys.stdin.buffer.read(TOKEN_MAX + 2) if args.file == "-" else _read(Path(args.file), TOKEN_MAX)
    try:
        receipt = verify_jws(token.strip(), keys, typ=RECEIPT_TYPE)
    except SevattestError as error:
        if token.lstrip().startswith(b"{"):
            error.fields.setdefault("hint", "a receipt is what `receipt_token` holds in the JSON of a launch")
        raise about(args.file, error) from error
    if not args.quiet:
        print(json.dumps(receipt.claims, indent=2))
        print(f"sevattest: the receipt is genuine: signed with {receipt.kid}", file=sys.stderr)
    return 0


def readable(receipt: str) -> object:
    """What a receipt says, for people and with no look at its signature; None where that cannot be told."""
    try:
        if receipt.startswith("{"):  # a verifier before signed receipts
            return json.loads(receipt)
        return untrusted_claims(receipt)
    except (ValueError, RecursionError, SevattestError):
        return None


def _read(path: Path, limit: int) -> bytes:
    with path.open("rb") as file:
        return file.read(limit + 2)  # a line's end, and one byte that is too many
