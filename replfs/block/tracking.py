"""Which blocks of a disk are not known to be durable on the other side, through kills and power cuts.

A block of the disk is *out of sync* from before it is changed here until the other side has put it on stable storage:

    changing here and under way -> acknowledged there -> flushed there: in sync
                  \\-> stale, when it was not sent, or lost on the way: to be sent again as it is then

All of that is in memory. The file has what a crash must not take away. It has a bitmap of blocks, which may be old for the blocks
of *hot* extents, and a log of which extents are hot (an activity log, as DRBD's). An extent becomes hot, on stable storage, before
it is written to; it cools down again when the bitmap has its blocks, on stable storage. So after a crash the blocks of the hot
extents, and those in the bitmap, are out of sync, and a write waits for the file only where an extent becomes hot.

Layout: a header of one sector (magic, version, bytes of the disk, bits of a block and an extent, xxh3-64 of that), at 4096 the log,
and behind it, from a multiple of 4096 on, the bitmap; one bit each, the lowest first. It has all of its room from the start.

Guarding rule: none of the sets is used across an await, except ``stale`` by the resync, which looks again after each.
"""

import logging
import struct
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from typing import Final

from pyroaring import BitMap64
from xxhash import xxh3_64_intdigest

from replfs.block.file import File
from replfs.block.storage import Storage
from replfs.errors import printable

logger = logging.getLogger(__name__)

BLOCK_BITS: Final = 16
BLOCK: Final = 1 << BLOCK_BITS
EXTENT_BITS: Final = 22
HOT_LIMIT: Final = 1024
"""Extents that may be hot for long: after a crash, so much is sent again at most."""

_MAGIC: Final = b"replfs-t"
_VERSION: Final = 1
_HEADER: Final = struct.Struct("<8sQQII")
_CHECKSUM: Final = struct.Struct("<Q")
_SECTOR: Final = 512
_SECTOR_BITS: Final = _SECTOR * 8
_START: Final = 4096
_IDLE_ROUNDS: Final = 30


class Tracking:
    """Of a disk of ``size`` bytes. Blocks are counted from 0; ranges of them are given as ``first, last``, both included."""

    def __init__(self, size: int, file: File, *, durable: bool) -> None:
        """Use :meth:`open`. ``durable``: power cuts count, not only killed processes."""
        self.size = size
        self.blocks: Final = -(-size // BLOCK)
        self.stale = BitMap64()
        """What is to be sent again, as the disk holds it then."""
        self.differing = BitMap64()
        """What was found to differ: out of sync, and stale when the link is made anew."""
        self.on_stale: Callable[[], None] = lambda: None
        """Called when something has become so by a change."""
        self._file = file
        self._durable = durable
        self._pending: dict[int, int] = {}  # changes that are under way, by block
        self._acknowledged: set[int] = set()
        self._flushing: set[int] = set()
        self._stored = BitMap64()  # what the file's bitmap says
        self._unknown = False  # what is in the file
        self._doubtful = BitMap64()  # where it may say something else, as writing it has failed
        self._hot: dict[int, int] = {}  # extents that the log has on stable storage, with the round of their last use
        self._heating: Counter[int] = Counter()  # extents that do not cool down meanwhile: how many wait for that
        self._round = 0
        extents = -(-size // (1 << EXTENT_BITS))
        self._log = bytearray(-(-extents // _SECTOR_BITS) * _SECTOR)
        self._bitmap_at = _START + len(self._log) + -len(self._log) % _START
        self._length = self._bitmap_at + -(-self.blocks // _SECTOR_BITS) * _SECTOR

    @classmethod
    async def open(
        cls, storage: Storage, path: str, size: int, *, durable: bool, expected: bool = False
    ) -> tuple["Tracking", bool]:
        """Open the file, or make it; also gives whether it was there, and whole: what it knows counts.

        What an earlier process left hot is stale; everything is, if the file was ``expected`` and is not known. Raises OSError.
        """
        file = storage.open_own(path)
        try:
            self = cls(size, file, durable=durable)
            known = self._load()
            if expected and not known:
                self.mark_all()
            await self._settle(fresh=not known)
        except BaseException:
            file.close()
            raise
        return self, known

    # From the disk's bytes to blocks

    @staticmethod
    def span(offset: int, length: int) -> tuple[int, int]:
        """The first and the last block of a range of at least one byte."""
        return offset >> BLOCK_BITS, offset + length - 1 >> BLOCK_BITS

    # What happens to blocks

    def is_hot(self, offset: int, length: int) -> bool:
        """Whether a range may be changed without :meth:`heat`."""
        first, last = offset >> EXTENT_BITS, offset + length - 1 >> EXTENT_BITS
        hot = self._hot
        if first == last:
            if first not in hot:
                return False
            hot[first] = self._round
            return True
        for extent in range(first, last + 1):
            if extent not in hot:
                return False
            hot[extent] = self._round
        return True

    async def heat(self, offset: int, length: int) -> None:
        """Have it outlive a crash that this range was changed. Suspends only with ``durable``. Raises OSError."""
        extents = range(offset >> EXTENT_BITS, (offset + length - 1 >> EXTENT_BITS) + 1)
        self._mark(extent for extent in extents if extent not in self._hot)
        if self._durable:
            self._heating.update(extents)
            try:
                await self._sync()
            finally:
                self._heating.subtract(extents)
                self._heating = +self._heating
        for extent in extents:
            self._hot[extent] = self._round

    async def _sync(self) -> None:
        """After one that has failed nobody knows what of the file is there: all of it is written again. Raises OSError."""
        if self._unknown:
            self._file.write(0, self._header().ljust(_START, b"\0"))
            self._file.write(_START, self._log.ljust(self._bitmap_at - _START, b"\0"))
            self._doubtful.add_range(0, self.blocks)
            self._store()
            self._unknown = False
        try:
            await self._file.sync()
        except OSError:
            self._unknown = True
            raise

    def _mark(self, extents: Iterable[int], hot: bool = True) -> None:
        sectors = set()
        for extent in extents:
            if hot:
                self._log[extent >> 3] |= 1 << (extent & 7)
            else:
                self._log[extent >> 3] &= ~(1 << (extent & 7))
            sectors.add(extent // _SECTOR_BITS)
        for sector in sectors:
            at = sector * _SECTOR
            self._file.write(_START + at, self._log[at : at + _SECTOR])

    def begin(self, first: int, last: int) -> None:
        """These blocks are about to be changed here; each is under way until one of the next two is called for it, too."""
        pending = self._pending
        for block in range(first, last + 1):
            pending[block] = pending.get(block, 0) + 1

    def not_begun(self, first: int, last: int) -> None:
        """Nothing was changed after all."""
        for block in range(first, last + 1):
            self._done(block)

    def acknowledged(self, first: int, last: int) -> None:
        """The other side has the change; what it has flushed since counts."""
        for block in range(first, last + 1):
            self._done(block)
            self._acknowledged.add(block)

    def lost(self, first: int, last: int) -> None:
        """The other side may not have the change."""
        for block in range(first, last + 1):
            self._done(block)
        self.stale.add_range(first, last + 1)

    def _done(self, block: int) -> None:
        left = self._pending[block] - 1
        if left:
            self._pending[block] = left
        else:
            del self._pending[block]

    def is_stale(self, first: int, last: int) -> bool:
        """Whether any of them is."""
        stale = self.stale
        if not stale:
            return False
        return first in stale if first == last else bool(stale.range_cardinality(first, last + 1))

    def end_of_run(self, first: int, limit: int = 1 << 40) -> int:
        """The last block of the run of stale ones that begins with ``first``, which has ``limit`` blocks at most."""
        low, high = 1, min(limit, self.blocks - first)
        while low < high:  # by halves
            middle = (low + high + 1) // 2
            if self.stale.range_cardinality(first, first + middle) == middle:
                low = middle
            else:
                high = middle - 1
        return first + low - 1

    def is_pending(self, first: int, last: int) -> bool:
        """Whether a change of any of them is under way."""
        return any(block in self._pending for block in range(first, last + 1))

    @asynccontextmanager
    async def changing(self, offset: int, length: int) -> AsyncIterator[None]:
        """Around a change of a range that nobody sends. Raises OSError before it."""
        if not self.is_hot(offset, length):
            await self.heat(offset, length)
        first, last = self.span(offset, length)
        self.begin(first, last)
        try:
            yield
        finally:
            self.lost(first, last)
            self.on_stale()

    def resend(self, first: int, last: int) -> None:
        """These blocks are about to be sent as they are: under way, and not stale any more."""
        self.stale.remove_range(first, last + 1)
        self.differing.remove_range(first, last + 1)
        self.begin(first, last)

    def mark(self, blocks: BitMap64) -> None:
        """The other side may lack these."""
        self.stale |= blocks

    def mark_all(self) -> None:
        self.stale.add_range(0, self.blocks)

    def forget(self) -> None:
        """A person says that both sides are the same."""
        self.stale.clear()

    # What the other side has on stable storage

    def begin_flush(self) -> bool:
        """A flush of the other side begins: what it has acknowledged so far will be in sync. False if that is nothing."""
        self._flushing |= self._acknowledged
        self._acknowledged = set()
        return bool(self._flushing)

    def flushed(self) -> None:
        """The flush that began last has succeeded."""
        self._flushing = set()

    def disconnected(self) -> None:
        """The other side may lose what it has not flushed."""
        unflushed = self._acknowledged | self._flushing
        if unflushed:
            self.stale |= BitMap64(unflushed)
        self._acknowledged, self._flushing = set(), set()
        self.stale |= self.differing
        self.differing.clear()

    # Telling

    def dirty(self) -> BitMap64:
        """All blocks that are out of sync."""
        return self.stale | self.differing | BitMap64(self._acknowledged | self._flushing | self._pending.keys())

    @property
    def clean(self) -> bool:
        return not (self.stale or self.differing or self._pending or self._acknowledged or self._flushing)

    def bytes_of(self, blocks: BitMap64) -> int:
        """How many bytes of the disk these are: the last block may be short."""
        count = len(blocks) << BLOCK_BITS
        return count - (-self.size % BLOCK) if blocks and self.blocks - 1 in blocks else count

    @property
    def out_of_sync(self) -> int:
        """Bytes."""
        return self.bytes_of(self.dirty())

    # The file

    def _load(self) -> bool:
        raw = self._file.read_now(0, _HEADER.size + _CHECKSUM.size)
        header = self._header()
        if raw[: len(header)] != header or self._file.length() < self._length:
            if raw.strip(b"\0"):
                logger.warning("%s is damaged, or another disk's: all of the disk is taken to be out of sync", self._shown)
            return False
        self._stored = _blocks_of(self._file.read_now(self._bitmap_at, -(-self.blocks // 8)), self.blocks)
        self.stale = self._stored.copy()
        log = _blocks_of(self._file.read_now(_START, len(self._log)), len(self._log) * 8)
        per_extent = 1 << EXTENT_BITS - BLOCK_BITS
        for extent in log:
            self.stale.add_range(extent * per_extent, min((extent + 1) * per_extent, self.blocks))
        return True

    def _header(self) -> bytes:
        header = _HEADER.pack(_MAGIC, _VERSION, self.size, BLOCK_BITS, EXTENT_BITS)
        return header + _CHECKSUM.pack(xxh3_64_intdigest(header))

    async def _settle(self, *, fresh: bool) -> None:
        """Everything that is out of sync is in the bitmap, and nothing is hot."""
        if fresh:
            self._file.truncate(0)
            self._file.reserve(self._length)
        self._store()
        await self._file.sync()
        self._log[:] = bytes(len(self._log))
        self._file.write(_START, self._log)
        self._hot.clear()
        await self._file.sync()
        if fresh:
            self._file.write(0, self._header().ljust(_START, b"\0"))
            await self._file.sync()

    def _store(self) -> None:
        """Have the bitmap say what is out of sync now."""
        dirty = self.dirty()
        differing = (dirty ^ self._stored) | self._doubtful
        if not differing:
            return
        self._doubtful = differing
        run: list[bytes] = []
        run_start = sector = 0
        for sector in _sectors_of(differing):
            if run and (sector != run_start + len(run) or len(run) >= 2048):
                self._file.write(self._bitmap_at + run_start * _SECTOR, b"".join(run))
                run = []
            if not run:
                run_start = sector
            run.append(_sector(dirty, sector * _SECTOR_BITS))
        self._file.write(self._bitmap_at + run_start * _SECTOR, b"".join(run))
        self._stored, self._doubtful = dirty, BitMap64()

    async def save(self, flush: Callable[[], Awaitable[None]] | None = None) -> None:
        """Bring the bitmap up to date, and let extents cool down that were not used for a while: to be called now and then.

        ``flush`` puts the disk's changes on stable storage before that: a change that only the other side has after a power cut
        makes the copies differ. Raises OSError; then it is done the next time.
        """
        self._store()
        self._round += 1
        limit = self._round - _IDLE_ROUNDS
        idle = [extent for extent, used in self._hot.items() if used < limit]
        if len(self._hot) - len(idle) > HOT_LIMIT:
            oldest = sorted((used, extent) for extent, used in self._hot.items() if used < self._round - 1)
            idle = [extent for _, extent in oldest[: len(self._hot) - HOT_LIMIT * 3 // 4]]
        began = self._round
        if self._durable:
            await self._sync()  # what was marked is in no hot extent
        if idle:
            if flush is not None:
                await flush()
            per_extent_bits = EXTENT_BITS - BLOCK_BITS
            busy = {block >> per_extent_bits for block in self._pending} | self._heating.keys()
            cooled = [extent for extent in idle if extent not in busy and self._hot[extent] < began]
            for extent in cooled:
                del self._hot[extent]
            self._mark(cooled, hot=False)

    async def close(self) -> None:
        """Nothing is under way any more. Raises OSError."""
        try:
            await self._settle(fresh=False)
        finally:
            self._file.close()

    def release(self) -> None:
        """As :meth:`close`, without saving anything."""
        with suppress(OSError):
            self._file.close()

    @property
    def _shown(self) -> str:
        return printable(self._file.path)


def _sectors_of(blocks: BitMap64) -> Iterable[int]:
    """The sectors of the bitmap that these are in, ascending."""
    position = 0
    while position <= blocks.max():
        following = blocks.next_set_bit(position)
        yield following // _SECTOR_BITS
        position = (following // _SECTOR_BITS + 1) * _SECTOR_BITS


def _sector(blocks: BitMap64, first: int) -> bytes:
    count = blocks.range_cardinality(first, first + _SECTOR_BITS)
    if count in (0, _SECTOR_BITS):
        return (b"\xff" if count else b"\0") * _SECTOR
    bits = 0
    for block in blocks & BitMap64(range(first, first + _SECTOR_BITS)):
        bits |= 1 << block - first
    return bits.to_bytes(_SECTOR, "little")


def _blocks_of(raw: bytes, count: int) -> BitMap64:
    """The numbers of the bits that are set, below ``count``."""
    found = BitMap64()
    for at in range(0, len(raw), _SECTOR):
        part = raw[at : at + _SECTOR]
        bits = int.from_bytes(part, "little")
        if not bits:
            continue
        if bits == (1 << len(part) * 8) - 1:
            found.add_range(at * 8, (at + len(part)) * 8)
            continue
        while bits:
            lowest = bits & -bits
            found.add(at * 8 + lowest.bit_length() - 1)
            bits ^= lowest
    found.remove_range(count, max(count, len(raw) * 8))
    return found
