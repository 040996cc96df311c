"""The one exception that is meant for people, how foreign text is shown to them, and what a group of exceptions says."""

import errno
from typing import TypeVar

E = TypeVar("E", bound=Exception)


class ReplfsError(Exception):
    """Something failed that a person is told of: one line that names the thing and the way out.

    ``errno`` is what a program gets for it, where a system call is the way it asked.
    """

    def __init__(self, message: str, errno: int = errno.EIO) -> None:
        super().__init__(message)
        self.errno = errno


class InUse(ReplfsError):
    """Another process has it: a disk, a state directory, a mount point, an address."""

    def __init__(self, message: str) -> None:
        super().__init__(message, errno.EBUSY)


class Unreachable(ReplfsError):
    """The other side does not answer, for now."""


def printable(text: str, limit: int = 400) -> str:
    """Text from an image, the network or a file name, safe to print on one line of a terminal.

    Control characters and undecodable bytes are escaped, and more than ``limit`` characters are cut.
    """
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
    return shown if len(shown) <= limit else shown[:limit] + "..."


def first_of(group: BaseExceptionGroup[E]) -> E:
    """The first exception in a group, or in a group of it."""
    error: E | BaseExceptionGroup[E] = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
