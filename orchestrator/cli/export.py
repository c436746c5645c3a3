"""`sevattest export [-f] DEST`: the platform's certificates, complete and verified, in one file.

DEST is PDH, PEK, OCA, CEK, 8336 bytes; with `--full` ASK and ARK follow (10000 bytes for Naples, 11536 for the others).
The CEK is the signed one: what the firmware has carries no signature, AMD's key service (or another one, or a folder)
has it under the chip's id. Nothing is written unless every signature leads to a trusted root. Prints nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from pathlib import Path

from common.amd.kds import FolderKeyService, key_service
from common.errors import PlatformFailed, Reason, SevattestError
from common.sev.certs.chain import PlatformChain
from common.sev.certs.roots import Root, pinned_roots
from common.sev.certs.verify import attach_cek, verify_platform
from orchestrator.cli.device import AMD_KEY_SERVICE, add_device_argument, exported
from orchestrator.cli.verify import read_root
from orchestrator.files import NewFile, write_all

HELP = "write the platform's certificates to a file"
_HINTS = {
    Reason.UNTRUSTED_ROOT: "only AMD's roots are trusted; --ca FILE names a software platform's own",
    Reason.KEY_SERVICE_UNAVAILABLE: "--kds URL|DIR names another key service, or a folder with the signed CEK",
    Reason.NOT_FOUND: "--kds URL|DIR names another key service, or a folder with the signed CEK",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("-f", "--full", action="store_true", help="also the ASK and ARK of the platform's generation")
    parser.add_argument("dest", metavar="DEST", type=Path, help="file for the certificates")
    add_device_argument(parser)
    parser.add_argument(
        "--kds",
        metavar="URL|DIR",
        default=AMD_KEY_SERVICE,
        help="where the signed CEK is: a key service or a folder (%(default)s)",
    )
    parser.add_argument("--ca", metavar="FILE", type=Path, help="ASK and ARK to trust in place of AMD's built-in ones")
    parser.add_argument(
        "--cache", metavar="DIR", type=Path, default=_cache(), help="folder for the CEKs of key services (%(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Export, complete, verify and write; returns 0."""
    roots = pinned_roots() if args.ca is None else (read_root(args.ca),)
    chain, chip_id = exported(args)
    try:
        if not chain.cek.is_signed:
            chain = asyncio.run(_completed(chain, chip_id, args, roots))
        platform = verify_platform(chain, roots)
    except SevattestError as error:
        if hint := _HINTS.get(error.reason):
            error.fields.setdefault("hint", hint)
        raise
    for warning in platform.chain.warnings:
        print(f"sevattest: warning: {warning}", file=sys.stderr)
    data = platform.chain.to_bytes()
    if args.full:
        data += platform.root.ask.raw + platform.root.ark.raw
    write_all([NewFile(path=args.dest, data=data)])
    return 0


async def _completed(
    chain: PlatformChain, chip_id: bytes, args: argparse.Namespace, roots: tuple[Root, ...]
) -> PlatformChain:
    """The chain with the signed CEK of its chip."""
    service = key_service(args.kds, args.cache, roots=roots)
    if chip_id:
        return attach_cek(chain, await service.signed_cek(chip_id))
    if isinstance(service, FolderKeyService):
        return attach_cek(chain, await service.signed_copy_of(chain.cek))
    raise PlatformFailed(
        Reason.FIRMWARE_FAILED,
        "the platform does not tell its chip's id, under which the key service has the signed CEK",
        hint="--kds DIR names a folder with the signed CEK",
    )


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "sevattest" / "cek"
