"""The shape that all documents share, and how a text's plain data fills in a form.

A form says which keys exist, of which type; there is one module of forms for each kind (`form_workload`, …). Unknown
keys are refused with their path. What the values mean is the readers'.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import msgspec

from verifier.documents.text import InvalidDocument

API_VERSION = "sevattest/v1"


class MetadataForm(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """`metadata`."""

    name: str
    version: str


_PROBLEMS_MAX = 500  # as many as an answer carries (common.rpc.status)
_Form = TypeVar("_Form", bound=msgspec.Struct)
_AT = re.compile(r"(?P<what>.*?)(?: - at `(?:\$|key in )(?P<path>[^`]*)`)?", re.DOTALL)


def fill_in(form: type[_Form], data: dict[str, object]) -> _Form:
    """The form that plain data fills in.

    Raises:
        InvalidDocument: keys are unknown, missing or of the wrong type; all of them are listed.
    """
    try:
        return msgspec.convert(data, form, strict=True)
    except msgspec.ValidationError as error:
        found = tuple(islice(_problems(form, data, ""), _PROBLEMS_MAX))
        raise InvalidDocument(*(found or (_sentence(str(error)),))) from None


def _problems(kind: Any, value: object, path: str) -> Iterator[str]:
    """Each problem of a value, where msgspec names only the first: of each member, where its type has members."""
    for each in get_args(kind) if get_origin(kind) in {Union, UnionType} else (kind,):
        if isinstance(value, dict) and isinstance(each, type(msgspec.Struct)):
            yield from _problems_of_members(each, value, path)
            return
        if isinstance(value, dict) and get_origin(each) is dict:
            for key, member in value.items():
                yield from _problems(get_args(each)[1], member, f"{path}.{key}")
            return
        if isinstance(value, list) and get_origin(each) is list:
            for index, item in enumerate(value):
                yield from _problems(get_args(each)[0], item, f"{path}[{index}]")
            return
    try:
        msgspec.convert(value, kind, strict=True)
    except msgspec.ValidationError as error:
        yield _sentence(str(error), path)


def _problems_of_members(form: type[msgspec.Struct], data: dict[str, object], path: str) -> Iterator[str]:
    fields = {field.encode_name: field for field in msgspec.structs.fields(form)}
    for key, member in data.items():
        if key in fields:
            yield from _problems(fields[key].type, member, f"{path}.{key}")
        else:
            yield _at(path, f"object contains unknown field `{key}`")
    for key, field in fields.items():
        if field.required and key not in data:
            yield _at(path, f"object missing required field `{key}`")


def _sentence(message: str, within: str = "") -> str:
    """Msgspec's message on what is at `within` as `path: what is wrong`."""
    match = _AT.fullmatch(message)
    what, path = (match["what"], match["path"] or "") if match else (message, "")
    what = what[:1].lower() + what[1:]
    if "expected `str`, got `float`" in what or "expected `str`, got `int`" in what:
        what += ": put it into quotes"
    return _at(within + path, what)


def _at(path: str, what: str) -> str:
    path = path.lstrip(".")
    return f"{path}: {what}" if path else what
