"""`sevattest owner …`: what the guest owner does with their verifier, over its listener for owners (docs/owner.md).

One module for a group of commands. Each command declares its words with `add_arguments` and runs in `run`; gRPC is
imported when a command calls, so that a mistyped line does not pay for it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from orchestrator.cli.owner import audit, documents, judgement, launches, secrets
from orchestrator.cli.owner.connection import add_connection

HELP = "ask and instruct your verifier: documents, secrets, launches, audit log"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `sevattest owner`."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="owner_command")

    def add(name: str, text: str, run: Callable[[argparse.Namespace], int], within: Any = commands) -> Any:
        sub = within.add_parser(name, help=text, description=text)
        sub.set_defaults(run_owner=run)
        add_connection(sub)
        return sub

    def group(name: str, text: str) -> Any:
        sub = commands.add_parser(name, help=text, description=text)
        return sub.add_subparsers(required=True, metavar="COMMAND", dest=f"{name}_command")

    documents.add_apply(add("apply", "add documents, or new versions of them", documents.run_apply))
    documents.add_get(add("get", "list documents of one kind, or print one", documents.run_get))
    documents.add_describe(add("describe", "say how a document stands", documents.run_describe))
    documents.add_delete(add("delete", "withdraw a document with all its versions", documents.run_delete))
    documents.add_diff(add("diff", "compare files with what is in force; 1 where they differ", documents.run_diff))

    secret = group("secret", "secrets that the verifier keeps: in, never out")
    secrets.add_put(add("put", "store a new version of a secret", secrets.run_put, secret))
    secrets.add_list(add("list", "list names and versions", secrets.run_list, secret))
    secrets.add_delete(add("delete", "erase a secret with all its versions", secrets.run_delete, secret))

    revocation = group("revocation", "what is no longer accepted")
    text = "list the launches that a revocation touches, or would have touched"
    judgement.add_impact(add("impact", text, judgement.run_impact, revocation))
    text = "judge a past or a supposed launch by changed documents; 1 where it is refused"
    judgement.add_simulate(add("simulate", text, judgement.run_simulate))

    seen = group("launches", "launches of all callers")
    launches.add_list(add("list", "list launches, newest first", launches.run_list, seen))
    launches.add_get(add("get", "show one launch, with all that was found", launches.run_get, seen))
    launches.add_watch(add("watch", "show launches as they come and go, until Ctrl-C", launches.run_watch, seen))

    log = group("audit", "the record of everything that the verifier did")
    audit.add_list(add("list", "print audit records, oldest first", audit.run_list, log))
    audit.add_verify(add("verify", "find any record that was changed, removed or moved", audit.run_verify, log))
    add("keys", "print the keys that verify receipts and the audit log, a JWK set", audit.run_keys)


def run(args: argparse.Namespace) -> int:
    """Run the command that was asked for."""
    code: int = args.run_owner(args)
    return code
