"""The QMP server: QEMU's machine protocol as one more face of the control operations, with no logic of its own.

Owns its listening sockets and its connections. What commands mean is :mod:`replfs.export.qmp_commands`' matter, what the bytes
are :mod:`replfs.protocol.qmp`'s. Nothing that a client does can raise out of it, or take more than a bounded amount of memory: one
that does not read what it is told is disconnected.

Guarding rule: a connection's commands are carried out one after the other; what it is sent, answers and events alike, is queued in
``_Connection.tell``, which does not suspend, and sent by one task.
"""

import logging
from collections.abc import Callable
from typing import Any, Final

import trio

from replfs.errors import ReplfsError
from replfs.export import qmp_commands
from replfs.export.listeners import Listeners
from replfs.protocol import qmp
from replfs.protocol.nbd.uri import Address
from replfs.protocol.qmp import Command, Messages, QmpError, TooLong
from replfs.volume.base import Volume
from replfs.volume.events import Event

logger = logging.getLogger(__name__)

MAX_CONNECTIONS: Final = 16
MAX_UNSENT: Final = 1 << 20
"""Bytes that one connection may have left unread, beyond what the kernel keeps for it."""

_PATIENCE: Final = 1.0  # seconds that clients have to take the last event
_RECEIVE_SIZE: Final = 4096  # bytes, that are looked at one by one
_CAPABILITIES: Final = "qmp_capabilities"
_GONE: Final = (trio.BrokenResourceError, trio.ClosedResourceError)


class QmpServer:
    """Controls ``volume``, which may be replaced by another one that has taken its place."""

    def __init__(self, volume: Volume, quit_service: Callable[[], None]) -> None:
        """``quit_service`` ends the process in good order; it returns at once."""
        self.volume = volume
        self.quit_service = quit_service
        self._listeners = Listeners("--qmp")
        self._connections: set[_Connection] = set()

    @property
    def connections(self) -> int:
        """How many clients are connected."""
        return len(self._connections)

    async def listen(self, address: Address) -> Address:
        """As :meth:`replfs.export.listeners.Listeners.bind`."""
        return await self._listeners.bind(address)

    async def serve(self) -> None:
        """Serve until cancelled."""
        with self.volume.events.told_to(self._tell_all):
            async with trio.open_nursery() as nursery:
                await self._listeners.serve(self._serve_connection, nursery)

    async def close(self) -> None:
        """Let go of the address, where :meth:`serve` was never called."""
        await self._listeners.close()

    async def shut_down(self, reason: str) -> None:
        """Tell that the process is about to end; clients that read are told before this returns."""
        self._send_all(qmp.event("SHUTDOWN", {"guest": False, "reason": reason}))
        with trio.move_on_after(_PATIENCE):
            for connection in list(self._connections):
                await connection.sent()

    def _tell_all(self, event: Event) -> None:
        for name, data in qmp_commands.events(self.volume, event):
            self._send_all(qmp.event(name, data))

    def _send_all(self, message: bytes) -> None:
        for connection in self._connections:
            if connection.negotiated:
                connection.tell(message)

    async def _serve_connection(self, stream: trio.SocketStream) -> None:
        if len(self._connections) >= MAX_CONNECTIONS:
            logger.warning("there are %d QMP connections already: one more is turned away", MAX_CONNECTIONS)
            stream.socket.close()
            return
        connection = _Connection(self, stream)
        self._connections.add(connection)
        try:
            await connection.serve()
        except Exception:
            logger.exception("a QMP client is disconnected because of an unexpected error")
        finally:
            self._connections.remove(connection)
            stream.socket.close()


class _Connection:
    """One client."""

    def __init__(self, server: QmpServer, stream: trio.SocketStream) -> None:
        self.negotiated = False
        self._server = server
        self._stream = stream
        self._unsent = bytearray()
        self._something = trio.Event()
        self._sending = False
        self._idle = trio.lowlevel.ParkingLot()  # until nothing is left to be sent
        self._scope = trio.CancelScope()

    def tell(self, message: bytes) -> None:
        """Have it sent. Never suspends; a client that has left too much unread is disconnected."""
        self._unsent += message
        self._something.set()
        if len(self._unsent) > MAX_UNSENT:
            logger.warning("a QMP client that does not read is disconnected")
            self._scope.cancel()

    async def serve(self) -> None:
        with self._scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._send)
                self.tell(qmp.greeting())
                await self._receive()
                nursery.cancel_scope.cancel()

    async def _send(self) -> None:
        try:
            while True:
                await self._something.wait()
                message, self._unsent, self._something = bytes(self._unsent), bytearray(), trio.Event()
                self._sending = True
                await self._stream.send_all(message)
                self._sending = False
                self._idle.unpark_all()
        except _GONE:
            self._scope.cancel()

    async def sent(self) -> None:
        """Wait until the kernel has all of it."""
        while self._unsent or self._sending:
            await self._idle.park()

    async def _receive(self) -> None:
        messages = Messages()
        try:
            while data := await self._stream.receive_some(_RECEIVE_SIZE):
                for message in messages.receive(data):
                    await self._answer(message)
        except _GONE:
            pass
        except TooLong:
            logger.warning("a QMP client is disconnected: it sent more than %d bytes as one command", qmp.MAX_MESSAGE)

    async def _answer(self, message: bytes) -> None:
        identity: list[Any] = []
        try:
            command = qmp.parse(message)
            identity = command.identity
            answer = await self._carry_out(command)
        except QmpError as error:
            self.tell(qmp.refused(error, identity or error.identity))
        except (OSError, ReplfsError) as error:
            self.tell(qmp.refused(QmpError(str(error.strerror if isinstance(error, OSError) else error)), identity))
        except Exception:
            logger.exception("a QMP command failed")
            self.tell(qmp.refused(QmpError("unexpected error, see the log"), identity))
        else:
            self.tell(qmp.returned(answer, identity))
            if command.name == "quit":
                self._server.quit_service()

    async def _carry_out(self, command: Command) -> Any:
        if command.name == _CAPABILITIES:
            if self.negotiated:
                raise QmpError("Capabilities negotiation is already complete, command ignored", "CommandNotFound")
            for capability in command.arguments.get("enable", []):
                raise QmpError(f"Capability {str(capability)[:60]!r} is not available")
            self.negotiated = True
            return {}
        if not self.negotiated:
            raise QmpError(f"Expecting capabilities negotiation with '{_CAPABILITIES}'", "CommandNotFound")
        return await qmp_commands.carry_out(self._server.volume, command)
