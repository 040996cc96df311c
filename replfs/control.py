"""The control attributes: names and values from outside, translated into a volume's operations and back, in one place.

Everything that comes in here may come from anyone who can reach the file: names and values are checked before anything happens.
"""

import errno
from collections.abc import Callable
from typing import Any, Final

import msgspec

from replfs.block.replication.rules import Mode, Operation
from replfs.errors import ReplfsError, printable
from replfs.volume.base import Volume

PREFIX: Final = "user.replfs."

_READ: Final[dict[str, Callable[[Volume], Any]]] = {
    "mode": lambda volume: volume.config.mode,
    "stage": lambda volume: volume.state.stage,
    "error": lambda volume: volume.error,
    "last-error": lambda volume: volume.last_error,
    "generation": lambda volume: volume.state.generation,
    "status": lambda volume: msgspec.json.encode(volume.status()).decode(),
}

NAMES: Final = tuple(PREFIX + name for name in _READ)
"""The attributes that can be read."""


def get(volume: Volume, name: str) -> bytes:
    """An attribute's value. Raises OSError (ENODATA) for a name that cannot be read."""
    read = _READ.get(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else None
    if read is None:
        raise OSError(errno.ENODATA, "no such attribute")
    return str(read(volume)).encode()


async def put(volume: Volume, name: str, value: bytes) -> None:
    """Carry out the operation that an attribute stands for. Raises ReplfsError: EOPNOTSUPP no such control, EINVAL wrong value."""
    try:
        operation = _operation(name)
        mode = _mode(value) if operation is Operation.START else None
    except ReplfsError as error:
        raise volume.failed(printable(name), error) from None
    await volume.control(operation, mode)


def _operation(name: str) -> Operation:
    try:
        return Operation(name.removeprefix(PREFIX) if name.startswith(PREFIX) else "")
    except ValueError:
        raise ReplfsError(f"there is no control {printable(name)}", errno.EOPNOTSUPP) from None


def _mode(value: bytes) -> Mode:
    try:
        return Mode(value.decode())
    except ValueError:
        shown = printable(value[:100].decode(errors="backslashreplace"), 40)
        raise ReplfsError(f"start takes the value primary or secondary, not {shown!r}", errno.EINVAL) from None
