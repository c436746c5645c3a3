"""The shape that all documents share, and how a text's plain data fills in a form.

A form says which keys exist, of which type; there is one module of forms for each kind (`form_workload`, …). Unknown
keys are refused with their path. What the values mean is the readers'.
"""

from __future__ import annotations

import re
from typing import TypeVar

import msgspec

from verifier.documents.text import InvalidDocument

API_VERSION = "sevattest/v1"


class MetadataForm(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """`metadata`."""

    name: str
    version: str


_Form = TypeVar("_Form", bound=msgspec.Struct)
_AT = re.compile(r"(?P<what>.*?)(?: - at `(?:\$|key in )(?P<path>[^`]*)`)?", re.DOTALL)


def fill_in(form: type[_Form], data: dict[str, object]) -> _Form:
    """The form that plain data fills in.

    Raises:
        InvalidDocument: a key is unknown, missing or of the wrong type.
    """
    try:
        return msgspec.convert(data, form, strict=True)
    except msgspec.ValidationError as error:
        raise InvalidDocument(sentence(str(error))) from None


def sentence(message: str) -> str:
    """Msgspec's message as `path: what is wrong`."""
    match = _AT.fullmatch(message)
    what, path = (match["what"], match["path"] or "") if match else (message, "")
    what = what[:1].lower() + what[1:]
    if "expected `str`, got `float`" in what or "expected `str`, got `int`" in what:
        what += ": put it into quotes"
    path = path.lstrip(".")
    return f"{path}: {what}" if path else what
