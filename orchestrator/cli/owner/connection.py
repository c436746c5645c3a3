"""How `sevattest owner` reaches the verifier: four options, each with a variable of the environment behind it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import InvalidInput, OutcomeUnknown, Reason

if TYPE_CHECKING:
    from orchestrator.drivers.admin import VerifierAdmin

# Option -> the variable that stands for it.
VARIABLES = {
    "--admin": "SEVATTEST_OWNER_ADMIN",
    "--tls-cert": "SEVATTEST_OWNER_CERT",
    "--tls-key": "SEVATTEST_OWNER_KEY",
    "--admin-ca": "SEVATTEST_OWNER_CA",
}
_TIMEOUT_MAX_S = 3600.0


def add_connection(parser: argparse.ArgumentParser) -> None:
    """The options that every command has."""
    group = parser.add_argument_group("connection", "each but the timeout may stand in the environment instead")

    def add(option: str, metavar: str, text: str) -> None:
        group.add_argument(option, metavar=metavar, help=f"{text} ({VARIABLES[option]})")

    add("--admin", "HOST:PORT", "the verifier's listener for owners")
    add("--tls-cert", "FILE", "the owner's certificate")
    add("--tls-key", "FILE", "its private key")
    add("--admin-ca", "FILE", "CA of the verifier, which is the owner's own")
    group.add_argument(
        "--timeout",
        type=_seconds,
        default=30.0,
        metavar="S",
        help="seconds for one call with its repeats (default: 30)",
    )


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= _TIMEOUT_MAX_S:
        raise argparse.ArgumentTypeError("must be more than 0 and at most 3600 seconds")
    return seconds


def connected(args: argparse.Namespace, work: Callable[[VerifierAdmin], Awaitable[int]]) -> int:
    """Run `work` with a connection to the verifier; its exit code.

    Raises:
        InvalidInput: an option is missing, or a file cannot be used.
        SevattestError: what the verifier raised.
    """
    target, cert, key, authority = (_option(args, option) for option in VARIABLES)
    # Imported here, so that a mistyped command line does not pay for them.
    import asyncio

    async def run() -> int:
        from common.rpc.tls import ClientTls
        from orchestrator.drivers.admin import open_admin

        tls = ClientTls(cert=Path(cert), key=Path(key), server_ca=Path(authority))
        async with open_admin(target, tls, timeout=args.timeout) as admin:
            return await work(admin)

    try:
        return asyncio.run(run())
    except OutcomeUnknown as error:
        hint = "look with sevattest owner get, secret list or launches list before you repeat it"
        raise OutcomeUnknown(error.reason, error.message, hint=hint) from error


def _option(args: argparse.Namespace, option: str) -> str:
    given: str | None = getattr(args, option.removeprefix("--").replace("-", "_"))
    value = given or os.environ.get(VARIABLES[option])
    if not value:
        raise InvalidInput(Reason.INVALID_ARGUMENT, f"{option} is needed", hint=f"give it, or set {VARIABLES[option]}")
    return value
