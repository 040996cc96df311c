"""The interface of a block node, and nothing else.

A *node* holds the bytes of a disk or passes them to nodes below it; exports and jobs use nodes through this interface only.
Every method that takes a range takes one that lies within ``0 .. size``: whoever lets the outside in (the exports) checks
that first. Zero-length requests are allowed and do nothing.

Most requests need not wait for anything. For these there are :meth:`Node.read_at_once` and :meth:`Node.write_at_once`, which do not
suspend: whoever serves requests tries them first, and so has no coroutine, nor any other task's turn, on the way of a request.

I/O that fails raises ``OSError`` with the errno that the caller is to get. Requests may be under way side by side; of two that
overlap, and of which one writes, the later begins only when the earlier has ended, or the bytes they share are undefined, as on
a disk. Nodes that need more order than that take it themselves (:mod:`replfs.block.locks`).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from replfs.block.file import File

Data = bytes | bytearray | memoryview


class Piece(NamedTuple):
    """``length`` bytes that are at ``position`` of a file, and are to be at ``offset`` of a disk."""

    file: "File"
    position: int
    offset: int
    length: int


class Extent(NamedTuple):
    """A run of bytes of one kind, as NBD's base:allocation tells it.

    ``hole``: nothing is allocated for it. ``zero``: it reads as zeroes.
    """

    length: int
    hole: bool
    zero: bool


class Node(ABC):
    """A disk of ``size`` bytes."""

    size: int

    @abstractmethod
    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer with the bytes from ``offset`` on."""

    async def read(self, offset: int, length: int) -> bytearray:
        """``length`` bytes from ``offset`` on."""
        buffer = bytearray(length)
        await self.read_into(offset, memoryview(buffer))
        return buffer

    def locate(self, start: int, stop: int) -> "tuple[File, int] | None":
        """Where the bytes ``start .. stop`` lie as they are, in one piece: a file, and the place in it. Valid until the next await.

        None if that is not so, or not this simple; then :meth:`read_into` tells.
        """
        return None

    def read_at_once(self, offset: int, buffer: memoryview) -> bool:
        """As :meth:`read_into`, if that need not wait; False if it may, and whatever is in the buffer then means nothing."""
        found = self.locate(offset, offset + len(buffer))
        return found is not None and found[0].read_cached(found[1], buffer)

    def write_at_once(self, offset: int, data: Data) -> bool:
        """As :meth:`write`, if that need not wait; False if it may, and it is to be called then."""
        return False

    @abstractmethod
    async def write(self, offset: int, data: Data) -> None:
        """Replace the bytes from ``offset`` on. Not on stable storage until a :meth:`flush` that begins afterwards returns.

        ``data`` is the caller's again when this has returned: who needs it for longer makes a copy.
        """

    async def copy(self, pieces: Sequence[Piece]) -> None:
        """As :meth:`write`, of bytes that lie in files and stay what they are until this returns. Pieces have a few MiB each."""
        for file, position, offset, length in pieces:
            buffer = bytearray(length)
            if await file.read_into(position, memoryview(buffer)) != length:
                raise file.too_short(position, length)
            await self.write(offset, buffer)

    @abstractmethod
    async def write_zeroes(self, offset: int, length: int, may_unmap: bool = True) -> None:
        """Make a range read as zeroes; its room is given back where the node can and ``may_unmap`` allows."""

    @abstractmethod
    async def discard(self, offset: int, length: int) -> None:
        """The range is not needed any more. It reads as zeroes or as before, and may give its room back."""

    @abstractmethod
    async def flush(self) -> None:
        """Put everything whose write returned before this call on stable storage."""

    @abstractmethod
    async def extents(self, offset: int, length: int, limit: int) -> list[Extent]:
        """What the range consists of, from its start: ``limit`` at most, and one at least unless it is empty.

        They may end before the range does.
        """

    @abstractmethod
    async def close(self) -> None:
        """Release what the node holds. Nothing is flushed; the nodes below stay open. Closing twice is allowed."""


def merge(extents: list[Extent], extent: Extent) -> None:
    """Append an extent, or lengthen the last one if it is of the same kind."""
    if extents and extents[-1][1:] == extent[1:]:
        extents[-1] = Extent(extents[-1].length + extent.length, extent.hole, extent.zero)
    elif extent.length:
        extents.append(extent)
