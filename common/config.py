"""Configuration of the services: a TOML file, typed by msgspec structs, overridden by `SEVATTEST_*` variables.

Unknown keys are refused with their whole path, so is an unknown variable. `SEVATTEST_TLS__CERT=…` replaces `tls.cert`
(two underscores where the file has a dot; a table's own names in upper case, what is no letter or digit an underscore).
A path is taken from the file's folder, whoever names it. Secrets never stand here, only the files that hold them.
"""

from __future__ import annotations

import re
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from common.errors import InvalidInput, Reason

_T = TypeVar("_T", bound=msgspec.Struct)

PREFIX = "SEVATTEST_"
# Variables that mean something to other parts of the project and are no settings of a service.
NOT_SETTINGS = frozenset(
    {
        "SEVATTEST_DEVICE",
        "SEVATTEST_OWNER_ADMIN",
        "SEVATTEST_OWNER_CA",
        "SEVATTEST_OWNER_CERT",
        "SEVATTEST_OWNER_KEY",
        "SEVATTEST_QEMU_NEWER",
        "SEVATTEST_SEVCTL",
        "SEVATTEST_VECTORS",
    }
)

# Far above any configuration that a person writes.
_MAX_FILE = 1 << 20


def load(path: Path, type_: type[_T], environ: Mapping[str, str]) -> _T:
    """Read the configuration at `path` as a `type_`.

    Args:
        path: a TOML file.
        type_: a msgspec struct; fields of type `Path` are resolved against the file's folder.
        environ: where the overriding variables are; `os.environ` in a service.

    Raises:
        InvalidInput: `INVALID_CONFIGURATION`; the message names the file or variable, and the key's whole path.
    """
    data = _read(path)
    reader = _Reader(source=str(path), folder=path.absolute().parent)
    for name in sorted(environ):
        if name.startswith(PREFIX) and name not in NOT_SETTINGS:
            _override(data, type_, name, environ[name])
    struct: _T = reader.struct(type_, data, ())
    return struct


def listen_address(text: str) -> tuple[str, int]:
    """Split `HOST:PORT` (`[HOST]:PORT` for IPv6); port 0 means any.

    Raises:
        InvalidInput: `INVALID_CONFIGURATION`; it is not of that form.
    """
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    bare = host[1:-1] if bracketed else host
    if (
        not colon
        or not re.fullmatch(r"[0-9A-Fa-f:.]+" if bracketed else r"[A-Za-z0-9.-]+", bare)
        or not re.fullmatch(r"[0-9]{1,5}", port)
        or int(port) > 65535
    ):
        raise InvalidInput(Reason.INVALID_CONFIGURATION, f"{text!r} is not an address to listen on (HOST:PORT)")
    return bare, int(port)


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_FILE + 1)
    except OSError as error:
        raise _bad(f"{path}: {(error.strerror or 'cannot be read').lower()}") from error
    if len(raw) > _MAX_FILE:
        raise _bad(f"{path}: is too large for a configuration")
    try:
        return tomllib.loads(raw.decode())
    except UnicodeDecodeError as error:
        raise _bad(f"{path}: is not UTF-8 text") from error
    except ValueError as error:  # TOMLDecodeError, or Python's own about a number of thousands of digits
        raise _bad(f"{path}: is not TOML: {_sentence(str(error))}") from error
    except RecursionError as error:
        raise _bad(f"{path}: is nested too deeply") from error


class _Reader:
    """Turns parsed TOML into structs, knowing at each step where in the file it stands."""

    def __init__(self, *, source: str, folder: Path) -> None:
        self._source = source
        self._folder = folder

    def struct(self, type_: type[_T], data: object, at: tuple[str, ...]) -> _T:
        if not isinstance(data, dict):
            raise self._wrong(at, "expected a table")
        fields = {field.encode_name: field for field in msgspec.structs.fields(type_)}
        for key in data:
            if key not in fields:
                raise _bad(f'{self._source}: unknown key "{_dotted((*at, key))}"')
        for key, field in fields.items():
            if field.required and key not in data:
                raise _bad(f'{self._source}: missing key "{_dotted((*at, key))}"')
        values = {fields[key].name: self.value(fields[key].type, value, (*at, key)) for key, value in data.items()}
        try:
            return type_(**values)
        except InvalidInput as error:
            raise self._wrong(at, error.message) from error
        except (TypeError, ValueError) as error:
            raise self._wrong(at, _sentence(str(error))) from error

    def value(self, type_: Any, data: object, at: tuple[str, ...]) -> Any:
        inner = _struct_in(type_)
        if inner is not None:
            return self.struct(inner, data, at)
        origin, arguments = typing.get_origin(type_), typing.get_args(type_)
        if (values := _table_of(type_)) is not None:
            if not isinstance(data, dict):
                raise self._wrong(at, "expected a table")
            return {key: self.value(values, item, (*at, key)) for key, item in data.items()}
        if origin in {list, tuple} and arguments and _struct_in(arguments[0]) is not None:
            if not isinstance(data, list):
                raise self._wrong(at, "expected a list of tables")
            return origin(self.value(arguments[0], item, (*at, str(i))) for i, item in enumerate(data))
        try:
            return msgspec.convert(data, type_, dec_hook=self._custom)
        except msgspec.ValidationError as error:
            raise self._wrong(at, _sentence(str(error))) from error

    def _custom(self, type_: type, data: object) -> object:
        if type_ is not Path:
            raise NotImplementedError(f"{type_} in a configuration")
        if not isinstance(data, str) or not data or "\0" in data:
            raise ValueError("expected a path")
        return self._folder / data

    def _wrong(self, at: tuple[str, ...], what: str) -> InvalidInput:
        where = f"{_dotted(at)}: " if at else ""
        return _bad(f"{self._source}: {where}{what}")


def _override(data: dict[str, Any], type_: type[msgspec.Struct], name: str, text: str) -> None:
    """Put the value of one variable where its name points, in place of the file's."""
    words = name.removeprefix(PREFIX).split("__")
    table: dict[str, Any] = data
    kind: Any = type_
    for word in words[:-1]:
        key, kind = _step(table, kind, word, name)
        if _struct_in(kind) is None and _table_of(kind) is None:
            raise _bad(f"environment: {name} names no setting")
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise _bad(f"environment: {name} names no setting")
    key, kind = _step(table, kind, words[-1], name)
    if _struct_in(kind) is not None or _table_of(kind) is not None:
        raise _bad(f"environment: {name} names a whole table; name one of its settings")
    table[key] = _from_text(kind, text, name)


def _step(table: Mapping[str, Any], kind: Any, word: str, name: str) -> tuple[str, Any]:
    struct = _struct_in(kind)
    if struct is not None:
        for field in msgspec.structs.fields(struct):
            if _as_word(field.encode_name) == word:
                return field.encode_name, field.type
    else:
        # A table of the owner's own names: only those that the file has, for a name cannot be read back from a word.
        keys = [key for key in table if _as_word(key) == word]
        if len(keys) > 1:
            raise _bad(f"environment: {name} could mean {' or '.join(keys)}")
        if keys:
            return keys[0], _table_of(kind)
    raise _bad(f"environment: {name} names no setting")


def _from_text(kind: Any, text: str, name: str) -> object:
    """The value that a variable's text stands for; lists are written as in TOML."""
    origin = typing.get_origin(kind)
    if origin in {list, tuple, set, frozenset}:
        try:
            return tomllib.loads(f"value = {text}")["value"]
        except (ValueError, RecursionError) as error:
            raise _bad(f'environment: {name}: expected a list such as ["a", "b"]') from error
    if kind is Path or Path in typing.get_args(kind):
        return text  # resolved like one in the file
    try:
        # Lax: "7443" is an int where an int is due, "true" a bool.
        converted: object = msgspec.convert(text, kind, strict=False)
    except msgspec.ValidationError as error:
        raise _bad(f"environment: {name}: {_sentence(str(error))}") from error
    return converted


def _struct_in(kind: Any) -> type[msgspec.Struct] | None:
    """The struct that `kind` is, or is where it is not None."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return kind
    origin = typing.get_origin(kind)
    if origin is typing.Annotated:
        return _struct_in(typing.get_args(kind)[0])
    if origin in {typing.Union, types.UnionType}:
        inner = [argument for argument in typing.get_args(kind) if argument is not type(None)]
        return _struct_in(inner[0]) if len(inner) == 1 else None
    return None


def _table_of(kind: Any) -> Any | None:
    """The type of the values of a table of free names, None for anything else."""
    origin = typing.get_origin(kind)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return typing.get_args(kind)[1]
    return None


def _as_word(key: str) -> str:
    return re.sub(r"[^A-Z0-9]", "_", key.upper())


def _dotted(at: tuple[str, ...]) -> str:
    return ".".join(at)


def _sentence(text: str) -> str:
    """Another library's message in our texture: no capital, no stop, no path of its own."""
    body = text.replace(" - at `$`", "").rstrip(".")
    return body[:1].lower() + body[1:]


def _bad(message: str) -> InvalidInput:
    return InvalidInput(Reason.INVALID_CONFIGURATION, message)
