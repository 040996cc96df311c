"""Replaying a journal: the changes that its records speak of are made in the tables again, if the data is there or with them.

What is replayed may be in the tables already, in whole or in part: a commit or an earlier replay may have been cut short. So doing
it again changes nothing, and what is not used any more is found at the end, not step by step.
"""

from typing import Final

from pyroaring import BitMap64

from replfs.block.file import File
from replfs.block.qcow2.changes import Changes
from replfs.block.qcow2.entries import PLACE, Entries
from replfs.block.qcow2.journal import Change, Record, hashes
from replfs.block.qcow2.l2 import L2Tables
from replfs.block.qcow2.refcounts import Refcounts

_DATA: Final = (Change.DATA, Change.SAVED, Change.STAGED)


class Replay:
    """Of one image that nothing has changed yet. ``size`` and ``backed``: bytes of the disk, and of its backing node."""

    def __init__(
        self,
        data: File,
        tables: L2Tables,
        entries: Entries,
        refcounts: Refcounts,
        changes: Changes,
        *,
        cluster_bits: int,
        size: int,
        backed: int,
        counted: bool,
    ) -> None:
        """``counted``: clusters of data have refcounts, since they are not in an external data file."""
        self._data = data
        self._tables = tables
        self._entries = entries
        self._refcounts = refcounts
        self._changes = changes
        self._bits = cluster_bits
        self._size = size
        self._backed = backed
        self._counted = counted
        self._words: Final = entries.words
        self._known: dict[tuple[int, int], set[int]] = {}
        """What may be in a unit of the data file that is a unit of the disk, by the offsets of both."""
        self._before: dict[int, int] = {}  # clusters of the disk that records are about, with the words of their entries
        self._claimed = BitMap64()  # clusters of data that records speak of

    def run(self, records: list[Record]) -> int:
        """Returns how many of the records counted. Raises OSError."""
        unit = self._changes.unit
        for record in records:
            for i, digest in enumerate(record.hashes):
                self._known.setdefault((record.third + i * unit, record.first + i * unit), set()).add(digest)
            if record.change is Change.ZERO and not self._counted:  # where the hole is made at once, and each byte has its place
                for offset in range(record.first, record.second, unit):
                    self._known.setdefault((offset, offset), set()).update(hashes(bytes(unit), unit))
        sound = [record for record in records if self._is_sound(record)]
        for record in sound:  # first of all, so that nothing of theirs can be given out
            self._claim(record)
        for record in sound:
            if record.change is Change.TABLE:
                self._tables.adopt(record.first, record.second)
            elif self._tables.owns(record.first >> self._bits + self._tables.slice_bits):
                self._change(record)
            # else a commit was cut short after its records were retired: the table that this needs is lost with it
        if self._counted:
            self._let_go()
        return len(sound)

    def _is_sound(self, record: Record) -> bool:
        """Whether the data of a record is there: each unit as the record has it, or as another, which was written over it."""
        if record.change is Change.CONTENT:
            return False
        if record.change is not Change.DATA:  # what a record says of tables and zeroes, and the data that it has with it
            return True
        unit, length = self._changes.unit, record.second - record.first
        content = self._data.read_now(record.third, length).ljust(length, b"\0")
        return all(
            digest in self._known[record.third + i * unit, record.first + i * unit]
            for i, digest in enumerate(hashes(content, unit))
        )

    def _claim(self, record: Record) -> None:
        if record.change is Change.TABLE:
            self._refcounts.claim(record.second >> self._bits, 1)
        elif record.change in _DATA:
            end = record.third + record.second - record.first
            if self._counted:
                first, last = record.third >> self._bits, end - 1 >> self._bits
                self._refcounts.claim(first, last - first + 1)
                self._claimed.add_range(first, last + 1)
                if self._data.length() < end and not self._data.fixed:  # it ends with zeroes that never reached the disk
                    self._data.truncate(end)
            if record.content:
                self._data.write(record.third, record.content)

    def _change(self, record: Record) -> None:
        """Change the entries that a record is about, which are in one slice of the tables; data where it is whole subclusters."""
        start, stop = record.first, record.second
        for cluster in range(start >> self._bits, (stop - 1 >> self._bits) + 1):
            self._before.setdefault(cluster, self._entry(cluster))
        if record.change in _DATA:
            start += -start % self._entries.subcluster
            stop = stop if stop >= self._size else stop & -self._entries.subcluster
        if start >= stop:
            return
        cluster, last = start >> self._bits, stop - 1 >> self._bits
        index = cluster >> self._tables.slice_bits
        at = (cluster & (1 << self._tables.slice_bits) - 1) * self._words
        old = self._tables.slice_for_writing(index)[at : at + (last - cluster + 1) * self._words]
        if record.change in _DATA:
            host = record.third + start - record.first - (start & (1 << self._bits) - 1)
            new = self._entries.held(old, cluster, host, start, stop)
        else:
            new = self._entries.zeroed(old, cluster, start, stop, self._backed, bool(record.third))
        if new != old:
            self._tables.put(index, at, new)

    def _let_go(self) -> None:
        """What entries led to before, or only between two records, is not used any more."""
        unused = BitMap64(self._claimed)
        for cluster, before in self._before.items():
            now = self._entry(cluster)
            first, count = self._entries.leads_to(before)
            if before & PLACE != now & PLACE and self._entries.own(before):
                unused.add(first)
            elif before & PLACE != now & PLACE and count:  # shared, or compressed: there may be others
                self._changes.free(first, count)
        for cluster in self._before:
            first, count = self._entries.leads_to(self._entry(cluster))
            unused.remove_range(first, first + count)
        for host in unused:
            self._changes.free(host, 1)

    def _entry(self, cluster: int) -> int:
        """The first word of the entry of a cluster of the disk."""
        table = self._tables.slice(cluster >> self._tables.slice_bits)
        return table[(cluster & (1 << self._tables.slice_bits) - 1) * self._words] if table is not None else 0
