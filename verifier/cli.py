"""The `sev-verifier` command: serve, init, check-config, health, keygen, generated, documents, audit.

Errors go to stderr as `sev-verifier: sentence`, hints as `hint: sentence`. Exit codes are those of `sevattest`:
0 done, 1 refused, 2 usage or bad input, 3 something needed failed; and 5, the key token refuses the PIN.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

from common.command import Parser, add_version, clean, complain, run_command
from common.errors import InvalidInput, NotFound, Reason

_PROGRAM = "sev-verifier"
# Libraries of its own extra.
_EXTRAS = {"yaml": "verifier"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""

    def command() -> int:
        args = _parser().parse_args(argv)
        code: int = args.command(args)
        return code

    return run_command(_PROGRAM, command, extras=_EXTRAS)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog=_PROGRAM, description="the guest owner's side: verifies launches and releases secrets")
    add_version(parser)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, text: str, command: Callable[[argparse.Namespace], int], *, config: bool = True) -> Any:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        if config:
            sub.add_argument("--config", required=True, type=Path, metavar="FILE", help="the configuration, TOML")
        return sub

    add("serve", "serve until SIGTERM; SIGHUP reads documents and deny-list again", _serve)
    add("init", "make the store, once: serve makes none, so that it never takes an empty disk for a new one", _init)
    add("check-config", "list everything that is wrong with the configuration and the documents", _check)
    add("health", "ask the serving process whether it is ready", _health)
    keygen = add("keygen", "make a key file: 32 random bytes for its owner only", _keygen, config=False)
    keygen.add_argument("file", type=Path, metavar="FILE", help="where to; never overwritten")
    keygen.add_argument("--config", type=Path, metavar="FILE", help="wrap it with the token of this configuration")
    keygen.add_argument("--make-key", action="store_true", help="make the key in the token where there is none")
    generated = add("generated", "print the secrets that were made for one launch", _generated)
    generated.add_argument("--launch", required=True, metavar="ID", help="the launch")
    generated.add_argument("--guid", metavar="GUID", help="only this secret")
    generated.add_argument("--out", type=Path, metavar="FILE", help="write the one secret, as it is, into a new file")
    documents = add(
        "documents", "say whether the applied documents are as they were sealed, and which are not", _documents
    )
    documents.add_argument("--seal", metavar="DIGEST", help="seal the documents that were shown with this digest")
    audit = add("audit", "print audit records, oldest first", _audit)
    audit.add_argument("--launch", metavar="ID", help="only those of one launch")
    audit.add_argument("--id", metavar="AUDIT-ID", help="only the one that a refusal named")
    audit.add_argument("--json", action="store_true", help="one JSON object a line")
    return parser


def _serve(args: argparse.Namespace) -> int:
    import asyncio

    from common.hardening import harden_process
    from common.telemetry.log import configure
    from verifier.app import App, real_surroundings

    harden_process()

    async def serve() -> None:
        app = App(args.config, configure(_PROGRAM), real_surroundings())
        await app.run(_announce)

    asyncio.run(serve())
    return 0


def _announce(addresses: Any) -> None:
    if addresses.admin is not None:
        print(f"{_PROGRAM}: serving owners on {addresses.admin}", flush=True)
    print(f"{_PROGRAM}: serving on {addresses.launches}", flush=True)


def _init(args: argparse.Namespace) -> int:
    import asyncio

    from verifier.config import load_config
    from verifier.parts import init_store

    where = asyncio.run(init_store(load_config(args.config, os.environ)))
    print(f"{_PROGRAM}: made the store in {where}")
    return 0


def _check(args: argparse.Namespace) -> int:
    from verifier.check import check

    findings = check(args.config, os.environ)
    for warning in findings.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    for problem in findings.problems:
        print(f"{_PROGRAM}: {problem}", file=sys.stderr)
    if findings.problems:
        return 2
    print(f"{_PROGRAM}: configuration is good: workloads: {findings.workloads}, documents: {findings.documents}")
    return 0


def _health(args: argparse.Namespace) -> int:
    import asyncio

    from common.rpc.health import probe
    from verifier.config import load_config

    health = load_config(args.config, os.environ).health
    if health is None:
        raise InvalidInput(Reason.INVALID_CONFIGURATION, "health.socket is not set, so nobody can be asked")
    ready = asyncio.run(probe(health.socket))
    print(f"{_PROGRAM}: {'ready' if ready else 'not ready'}")
    return 0 if ready else 3


def _keygen(args: argparse.Namespace) -> int:
    from verifier.config import load_config
    from verifier.keys.file import write_key_file
    from verifier.keys.pkcs11 import write_wrapped_key_file
    from verifier.parts import token_settings

    if args.config is None:
        if args.make_key:
            raise InvalidInput(Reason.INVALID_ARGUMENT, "--make-key: makes a key in a token, which --config names")
        key_id = write_key_file(args.file)
    else:
        settings = token_settings(load_config(args.config, os.environ))
        key_id = write_wrapped_key_file(args.file, settings, make_key=args.make_key)
    print(f"{args.file}: key {key_id.hex()}; keep a copy where the database's backups are not")
    return 0


def _generated(args: argparse.Namespace) -> int:
    import asyncio

    from common.hardening import harden_process
    from verifier.config import load_config
    from verifier.parts import beside
    from verifier.secrets.generated_command import find_generated, hand_over

    harden_process()
    launch_id = _uuid("--launch", args.launch)
    guid = None if args.guid is None else _uuid("--guid", args.guid)

    async def find() -> Sequence[Any]:
        async with beside(load_config(args.config, os.environ)) as (store, keyring):
            return await find_generated(store, keyring, launch_id, guid)

    for line in hand_over(asyncio.run(find()), args.out):
        print(line)
    return 0


def _documents(args: argparse.Namespace) -> int:
    import asyncio

    from common.hardening import harden_process
    from common.telemetry.log import configure
    from verifier.admin.sealing import review, seal_reviewed
    from verifier.config import load_config
    from verifier.parts import applied_documents, documents_to_seal

    harden_process()
    config, log = load_config(args.config, os.environ), configure(_PROGRAM)

    async def look() -> Any:
        async with applied_documents(config) as (store, seal):
            return await review(store, seal)

    async def seal() -> None:
        async with documents_to_seal(config, log) as (store, seal):
            found = await review(store, seal)
            if found.problem is not None:
                await seal_reviewed(store, seal, found, args.seal, log)

    if args.seal is not None:
        asyncio.run(seal())
    found = asyncio.run(look())
    for line in found.lines:
        print(line)
    if found.log_problem is not None:
        complain(_PROGRAM, f"{found.log_problem}; what follows it was not asked about documents")
    if found.problem is None:
        print(f"{_PROGRAM}: sealed: revision {found.documents.revision}, {len(found.documents.rows)} documents")
        return 0
    complain(
        _PROGRAM,
        f"not sealed: {found.problem}",
        hint=f"once each of these documents is known to be the owner's: --seal {found.digest}",
    )
    return 1


def _audit(args: argparse.Namespace) -> int:
    import asyncio

    from verifier.config import load_config
    from verifier.parts import read_records

    launch_id = None if args.launch is None else _uuid("--launch", args.launch)
    audit_id = None if args.id is None else _uuid("--id", args.id)
    rows = asyncio.run(read_records(load_config(args.config, os.environ), launch_id))
    found = [row for row in rows if audit_id in (None, row.audit_id)]
    if audit_id is not None and not found:
        raise NotFound(Reason.NOT_FOUND, f"there is no record {audit_id}")
    for row in found:
        record = {
            "audit_id": str(row.audit_id),
            "time": row.time.isoformat(),
            "event": row.event,
            "launch_id": None if row.launch_id is None else str(row.launch_id),
            "caller": row.caller,
            "reason": row.reason,
        }
        record = {**record, **_body(row.body), **record}
        print(json.dumps(record) if args.json else _words(record))
    return 0


def _uuid(option: str, text: str) -> UUID:
    from common.ids import canonical_uuid

    value = canonical_uuid(text)
    if value is None:
        raise InvalidInput(Reason.INVALID_ARGUMENT, f"{option}: must be an id (a UUID)")
    return value


# What a record is about: of documents and secrets, of launches, and of all. As `sevattest owner audit list` has it.
_SUBJECT = ("time", "event", "kind", "name", "version", "launch_id", "reason", "caller")


def _body(text: str) -> dict[str, Any]:
    """The members of a record's body. Whoever wrote to the database may have written anything, and hides no other."""
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        body = None
    return body if isinstance(body, dict) else {"body": text}


def _words(record: dict[str, Any]) -> str:
    try:
        told = [f"{finding['rule']}: {finding['message']}" for finding in record.get("findings", ())]
        if record.get("explanation"):
            told.append(f"explanation: {record['explanation']['sentence']}")
    except (KeyError, TypeError):
        told = ["its body is none that a verifier writes"]
    first = "  ".join(str(record[name]) for name in _SUBJECT if record.get(name))
    lines = [first, *(f"  {each}" for each in (*told, f"audit id {record['audit_id']}"))]
    return "\n".join(clean(line) for line in lines)


if __name__ == "__main__":
    sys.exit(main())
