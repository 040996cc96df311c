"""The NBD server: it serves one node, under one name, to whoever connects.

A :class:`NbdServer` owns its listening sockets and its connections; the node stays its owner's. Nothing that a client does can
raise out of it, block other connections, or take more than a bounded amount of memory: 16 connections, and for each a bounded
number of requests and bytes under way. A request is under way until its reply has been handed to the kernel, so a client that
does not read its replies is not read from either.

How a connection is served. All of its workers do the same: each takes whatever is to be done next, which is to carry out a
request that has arrived, or to send the replies that are there, or to receive more, or nothing. One receive brings many requests;
as long as the node answers without waiting, one worker carries them all out and sends the replies at once. A worker that begins
a request first sees to it that another one is awake (the standby), which goes on with the rest if the request has to wait.

The transmission is shielded from cancellation. It ends when its socket is closed, by :meth:`NbdServer.close_connections` or by
:meth:`NbdServer.serve` itself when that is cancelled: a node call that is under way is always finished, never torn.
"""

import errno
import logging
import os
import socket
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Final, Protocol

import trio

from replfs.arrivals import Arrivals, send_all
from replfs.block.node import Data, Node
from replfs.errors import ReplfsError
from replfs.export.listeners import Listeners
from replfs.protocol.nbd import wire
from replfs.protocol.nbd.server import GREETING, Export, Handshake, Phase, Transmission
from replfs.protocol.nbd.uri import Address, TcpAddress
from replfs.protocol.nbd.wire import Request
from replfs.protocol.peer import Lines

logger = logging.getLogger(__name__)

MAX_CONNECTIONS: Final = 16
HANDSHAKE_TIMEOUT: Final = 30.0
"""Seconds that a client has to come to an agreement."""

MAX_REQUESTS: Final = 32
"""Requests of one connection that the node is busy with at a time."""

MAX_HELD: Final = 64 << 20
"""Bytes that the requests under way of one connection may hold together."""

_RECEIVE_SIZE: Final = 256 << 10
_REQUEST_COST: Final = 16 << 10  # bytes that a request is taken to hold besides its payload; a BLOCK_STATUS reply is the largest
_MAX_EXTENTS: Final = 1024  # in one BLOCK_STATUS reply
_LARGE: Final = 64 << 10  # bytes of a payload that are worth a receive of their own
_BATCH: Final = 64  # replies, of which a read has two parts, that are sent before more requests are carried out
_TURNS: Final = 32  # requests that are carried out before other tasks get a turn, should none of them have to wait

_GONE: Final = (trio.BrokenResourceError, trio.ClosedResourceError)


class Peer(Protocol):
    """Who answers a primary (:mod:`replfs.protocol.peer`)."""

    async def answer(self, line: bytes) -> bytes:
        """The answer to one request. Raises ReplfsError: there is nothing more to be said."""

    def leave(self) -> None:
        """The connection has ended."""


class NbdServer:
    """Serves ``node`` as the export ``name``; the empty name answers too.

    ``read_only`` may be changed at any time: connections made from then on see it.
    """

    def __init__(
        self,
        node: Node,
        name: str,
        *,
        read_only: bool = False,
        peer: Callable[[], Peer] | None = None,
        option: str = "--listen",
    ) -> None:
        """``peer`` makes who answers a primary that has more to say than NBD can, for each such connection.

        ``option`` is the one that the address comes from, for messages.
        """
        self.read_only = read_only
        self._make_peer = peer
        self._node = node
        self._name = name
        self._listeners = Listeners(option)
        self._connections: set[_Connection] = set()
        self._full = False

    @property
    def connections(self) -> int:
        """How many clients are connected."""
        return len(self._connections)

    async def listen(self, address: Address) -> Address:
        """As :meth:`replfs.export.listeners.Listeners.bind`."""
        return await self._listeners.bind(address)

    async def serve(self) -> None:
        """Serve until cancelled; then all connections are closed, requests under way are finished, the address is free."""
        async with trio.open_nursery() as nursery:
            try:
                await self._listeners.serve(self._serve_connection, nursery)
            finally:
                for connection in self._connections:
                    connection.close()

    async def close(self) -> None:
        """Let go of the address, where :meth:`serve` was never called."""
        await self._listeners.close()

    async def close_connections(self, *, but: Peer | None = None) -> None:
        """Close every connection there is now, ``but`` the one of this peer.

        When this returns, no request of theirs is at the node any more.

        Requests under way are finished, those that still wait are dropped; no reply is sent to either. New connections may be
        made meanwhile.
        """
        connections = [connection for connection in self._connections if but is None or connection.answered_by is not but]
        for connection in connections:
            connection.close()
        for connection in connections:
            await connection.finished.wait()

    async def _serve_connection(self, stream: trio.SocketStream) -> None:
        if len(self._connections) >= MAX_CONNECTIONS:
            if not self._full:
                logger.warning("there are %d NBD connections already: more are turned away", MAX_CONNECTIONS)
            self._full = True
            stream.socket.close()
            return
        connection = _Connection(self._node, stream, self._make_peer)
        self._connections.add(connection)
        try:
            reason = await connection.serve(Export(self._name, self._node.size, self.read_only))
            if reason:
                logger.info("the NBD client %s is disconnected: %s", connection.peer, reason)
        except Exception:
            logger.exception("the NBD client %s is disconnected because of an unexpected error", connection.peer)
        finally:
            connection.close()
            self._connections.remove(connection)
            self._full = False
            connection.finished.set()


class _Connection:
    """One client."""

    def __init__(self, node: Node, stream: trio.SocketStream, make_peer: Callable[[], Peer] | None) -> None:
        self.peer = _peer(stream)
        self._make_peer = make_peer
        self.answered_by: Peer | None = None
        self._conversation = trio.CancelScope()
        self.finished = trio.Event()
        self._node = node
        self._stream = stream
        self._socket = socket.socket(fileno=os.dup(stream.socket.fileno()))  # for the transmission, past what trio does for others
        self._socket.setblocking(False)
        self._arrivals = Arrivals(self._socket)
        self._receive_some = partial(self._socket.recv, _RECEIVE_SIZE)
        self._closed = False

        # The transmission phase. Between two awaits nothing else runs, which is all the locking that this needs.
        self._transmission: Transmission
        self._ended = False  # nothing more will be received
        self._queue: deque[Request] = deque()  # arrived and not begun
        self._held = 0  # bytes of the requests under way, by _cost
        self._replies: list[Data] = []  # to be sent
        self._replied = 0  # bytes of the requests that those belong to
        self._receiving = False
        self._sending = False
        self._idle = trio.lowlevel.ParkingLot()  # workers without work
        self._standby = False  # one of them has been woken and did not run yet
        self._turn = 0

    def close(self) -> None:
        """End it now: nothing is received, begun or sent any more."""
        self._closed = True
        self._stream.socket.close()
        trio.lowlevel.notify_closing(self._socket)
        self._socket.close()
        self._idle.unpark_all()
        self._conversation.cancel()

    async def serve(self, export: Export) -> str:
        """Serve the client until either side ends it; returns why, unless that was its wish."""
        try:
            with trio.fail_after(HANDSHAKE_TIMEOUT):
                handshake = await self._negotiate(export)
        except _GONE:
            return ""
        except trio.TooSlowError:
            return f"no export was agreed on within {HANDSHAKE_TIMEOUT:.0f} seconds"
        if handshake.phase is Phase.PEER:
            return await self._converse(handshake.rest)
        if handshake.phase is not Phase.TRANSMISSION:
            return handshake.reason
        self._transmission = handshake.transmission()
        self._take(handshake.rest)
        # One worker more than there may be requests, so that one is always left to receive and to send.
        with trio.CancelScope(shield=True):
            async with trio.open_nursery() as nursery:
                for _ in range(MAX_REQUESTS + 1):
                    nursery.start_soon(self._work)
        return self._transmission.reason

    async def _negotiate(self, export: Export) -> Handshake:
        handshake = Handshake(export, peers=self._make_peer is not None)
        await self._stream.send_all(GREETING)
        while handshake.phase in (Phase.CLIENT_FLAGS, Phase.OPTIONS):
            data = await self._stream.receive_some(_RECEIVE_SIZE)
            if not data:
                break
            await self._stream.send_all(handshake.receive(data))
        return handshake

    async def _converse(self, data: bytes) -> str:
        """Answer a primary's requests, one after the other; returns why that ends."""
        assert self._make_peer is not None
        peer = self.answered_by = self._make_peer()
        lines = Lines()
        try:
            with self._conversation:
                while not self._closed:
                    for line in lines.receive(data):
                        await self._stream.send_all(await peer.answer(line))
                    data = await self._stream.receive_some(_RECEIVE_SIZE)
                    if not data:
                        break
        except _GONE:
            pass
        except ReplfsError as error:
            return str(error)
        finally:
            peer.leave()
        return ""

    async def _work(self) -> None:
        """A worker: whatever changes something does so while awake, and looks here again before it parks."""
        while not self._closed:
            if self._turn >= _TURNS:
                self._turn = 0
                await trio.lowlevel.checkpoint()
            elif self._queue and (count := self._carry_out_at_once()):
                self._turn += count
            elif len(self._replies) >= _BATCH and not self._sending:
                await self._send()
            elif self._may_begin():
                if not self._standby:
                    self._standby = True
                    self._idle.unpark()
                await self._carry_out(self._queue.popleft())
                self._turn += 1
            elif self._replies and not self._sending:
                await self._send()
            elif self._ended and not self._queue:
                break
            elif not self._receiving and not self._ended and not self._queue:
                await self._receive()
            else:
                await self._idle.park()
                self._standby = False
        self._idle.unpark_all()

    def _may_begin(self) -> bool:
        """Whether a request waits, a worker can stand by, and there is room; alone, a request of any size has room."""
        if not self._queue or not (self._standby or self._idle):
            return False
        return not self._held or self._held + _cost(self._queue[0]) <= MAX_HELD

    def _carry_out_at_once(self) -> int:
        """Carry out what need not wait, and has room, from the front of the queue on: how many requests."""
        queue, replies, transmission, node = self._queue, self._replies, self._transmission, self._node
        allows, success = transmission.allows, transmission.success
        write, read = node.write_at_once, node.read_at_once
        count = 0
        while queue and len(replies) < _BATCH and count < _TURNS:
            request = queue[0]
            flags, kind, _, offset, length, data = request
            if flags or kind > wire.NBD_CMD_WRITE or not allows(kind, offset, length):
                break
            cost = _cost(request)
            if self._held and self._held + cost > MAX_HELD:
                break
            try:
                if kind == wire.NBD_CMD_WRITE:
                    if not write(offset, data):
                        break
                    replies.append(success(request))
                else:
                    content = bytearray(length)
                    if not read(offset, memoryview(content)):
                        break
                    replies += (transmission.read_header(request), content)
            except Exception as error:
                self._fail(request, error)
            queue.popleft()
            self._held += cost
            self._replied += cost
            count += 1
        return count

    def _fail(self, request: Request, error: Exception) -> None:
        if isinstance(error, OSError):
            number, why = wire.ERROR_OF_ERRNO.get(error.errno or errno.EIO, wire.NBD_EIO), error.strerror or str(error)
        else:
            logger.error(
                "an NBD request (type %d, %d bytes at %d) failed", request.type, request.length, request.offset, exc_info=error
            )
            number, why = wire.NBD_EIO, "unexpected error, see the server's log"
        self._replies.append(self._transmission.failure(request, number, why))

    def _take(self, data: bytes) -> None:
        self._queue.extend(self._transmission.receive(data))
        self._ended = self._ended or self._transmission.ended

    async def _receive(self) -> None:
        """More of what the client sends; the bulk of a large payload goes to its place at once."""
        self._receiving = True
        rest = self._transmission.rest_of_payload
        try:
            if len(rest) >= _LARGE:
                got = await self._arrivals.take(partial(self._socket.recv_into, rest))
                self._ended = not got
                self._queue.extend(self._transmission.received(got))
            else:
                data = await self._arrivals.take(self._receive_some)
                self._ended = not data
                self._take(data)
        except (OSError, trio.ClosedResourceError):
            self._ended = True
        finally:
            self._receiving = False

    async def _send(self) -> None:
        replies, self._replies = self._replies, []
        sent, self._replied = self._replied, 0
        self._sending = True
        try:
            await send_all(self._socket, replies)
        except (OSError, trio.ClosedResourceError):
            self.close()
        finally:
            self._sending = False
        self._held -= sent

    async def _carry_out(self, request: Request) -> None:
        transmission = self._transmission
        cost = _cost(request)
        self._held += cost
        refusal = transmission.check(request)
        if refusal is not None:
            self._replies.append(transmission.failure(request, *refusal))
        else:
            try:
                await self._ask_node(request)
            except Exception as error:
                self._fail(request, error)
        self._replied += cost

    async def _ask_node(self, request: Request) -> None:
        node = self._node
        flags, kind, _, offset, length, data = request
        if kind == wire.NBD_CMD_READ:
            content = await node.read(offset, length)
            if len(content) != length:
                raise RuntimeError(f"the node gave {len(content)} bytes")
            self._replies += (self._transmission.read_header(request), content)
            return
        if kind == wire.NBD_CMD_BLOCK_STATUS:
            limit = 1 if flags & wire.NBD_CMD_FLAG_REQ_ONE else _MAX_EXTENTS
            self._replies.append(self._transmission.block_status(request, await node.extents(offset, length, limit)))
            return
        if kind == wire.NBD_CMD_WRITE:
            await node.write(offset, data)
        elif kind == wire.NBD_CMD_WRITE_ZEROES:
            await node.write_zeroes(offset, length, may_unmap=not flags & wire.NBD_CMD_FLAG_NO_HOLE)
        elif kind == wire.NBD_CMD_TRIM:
            await node.discard(offset, length)
        if kind == wire.NBD_CMD_FLUSH or flags & wire.NBD_CMD_FLAG_FUA:
            await node.flush()
        self._replies.append(self._transmission.success(request))


def _cost(request: Request) -> int:
    carries = request.type in (wire.NBD_CMD_READ, wire.NBD_CMD_WRITE) and request.length <= wire.MAX_PAYLOAD
    return _REQUEST_COST + (request.length if carries else 0)


def _peer(stream: trio.SocketStream) -> str:
    """Who is at the other end. A TCP peer that falls silent is noticed after a minute: a dead host must not keep its connection."""
    try:
        name = stream.socket.getpeername()
        if not isinstance(name, tuple):
            return "on the unix socket"
        for option, value in ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3)):
            stream.setsockopt(socket.IPPROTO_TCP, option, value)
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        return str(TcpAddress(name[0], name[1]))
    except OSError:  # it is gone already
        return "that left at once"
