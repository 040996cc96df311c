"""QEMU's machine protocol, without I/O: bytes from a client become commands, values become bytes for it.

After QEMU's ``docs/interop/qmp-spec``. A client sends JSON objects, one after the other, with white space or nothing between them;
strings may be in single quotes, as in QEMU's own documents. The server greets first, and takes no command but
``qmp_capabilities`` before that has been given. Messages of errors are QEMU's.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from replfs import __version__

MAX_MESSAGE: Final = 64 << 10
"""The most bytes of one message; a client that sends more is cut off."""

MAX_DEPTH: Final = 64
"""How deep objects and lists may be nested."""

QEMU_VERSION: Final = (7, 2, 0)
"""Whose commands these are, as a client is told: what it looks at to know what it may send."""


class QmpError(Exception):
    """A command that is refused. ``kind`` is QMP's class of errors; ``identity`` as in :class:`Command`."""

    def __init__(self, message: str, kind: str = "GenericError") -> None:
        super().__init__(message)
        self.kind = kind
        self.identity: list[Any] = []


class TooLong(Exception):
    """A message without an end: the connection is of no use any more."""


@dataclass(frozen=True)
class Command:
    """``identity`` is the client's, and given back: a list of it, or of nothing."""

    name: str
    arguments: dict[str, Any]
    identity: list[Any]


# What a client sends


class Messages:
    """Cuts what arrives into JSON values, however the network has cut it."""

    def __init__(self) -> None:
        self._text = bytearray()
        self._depth = 0
        self._quote = 0  # the quotation mark of the string that is open
        self._escaped = False

    def receive(self, data: bytes) -> Iterator[bytes]:
        """Those that are whole now, with strings in double quotes. What cannot begin one is told by itself, up to the line's end.

        Raises TooLong.
        """
        for byte in data:
            if self._depth == 0 and self._quote == 0 and not self._text and byte in b" \t\r\n":
                continue
            self._take(byte)
            outside = self._depth <= 0 and not self._quote
            if outside and (byte in b"}]" or (byte in b"\r\n" and self._text[0] not in b"{[")):
                yield self._end()
            elif len(self._text) > MAX_MESSAGE:
                raise TooLong

    def _end(self) -> bytes:
        message = bytes(self._text)
        self._text.clear()
        self._depth = 0
        return message

    def _take(self, byte: int) -> None:
        if self._quote:
            if self._escaped:
                self._escaped = False
                if byte == 0x27:  # JSON has no such escape
                    self._text.pop()
            elif byte == 0x5C:
                self._escaped = True
            elif byte == self._quote:
                self._quote = 0
                byte = 0x22
            elif byte == 0x22:  # within single quotes
                self._text.append(0x5C)
        elif byte in (0x22, 0x27):
            self._quote = byte
            byte = 0x22
        elif byte in b"{[":
            self._depth += 1
        elif byte in b"}]":
            self._depth -= 1
        self._text.append(byte)


def parse(message: bytes) -> Command:
    """Raises QmpError."""
    depth = most = 0
    for byte in message:  # also within strings, which is no loss
        depth += (byte in b"{[") - (byte in b"}]")
        most = max(most, depth)
    try:
        if most > MAX_DEPTH:
            raise ValueError("too deep")
        value = json.loads(message)
    except (ValueError, RecursionError):
        raise QmpError("JSON parse error, invalid JSON syntax") from None
    if not isinstance(value, dict):
        raise QmpError("QMP input must be a JSON object")
    identity = [value.pop("id")] if "id" in value else []
    try:
        return _command(value, identity)
    except QmpError as error:
        error.identity = identity
        raise


def _command(value: dict[str, Any], identity: list[Any]) -> Command:
    arguments = value.pop("arguments", {})
    if "execute" not in value:
        raise QmpError("QMP input lacks member 'execute'")
    name = value.pop("execute")
    if not isinstance(name, str):
        raise QmpError("QMP input member 'execute' must be a string")
    if not isinstance(arguments, dict):
        raise QmpError("QMP input member 'arguments' must be an object")
    if value:
        raise QmpError(f"QMP input member '{_shown(next(iter(value)))}' is unexpected")
    return Command(name, arguments, identity)


def _shown(name: str) -> str:
    return name if len(name) <= 60 and name.isprintable() else ascii(name[:60])


# What it is answered


def greeting() -> bytes:
    return _message({"QMP": {"version": version(), "capabilities": []}})


def version() -> dict[str, Any]:
    major, minor, micro = QEMU_VERSION
    return {"qemu": {"major": major, "minor": minor, "micro": micro}, "package": f"replfs {__version__}"}


def returned(value: Any, identity: list[Any]) -> bytes:
    return _message({"return": value} | _id(identity))


def refused(error: QmpError, identity: list[Any]) -> bytes:
    return _message({"error": {"class": error.kind, "desc": str(error)}} | _id(identity))


def event(name: str, data: Mapping[str, Any]) -> bytes:
    seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
    stamp = {"seconds": seconds, "microseconds": nanoseconds // 1000}
    return _message({"event": name, "data": dict(data), "timestamp": stamp})


def not_found(name: str) -> QmpError:
    return QmpError(f"The command {_shown(name)} has not been found", "CommandNotFound")


def _id(identity: list[Any]) -> dict[str, Any]:
    return {"id": identity[0]} if identity else {}


def _message(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\r\n"


# Arguments


Check = Callable[[Any], bool]

BOOLEAN: Final[tuple[str, Check]] = "boolean", lambda value: isinstance(value, bool)
STRING: Final[tuple[str, Check]] = "string", lambda value: isinstance(value, str)
OBJECT: Final[tuple[str, Check]] = "object", lambda value: isinstance(value, dict)


@dataclass(frozen=True)
class Parameter:
    """``kind``: what it is called in messages, and what tells whether a value is one."""

    kind: tuple[str, Check]
    optional: bool = False


def check_arguments(arguments: Mapping[str, Any], parameters: Mapping[str, Parameter]) -> None:
    """Raises QmpError if one is missing, not known, or no value of its kind."""
    for name, parameter in parameters.items():
        if name not in arguments:
            if not parameter.optional:
                raise QmpError(f"Parameter '{name}' is missing")
        elif not parameter.kind[1](arguments[name]):
            raise QmpError(f"Invalid parameter type for '{name}', expected: {parameter.kind[0]}")
    for name in arguments:
        if name not in parameters:
            raise QmpError(f"Parameter '{_shown(name)}' is unexpected")
