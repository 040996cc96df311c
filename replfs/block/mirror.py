"""The primary's node: reads come from its own disk, changes go to the disk and then to the replication filter.

Errors of the disk itself always reach the caller, and what failed there is not forwarded. What becomes of a forward that fails is
the filter's to decide. Overlapping changes hold a range lock across both steps, so they reach both copies in the same order.
"""

from replfs.block.locks import RangeLocks
from replfs.block.node import Data, Extent, Node
from replfs.block.replication.primary import PrimaryFilter


class Mirror(Node):
    def __init__(self, disk: Node, forward: PrimaryFilter) -> None:
        self.disk = disk
        self.forward = forward
        self.size = disk.size
        self._locks = RangeLocks()

    async def read(self, offset: int, length: int) -> Data:
        return await self.disk.read(offset, length)

    async def write(self, offset: int, data: Data) -> None:
        async with self._locks.hold(offset, offset + len(data)):
            await self.disk.write(offset, data)
            if self.forward.forwarding:
                await self.forward.write(offset, data)

    async def write_zeroes(self, offset: int, length: int, may_unmap: bool = True) -> None:
        async with self._locks.hold(offset, offset + length):
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
