"""From the form of a Platform to a `KnownPlatform`, or to everything that is wrong with it."""

from __future__ import annotations

from verifier.documents.form_platform import PlatformForm
from verifier.documents.platform import KnownPlatform
from verifier.documents.problems import HEX32, Problems
from verifier.documents.text import InvalidDocument


def read_platform(form: PlatformForm, *, sha256: str, source: str) -> KnownPlatform:
    """The platform that a form describes.

    Args:
        form: the filled-in form.
        sha256: of the document's text, lower-case hex.
        source: the document's name in messages.

    Raises:
        InvalidDocument: with every problem that was found.
    """
    problems, spec = Problems(), form.spec
    problems.metadata(form.metadata)
    if not HEX32.fullmatch(spec.cek):
        problems.add("spec.cek", "must be a CEK's fingerprint: 64 lower-case hex digits")
    if spec.oca is not None and not HEX32.fullmatch(spec.oca):
        problems.add("spec.oca", "must be an OCA's fingerprint: 64 lower-case hex digits")
    pools = problems.names("spec.pools", spec.pools)
    callers = None if spec.callers == "any" else problems.callers("spec.callers", spec.callers)
    if callers is not None and not callers:
        problems.add("spec.callers", "names nobody: list orchestrators, or write any")
    if problems.found:
        raise InvalidDocument(*problems.found)
    return KnownPlatform(
        name=form.metadata.name,
        version=form.metadata.version,
        sha256=sha256,
        source=source,
        fingerprint=spec.cek,
        pools=pools,
        callers=callers,
        oca=spec.oca,
    )
