"""Where the clusters of the disk lie: the L1 table, and a bounded cache of slices of L2 tables.

An L2 entry is one 64-bit word, or two with extended L2 entries (specification, "L1 table", "L2 table"). Tables are kept and read in
slices of 4 KiB (both levels), so that random access neither reads nor keeps more than it needs. Owns both levels. An L2 table that
a snapshot shares is copied before it is changed.

Unless changes are *deferred*, each is in the file before it is made in memory. Deferred ones are in memory only, and kept there,
until what :meth:`L2Tables.begin_commit` gives back is in the file and :meth:`L2Tables.end_commit` says so.
"""

import array
import errno
import struct
from typing import Final, Protocol

from replfs.block.cache import Cache, Shelf
from replfs.block.file import File
from replfs.block.qcow2.entries import COPIED
from replfs.block.qcow2.header import HOST_OFFSET, Header
from replfs.block.qcow2.integrity import Integrity
from replfs.block.qcow2.journal import Full
from replfs.block.qcow2.refcounts import Refcounts
from replfs.block.qcow2.words import from_words, to_words

L2_TABLE: Final = "L2 table"
_SLICE_WORDS_BITS: Final = 9
_MANY: Final = 1 << 16
_PAIR: Final = struct.Struct(">QQ")
_SURVEY: Final = 1 << 16  # L1 entries read at once


class Log(Protocol):
    """Who is told of changes (:class:`replfs.block.qcow2.changes.Changes`)."""

    deferred: bool

    def table(self, index: int, offset: int) -> None: ...

    def free(self, cluster: int, count: int) -> None: ...


class _Deferred:
    """Parts of the tables that are changed in memory only, by their numbers."""

    def __init__(self) -> None:
        self.l1: dict[int, array.array[int]] = {}
        self.slices: dict[int, array.array[int]] = {}


class L2Tables:
    """``refcounts`` and ``integrity`` are None for an image that is only read."""

    def __init__(self, file: File, header: Header, refcounts: Refcounts | None, integrity: Integrity | None, cache: Cache) -> None:
        """Raises OSError if the L1 table cannot be read."""
        self._file = file
        self._refcounts = refcounts
        self._integrity = integrity
        self._cluster_bits = header.cluster_bits
        self._l1_offset = header.l1_offset
        self._l1_entries = header.l1_entries
        self._l1: Shelf[array.array[int]] = Shelf(cache, 8 << _SLICE_WORDS_BITS)
        words_bits = 1 if header.extended else 0
        self.slice_bits: Final = min(header.l2_bits, _SLICE_WORDS_BITS - words_bits)
        """A slice holds the entries of ``1 << slice_bits`` clusters of the disk."""
        self._slices_bits = header.l2_bits - self.slice_bits  # slices in a table
        self._slice_bytes = 8 << self.slice_bits + words_bits
        self._slices: Shelf[array.array[int]] = Shelf(cache, self._slice_bytes)
        self.changes = 0
        """Grows whenever an entry changes: a reader that suspended compares it before it looks up again."""
        self._own: dict[int, int] = {}  # where the slices of tables that are this image's alone lie in the file, as far as known
        self._log: Log | None = None
        self._changed = _Deferred()  # since the last commit began
        self._committing = _Deferred()  # by the commit that is under way, or has failed
        if integrity is not None:
            integrity.survey("L1 table", header.l1_offset, header.l1_entries * 8)
            for first in range(0, header.l1_entries, _SURVEY):
                part = self._read_l1(first, _SURVEY)
                integrity.survey_table(L2_TABLE, [entry & HOST_OFFSET for entry in part if entry & COPIED])
                integrity.survey_table(L2_TABLE, [entry & HOST_OFFSET for entry in part if not entry & COPIED], shared=True)

    def _read_l1(self, first: int, count: int) -> "array.array[int]":
        count = min(count, self._l1_entries - first)
        return to_words(self._file.read_now(self._l1_offset + first * 8, count * 8).ljust(count * 8, b"\0"))

    def _entry(self, table: int) -> int:
        """An entry of the L1 table."""
        part = self._l1.get(table >> _SLICE_WORDS_BITS)
        if part is None:
            number = table >> _SLICE_WORDS_BITS
            part = self._changed.l1.get(number) or self._committing.l1.get(number)
            if part is None:
                part = self._read_l1(table & -1 << _SLICE_WORDS_BITS, 1 << _SLICE_WORDS_BITS)
            self._l1.put(number, part)
        return part[table & (1 << _SLICE_WORDS_BITS) - 1]

    def _set_entry(self, table: int, entry: int) -> None:
        number = table >> _SLICE_WORDS_BITS
        self._entry(table)
        assert self._log is not None
        if not self._log.deferred:
            self._file.write(self._l1_offset + table * 8, struct.pack(">Q", entry))
        part = self._l1.get(number)
        assert part is not None
        part[table & (1 << _SLICE_WORDS_BITS) - 1] = entry
        self._own.clear()
        if self._log.deferred:
            self._changed.l1[number] = part

    def close(self) -> None:
        self._l1.close()
        self._slices.close()

    def use(self, log: Log) -> None:
        """Have changes noted in ``log`` from now on, which also says whether they are deferred."""
        self._log = log

    # Deferred changes

    @property
    def deferred_slices(self) -> int:
        """How many parts of the tables are changed in memory only."""
        return sum(len(part) for changes in (self._changed, self._committing) for part in (changes.l1, changes.slices))

    def begin_commit(self) -> list[tuple[int, bytes]]:
        """What is to be written to the file for all changes up to now: (offset, bytes). Those of an attempt that failed, too."""
        committing = self._committing
        committing.l1.update(self._changed.l1)
        committing.slices.update(self._changed.slices)
        self._changed = _Deferred()
        return [
            *((self._l1_offset + (number << _SLICE_WORDS_BITS + 3), from_words(part)) for number, part in committing.l1.items()),
            *(
                (self._at(self._entry(index >> self._slices_bits) & HOST_OFFSET, index), from_words(part))
                for index, part in committing.slices.items()
            ),
        ]

    @property
    def commits_tables(self) -> bool:
        """Whether what :meth:`begin_commit` gave back leads to new tables."""
        return bool(self._committing.l1)

    def end_commit(self) -> None:
        """What the last :meth:`begin_commit` gave back is in the file."""
        self._committing = _Deferred()

    # Looking up

    def has_table(self, index: int) -> bool:
        """Whether there is an L2 table for the ``index``-th span of the disk."""
        return bool(self._entry(index) & HOST_OFFSET)

    def slice(self, index: int) -> "array.array[int] | None":
        """Slice ``index`` of the disk, None if there is no table for it. Valid until the next await.

        Raises OSError (EIO: the L1 entry is damaged).
        """
        found = self._slices.get(index)
        if found is None:
            found = self._changed.slices.get(index) or self._committing.slices.get(index)
            if found is not None:
                self._slices.put(index, found)
                return found
            table = index >> self._slices_bits
            offset = self._entry(table) & HOST_OFFSET
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
        return bool(self._entry(index >> self._slices_bits) & COPIED)

    def own_slice(self, index: int) -> "array.array[int] | None":
        """Slice ``index``, if there is a table for it that is this image's alone. Valid until the next await. Raises OSError."""
        if index not in self._own:
            entry = self._entry(index >> self._slices_bits)
            if not (entry & COPIED and entry & HOST_OFFSET):
                return None
            if len(self._own) >= _MANY:
                self._own.clear()
            self._own[index] = self._at(entry & HOST_OFFSET, index)
        return self.slice(index)

    def put_entry(self, table: "array.array[int]", index: int, position: int, entry: int, bitmap: int) -> None:
        """As :meth:`put`, of the two words of an extended entry, in what :meth:`own_slice` has just given."""
        assert self._log is not None
        if not self._log.deferred:
            self._file.write(self._own[index] + position * 8, _PAIR.pack(entry, bitmap))
        else:
            self._changed.slices[index] = table
        table[position] = entry
        table[position + 1] = bitmap
        self.changes += 1

    def slice_for_writing(self, index: int) -> "array.array[int]":
        """Slice ``index``, of a table that is this image's alone: made or copied if there is none yet. Raises OSError."""
        entry = self._entry(index >> self._slices_bits)
        if not (entry & COPIED and entry & HOST_OFFSET):
            self._own_table(index >> self._slices_bits)
        found = self.slice(index)
        assert found is not None
        return found

    def _own_table(self, table: int) -> None:
        assert self._refcounts is not None
        assert self._integrity is not None
        assert self._log is not None
        size = 1 << self._cluster_bits
        old = self._entry(table) & HOST_OFFSET
        if old and (old & (size - 1) or old >= self._file.length()):
            raise OSError(errno.EIO, f"{self._file.path}: L1 entry {table} is damaged")
        cluster, _, fresh = self._refcounts.allocate(1)
        offset = cluster << self._cluster_bits
        write = self._file.write_durably if self._log.deferred else self._file.write  # before anything may lead to it
        try:
            if old:
                write(offset, self._file.read_now(old, size).ljust(size, b"\0"))
            elif not fresh:
                write(offset, bytes(size))
            elif self._log.deferred:  # zeroes are there already, but now they have room, too: a commit is to need none
                self._file.write(offset, bytes(size))
            else:
                self._file.truncate(offset + size)
            self._log.table(table, offset)
            self._set_entry(table, offset | COPIED)
        except (OSError, Full):
            self._log.free(cluster, 1)
            raise
        self._integrity.add(L2_TABLE, range(cluster, cluster + 1))
        if old:
            cluster = old >> self._cluster_bits
            if self._refcounts.get(cluster) == 1:  # else it is a table still, for example of a snapshot
                self._integrity.remove(L2_TABLE, range(cluster, cluster + 1))
            self._log.free(cluster, 1)

    def adopt(self, table: int, offset: int) -> None:
        """Have L1 entry ``table`` lead to a table that an earlier process has made for it. Raises OSError."""
        assert self._integrity is not None
        entry = self._entry(table)
        if entry != offset | COPIED:
            size = 1 << self._cluster_bits
            if self._file.length() < offset + size and not self._file.fixed:
                self._file.truncate(offset + size)
            self._set_entry(table, offset | COPIED)
            self._integrity.add(L2_TABLE, range(offset >> self._cluster_bits, (offset >> self._cluster_bits) + 1))
            if entry & HOST_OFFSET:
                assert self._log is not None
                assert self._refcounts is not None
                old = (entry & HOST_OFFSET) >> self._cluster_bits
                if self._refcounts.get(old) == 1:
                    self._integrity.remove(L2_TABLE, range(old, old + 1))
                self._log.free(old, 1)

    def put(self, index: int, position: int, words: "array.array[int]") -> None:
        """Replace words of a slice from :meth:`slice_for_writing`. Raises OSError; then none has changed."""
        found = self.slice(index)
        assert found is not None
        table = self._entry(index >> self._slices_bits) & HOST_OFFSET
        assert self._log is not None
        if not self._log.deferred:
            self._file.write(self._at(table, index) + position * 8, from_words(words))
        else:
            self._changed.slices[index] = found
        found[position : position + len(words)] = words
        self.changes += 1
