"""Listening at an address, for any server: what is bound, who may connect, and what is removed at the end."""

import errno
import os
import secrets
import socket
import stat
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final

import trio

from replfs.errors import InUse, ReplfsError, printable
from replfs.protocol.nbd.uri import Address, TcpAddress, UnixAddress

_PATH_LIMIT: Final = 107  # unix(7): sun_path, with a NUL at its end


class Listeners:
    """Owns the listening sockets of one address at a time."""

    def __init__(self, option: str) -> None:
        """``option``: the one that addresses come from, for messages."""
        self._option = option
        self._listeners: list[trio.SocketListener] = []
        self._unix_socket: _UnixSocket | None = None

    async def bind(self, address: Address) -> Address:
        """Have clients wait rather than fail until :meth:`serve` runs; returns the address with the port that it got.

        A host is listened on at all addresses it resolves to. A unix socket is for its owner only (mode 0600), and takes the
        place of one that nobody listens on. Raises :class:`InUse` if another server has the address, else :class:`ReplfsError`.
        """
        try:
            if isinstance(address, UnixAddress):
                self._unix_socket = _UnixSocket(address, self._option)
                self._listeners = [trio.SocketListener(trio.socket.from_stdlib_socket(self._unix_socket.socket))]
                return address
            self._listeners = await trio.open_tcp_listeners(address.port, host=address.host)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise _in_use(address, self._option) from None
            raise ReplfsError(f"cannot listen on {printable(str(address))}: {error.strerror or error}") from error
        return TcpAddress(address.host, self._listeners[0].socket.getsockname()[1])

    async def serve(self, handler: Callable[[trio.SocketStream], Awaitable[None]], nursery: trio.Nursery) -> None:
        """Have ``handler`` serve each client, in ``nursery``, until cancelled; then the address is free."""
        try:
            await trio.serve_listeners(handler, self._listeners, handler_nursery=nursery)
        finally:
            self._remove()

    async def close(self) -> None:
        """Let go of the address, where :meth:`serve` was never called."""
        for listener in self._listeners:
            await listener.aclose()
        self._remove()

    def _remove(self) -> None:
        self._listeners = []
        if self._unix_socket is not None:
            self._unix_socket.remove()
            self._unix_socket = None


def _in_use(address: Address, option: str) -> InUse:
    return InUse(f"{printable(str(address))} is in use by another server: stop it or choose another {option}")


class _UnixSocket:
    """A listening unix socket and its file. The file appears with a rename, when it can be connected to and by whom is settled."""

    def __init__(self, address: UnixAddress, option: str) -> None:
        self._path = address.path
        if len(os.fsencode(self._path)) > _PATH_LIMIT:
            raise ReplfsError(f"cannot listen on {printable(str(address))}: a unix socket's path has at most {_PATH_LIMIT} bytes")
        _refuse_live_socket(address, option)
        hidden = os.path.join(os.path.dirname(self._path), f".{secrets.token_hex(4)}")
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.socket.bind(hidden)
            try:
                os.chmod(hidden, 0o600)
                self.socket.listen()
                self._inode = os.stat(hidden).st_ino
                os.rename(hidden, self._path)
            except OSError:
                os.unlink(hidden)
                raise
        except OSError:
            self.socket.close()
            raise

    def remove(self) -> None:
        """Remove the file, if it is not another server's by now."""
        with suppress(OSError):
            if os.lstat(self._path).st_ino == self._inode:
                os.unlink(self._path)


def _refuse_live_socket(address: UnixAddress, option: str) -> None:
    try:
        mode = os.lstat(address.path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ReplfsError(f"{printable(address.path)} exists and is not a socket: choose another {option}")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # a full backlog must not block: whoever has one is alive
        try:
            probe.connect(address.path)
        except (ConnectionRefusedError, FileNotFoundError):
            return
        except BlockingIOError:
            pass
    raise _in_use(address, option)
