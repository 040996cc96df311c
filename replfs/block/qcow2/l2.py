"""Where the clusters of the disk lie in an overlay's file: the L1 table and a bounded cache of L2 tables.

An extended L2 entry is two 64-bit words (specification, "Extended L2 Entries"): the host cluster's offset, and a bitmap that says
of each of its 32 subclusters whether it is allocated here (bits 0-31) or reads as zeroes (bits 32-63). Neither: the backing file
has it. Owns both levels; every change is written to the file before it is made in memory, so memory never says more than the file.
"""

import array
import errno
import struct
import sys
from typing import Final

from replfs.block.file import File
from replfs.block.qcow2.header import CLUSTER, CLUSTER_BITS, L2_ENTRIES, Header
from replfs.block.qcow2.refcounts import Refcounts
from replfs.errors import ReplfsError

COPIED: Final = 1 << 63  # "the refcount is exactly one": always so here
HOST_OFFSET: Final = 0x00FF_FFFF_FFFF_FE00
_L2_BITS: Final = CLUSTER_BITS - 4

Table = array.array  # of "Q": two words for each cluster


class L2Tables:
    """The tables of one image; at most ``limit`` L2 tables of 64 KiB stay in memory."""

    def __init__(self, file: File, header: Header, refcounts: Refcounts, limit: int) -> None:
        self._file = file
        self._refcounts = refcounts
        self._l1_offset = header.l1_offset
        self._l1 = _words(file.read_now(header.l1_offset, header.l1_entries * 8))
        if len(self._l1) != header.l1_entries:
            raise ReplfsError(f"{file.path}: the L1 table is cut off: drop this overlay or repair it with qemu-img check -r")
        self._limit = limit
        self._cache: dict[int, array.array[int]] = {}  # least recently used first
        self._newest = -1  # the table that is known to be last in the cache
        self.changes = 0
        """Grows whenever an entry changes: a reader that suspended compares it before it looks up again."""

    def __len__(self) -> int:
        return len(self._l1)

    def table(self, index: int) -> "array.array[int] | None":
        """L2 table ``index``, None if there is none. Valid until the next await. Raises OSError (EIO: it is damaged)."""
        table = self._cache.get(index)
        if table is None:
            offset = self._l1[index] & HOST_OFFSET
            if not offset:
                return None
            if offset % CLUSTER:
                raise OSError(errno.EIO, f"{self._file.path}: L1 entry {index} is damaged")
            raw = self._file.read_now(offset, CLUSTER)
            table = _words(raw + bytes(CLUSTER - len(raw)))
            self._keep(index, table)
        elif index != self._newest:
            del self._cache[index]
            self._cache[index] = table
            self._newest = index
        return table

    def table_for_writing(self, index: int) -> "array.array[int]":
        """L2 table ``index``, made if there is none yet. Raises OSError."""
        table = self.table(index)
        if table is None:
            offset, _ = self._refcounts.allocate(1)
            try:
                self._file.truncate(offset + CLUSTER)
                self._file.write(self._l1_offset + index * 8, struct.pack(">Q", offset | COPIED))
            except OSError:
                self._refcounts.give_back(offset, 1)
                raise
            self._l1[index] = offset | COPIED
            table = _words(bytes(CLUSTER))
            self._keep(index, table)
        return table

    def put(self, table: "array.array[int]", cluster: int, words: "array.array[int]") -> None:
        """Replace the entries from the disk's ``cluster`` on, all in this table. Raises OSError; then no entry has changed."""
        position = (cluster & L2_ENTRIES - 1) * 2
        raw = words[:]
        if sys.byteorder == "little":
            raw.byteswap()
        self._file.write((self._l1[cluster >> _L2_BITS] & HOST_OFFSET) + position * 8, raw.tobytes())
        table[position : position + len(words)] = words
        self.changes += 1

    def _keep(self, index: int, table: "array.array[int]") -> None:
        if len(self._cache) >= self._limit:
            del self._cache[next(iter(self._cache))]
        self._cache[index] = table
        self._newest = index


def _words(raw: bytes) -> "array.array[int]":
    words = array.array("Q", raw)
    if sys.byteorder == "little":
        words.byteswap()
    return words
