"""The primary's node: reads come from its own disk; changes go to the disk, and then to the other side.

A change is tracked from before it is made until the other side has it on stable storage (:mod:`replfs.block.tracking`). So
whatever becomes of the link, what the other side may lack is known; a change of blocks that are to be sent again anyway is not sent
by itself. Errors of the disk always reach the caller; as such a change may have been made in part, its blocks are sent again.

Guarding rules: every change passes the gate, which a coordinated checkpoint shuts. Overlapping changes, and the resync, hold a
range lock over what they do to the disk and the queueing, so that both sides get them in the same order.
"""

from collections.abc import Awaitable, Callable

from replfs.block.file import File
from replfs.block.locks import Gate, RangeLocks
from replfs.block.node import Data, Extent, Node
from replfs.block.replication.forwarder import Forwarder
from replfs.block.tracking import Tracking


class Mirror(Node):
    """``forwarder`` is None until the tracking can be used; nothing may be changed before."""

    def __init__(self, disk: Node, *, wait: bool) -> None:
        """``wait``: a change is answered when the other side has it too, as long as there is a link (protocol sync)."""
        self.disk = disk
        self.size = disk.size
        self.gate = Gate()
        self.locks = RangeLocks()
        self.forwarder: Forwarder | None = None
        self.before_change: Callable[[], Awaitable[None]] | None = None
        """Set when something has to happen before the next change is answered."""
        self.flush_other: Callable[[], Awaitable[None]] | None = None
        """Puts what the other side has acknowledged on its stable storage; set while that is part of a flush."""
        self._wait = wait

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        await self.disk.read_into(offset, buffer)

    def locate(self, start: int, stop: int) -> tuple[File, int] | None:
        return self.disk.locate(start, stop)

    def write_at_once(self, offset: int, data: Data) -> bool:
        forwarder, length = self.forwarder, len(data)
        stop = offset + length
        if (
            forwarder is None
            or not length
            or self._wait
            or self.gate.shutting
            or self.before_change is not None
            or not self.locks.free(offset, stop)
            or forwarder.held + length > forwarder.window
            or not forwarder.tracking.is_hot(offset, length)
        ):
            return False
        tracking = forwarder.tracking
        first, last = Tracking.span(offset, length)
        tracking.begin(first, last)
        try:
            if not self.disk.write_at_once(offset, data):
                tracking.not_begun(first, last)
                return False
        except BaseException:
            self._not_sent(tracking, first, last)
            raise
        if not forwarder.attached or tracking.is_stale(first, last):
            self._not_sent(tracking, first, last)
        else:
            forwarder.put(offset, length, bytes(data))
        return True

    async def write(self, offset: int, data: Data) -> None:
        if data:
            await self._change(offset, len(data), data)

    async def write_zeroes(self, offset: int, length: int, may_unmap: bool = True) -> None:
        assert self.forwarder is not None
        end = offset + length
        while offset < end:
            piece = min(self.forwarder.largest_zeroes, end - offset)
            await self._change(offset, piece, None, may_unmap)
            offset += piece

    async def _change(self, offset: int, length: int, data: Data | None, may_unmap: bool = True) -> None:
        """To ``data``, or to zeroes."""
        forwarder = self.forwarder
        assert forwarder is not None
        tracking = forwarder.tracking
        async with self.gate, self.locks.hold(offset, offset + length):
            if self.before_change is not None or not tracking.is_hot(offset, length):
                await self._prepare(tracking, offset, length)
            first, last = Tracking.span(offset, length)
            tracking.begin(first, last)
            try:
                if data is not None:
                    await self.disk.write(offset, data)
                else:
                    await self.disk.write_zeroes(offset, length, may_unmap)
            except BaseException:
                self._not_sent(tracking, first, last)
                raise
            too_large = data is None and length > forwarder.largest_zeroes  # for a link that has come meanwhile
            if too_large or not forwarder.attached or tracking.is_stale(first, last):
                self._not_sent(tracking, first, last)
                if self.before_change is not None:  # the link was lost meanwhile
                    await self.before_change()
                return
            change = forwarder.put(offset, length, bytes(data) if data is not None else None, may_unmap)
        # There is room on the way, or, with protocol sync, the change has arrived or is lost, when the caller goes on.
        if self._wait:
            await change.wait()
        elif forwarder.held > forwarder.window:
            await forwarder.room()

    async def _prepare(self, tracking: Tracking, offset: int, length: int) -> None:
        if self.before_change is not None:
            await self.before_change()
        await tracking.heat(offset, length)

    def _not_sent(self, tracking: Tracking, first: int, last: int) -> None:
        tracking.lost(first, last)
        tracking.on_stale()

    async def discard(self, offset: int, length: int) -> None:
        """As zeroes, which both copies then agree on: a mere discard may leave each with bytes of its own."""
        await self.write_zeroes(offset, length)

    async def flush(self) -> None:
        await self.disk.flush()
        if self.flush_other is not None:
            await self.flush_other()

    async def extents(self, offset: int, length: int, limit: int) -> list[Extent]:
        return await self.disk.extents(offset, length, limit)

    async def close(self) -> None:
        """The disk is its owner's to close."""
