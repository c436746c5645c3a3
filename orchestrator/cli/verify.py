"""`sevattest verify`: a platform's certificates as sevctl's tree, and whether every signature leads to AMD.

The tree, an empty line and the legend are on stdout, to the letter what sevctl prints; everything else (warnings, a
named root, the reason of a refusal) is on stderr. All lines are printed even when a signature is bad; then the command
ends with 1. Bytes that are no certificates end it with 2. Without `--sev` the certificates are this host's own,
with the signed CEK from AMD's key service.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import string
import sys
from pathlib import Path
from typing import Any

from common.amd.kds import FolderKeyService, key_service
from common.errors import InvalidInput, NotFound, Reason, Refused, SevattestError, Unavailable, exit_code
from common.sev.abi import CHIP_ID_SIZE, Usage
from common.sev.certs.amd import AmdCertificate, verify_amd_signature
from common.sev.certs.chain import MAX_CONTAINER_SIZE, Container, PlatformChain, read_container
from common.sev.certs.render import algorithm, render_tree
from common.sev.certs.roots import Root, named_root, pinned_root_of, pinned_roots
from common.sev.certs.sev import SevCertificate
from common.sev.certs.verify import ASK_CEK, LINKS, Links, attach_cek, check_links
from common.sev.errors import BadSignature, ParseError, UntrustedRoot
from orchestrator.cli.device import AMD_KEY_SERVICE, add_device_argument, exported

HELP = "verify a platform's certificates and print them as a tree"

_HINTS = {
    Reason.UNTRUSTED_ROOT: "only AMD's roots are trusted; --ca FILE names a software platform's own",
    Reason.CEK_UNSIGNED: "--kds URL --chip-id HEX fetches the signed CEK; AMD's service is " + AMD_KEY_SERVICE,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument(
        "--sev", metavar="FILE", type=Path, help="the platform's exported certificates; without it, this host's own"
    )
    parser.add_argument(
        "--oca", metavar="FILE", type=Path, help="an OCA certificate to use in place of the exported one"
    )
    parser.add_argument("--ca", metavar="FILE", type=Path, help="ASK and ARK to trust in place of AMD's built-in ones")
    parser.add_argument("--kds", metavar="URL|DIR", help="where to get the signed CEK: a key service or a folder")
    parser.add_argument("--chip-id", metavar="HEX", help="the chip's id, 128 hex digits, for --kds")
    add_device_argument(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the tree")


def run(args: argparse.Namespace) -> int:
    """Verify and print; 0 if every signature leads to a trusted root, 1 if not."""
    chip_id, source = _chip_id(args), args.kds
    if args.sev is None:
        own, told = exported(args)
        container = read_container(own.to_bytes())
        chip_id, source = chip_id or told or None, source or AMD_KEY_SERVICE
    else:
        container = _read(args.sev)
    if args.oca is not None:
        container = container.having(_read_oca(args.oca))
    chain = _platform(container, args.sev)
    roots = _candidates(container, read_root(args.ca) if args.ca is not None else None)
    links = check_links(chain, roots)
    failure: SevattestError | None = None
    if source is not None and not links.good(ASK_CEK):
        try:
            links = check_links(asyncio.run(_completed(chain, source, chip_id)), roots)
        except (NotFound, Refused, Unavailable) as error:
            failure = error  # what is at hand is shown all the same
    failure = failure or links.first_failure or _foreign_ca(container, links)
    if not args.quiet:
        _show(links, failure, as_json=args.json)
    return 0 if failure is None else exit_code(failure)


def _show(links: Links, failure: SevattestError | None, *, as_json: bool) -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # the tree's symbols are the format, whatever the locale
    print(json.dumps(_report(links, failure), indent=2) if as_json else render_tree(links, colour=_colour()))
    # The tree comes first, also where both streams end in one file.
    sys.stdout.flush()
    for warning in links.chain.warnings:
        print(f"sevattest: warning: {warning}", file=sys.stderr)
    if failure is None:
        return
    print(f"sevattest: SEV/CA certificate verification failed: {failure.message}", file=sys.stderr)
    if hint := _HINTS.get(failure.reason):
        print(f"hint: {hint}", file=sys.stderr)


def _report(links: Links, failure: SevattestError | None) -> dict[str, Any]:
    chain, root = links.chain, links.root
    known = root if root is not None and links.good(ASK_CEK) else None
    certs: list[SevCertificate | AmdCertificate] = [chain.pdh, chain.pek, chain.oca, chain.cek]
    certs += [root.ask, root.ark] if root else []
    return {
        "verified": failure is None,
        "generation": known.generation if known else None,
        "emulated": known.emulated if known else None,
        "certificates": [
            {"kind": cert.usage.name, "algorithm": algorithm(cert), "fingerprint": cert.fingerprint.hex()}
            for cert in certs
        ],
        "links": [
            {"signer": link.signer.name, "signed": link.signed.name, "good": links.good(link)}
            for link in LINKS
            if root or link.signer not in {Usage.ASK, Usage.ARK}
        ],
        "warnings": list(chain.warnings),
        "reason": failure.reason if failure else None,
        "message": failure.message if failure else None,
    }


def _candidates(container: Container, named: Root | None) -> tuple[Root, ...]:
    if named:
        return (named,)
    # CA certificates in the file can only choose among AMD's: then a broken link below them can be shown.
    beside = pinned_root_of(container.ca) if container.ca else None
    return (beside,) if beside else pinned_roots()


def _foreign_ca(container: Container, links: Links) -> Refused | None:
    """What is wrong with CA certificates that came along in the file; they are compared, never believed."""
    root = links.root
    for cert in (container.ask, container.ark):
        if cert is None or root is None:
            continue
        if cert.body != (root.ask if cert.usage is Usage.ASK else root.ark).body:
            return UntrustedRoot(f"the {cert.usage.name} in the file is not the trusted root's")
        try:
            verify_amd_signature(cert, root.ark)
        except BadSignature as error:
            return error
    return None


async def _completed(chain: PlatformChain, source: str, chip_id: bytes | None) -> PlatformChain:
    service = key_service(source)
    if chip_id is not None:
        return attach_cek(chain, await service.signed_cek(chip_id))
    if isinstance(service, FolderKeyService):
        return attach_cek(chain, await service.signed_copy_of(chain.cek))
    raise InvalidInput(
        Reason.INVALID_ARGUMENT,
        "--kds URL needs --chip-id HEX: the exported certificates do not hold the chip's id",
        hint="`sevctl show identifier` prints it; QEMU's query-sev-capabilities has it as cpu0-id",
    )


def _read(path: Path) -> Container:
    with path.open("rb") as file:
        data = file.read(MAX_CONTAINER_SIZE + 1)
    try:
        return read_container(data)
    except ParseError as error:
        raise ParseError(f"{path}: {error.message}") from error


def _platform(container: Container, path: Path) -> PlatformChain:
    try:
        return container.platform()
    except ParseError as error:
        raise ParseError(f"{path}: {error.message}") from error


def _read_oca(path: Path) -> SevCertificate:
    oca = _read(path).oca
    if oca is None:
        raise ParseError(f"{path} holds no OCA")
    return oca


def read_root(path: Path) -> Root:
    """The root that a person names by its ASK‖ARK, with a warning on stderr where it is not AMD's.

    Raises:
        ParseError: the file does not hold an ASK and an ARK.
        Refused: they do not hold together, or one is AMD's and the other is not.
    """
    ca = _read(path).ca
    if ca is None:
        raise ParseError(f"{path} does not hold an ASK and an ARK")
    root = named_root(ca.to_bytes())
    if root.emulated:
        print(f"sevattest: warning: the root in {path} is not AMD's: platforms under it are emulated", file=sys.stderr)
    return root


def _chip_id(args: argparse.Namespace) -> bytes | None:
    if args.chip_id is None:
        return None
    if args.kds is None:
        raise InvalidInput(Reason.INVALID_ARGUMENT, "--chip-id says whose CEK to fetch and needs --kds")
    text = args.chip_id.strip().removeprefix("0x")
    if len(text) != 2 * CHIP_ID_SIZE or not set(text) <= set(string.hexdigits):
        raise InvalidInput(Reason.INVALID_ARGUMENT, f"--chip-id takes {2 * CHIP_ID_SIZE} hex digits")
    return bytes.fromhex(text)


def _colour() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
