"""A qcow2 image as a node: what it holds itself, over what its backing node holds.

The unit of being held here is the *subcluster*: a 32nd of a cluster with extended L2 entries, else the whole cluster. A write
that covers one only in part stores it whole, with what was read there before. What may be written in place is the image's alone
(COPIED); what it shares with a snapshot, or has compressed, is copied first.

Guarding rule: looking up and storing happen in one stretch without an await. A request that suspended, to read what it needs, looks
up again: ``_l2.changes``, or the entry itself, tells whether it has to. So what the backing node holds under a subcluster may
change once this image holds that subcluster, and only then: that is what copy-before-write keeps to. A cluster that is given back
stays counted until the hole in the file is made, so that nobody else gets it before. In what order changes reach the disk is
:mod:`replfs.block.qcow2.changes`' matter.
"""

import array
import errno
import logging
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from replfs.block.cache import Cache, Shelf
from replfs.block.file import File
from replfs.block.node import Data, Extent, Node, merge
from replfs.block.qcow2 import bitmaps, snapshots
from replfs.block.qcow2.changes import Changes
from replfs.block.qcow2.compression import decompress, descriptor
from replfs.block.qcow2.entries import COMPRESSED, COPIED, NOT_HELD, PLACE, Entries, Kind, Range, extend
from replfs.block.qcow2.header import AUTOCLEAR_JOURNAL, AUTOCLEAR_RAW_DATA, CORRUPT, DIRTY, HOST_OFFSET, JOURNAL_NAME, Header
from replfs.block.qcow2.integrity import Integrity
from replfs.block.qcow2.journal import Full, Journal, Record
from replfs.block.qcow2.l2 import L2Tables
from replfs.block.qcow2.refcounts import Refcounts
from replfs.block.qcow2.repair import rebuild_refcounts
from replfs.block.qcow2.replay import Replay
from replfs.block.raw import Raw
from replfs.errors import ReplfsError, printable

logger = logging.getLogger(__name__)

_PIECE: Final = 1 << 20
_RUN: Final = 8 << 20  # bytes, or a cluster more, that are stored in one step: the journal has to have room for the hashes
_HASHED: Final = 4096  # bytes at most that one hash in the journal stands for: what a kill leaves whole
_STEPS: Final = 256  # that one call of extents takes at most: it may tell of less than it was asked for
_EMPTY_SPANS: Final = 4096
_decompressions: Final = trio.CapacityLimiter(4)  # at once: each may take two clusters of memory


def _is_zero(data: Data) -> bool:
    """Whether there is nothing else; most often the first or the last byte tells."""
    return not data[0] and not data[-1] and bytes(data) == bytes(len(data))


class Image(Node):
    """A disk of ``size`` bytes. ``file`` is the image's, ``data`` the one that its clusters lie in: the same or an external one."""

    format = "qcow2"

    def __init__(
        self,
        file: File,
        header: Header,
        backing: "Raw | Image | None",
        cache: Cache,
        *,
        data: File | None = None,
        size: int | None = None,
        writable: bool = True,
        owns_backing: bool = False,
    ) -> None:
        """``size`` is the header's unless given. ``owns_backing``: the backing node is closed with this one.

        Nothing that is handed over is closed if this fails.

        Raises ReplfsError if the image cannot be served (for writing), OSError if it cannot be read.
        """
        self.file = file
        self.data = data or file
        self.backing = backing
        self.size = header.size if size is None else size
        self._external = data is not None
        self._owns_backing = owns_backing
        self._integrity: Integrity | None = None
        self._refcounts: Refcounts | None = None
        if writable:
            header = self._prepare(header, cache)
        self._header = header
        self.version: Final = header.version
        self._entries = Entries(header, file.path, external=data is not None)
        self.subcluster: Final = self._entries.subcluster
        self._l2 = L2Tables(file, header, self._refcounts, self._integrity, cache)
        self.changes: Changes | None = None
        """None for an image that is only read."""
        if writable:
            assert self._refcounts is not None
            unit = min(self.subcluster, _HASHED)
            self.changes = Changes(file, self.data, self._l2, self._refcounts, header.cluster_bits, unit)
            self._l2.use(self.changes)
        self._plain: Shelf[bytes] = Shelf(cache, header.cluster)  # decompressed clusters, by their L2 entries
        self._unchanged = True  # by this process
        self._cluster_bits: Final = header.cluster_bits
        self._cluster: Final = header.cluster
        self._words: Final = self._entries.words
        self._slice_bits = self._l2.slice_bits
        self._slice_mask = (1 << self._slice_bits) - 1
        self._span_bits: Final = header.span_bits
        self._backed: Final = min(backing.size, self.size) if backing is not None else 0
        """Bytes from the start of the disk that the backing node has; beyond it what is not held here reads as zeroes."""

    def _prepare(self, header: Header, cache: Cache) -> Header:
        """What writing needs: known metadata, and refcounts that are right. Gives the header back as it is then."""
        shown = printable(self.file.path)
        if header.incompatible & CORRUPT:
            raise ReplfsError(f"{shown} is marked corrupt: repair it with qemu-img check -r all", errno.EUCLEAN)
        found, table_length = snapshots.read(self.file, header)
        if header.incompatible & DIRTY:
            header = rebuild_refcounts(self.file, header, found, table_length)
        integrity = self._integrity = Integrity(self.file, header)
        integrity.survey("header", 0, header.cluster)
        self._refcounts = Refcounts(self.file, header, integrity, cache)
        if found:
            integrity.survey("snapshot table", header.snapshots_offset, table_length)
        for offset, entries in found:
            integrity.survey("snapshot's L1 table", offset, entries * 8)
        if header.bitmaps is not None:
            integrity.survey("bitmap directory", header.bitmaps.offset, header.bitmaps.length)
        return header

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
        while isinstance(node, Image) and node._refcounts is None:  # through what cannot change and holds nothing of it
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

    # Writing

    def _begin_change(self) -> None:
        """Before anything is written. Raises OSError (EIO) if the image is known to be corrupt."""
        assert self._integrity is not None
        self._integrity.check_writable()
        if self._unchanged:
            self._integrity.set_autoclear(self._autoclear())
            self._unchanged = False
            if self._header.bitmaps is not None:
                self._drop_bitmaps()

    def _autoclear(self) -> int:
        """The bits that hold while this process changes the image."""
        assert self.changes is not None
        kept = self._header.autoclear & AUTOCLEAR_RAW_DATA if self._external else 0
        return kept | (self.changes.journal.name if self.changes.journal is not None else 0)

    async def _retried(self, change: Callable[[], Awaitable[None]]) -> None:
        """Carry a change out that may find the journal full: then what it has done so far is committed, and it is repeated."""
        assert self.changes is not None
        has_room = self.changes.has_room
        while True:
            try:
                self.changes.check_room()
                await change()
                break
            except Full:
                await self.changes.commit()
            except OSError as error:
                if error.errno != errno.ENOSPC or not has_room:
                    raise
                has_room = False  # what failed has been given up, too: it is tried once more
                await self.changes.commit()
        await self.changes.settle()
        if self.changes.deferred and self.changes.journal is None:
            await self.changes.commit()

    def _drop_bitmaps(self) -> None:
        """Their autoclear bit is cleared: nothing leads to their clusters any more."""
        assert self._header.bitmaps is not None
        assert self._refcounts is not None
        assert self._integrity is not None
        found = bitmaps.clusters(self.file, self._header.bitmaps, self._cluster_bits)
        if found is None or len({*found[0], *found[1]}) != len(found[0]) + len(found[1]):
            return
        if all(self._refcounts.get(cluster) == 1 for cluster in (*found[0], *found[1])) and not any(
            self._integrity.is_metadata(cluster) for cluster in found[1]
        ):
            self._integrity.remove("bitmap directory", found[0])
            for cluster in (*found[1], *found[0]):
                self._refcounts.free(cluster, 1)

    def _entry(self, position: int) -> tuple[int, int]:
        """The L2 entry of a byte of the disk: its words, the second 0 if there is only one."""
        cluster = position >> self._cluster_bits
        table = self._l2.slice(cluster >> self._slice_bits)
        if table is None:
            return 0, 0
        at = (cluster & self._slice_mask) * self._words
        return table[at], table[at + 1] if self._words == 2 else 0

    def write_at_once(self, offset: int, data: Data) -> bool:
        stop = offset + len(data)
        if stop == offset or self._overwrite(offset, stop, data) or self._add(offset, stop, data):
            return True
        mask = self._cluster - 1
        if offset & mask and offset & self._entries.unit(*self._entry(offset), offset) - 1:
            return False
        if stop & mask and stop & self._entries.unit(*self._entry(stop - 1), stop - 1) - 1:
            return False
        return self._at_once(lambda: self._store(offset, stop, offset, data))

    def _at_once(self, change: Callable[[], object]) -> bool:
        """As :meth:`_retried`, of a change that does not suspend; False if it has not been made in whole, and is to be repeated."""
        changes = self.changes
        assert changes is not None
        if changes.has_room or (changes.deferred and changes.journal is None):
            return False
        try:
            changes.check_room()
            change()
        except Full:
            return False
        return True

    async def write(self, offset: int, data: Data) -> None:
        stop = offset + len(data)
        if stop == offset or self._overwrite(offset, stop, data):
            return
        await self._retried(lambda: self._write(offset, stop, data))

    async def _write(self, offset: int, stop: int, data: Data) -> None:
        mask = self._cluster - 1
        while True:
            first, last = offset, stop
            if offset & mask:
                first = offset & -self._entries.unit(*self._entry(offset), offset)
            if stop & mask:
                last = stop + -stop % self._entries.unit(*self._entry(stop - 1), stop - 1)
            if first == offset and last == stop:
                return self._store(offset, stop, offset, data)
            before = self._entry(offset), self._entry(stop - 1)
            head = b"" if self._reads_as_zeroes(first, offset) else await self.read(first, offset - first)
            end = min(last, self.size)
            tail = b"" if end <= stop or self._reads_as_zeroes(stop, end) else await self.read(stop, end - stop)
            if before == (self._entry(offset), self._entry(stop - 1)):
                return self._store(first, last, offset - len(head), b"".join((head, data, tail)) if head or tail else data)

    def _overwrite(self, offset: int, stop: int, data: Data) -> bool:
        """Write to what is held already, in one piece and without a change to any table; False if it is not that simple."""
        bits = self._cluster_bits
        cluster = offset >> bits
        table = self._l2.own_slice(cluster >> self._slice_bits)
        count = (stop - 1 >> bits) - cluster + 1
        if table is None or self._unchanged:
            return False
        at = (cluster & self._slice_mask) * self._words
        entry, bitmap = table[at], table[at + 1] if self._words == 2 else 0
        if count == 1:
            if not self._entries.holds(entry, bitmap, offset, stop):
                return False
        elif (
            (cluster & self._slice_mask) + count > self._slice_mask + 1
            or not self._entries.holds(entry, bitmap, cluster << bits, cluster + 1 << bits)
            or self._entries.alike(table, at, count) < count
        ):
            return False
        host = entry & HOST_OFFSET
        first = host >> bits
        if not self._external:
            assert self._integrity is not None
            assert self._refcounts is not None
            if first + count > self._refcounts.end or self._integrity.forbids(first, count):
                return False
        assert self.changes is not None
        if self.changes.watches(first, count):
            return False
        self.data.write(host + (offset & self._cluster - 1), data)
        return True

    def _add(self, offset: int, stop: int, data: Data, staged: tuple[int, Data] | None = None) -> bool:
        """Store whole subclusters of one cluster that are not held yet: the commonest change of an overlay, in few steps.

        ``staged``: as for :meth:`Changes.write`. False if it is anything else, or has to be committed first; then nothing has
        changed. Raises OSError, as :meth:`_store`.
        """
        bits, mask = self._cluster_bits, self._cluster - 1
        cluster = offset >> bits
        if (
            self._words == 1
            or self._external
            or self._unchanged
            or (offset | stop) & self.subcluster - 1
            or stop - 1 >> bits != cluster
        ):
            return False
        changes, refcounts, integrity = self.changes, self._refcounts, self._integrity
        assert changes is not None
        assert refcounts is not None
        assert integrity is not None
        if integrity.damage or (changes.deferred and (changes.journal is None or changes.has_room)):
            return False
        index = cluster >> self._slice_bits
        table = self._l2.own_slice(index)
        if table is None:
            return False
        at = (cluster & self._slice_mask) * 2
        entry, bitmap = table[at], table[at + 1]
        wanted = self._entries.bits(offset, stop)
        if bitmap & (wanted | wanted << 32):
            return False
        new = not entry and not bitmap
        host = entry & HOST_OFFSET
        if new:
            place, _ = refcounts.allocate_next()
            host = place << bits
        elif (
            entry & ~HOST_OFFSET != COPIED
            or not host
            or host & mask
            or host >> bits >= refcounts.end
            or integrity.forbids(host >> bits)
            or bitmap & bitmap >> 32
        ):
            return False
        try:
            if changes.journal is not None:
                changes.check_room()
            changes.write(offset, stop, host + (offset & mask), offset, data, staged)
        except (OSError, Full) as error:
            if new:
                changes.free(host >> bits, 1)
            if isinstance(error, Full):
                return False
            raise
        self._l2.put_entry(table, index, at, host | COPIED, bitmap | wanted)
        return True

    def populate_at_once(self, offset: int, data: Data) -> bool:
        """As :meth:`populate`, if that need not wait; False if it may, and it is to be called then."""
        if not _is_zero(data) and self._add(offset, offset + len(data), data):
            return True
        return self._at_once(lambda: self._save(offset, data))

    def stage(self, start: int, old: Data, offset: int, data: Data) -> bool:
        """As :meth:`populate_at_once`, of a few subclusters; and the journal has what is to be written to the backing node then.

        The caller sees to that (:mod:`replfs.block.staging`); if he does not live to, who opens the image next does. False if it
        has not been done. Raises OSError.
        """
        changes = self.changes
        assert changes is not None
        return changes.carries(len(old)) and self._add(start, start + len(old), old, (offset, data))

    async def populate(self, offset: int, data: Data) -> None:
        """Save what the backing node has, in whole subclusters that are missing here (the last one may end with the disk).

        Zeroes are noted as such and take no room. Raises OSError.
        """
        await self._retried(lambda: self._populate(offset, data))

    async def _populate(self, offset: int, data: Data) -> None:
        self._save(offset, data)

    def _save(self, offset: int, data: Data) -> None:
        stop = offset + len(data) + -len(data) % self.subcluster
        if _is_zero(data):
            self._store_zeroes(offset, stop, keep=True)
        else:
            self._store(offset, stop, offset, data)

    def _store(self, first: int, stop: int, start: int, data: Data) -> None:
        """Make ``first .. stop`` held: ``data`` from ``start`` on, and zeroes around it, which never reach a cluster further.

        What is not written in place is whole: ``first`` and ``stop`` are where :meth:`write` has found that they have to be. Never
        suspends. Each step is complete on its own: an error leaves what was written before it, and the rest unchanged.

        Raises OSError, Full.
        """
        self._begin_change()
        assert self.changes is not None
        view = memoryview(data)
        bits, words = self._cluster_bits, self._words
        position = first
        while position < stop:
            cluster = position >> bits
            index = cluster >> self._slice_bits
            table = self._l2.slice_for_writing(index)
            at = (cluster & self._slice_mask) * words
            most = min((stop - 1 >> bits) - cluster, self._slice_mask - (cluster & self._slice_mask), _RUN >> bits) + 1
            in_place = self._entries.own(table[at])
            if in_place:
                host = table[at] & HOST_OFFSET
                count, fresh = 1, False
                while count < most and table[at + count * words] & PLACE == COPIED | host + (count << bits):
                    count += 1
                self._check_entries(table, at, count, cluster)
            else:
                count = 1
                while count < most and not self._entries.own(table[at + count * words]):
                    count += 1
                self._check_entries(table, at, count, cluster)
                host, count, fresh = self._allocate(cluster, count)
            until = min(stop, cluster + count << bits)
            low, high = max(position, start), min(until, start + len(view))
            part: Data = view[low - start : high - start]
            if not fresh and (low > position or high < until):
                part = b"".join((bytes(low - position), part, bytes(until - high)))
                low = position
            old = table[at : at + count * words]
            new = self._entries.held(old, cluster, host, position, until)
            try:
                if new != old or any(self.changes.watches((host >> bits) + i) for i in range(count)):
                    self.changes.write(position, until, host + position - (cluster << bits), low, part)
                else:
                    self.data.write(host + low - (cluster << bits), part)
            except (OSError, Full):
                if in_place:
                    for held in self._held(old, cluster, position, until):
                        self.changes.torn(held.start, held.stop, held.host)
                elif not self._external:
                    self.changes.free(host >> bits, count)
                raise
            if new != old:
                self._l2.put(index, at, new)
                if not in_place:
                    self._let_go(old)
            position = until

    def _held(self, words: "array.array[int]", cluster: int, start: int, stop: int) -> list[Range]:
        """The parts of a range that are data, by the entries from ``cluster`` on."""
        found: list[Range] = []
        for i in range(0, len(words), self._words):
            base = cluster + i // self._words << self._cluster_bits
            bitmap = words[i + 1] if self._words == 2 else 0
            self._entries.split(found, words[i], bitmap, max(start, base), min(stop, base + self._cluster))
        return [part for part in found if part.kind is Kind.DATA]

    def _check_entries(self, table: "array.array[int]", at: int, count: int, cluster: int) -> None:
        """Before they are changed, or what they lead to: the entries from ``at`` on, of the disk's ``cluster`` on.

        Raises OSError (EIO) if one is damaged; if it leads to metadata, the image is marked corrupt.
        """
        assert self._integrity is not None
        assert self._refcounts is not None
        for i in range(count):
            entry, bitmap = table[at + i * self._words], table[at + 1 + i * self._words] if self._words == 2 else 0
            if not entry and not bitmap:
                continue
            position = cluster + i << self._cluster_bits
            self._entries.split([], entry, bitmap, position, position + 1)
            if self._external:
                if entry & HOST_OFFSET >= self.size + -self.size % self._cluster:
                    raise self._entries.damaged(position)
                continue
            first, used = self._entries.leads_to(entry)
            if first + used > self._refcounts.end + bool(entry & COMPRESSED):  # whose end is rounded up to whole sectors
                raise self._entries.damaged(position)
            for host in range(
                first, first + used
            ):  # an image that was repaired may share a cluster with a table, and count it twice
                if self._integrity.is_metadata(host) and (self._entries.own(entry) or self._refcounts.get(host) < 2):
                    self._integrity.check_data(host, 1)

    def _allocate(self, cluster: int, count: int) -> tuple[int, int, bool]:
        """Room for ``count`` clusters of the disk at most: (offset in the data file, clusters, surely zero)."""
        if self._external:
            return cluster << self._cluster_bits, count, False
        assert self._refcounts is not None
        host, count, fresh = self._refcounts.allocate(count)
        return host << self._cluster_bits, count, fresh

    def _let_go(self, entries: "array.array[int]") -> None:
        """These entries are in the tables no more: count what they led to once less. Raises OSError."""
        if self._external:
            return
        assert self.changes is not None
        for entry in entries[:: self._words]:
            first, count = self._entries.leads_to(entry)
            if count:
                self.changes.free(first, count)

    # The journal

    @property
    def journal_name(self) -> int:
        """Which journal replfs worked with when it was the last that wrote to the image, and did not end well; else 0."""
        bits = self._header.autoclear
        return bits & (AUTOCLEAR_JOURNAL | JOURNAL_NAME) if bits & AUTOCLEAR_JOURNAL else 0

    async def defer(self, journal: Journal | None, *, append_only: bool = False) -> None:
        """Defer changes from now on (:mod:`replfs.block.qcow2.changes`), as long as nothing has been changed yet.

        What the journal has from an earlier process is in the tables when this returns. It is this image's from now on. Raises
        OSError.
        """
        assert self.changes is not None
        self.changes.deferred = True
        self.changes.append_only = append_only
        if journal is not None:
            self.changes.journal = journal  # first of all: the image goes on saying that it has one
            records = await trio.to_thread.run_sync(journal.records)
            if journal.used:
                self._begin_change()
                assert self._refcounts is not None
                replay = Replay(
                    *(self.data, self._l2, self._entries, self._refcounts, self.changes),
                    cluster_bits=self._cluster_bits,
                    size=self.size,
                    backed=self._backed,
                    counted=not self._external,
                )
                count = replay.run(records)
                logger.info("%s: %d of %d changes were taken from the journal", printable(self.file.path), count, len(records))
                await self.changes.begin()
                if any(record.data for record in records):
                    await self._apply(records)

    async def _apply(self, records: list[Record]) -> None:
        """Write what is staged, now that what it overwrites is on stable storage. Raises OSError."""
        assert self.backing is not None
        assert self.changes is not None
        assert self.changes.journal is not None
        for record in records:
            if record.data:
                await self.backing.write(record.offset, record.data)
        await self.backing.flush()  # what is found after one power cut is there after the next
        self.changes.apply(self.changes.journal.number)
        await self.changes.begin()

    async def end_journal(self) -> None:
        """Everything is in the tables, on stable storage, and changes are immediate from now on. Raises OSError."""
        assert self.changes is not None
        await self.changes.flush()
        journal, self.changes.journal, self.changes.deferred = self.changes.journal, None, False
        if journal is not None:
            assert self._integrity is not None
            self._integrity.set_autoclear(self._autoclear())
            journal.file.close()

    # Zeroes

    async def write_zeroes(self, offset: int, length: int, may_unmap: bool = True) -> None:
        """Whole subclusters become zero without being written, and whole clusters give their room back if ``may_unmap``."""
        stop = offset + length
        unit = self.subcluster
        first, last = offset + -offset % unit, (stop + -stop % unit if stop == self.size else stop & -unit)
        if first >= last:
            return await self._write_zero_bytes(offset, stop)
        await self._write_zero_bytes(offset, first)
        await self._retried(lambda: self._zero(first, last, not may_unmap))
        if last < stop:
            await self._write_zero_bytes(last, stop)

    async def discard(self, offset: int, length: int) -> None:
        """Whole subclusters read as zeroes afterwards; a part of one stays, and so does what version 2 has no entry for."""
        stop = offset + length
        unit = self.subcluster
        first, last = offset + -offset % unit, (stop + -stop % unit if stop == self.size else stop & -unit)
        if self._header.version < 3:
            first = max(first, self._backed + -self._backed % unit)
        if first < last:
            await self._retried(lambda: self._zero(first, last, False))

    async def _write_zero_bytes(self, start: int, stop: int) -> None:
        """Zeroes as data; what reads as zeroes already is left as it is."""
        while start < stop:
            until = min(stop, start + _PIECE - start % _PIECE)
            for part in self.ranges(start, until):
                if not self._reads_as_zeroes(part.start, part.stop):
                    await self.write(part.start, bytes(part.stop - part.start))
            start = until

    async def _zero(self, first: int, last: int, keep: bool) -> None:
        """Make whole subclusters zero (the last one may end with the disk); ``keep`` their room."""
        assert self.changes is not None
        if self._header.version < 3:
            backed = min(last, self._backed + -self._backed % self._cluster) if not keep else last
            await self._write_zero_bytes(first, min(backed, self.size))
            first = max(first, backed)
        slice_span = self._slice_bits + self._cluster_bits
        while first < last:
            if first >= self._backed and not self.may_hold(first)[0]:
                first = self._next_slice(first)
                continue
            until = min(last, ((first >> slice_span) + 1) << slice_span)
            for start, stop in self._cut(first, until):
                part = start & self._cluster - 1 or (stop & self._cluster - 1 and stop < self.size)
                if part and self._entry(start)[0] & COMPRESSED:
                    await self._write_zero_bytes(start, min(stop, self.size))
                else:
                    if self._header.raw_data_file:  # first in the file, but the journal has to know before that
                        self._begin_change()
                        self.changes.zero(start, stop, keep)
                        await self.data.write_zeroes(start, min(stop, self.size) - start, not keep)
                    for offset, length in self._store_zeroes(start, stop, keep):
                        await self.data.discard(offset, length)
            first = until
            if first < last:
                await trio.lowlevel.checkpoint()

    def _cut(self, start: int, stop: int) -> list[tuple[int, int]]:
        """A range in its whole clusters and, by themselves, the parts of clusters at its ends."""
        head = min(start + -start % self._cluster, stop)
        tail = max(stop & -self._cluster, head)
        return [(a, b) for a, b in ((start, head), (head, tail), (tail, stop)) if a < b]

    def _store_zeroes(self, start: int, stop: int, keep: bool) -> list[tuple[int, int]]:
        """Mark whole subclusters as zero. Never suspends. Raises OSError, Full.

        Gives back what of an external data file is to be discarded, (offset, length) in bytes: by the caller, before the request
        is answered, since the next one may write there.
        """
        self._begin_change()
        assert self.changes is not None
        bits, words = self._cluster_bits, self._words
        external: list[tuple[int, int]] = []
        while start < stop:
            cluster = start >> bits
            index = cluster >> self._slice_bits
            until = min(stop, (index + 1) << self._slice_bits + bits)
            count = (until - 1 >> bits) - cluster + 1
            table = self._l2.slice_for_writing(index)
            at = (cluster & self._slice_mask) * words
            self._check_entries(table, at, count, cluster)
            old = table[at : at + count * words]
            new = self._entries.zeroed(old, cluster, start, until, self._backed, keep)
            if new != old:
                self.changes.zero(start, until, keep)
                self._l2.put(index, at, new)
                for i in range(0, len(old), words):
                    if old[i] & PLACE != new[i] & PLACE:
                        base = cluster + i // words << bits
                        if not self._external:
                            self._give_up(old[i])
                        elif self._entries.own(old[i]):  # the bytes that are the request's own: others may be writing to the rest
                            low, high = max(start, base), min(until, base + self._cluster)
                            external.append(((old[i] & HOST_OFFSET) + low - base, high - low))
            start = until
        return external

    def _give_up(self, entry: int) -> None:
        """Count what an entry led to once less; what nobody else uses gives its room back, too."""
        assert self.changes is not None
        assert self._refcounts is not None
        first, used = self._entries.leads_to(entry)
        for cluster in range(first, first + used):
            if self._refcounts.get(cluster) == 1:
                self.changes.release(cluster << self._cluster_bits, self._cluster)
            else:
                self.changes.free(cluster, 1)

    # The rest

    async def flush(self) -> None:
        """Put this image on stable storage; the backing node is its owner's to flush."""
        if self.changes is not None:
            await self.changes.flush()
        else:
            await self.file.sync()

    async def harden(self) -> None:
        """Have what the journal stands for outlive a power cut, for an image whose data is only appended to. Raises OSError."""
        assert self.changes is not None
        await self.changes.harden()

    @property
    def damage(self) -> str:
        """Why nothing is written to the image any more, empty if all is well."""
        return self._integrity.damage if self._integrity is not None else ""

    async def close(self) -> None:
        if self.changes is not None:
            await self.changes.close()
        self.release()

    def release(self) -> None:
        """As :meth:`close`, for those who cannot await."""
        self._l2.close()
        self._plain.close()
        if self._refcounts is not None:
            self._refcounts.close()
        if self.changes is not None and self.changes.journal is not None:
            self.changes.journal.file.close()
        self.data.close()
        self.file.close()
        if self._owns_backing and self.backing is not None:
            self.backing.release()
