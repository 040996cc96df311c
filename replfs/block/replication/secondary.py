"""The filter on the secondary: what its machine sees (the view), and where its writes go, in every stage.

The stages are those of :mod:`replfs.block.replication.rules`. While a failover commits (:mod:`replfs.jobs.commit`), a write goes
where the rule of failover-failed sends it: where the overlays hold the block into active, else into the secondary disk. Where the
commit has passed already it goes into the secondary disk as well. So one pass always finishes, a crash at any point simply
starts the commit again, and a commit that failed leaves a view that is right.

Guarding rules: every request passes the volume's gate, and ``stage``, ``layers`` and ``disk`` change only while it is shut. While
the overlays are being committed or could not be, writes and the commit hold locks on whole subclusters, so that ``committed``
cannot pass a write that is under way.
"""

import errno
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from replfs.block.file import File
from replfs.block.locks import Gate, RangeLocks
from replfs.block.node import Data, Extent, Node
from replfs.block.qcow2.entries import Kind, Range
from replfs.block.qcow2.image import Image
from replfs.block.qcow2.overlay import SUBCLUSTER
from replfs.block.replication.rules import Stage
from replfs.block.tracking import Tracking


@dataclass(frozen=True, slots=True)
class Layers:
    """The two overlays of one generation."""

    active: Image
    hidden: Image

    def missing(self, start: int, stop: int) -> list[tuple[int, int]]:
        """The parts of a range that neither overlay holds: (start, stop) pairs."""
        return [gap for first, last in self.active.missing(start, stop) for gap in self.hidden.missing(first, last)]

    def held(self, start: int, stop: int) -> list[tuple[Image, Range]]:
        """The parts of a range that the overlays hold, each with the one that it is read from. Never suspends."""
        found: list[tuple[Image, Range]] = []
        for part in self.active.ranges(start, stop):
            if part.kind is not Kind.BACKING:
                found.append((self.active, part))
            else:
                below = self.hidden.ranges(part.start, part.stop)
                found += [(self.hidden, lower) for lower in below if lower.kind is not Kind.BACKING]
        return found


class SecondaryFilter(Node):
    def __init__(self, disk: Node, gate: Gate, *, durable: bool) -> None:
        """``durable``: what the layers below active show while running is on stable storage anyway."""
        self._durable = durable
        self.disk = disk
        self.size = disk.size
        self.stage = Stage.NONE
        self.layers: Layers | None = None
        self.committed = 0
        """Bytes from the start of the disk that the commit under way has put into the secondary disk."""
        self.commit_error: OSError | None = None
        """A write behind ``committed`` that did not reach the secondary disk: this commit cannot end well."""
        self.unsettled: Callable[[], Awaitable[None]] | None = None
        """Set while a power cut may bring an older state back: nothing is durable before this has been awaited and succeeded."""
        self.tracking: Tracking | None = None
        """Set from when this side has taken over: what is written then, the other side lacks."""
        self.gate = gate
        self.locks = RangeLocks()

    # Reading

    def _source(self) -> Node:
        if self.layers is not None:
            return self.layers.active
        if self.stage is Stage.DONE:
            return self.disk
        raise OSError(errno.EIO, "replication is not running")

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        async with self.gate:
            await self._source().read_into(offset, buffer)

    async def extents(self, offset: int, length: int, limit: int) -> list[Extent]:
        async with self.gate:
            return await self._source().extents(offset, length, limit)

    def locate(self, start: int, stop: int) -> tuple[File, int] | None:
        return None if self.gate.shutting else self._source().locate(start, stop)

    # Writing

    def write_at_once(self, offset: int, data: Data) -> bool:
        if self.gate.shutting or self.tracking is not None or (self.layers is not None and self.stage is not Stage.RUNNING):
            return False
        return self._source().write_at_once(offset, data)

    async def write(self, offset: int, data: Data) -> None:
        view = memoryview(data)
        await self._change(offset, len(data), lambda node, start, stop: node.write(start, view[start - offset : stop - offset]))

    async def write_zeroes(self, offset: int, length: int, may_unmap: bool = True) -> None:
        await self._change(offset, length, lambda node, start, stop: node.write_zeroes(start, stop - start, may_unmap))

    async def discard(self, offset: int, length: int) -> None:
        """As zeroes: every layer that it may reach then says the same."""
        await self.write_zeroes(offset, length)

    async def _change(self, offset: int, length: int, apply: Callable[[Node, int, int], Awaitable[None]]) -> None:
        stop = offset + length
        async with self.gate:
            if self.tracking is not None and length:
                async with self.tracking.changing(offset, length):
                    return await self._apply(offset, stop, apply)
            return await self._apply(offset, stop, apply)

    async def _apply(self, offset: int, stop: int, apply: Callable[[Node, int, int], Awaitable[None]]) -> None:
        if self.layers is None or self.stage is Stage.RUNNING:
            await apply(self._source(), offset, stop)
        else:
            async with self.locks.hold(offset & -SUBCLUSTER, stop + -stop % SUBCLUSTER):
                for start, end, held in self.split(self.layers, offset, stop):
                    if held:
                        await apply(self.layers.active, start, end)
                        if self.stage is Stage.FAILOVER and start < self.committed:
                            try:
                                await apply(self.disk, start, min(end, self.committed))
                            except OSError as error:
                                self.commit_error = error
                                raise
                    else:
                        await apply(self.disk, start, end)

    @staticmethod
    def split(layers: Layers, start: int, stop: int) -> list[tuple[int, int, bool]]:
        """A range in parts that the overlays hold, and parts that only the disk has: (start, stop, held)."""
        parts = []
        for first, last in layers.missing(start, stop):
            if start < first:
                parts.append((start, first, True))
            parts.append((first, last, False))
            start = last
        if start < stop:
            parts.append((start, stop, True))
        return parts

    async def flush(self) -> None:
        """Every layer that what was written went to, or that the view is read from and that is not durable already."""
        async with self.gate:
            self._source()
            if self.unsettled is not None:
                await self.unsettled()
            if self.layers is not None:
                await self.layers.active.flush()
                if self._durable and self.stage is Stage.RUNNING:
                    return
                await self.layers.hidden.flush()
            await self.disk.flush()

    async def close(self) -> None:
        """Disk and overlays are their owner's to close."""
