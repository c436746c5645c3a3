"""From the form of a Grant to a `Grant`, or to everything that is wrong with it."""

from __future__ import annotations

import re
from datetime import UTC, datetime

from verifier.documents.form_grant import GrantForm, GrantPlatformsForm
from verifier.documents.grant import Grant
from verifier.documents.problems import Problems
from verifier.documents.rate import SPELLING, Rate, read_rate
from verifier.documents.text import InvalidDocument

LAUNCHES_MAX = 1_000_000_000
AT_ONCE_MAX = 10_000

# RFC 3339, with the digits that a clock of microseconds has.
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?(Z|[+-]\d\d:\d\d)", re.ASCII)


def read_grant(form: GrantForm, *, sha256: str, source: str) -> Grant:
    """The grant that a form describes.

    Args:
        form: the filled-in form.
        sha256: of the document's text, lower-case hex.
        source: the document's name in messages.

    Raises:
        InvalidDocument: with every problem that was found.
    """
    problems, spec = Problems(), form.spec
    problems.metadata(form.metadata)
    problems.name("spec.workload", spec.workload)
    versions = None if spec.versions == "any" else problems.versions("spec.versions", spec.versions)
    if not spec.callers:
        problems.add("spec.callers", "names nobody: list the orchestrators that may spend this grant")
    callers = problems.callers("spec.callers", spec.callers)
    platforms, pools = _platforms(spec.platforms, problems)
    _number("spec.launches", spec.launches, LAUNCHES_MAX, problems)
    _number("spec.at_once", spec.at_once, AT_ONCE_MAX, problems)
    if spec.refusals is not None:
        _number("spec.refusals", spec.refusals, LAUNCHES_MAX, problems)
    rate = None if spec.rate is None else _rate(spec.rate, problems)
    not_before = _time("spec.not_before", spec.not_before, problems)
    not_after = _time("spec.not_after", spec.not_after, problems)
    if not_before is not None and not_after is not None and not_before >= not_after:
        problems.add("spec.not_after", "is not later than not_before: nothing could begin in between")
    if problems.found:
        raise InvalidDocument(*problems.found)
    return Grant(
        name=form.metadata.name,
        version=form.metadata.version,
        sha256=sha256,
        source=source,
        workload=spec.workload,
        workload_versions=versions,
        callers=callers,
        platforms=platforms,
        pools=pools,
        launches=spec.launches,
        at_once=spec.at_once,
        refusals=spec.launches if spec.refusals is None else spec.refusals,
        rate=rate,
        not_before=not_before,
        not_after=not_after,
        suspended=spec.suspended,
    )


def _platforms(
    form: str | GrantPlatformsForm, problems: Problems
) -> tuple[frozenset[str] | None, frozenset[str] | None]:
    if isinstance(form, str):
        return None, None
    path = "spec.platforms"
    if not form.names and not form.pools:
        problems.add(path, "names nothing: list names or pools of Platform documents, or write any")
    return (
        problems.names(f"{path}.names", form.names),
        problems.names(f"{path}.pools", form.pools),
    )


def _number(path: str, number: int, most: int, problems: Problems) -> None:
    if not 1 <= number <= most:
        problems.add(path, f"must be 1 to {most}")


def _rate(text: str, problems: Problems) -> Rate | None:
    rate = read_rate(text)
    if rate is None:
        problems.add("spec.rate", f"must be launches/period, {SPELLING}")
    return rate


def _time(path: str, text: str | None, problems: Problems) -> datetime | None:
    if text is None:
        return None
    if _TIME.fullmatch(text):
        try:
            return datetime.fromisoformat(text).astimezone(UTC)
        except (ValueError, OverflowError):
            pass  # a day that no month has, or a zone that leads out of the calendar
    problems.add(path, 'must be a time with its zone (RFC 3339), as in "2026-01-31T18:00:00Z"')
    return None
