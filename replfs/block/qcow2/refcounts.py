"""Which clusters of an overlay's file are in use, and the next free ones.

Owns the refcount table (in memory, and written through) and the end of the file. Clusters are given out in order, at the end
only; a refcount block is made where the clusters that it counts begin, so the first cluster that it counts is itself
(specification, "Host cluster management").
"""

import errno
import struct
from typing import Final

from replfs.block.file import File
from replfs.block.qcow2.header import CLUSTER, Header
from replfs.errors import ReplfsError

PER_BLOCK: Final = CLUSTER // 2
"""16-bit refcounts in one refcount block."""

_ONE: Final = b"\0\1"


class Refcounts:
    def __init__(self, file: File, header: Header) -> None:
        """Raises ReplfsError if the refcount table cannot be right, OSError if it cannot be read."""
        self._file = file
        self._table_offset = header.refcount_table_offset
        raw = file.read_now(header.refcount_table_offset, header.refcount_table_clusters * CLUSTER)
        self._table = list(struct.unpack(f">{len(raw) // 8}Q", raw))
        length = file.length()
        if any(offset % CLUSTER or offset >= length for offset in self._table):
            raise ReplfsError(f"{file.path}: the refcount table is damaged: drop this overlay or repair it with qemu-img check -r")
        self._next = -(-length // CLUSTER)

    def allocate(self, wanted: int) -> tuple[int, int]:
        """Count up to ``wanted`` clusters as used: (offset of the first, how many). They read as zeroes.

        Raises OSError (ENOSPC and others); nothing is allocated then. :meth:`give_back` undoes it.
        """
        index, position = divmod(self._next, PER_BLOCK)
        if index >= len(self._table):
            raise OSError(errno.EFBIG, f"{self._file.path}: the refcount table is full")
        if not self._table[index]:
            self._add_block(index, position)
            position += 1
        count = min(wanted, PER_BLOCK - position)
        first = self._next
        self._file.write(self._table[index] + position * 2, _ONE * count)
        self._next = first + count
        return first * CLUSTER, count

    def give_back(self, offset: int, count: int) -> None:
        """Undo the latest :meth:`allocate`: nothing points to these clusters. Raises OSError; then they stay counted."""
        index, position = divmod(offset // CLUSTER, PER_BLOCK)
        self._file.write(self._table[index] + position * 2, bytes(2 * count))
        self._file.truncate(offset)
        self._next = offset // CLUSTER

    def _add_block(self, index: int, position: int) -> None:
        """A refcount block at the end of the file that counts itself: at its own beginning, but for the clusters before it."""
        offset = self._next * CLUSTER
        self._file.truncate(offset + CLUSTER)
        self._file.write(offset + position * 2, _ONE)
        self._file.write(self._table_offset + index * 8, struct.pack(">Q", offset))
        self._table[index] = offset
        self._next += 1
