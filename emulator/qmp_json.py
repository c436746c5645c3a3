"""JSON as QEMU's monitor reads and writes it: a stream of values, tolerant where QEMU is, with QEMU's error texts.

Source of the behaviour: QEMU's qobject/json-lexer.c, json-streamer.c, json-parser.c and recorded transcripts. A value
ends where its brackets do, not at a newline; several may come in one write; single quotes are accepted; a byte that
cannot be is one error, and reading goes on at the next structural character. So replies can outnumber requests.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from enum import Enum, auto
from typing import NamedTuple

MAX_NESTING = 1024
MAX_TOKENS_SIZE = 64 << 20  # bytes of one value
MAX_TOKENS = 2 << 20
_INTEGERS = range(-(1 << 63), 1 << 64)  # what QEMU keeps as an integer; all others become floating point
_INTEGER_DIGITS = 20  # of the longest of them
# So long a number is past its leading zero: more digits cannot make it wrong.
_LONG_RUN = 32

# Possessive: a peer's long token must cost neither backtracking nor memory.
_SPACE = re.compile(rb"[ \t\r\n]++")
# What may stand in a string; what follows it decides.
_IN_DOUBLE = re.compile(rb'(?:[^\x00-\x1f"\\\xfe\xff]++|\\[\x20-\xfd])*+')
_IN_SINGLE = re.compile(rb"(?:[^\x00-\x1f'\\\xfe\xff]++|\\[\x20-\xfd])*+")
_KEYWORD = re.compile(rb"[a-z]++")
_DIGITS = re.compile(rb"[0-9]*+")
_LETTERS = re.compile(rb"[a-z]*+")
_NUMBER = re.compile(rb"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_NUMBER_START = re.compile(rb"-?(?:0|[1-9][0-9]*)?(?:(?<=[0-9])\.[0-9]*)?(?:(?<=[0-9])[eE][+-]?[0-9]*)?")
_RESUME = re.compile(rb"[\x00-\x08\x0a-\x1f\[\]{}:,\xfe\xff]")
_ESCAPE = re.compile(
    r"\\(?:u([dD][89abAB][0-9A-Fa-f]{2})\\u([dD][c-fC-F][0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|(.))", re.DOTALL
)
_NO_CHARACTER = re.compile(
    "[\ud800-\udfff\ufdd0-\ufdef"
    + "".join(chr(plane << 16 | low) for plane in range(17) for low in (0xFFFE, 0xFFFF))
    + "]"
)
_ESCAPES = {'"': '"', "'": "'", "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_KEYWORDS = {b"true": True, b"false": False, b"null": None}


class QmpSyntaxError(Exception):
    """What the monitor answers to bytes that are no JSON; the text is QEMU's."""


class Stray(NamedTuple):
    """A syntax error found in the stream: one error reply."""

    text: str


class Value(NamedTuple):
    """A complete value found in the stream."""

    value: object


class _Kind(Enum):
    PUNCTUATION = auto()
    STRING = auto()
    NUMBER = auto()
    KEYWORD = auto()
    ERROR = auto()


class _Token(NamedTuple):
    kind: _Kind
    text: bytes


class JsonStream:
    """Bytes in, values and errors out.

    Attributes:
        consumed: how many bytes of the stream end with what was found last.
    """

    def __init__(self) -> None:
        self.consumed = 0
        self._buffer = bytearray()
        self._dropped = 0  # bytes of the stream that are no more in the buffer
        self._reached = 0  # how much of an unfinished token was looked at: nothing is looked at twice
        self._recovering = False
        self._tokens: list[_Token] = []
        self._size = 0
        self._braces = 0
        self._brackets = 0

    def feed(self, data: bytes) -> Iterator[Value | Stray]:
        """Everything that is complete with `data`, in order."""
        self._buffer += data
        at = 0
        while True:
            token, at = self._lex(at)
            if token is None:
                break
            found = self._take(token)
            if found is not None:
                self.consumed = self._dropped + at
                yield found
        del self._buffer[:at]
        self._dropped += at

    def _lex(self, at: int) -> tuple[_Token | None, int]:
        """The token at `at` and where it ends; None when more bytes must come first."""
        buffer = self._buffer
        if self._recovering:
            resume = _RESUME.search(buffer, at)
            if resume is None:
                return None, len(buffer)
            self._recovering = False
            at = resume.start()
        space = _SPACE.match(buffer, at)
        at = space.end() if space else at
        if at == len(buffer):
            return None, at
        first = bytes(buffer[at : at + 1])
        if first in b"{}[]:,":
            return _Token(_Kind.PUNCTUATION, first), at + 1
        if first in b"\"'":
            return self._lex_string(at, _IN_DOUBLE if first == b'"' else _IN_SINGLE)
        if first in b"-0123456789":
            return self._lex_run(at, _Kind.NUMBER, _NUMBER, _NUMBER_START, _DIGITS)
        if first.islower():
            return self._lex_run(at, _Kind.KEYWORD, _KEYWORD, _KEYWORD, _LETTERS)
        return self._error(at, at + 1)

    def _lex_string(self, at: int, inside: re.Pattern[bytes]) -> tuple[_Token | None, int]:
        buffer = self._buffer
        reach = _end(inside.match(buffer, at + max(self._reached, 1)), at)
        # A backslash here has nothing behind it yet, or something that cannot be escaped.
        escape = buffer[reach : reach + 1] == b"\\"
        if reach + escape == len(buffer):
            return self._unfinished(at, reach, _Kind.STRING)
        self._reached = 0
        if buffer[reach] == buffer[at]:
            return _Token(_Kind.STRING, bytes(buffer[at : reach + 1])), reach + 1
        return self._error(at, reach + escape + 1)

    def _lex_run(
        self, at: int, kind: _Kind, whole: re.Pattern[bytes], start: re.Pattern[bytes], more: re.Pattern[bytes]
    ) -> tuple[_Token | None, int]:
        buffer = self._buffer
        if self._reached > _LONG_RUN:
            reach = _end(more.match(buffer, at + self._reached), at)
            if reach == len(buffer):
                return self._unfinished(at, reach, kind)
        found, reach = whole.match(buffer, at), _end(start.match(buffer, at), at)
        if reach == len(buffer):
            return self._unfinished(at, reach, kind)  # it may go on
        self._reached = 0
        if found and found.end() == reach and not buffer[reach : reach + 1].isdigit():
            return _Token(kind, bytes(found[0])), reach
        return self._error(at, reach + 1)

    def _unfinished(self, at: int, reach: int, kind: _Kind) -> tuple[_Token | None, int]:
        if reach - at <= MAX_TOKENS_SIZE:
            self._reached = reach - at
            return None, at
        self._reached = 0
        return _Token(kind, bytes(self._buffer[at:])), len(self._buffer)  # too large to be taken

    def _error(self, start: int, end: int) -> tuple[_Token, int]:
        self._recovering = True
        return _Token(_Kind.ERROR, bytes(self._buffer[start:end])), end

    def _take(self, token: _Token) -> Value | Stray | None:
        if token.kind is _Kind.ERROR:
            # The message is a C string: it ends at a NUL.
            text = token.text.split(b"\0", 1)[0].decode("utf-8", "replace")
            return self._emit(Stray(f"JSON parse error, stray '{text}'"))
        self._braces += (token.text == b"{") - (token.text == b"}")
        self._brackets += (token.text == b"[") - (token.text == b"]")
        self._size += len(token.text) + 1
        if self._size > MAX_TOKENS_SIZE:
            return self._emit(Stray("JSON token size limit exceeded"))
        if len(self._tokens) >= MAX_TOKENS:
            return self._emit(Stray("JSON token count limit exceeded"))
        if self._braces + self._brackets > MAX_NESTING:
            return self._emit(Stray("JSON nesting depth limit exceeded"))
        self._tokens.append(token)
        if min(self._braces, self._brackets) >= 0 and max(self._braces, self._brackets) > 0:
            return None
        try:
            return self._emit(Value(_Parser(self._tokens).run()))
        except QmpSyntaxError as error:
            return self._emit(Stray(f"JSON parse error, {error}"))

    def _emit(self, found: Value | Stray) -> Value | Stray:
        self._tokens, self._size, self._braces, self._brackets = [], 0, 0, 0
        return found


class _Parser:
    """Tokens of one value, with a stack of its own: nesting goes deeper than Python's recursion."""

    def __init__(self, tokens: list[_Token]) -> None:
        self._tokens = iter(tokens)
        self._next = next(self._tokens, None)

    def run(self) -> object:
        open_: list[list[object] | dict[str, object]] = []
        keys: list[str] = []
        while True:
            token = self._pop()
            value: object
            if token.text == b"{":
                if not self._closes(b"}"):
                    open_.append({})
                    keys.append(self._key())
                    continue
                value = {}
            elif token.text == b"[":
                if not self._closes(b"]"):
                    open_.append([])
                    keys.append("")
                    continue
                value = []
            else:
                value = _scalar(token)
            while open_:
                value, done = self._attach(open_, keys, value)
                if not done:
                    break
            else:
                return value

    def _attach(
        self, open_: list[list[object] | dict[str, object]], keys: list[str], value: object
    ) -> tuple[object, bool]:
        """Put a finished value into the innermost container; true when that container is finished with it."""
        top = open_[-1]
        if isinstance(top, list):
            top.append(value)
        elif keys[-1] in top:
            raise QmpSyntaxError("duplicate key")
        else:
            top[keys[-1]] = value
        separator = self._pop()
        if separator.text == (b"]" if isinstance(top, list) else b"}"):
            keys.pop()
            return open_.pop(), True
        if separator.text != b"," or separator.kind is not _Kind.PUNCTUATION:
            raise QmpSyntaxError(f"expected separator in {'list' if isinstance(top, list) else 'dict'}")
        if isinstance(top, dict):
            keys[-1] = self._key()
        return None, False

    def _key(self) -> str:
        token = self._pop()
        key = None if token.text in {b"{", b"["} else _scalar(token)
        if not isinstance(key, str):
            raise QmpSyntaxError("key is not a string in object")
        if self._pop().text != b":":
            raise QmpSyntaxError("missing : in object pair")
        return key

    def _closes(self, text: bytes) -> bool:
        if self._next is None or self._next.text != text:
            return False
        self._pop()
        return True

    def _pop(self) -> _Token:
        token, self._next = self._next, next(self._tokens, None)
        if token is None:
            raise QmpSyntaxError("premature EOI")
        return token


def _scalar(token: _Token) -> object:
    if token.kind is _Kind.STRING:
        return _string(token.text[1:-1])
    if token.kind is _Kind.NUMBER:
        return _number(token.text)
    if token.kind is _Kind.KEYWORD:
        if token.text not in _KEYWORDS:
            raise QmpSyntaxError(f"invalid keyword '{token.text.decode('ascii')}'")
        return _KEYWORDS[token.text]
    raise QmpSyntaxError("expecting value")


def _number(text: bytes) -> int | float:
    digits = text.removeprefix(b"-")
    if digits.isdigit() and len(digits) <= _INTEGER_DIGITS and int(text) in _INTEGERS:
        return int(text)
    return float(text)


def _string(raw: bytes) -> str:
    try:
        # A NUL is two bytes here, as in Java: QEMU's strings are C's.
        text = raw.replace(b"\xc0\x80", b"\0").decode("utf-8")
    except UnicodeDecodeError:
        raise QmpSyntaxError("invalid UTF-8 sequence in string") from None
    if _NO_CHARACTER.search(text):
        raise QmpSyntaxError("invalid UTF-8 sequence in string")
    return _ESCAPE.sub(_unescape, text)


def _unescape(found: re.Match[str]) -> str:
    high, low, code, simple = found.groups()
    if simple is not None:
        if simple not in _ESCAPES:
            raise QmpSyntaxError(f"invalid escape sequence '{found[0]}'")
        return _ESCAPES[simple]
    number = int(code, 16) if code else 0x10000 + ((int(high, 16) & 0x3FF) << 10 | int(low, 16) & 0x3FF)
    if _NO_CHARACTER.match(chr(number)):
        raise QmpSyntaxError(f"{found[0]} is not a valid Unicode character")
    return chr(number)


def dump(message: object, *, pretty: bool = False) -> bytes:
    r"""One reply or event as QEMU writes it: ASCII, upper-case escapes, `\r\n` at its end; pretty: on many lines."""
    text = re.sub(r"\\(u[0-9a-f]{4}|.)", _upper, "".join(_pieces(message, pretty=pretty)))
    return text.replace("\x7f", "\\u007F").encode("ascii") + b"\r\n"


class _Text(str):
    """Output already, in a list of values."""

    __slots__ = ()


def _pieces(message: object, *, pretty: bool) -> Iterator[str]:
    """`json.dumps` with a stack of its own: an id that a peer nested 1000 deep is written as well."""
    waiting: list[tuple[object, int]] = [(message, 0)]
    while waiting:
        value, depth = waiting.pop()
        if isinstance(value, _Text):
            yield value
        elif isinstance(value, dict | list):
            named = isinstance(value, dict)
            inside: list[tuple[object, int]] = []
            for number, key in enumerate(value):
                gap = _line(depth + 1) if pretty else " " * bool(number)
                name = f"{json.dumps(key)}: " if named else ""
                inside += [(_Text("," * bool(number) + gap + name), 0), (value[key] if named else key, depth + 1)]
            end = _line(depth) if pretty else ""
            waiting += [(_Text(end + "]}"[named]), 0), *reversed(inside), (_Text("[{"[named]), 0)]
        else:
            # As C's printf has it, with an infinity that is no JSON.
            yield f"{value:.17g}" if isinstance(value, float) else json.dumps(value)


def _line(depth: int) -> str:
    return "\r\n" + 4 * depth * " "


def _upper(found: re.Match[str]) -> str:
    code = found[1]
    return "\\u" + code[1:].upper() if len(code) == 5 else found[0]


def _end(found: re.Match[bytes] | None, otherwise: int) -> int:
    return found.end() if found else otherwise
