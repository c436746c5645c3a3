"""`sevattest owner apply|get|describe|delete|diff`: the owner's documents at the verifier."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from common.command import clean, complain
from common.errors import NotFound, Reason, SevattestError, WrongState
from common.versions import version_order
from orchestrator.cli.owner.connection import connected
from orchestrator.cli.owner.files import about, read_document
from orchestrator.cli.owner.text import as_json, as_yaml, table, when
from orchestrator.drivers.admin_values import Applied, Document, GrantStatus

if TYPE_CHECKING:
    from orchestrator.drivers.admin import VerifierAdmin

KINDS = ("workload", "grant", "platform", "revocation")


def kind(text: str) -> str:
    """A kind of document, however it is written: `Grant`, `grants`."""
    singular = text.lower().removesuffix("s")
    if singular not in KINDS:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(KINDS)}")
    return singular


def _add_files(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    parser.add_argument(
        "-f", "--file", dest="files", nargs="+", action="extend", metavar="FILE", required=required, default=None
    )


def add_apply(parser: argparse.ArgumentParser) -> None:
    """The command line of `apply`."""
    _add_files(parser)
    parser.add_argument("--dry-run", action="store_true", help="check the documents and change nothing")
    parser.add_argument(
        "--allow-older", action="store_true", help="also keep versions that are not in force, as a newer one is"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON array instead of lines")


def run_apply(args: argparse.Namespace) -> int:
    """Apply each file, once all of them were checked; 1 where one of them is not in force then."""
    texts = {name: read_document(name) for name in dict.fromkeys(args.files)}

    async def work(admin: VerifierAdmin) -> int:
        applied: list[Applied] = []
        try:
            # All before the first: a mistake in the last file leaves the others unapplied.
            if args.dry_run or len(texts) > 1:
                looked_at = {name: await _checked(admin, name, text) for name, text in texts.items()}
                checked = _one_after_another(looked_at)
            if args.dry_run:
                applied = checked
            else:
                for name, text in texts.items():
                    applied.append(await _applied(admin, name, text, as_lines=not args.json))
        finally:
            if args.json:
                print(as_json(applied))
        if args.dry_run and not args.json:
            for each in applied:
                _say_applied(each, dry_run=True)
        unforced = any(each.document.newer_version for each in applied)
        return 1 if unforced and not args.allow_older else 0

    return connected(args, work)


async def _checked(admin: VerifierAdmin, name: str, text: str) -> Applied:
    try:
        checked = await admin.check(text)
    except SevattestError as error:
        raise about(name, error) from error
    if checked.conflict is not None:
        raise about(name, WrongState(Reason.DOCUMENT_CONFLICT, checked.conflict))
    return checked


def _one_after_another(checked: Mapping[str, Applied]) -> list[Applied]:
    """What files become that were looked at alone, each after those before it.

    Raises:
        WrongState: two of them are one version in two texts (DOCUMENT_CONFLICT).
    """
    earlier: dict[str, Document] = {}
    applied = []
    for name, each in checked.items():
        document = each.document
        for other, before in earlier.items():
            if (before.kind, before.name) != (document.kind, document.name):
                continue
            if version_order(before.version) == version_order(document.version) and before.sha256 != document.sha256:
                what = f"{document.kind} {document.name} {before.version} is in {other} with another text"
                raise about(name, WrongState(Reason.DOCUMENT_CONFLICT, what))
            if version_order(before.version) > version_order(document.newer_version or document.version):
                warnings = (f"metadata.version: {before.version} is newer and stays in force",)
                document = replace(document, newer_version=before.version, warnings=warnings)
        earlier[name] = document
        applied.append(replace(each, document=document))
    return applied


async def _applied(admin: VerifierAdmin, name: str, text: str, *, as_lines: bool) -> Applied:
    try:
        applied = await admin.apply(text)
    except SevattestError as error:
        raise about(name, error) from error
    if as_lines:
        _say_applied(applied, dry_run=False)
    return applied


def _say_applied(applied: Applied, *, dry_run: bool) -> None:
    document = applied.document
    if applied.changed:
        what = f"{'would be ' if dry_run else ''}{'kept' if document.newer_version else 'applied'}"
    else:
        what = "would stay as it is" if dry_run else "unchanged"
    print(f"{document.kind} {document.name} {document.version}: {what}{_not_in_force(document)}", flush=True)
    for warning in document.warnings:
        print(f"warning: {clean(warning)}", file=sys.stderr)


def _not_in_force(document: Document) -> str:
    return f", NOT in force: {document.newer_version} is" if document.newer_version else ""


def add_get(parser: argparse.ArgumentParser) -> None:
    """The command line of `get`."""
    parser.add_argument("kind", type=kind, metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("name", nargs="?", metavar="NAME", help="of one document, to print it")
    parser.add_argument("--version", metavar="VERSION", help="of that document; the one in force unless given")
    parser.add_argument("--all-versions", action="store_true", help="list older versions, too")
    parser.add_argument("-o", "--output", choices=("yaml", "json"), help="how documents are printed")
    parser.add_argument("--json", action="store_const", const="json", dest="output", help="the same as -o json")


def run_get(args: argparse.Namespace) -> int:
    """Print one document, or list those of a kind."""

    async def work(admin: VerifierAdmin) -> int:
        if args.name is not None:
            found: Sequence[Document] = [await admin.document(args.kind, args.name, args.version or "")]
        else:
            found = await admin.documents(args.kind)
            if not args.all_versions:
                found = _in_force(found)
        if args.name is None and args.output is None:
            _print_lines(_listing(found))
        elif args.output == "json":
            shown = [_as_object(each) for each in found]
            print(as_json(shown[0] if args.name is not None else shown))
        else:
            print("\n---\n".join(as_yaml(each.json) for each in found if each.json))
        return 0

    return connected(args, work)


def _as_object(document: Document) -> object:
    """The document itself: what was applied, its defaults written out."""
    return json.loads(document.json) if document.json else None


def _in_force(documents: Sequence[Document]) -> Sequence[Document]:
    newest: dict[str, Document] = {}
    for each in documents:
        newest.setdefault(each.name, each)
    return list(newest.values())


def _listing(documents: Sequence[Document]) -> list[str]:
    rows = [[each.name, each.version, _origin(each), when(each.apply_time), each.sha256[:16]] for each in documents]
    return table(["NAME", "VERSION", "FROM", "APPLIED", "SHA256"], rows)


def _origin(document: Document) -> str:
    return document.file or "applied"


def add_describe(parser: argparse.ArgumentParser) -> None:
    """The command line of `describe`."""
    parser.add_argument("kind", type=kind, metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("name", metavar="NAME", help="of the document")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def run_describe(args: argparse.Namespace) -> int:
    """Say how a document stands: its versions, and for grants what is spent, for workloads which grants there are."""

    async def work(admin: VerifierAdmin) -> int:
        versions = [each for each in await admin.documents(args.kind) if each.name == args.name]
        status = await admin.grant_status(args.name) if args.kind == "grant" else None
        if not versions and status is None:
            raise NotFound(Reason.NOT_FOUND, f"there is no {args.kind.capitalize()} {args.name}")
        grants = await _grants_of(admin, args.name) if args.kind == "workload" else []
        if args.json:
            print(as_json({"versions": versions, "status": status, "grants": [each.name for each in grants]}))
        else:
            _print_lines(_description(args.kind, args.name, versions, status, grants))
        return 0

    return connected(args, work)


async def _grants_of(admin: VerifierAdmin, workload: str) -> Sequence[Document]:
    found = [each for each in _in_force(await admin.documents("grant")) if each.json]
    return [each for each in found if json.loads(each.json)["spec"].get("workload") == workload]


def _description(
    kind: str, name: str, versions: Sequence[Document], status: GrantStatus | None, grants: Sequence[Document]
) -> Iterator[str]:
    yield f"{kind} {name}"
    if status is not None:
        yield f"  {_state(name, status)}"
        yield f"  {_spent(status)}"
    yield from (f"  {line}" for line in _listing(versions) if versions)
    if kind == "workload":
        yield f"  grants: {', '.join(each.name for each in grants) or 'none'}"
    for warning in versions[0].warnings if versions else ():
        yield f"  warning: {clean(warning)}"
    if versions and versions[0].json:
        yield ""
        yield as_yaml(versions[0].json)


def _state(name: str, status: GrantStatus) -> str:
    if status.document is None:
        return f"deleted: no version of Grant {name} is on file, so nothing is begun under it; its ledger stays"
    return "can be spent" if status.reason is None else f"cannot be spent now: {status.reason}"


def _spent(status: GrantStatus) -> str:
    """What is spent, of what there is."""
    spec = json.loads(status.document.json)["spec"] if status.document is not None and status.document.json else {}
    counts = {"released": ("launches", status.released), "open": ("at_once", status.open)}
    counts["refused"] = ("refusals", status.refused)
    of = {word: f" of {spec[key]}" if spec.get(key) is not None else "" for word, (key, _) in counts.items()}
    return ", ".join(f"{word} {count}{of[word]}" for word, (_, count) in counts.items())


def add_delete(parser: argparse.ArgumentParser) -> None:
    """The command line of `delete`."""
    parser.add_argument("kind", type=kind, metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("name", metavar="NAME", help="of the document")


def run_delete(args: argparse.Namespace) -> int:
    """Withdraw a document."""

    async def work(admin: VerifierAdmin) -> int:
        await admin.delete(args.kind, args.name)
        print(f"{args.kind} {args.name}: deleted")
        return 0

    return connected(args, work)


def add_diff(parser: argparse.ArgumentParser) -> None:
    """The command line of `diff`."""
    _add_files(parser)


def run_diff(args: argparse.Namespace) -> int:
    """Print what applying would change, as a unified diff; 1 where anything differs."""
    texts = {name: read_document(name) for name in dict.fromkeys(args.files)}

    async def work(admin: VerifierAdmin) -> int:
        differs = False
        for name, text in texts.items():
            try:
                given = await admin.check(text)
                lines = list(await _difference(admin, name, given.document))
            except SevattestError as error:
                raise about(name, error) from error
            differs = differs or bool(lines)
            _print_lines(lines)
            if lines and given.conflict is not None:
                complain("sevattest", clean(given.conflict))
            elif lines and given.document.newer_version:
                complain("sevattest", f"{name}: would be kept{_not_in_force(given.document)}")
        return 1 if differs else 0

    return connected(args, work)


async def _difference(admin: VerifierAdmin, name: str, given: Document) -> Iterator[str]:
    """Lines between the version in force and a file, both with their defaults written out."""
    try:
        known = await admin.document(given.kind, given.name)
    except NotFound:
        known = None
    old = [] if known is None or not known.json else as_yaml(known.json).splitlines()
    label = f"{given.kind} {given.name} {'(none)' if known is None else known.version}"
    return difflib.unified_diff(old, as_yaml(given.json).splitlines(), label, name, lineterm="")


def _print_lines(lines: Iterator[str] | Sequence[str]) -> None:
    for line in lines:
        print(line)
