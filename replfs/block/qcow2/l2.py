"""Where the clusters of the disk lie: the L1 table, and a bounded cache of slices of L2 tables.

An L2 entry is one 64-bit word, or two with extended L2 entries (specification, "L1 table", "L2 table"). Tables are kept and read in
slices of 4 KiB, so that random access neither reads nor keeps more than it needs. Owns both levels; every change is in the file
before it is made in memory. An L2 table that a snapshot shares is copied before it is changed.
"""

import array
import errno
import struct
from typing import Final

from replfs.block.cache import Cache, Shelf
from replfs.block.file import File
from replfs.block.qcow2.entries import COPIED
from replfs.block.qcow2.header import HOST_OFFSET, Header
from replfs.block.qcow2.integrity import Integrity
from replfs.block.qcow2.refcounts import Refcounts
from replfs.block.qcow2.words import from_words, to_words

L2_TABLE: Final = "L2 table"
_SLICE_WORDS_BITS: Final = 9


class L2Tables:
    """``refcounts`` and ``integrity`` are None for an image that is only read."""

    def __init__(self, file: File, header: Header, refcounts: Refcounts | None, integrity: Integrity | None, cache: Cache) -> None:
        """Raises OSError if the L1 table cannot be read."""
        self._file = file
        self._refcounts = refcounts
        self._integrity = integrity
        self._cluster_bits = header.cluster_bits
        self._l1_offset = header.l1_offset
        self._l1 = to_words(file.read_now(header.l1_offset, header.l1_entries * 8).ljust(header.l1_entries * 8, b"\0"))
        words_bits = 1 if header.extended else 0
        self.slice_bits: Final = min(header.l2_bits, _SLICE_WORDS_BITS - words_bits)
        """A slice holds the entries of ``1 << slice_bits`` clusters of the disk."""
        self._slices_bits = header.l2_bits - self.slice_bits  # slices in a table
        self._slice_bytes = 8 << self.slice_bits + words_bits
        self._slices: Shelf[array.array[int]] = Shelf(cache, self._slice_bytes)
        self.changes = 0
        """Grows whenever an entry changes: a reader that suspended compares it before it looks up again."""
        if integrity is not None:
            integrity.survey("L1 table", header.l1_offset, len(self._l1) * 8)
            integrity.survey_table(L2_TABLE, self._l1)

    def close(self) -> None:
        self._slices.close()

    def has_table(self, index: int) -> bool:
        """Whether there is an L2 table for the ``index``-th span of the disk."""
        return bool(self._l1[index] & HOST_OFFSET)

    def slice(self, index: int) -> "array.array[int] | None":
        """Slice ``index`` of the disk, None if there is no table for it. Valid until the next await.

        Raises OSError (EIO: the L1 entry is damaged).
        """
        found = self._slices.get(index)
        if found is None:
            table = index >> self._slices_bits
            offset = self._l1[table] & HOST_OFFSET
            if not offset:
                return None
            if offset & ((1 << self._cluster_bits) - 1) or (raw := self._read(offset, index)) is None:
                raise OSError(errno.EIO, f"{self._file.path}: L1 entry {table} is damaged")
            found = to_words(raw)
            self._slices.put(index, found)
        return found

    def _read(self, table: int, index: int) -> bytes | None:
        """A slice from the file; None if the file ends before the table begins."""
        raw = self._file.read_now(self._at(table, index), self._slice_bytes)
        if not raw and self._file.length() <= table:
            return None
        return raw.ljust(self._slice_bytes, b"\0")

    def _at(self, table: int, index: int) -> int:
        return table + (index & (1 << self._slices_bits) - 1) * self._slice_bytes

    def owns(self, index: int) -> bool:
        """Whether the table of slice ``index`` is this image's alone."""
        return bool(self._l1[index >> self._slices_bits] & COPIED)

    def slice_for_writing(self, index: int) -> "array.array[int]":
        """Slice ``index``, of a table that is this image's alone: made or copied if there is none yet. Raises OSError."""
        entry = self._l1[index >> self._slices_bits]
        if not (entry & COPIED and entry & HOST_OFFSET):
            self._own_table(index >> self._slices_bits)
        found = self.slice(index)
        assert found is not None
        return found

    def _own_table(self, table: int) -> None:
        assert self._refcounts is not None
        assert self._integrity is not None
        size = 1 << self._cluster_bits
        old = self._l1[table] & HOST_OFFSET
        if old and (old & (size - 1) or old >= self._file.length()):
            raise OSError(errno.EIO, f"{self._file.path}: L1 entry {table} is damaged")
        cluster, _, fresh = self._refcounts.allocate(1)
        offset = cluster << self._cluster_bits
        try:
            if old or not fresh:
                self._file.write(offset, self._file.read_now(old, size).ljust(size, b"\0") if old else bytes(size))
            else:
                self._file.truncate(offset + size)
            self._file.write(self._l1_offset + table * 8, struct.pack(">Q", offset | COPIED))
        except OSError:
            self._refcounts.free(cluster, 1)
            raise
        self._l1[table] = offset | COPIED
        self._integrity.add(L2_TABLE, range(cluster, cluster + 1))
        if old:
            cluster = old >> self._cluster_bits
            self._integrity.remove(L2_TABLE, range(cluster, cluster + 1))
            self._refcounts.free(cluster, 1)

    def put(self, index: int, position: int, words: "array.array[int]") -> None:
        """Replace words of a slice from :meth:`slice_for_writing`. Raises OSError; then none has changed."""
        found = self.slice(index)
        assert found is not None
        table = self._l1[index >> self._slices_bits] & HOST_OFFSET
        self._file.write(self._at(table, index) + position * 8, from_words(words))
        found[position : position + len(words)] = words
        self.changes += 1
