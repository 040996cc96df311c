"""A qcow2 image that is only read: what it holds itself, over what its backing node holds.

The unit of being held here is the *subcluster*: a 32nd of a cluster with extended L2 entries, else the whole cluster.

Guarding rule: a request that had to suspend looks again whether the tables have changed meanwhile, and reads anew if they have.
Nothing changes them here, but in :class:`~replfs.block.qcow2.image.Image`, which is one of these.
"""

import errno
from typing import Final

import trio

from replfs.block.cache import Cache, Shelf
from replfs.block.file import File
from replfs.block.node import Data, Extent, Node, merge
from replfs.block.qcow2.compression import decompress, descriptor
from replfs.block.qcow2.entries import COPIED, NOT_HELD, Entries, Kind, Range, extend
from replfs.block.qcow2.header import HOST_OFFSET, Header
from replfs.block.qcow2.l2 import L2Tables
from replfs.block.raw import Raw

_STEPS: Final = 256  # that one call of extents takes at most: it may tell of less than it was asked for
_EMPTY_SPANS: Final = 4096
_decompressions: Final = trio.CapacityLimiter(4)  # at once: each may take two clusters of memory


class ReadOnlyImage(Node):
    """A disk of ``size`` bytes. ``file`` is the image's, ``data`` the one that its clusters lie in: the same or an external one."""

    format = "qcow2"

    def __init__(
        self,
        file: File,
        header: Header,
        backing: "Raw | ReadOnlyImage | None",
        cache: Cache,
        *,
        data: File | None = None,
        size: int | None = None,
        tables: L2Tables | None = None,
        owns_backing: bool = False,
    ) -> None:
        """``size`` is the header's unless given. ``tables`` are those of the header, made here unless they are given.
        ``owns_backing``: the backing node is closed with this one.

        Nothing that is handed over is closed if this fails. Raises ReplfsError if the image cannot be served, OSError if it cannot
        be read.
        """
        self.file = file
        self.data = data or file
        self.backing = backing
        self.size = header.size if size is None else size
        self.version: Final = header.version
        self._header = header
        self._external = data is not None
        self._owns_backing = owns_backing
        self._entries = Entries(header, file.path, external=data is not None)
        self.subcluster: Final = self._entries.subcluster
        self._l2 = tables or L2Tables(file, header, None, None, cache)
        self._plain: Shelf[bytes] = Shelf(cache, header.cluster)  # decompressed clusters, by their L2 entries
        self._cluster_bits: Final = header.cluster_bits
        self._cluster: Final = header.cluster
        self._words: Final = self._entries.words
        self._slice_bits = self._l2.slice_bits
        self._slice_mask = (1 << self._slice_bits) - 1
        self._span_bits: Final = header.span_bits
        self._backed: Final = min(backing.size, self.size) if backing is not None else 0
        """Bytes from the start of the disk that the backing node has; beyond it what is not held here reads as zeroes."""

    # What is held where

    def ranges(self, start: int, stop: int) -> list[Range]:
        """What ``start .. stop`` consists of, neighbours merged. Never suspends. Raises OSError (EIO: the tables are damaged)."""
        found: list[Range] = []
        bits = self._cluster_bits
        while start < stop:
            cluster = start >> bits
            table = self._l2.slice(cluster >> self._slice_bits)
            if table is None:
                until = min(stop, ((start >> self._span_bits) + 1) << self._span_bits)
                extend(found, Kind.BACKING, start, until, 0)
            else:
                at = (cluster & self._slice_mask) * self._words
                last = min(stop - 1 >> bits, cluster | self._slice_mask)
                count = self._entries.alike(table, at, last - cluster + 1) if last > cluster else 1
                until = min(stop, cluster + count << bits)
                self._entries.split(found, table[at], table[at + 1] if self._words == 2 else 0, start, until)
            start = until
        return found

    def lacks(self, start: int, stop: int) -> bool | None:
        """Whether none of a range is held here; None if it is not that simple. False: all of it is. Raises OSError."""
        bits = self._cluster_bits
        cluster = start >> bits
        if stop - 1 >> bits != cluster or self._words == 1:
            return None
        table = self._l2.slice(cluster >> self._slice_bits)
        if table is None:
            return True
        at = (cluster & self._slice_mask) * 2
        entry, bitmap = table[at], table[at + 1]
        if entry & ~HOST_OFFSET & ~COPIED or entry & HOST_OFFSET & self._cluster - 1 or bitmap & bitmap >> 32:
            return None
        wanted = self._entries.bits(start, stop)
        held = (bitmap | bitmap >> 32) & wanted
        return True if not held else False if held == wanted else None

    def missing(self, start: int, stop: int) -> list[tuple[int, int]]:
        """The parts of a range that this image does not hold: (start, stop) pairs."""
        return [(part.start, part.stop) for part in self.ranges(start, stop) if part.kind is Kind.BACKING]

    def may_hold(self, position: int) -> tuple[bool, int]:
        """Whether anything near ``position`` may be held here, and up to where the answer holds (one L2 table's span)."""
        index = position >> self._span_bits
        return self._l2.has_table(index), min(self.size, (index + 1) << self._span_bits)

    def _entry(self, position: int) -> tuple[int, int]:
        """The L2 entry of a byte of the disk: its words, the second 0 if there is only one."""
        cluster = position >> self._cluster_bits
        table = self._l2.slice(cluster >> self._slice_bits)
        if table is None:
            return 0, 0
        at = (cluster & self._slice_mask) * self._words
        return table[at], table[at + 1] if self._words == 2 else 0

    def _reads_as_zeroes(self, start: int, stop: int) -> bool:
        """Whether the tables say so."""
        return all(
            part.kind is Kind.ZERO or (part.kind is Kind.BACKING and part.start >= self._backed)
            for part in self.ranges(start, min(stop, self.size))
        )

    # Reading

    def locate(self, start: int, stop: int) -> tuple[File, int] | None:
        bits = self._cluster_bits
        cluster = start >> bits
        if stop - 1 >> bits == cluster:
            table = self._l2.slice(cluster >> self._slice_bits)
            at = (cluster & self._slice_mask) * self._words
            if table is not None and (table[at] or table[at + self._words - 1]):
                host = self._entries.place(table[at], table[at + 1] if self._words == 2 else 0, start, stop)
                if host >= 0:
                    return self.data, host
                if host != NOT_HELD:
                    return None
        else:
            ranges = self.ranges(start, stop)
            if len(ranges) != 1 or ranges[0].kind not in (Kind.DATA, Kind.BACKING):
                return None
            if ranges[0].kind is Kind.DATA:
                return self.data, ranges[0].host
        if stop > self._backed:
            return None
        assert self.backing is not None
        return self.backing.locate(start, stop)

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        stop = offset + len(buffer)
        while True:
            changes = self._l2.changes
            ranges = self.ranges(offset, stop)
            try:
                if len(ranges) == 1:
                    await self._read_range(ranges[0], buffer)
                else:
                    for number, part in enumerate(ranges):
                        await self._read_range(part, buffer[part.start - offset : part.stop - offset])
                        if number % 256 == 255:  # others are to have their turn, however fragmented the image is
                            await trio.lowlevel.checkpoint()
            except OSError:  # which may be because it lies elsewhere by now
                if changes == self._l2.changes or self.ranges(offset, stop) == ranges:
                    raise
                continue
            if changes == self._l2.changes or self.ranges(offset, stop) == ranges:
                return

    async def _read_range(self, part: Range, buffer: memoryview) -> None:
        """Into a buffer of just that size."""
        kind, start, stop, host = part
        if kind is Kind.DATA:
            got = await self.data.read_into(host, buffer)
            if got < stop - start:
                if not got and not self._external and self.file.length() <= host & -self._cluster:
                    raise self._entries.damaged(start)
                buffer[got:] = bytes(stop - start - got)
        elif kind is Kind.BACKING and start < self._backed:
            await self._read_backing(start, stop, buffer)
        elif kind is Kind.COMPRESSED:
            inside = start & self._cluster - 1
            buffer[:] = memoryview(await self._decompressed(host))[inside : inside + stop - start]
        else:
            buffer[:] = bytes(stop - start)

    async def _read_backing(self, start: int, stop: int, buffer: memoryview) -> None:
        node = self.backing
        while type(node) is ReadOnlyImage:  # through what cannot change and holds nothing of it
            if stop > node._backed or node.missing(start, stop) != [(start, stop)]:
                break
            node = node.backing
        assert node is not None
        if stop <= self._backed:
            await node.read_into(start, buffer)
        else:
            here = self._backed - start
            await node.read_into(start, buffer[:here])
            buffer[here:] = bytes(stop - self._backed)

    async def _decompressed(self, entry: int) -> bytes:
        plain = self._plain.get(entry)
        if plain is None:
            offset, length = descriptor(entry, self._cluster_bits)
            plain = await trio.to_thread.run_sync(self._decompress, offset, length, limiter=_decompressions)
            self._plain.put(entry, plain)
        return plain

    def _decompress(self, offset: int, length: int) -> bytes:
        try:
            return decompress(self._header.compression, self.file.read_now(offset, length), self._cluster)
        except OSError as error:
            raise OSError(error.errno, f"{self.file.path}: {error.strerror}") from error

    async def extents(self, offset: int, length: int, limit: int) -> list[Extent]:
        found: list[Extent] = []
        stop = offset + length
        steps = 0
        while offset < stop and len(found) <= limit and steps < _STEPS:  # one more than the limit: the last one may go on
            if steps % 16 == 15:
                await trio.lowlevel.checkpoint()
            until = min(stop, self._next_slice(offset))
            changes = self._l2.changes
            ranges = self.ranges(offset, until)
            part, end = await self._extents_of(ranges, limit)
            if changes != self._l2.changes and self.ranges(offset, until) != ranges:
                continue
            for extent in part:
                merge(found, extent)
            offset = end
            steps += 1
        return found[:limit]

    async def _extents_of(self, ranges: list[Range], limit: int) -> tuple[list[Extent], int]:
        """What the ranges consist of, and where on the disk that ends: the backing node may tell of less."""
        found: list[Extent] = []
        for kind, start, stop, host in ranges:
            if kind is Kind.BACKING and start < self._backed:
                assert self.backing is not None
                size = min(stop, self._backed) - start
                below = await self.backing.extents(start, size, limit)
                for extent in below:
                    merge(found, extent)
                told = sum(extent.length for extent in below)
                if told < size:
                    return found, start + told
                merge(found, Extent(stop - start - size, True, True))
            else:
                zero = kind is Kind.ZERO or kind is Kind.BACKING
                merge(found, Extent(stop - start, zero and not host, zero))
        return found, ranges[-1].stop

    def _next_slice(self, position: int) -> int:
        """Up to where one slice of tables, or the lack of tables, tells of the disk."""
        if self.may_hold(position)[0]:
            bits = self._slice_bits + self._cluster_bits
            return ((position >> bits) + 1) << bits
        index = (position >> self._span_bits) + 1
        for _ in range(_EMPTY_SPANS):
            if index << self._span_bits >= self.size or self._l2.has_table(index):
                break
            index += 1
        return index << self._span_bits

    # The rest

    async def write(self, offset: int, data: Data) -> None:
        raise self._refused()

    async def write_zeroes(self, offset: int, length: int, may_unmap: bool = True) -> None:
        raise self._refused()

    async def discard(self, offset: int, length: int) -> None:
        raise self._refused()

    def _refused(self) -> OSError:
        return OSError(errno.EROFS, f"{self.file.path} is only read")

    async def flush(self) -> None:
        """Put this image on stable storage; the backing node is its owner's to flush."""
        await self.file.sync()

    @property
    def damage(self) -> str:
        """Why nothing is written to the image any more, empty if all is well."""
        return ""

    async def close(self) -> None:
        self.release()

    def release(self) -> None:
        """As :meth:`close`, for those who cannot await."""
        self._l2.close()
        self._plain.close()
        self.data.close()
        self.file.close()
        if self._owns_backing and self.backing is not None:
            self.backing.release()
