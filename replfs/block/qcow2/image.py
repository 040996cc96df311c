"""A qcow2 image as a node: what it holds itself, over what its backing node holds.

How it is read is in :mod:`replfs.block.qcow2.reading`. A write that covers a subcluster only in part stores it whole, with what was
read there before. What may be written in place is the image's alone (COPIED); what it shares with a snapshot, or has compressed,
is copied first.

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

from replfs.block.cache import Cache
from replfs.block.file import File
from replfs.block.node import Data
from replfs.block.qcow2 import bitmaps, snapshots
from replfs.block.qcow2.changes import Changes
from replfs.block.qcow2.entries import COMPRESSED, COPIED, PLACE, Kind, Range
from replfs.block.qcow2.header import AUTOCLEAR_JOURNAL, AUTOCLEAR_RAW_DATA, CORRUPT, DIRTY, HOST_OFFSET, JOURNAL_NAME, Header
from replfs.block.qcow2.integrity import Integrity
from replfs.block.qcow2.journal import Full, Journal, Record
from replfs.block.qcow2.l2 import L2Tables
from replfs.block.qcow2.reading import ReadOnlyImage
from replfs.block.qcow2.refcounts import Refcounts
from replfs.block.qcow2.repair import rebuild_refcounts
from replfs.block.qcow2.replay import Replay
from replfs.block.raw import Raw
from replfs.errors import ReplfsError, printable

logger = logging.getLogger(__name__)

_PIECE: Final = 1 << 20
_RUN: Final = 8 << 20  # bytes, or a cluster more, that are stored in one step: the journal has to have room for the hashes
_HASHED: Final = 4096  # bytes at most that one hash in the journal stands for: what a kill leaves whole


def _is_zero(data: Data) -> bool:
    """Whether there is nothing else; most often the first or the last byte tells."""
    return not data[0] and not data[-1] and bytes(data) == bytes(len(data))


def _prepared(file: File, header: Header, cache: Cache) -> tuple[Header, Integrity, Refcounts]:
    """What writing needs: known metadata, and refcounts that are right. Gives the header as it is then, too."""
    shown = printable(file.path)
    if header.incompatible & CORRUPT:
        raise ReplfsError(f"{shown} is marked corrupt: repair it with qemu-img check -r all", errno.EUCLEAN)
    found, table_length = snapshots.read(file, header)
    if header.incompatible & DIRTY:
        header = rebuild_refcounts(file, header, found, table_length)
    integrity = Integrity(file, header)
    integrity.survey("header", 0, header.cluster)
    refcounts = Refcounts(file, header, integrity, cache)
    if found:
        integrity.survey("snapshot table", header.snapshots_offset, table_length)
    for offset, entries in found:
        integrity.survey("snapshot's L1 table", offset, entries * 8)
    if header.bitmaps is not None:
        integrity.survey("bitmap directory", header.bitmaps.offset, header.bitmaps.length)
    return header, integrity, refcounts


class Image(ReadOnlyImage):
    """One that is written to."""

    def __init__(
        self,
        file: File,
        header: Header,
        backing: Raw | ReadOnlyImage | None,
        cache: Cache,
        *,
        data: File | None = None,
        size: int | None = None,
        owns_backing: bool = False,
    ) -> None:
        """As :class:`ReadOnlyImage`. Raises ReplfsError if the image cannot be served for writing, too."""
        header, integrity, refcounts = _prepared(file, header, cache)
        self._integrity: Final = integrity
        self._refcounts: Final = refcounts
        tables = L2Tables(file, header, refcounts, integrity, cache)
        super().__init__(file, header, backing, cache, data=data, size=size, tables=tables, owns_backing=owns_backing)
        self.changes: Final = Changes(file, self.data, tables, refcounts, header.cluster_bits, min(self.subcluster, _HASHED))
        tables.use(self.changes)
        self._unchanged = True  # by this process

    # Writing

    def _begin_change(self) -> None:
        """Before anything is written. Raises OSError (EIO) if the image is known to be corrupt."""
        self._integrity.check_writable()
        if self._unchanged:
            self._integrity.set_autoclear(self._autoclear())
            self._unchanged = False
            if self._header.bitmaps is not None:
                self._drop_bitmaps()

    def _autoclear(self) -> int:
        """The bits that hold while this process changes the image."""
        kept = self._header.autoclear & AUTOCLEAR_RAW_DATA if self._external else 0
        return kept | (self.changes.journal.name if self.changes.journal is not None else 0)

    async def _retried(self, change: Callable[[], Awaitable[None]]) -> None:
        """Carry a change out that may find the journal full: then what it has done so far is committed, and it is repeated."""
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
        found = bitmaps.clusters(self.file, self._header.bitmaps, self._cluster_bits)
        if found is None or len({*found[0], *found[1]}) != len(found[0]) + len(found[1]):
            return
        if all(self._refcounts.get(cluster) == 1 for cluster in (*found[0], *found[1])) and not any(
            self._integrity.is_metadata(cluster) for cluster in found[1]
        ):
            self._integrity.remove("bitmap directory", found[0])
            for cluster in (*found[1], *found[0]):
                self._refcounts.free(cluster, 1)

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
        if not self._external and (first + count > self._refcounts.end or self._integrity.forbids(first, count)):
            return False
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
        host, count, fresh = self._refcounts.allocate(count)
        return host << self._cluster_bits, count, fresh

    def _let_go(self, entries: "array.array[int]") -> None:
        """These entries are in the tables no more: count what they led to once less. Raises OSError."""
        if self._external:
            return
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
        self.changes.deferred = True
        self.changes.append_only = append_only
        if journal is not None:
            self.changes.journal = journal  # first of all: the image goes on saying that it has one
            records = await trio.to_thread.run_sync(journal.records)
            if journal.used:
                self._begin_change()
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
        assert self.changes.journal is not None
        for record in records:
            if record.data:
                await self.backing.write(record.offset, record.data)
        await self.backing.flush()  # what is found after one power cut is there after the next
        self.changes.apply(self.changes.journal.number)
        await self.changes.begin()

    async def end_journal(self) -> None:
        """Everything is in the tables, on stable storage, and changes are immediate from now on. Raises OSError."""
        await self.changes.flush()
        journal, self.changes.journal, self.changes.deferred = self.changes.journal, None, False
        if journal is not None:
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
        first, used = self._entries.leads_to(entry)
        for cluster in range(first, first + used):
            if self._refcounts.get(cluster) == 1:
                self.changes.release(cluster << self._cluster_bits, self._cluster)
            else:
                self.changes.free(cluster, 1)

    # The rest

    async def flush(self) -> None:
        await self.changes.flush()

    async def harden(self) -> None:
        """Have what the journal stands for outlive a power cut, for an image whose data is only appended to. Raises OSError."""
        await self.changes.harden()

    @property
    def damage(self) -> str:
        return self._integrity.damage

    async def close(self) -> None:
        await self.changes.close()
        self.release()

    def release(self) -> None:
        self._refcounts.close()
        if self.changes.journal is not None:
            self.changes.journal.file.close()
        super().release()
