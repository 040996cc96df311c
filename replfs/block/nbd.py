"""The node that is an NBD export of another server: what a primary writes to its secondary.

A :class:`NbdTarget` owns one connection, the *link*, and three tasks in the nursery it was given: one sends, one receives, one
watches the time. Callers only queue requests and wait for replies, any number at a time; many requests go out in one send.
Cancelling a caller leaves the stream whole: a request that has not been sent is withdrawn, one that has been sent is answered
to nobody.

The link is given up when it breaks, when the server breaks the protocol, and when the server is silent: it neither takes nor sends
a byte for ``timeout`` seconds while a request is under way, or leaves one unanswered for :data:`PATIENCE` times as long. Every
request under way then fails (``ETIMEDOUT`` for the silence, else ``ECONNRESET``), every later one with ``ENOTCONN``, and
``link_error`` says why. A link that is given up stays so. An error that the server replies with fails its request only.
"""

import errno
import logging
import os
import socket
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Final, TypeVar

import trio

from replfs.arrivals import Arrivals, do_not_spin, send_all
from replfs.block.node import Data, Extent, Node
from replfs.errors import ReplfsError, Unreachable, printable
from replfs.protocol.nbd import wire
from replfs.protocol.nbd.client import Command, ExportInfo, Negotiation, Refused, Transmission
from replfs.protocol.nbd.uri import Target, UnixAddress
from replfs.protocol.nbd.wire import ProtocolError

logger = logging.getLogger(__name__)

_RECEIVE_SIZE: Final = 64 << 10
_SEND_SIZE: Final = 1 << 20  # bytes after which queued requests wait for the next send
PATIENCE: Final = 6
_FEW: Final = 8  # requests under way for which sending each by itself is faster than sending many together
_MAX_STATUS: Final = 1 << 30  # bytes that one BLOCK_STATUS asks for
_GONE: Final = (trio.BrokenResourceError, trio.ClosedResourceError)


class Call(Command):
    """A request of ours, from when it is made until its reply, or until the link is given up instead."""

    __slots__ = ("header", "lost", "made", "payload")

    def __init__(self, kind: int, offset: int, length: int, flags: int = 0, payload: Data = b"") -> None:
        super().__init__(kind, offset, length, flags)
        self.payload = payload  # what a WRITE sends: bytes that stay as they are
        self.header = b""  # while it has not been sent
        self.made = 0.0  # by time.monotonic
        self.lost = 0  # errno, when the link was given up instead

    def answered(self) -> None:
        """What became of it is known. For those who want to hear of it; must not raise."""

    def failure(self) -> OSError | None:
        """Why it failed, None if it did not."""
        if self.lost:  # whatever had come of a reply
            return OSError(self.lost, os.strerror(self.lost))
        if self.error:
            number = wire.ERRNO_OF_ERROR[self.error]
            return OSError(number, self.message or os.strerror(number))
        return None


class _Awaited(Call):
    __slots__ = ("event",)

    def __init__(self, kind: int, offset: int, length: int, flags: int = 0, payload: Data = b"") -> None:
        super().__init__(kind, offset, length, flags, payload)
        self.event = trio.Event()

    def answered(self) -> None:
        self.event.set()


class NbdTarget(Node):
    """Made by :meth:`connect`. ``link_error`` is empty or one line that tells why the link was given up."""

    def __init__(self, target: Target, stream: trio.SocketStream, info: ExportInfo, timeout: float) -> None:
        self.size = info.size
        self.connected = True
        self.link_error = ""
        self.lost = trio.Event()
        """Set once the link is given up or closed."""
        self._target = target
        self._info = info
        self._timeout = timeout
        self._stream = stream
        self._socket = socket.socket(fileno=os.dup(stream.socket.fileno()))  # for the transmission, past what trio does for others
        self._socket.setblocking(False)
        self._transmission: Transmission[Call] = Transmission(info)
        self._active = 0.0  # when the server last took or sent something, by time.monotonic
        self._unsent: deque[Call] = deque()
        self._begun: list[Data] = []  # what is left of a request that was sent in part
        self._sender = trio.lowlevel.ParkingLot()
        self._tasks = trio.CancelScope()
        self._finished = trio.Event()

    @classmethod
    async def connect(cls, target: Target, *, timeout: float = 10.0, nursery: trio.Nursery) -> "NbdTarget":
        """Connect and negotiate within ``timeout`` seconds, which are each later request's limit, too.

        Raises :class:`Unreachable` if there is no server, :class:`ReplfsError` if it has no such export, or one that a primary
        cannot write to byte by byte.
        """
        stream, (info, rest) = await connected(target, timeout, _negotiate)
        self = cls(target, stream, info, timeout)
        nursery.start_soon(self._run, rest)
        return self

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        for start, size in self._pieces(offset, len(buffer)):
            buffer[start - offset : start - offset + size] = (await self._call(wire.NBD_CMD_READ, 0, start, size)).data

    async def write(self, offset: int, data: Data) -> None:
        if len(data) <= self._info.maximum_payload:
            if data:
                await self._call(wire.NBD_CMD_WRITE, 0, offset, len(data), bytes(data))
            return
        view = memoryview(bytes(data))  # a request that is cancelled may be sent all the same, when the caller has the data back
        for start, size in self._pieces(offset, len(data)):
            await self._call(wire.NBD_CMD_WRITE, 0, start, size, view[start - offset : start - offset + size])

    async def write_zeroes(self, offset: int, length: int, may_unmap: bool = True) -> None:
        flags = 0 if may_unmap else wire.NBD_CMD_FLAG_NO_HOLE
        for start, size in self._pieces(offset, length):
            if self._info.has(wire.NBD_FLAG_SEND_WRITE_ZEROES):
                await self._call(wire.NBD_CMD_WRITE_ZEROES, flags, start, size)
            else:
                await self._call(wire.NBD_CMD_WRITE, 0, start, size, bytes(size))

    async def discard(self, offset: int, length: int) -> None:
        if self._info.has(wire.NBD_FLAG_SEND_TRIM):
            for start, size in self._pieces(offset, length):
                await self._call(wire.NBD_CMD_TRIM, 0, start, size)

    async def flush(self) -> None:
        if self._info.has(wire.NBD_FLAG_SEND_FLUSH):
            await self._call(wire.NBD_CMD_FLUSH, 0, 0, 0)

    async def extents(self, offset: int, length: int, limit: int) -> list[Extent]:
        if not length:
            return []
        if self._info.allocation is None:
            return [Extent(length, False, False)]
        flags = wire.NBD_CMD_FLAG_REQ_ONE if limit == 1 else 0
        return (await self._call(wire.NBD_CMD_BLOCK_STATUS, flags, offset, min(length, _MAX_STATUS))).extents[:limit]

    async def close(self) -> None:
        """Take leave of the server if nothing is under way, and end the link; returns when its tasks have ended."""
        try:
            if self.connected and not self._transmission.pending and self._sender:  # it is parked: the socket's buffer is empty
                self.connected = False
                with suppress(*_GONE):
                    await self._stream.send_all(self._transmission.begin(Call(wire.NBD_CMD_DISC, 0, 0)))
        finally:
            self._disconnect(errno.ECONNRESET)
        await self._finished.wait()

    @property
    def largest(self) -> int:
        """Bytes at most that one request may be about."""
        return self._info.maximum_payload

    @property
    def zeroes(self) -> bool:
        """Whether the server has a request for them."""
        return self._info.has(wire.NBD_FLAG_SEND_WRITE_ZEROES)

    @property
    def many(self) -> bool:
        """Whether the server allows several connections at once: a flush on one covers all."""
        return self._info.has(wire.NBD_FLAG_CAN_MULTI_CONN)

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """The range, cut where the server's maximum payload demands it.

        Requests without a payload are cut, too: the server may refuse larger ones, and each has to end within the time limit.
        """
        end = offset + length
        for start in range(offset, end, self._info.maximum_payload):
            yield start, min(self._info.maximum_payload, end - start)

    async def _call(self, kind: int, flags: int, offset: int, length: int, data: Data = b"") -> Call:
        call = _Awaited(kind, offset, length, flags, data)
        self.submit(call)
        try:
            await call.event.wait()
        finally:
            # Cancelled before it was sent: its data may change or go as soon as the caller has it back.
            if call.header and self.connected:
                self._unsent.remove(call)
                self._transmission.forget(call)
        if (failure := call.failure()) is not None:
            raise failure
        return call

    def submit(self, call: Call) -> None:
        """Have a request sent that the server can take in one piece, without waiting: it is told when it is answered.

        Raises OSError if the link was given up already.
        """
        if not self.connected:
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
        call.made = time.monotonic()
        call.header = self._transmission.begin(call)
        idle = bool(self._sender)
        if not (idle and len(self._transmission.pending) <= _FEW and self._send_at_once(call)):
            self._unsent.append(call)
            if idle:
                self._sender.unpark()
                do_not_spin()

    def _send_at_once(self, call: Call) -> bool:
        """While little is under way: without the sender, which is waiting. False if the sender is to see to it."""
        try:
            sent = self._socket.sendmsg((call.header, call.payload))
        except OSError:
            return False  # if it is more than that there is no room, the sender finds out
        if sent < len(call.header) + len(call.payload):
            self._begun = [call.header[sent:], memoryview(call.payload)[max(sent - len(call.header), 0) :]]
            self._sender.unpark()
        call.header = call.payload = b""
        return True

    async def _run(self, rest: bytes) -> None:
        try:
            with self._tasks:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._receive, rest)
                    nursery.start_soon(self._send)
                    nursery.start_soon(self._watch)
        except Exception:
            logger.exception("the link to %s has failed", self._target)
            self._give_up("unexpected error, see the log", errno.ECONNRESET)
        finally:
            self._disconnect(errno.ECONNRESET)
            self._finished.set()

    async def _send(self) -> None:
        try:
            while True:
                while not self._unsent and not self._begun:
                    await self._sender.park()
                message: list[Data] = self._begun
                self._begun = []
                size = 0
                while self._unsent and size < _SEND_SIZE:
                    call = self._unsent.popleft()
                    message += (call.header, call.payload)
                    size += len(call.payload)
                    call.header = call.payload = b""
                await send_all(self._socket, message, self._took_some)
        except (OSError, trio.ClosedResourceError):
            self._give_up("the connection broke", errno.ECONNRESET)

    def _took_some(self) -> None:
        """The server has taken something that was sent: a sign of life."""
        self._active = time.monotonic()

    async def _receive(self, data: bytes) -> None:
        arrivals, receive = Arrivals(self._socket), partial(self._socket.recv, _RECEIVE_SIZE)
        try:
            while True:
                for call in self._transmission.receive(data):
                    call.answered()
                    if not self.connected:
                        return None  # what was done with this one has ended the link
                    if call.error == wire.NBD_ESHUTDOWN:
                        return self._give_up("the server is shutting down", errno.ECONNRESET)
                data = await arrivals.take(receive)
                self._active = time.monotonic()
                if not data:
                    return self._give_up("the server closed the connection", errno.ECONNRESET)
        except ProtocolError as error:
            self._give_up(str(error), errno.ECONNRESET)
        except (OSError, trio.ClosedResourceError):
            self._give_up("the connection broke", errno.ECONNRESET)

    async def _watch(self) -> None:
        while True:
            now = time.monotonic()
            oldest = next(iter(self._transmission.pending.values()), None)
            deadline = now + self._timeout
            if oldest is not None:
                silent = max(self._active, oldest.made) + self._timeout
                deadline = min(silent, oldest.made + PATIENCE * self._timeout)
                if deadline <= now:
                    self._give_up(f"a request was not answered within {now - oldest.made:.3g} seconds", errno.ETIMEDOUT)
            await trio.sleep(max(deadline - now, 0))

    def _give_up(self, reason: str, error: int) -> None:
        if self.connected:
            self.link_error = f"{self._target}: {reason}"
            logger.warning("the link to %s is given up: %s", self._target, reason)
            self._disconnect(error)

    def _disconnect(self, error: int) -> None:
        self.connected = False
        self._stream.socket.close()
        trio.lowlevel.notify_closing(self._socket)
        self._socket.close()
        self._tasks.cancel()
        calls = [*self._transmission.pending.values()]
        self._transmission.pending.clear()
        self._unsent.clear()
        for call in calls:
            call.lost = error
            call.answered()
        self.lost.set()


Agreed = TypeVar("Agreed")


async def connected(
    target: Target, timeout: float, negotiate: Callable[[trio.SocketStream, Target], Awaitable[Agreed]]
) -> tuple[trio.SocketStream, Agreed]:
    """Connect and negotiate within ``timeout`` seconds. Raises Unreachable; ReplfsError if what is there will not do."""
    try:
        with trio.fail_after(timeout):
            stream = await _open(target)
            try:
                return stream, await negotiate(stream, target)
            except BaseException:
                stream.socket.close()
                raise
    except trio.TooSlowError:
        raise _unreachable(target, f"it did not answer within {timeout:g} seconds") from None
    except _GONE:
        raise _unreachable(target, "it closed the connection") from None
    except (ProtocolError, Refused) as error:
        raise _unusable(target, str(error)) from error
    except OSError as error:
        raise _unreachable(target, f"{_why(error)}; is the secondary running there?") from error


async def _open(target: Target) -> trio.SocketStream:
    if isinstance(target.address, UnixAddress):
        return await trio.open_unix_socket(target.address.path)
    return await trio.open_tcp_stream(target.address.host, target.address.port)


async def _negotiate(stream: trio.SocketStream, target: Target) -> tuple[ExportInfo, bytes]:
    negotiation = Negotiation(target.export)
    try:
        while not negotiation.done:
            data = await stream.receive_some(_RECEIVE_SIZE)
            if not data:
                by_name = negotiation.asked_by_name_only
                raise Refused("it closed the connection when asked for " + ("the export of that name" if by_name else "an export"))
            await stream.send_all(negotiation.receive(data))
        if negotiation.info.has(wire.NBD_FLAG_READ_ONLY):
            raise Refused("the export is read-only, and a primary has to write to it")
        if negotiation.info.minimum_block > 1:
            raise Refused(f"it takes only multiples of {negotiation.info.minimum_block} bytes; a target has to take any length")
    except Refused:
        with suppress(*_GONE):
            await stream.send_all(negotiation.leave())
        raise
    return negotiation.info, negotiation.rest


def _unusable(target: Target, why: str) -> ReplfsError:
    return ReplfsError(f"cannot replicate to {printable(str(target))}: {why}")


def _unreachable(target: Target, why: str) -> Unreachable:
    return Unreachable(f"cannot replicate to {printable(str(target))}: {why}")


def _why(error: OSError) -> str:
    """What the system said. Trio hides that behind "all attempts failed", of which there may have been several."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.exceptions[0] if isinstance(cause, BaseExceptionGroup) else cause.__cause__
    return str(error)
