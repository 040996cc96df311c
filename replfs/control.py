"""The control attributes: names and values from outside, translated into a volume's operations and back, in one place.

Everything that comes in here may come from anyone who can reach the file: names and values are checked before anything happens.
"""

import errno
from collections.abc import Callable
from typing import Any, Final

import msgspec

from replfs.block.replication.rules import Argument, Listening, Mode, Operation, Resyncing, Verification, Verifying
from replfs.errors import ReplfsError, printable
from replfs.protocol.nbd.uri import Address, Target, UnixAddress, is_local, parse_address, parse_uri
from replfs.volume.base import Volume

PREFIX: Final = "user.replfs."
NOWHERE: Final = "none"
"""The value that stands for no address to listen on."""

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
        if name == PREFIX + "target":
            volume.successor_target = _target(volume, value)
            return
        operation = _operation(name)
        argument = _ARGUMENTS[operation](volume, value) if operation in _ARGUMENTS else None
    except ReplfsError as error:
        raise volume.failed(printable(name), error) from None
    await volume.control(operation, argument)


def _operation(name: str) -> Operation:
    try:
        return Operation(name.removeprefix(PREFIX) if name.startswith(PREFIX) else "")
    except ValueError:
        raise ReplfsError(f"there is no control {printable(name)}", errno.EOPNOTSUPP) from None


def _target(volume: Volume, value: bytes) -> tuple[Target, bool]:
    """``NBD-URI [discard-remote]``. Raises ReplfsError."""
    uri, _, more = value.decode(errors="backslashreplace").partition(" ")
    try:
        target = parse_uri(uri)
    except ReplfsError as error:
        raise ReplfsError(str(error), errno.EINVAL) from None
    if more not in ("", "discard-remote"):
        raise ReplfsError(f"a target is an NBD URI, and discard-remote may follow, not {printable(more, 40)!r}", errno.EINVAL)
    _reachable(volume, target.address)
    return target, bool(more)


def _reachable(volume: Volume, address: Address) -> None:
    """Raises ReplfsError if the data would go beyond this machine, and that was not said to be well."""
    if not volume.config.plaintext and not is_local(address):
        raise ReplfsError(
            f"{printable(str(address))} is beyond this machine, and the data would go there unencrypted: use a tunnel, or"
            " mount with --plaintext",
            errno.EINVAL,
        )


def _listening(volume: Volume, value: bytes) -> Listening:
    """``ADDRESS``, or ``none``. Raises ReplfsError."""
    text = value.decode(errors="backslashreplace")
    if text == NOWHERE:
        return Listening(None)
    try:
        address = parse_address(text)
    except ReplfsError as error:
        raise ReplfsError(str(error), errno.EINVAL) from None
    if isinstance(address, UnixAddress) and not address.path.startswith("/"):
        raise ReplfsError(f"a unix socket's path must begin with a /, unlike {printable(address.path, 60)}", errno.EINVAL)
    _reachable(volume, address)
    return Listening(address)


def _one_of(kind: type[Mode] | type[Resyncing], operation: Operation) -> Callable[[Volume, bytes], Mode | Resyncing]:
    def parse(_: Volume, value: bytes) -> Mode | Resyncing:
        try:
            return kind(value.decode())
        except ValueError:
            shown = printable(value[:100].decode(errors="backslashreplace"), 40)
            raise ReplfsError(f"{operation} takes the value {' or '.join(kind)}, not {shown!r}", errno.EINVAL) from None

    return parse


def _verification(volume: Volume, value: bytes) -> Verification:
    what, _, rate = value.decode(errors="backslashreplace").partition(" ")
    if what not in list(Verifying) or not (not rate or (rate.isascii() and rate.isdigit() and len(rate) < 16)):
        raise ReplfsError(
            f"verify takes the value {' or '.join(Verifying)}, and the bytes a second may follow, not {printable(what, 40)!r}",
            errno.EINVAL,
        )
    return Verification(Verifying(what), int(rate or 0))


_ARGUMENTS: Final[dict[Operation, Callable[[Volume, bytes], Argument]]] = {
    Operation.START: _one_of(Mode, Operation.START),
    Operation.RESYNC: _one_of(Resyncing, Operation.RESYNC),
    Operation.VERIFY: _verification,
    Operation.LISTEN: _listening,
}
"""What becomes of the values of those that have one that matters."""
