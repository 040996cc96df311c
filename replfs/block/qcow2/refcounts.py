"""Which clusters of an image's file are in use: the refcount table, a bounded cache of refcount blocks, and what gives out new
clusters.

Every change is in the file before it is made in memory. New blocks and tables are on stable storage before anything leads to them,
and before they give out clusters. Free clusters are looked for from the lowest that may be free on, a bounded
stretch at a time; when none is found in it, the file grows. A refcount block that is missing is made at the first cluster that it
counts, so it counts itself; a table that is full is replaced by a larger one behind everything that the old one could count
(specification, "Host cluster management").
"""

import array
import errno
import struct
from typing import Final

from replfs.block.cache import Cache, Shelf
from replfs.block.file import File
from replfs.block.qcow2.header import REFCOUNT_TABLE_AT, REFCOUNT_TABLE_LIMIT, Header
from replfs.block.qcow2.integrity import Integrity
from replfs.block.qcow2.words import from_words, to_words

_SCAN_BYTES: Final = 1 << 20
"""Of refcount blocks, that one allocation looks through before the file grows. A small block counts as one of 16 KiB."""

_SURVEY: Final = 1 << 16  # entries of the table, at once

TABLE: Final = "refcount table"
BLOCK: Final = "refcount block"


class Block:
    """One refcount block: entries of ``1 << order`` bits, as they are in the file."""

    __slots__ = ("_order", "raw")

    _TYPES: Final = "BHIQ"
    _HAS_NO_ZERO: Final = tuple(
        bytes(all(byte >> shift & (1 << (1 << order)) - 1 for shift in range(0, 8, 1 << order)) for byte in range(256))
        for order in range(3)
    )
    """For entries of less than a byte: which bytes hold no entry that is zero."""

    def __init__(self, raw: bytearray, order: int) -> None:
        self.raw = raw
        self._order = order

    def get(self, position: int) -> int:
        order = self._order
        if order >= 3:
            width = 1 << order - 3
            return int.from_bytes(self.raw[position * width : (position + 1) * width])
        bit = position << order
        return self.raw[bit >> 3] >> (bit & 7) & (1 << (1 << order)) - 1

    def changed(self, position: int, values: list[int]) -> tuple[int, bytes]:
        """What the file has to hold for entries to have these values: (byte in the block, bytes)."""
        order = self._order
        if order >= 3:
            width = 1 << order - 3
            return position * width, b"".join([value.to_bytes(width) for value in values])
        first, last = position << order >> 3, (position + len(values) - 1 << order) >> 3
        copy = self.raw[first : last + 1]
        mask = (1 << (1 << order)) - 1
        for i, value in enumerate(values, position):
            bit = (i << order) - first * 8
            copy[bit >> 3] = copy[bit >> 3] & ~(mask << (bit & 7)) | value << (bit & 7)
        return first, bytes(copy)

    def find_free(self, position: int) -> int | None:
        """The first entry from ``position`` on that is zero."""
        order, raw = self._order, self.raw
        if order >= 3:
            if not position << order >> 3 < len(raw):
                return None
            if not self.get(position):  # as most often: what was given out last is just before it
                return position
            entries = array.array(self._TYPES[order - 3], raw[position << order >> 3 :])  # zero is zero in any byte order
            try:
                return position + entries.index(0)
            except ValueError:
                return None
        per_byte = 8 >> order
        until = -(-position // per_byte) * per_byte
        for i in range(position, until):
            if not self.get(i):
                return i
        at = raw.translate(self._HAS_NO_ZERO[order]).find(0, until // per_byte)
        return next((i for i in range(at * per_byte, (at + 1) * per_byte) if not self.get(i)), None) if at >= 0 else None


class Refcounts:
    def __init__(self, file: File, header: Header, integrity: Integrity, cache: Cache) -> None:
        """Raises OSError if the table cannot be read."""
        self._file = file
        self._integrity = integrity
        self._cluster_bits = header.cluster_bits
        self._order = header.refcount_order
        self.per_block: Final = header.cluster * 8 >> header.refcount_order
        """Clusters that one block counts."""
        self._table_offset = header.refcount_table_offset
        self._table = to_words(file.read_now(self._table_offset, header.refcount_table_clusters << header.cluster_bits))
        self._blocks: Shelf[Block] = Shelf(cache, header.cluster)
        self._lowest = 0  # no cluster below is free, as far as is known
        self.end = -(-file.length() >> header.cluster_bits)
        """Clusters from here on were never written to."""
        self._limit = file.length() >> header.cluster_bits if file.fixed else None
        integrity.survey(TABLE, self._table_offset, len(self._table) * 8)
        for first_entry in range(0, len(self._table), _SURVEY):
            integrity.survey_table(BLOCK, self._table[first_entry : first_entry + _SURVEY].tolist())

    def _table_clusters(self) -> range:
        first = self._table_offset >> self._cluster_bits
        return range(first, first + (len(self._table) * 8 >> self._cluster_bits))

    def close(self) -> None:
        self._blocks.close()

    # Looking up

    def get(self, cluster: int) -> int:
        """A cluster's refcount. Raises OSError."""
        index, position = divmod(cluster, self.per_block)
        block = self._block(index) if index < len(self._table) else None
        return 0 if block is None else block.get(position)

    def _block(self, index: int) -> Block | None:
        block = self._blocks.get(index)
        if block is None and (offset := self._table[index]):
            if offset & ((1 << self._cluster_bits) - 1) or offset >= self.end << self._cluster_bits:
                raise self._integrity.damaged(f"refcount table entry {index} is {offset:#x}")
            size = 1 << self._cluster_bits
            block = Block(bytearray(self._file.read_now(offset, size).ljust(size, b"\0")), self._order)
            self._blocks.put(index, block)
        return block

    # Changing

    def allocate_next(self) -> tuple[int, bool]:
        """As :meth:`allocate`, of one cluster: (which, whether it surely reads as zeroes)."""
        first = self._lowest
        if self._order == 4 and self._limit is None:  # as in overlays, where the next one is behind the last one
            index, position = divmod(first, self.per_block)
            block = self._block(index) if index < len(self._table) else None
            if block is not None and not block.raw[position * 2] and not block.raw[position * 2 + 1]:
                self._integrity.check_data(first, 1)
                self._file.write(self._table[index] + position * 2, b"\0\1")
                block.raw[position * 2 + 1] = 1
                self._lowest = first + 1
                fresh = first >= self.end
                if fresh:
                    self.end = first + 1
                return first, fresh
        first, _, fresh = self.allocate(1)
        return first, fresh

    def allocate(self, wanted: int) -> tuple[int, int, bool]:
        """Count up to ``wanted`` neighbouring clusters as used once: (the first, how many, whether they surely read as zeroes).

        Raises OSError (ENOSPC and others); nothing is allocated then. :meth:`free` undoes it.
        """
        first, growing, to_scan = self._lowest, False, _SCAN_BYTES
        while True:
            if self._limit is not None and first >= self._limit:
                raise OSError(errno.ENOSPC, f"{self._file.path} is full")
            index, position = divmod(first, self.per_block)
            if index >= len(self._table):
                self._grow()
                continue
            block = self._block(index) or self._add_block(index, first)
            free = block.find_free(position)
            if free is not None:
                break
            first = (index + 1) * self.per_block
            if not growing:
                self._lowest = first
                to_scan -= max(len(block.raw), 16 << 10)
                if to_scan < 0 and self._limit is None:
                    first, growing = max(first, min(self.end, len(self._table) * self.per_block)), True
        first = index * self.per_block + free
        if self._limit is not None:
            wanted = min(wanted, self._limit - first)
            if wanted <= 0:
                raise OSError(errno.ENOSPC, f"{self._file.path} is full")
        count = 1
        while count < wanted and free + count < self.per_block and not block.get(free + count):
            count += 1
        self._integrity.check_data(first, count)
        self._set(index, block, free, [1] * count)
        if not growing:
            self._lowest = first + count
        fresh = first >= self.end
        self.end = max(self.end, first + count)
        return first, count, fresh

    def claim(self, cluster: int, count: int) -> None:
        """Count clusters that are in use, and may not be counted yet, at least once. Raises OSError."""
        for wanted in range(cluster, cluster + count):
            index, position = divmod(wanted, self.per_block)
            block = self._block(index) if index < len(self._table) else None
            if block is None:  # which was on stable storage before it gave out the first of its clusters
                raise self._integrity.damaged(f"cluster {wanted} is used, and there is no refcount block for it")
            if not block.get(position):
                self._integrity.check_data(wanted, 1)
                self._set(index, block, position, [1])
        self.end = max(self.end, cluster + count)

    def free(self, cluster: int, count: int) -> None:
        """Count clusters as used once less.

        Raises OSError (EIO, and the image is marked corrupt) if one is not in use, or is metadata that nobody else uses.
        """
        if not count:
            return
        while count:
            index, position = divmod(cluster, self.per_block)
            block = self._block(index) if index < len(self._table) else None
            here = min(count, self.per_block - position)
            values = [block.get(position + i) - 1 for i in range(here)] if block else [-1]
            if block is None or min(values) < 0:
                raise self._integrity.damaged(f"cluster {cluster + values.index(-1)} is used and not counted")
            for i, value in enumerate(values):
                if value == 0:
                    self._integrity.check_data(cluster + i, 1)
            self._set(index, block, position, values)
            if 0 in values:
                self._lowest = min(self._lowest, cluster + values.index(0))
            cluster += here
            count -= here

    def _set(self, index: int, block: Block, position: int, values: list[int]) -> None:
        at, data = block.changed(position, values)
        self._file.write(self._table[index] + at, data)
        block.raw[at : at + len(data)] = data

    def _add_block(self, index: int, cluster: int) -> Block:
        """A block at ``cluster``, which it counts itself: the file has none for these clusters, so they are all free."""
        self._integrity.check_data(cluster, 1)
        offset = cluster << self._cluster_bits
        block = Block(bytearray(1 << self._cluster_bits), self._order)
        at, data = block.changed(cluster % self.per_block, [1])
        block.raw[at : at + len(data)] = data
        self._file.write_durably(offset, block.raw)
        self._file.write_durably(self._table_offset + index * 8, struct.pack(">Q", offset))
        self._table[index] = offset
        self._integrity.add(BLOCK, range(cluster, cluster + 1))
        self._blocks.put(index, block)
        self.end = max(self.end, cluster + 1)
        return block

    def _grow(self) -> None:
        """Replace the table by a larger one, with the blocks that count both, behind what the old one counts: all is free there."""
        bits, per_block, old = self._cluster_bits, self.per_block, len(self._table)
        start = old * per_block
        table_clusters = blocks = 1
        while True:
            stop = start + table_clusters + blocks
            first_index, last_index = start // per_block, (stop - 1) // per_block
            need_table = -(-max(last_index + 1, old + old // 2) * 8 >> bits)
            need_blocks = last_index - first_index + 1
            if need_table <= table_clusters and need_blocks <= blocks:
                break
            table_clusters, blocks = max(table_clusters, need_table), max(blocks, need_blocks)
        if self._limit is not None and stop > self._limit:
            raise OSError(errno.ENOSPC, f"{self._file.path} is full")
        if table_clusters << bits > REFCOUNT_TABLE_LIMIT:
            raise OSError(errno.EFBIG, f"{self._file.path}: its refcount table is as large as QEMU allows")
        table = array.array("Q", [*self._table, *bytes((table_clusters << bits - 3) - old)])
        self._integrity.check_data(start, stop - start)
        for i in range(blocks):
            index = first_index + i
            block = Block(bytearray(1 << bits), self._order)
            low, high = max(start, index * per_block), min(stop, (index + 1) * per_block)
            at, data = block.changed(low - index * per_block, [1] * (high - low))
            block.raw[at : at + len(data)] = data
            table[index] = start + table_clusters + i << bits
            self._file.write_durably(table[index], block.raw)
        self._file.write_durably(start << bits, from_words(table))
        self._file.write_durably(REFCOUNT_TABLE_AT, struct.pack(">QI", start << bits, table_clusters))
        old_clusters = self._table_clusters()
        self._table, self._table_offset, self.end = table, start << bits, max(self.end, stop)
        self._integrity.remove(TABLE, old_clusters)
        self._integrity.add(TABLE, self._table_clusters())
        self._integrity.add(BLOCK, range(start + table_clusters, stop))
        self.free(old_clusters.start, len(old_clusters))
