"""A proxy between two unix sockets that can do to a link what networks, and the machines behind them, do.

It has one thread of its own, with plain sockets, so that it goes on whatever the test waits for; every order is carried out there,
and has been when its method returns. Nothing waits without a bound. An order holds until :meth:`Proxy.go_on`, which takes all back.

What it cannot do: NBD has no checksums, so a byte that is flipped within what is written, or in a description of extents, is
noticed by nobody. :meth:`Proxy.corrupt` is for the bytes by which a side knows what it reads.
"""

import contextlib
import enum
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

_SECONDS = 30
_CHUNK = 64 << 10
_HELD = 256 << 10
"""Bytes of one direction of a connection that may be here: a stalled link holds little more than the sockets do."""


class Way(enum.Enum):
    """A direction."""

    THERE = "to the server"
    BACK = "from the server"


THERE, BACK = Way
BOTH = (THERE, BACK)


class _Pipe:
    """One direction of one connection."""

    def __init__(self, way: Way, source: socket.socket, sink: socket.socket) -> None:
        self.way = way
        self.source = source
        self.sink = sink
        self.chunks: deque[tuple[float, bytes]] = deque()  # and when each is due
        self.held = 0
        self.ended = False  # the source has said all
        self.lame = False  # bytes were dropped: what followed them would be nonsense, so nothing does
        self.stranded = False

    def add(self, due: float, data: bytes) -> None:
        self.chunks.append((due, data))
        self.held += len(data)


class _Connection:
    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.pipes = (_Pipe(THERE, client, server), _Pipe(BACK, server, client))

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.source.close()


class Proxy:
    """Listens on ``path``, and has a connection to ``server`` for each of its own. To be closed."""

    def __init__(self, path: Path, server: Path) -> None:
        self.path = path
        self._server = server
        self._connections: list[_Connection] = []
        self._listener: socket.socket | None = None
        self._orders: deque[Callable[[], None]] = deque()
        self._ear, self._mouth = socket.socketpair()
        self._closed = False
        self._accepted = 0
        self._carried = dict.fromkeys(Way, 0)
        self._forget_orders()
        self._listen()
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)
        self._thread.start()

    def _forget_orders(self) -> None:
        self._stalled: set[Way] = set()
        self._dropping: set[Way] = set()
        self._cut_after: dict[Way, int] = {}
        self._corrupt_after: dict[Way, int] = {}
        self._delay = 0.0
        self._rate = 0
        self._free_at = dict.fromkeys(Way, 0.0)

    # Orders

    def go_on(self) -> None:
        """Carry everything as it comes, from now on; new connections, too."""

        def do() -> None:
            self._forget_orders()
            self._strand(False)
            self._listen()

        self._order(do)

    def cut(self) -> None:
        """End all connections. Those who come are served."""
        self._order(self._cut)

    def cut_after(self, count: int, way: Way = THERE) -> None:
        """End all connections when so many more bytes have passed in this direction: in the middle of a message, most likely."""
        self._order(lambda: self._cut_after.update({way: count}))

    def refuse(self) -> None:
        """Listen no more. Connections that are there go on."""
        self._order(self._deafen)

    def unplug(self) -> None:
        """Cut, and refuse: in one step, so that nobody comes between."""

        def do() -> None:
            self._deafen()
            self._cut()

        self._order(do)

    def stall(self, *ways: Way) -> None:
        """Accept connections, and carry nothing, in both directions or one."""
        self._order(lambda: self._stalled.update(ways or BOTH))

    def strand(self) -> None:
        """Carry nothing on the connections that are there now; new ones are served. What was on its way arrives late, then."""
        self._order(lambda: self._strand(True))

    def drop(self, *ways: Way) -> None:
        """Swallow what comes. A connection that has lost bytes carries none in that direction ever after."""
        self._order(lambda: self._dropping.update(ways or BOTH))

    def corrupt(self, way: Way, after: int = 0) -> None:
        """Flip a bit of the byte that comes after so many more in this direction."""
        self._order(lambda: self._corrupt_after.update({way: after}))

    def delay(self, seconds: float) -> None:
        """Each byte takes so long, in each direction."""
        self._order(lambda: setattr(self, "_delay", seconds))

    def limit(self, rate: int) -> None:
        """So many bytes a second in each direction, of all connections together."""
        self._order(lambda: setattr(self, "_rate", rate))

    # Looking

    def carried(self, way: Way) -> int:
        """Bytes that were delivered in this direction."""
        return self._carried[way]

    @property
    def connections(self) -> int:
        """How many there are."""
        return len(self._connections)

    @property
    def accepted(self) -> int:
        """How many there have been."""
        return self._accepted

    def close(self) -> None:
        """End everything, the thread included."""
        if not self._closed:

            def do() -> None:
                self._closed = True

            self._order(do)
            self._thread.join(_SECONDS)
            assert not self._thread.is_alive(), "the proxy's thread did not end"

    def _order(self, order: Callable[[], None]) -> None:
        done = threading.Event()

        def do() -> None:
            order()
            done.set()

        self._orders.append(do)
        self._mouth.send(b"!")
        assert done.wait(_SECONDS), "the proxy does not do what it is told"

    # The thread

    def _run(self) -> None:
        try:
            while not self._closed:
                self._turn()
        finally:
            self._deafen()
            self._cut()
            self._ear.close()
            self._mouth.close()

    def _turn(self) -> None:
        now = time.monotonic()
        pipes = [pipe for connection in self._connections for pipe in connection.pipes]
        sources = {pipe.source: pipe for pipe in pipes if self._may_take(pipe)}
        sinks = {pipe.sink: pipe for pipe in pipes if self._is_due(pipe, now)}
        later = [pipe.chunks[0][0] - now for pipe in pipes if pipe.chunks and pipe.chunks[0][0] > now]
        listening = [self._listener] if self._listener is not None else []
        readable, writable, _ = select.select([self._ear, *listening, *sources], list(sinks), [], min([*later, 1.0]))
        for sink in writable:
            self._give(sinks[sink])
        for source in readable:
            if source is self._ear:
                continue
            if source is self._listener:
                self._accept()
            elif source.fileno() >= 0:  # else it was closed just now
                self._take(sources[source])
        for connection in [*self._connections]:
            if any(pipe.ended and not pipe.chunks for pipe in connection.pipes):
                self._end(connection)
        if self._ear in readable:
            self._ear.recv(_CHUNK)
            while self._orders:
                self._orders.popleft()()

    def _may_take(self, pipe: _Pipe) -> bool:
        return not pipe.ended and pipe.held < _HELD and self._flows(pipe)

    def _is_due(self, pipe: _Pipe, now: float) -> bool:
        return bool(pipe.chunks) and pipe.chunks[0][0] <= now and self._flows(pipe)

    def _flows(self, pipe: _Pipe) -> bool:
        return not pipe.stranded and pipe.way not in self._stalled

    def _take(self, pipe: _Pipe) -> None:
        try:
            data = pipe.source.recv(min(_CHUNK, max(self._rate // 20, 1)) if self._rate else _CHUNK)
        except OSError:
            data = b""
        if not data:
            pipe.ended = True
        elif pipe.way in self._dropping or pipe.lame:
            pipe.lame = True
        else:
            pipe.add(self._due(pipe.way, len(data)), self._corrupted(pipe.way, data))

    def _due(self, way: Way, length: int) -> float:
        due = time.monotonic() + self._delay
        if self._rate:
            self._free_at[way] = due = max(due, self._free_at[way]) + length / self._rate
        return due

    def _corrupted(self, way: Way, data: bytes) -> bytes:
        after = self._corrupt_after.get(way)
        if after is None:
            return data
        if after >= len(data):
            self._corrupt_after[way] = after - len(data)
            return data
        del self._corrupt_after[way]
        return data[:after] + bytes((data[after] ^ 0x10,)) + data[after + 1 :]

    def _give(self, pipe: _Pipe) -> None:
        if pipe.sink.fileno() < 0:
            return
        due, data = pipe.chunks.popleft()
        pipe.held -= len(data)
        left = self._cut_after.get(pipe.way)
        try:
            count = pipe.sink.send(data if left is None else data[:left]) if left != 0 else 0
        except BlockingIOError:
            count = 0
        except OSError:
            pipe.ended = True
            pipe.chunks.clear()
            return
        if count < len(data):
            pipe.chunks.appendleft((due, data[count:]))
            pipe.held += len(data) - count
        self._carried[pipe.way] += count
        if left is not None:
            self._cut_after[pipe.way] = left - count
            if left == count:
                del self._cut_after[pipe.way]
                self._cut()

    def _accept(self) -> None:
        assert self._listener is not None
        client, _ = self._listener.accept()
        server = socket.socket(socket.AF_UNIX)
        server.setblocking(False)
        client.setblocking(False)
        try:
            server.connect(os.fspath(self._server))
        except OSError:  # nobody is there
            client.close()
            server.close()
            return
        self._accepted += 1
        self._connections.append(_Connection(client, server))

    def _end(self, connection: _Connection) -> None:
        self._connections.remove(connection)
        connection.close()

    def _cut(self) -> None:
        for connection in [*self._connections]:
            self._end(connection)

    def _strand(self, stranded: bool) -> None:
        for connection in self._connections:
            for pipe in connection.pipes:
                pipe.stranded = stranded

    def _listen(self) -> None:
        if self._listener is None:
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(os.fspath(self.path))
            self._listener.listen()

    def _deafen(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None
            with contextlib.suppress(FileNotFoundError):
                self.path.unlink()


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[Proxy]:
    """From ``p.sock`` to ``s.sock``, where :class:`harness.Sides` has its secondary listen."""
    made = Proxy(tmp_path / "p.sock", tmp_path / "s.sock")
    yield made
    made.close()
