"""What an image has changed and not committed: the order in which changes reach the disk, so that it outlives a power cut.

An image works in one of two ways.

*Immediate*: every change is written at once, in the order that a killed process may stop at: refcounts that grow, data, the entries
that lead to it, refcounts that shrink. Nothing is known about the order in which the disk gets them.

*Deferred*: data, refcounts that grow and new tables are written at once, L1 and L2 entries only by a commit, and clusters that are
not used any more are given back after it. A commit is

    sync, so that data is durable -- write the entries -- sync, so that they are -- give back what nothing leads to any more

and so whatever subset of writes a power cut leaves, entries lead to what they are meant to lead to. Until a commit, the
image's :class:`~replfs.block.qcow2.journal.Journal` has the changes, so that a killed process loses none of them; an image that
cannot have one commits before a change is acknowledged.

A record has hashes of its data, so a cluster that it speaks of is *watched* until the record is retired: data that is written over
in place is announced to the journal first, and either version is a good one.

``append_only`` is for an image whose data is never written over: the hidden disk. Its records stand for its changes as soon as
they are durable (:meth:`Changes.harden`), and those of small changes have the data, too: one sync, of the journal alone, in place
of a commit's two. The entries are written then, so that whoever reads the image finds them, and a commit has but to sync the image
before it retires the records. Data that a record carries is written to the image before the record is, so a write that fails leaves
no record. Such a record may also stage a write to the backing node (:mod:`replfs.block.staging`).
"""

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress

import trio

from replfs.block.file import File
from replfs.block.node import Data
from replfs.block.qcow2.journal import Change, Full, Journal, hashes
from replfs.block.qcow2.l2 import L2Tables
from replfs.block.qcow2.refcounts import Refcounts

_CARRIED = 64 << 10
"""Bytes of data at most that a record carries: a large write takes as long as its sync, and would be two."""
_MANY_SLICES = 1024
_TOO_MANY_SLICES = 4096


def _nobody() -> None:
    """Where nobody commits in the background."""


async def _nothing_staged() -> None:
    """Where nobody stages anything."""


class Changes:
    """Of one image that is open for writing."""

    def __init__(self, file: File, data: File, tables: L2Tables, refcounts: Refcounts, cluster_bits: int, unit: int) -> None:
        """``data`` is the file that the clusters of data lie in: the image's own, or an external one.

        ``unit``: bytes of data that one hash stands for, at most a page and at most a subcluster.
        """
        self.deferred = False
        self.append_only = False
        self.journal: Journal | None = None
        self.wanted: Callable[[], None] = _nobody
        """Called when it is time for a commit."""
        self.drain: Callable[[], Awaitable[None]] = _nothing_staged
        """Have the backing node hold what is staged, before a commit retires its records. Raises OSError."""
        self._file = file
        self._data = data
        self._tables = tables
        self._refcounts = refcounts
        self._bits = cluster_bits
        self.unit = unit
        self._hardened = 0  # the number of the last record that is durable, with all that it is about
        self._outside = 0  # the number of the last record whose data it does not carry
        self.marked = 0
        """The number of a record: that what is staged up to there has been applied, stable storage knows."""
        self._hardening = False  # by one of those who wait for it, for all of them
        self._waiting = trio.lowlevel.ParkingLot()  # for the end of a hardening, however it ends
        self._closed = False
        self._watched: dict[int, int] = {}  # clusters of the data file, with the number of the last record about them
        self._freed: list[tuple[int, int]] = []  # (first cluster, how many) to count once less
        self._released: list[tuple[int, int]] = []  # (offset, length) to give back to the file system, and then to free
        self._torn: list[tuple[int, int, int]] = []  # (start, stop, host) of failed writes that the journal knows nothing of yet
        self._lock = trio.Lock()

    # Taking notes

    def watches(self, cluster: int, count: int = 1) -> bool:
        """Whether data may not simply be written over in these clusters of the data file: :meth:`data` is to be told.

        Without a journal that is so for all, while a commit is to come: what leads to the cluster may not be in the tables.
        """
        watched = self._watched
        if watched and (cluster in watched if count == 1 else any(each in watched for each in range(cluster, cluster + count))):
            return True
        return self.deferred and self.journal is None and self.pending

    def check_room(self) -> None:
        """Raises Full if nothing may be changed before a commit."""
        if self.deferred and self._many:
            self.wanted()
            if self._tables.deferred_slices >= _TOO_MANY_SLICES:
                raise Full

    @property
    def _many(self) -> bool:
        journal = self.journal
        return (journal is not None and journal.filled >= journal.half // 2) or self._tables.deferred_slices >= _MANY_SLICES

    def write(self, start: int, stop: int, host: int, low: int, part: Data, staged: tuple[int, Data] | None = None) -> None:
        """Write ``part`` at ``low``, within bytes ``start .. stop`` of the disk, which become data, and have it in the journal.

        They lie at ``host`` of the data file. ``staged``: what is to be written to the backing node then, (offset, data), if the
        record carries its data. An error leaves no record that does. Raises Full, OSError.
        """
        at = host + low - start
        journal = self.journal
        if journal is None:
            self._data.write(at, part)
            return
        if self._torn:
            self._tell_torn()
        unit = self.unit
        first, last = start & -unit, stop + -stop % unit
        host += first - start
        if self.carries(last - first):
            self._data.write(at, part)
            content = self._whole(first, last, host, low, part)
            if staged is None:
                journal.append(Change.SAVED, first, last, host, content=content)
            else:
                journal.append(Change.STAGED, first, last, host, content=content, offset=staged[0], data=staged[1])
        else:
            journal.append(Change.DATA, first, last, host, hashes=hashes(self._whole(first, last, host, low, part), unit))
            self._outside = journal.number
            for cluster in range(host >> self._bits, (host + last - first - 1 >> self._bits) + 1):
                self._watched[cluster] = journal.number
            self._data.write(at, part)
            if self.append_only:  # whose sync is waited for next
                self._data.begin_writing_back()

    def carries(self, length: int) -> bool:
        """Whether a record has its data with it, which has so many bytes."""
        return self.append_only and length <= _CARRIED and self.journal is not None

    def _whole(self, first: int, last: int, host: int, low: int, part: Data) -> Data:
        """What bytes ``first .. last`` of the disk are, which lie at ``host``, when ``part`` has been written at ``low``."""
        if low == first and len(part) == last - first:
            return part
        content = bytearray(self._data.read_now(host, last - first).ljust(last - first, b"\0"))
        content[low - first : low - first + len(part)] = part
        return content

    def torn(self, start: int, stop: int, host: int) -> None:
        """A write over bytes ``start .. stop`` of the disk, which were data at ``host``, has failed: what is there now is right.

        Until the next commit the journal has to say so, or records about the same place would not count after a kill. Where that
        fails as well, it is tried again.
        """
        if self.journal is not None:
            unit = self.unit
            first, last = start & -unit, stop + -stop % unit
            self._torn.append((first, last, host + first - start))
            self._tell_torn()

    def _tell_torn(self) -> None:
        assert self.journal is not None
        with suppress(OSError, Full):
            while self._torn:
                first, last, host = self._torn[-1]
                content = self._data.read_now(host, last - first).ljust(last - first, b"\0")
                self.journal.append(Change.CONTENT, first, last, host, hashes=hashes(content, self.unit))
                self._torn.pop()

    def zero(self, start: int, stop: int, keep: bool) -> None:
        """Bytes ``start .. stop`` of the disk are about to become zero. Raises Full, OSError."""
        if self.journal is not None:
            self.journal.append(Change.ZERO, start, stop, keep)

    def table(self, index: int, offset: int) -> None:
        """L1 entry ``index`` is about to lead to a new table. Raises Full, OSError."""
        if self.journal is not None:
            self.journal.append(Change.TABLE, index, offset, 0)

    def free(self, cluster: int, count: int) -> None:
        """Nothing leads to these clusters any more: they are to be counted once less. Raises OSError."""
        if self.deferred:
            self._freed.append((cluster, count))
        else:
            self._refcounts.free(cluster, count)

    def release(self, offset: int, length: int) -> None:
        """Nobody uses these clusters, by their bytes, any more: they are to be given back, and freed."""
        if self._released and sum(self._released[-1]) == offset:
            offset, length = self._released[-1][0], self._released.pop()[1] + length
        self._released.append((offset, length))

    # Committing

    @property
    def pending(self) -> bool:
        unretired = self.journal is not None and self.journal.retired < self.journal.number
        return self.deferred and bool(unretired or self._tables.deferred_slices or self._freed or self._released)

    @property
    def due(self) -> bool:
        """Whether a commit is worth it, with nobody asking for one: what stands for itself may be dropped before it has to."""
        return self.pending and (not self.append_only or self._many or self.has_room)

    @property
    def has_room(self) -> bool:
        """Whether a commit would give room back."""
        return self.deferred and bool(self._freed or self._released)

    async def commit(self) -> None:
        """Put all changes, and the data that was written before, on stable storage. Raises OSError: what failed is done again."""
        await (self._commit_hardened() if self.append_only else self._commit(retire_last=False))

    async def _commit(self, *, retire_last: bool) -> None:
        """``retire_last``: the records go on to stand for the changes until the tables are durable.

        Else they are retired together with that, so that afterwards their data may be written over at once.
        """
        async with self._lock:
            if not self.pending or self._closed:
                return
            journal = self.journal
            if self._torn:
                self._tell_torn()
            through = journal.number if journal is not None else 0
            torn_before = set(self._torn)
            with self._taking_back() as (freed, released):
                entries = self._tables.begin_commit()
                await sync(self._file, self._data)
                for offset, raw in entries:
                    self._file.write(offset, raw)
                if journal is not None and not retire_last:
                    journal.retire(through)
                await sync(self._file, *([journal.file] if journal is not None else []))
                if journal is not None and retire_last:
                    journal.retire(through)
                    if freed or released:  # a record must not come back when its cluster is another's
                        await sync(journal.file)
                self._tables.end_commit()
                self._hardened = through
                self._torn = [torn for torn in self._torn if torn not in torn_before]
                await self._committed(through, freed, released)

    async def _commit_hardened(self) -> None:
        """As :meth:`_commit`, of an image that is only appended to."""
        if not self.pending:
            return
        await self.drain()
        await self.harden()
        async with self._lock:
            if not self.pending or self._closed:
                return
            assert self.journal is not None
            through = self._hardened
            with self._taking_back() as (freed, released):
                await sync(self._file, self._data)
                self.journal.retire(through)
                if freed or released:
                    await sync(self.journal.file)
                await self._committed(through, freed, released)

    @contextmanager
    def _taking_back(self) -> Iterator[tuple[list[tuple[int, int]], list[tuple[int, int]]]]:
        """What a commit is to give back: what was freed, and what was released. If it fails, the next one is."""
        freed, self._freed = self._freed, []
        released, self._released = self._released, []
        try:
            yield freed, released
        except BaseException:
            self._freed[:0], self._released[:0] = freed, released
            raise

    async def _committed(self, through: int, freed: list[tuple[int, int]], released: list[tuple[int, int]]) -> None:
        """The tables are durable, and what the records up to ``through`` say is in them. Raises OSError."""
        self._watched = {cluster: number for cluster, number in self._watched.items() if number > through}
        while freed:
            self._refcounts.free(*freed.pop())
        giving, released[:] = list(released), []
        await self._give_back(giving)  # and not what was released meanwhile: the tables still lead to that

    async def begin(self) -> None:
        """What the journal had is applied: commit it, and have all of its records retired. Raises OSError.

        What has outlived one power cut must outlive the next: it is what the machine finds.
        """
        assert self.journal is not None
        self._outside = self.journal.number  # after a kill, data that a record has the hash of need not be durable
        await (self._commit_hardened() if self.append_only else self._commit(retire_last=True))
        await self.journal.file.sync()

    async def close(self) -> None:
        """Wait for a commit that is under way; there are no others."""
        async with self._lock:
            self._closed = True
            if self._torn:
                self._tell_torn()

    async def settle(self) -> None:
        """Give back what is to be given back, unless a commit will do so. Raises OSError."""
        if self._released and not self.deferred:
            released, self._released = self._released, []
            await self._give_back(released)

    async def _give_back(self, released: list[tuple[int, int]]) -> None:
        """First in the file, and only then may its clusters be used again."""
        with trio.CancelScope(shield=True):  # or they would be leaked
            problem = None
            for offset, length in released:
                try:
                    await self._data.discard(offset, length)
                except OSError as error:
                    problem = error
                try:
                    self._refcounts.free(offset >> self._bits, length >> self._bits)
                except OSError as error:  # some may be counted less already, so these are leaked
                    problem = error
            if problem is not None:
                raise problem

    async def harden(self) -> None:
        """Everything so far outlives a power cut, if by means of the journal. One sync serves all who ask. Raises OSError."""
        assert self.journal is not None
        wanted = self.journal.number
        while self._hardened < wanted:
            if self._hardening:
                await self._waiting.park()  # that one may have begun before these records
                continue
            self._hardening = True
            try:
                await self._harden(self.journal)
            finally:
                self._hardening = False
                self._waiting.unpark_all()

    async def _harden(self, journal: Journal) -> None:
        """One at a time."""
        through, applied = journal.number, journal.applied
        entries = self._tables.begin_commit()
        by_journal = not journal.file.suspect  # else the tables have to do it by themselves
        files = []
        if self._outside > self._hardened or self._tables.commits_tables or not by_journal:
            files = [self._file, self._data]  # a table is counted before anything leads to it
        await sync(*files, *([journal.file] if by_journal else []))
        for offset, raw in entries:
            self._file.write(offset, raw)
        if by_journal:
            self.marked = max(self.marked, applied)
        else:
            await sync(self._file)
        self._tables.end_commit()
        self._hardened = through

    def apply(self, number: int) -> None:
        """What was staged up to this record of the journal has been written to the backing node. Raises OSError."""
        assert self.journal is not None
        self.journal.apply(number)

    async def mark(self) -> None:
        """Have :attr:`marked` be what has been applied so far. Raises OSError."""
        assert self.journal is not None
        applied = self.journal.applied
        if self.marked < applied:
            await self.journal.file.sync()
            self.marked = max(self.marked, applied)

    async def flush(self) -> None:
        """Put everything on stable storage, in the tables. Raises OSError."""
        if self.pending:
            await self.commit()
        await sync(self._file, self._data)


async def sync(*files: File) -> None:
    """Put files on stable storage, side by side. Raises the OSError of one that fails, when all have ended."""
    first, *others = dict.fromkeys(files)
    if not others:
        return await first.sync()
    problems: list[OSError] = []

    async def one(file: File) -> None:
        try:
            await file.sync()
        except OSError as error:
            problems.append(error)

    async with trio.open_nursery() as nursery:
        for file in (first, *others):
            nursery.start_soon(one, file)
    if problems:
        raise problems[0]
