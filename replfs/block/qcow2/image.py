"""The qcow2 overlay as a node: what it holds itself, over what its backing node holds.

Owns its file; the backing node belongs to whoever opened it. The unit of being held here is the subcluster (2 KiB): a write that
covers one only in part fetches the rest from the backing node first. Once a subcluster is held it stays so and does not move.

Guarding rule: looking up and storing happen in one stretch without an await. A request that suspended, to read its backing node,
looks up again (``_l2.changes`` tells whether it has to). So what the backing node holds under a subcluster may change once this
image holds that subcluster, and only then: that is what copy-before-write keeps to.
"""

import array
import enum
import errno
import os
from typing import Final, NamedTuple

from replfs.block.file import File
from replfs.block.node import Data, Extent, Node, merge
from replfs.block.qcow2.header import CLUSTER, CLUSTER_BITS, L2_ENTRIES, SPAN, SUBCLUSTER, SUBCLUSTER_BITS, Header
from replfs.block.qcow2.l2 import COPIED, HOST_OFFSET, L2Tables
from replfs.block.qcow2.refcounts import Refcounts
from replfs.errors import ReplfsError, printable

CACHE_BYTES: Final = 32 << 20

_ALL_ALLOCATED: Final = 0xFFFF_FFFF
_ALL_ZERO: Final = 0xFFFF_FFFF << 32


class Kind(enum.Enum):
    """Where a subcluster's bytes are."""

    BACKING = enum.auto()
    ZERO = enum.auto()
    DATA = enum.auto()


class Range(NamedTuple):
    """Bytes ``start .. stop`` of the disk that are of one kind; ``host`` is where DATA lies in the file (else 0)."""

    kind: Kind
    start: int
    stop: int
    host: int


class Image(Node):
    """An overlay of ``size`` bytes, which is its backing node's size (its header's is that, in whole sectors)."""

    def __init__(self, file: File, backing: Node) -> None:
        """Raises ReplfsError if the file is no sound overlay for a disk of the backing node's size, OSError if it cannot be read.

        The file is closed then.
        """
        self.file = file
        self.backing = backing
        self.size = backing.size
        try:
            header = Header.parse(file.read_now(0, CLUSTER), file.length(), file.path)
            if header.size != self.size + -self.size % 512:
                raise ReplfsError(f"{file.path}: it is for a disk of {header.size} bytes, and the disk has {self.size}")
            self._refcounts = Refcounts(file, header)
            self._l2 = L2Tables(file, header, self._refcounts, CACHE_BYTES // CLUSTER)
        except BaseException:
            file.close()
            raise

    @classmethod
    def open(cls, path: str, backing: Node) -> "Image":
        """Open an overlay for reading and writing. Raises ReplfsError."""
        try:
            return cls(File.open(path, writable=True), backing)
        except OSError as error:
            raise ReplfsError(f"cannot open the overlay {printable(path)}: {error.strerror}", error.errno or errno.EIO) from error

    # What is held where

    def ranges(self, start: int, stop: int) -> list[Range]:
        """What ``start .. stop`` consists of, neighbours merged. Never suspends. Raises OSError (EIO: the tables are damaged)."""
        found: list[Range] = []
        while start < stop:
            cluster = start >> CLUSTER_BITS
            until = min(stop, (cluster + 1) << CLUSTER_BITS)
            table = self._l2.table(start // SPAN)
            if table is None:
                until = min(stop, (start // SPAN + 1) * SPAN)
                _extend(found, Kind.BACKING, start, until, 0)
            else:
                position = (cluster & L2_ENTRIES - 1) * 2
                self._split(found, table[position] & HOST_OFFSET, table[position + 1], start, until)
            start = until
        return found

    def _split(self, found: list[Range], host: int, bitmap: int, start: int, stop: int) -> None:
        """The ranges of one cluster, or a part of it."""
        base = start & -CLUSTER
        if not bitmap:
            return _extend(found, Kind.BACKING, start, stop, 0)
        if bitmap == _ALL_ZERO:
            return _extend(found, Kind.ZERO, start, stop, 0)
        if host % CLUSTER or (bitmap & _ALL_ALLOCATED and not host) or bitmap & (bitmap >> 32):
            raise OSError(errno.EIO, f"{self.file.path}: the L2 entry of byte {start} is damaged")
        if bitmap == _ALL_ALLOCATED:
            return _extend(found, Kind.DATA, start, stop, host + start - base)
        while start < stop:
            bit = start - base >> SUBCLUSTER_BITS
            until = min(stop, base + (bit + 1 << SUBCLUSTER_BITS))
            if bitmap >> bit & 1:
                _extend(found, Kind.DATA, start, until, host + start - base)
            elif bitmap >> (bit + 32) & 1:
                _extend(found, Kind.ZERO, start, until, 0)
            else:
                _extend(found, Kind.BACKING, start, until, 0)
            start = until

    def missing(self, start: int, stop: int) -> list[tuple[int, int]]:
        """The parts of a range that this image does not hold: (start, stop) pairs."""
        return [(part.start, part.stop) for part in self.ranges(start, stop) if part.kind is Kind.BACKING]

    def may_hold(self, position: int) -> tuple[bool, int]:
        """Whether anything near ``position`` may be held here, and up to where the answer holds (one L2 table's span)."""
        index = position // SPAN
        return self._l2.table(index) is not None, min(self.size, (index + 1) * SPAN)

    # Reading

    async def read(self, offset: int, length: int) -> Data:
        stop = offset + length
        while True:
            changes = self._l2.changes
            ranges = self.ranges(offset, stop)
            if len(ranges) == 1:
                data = await self._read_range(ranges[0])
            else:
                data = b"".join([await self._read_range(part) for part in ranges])
            if changes == self._l2.changes or self.ranges(offset, stop) == ranges:
                return data

    async def _read_range(self, part: Range) -> Data:
        length = part.stop - part.start
        if part.kind is Kind.BACKING:
            return await self.backing.read(part.start, length)
        if part.kind is Kind.ZERO:
            return bytes(length)
        data = await self.file.read(part.host, length)
        return data if len(data) == length else bytes(data) + bytes(length - len(data))

    async def extents(self, offset: int, length: int, limit: int) -> list[Extent]:
        while True:
            changes = self._l2.changes
            ranges = self.ranges(offset, offset + length)
            found: list[Extent] = []
            for part in ranges:
                if len(found) >= limit:
                    break
                if part.kind is Kind.BACKING:
                    below = await self.backing.extents(part.start, part.stop - part.start, limit)
                    for extent in below:
                        merge(found, extent)
                    if sum(extent.length for extent in below) < part.stop - part.start:
                        break
                else:
                    merge(found, Extent(part.stop - part.start, part.kind is Kind.ZERO, part.kind is Kind.ZERO))
            if changes == self._l2.changes or self.ranges(offset, offset + length) == ranges:
                return found[:limit]

    # Writing

    async def write(self, offset: int, data: Data) -> None:
        stop = offset + len(data)
        if stop == offset:
            return
        edges = set()  # the subclusters that this covers in part
        if offset % SUBCLUSTER:
            edges.add(offset & -SUBCLUSTER)
        if stop % SUBCLUSTER and stop < self.size:
            edges.add(stop & -SUBCLUSTER)
        fetched: dict[int, Data] = {}
        while missing := [edge for edge in edges if edge not in fetched and self._edge(edge).kind is Kind.BACKING]:
            for edge in missing:
                fetched[edge] = await self.backing.read(edge, min(SUBCLUSTER, self.size - edge))
        self._store(*self._whole(offset, data, fetched))

    def _edge(self, edge: int) -> Range:
        return self.ranges(edge, min(edge + SUBCLUSTER, self.size))[0]

    def _whole(self, offset: int, data: Data, fetched: dict[int, Data]) -> tuple[int, memoryview]:
        """What to store for a write: its data, made whole at an edge that covers only a part of a subcluster not yet held."""
        stop = offset + len(data)
        head = tail = b""
        first, last = offset & -SUBCLUSTER, stop - 1 & -SUBCLUSTER
        if first != offset and (kind := self._edge(first).kind) is not Kind.DATA:
            head = bytes((fetched[first] if kind is Kind.BACKING else bytes(SUBCLUSTER))[: offset - first])
        if stop % SUBCLUSTER and (kind := self._edge(last).kind) is not Kind.DATA:
            rest = fetched.get(last, b"") if kind is Kind.BACKING else b""
            tail = bytes(rest[stop - last :]).ljust(SUBCLUSTER - (stop - last), b"\0")
        if head or tail:
            return offset - len(head), memoryview(b"".join((head, data, tail)))
        return offset, memoryview(data)

    def populate(self, offset: int, data: Data) -> None:
        """Save what the backing node has, in whole subclusters that are missing here (the last one may end with the disk).

        Zeroes are noted as such and take no room. Never suspends. Raises OSError.
        """
        if data == bytes(len(data)):
            self._store_zeroes(offset, offset + len(data) + -len(data) % SUBCLUSTER)
        else:
            self._store(
                offset,
                memoryview(data if not len(data) % SUBCLUSTER else bytes(data).ljust(len(data) + -len(data) % SUBCLUSTER, b"\0")),
            )

    def _store(self, start: int, data: memoryview) -> None:
        """Write to the file, mark every subcluster touched as held. One that is touched in part is held already.

        Each step is complete on its own: an error leaves what was written before it, and the rest unchanged.
        """
        base, stop = start, start + len(data)
        while start < stop:
            table = self._l2.table_for_writing(start // SPAN)
            cluster = start >> CLUSTER_BITS
            first = (cluster & L2_ENTRIES - 1) * 2
            last = min((stop - 1 >> CLUSTER_BITS) - cluster, L2_ENTRIES - 1 - first // 2) * 2 + first
            host = table[first] & HOST_OFFSET
            if host:
                count = 1
                while first + 2 * count <= last and table[first + 2 * count] & HOST_OFFSET == host + count * CLUSTER:
                    count += 1
            else:
                count = 1
                while first + 2 * count <= last and not table[first + 2 * count] & HOST_OFFSET:
                    count += 1
                host, count = self._refcounts.allocate(count)
            until = min(stop, (cluster + count) << CLUSTER_BITS)
            try:
                self.file.write(host + (start & CLUSTER - 1), data[start - base : until - base])
            except OSError:
                if not table[first] & HOST_OFFSET:
                    self._refcounts.give_back(host, count)
                raise
            words = array.array("Q")
            for i in range(count):
                bits = _bits(cluster + i, start, until)
                words.append(host + i * CLUSTER | COPIED)
                words.append((table[first + 2 * i + 1] | bits) & ~(bits << 32))
            if words != table[first : first + 2 * count]:
                self._l2.put(table, cluster, words)
            start = until

    async def write_zeroes(self, offset: int, length: int, may_unmap: bool = True) -> None:
        """Whole subclusters become zero without taking room, whatever ``may_unmap`` says; only at the edges zeroes are written."""
        stop = offset + length
        first, last = offset + -offset % SUBCLUSTER, (stop if stop == self.size else stop & -SUBCLUSTER)
        if first >= last:
            return await self._write_zero_bytes(offset, stop)
        await self._write_zero_bytes(offset, first)
        self._store_zeroes(first, last)
        await self._write_zero_bytes(last, stop)

    async def _write_zero_bytes(self, start: int, stop: int) -> None:
        """Zeroes where subclusters are covered in part; what reads as zeroes already is left as it is."""
        for part in self.ranges(start, stop):
            if part.kind is not Kind.ZERO:
                await self.write(part.start, bytes(part.stop - part.start))

    def _store_zeroes(self, start: int, stop: int) -> None:
        """Mark whole subclusters as zero (the last one may end with the disk)."""
        while start < stop:
            table = self._l2.table_for_writing(start // SPAN)
            until = min(stop, (start // SPAN + 1) * SPAN)
            cluster, end = start >> CLUSTER_BITS, until - 1 >> CLUSTER_BITS
            position = (cluster & L2_ENTRIES - 1) * 2
            old = table[position : position + (end - cluster + 1) * 2]
            words = old[:]
            words[1::2] = array.array("Q", [_ALL_ZERO]) * (len(words) // 2)
            for edge in {cluster, end}:
                at = (edge - cluster) * 2 + 1
                bits = _bits(edge, start, until)
                words[at] = (old[at] | bits << 32) & ~bits
            if words != old:
                self._l2.put(table, cluster, words)
            start = until

    async def discard(self, offset: int, length: int) -> None:
        """Whole subclusters read as zeroes afterwards, as QEMU's do over a backing file; a part of one stays."""
        stop = offset + length
        first, last = offset + -offset % SUBCLUSTER, (stop if stop == self.size else stop & -SUBCLUSTER)
        if first < last:
            self._store_zeroes(first, last)

    async def flush(self) -> None:
        """Put this image on stable storage; the backing node is its owner's to flush."""
        await self.file.sync()

    async def close(self) -> None:
        self.file.close()

    def remove(self) -> None:
        """Close the image and delete its file."""
        self.file.close()
        os.unlink(self.file.path)


def _bits(cluster: int, start: int, stop: int) -> int:
    """The bitmap of a cluster's subclusters that ``start .. stop`` touches."""
    base = cluster << CLUSTER_BITS
    low = max(start - base, 0) >> SUBCLUSTER_BITS
    high = -(-(min(stop, base + CLUSTER) - base) >> SUBCLUSTER_BITS)
    return (1 << high) - (1 << low)


def _extend(found: list[Range], kind: Kind, start: int, stop: int, host: int) -> None:
    if found and found[-1].kind is kind and (kind is not Kind.DATA or found[-1].host + start - found[-1].start == host):
        found[-1] = Range(kind, found[-1].start, stop, found[-1].host)
    else:
        found.append(Range(kind, start, stop, host))
