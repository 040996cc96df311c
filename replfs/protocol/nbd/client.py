"""The client's side of NBD, without I/O: bytes from a server go in, values and bytes for the server come out.

A connection is first a :class:`Negotiation`, then a :class:`Transmission`. A server is not trusted: nothing that it announces is
allocated beyond what was asked of it, and whatever breaks the protocol raises :class:`~.wire.ProtocolError`, after which the
connection is of no use. :class:`Refused` is different: the server keeps to the protocol and says no.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any, Final, Generic, TypeVar

from replfs.block.node import Extent, merge
from replfs.errors import printable
from replfs.protocol.nbd import wire
from replfs.protocol.nbd.wire import Fields, ProtocolError

_MAX_OPTION_REPLY: Final = 64 << 10  # bytes of one option reply's data
_MAX_OPTION_REPLIES: Final = 1000  # of one handshake
_MAX_ERROR_CHUNK: Final = 64 << 10  # bytes of an error chunk's payload
_TOO_SIMPLE: Final = "the server sent a simple reply where only a structured one will do"
_MAX_DESCRIPTORS: Final = 1 << 20  # "Structured reply types": servers should not send more in a chunk


class Refused(Exception):
    """The server will not serve the export. The text is one line for people."""


@dataclass
class ExportInfo:
    """What the server says of the export, sizes in bytes. ``allocation`` is the context ID of base:allocation, if it has that."""

    size: int = -1
    flags: int = 0
    minimum_block: int = 1
    maximum_payload: int = wire.MAX_PAYLOAD
    structured: bool = False
    allocation: int | None = None

    def has(self, flag: int) -> bool:
        return bool(self.flags & flag)


_REFUSALS: Final = {
    wire.NBD_REP_ERR_UNKNOWN: "the server has no export of that name",
    wire.NBD_REP_ERR_POLICY: "the server's policy forbids it",
    wire.NBD_REP_ERR_TLS_REQD: "the server requires TLS, which is not supported by this release",
    wire.NBD_REP_ERR_SHUTDOWN: "the server is shutting down",
}


class Negotiation:
    """Option haggling for one export: structured replies, base:allocation, then NBD_OPT_GO, or NBD_OPT_EXPORT_NAME without GO.

    ``done`` becomes true when the transmission begins; then ``info`` is complete, and ``rest`` has what came behind.
    """

    def __init__(self, export: str) -> None:
        self.done = False
        self.info = ExportInfo()
        self.rest = b""
        self._name = export.encode()
        self._buffer = bytearray()
        self._step: Callable[[], bytes | None] = self._greeting
        self._option = 0  # the one that is under way
        self._replies = 0
        self._no_zeroes = False

    def receive(self, data: bytes) -> bytes:
        """Take bytes from the server; returns those to send to it."""
        self._buffer += data
        answers = []
        while not self.done and (answer := self._step()) is not None:
            answers.append(answer)
        return b"".join(answers)

    def leave(self) -> bytes:
        """What is sent to leave politely instead of going on, in front of closing the connection."""
        if self.done:
            return wire.REQUEST.pack(wire.NBD_REQUEST_MAGIC, 0, wire.NBD_CMD_DISC, 0, 0, 0)
        return self._request(wire.NBD_OPT_ABORT)

    @property
    def asked_by_name_only(self) -> bool:
        """Whether the server can only refuse by closing the connection."""
        return self._option == wire.NBD_OPT_EXPORT_NAME

    def _take(self, length: int) -> bytes:
        taken = bytes(self._buffer[:length])
        del self._buffer[:length]
        return taken

    def _request(self, option: int, data: bytes = b"") -> bytes:
        self._option = option
        return wire.OPTION.pack(wire.NBD_IHAVEOPT, option, len(data)) + data

    def _greeting(self) -> bytes | None:
        if len(self._buffer) < wire.GREETING.size:
            return None
        magic, option_magic, flags = wire.GREETING.unpack(self._take(wire.GREETING.size))
        if magic != wire.NBD_MAGIC:
            raise ProtocolError("it is not an NBD server")
        if option_magic == wire.NBD_OLDSTYLE_MAGIC:
            raise ProtocolError("the server speaks only the oldstyle NBD negotiation")
        if option_magic != wire.NBD_IHAVEOPT:
            raise ProtocolError("the server's greeting is not one of NBD")
        client_flags = 0
        if flags & wire.NBD_FLAG_NO_ZEROES:
            self._no_zeroes = True
            client_flags |= wire.NBD_FLAG_C_NO_ZEROES
        if not flags & wire.NBD_FLAG_FIXED_NEWSTYLE:  # EXPORT_NAME is the only option there is
            return wire.CLIENT_FLAGS.pack(client_flags) + self._ask_by_name()
        self._step = self._option_reply
        client_flags |= wire.NBD_FLAG_C_FIXED_NEWSTYLE
        return wire.CLIENT_FLAGS.pack(client_flags) + self._request(wire.NBD_OPT_STRUCTURED_REPLY)

    def _ask_for_allocation(self) -> bytes:
        data = wire.LENGTH.pack(len(self._name)) + self._name
        data += wire.LENGTH.pack(1) + wire.LENGTH.pack(len(wire.BASE_ALLOCATION)) + wire.BASE_ALLOCATION
        return self._request(wire.NBD_OPT_SET_META_CONTEXT, data)

    def _ask_to_go(self) -> bytes:
        data = (
            wire.LENGTH.pack(len(self._name)) + self._name + wire.INFO_TYPE.pack(1) + wire.INFO_TYPE.pack(wire.NBD_INFO_BLOCK_SIZE)
        )
        return self._request(wire.NBD_OPT_GO, data)

    def _ask_by_name(self) -> bytes:
        self._step = self._export_name_reply
        return self._request(wire.NBD_OPT_EXPORT_NAME, self._name)

    def _export_name_reply(self) -> bytes | None:
        length = wire.EXPORT_NAME_REPLY.size + (0 if self._no_zeroes else wire.EXPORT_NAME_PADDING)
        if len(self._buffer) < length:
            return None
        self.info.size, self.info.flags = wire.EXPORT_NAME_REPLY.unpack_from(self._take(length))
        return self._begin_transmission()

    def _option_reply(self) -> bytes | None:
        if len(self._buffer) < wire.OPTION_REPLY.size:
            return None
        magic, option, kind, length = wire.OPTION_REPLY.unpack_from(self._buffer)
        if magic != wire.NBD_OPTION_REPLY_MAGIC or option != self._option:
            raise ProtocolError("the server sent something else than the reply to an option")
        if length > _MAX_OPTION_REPLY:
            raise ProtocolError(f"the server announced an option reply of {length} bytes")
        if len(self._buffer) < wire.OPTION_REPLY.size + length:
            return None
        self._replies += 1
        if self._replies > _MAX_OPTION_REPLIES:
            raise ProtocolError(f"the server sent more than {_MAX_OPTION_REPLIES} option replies")
        data = self._take(wire.OPTION_REPLY.size + length)[wire.OPTION_REPLY.size :]
        handler = _OPTION_REPLIES.get((option, wire.NBD_REP_ERR if kind & wire.NBD_REP_ERR else kind))
        if handler is None:
            raise ProtocolError(f"the server sent an option reply of type {kind:#x} where that has no meaning")
        return handler(self, kind, data)

    def _structured_agreed(self, kind: int, data: bytes) -> bytes:
        self.info.structured = True
        return self._ask_for_allocation()

    def _structured_refused(self, kind: int, data: bytes) -> bytes:
        return self._ask_to_go()

    def _context(self, kind: int, data: bytes) -> bytes:
        fields = Fields(data)
        (context,) = fields.unpack(wire.LENGTH)
        if fields.rest() != wire.BASE_ALLOCATION:
            raise ProtocolError("the server selected a metadata context that was not asked for")
        self.info.allocation = context
        return b""

    def _contexts_agreed(self, kind: int, data: bytes) -> bytes:
        return self._ask_to_go()

    def _contexts_refused(self, kind: int, data: bytes) -> bytes:
        self.info.allocation = None  # what came before the error does not count
        return self._ask_to_go()

    def _information(self, kind: int, data: bytes) -> bytes:
        fields = Fields(data)
        (information,) = fields.unpack(wire.INFO_TYPE)
        layout = {wire.NBD_INFO_EXPORT: wire.INFO_EXPORT, wire.NBD_INFO_BLOCK_SIZE: wire.INFO_BLOCK_SIZE}.get(information)
        if layout is None:
            return b""
        if len(data) != layout.size:
            raise ProtocolError("the server described the export with a message of the wrong length")
        if information == wire.NBD_INFO_EXPORT:
            _, self.info.size, self.info.flags = layout.unpack(data)
        else:
            _, self.info.minimum_block, _, self.info.maximum_payload = layout.unpack(data)
        return b""

    def _go(self, kind: int, data: bytes) -> bytes:
        return self._begin_transmission()

    def _go_refused(self, kind: int, data: bytes) -> bytes:
        if kind == wire.NBD_REP_ERR_UNSUP:
            return self._ask_by_name()
        reason = _REFUSALS.get(kind, f"the server refused it with option reply {kind:#x}")
        message = printable(data.decode("utf-8", "replace"))
        raise Refused(f"{reason} (it says: {message})" if message else reason)

    def _begin_transmission(self) -> bytes:
        info = self.info
        if not 0 <= info.size < 1 << 63:
            raise ProtocolError("the server did not tell the export's size" if info.size < 0 else "the export's size is absurd")
        if info.minimum_block not in (1 << shift for shift in range(17)) or info.maximum_payload < info.minimum_block:
            raise ProtocolError("the server's size constraints are not valid")
        info.maximum_payload = min(info.maximum_payload, wire.MAX_PAYLOAD)
        self.done = True
        self.rest = self._take(len(self._buffer))
        return b""


class PeerNegotiation:
    """Ask a server to go on as :mod:`replfs.protocol.peer` has it, for one export.

    ``done`` becomes true when it has answered: then ``agreed`` says what, and ``rest`` has what came behind. ``greeted``:
    whether it is an NBD server at all.
    """

    def __init__(self, export: str) -> None:
        self.done = False
        self.agreed = False
        self.rest = b""
        self._name = export.encode()
        self._buffer = bytearray()
        self.greeted = False

    def receive(self, data: bytes) -> bytes:
        """Take bytes from the server; returns those to send to it. Raises ProtocolError, Refused."""
        self._buffer += data
        if not self.greeted:
            if len(self._buffer) < wire.GREETING.size:
                return b""
            magic, option_magic, flags = wire.GREETING.unpack_from(self._buffer)
            if magic != wire.NBD_MAGIC:
                raise ProtocolError("it is not an NBD server")
            if option_magic not in (wire.NBD_IHAVEOPT, wire.NBD_OLDSTYLE_MAGIC):
                raise ProtocolError("the server's greeting is not one of NBD")
            del self._buffer[: wire.GREETING.size]
            self.greeted = True
            if option_magic != wire.NBD_IHAVEOPT or not flags & wire.NBD_FLAG_FIXED_NEWSTYLE:
                self.done = True
                return b""
            return (
                wire.CLIENT_FLAGS.pack(wire.NBD_FLAG_C_FIXED_NEWSTYLE)
                + wire.OPTION.pack(wire.NBD_IHAVEOPT, wire.NBD_OPT_REPLFS, len(self._name))
                + self._name
            )
        if len(self._buffer) >= wire.OPTION_REPLY.size:
            magic, option, kind, length = wire.OPTION_REPLY.unpack_from(self._buffer)
            if magic != wire.NBD_OPTION_REPLY_MAGIC or option != wire.NBD_OPT_REPLFS or length > _MAX_OPTION_REPLY:
                raise ProtocolError("the server sent something else than the reply to an option")
            if len(self._buffer) >= wire.OPTION_REPLY.size + length:
                if kind not in (wire.NBD_REP_ACK, wire.NBD_REP_ERR_UNSUP):
                    raise Refused(_REFUSALS.get(kind, f"the server refused it with option reply {kind:#x}"))
                self.done = True
                self.agreed = kind == wire.NBD_REP_ACK
                self.rest = bytes(self._buffer[wire.OPTION_REPLY.size + length :])
        return b""


_OPTION_REPLIES: Final[dict[tuple[int, int], Callable[[Negotiation, int, bytes], bytes]]] = {
    (wire.NBD_OPT_STRUCTURED_REPLY, wire.NBD_REP_ACK): Negotiation._structured_agreed,
    (wire.NBD_OPT_STRUCTURED_REPLY, wire.NBD_REP_ERR): Negotiation._structured_refused,
    (wire.NBD_OPT_SET_META_CONTEXT, wire.NBD_REP_META_CONTEXT): Negotiation._context,
    (wire.NBD_OPT_SET_META_CONTEXT, wire.NBD_REP_ACK): Negotiation._contexts_agreed,
    (wire.NBD_OPT_SET_META_CONTEXT, wire.NBD_REP_ERR): Negotiation._contexts_refused,
    (wire.NBD_OPT_GO, wire.NBD_REP_INFO): Negotiation._information,
    (wire.NBD_OPT_GO, wire.NBD_REP_ACK): Negotiation._go,
    (wire.NBD_OPT_GO, wire.NBD_REP_ERR): Negotiation._go_refused,
}
"""Option under way and reply type (NBD_REP_ERR stands for every error) to what is done; each returns what is sent next."""


class Command:
    """A request that is sent, and what became of it: whoever makes it, perhaps of a class of their own, gets it back.

    Once it is replied to: ``error`` is an NBD error value, ``message`` the server's words for it. What a READ gave is in ``data``,
    what a BLOCK_STATUS gave in ``extents``: neither empty nor longer than asked, if there is no error. Others have neither.
    """

    __slots__ = ("cookie", "data", "error", "extents", "flags", "kind", "length", "message", "missing", "offset")

    def __init__(self, kind: int, offset: int, length: int, flags: int = 0) -> None:
        self.kind = kind
        self.flags = flags
        self.offset = offset
        self.length = length
        self.cookie = 0
        self.error = wire.NBD_SUCCESS
        self.message = ""
        if kind == wire.NBD_CMD_READ:
            self.data = bytearray()
            self.missing = length  # bytes that have not come
        elif kind == wire.NBD_CMD_BLOCK_STATUS:
            self.extents: list[Extent] = []


Kept = TypeVar("Kept", bound=Command)


class Transmission(Generic[Kept]):
    """The transmission phase of one connection: requests into bytes, and replies out of bytes."""

    def __init__(self, info: ExportInfo) -> None:
        self.pending: dict[int, Kept] = {}
        """Those without their final reply, by cookie, in the order they were begun."""
        self._info = info
        self._buffer = bytearray()
        self._cookies = count(1)

    def begin(self, command: Kept) -> bytes:
        """The header to send; a WRITE's data follows it. It must be sent, or :meth:`forget` it."""
        command.cookie = cookie = next(self._cookies)
        self.pending[cookie] = command
        return wire.REQUEST.pack(wire.NBD_REQUEST_MAGIC, command.flags, command.kind, cookie, command.offset, command.length)

    def forget(self, command: Kept) -> None:
        """It was never sent."""
        del self.pending[command.cookie]

    def receive(self, data: bytes) -> Iterator[Kept]:
        """Take bytes from the server; gives the commands whose replies they complete, and all of those before it raises."""
        buffer, header = self._buffer, wire.SIMPLE_REPLY
        buffer += data
        position = 0
        done: Kept | None
        while len(buffer) - position >= header.size:
            magic, error, cookie = header.unpack_from(buffer, position)
            if magic == wire.NBD_SIMPLE_REPLY_MAGIC:
                command = done = self._find(cookie)
                length = self._simple(command, error, position)
            elif magic == wire.NBD_STRUCTURED_REPLY_MAGIC and self._info.structured:
                length, done = self._chunk(position)
            else:
                raise ProtocolError(f"the server sent {magic:#x} where a reply begins")
            if not length:
                break
            position += length
            if done is not None:
                del self.pending[done.cookie]
                yield done
        del buffer[:position]

    def _simple(self, command: Kept, error: int, start: int) -> int:
        """Deal with the simple reply that starts there, if all of it has arrived; returns its length or 0."""
        length: int = wire.SIMPLE_REPLY.size
        if command.kind == wire.NBD_CMD_READ:
            if self._info.structured:
                raise ProtocolError(_TOO_SIMPLE)
            if not error:
                length += command.length
                if len(self._buffer) - start < length:
                    return 0
                command.data = self._buffer[start + wire.SIMPLE_REPLY.size : start + length]
        elif command.kind == wire.NBD_CMD_BLOCK_STATUS and not error:
            raise ProtocolError(_TOO_SIMPLE)
        if error:
            command.error = _known(error)
        return length

    def _chunk(self, start: int) -> tuple[int, Kept | None]:
        """The same for a chunk of a structured reply; also gives the command, if it is the last one."""
        buffer = self._buffer
        if len(buffer) - start < wire.CHUNK.size:
            return 0, None
        _, flags, kind, cookie, length = wire.CHUNK.unpack_from(buffer, start)
        command = self._find(cookie)
        handler = _error_chunk if kind & wire.NBD_REPLY_TYPE_ERR else _CHUNKS.get((command.kind, kind), _CHUNKS.get((None, kind)))
        if handler is None:
            raise ProtocolError(f"the server sent a reply chunk of type {kind} where that has no meaning")
        if length > _longest_payload(command, kind):
            raise ProtocolError(f"the server announced a reply chunk of {length} bytes")
        start += wire.CHUNK.size
        if len(buffer) - start < length:
            return 0, None
        handler(self, command, bytes(memoryview(buffer)[start : start + length]))
        last = bool(flags & wire.NBD_REPLY_FLAG_DONE)
        if last:
            self._check_complete(command)
        elif kind == wire.NBD_REPLY_TYPE_NONE:
            raise ProtocolError("the server sent an empty chunk that is not the last of its reply")
        return wire.CHUNK.size + length, command if last else None

    def _find(self, cookie: int) -> Kept:
        command = self.pending.get(cookie)
        if command is None:
            raise ProtocolError("the server replied to a request that was not made")
        return command

    def _check_complete(self, command: Command) -> None:
        if command.error:
            return
        if command.kind == wire.NBD_CMD_READ and command.missing:
            raise ProtocolError("the server called a read done without all of its data")
        if command.kind == wire.NBD_CMD_BLOCK_STATUS and not command.extents:
            raise ProtocolError("the server called a block status done without one")

    def _place(self, command: Command, offset: int, length: int) -> int:
        """Account for ``length`` bytes that a READ has got at ``offset``; returns where they go in its data."""
        position = offset - command.offset
        if not 0 < length <= command.missing or position < 0 or position + length > command.length:
            raise ProtocolError("the server sent data outside of what was asked for")
        if not command.data:
            command.data = bytearray(command.length)
        command.missing -= length
        return position

    def _none(self, command: Command, payload: bytes) -> None:
        if payload:
            raise ProtocolError("the server sent a payload in an empty chunk")

    def _data(self, command: Command, payload: bytes) -> None:
        (offset,) = Fields(payload).unpack(wire.OFFSET)
        data = memoryview(payload)[wire.OFFSET.size :]
        position = self._place(command, offset, len(data))
        command.data[position : position + len(data)] = data

    def _hole(self, command: Command, payload: bytes) -> None:
        offset, length = Fields(payload).unpack(wire.OFFSET_HOLE)
        self._place(command, offset, length)  # where there are zeroes already

    def _status(self, command: Command, payload: bytes) -> None:
        (context,) = Fields(payload).unpack(wire.LENGTH)
        descriptors = payload[wire.LENGTH.size :]
        if context != self._info.allocation or command.extents or not descriptors or len(descriptors) % wire.DESCRIPTOR.size:
            raise ProtocolError("the server sent a block status that was not asked for")
        left = command.length
        for length, flags in wire.DESCRIPTOR.iter_unpack(descriptors):
            if not length:
                raise ProtocolError("the server sent an extent of no bytes")
            # the last extent may reach beyond what was asked for
            extent = Extent(min(length, left), bool(flags & wire.NBD_STATE_HOLE), bool(flags & wire.NBD_STATE_ZERO))
            merge(command.extents, extent)
            left -= extent.length


def _error_chunk(_: object, command: Command, payload: bytes) -> None:
    fields = Fields(payload)
    error, length = fields.unpack(wire.ERROR)
    message = fields.take(length)
    if not error:
        raise ProtocolError("the server sent an error chunk without an error")
    command.error = _known(error)
    command.message = printable(message.decode("utf-8", "replace"))


_CHUNKS: Final[dict[tuple[int | None, int], Callable[[Any, Any, bytes], None]]] = {
    (None, wire.NBD_REPLY_TYPE_NONE): Transmission._none,
    (wire.NBD_CMD_READ, wire.NBD_REPLY_TYPE_OFFSET_DATA): Transmission._data,
    (wire.NBD_CMD_READ, wire.NBD_REPLY_TYPE_OFFSET_HOLE): Transmission._hole,
    (wire.NBD_CMD_BLOCK_STATUS, wire.NBD_REPLY_TYPE_BLOCK_STATUS): Transmission._status,
}
"""Command type (None: any) and chunk type to what is done with the payload. Error chunks may answer every command."""


def _longest_payload(command: Command, kind: int) -> int:
    if kind == wire.NBD_REPLY_TYPE_OFFSET_DATA:
        return wire.OFFSET.size + command.missing
    if kind == wire.NBD_REPLY_TYPE_BLOCK_STATUS:
        return wire.LENGTH.size + wire.DESCRIPTOR.size * _MAX_DESCRIPTORS
    return _MAX_ERROR_CHUNK


def _known(error: int) -> int:
    """ "Error values": an unexpected one is to be taken as NBD_EINVAL."""
    return error if error == wire.NBD_SUCCESS or error in wire.ERRNO_OF_ERROR else wire.NBD_EINVAL
