"""What a primary and a secondary say to each other beside NBD, as bytes and values, without any I/O.

The primary opens one more connection to the secondary's NBD address and sends, as an option of the handshake,
``NBD_OPT_REPLFS``, which other servers answer with NBD_REP_ERR_UNSUP. After its NBD_REP_ACK the connection is not NBD any more: the
primary sends one request at a time, the secondary one answer to each; both are JSON objects, one on a line, of at most
:data:`LIMIT` bytes.
"""

from typing import Final

import msgspec

from replfs.block.replication.lineage import Id, Ids
from replfs.errors import ReplfsError, printable

LIMIT: Final = 256 << 10
"""The most bytes of a line."""

VERSION: Final = 1


class Message(msgspec.Struct, forbid_unknown_fields=True, frozen=True, tag=True):
    """``type`` says which one it is."""


# The primary's


class Hello(Message, frozen=True):
    """The first message: who is there. ``size``: bytes of the disk."""

    version: int
    node: Id
    size: int
    ids: Ids


class Attach(Message, frozen=True):
    """This primary replicates to the secondary from now on. ``syncing``: until :class:`Agreed` its disk is neither old nor new."""

    syncing: bool
    first: bool
    """Whether all of the disk is sent."""


class Agreed(Message, frozen=True):
    """The secondary's disk has all that the primary's has, on stable storage, and what follows in the order of its making.

    ``checkpoint``: what it shows was never a copy of anything, so it is to show that, in the same step; nothing is under way.
    """

    ids: Ids
    checkpoint: bool


class Checkpoint(Message, frozen=True):
    """Take a checkpoint: nothing is under way."""


class Blocks(Message, frozen=True):
    """Which blocks may differ that the primary does not know of, from block ``start`` on."""

    start: int


class Clear(Message, frozen=True):
    """The primary is about to connect: what its earlier connections have left under way is finished, and the rest dropped.

    Else it could come after what is newer.
    """


class Ping(Message, frozen=True):
    """Is anybody there?"""


# The secondary's


class Welcome(Message, frozen=True):
    """To :class:`Hello`: who is there, and how it is."""

    version: int
    node: Id
    peer: Id
    """The primary's node, as far as it has one."""
    size: int
    ids: Ids
    mode: str
    stage: str
    tracked: bool
    """Whether it knows of blocks by itself: it has been a primary, or has failed over."""


class Done(Message, frozen=True):
    """It is done. ``generation``: of the secondary, now."""

    generation: int


class Found(Message, frozen=True):
    """To :class:`Blocks`: (first, how many) in 64 KiB blocks, ascending. ``more``: where to ask again, or -1."""

    runs: list[tuple[int, int]]
    more: int


class Failed(Message, frozen=True):
    """It could not be done: one line for people."""

    why: str


Request = Hello | Attach | Agreed | Checkpoint | Blocks | Clear | Ping
Answer = Welcome | Done | Found | Failed

_requests: Final = msgspec.json.Decoder(Request)
_answers: Final = msgspec.json.Decoder(Answer)


def encode(message: Message) -> bytes:
    return msgspec.json.encode(message) + b"\n"


def request(line: bytes) -> Request:
    """Raises ReplfsError."""
    try:
        found: Request = _requests.decode(line)
        return found
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ReplfsError(f"not a request that is known here: {printable(str(error))}") from None


def answer(line: bytes) -> Answer:
    """Raises ReplfsError."""
    try:
        found: Answer = _answers.decode(line)
        return found
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ReplfsError(f"not an answer that is known here: {printable(str(error))}") from None


class Lines:
    """Lines out of bytes, however the network has cut them."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def receive(self, data: bytes) -> list[bytes]:
        """Raises ReplfsError if one is too long."""
        self._buffer += data
        *lines, rest = self._buffer.split(b"\n")
        self._buffer = bytearray(rest)
        if len(rest) > LIMIT or any(len(line) > LIMIT for line in lines):
            raise ReplfsError(f"a line of more than {LIMIT} bytes")
        return [bytes(line) for line in lines]
