"""The primary's node: reads come from its own disk, changes go to the disk and then to the replication filter.

Errors of the disk itself always reach the caller. A change that failed there may have been made in part, so what the disk holds
then is forwarded in its place: the copies stay equal. What becomes of a forward that fails is the filter's to decide. Overlapping
changes hold a range lock across both steps, so they reach both copies in the same order.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from replfs.block.locks import RangeLocks
from replfs.block.node import Data, Extent, Node
from replfs.block.replication.primary import PrimaryFilter

_PIECE: Final = 1 << 20


class Mirror(Node):
    def __init__(self, disk: Node, forward: PrimaryFilter) -> None:
        self.disk = disk
        self.forward = forward
        self.size = disk.size
        self._locks = RangeLocks()

    async def read(self, offset: int, length: int) -> Data:
        return await self.disk.read(offset, length)

    @asynccontextmanager
    async def _forwarding_what_failed(self, offset: int, length: int) -> AsyncIterator[None]:
        """The caller holds the range."""
        try:
            yield
        except OSError:
            if self.forward.forwarding:
                try:
                    for start in range(offset, offset + length, _PIECE):
                        await self.forward.write(start, await self.disk.read(start, min(_PIECE, offset + length - start)))
                except OSError as error:
                    self.forward.failed(error)
            raise

    async def write(self, offset: int, data: Data) -> None:
        async with self._locks.hold(offset, offset + len(data)), self._forwarding_what_failed(offset, len(data)):
            await self.disk.write(offset, data)
            if self.forward.forwarding:
                await self.forward.write(offset, data)

    async def write_zeroes(self, offset: int, length: int, may_unmap: bool = True) -> None:
        async with self._locks.hold(offset, offset + length), self._forwarding_what_failed(offset, length):
            await self.disk.write_zeroes(offset, length, may_unmap)
            if self.forward.forwarding:
                await self.forward.write_zeroes(offset, length, may_unmap)

    async def discard(self, offset: int, length: int) -> None:
        """As zeroes, which both copies then agree on: a mere discard may leave each with bytes of its own."""
        await self.write_zeroes(offset, length)

    async def flush(self) -> None:
        await self.disk.flush()
        if self.forward.forwarding:
            await self.forward.flush()

    async def extents(self, offset: int, length: int, limit: int) -> list[Extent]:
        return await self.disk.extents(offset, length, limit)

    async def close(self) -> None:
        """The disk and the filter are their owner's to close."""
