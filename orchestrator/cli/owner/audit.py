"""`sevattest owner audit list|verify` and `keys`: the evidence, and whether it is whole (docs/audit-log.md)."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.command import clean
from common.errors import InvalidInput, NotFound, Reason, SevattestError
from common.ids import canonical_uuid
from orchestrator.cli.owner.connection import connected
from orchestrator.cli.owner.files import about, read
from orchestrator.cli.owner.text import as_json, when
from orchestrator.drivers.admin_values import AuditRecord
from orchestrator.files import NewFile, write_all

if TYPE_CHECKING:
    from common.audit.chain import Head, Link
    from common.audit.checkpoint import SignedHead
    from common.audit.jws import KeySet
    from orchestrator.drivers.admin import VerifierAdmin

_TOKEN_MAX = 16 * 1024
_KEYS_MAX = 64 * 1024
# The members that say what a record is about: of documents and secrets, of launches, and of all.
_SUBJECT = ("kind", "name", "version", "launch_id", "reason", "caller")
_BATCH = 1000  # records that are verified at once, so that a log of any length fits into memory


def add_list(parser: argparse.ArgumentParser) -> None:
    """The command line of `audit list`."""
    parser.add_argument("--launch", type=_uuid, metavar="ID", help="only records of this launch")
    parser.add_argument("--id", type=_uuid, metavar="AUDIT-ID", help="only the record that a refusal named")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")


def _uuid(text: str) -> str:
    if canonical_uuid(text) is None:
        raise argparse.ArgumentTypeError("must be an id, a UUID in lower case")
    return text


def run_list(args: argparse.Namespace) -> int:
    """Print records as they come."""

    async def work(admin: VerifierAdmin) -> int:
        found = False
        async for record in admin.records(args.launch or ""):
            if args.id not in (None, record.audit_id):
                continue
            found = True
            print(json.dumps(_as_object(record), ensure_ascii=False) if args.json else "\n".join(_lines(record)))
        if args.id is not None and not found:
            raise NotFound(Reason.NOT_FOUND, f"there is no record {args.id}")
        return 0

    return connected(args, work)


def _as_object(record: AuditRecord) -> dict[str, Any]:
    """One flat object: the record's members, those of its body, and its place."""
    members = _object(record.json)
    text = members.pop("body", None)
    own = {"number": record.number, "hash": record.hash, **members, "time": record.time.isoformat()}
    # Whoever wrote to the database may have written anything: it is shown as it is, and hides no other record.
    return {**own, **(_object(text) or {"body": text}), **own}


def _object(text: object) -> dict[str, Any]:
    """The members that a JSON text has; none of what is no object."""
    try:
        value = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {}


def _lines(record: AuditRecord) -> Iterator[str]:
    members = _as_object(record)
    words = [str(members[name]) for name in _SUBJECT if members.get(name)]
    yield "  ".join([str(record.number), when(record.time), *map(clean, (record.event, *words))])
    try:
        told = [f"{each['rule']}: {each['message']}" for each in members.get("findings", ())]
        if explanation := members.get("explanation"):
            told.append(f"explanation: {explanation['sentence']}")
    except (KeyError, TypeError):
        told = ["its body is none that a verifier writes"]
    yield from (f"  {clean(each)}" for each in (*told, f"audit id {record.audit_id}"))


def add_verify(parser: argparse.ArgumentParser) -> None:
    """The command line of `audit verify`."""
    parser.add_argument("--jwks", metavar="FILE", help="the verifier's keys, as `sevattest owner keys` gave them once")
    parser.add_argument(
        "--since-checkpoint",
        metavar="FILE",
        help="a checkpoint that was kept: its record must stand as it was signed, and only what follows is verified",
    )
    parser.add_argument(
        "--checkpoint",
        action="append",
        default=[],
        metavar="FILE",
        help="a checkpoint that was kept and must still hold",
    )
    parser.add_argument(
        "--keep",
        type=Path,
        metavar="FILE",
        help="keep the newest checkpoint there, for the next time; the one that is there must still hold",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")


def run_verify(args: argparse.Namespace) -> int:
    """Read the log and verify it; 1 where a record was changed, removed, moved or cut off."""
    from common.audit.checkpoint import verify_checkpoints
    from common.audit.jws import read_key_set

    try:
        pinned = None if args.jwks is None else read_key_set(read(args.jwks, _KEYS_MAX))
    except InvalidInput as error:
        raise about(args.jwks, error) from error

    async def work(admin: VerifierAdmin) -> int:
        keys = read_key_set((await admin.jwks()).encode()) if pinned is None else pinned
        # What would be replaced is asked too: it may be the only word of what the verifier no longer shows.
        there = [str(args.keep)] if args.keep is not None and args.keep.is_file() else []
        kept = [_kept(name, keys) for name in (*args.checkpoint, *there)]
        since = None if args.since_checkpoint is None else _kept(args.since_checkpoint, keys)
        # Before the records, which only become more.
        tokens = await admin.checkpoints()
        others = [*kept, *([] if since is None else [since])]
        signed = verify_checkpoints([*tokens, *(each.token for each in others)], keys)
        start = None if since is None else since.head
        head = await _verified(admin, signed, start)
        covered = signed[-1].head.number if signed else 0
        _say_verified(args, head, len(signed), covered, start)
        if args.keep is not None and signed:
            write_all([NewFile(path=args.keep, data=signed[-1].token.encode() + b"\n")])
        elif args.keep is not None:
            print("warning: the verifier has signed no checkpoint yet, so none was kept", file=sys.stderr)
        return 0

    return connected(args, work)


def _kept(name: str, keys: KeySet) -> SignedHead:
    """A checkpoint that was kept in a file."""
    from common.audit.checkpoint import read_checkpoint

    token = read(name, _TOKEN_MAX).strip()
    try:
        return read_checkpoint(token, keys)
    except SevattestError as error:
        raise about(name, error) from error


async def _verified(admin: VerifierAdmin, signed: Sequence[SignedHead], start: Head | None) -> Head:
    """The head of the log, all of which holds, or all of it from `start` on.

    Raises:
        Refused: it does not.
    """
    from common.audit.chain import GENESIS
    from common.audit.checkpoint import verify_log

    records = admin.records()
    head = GENESIS if start is None else await _reached(records, signed, start)
    batch: list[Link] = []
    async for record in records:
        batch.append(_link(record))
        if len(batch) == _BATCH:
            head = verify_log(batch, [each for each in signed if each.head.number <= batch[-1].number], head)
            batch = []
    # With the rest of the checkpoints, so that a log that ends before one of them is found.
    return verify_log(batch, signed, head)


async def _reached(records: AsyncIterator[AuditRecord], signed: Sequence[SignedHead], start: Head) -> Head:
    """`start`, whose record must be there as it was signed; the ones before it that nobody signed are passed by.

    Raises:
        Refused: it is missing, or another one.
    """
    from common.audit.chain import GENESIS, Head, broken
    from common.audit.checkpoint import verify_log

    known = {each.head.number: each for each in signed if each.head.number <= start.number}
    passed = GENESIS
    async for record in records:
        passed = Head(number=record.number, hash=bytes.fromhex(record.hash))
        if there := known.get(passed.number):
            verify_log((), [there], passed)
        if passed.number >= start.number:
            break
    if passed.number > start.number:
        raise broken(start.number, "is missing")
    return verify_log((), known.values(), passed)


def _link(record: AuditRecord) -> Link:
    from common.audit.chain import Link

    # What is no JSON has no hash that fits.
    return Link(number=record.number, hash=bytes.fromhex(record.hash), fields=_object(record.json))


def _say_verified(args: argparse.Namespace, head: Head, checkpoints: int, covered: int, start: Head | None) -> None:
    first = 1 if start is None else start.number + 1
    if args.json:
        print(
            as_json(
                {
                    "records": head.number,
                    "hash": head.hash.hex(),
                    "first": first,
                    "checkpoints": checkpoints,
                    "covered": covered,
                    "pinned": args.jwks is not None,
                }
            )
        )
    else:
        records = f"records {first} to {head.number}" if head.number >= first else f"no record after {first - 1}"
        print(f"the audit log is whole: {records}, checkpoints: {checkpoints}")
        if checkpoints:
            print(f"signed up to record {covered}; {head.number - covered} came after the newest checkpoint")
        else:
            print("nothing of it is signed: the verifier has no checkpoint yet")
    if args.jwks is None:
        print(
            "warning: the keys are the verifier's own word of today, --jwks takes those that you kept", file=sys.stderr
        )


def run_keys(args: argparse.Namespace) -> int:
    """Print the JWK set."""

    async def work(admin: VerifierAdmin) -> int:
        print(as_json(json.loads(await admin.jwks())))
        return 0

    return connected(args, work)
