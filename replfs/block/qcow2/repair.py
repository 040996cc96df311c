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
from replfs.block.qcow2.header import DATA_FILE, DIRTY, HOST_OFFSET, INCOMPATIBLE_AT, REFCOUNT_TABLE_AT, Header
from replfs.block.qcow2.refcounts import Block
from replfs.block.qcow2.snapshots import Snapshot
from replfs.block.qcow2.words import from_words, to_words
from replfs.errors import ReplfsError, printable

logger = logging.getLogger(__name__)

_WINDOW: Final = 8 << 20  # clusters, of 4 bytes each


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
        self._entry_words = 2 if header.extended else 1

    def run(self) -> Header:
        header, size = self._header, self._header.cluster
        per_block = size * 8 >> header.refcount_order
        start, table, blocks = self._clusters, 1, 1
        while (needed := -(-(start + table + blocks) // per_block)) > blocks or -(-needed * 8 >> self._bits) > table:
            blocks, table = max(blocks, needed), max(table, -(-needed * 8 >> self._bits))
        self._file.truncate((start + table + blocks) << self._bits)
        step = -(-_WINDOW // per_block) * per_block
        for low in range(0, blocks * per_block, step):
            counts = self._count(low, min(low + step, blocks * per_block))
            for cluster in range(max(start, low), min(start + table + blocks, low + len(counts))):
                counts[cluster - low] += 1
            self._fix_copied(low, counts)
            self._write_blocks(low, counts, (start + table) << self._bits)
        words = array.array("Q", [(start + table + i) << self._bits for i in range(blocks)])
        self._file.write(start << self._bits, from_words(words).ljust(table << self._bits, b"\0"))
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

    def _damaged(self, why: str) -> ReplfsError:
        return ReplfsError(
            f"{printable(self._file.path)} was left dirty by the last process that wrote to it, and cannot be repaired here:"
            f" {why}: repair it with qemu-img check -r all"
        )

    def _count(self, low: int, high: int) -> "array.array[int]":
        """How often each cluster of ``low .. high`` is used."""
        counts = array.array("I", bytes(4 * (high - low)))
        for first, last in self._used():
            if last > self._clusters:
                raise self._damaged(f"cluster {last - 1} is used, and the file has not got it")
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
        for l1_offset, l1_entries in (Snapshot(header.l1_offset, header.l1_entries), *self._snapshots):
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

    def _write_blocks(self, low: int, counts: "array.array[int]", first_block: int) -> None:
        header = self._header
        per_block = header.cluster * 8 >> header.refcount_order
        for i in range(0, len(counts), per_block):
            values = counts[i : i + per_block].tolist()
            if max(values) >= 1 << (1 << header.refcount_order):
                raise self._damaged(f"a cluster is used {max(values)} times, more than its refcounts can say")
            block = Block(bytearray(header.cluster), header.refcount_order)
            _, raw = block.changed(0, values)
            self._file.write(first_block + ((low + i) // per_block << self._bits), raw)
