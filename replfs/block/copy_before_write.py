"""Copy-before-write: what a forwarded write is about to overwrite is saved into the hidden disk first.

Serves the secondary disk to the NBD export. While ``hidden`` is set, every change of the disk first populates the subclusters that
the hidden disk is missing; when they cannot be saved, the request fails and the disk stays as it was. A small write whose pre-image
is not durable yet is staged (:mod:`replfs.block.staging`).

Guarding rules: overlapping requests exclude each other by whole subclusters, so that what is saved is what is overwritten; and
every request passes the volume's gate, so that ``hidden`` changes only while none is under way.
"""

import errno
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from replfs.block.file import File
from replfs.block.locks import Gate, RangeLocks
from replfs.block.node import Data, Extent, Node
from replfs.block.qcow2.image import Image
from replfs.block.qcow2.overlay import SUBCLUSTER
from replfs.block.raw import Raw
from replfs.block.staging import Staging

logger = logging.getLogger(__name__)

_FILE_BLOCK = 4096  # bytes that a file system takes room for at least
_PIECE = 2 << 20  # the largest cluster of a qcow2 disk, so that whole ones can give their room back


class CopyBeforeWrite(Node):
    def __init__(self, disk: Node, gate: Gate, *, durable: bool) -> None:
        """``durable``: what is saved is on stable storage before the disk is changed."""
        self._durable = durable
        self.disk = disk
        self.size = disk.size
        self._hidden: Image | None = None
        self.staging = Staging(disk, SUBCLUSTER) if durable and isinstance(disk, Raw) else None
        self.fenced = False
        """Set when the secondary has taken over: every change is refused from then on."""
        self.unsettled: Callable[[], Awaitable[None]] | None = None
        """Set while a power cut may bring back an older state, with other overlays: to be awaited, and to succeed, first."""
        self._gate = gate
        self._locks = RangeLocks()
        self._scratch = memoryview(bytearray(_PIECE))  # for what is saved without waiting
        self._unfinished = 0  # times that saving has failed: what the hidden disk holds since then may not be durable
        self._finished = 0  # how many of these are made good
        self._reported: Image | None = None  # the hidden disk of the checkpoint whose first failure has been logged

    @property
    def hidden(self) -> Image | None:
        return self._hidden

    @hidden.setter
    def hidden(self, image: Image | None) -> None:
        """Only while the gate is shut, and nothing that matters is staged."""
        self._hidden = image
        if self.staging is not None:
            self.staging.forget()

    async def drain(self) -> None:
        """The disk has all that was acknowledged when this returns. Raises OSError: it cannot be put there."""
        if self.staging is not None:
            await self.staging.drain()

    async def _save(self, start: int, stop: int) -> None:
        """Populate the hidden disk; the caller holds the range, in whole subclusters."""
        if self.fenced:
            raise OSError(errno.EPERM, "the secondary has taken over: forwarded writes are refused")
        if self.unsettled is not None:
            await self.unsettled()
        if self.staging is not None:
            if self.staging.failed:  # so that whoever writes knows as soon as whoever flushes
                await self.staging.drain()
            await self.staging.clear(start, stop)
        if self.hidden is not None:
            missing = self.hidden.missing(start, stop)
            unfinished = self._unfinished
            if missing or unfinished > self._finished:
                try:
                    if not self._populate_at_once(self.hidden, missing):
                        for first, last in self.hidden.missing(start, stop):
                            await self.hidden.populate(first, await self.disk.read(first, last - first))
                    if self._durable:
                        await self.hidden.harden()
                        self._finished = max(self._finished, unfinished)
                except BaseException:
                    self._unfinished += 1
                    raise

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        """A forwarded change that fails is the primary's to act on, but whoever reads only this side's log is to know of it."""
        try:
            yield
        except OSError as error:
            self._report(error)
            raise

    def _report(self, error: OSError) -> None:
        if not self.fenced and (self._reported is None or self._reported is not self.hidden):
            self._reported = self.hidden
            logger.warning("a forwarded write failed, so this side's disk is not what the primary's is: %s", error)

    def _whole(self, offset: int, length: int) -> tuple[int, int]:
        stop = offset + length
        return offset & -SUBCLUSTER, min(stop + -stop % SUBCLUSTER, self.size)

    def locate(self, start: int, stop: int) -> tuple[File, int] | None:
        if self._gate.shutting or (self.staging is not None and self.staging.takes(start, stop)):
            return None
        return self.disk.locate(start, stop)

    def write_at_once(self, offset: int, data: Data) -> bool:
        if not data or self._gate.shutting or self.fenced or self.unsettled is not None:
            return False
        start, stop = self._whole(offset, len(data))
        if not self._locks.free(start, stop) or (self.staging is not None and self.staging.takes(start, stop)):
            return False
        try:
            hidden = self._hidden
            if hidden is not None:
                lacks = hidden.lacks(start, stop)
                if lacks and self.staging is not None:
                    return self._stage(self.staging, hidden, start, stop, offset, data)
                if not self._save_at_once(hidden, lacks, start, stop):
                    return False
            return self.disk.write_at_once(offset, data)
        except OSError as error:
            self._report(error)
            raise

    def _save_at_once(self, hidden: Image, lacks: bool | None, start: int, stop: int) -> bool:
        """As :meth:`_save`, if nothing is to be saved, or that can be done without waiting."""
        missing = [(start, stop)] if lacks else [] if lacks is False else hidden.missing(start, stop)
        if not missing:
            return not self._durable or self._unfinished <= self._finished
        return not self._durable and self._populate_at_once(hidden, missing)

    def _stage(self, staging: Staging, hidden: Image, start: int, stop: int, offset: int, data: Data) -> bool:
        """Have the hidden disk hold a range that it has nothing of, and the write in its journal; False if it is not so simple.

        The disk is to need no room for it: what is not zero has its own.
        """
        old = self._scratch[: stop - start]
        if not staging.has_room or self._unfinished > self._finished or not self.disk.read_at_once(start, old):
            return False
        for first in range(start & -_FILE_BLOCK, stop, _FILE_BLOCK):
            part = old[max(first - start, 0) : first + _FILE_BLOCK - start]
            if not part[0] and not part[-1] and bytes(part) == bytes(len(part)):
                return False
        if not hidden.stage(start, old, offset, data):
            return False
        staging.add(hidden, start, stop, offset, data)
        return True

    def _populate_at_once(self, hidden: Image, missing: list[tuple[int, int]]) -> bool:
        """Save what is missing, if that need not wait; False if it has not been done in whole."""
        for first, last in missing:
            old = self._scratch[: last - first]
            if len(old) < last - first or not self.disk.read_at_once(first, old) or not hidden.populate_at_once(first, old):
                return False
        return True

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        async with self._gate:
            if self.staging is not None:
                await self.staging.settle(offset, offset + len(buffer))
            await self.disk.read_into(offset, buffer)

    async def write(self, offset: int, data: Data) -> None:
        if not data:
            return
        start, stop = self._whole(offset, len(data))
        async with self._gate, self._locks.hold(start, stop):
            with self._reporting():
                await self._save(start, stop)
                await self.disk.write(offset, data)

    async def write_zeroes(self, offset: int, length: int, may_unmap: bool = True) -> None:
        await self._in_pieces(offset, length, lambda start, count: self.disk.write_zeroes(start, count, may_unmap))

    async def discard(self, offset: int, length: int) -> None:
        await self._in_pieces(offset, length, self.disk.discard)

    async def _in_pieces(self, offset: int, length: int, change: Callable[[int, int], Awaitable[None]]) -> None:
        """So that a large range neither needs its pre-image in memory at once nor keeps the gate open for long."""
        while length:
            piece = min(length, _PIECE - offset % _PIECE)
            start, stop = self._whole(offset, piece)
            async with self._gate, self._locks.hold(start, stop):
                with self._reporting():
                    await self._save(start, stop)
                    await change(offset, piece)
            offset += piece
            length -= piece

    async def flush(self) -> None:
        """The hidden disk too, unless it is durable anyway: what a flush makes durable must not lose its pre-image."""
        async with self._gate:
            await self.drain()
            if self.hidden is not None and not self._durable:
                await self.hidden.flush()
            await self.disk.flush()

    async def extents(self, offset: int, length: int, limit: int) -> list[Extent]:
        async with self._gate:
            return await self.disk.extents(offset, length, limit)

    async def close(self) -> None:
        """The disk and the hidden disk are their owner's to close."""
