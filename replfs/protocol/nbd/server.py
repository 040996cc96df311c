"""The server's side of NBD, without I/O: bytes from a client go in, values and bytes for the client come out.

A connection is first a :class:`Handshake` (fixed newstyle negotiation), then a :class:`Transmission`. Both take bytes however
the network has cut them and give the same for every cut. What a client merely announces is never allocated: buffers grow with
the bytes that arrive, up to ``MAX_OPTION`` bytes in the handshake and ``MAX_PAYLOAD`` in the transmission.

A client that breaks the protocol gets the answers to what it sent before; then ``reason`` says why the connection ends.

TLS is not spoken: ``NBD_OPT_STARTTLS`` is one of the options that are answered with ``NBD_REP_ERR_UNSUP``.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final, NamedTuple

from replfs.block.node import Data, Extent
from replfs.errors import printable
from replfs.protocol.nbd import wire
from replfs.protocol.nbd.wire import Fields, ProtocolError, Request

MAX_OPTION: Final = 64 << 10
"""The most bytes of an option's data; a client that announces more is cut off."""

MAX_OPTIONS: Final = 1000
"""The most options of one handshake."""

GREETING: Final = wire.GREETING.pack(wire.NBD_MAGIC, wire.NBD_IHAVEOPT, wire.NBD_FLAG_FIXED_NEWSTYLE | wire.NBD_FLAG_NO_ZEROES)
"""What a server sends first."""

_CONTEXT_ID: Final = 1  # of base:allocation, the only metadata context there is


@dataclass(frozen=True)
class Export:
    """What a connection is shown. ``size`` is in bytes. The empty name is answered as ``name`` is."""

    name: str
    size: int
    read_only: bool

    def answers_to(self, name: bytes) -> bool:
        return name in (b"", self.name.encode())

    def flags(self, structured: bool) -> int:
        """The transmission flags. Every connection reaches the same node, so one's flush covers all (CAN_MULTI_CONN)."""
        flags = wire.NBD_FLAG_HAS_FLAGS | wire.NBD_FLAG_SEND_FLUSH | wire.NBD_FLAG_SEND_FUA | wire.NBD_FLAG_CAN_MULTI_CONN
        flags |= wire.NBD_FLAG_READ_ONLY if self.read_only else wire.NBD_FLAG_SEND_TRIM | wire.NBD_FLAG_SEND_WRITE_ZEROES
        return flags | (wire.NBD_FLAG_SEND_DF if structured else 0)


class Phase(Enum):
    """Where a handshake is; it only moves downwards."""

    CLIENT_FLAGS = auto()
    OPTIONS = auto()
    TRANSMISSION = auto()
    PEER = auto()
    CLOSED = auto()


class Handshake:
    """The option haggling of one connection, from behind :data:`GREETING` to ``Phase.TRANSMISSION``, ``PEER`` or ``CLOSED``.

    ``reason`` is why it was closed; it is empty when the client asked for that. What the client sent behind the option that
    began the transmission is in ``rest``.
    """

    def __init__(self, export: Export, *, peers: bool = False) -> None:
        """``peers``: whether a primary may go on as :mod:`replfs.protocol.peer` has it."""
        self.phase = Phase.CLIENT_FLAGS
        self._peers = peers
        self.reason = ""
        self.rest = b""
        self._export = export
        self._buffer = bytearray()
        self._options = 0
        self._padding = wire.EXPORT_NAME_PADDING
        self._structured = False
        self._allocation = False

    def transmission(self) -> "Transmission":
        """The transmission phase as it was negotiated."""
        return Transmission(self._export, self._structured, self._allocation)

    def receive(self, data: bytes) -> bytes:
        """Take bytes from the client; returns those to send to it."""
        self._buffer += data
        answers = []
        while (answer := _STEPS[self.phase](self)) is not None:
            answers.append(answer)
        return b"".join(answers)

    def _close(self, reason: str) -> bytes:
        self.phase = Phase.CLOSED
        self.reason = reason
        return b""

    def _take(self, length: int) -> bytes:
        taken = bytes(self._buffer[:length])
        del self._buffer[:length]
        return taken

    def _client_flags(self) -> bytes | None:
        if len(self._buffer) < wire.CLIENT_FLAGS.size:
            return None
        (flags,) = wire.CLIENT_FLAGS.unpack(self._take(wire.CLIENT_FLAGS.size))
        if flags & ~(wire.NBD_FLAG_C_FIXED_NEWSTYLE | wire.NBD_FLAG_C_NO_ZEROES):
            return self._close(f"it sent unknown client flags {flags:#x}")
        if flags & wire.NBD_FLAG_C_NO_ZEROES:
            self._padding = 0
        self.phase = Phase.OPTIONS
        return b""

    def _option(self) -> bytes | None:
        if len(self._buffer) < wire.OPTION.size:
            return None
        magic, option, length = wire.OPTION.unpack_from(self._buffer)
        if magic != wire.NBD_IHAVEOPT:
            return self._close(f"it sent {magic:#x} where an option begins")
        if length > MAX_OPTION:
            self._close(f"it announced an option of {length} bytes")
            return _reply(option, wire.NBD_REP_ERR_TOO_BIG)
        if len(self._buffer) < wire.OPTION.size + length:
            return None
        self._options += 1
        if self._options > MAX_OPTIONS:
            return self._close(f"it sent more than {MAX_OPTIONS} options")
        data = self._take(wire.OPTION.size + length)[wire.OPTION.size :]
        handler = _OPTIONS.get(option)
        if handler is None:
            return _reply(option, wire.NBD_REP_ERR_UNSUP)
        try:
            return handler(self, option, data)
        except ProtocolError as error:
            return _reply(option, wire.NBD_REP_ERR_INVALID, str(error).encode())

    def _begin_transmission(self) -> None:
        self._leave_options(Phase.TRANSMISSION)

    def _leave_options(self, phase: Phase) -> None:
        self.phase = phase
        self.rest = self._take(len(self._buffer))

    def _peer(self, option: int, data: bytes) -> bytes:
        if not self._peers:
            return _reply(option, wire.NBD_REP_ERR_UNSUP)
        if not self._export.answers_to(data):
            return _unknown(option, data)
        self._leave_options(Phase.PEER)
        return _reply(option, wire.NBD_REP_ACK)

    def _export_name(self, option: int, name: bytes) -> bytes:
        if not self._export.answers_to(name):
            return self._close(f"it asked for the export {_shown(name)}, which is not served here")
        self._begin_transmission()
        return wire.EXPORT_NAME_REPLY.pack(self._export.size, self._export.flags(self._structured)) + bytes(self._padding)

    def _abort(self, option: int, data: bytes) -> bytes:
        self._close("")
        return _reply(option, wire.NBD_REP_ACK)

    def _list(self, option: int, data: bytes) -> bytes:
        _expect_empty(data)
        name = self._export.name.encode()
        return _reply(option, wire.NBD_REP_SERVER, wire.LENGTH.pack(len(name)) + name) + _reply(option, wire.NBD_REP_ACK)

    def _info_or_go(self, option: int, data: bytes) -> bytes:
        fields = Fields(data)
        name = fields.string()
        (count,) = fields.unpack(wire.INFO_TYPE)
        wanted = {fields.unpack(wire.INFO_TYPE)[0] for _ in range(count)}
        _expect_empty(fields.rest())
        if not self._export.answers_to(name):
            return _unknown(option, name)
        flags = self._export.flags(self._structured)
        answer = _reply(option, wire.NBD_REP_INFO, wire.INFO_EXPORT.pack(wire.NBD_INFO_EXPORT, self._export.size, flags))
        if wire.NBD_INFO_BLOCK_SIZE in wanted:
            sizes = wire.INFO_BLOCK_SIZE.pack(wire.NBD_INFO_BLOCK_SIZE, 1, wire.DEFAULT_BLOCK_SIZE, wire.MAX_PAYLOAD)
            answer += _reply(option, wire.NBD_REP_INFO, sizes)
        if option == wire.NBD_OPT_GO:
            self._begin_transmission()
        return answer + _reply(option, wire.NBD_REP_ACK)

    def _structured_reply(self, option: int, data: bytes) -> bytes:
        _expect_empty(data)
        self._structured = True
        return _reply(option, wire.NBD_REP_ACK)

    def _meta_context(self, option: int, data: bytes) -> bytes:
        setting = option == wire.NBD_OPT_SET_META_CONTEXT
        if setting:
            self._allocation = False  # also when the option fails
        if not self._structured:
            raise ProtocolError("metadata contexts need structured replies to be negotiated first")
        fields = Fields(data)
        name = fields.string()
        (count,) = fields.unpack(wire.LENGTH)
        queries = {fields.string() for _ in range(count)}
        _expect_empty(fields.rest())
        if not self._export.answers_to(name):
            return _unknown(option, name)
        if setting:
            found = self._allocation = wire.BASE_ALLOCATION in queries
        else:
            found = not count or not queries.isdisjoint((wire.BASE_ALLOCATION, b"base:"))
        context = wire.LENGTH.pack(_CONTEXT_ID if setting else 0) + wire.BASE_ALLOCATION
        return (_reply(option, wire.NBD_REP_META_CONTEXT, context) if found else b"") + _reply(option, wire.NBD_REP_ACK)


_STEPS: Final[dict[Phase, Callable[[Handshake], bytes | None]]] = {
    Phase.CLIENT_FLAGS: Handshake._client_flags,
    Phase.OPTIONS: Handshake._option,
    Phase.TRANSMISSION: lambda _: None,
    Phase.PEER: lambda _: None,
    Phase.CLOSED: lambda _: None,
}
"""What is done with what has arrived: bytes to send, or None when more must arrive first."""

_OPTIONS: Final[dict[int, Callable[[Handshake, int, bytes], bytes]]] = {
    wire.NBD_OPT_EXPORT_NAME: Handshake._export_name,
    wire.NBD_OPT_ABORT: Handshake._abort,
    wire.NBD_OPT_LIST: Handshake._list,
    wire.NBD_OPT_INFO: Handshake._info_or_go,
    wire.NBD_OPT_GO: Handshake._info_or_go,
    wire.NBD_OPT_STRUCTURED_REPLY: Handshake._structured_reply,
    wire.NBD_OPT_LIST_META_CONTEXT: Handshake._meta_context,
    wire.NBD_OPT_SET_META_CONTEXT: Handshake._meta_context,
    wire.NBD_OPT_REPLFS: Handshake._peer,
}


def _reply(option: int, kind: int, data: bytes = b"") -> bytes:
    return wire.OPTION_REPLY.pack(wire.NBD_OPTION_REPLY_MAGIC, option, kind, len(data)) + data


def _unknown(option: int, name: bytes) -> bytes:
    return _reply(option, wire.NBD_REP_ERR_UNKNOWN, f"the export {_shown(name)} is not served here".encode())


def _shown(name: bytes) -> str:
    return f"'{printable(name.decode('utf-8', 'surrogateescape'))}'"


def _expect_empty(data: bytes) -> None:
    if data:
        raise ProtocolError("the option has more data than it may")


class Refusal(NamedTuple):
    """Why a request is not carried out: an NBD error value, and words for people."""

    error: int
    message: str


class _Rule(NamedTuple):
    """What a request of one type may be. ``outside`` is the error for a range that leaves the export."""

    flags: int
    lengths: range
    outside: int
    writes: bool


_ANY_LENGTH: Final = range(1 << 32)
_PAYLOAD: Final = range(wire.MAX_PAYLOAD + 1)

# "Values: Command flags" allows FUA on every command once it is negotiated. A BLOCK_STATUS of nothing would need a reply without
# a descriptor, which must not be sent; other requests of length 0 succeed and do nothing.
_RULES: Final = {
    wire.NBD_CMD_READ: _Rule(wire.NBD_CMD_FLAG_FUA, _PAYLOAD, wire.NBD_EINVAL, False),
    wire.NBD_CMD_WRITE: _Rule(wire.NBD_CMD_FLAG_FUA, _PAYLOAD, wire.NBD_ENOSPC, True),
    wire.NBD_CMD_FLUSH: _Rule(wire.NBD_CMD_FLAG_FUA, range(1), wire.NBD_EINVAL, False),
    wire.NBD_CMD_TRIM: _Rule(wire.NBD_CMD_FLAG_FUA, _ANY_LENGTH, wire.NBD_EINVAL, True),
    wire.NBD_CMD_WRITE_ZEROES: _Rule(wire.NBD_CMD_FLAG_FUA | wire.NBD_CMD_FLAG_NO_HOLE, _ANY_LENGTH, wire.NBD_ENOSPC, True),
}
_STRUCTURED_READ: Final = _RULES[wire.NBD_CMD_READ]._replace(flags=wire.NBD_CMD_FLAG_FUA | wire.NBD_CMD_FLAG_DF)
_BLOCK_STATUS: Final = _Rule(wire.NBD_CMD_FLAG_FUA | wire.NBD_CMD_FLAG_REQ_ONE, _ANY_LENGTH[1:], wire.NBD_EINVAL, False)


_STEP: Final = 1 << 20  # bytes of a payload that room is made for at first


class Transmission:
    """The transmission phase of one connection: requests out of bytes, and bytes out of what became of them.

    ``ended`` is true once nothing more is to be expected, after ``NBD_CMD_DISC`` or a broken protocol; then ``reason`` says what
    was broken.
    """

    def __init__(self, export: Export, structured: bool, allocation: bool) -> None:
        self.ended = False
        self.reason = ""
        self._export = export
        self._structured = structured
        self._rules = dict(_RULES)
        if structured:
            self._rules[wire.NBD_CMD_READ] = _STRUCTURED_READ
        if allocation:
            self._rules[wire.NBD_CMD_BLOCK_STATUS] = _BLOCK_STATUS
        self._header = b""  # the start of a request whose header has not arrived whole
        self._write: Request | None = None  # a WRITE whose payload has not arrived whole; its data is the bytearray to fill
        self.rest_of_payload = memoryview(b"")
        """What has not arrived of it, or a part of that. Who has put something there calls :meth:`received`."""

    def receive(self, data: bytes) -> list[Request]:
        """Take bytes from the client; returns the requests that they complete, each to be judged by :meth:`check`.

        The data of a WRITE may be a view of ``data``. A WRITE that is too large comes without its data, and ends the phase:
        what follows is its payload, which nobody wants to receive.
        """
        requests: list[Request] = []
        position = 0
        view = memoryview(data)
        if self._write is not None:
            while self._write is not None and position < len(data):
                count = min(len(self.rest_of_payload), len(data) - position)
                self.rest_of_payload[:count] = view[position : position + count]
                position += count
                requests += self.received(count)
            if self._write is not None:
                return requests
        elif self._header:
            data = self._header + data
            view = memoryview(data)
        end = len(data)
        while not self.ended and end - position >= wire.REQUEST.size:
            magic, flags, kind, cookie, offset, length = wire.REQUEST.unpack_from(data, position)
            position += wire.REQUEST.size
            payload: Data = b""  # not an empty view, which would keep all of what was received
            if magic != wire.NBD_REQUEST_MAGIC:
                self._end(f"it sent {magic:#x} where a request begins")
                break
            if kind == wire.NBD_CMD_DISC:
                self._end("")
                break
            if kind == wire.NBD_CMD_WRITE:
                if length > wire.MAX_PAYLOAD:
                    self._end(f"it announced a write of {length} bytes")
                elif end - position < length:
                    buffer = bytearray(min(length, max(_STEP, end - position)))
                    self._write = Request(flags, kind, cookie, offset, length, buffer)
                    self.rest_of_payload = memoryview(buffer)[end - position :]
                    buffer[: end - position] = view[position:]
                    position = end
                    break
                else:
                    payload = view[position : position + length]
                    position += length
            requests.append(Request(flags, kind, cookie, offset, length, payload))
        self._header = data[position:]
        return requests

    def received(self, count: int) -> list[Request]:
        """So many bytes were put into :attr:`rest_of_payload`; gives back the request, if that completes it."""
        self.rest_of_payload = self.rest_of_payload[count:]
        if self.rest_of_payload or self._write is None:
            return []
        request = self._write
        buffer, missing = request.data, request.length - len(request.data)
        if missing:  # twice as much room as what has arrived: an announcement alone is not to cost memory
            arrived = len(buffer)
            larger = bytearray(arrived + min(missing, arrived))
            larger[:arrived] = buffer
            self._write = request._replace(data=larger)
            self.rest_of_payload = memoryview(larger)[arrived:]
            return []
        self._write = None
        return [request]

    def _end(self, reason: str) -> None:
        self.ended = True
        self.reason = reason

    def check(self, request: Request) -> Refusal | None:
        """Whether the request may reach the node: its range lies within the export if it may."""
        rule = self._rules.get(request.type)
        if rule is None:
            return Refusal(wire.NBD_EINVAL, f"request type {request.type} is not supported or was not negotiated")
        if request.flags & ~rule.flags:
            return Refusal(wire.NBD_EINVAL, f"command flags {request.flags:#x} are not valid for this request")
        if request.length not in rule.lengths:
            return Refusal(wire.NBD_EINVAL, f"a length of {request.length} bytes is not valid for this request")
        if rule.writes and self._export.read_only:
            return Refusal(wire.NBD_EPERM, "the export is read-only")
        if request.offset + request.length > self._export.size:
            return Refusal(rule.outside, f"the range ends beyond the export's {self._export.size} bytes")
        return None

    def allows(self, kind: int, offset: int, length: int) -> bool:
        """Whether :meth:`check` has nothing against a READ or WRITE without flags; in fewer steps."""
        export = self._export
        return offset + length <= export.size and length <= wire.MAX_PAYLOAD and (kind == wire.NBD_CMD_READ or not export.read_only)

    def success(self, request: Request) -> bytes:
        """The reply to a request that has been carried out and gives nothing back."""
        return wire.SIMPLE_REPLY.pack(wire.NBD_SIMPLE_REPLY_MAGIC, wire.NBD_SUCCESS, request.cookie)

    def failure(self, request: Request, error: int, message: str) -> bytes:
        """The reply to a request that was refused or has failed, with an NBD error value. Structured replies carry the words."""
        if not self._structured:
            return wire.SIMPLE_REPLY.pack(wire.NBD_SIMPLE_REPLY_MAGIC, error, request.cookie)
        text = message.encode("utf-8", "replace")[: wire.MAX_STRING]
        payload = wire.ERROR.pack(error, len(text)) + text
        return _chunk_header(request, wire.NBD_REPLY_TYPE_ERROR, len(payload)) + payload

    def read_header(self, request: Request) -> bytes:
        """What is sent before the bytes that a READ asked for."""
        if not self._structured:
            return self.success(request)
        if not request.length:  # a content chunk of no bytes must not be sent
            return _chunk_header(request, wire.NBD_REPLY_TYPE_NONE, 0)
        return wire.DATA_CHUNK.pack(
            wire.NBD_STRUCTURED_REPLY_MAGIC,
            wire.NBD_REPLY_FLAG_DONE,
            wire.NBD_REPLY_TYPE_OFFSET_DATA,
            request.cookie,
            wire.OFFSET.size + request.length,
            request.offset,
        )

    def block_status(self, request: Request, extents: Iterable[Extent]) -> bytes:
        """The reply to a BLOCK_STATUS."""
        descriptors = b"".join(
            wire.DESCRIPTOR.pack(length, hole * wire.NBD_STATE_HOLE | zero * wire.NBD_STATE_ZERO) for length, hole, zero in extents
        )
        payload = wire.LENGTH.pack(_CONTEXT_ID) + descriptors
        return _chunk_header(request, wire.NBD_REPLY_TYPE_BLOCK_STATUS, len(payload)) + payload


def _chunk_header(request: Request, kind: int, length: int) -> bytes:
    return wire.CHUNK.pack(wire.NBD_STRUCTURED_REPLY_MAGIC, wire.NBD_REPLY_FLAG_DONE, kind, request.cookie, length)
