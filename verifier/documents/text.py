"""From a document's text to plain data: YAML's safe subset or JSON, without what makes either ambiguous.

Refused beyond what the safe loaders refuse: keys that come twice (the last would win silently), keys that are not text,
YAML aliases (a kilobyte of them unfolds to gigabytes), YAML tags (each is read by code that fails in ways of its own),
plain text that YAML 1.1 and YAML 1.2 read differently (`0100`, `1:00`, `yes`), characters that only some take for line
breaks (a comment would end there, and live keys follow), half characters (no file name or record can hold one), numbers
that JSON has not (`NaN`) and more than one document in a text. Dates are text. What is JSON and YAML by its looks means
the same as either, or is refused as one of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable
from typing import Any

import yaml

from common.errors import InvalidInput, Reason

TEXT_MAX = 256 * 1024  # a workload with 512 listed digests takes 40 KiB


class InvalidDocument(InvalidInput):
    """A document cannot be used; `problems` lists everything that is wrong with it, each with its place."""

    def __init__(self, *problems: str) -> None:
        super().__init__(Reason.INVALID_CONFIGURATION, "; ".join(problems))
        self.problems = problems


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader without aliases, tags, repeated keys and what readers differ on."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]  # PyYAML has no types here
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases are not used in documents", event.start_mark)
        if getattr(event, "tag", None) is not None:
            raise yaml.composer.ComposerError(None, None, "tags are not used in documents", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:  # noqa: FBT001, FBT002 -- PyYAML's signature
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                raise yaml.constructor.ConstructorError(None, None, "a key is not text", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} comes twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


# What plain text is beside text, the first that fits; alike in YAML 1.1, in the core schema of YAML 1.2 and, for what a
# document's keys take, in JSON. A date is text, as in YAML 1.2: `2026-01-01` is a version that somebody wrote.
_ALIKE = {
    "bool": r"true|True|TRUE|false|False|FALSE",
    "null": r"~|null|Null|NULL|",
    "int": r"[-+]?(0|[1-9][0-9]*)",
    "float": r"[-+]?[0-9]+\.[0-9]*([eE][-+][0-9]+)?|\.[0-9]+([eE][-+][0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}
# What YAML's versions, and their readers, differ on: `0100` is 64, 100 or text, `1:00` is 60 or text.
_DIFFERENT = r"""
    [-+]?0b[01_]+ | [-+]?0o[0-7]+ | [-+]?0x[0-9a-fA-F_]+
    | [-+]?[0-9][0-9_]*(:[0-5]?[0-9])*(\.[0-9_]*)?([eE][-+]?[0-9]+)?
    | [-+]?\.[0-9][0-9_]*([eE][-+]?[0-9]+)?
    | yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF
"""
# YAML 1.1, and PyYAML with it, breaks lines at all of these; YAML 1.2 at a CR alone; git, which reviewers see, never.
_BREAKS = re.compile("\r(?!\n)|[\x85\u2028\u2029]")
_DIFFERENT_TAG = "!different"
_SHOWN_MAX = 64  # characters


def _refuse_different(_loader: _Loader, node: yaml.ScalarNode) -> object:
    shown = node.value[:_SHOWN_MAX]
    message = f"{shown} means different things to readers of YAML: put text into quotes, write numbers in decimal"
    raise yaml.constructor.ConstructorError(None, None, message, node.start_mark)


_Loader.yaml_implicit_resolvers = {
    None: [
        *((f"tag:yaml.org,2002:{kind}", re.compile(rf"(?:{pattern})\Z")) for kind, pattern in _ALIKE.items()),
        (_DIFFERENT_TAG, re.compile(rf"(?:{_DIFFERENT})\Z", re.VERBOSE)),
    ]
}
_Loader.add_constructor(_DIFFERENT_TAG, _refuse_different)


def parse_text(text: bytes, *, is_json: bool) -> object:
    """The plain data that a document's text spells.

    Raises:
        InvalidDocument: the text is too long, is not UTF-8, not well-formed, or ambiguous.
    """
    if len(text) > TEXT_MAX:
        raise InvalidDocument(f"the text is longer than {TEXT_MAX} bytes")
    try:
        decoded = text.decode("utf-8")
        _require_plain_breaks(decoded)
        data = _parse_json(decoded) if is_json else _parse_yaml(decoded)
        _require_spellable(data)
    except UnicodeDecodeError:
        raise InvalidDocument("the text is not UTF-8") from None
    except RecursionError:
        raise InvalidDocument("the text is nested too deeply") from None
    else:
        return data


def _require_plain_breaks(text: str) -> None:
    """Refuse line breaks that a reviewer does not see."""
    if found := _BREAKS.search(text):
        line = text.count("\n", 0, found.start()) + 1
        raise InvalidDocument(
            f"line {line}: U+{ord(found[0]):04X} is a line break to some readers only: end lines with LF or CR LF, "
            "and escape it within quotes"
        )


def _require_spellable(data: object) -> None:
    """Refuse what could be written down nowhere again: neither as a file's name nor in a record."""
    try:
        json.dumps(data, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise InvalidDocument("the text escapes half a character (a lone surrogate)") from None


def _parse_yaml(text: str) -> object:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 -- a subclass of the safe loader
    except yaml.MarkedYAMLError as error:
        if error.problem == "but found another document":
            raise InvalidDocument("the text holds more than one document: each has a file of its own") from None
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}: " if mark is not None else ""
        raise InvalidDocument(f"{place}{error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise InvalidDocument(f"the text is not YAML: {' '.join(str(error).split())}") from None


def _parse_json(text: str) -> object:
    def distinct(pairs: list[tuple[str, object]]) -> dict[str, object]:
        members: dict[str, object] = {}
        for key, value in pairs:
            if key in members:
                raise InvalidDocument(f"{key} comes twice")
            members[key] = value
        return members

    def refuse(constant: str) -> object:
        raise InvalidDocument(f"the text is not JSON: {constant} is no number of it")

    try:
        return json.loads(text, object_pairs_hook=distinct, parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise InvalidDocument(f"line {error.lineno}: {error.msg[:1].lower()}{error.msg[1:]}") from None
    except ValueError as error:  # a number of thousands of digits
        raise InvalidDocument(f"the text is not JSON: {error}") from None


def spelled_as_json(text: bytes) -> bool:
    """Whether a text without a file name is read as JSON: where it begins with a brace; else it is YAML."""
    return text.lstrip(b" \t\r\n").startswith(b"{")
