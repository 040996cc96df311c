"""What arguments of the commands are made of."""

from collections.abc import Callable
from typing import Any

import click

from replfs.errors import ReplfsError
from replfs.protocol.nbd.uri import Address, Target, UnixAddress
from replfs.volume.disk import resolve

_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SMALLEST = 1 << 20


class Parsed(click.ParamType[Any]):
    """A parameter that a function of the package parses; its ReplfsError is wrong usage."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value)
        except (ReplfsError, ValueError) as error:
            self.fail(str(error), param, ctx)
        except KeyError:
            self.fail(f"there is no {self.name} {value!r}", param, ctx)


def absolute_address(address: Address) -> Address:
    """The daemon has another working directory."""
    return UnixAddress(str(resolve(address.path))) if isinstance(address, UnixAddress) else address


def absolute(target: Target) -> Target:
    return Target(absolute_address(target.address), target.export)


def size(text: str) -> int:
    """Bytes, from a number that K, M, G or T may follow. Raises ReplfsError."""
    number, factor = (text[:-1], _UNITS[text[-1]]) if text[-1:] in _UNITS else (text, 1)
    if not (number.isdigit() and number.isascii() and len(number) < 16):
        raise ReplfsError(f"{text!r} is not a size like 64M")
    if int(number) * factor < _SMALLEST:
        raise ReplfsError(f"{text} is less than 1M")
    return int(number) * factor
