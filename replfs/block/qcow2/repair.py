"""Rebuilding the refcounts of an image whose dirty bit says that they were left behind (lazy refcounts, and a process that was
killed).

All that the header leads to is counted, a window of the file at a time, so that memory stays bounded. The new refcounts are built
in room behind the file's end, and one write to the header puts them in the place of the old. Until then the dirty bit stays, so a
repair that is cut short is simply done again.
"""

import array
import logging
import struct
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from pyroaring import BitMap64

from replfs.block.file import File
from replfs.block.qcow2 import bitmaps
from replfs.block.qcow2.compression import descriptor
from replfs.block.qcow2.entries import COMPRESSED, COPIED
from replfs.block.qcow2.header import (
    DATA_FILE,
    DIRTY,
    HOST_OFFSET,
    INCOMPATIBLE_AT,
    REFCOUNT_TABLE_AT,
    REFCOUNT_TABLE_LIMIT,
    Header,
)
from replfs.block.qcow2.refcounts import Block
from replfs.block.qcow2.snapshots import Snapshot
from replfs.block.qcow2.words import from_words, to_words
from replfs.errors import ReplfsError, printable

logger = logging.getLogger(__name__)

_WINDOW: Final = 8 << 20  # clusters, of 4 bytes each
_WINDOWS: Final = 64  # or it would take too long, since each goes through all tables


def rebuild_refcounts(file: File, header: Header, snapshots: list[Snapshot], snapshots_length: int) -> Header:
    """Give the image right refcounts and COPIED flags, clear its dirty bit, and return the header that it has then.

    Raises ReplfsError if what is to be counted is damaged, OSError.
    """
    header = _Rebuild(file, header, snapshots, snapshots_length).run()
    logger.warning("%s was left dirty by the last process that wrote to it: its refcounts were rebuilt", printable(file.path))
    return header


class _Rebuild:
    def __init__(self, file: File, header: Header, snapshots: list[Snapshot], snapshots_length: int) -> None:
        self._file = file
        self._header = header
        self._snapshots = snapshots
        self._snapshots_length = snapshots_length
        self._bits = header.cluster_bits
        self._clusters = -(-file.length() >> self._bits) + 1  # the last one: compressed data may be said to end behind the file
        self._per_block = header.cluster * 8 >> header.refcount_order
        self._entry_words = 2 if header.extended else 1

    def run(self) -> Header:
        header, per_block = self._header, self._per_block
        needed, start = self._survey()
        table = 1
        while True:
            blocks = needed.copy()
            blocks.add_range(start // per_block, (start + table + len(needed) - 1) // per_block + 1)
            entries = blocks.max() + 1
            if blocks == needed and -(-entries * 8 >> self._bits) <= table:
                break
            needed, table = blocks, max(table, -(-entries * 8 >> self._bits))
        if table << self._bits > REFCOUNT_TABLE_LIMIT:
            raise self._damaged("its refcount table would be larger than QEMU allows")
        words = array.array("Q", bytes(table << self._bits))
        for i, index in enumerate(needed):
            words[index] = (start + table + i) << self._bits
        if not self._file.fixed:
            self._file.truncate(max((start + table + len(needed)) << self._bits, self._file.length()))
        step = -(-_WINDOW // per_block)
        if entries > _WINDOWS * step:
            raise self._damaged("it is too large")
        for first in range(0, entries, step):
            if needed.range_cardinality(first, first + step):
                counts = self._count(first * per_block, min(first + step, entries) * per_block)
                low = first * per_block
                for cluster in range(max(start, low), min(start + table + len(needed), low + len(counts))):
                    counts[cluster - low] += 1
                self._fix_copied(low, counts)
                self._write_blocks(first, counts, words)
        self._file.write(start << self._bits, from_words(words))
        self._file.sync_now()
        self._file.write(REFCOUNT_TABLE_AT, struct.pack(">QI", start << self._bits, table))
        self._file.sync_now()
        self._file.write(INCOMPATIBLE_AT, struct.pack(">Q", header.incompatible & ~DIRTY))
        return replace(
            header,
            refcount_table_offset=start << self._bits,
            refcount_table_clusters=table,
            incompatible=header.incompatible & ~DIRTY,
        )

    def _survey(self) -> tuple[BitMap64, int]:
        """Which refcount blocks are needed, and the first cluster behind all that is used, and behind the old refcounts."""
        header, per_block = self._header, self._per_block
        needed, end, latest = BitMap64(), header.refcount_table_clusters + (header.refcount_table_offset >> self._bits), -1
        for entry in to_words(self._file.read_now(header.refcount_table_offset, header.refcount_table_clusters << self._bits)):
            end = max(end, min((entry >> self._bits) + 1, self._clusters))
        for first, last in self._used():
            if last > self._clusters:
                raise self._damaged(f"cluster {last - 1} is used, and the file has not got it")
            end = max(end, last)
            if not first // per_block == (last - 1) // per_block == latest:
                latest = (last - 1) // per_block
                needed.add_range(first // per_block, latest + 1)
        return needed, end

    def _damaged(self, why: str) -> ReplfsError:
        return ReplfsError(
            f"{printable(self._file.path)} was left dirty by the last process that wrote to it, and cannot be repaired here:"
            f" {why}: repair it with qemu-img check -r all"
        )

    def _count(self, low: int, high: int) -> "array.array[int]":
        """How often each cluster of ``low .. high`` is used."""
        counts = array.array("I", bytes(4 * (high - low)))
        for first, last in self._used():
            for cluster in range(max(first, low), min(last, high)):
                counts[cluster - low] += 1
        return counts

    def _used(self) -> Iterator[tuple[int, int]]:
        """Every use of a cluster that counts: (first, behind the last)."""
        header, bits = self._header, self._bits
        yield 0, 1
        if header.snapshots:
            yield self._range(header.snapshots_offset, self._snapshots_length)
        if header.bitmaps is not None:
            found = bitmaps.clusters(self._file, header.bitmaps, bits)
            if found is None:
                raise self._damaged("its bitmaps are damaged")
            yield found[0].start, found[0].stop
            for cluster in found[1]:
                yield cluster, cluster + 1
        l1_clusters = BitMap64()
        for l1_offset, l1_entries in (Snapshot(header.l1_offset, header.l1_entries), *self._snapshots):
            clusters = BitMap64()
            clusters.add_range(*self._range(l1_offset, l1_entries * 8))
            if not clusters.isdisjoint(l1_clusters):
                raise self._damaged(f"the L1 table at {l1_offset} overlaps another")
            l1_clusters |= clusters
            yield self._range(l1_offset, l1_entries * 8)
            l1 = to_words(self._file.read_now(l1_offset, l1_entries * 8))
            tables = [entry & HOST_OFFSET for entry in l1 if entry & HOST_OFFSET]
            if len(BitMap64(tables)) != len(tables):
                raise self._damaged(f"the L1 table at {l1_offset} has an L2 table twice")
            for offset in tables:
                yield self._range(offset, header.cluster)
                if not header.incompatible & DATA_FILE:
                    yield from self._used_by(offset)

    def _used_by(self, table: int) -> Iterator[tuple[int, int]]:
        mask = self._header.cluster - 1
        for entry in self._table(table)[:: self._entry_words]:
            if entry & COMPRESSED:
                yield self._range(*descriptor(entry, self._bits))
            elif offset := entry & HOST_OFFSET:
                if offset & mask:
                    raise self._damaged(f"the L2 table at {table} has an entry that is not aligned")
                yield offset >> self._bits, (offset >> self._bits) + 1

    def _table(self, offset: int) -> "array.array[int]":
        size = self._header.cluster
        if offset % size:
            raise self._damaged(f"an L2 table at {offset} is not aligned")
        return to_words(self._file.read_now(offset, size).ljust(size, b"\0"))

    def _range(self, offset: int, length: int) -> tuple[int, int]:
        return offset >> self._bits, -(-(offset + length) >> self._bits)

    def _fix_copied(self, low: int, counts: "array.array[int]") -> None:
        """The flags of the clusters in this window: set where the count is one, in what the active L1 table leads to."""
        header = self._header

        def fixed(entry: int) -> int:
            cluster = (entry & HOST_OFFSET) >> self._bits
            if entry & COMPRESSED or not cluster or not low <= cluster < low + len(counts):
                return entry
            return entry | COPIED if counts[cluster - low] == 1 else entry & ~COPIED

        l1 = to_words(self._file.read_now(header.l1_offset, header.l1_entries * 8))
        for i, entry in enumerate(l1):
            if entry & HOST_OFFSET and not header.incompatible & DATA_FILE:
                table = self._table(entry & HOST_OFFSET)
                words = table[:]
                words[:: self._entry_words] = array.array("Q", [fixed(word) for word in table[:: self._entry_words]])
                if words != table:
                    self._file.write(entry & HOST_OFFSET, from_words(words))
            if fixed(entry) != entry:
                self._file.write(header.l1_offset + i * 8, struct.pack(">Q", fixed(entry)))

    def _write_blocks(self, first: int, counts: "array.array[int]", table: "array.array[int]") -> None:
        """The blocks from the ``first`` on that ``table`` has a place for."""
        order, per_block = self._header.refcount_order, self._per_block
        for i in range(0, len(counts), per_block):
            if offset := table[first + i // per_block]:
                values = counts[i : i + per_block].tolist()
                if max(values) >= 1 << (1 << order):
                    raise self._damaged(f"a cluster is used {max(values)} times, more than its refcounts can say")
                _, raw = Block(bytearray(self._header.cluster), order).changed(0, values)
                self._file.write(offset, raw)
