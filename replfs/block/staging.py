"""Staged writes: acknowledged, and written to the secondary disk when what they overwrite is on stable storage.

Nobody can tell the kernel to hold a page back, so the disk may not be written to before the pre-image is durable. But the primary
need not wait for that: its write is in the journal of the hidden disk, in one record with the pre-image (:meth:`Image.stage
<replfs.block.qcow2.image.Image.stage>`), where a killed process leaves it, and in memory. One sync of the journal serves all that
have come meanwhile; then they are written to the disk. As with any write, a power cut may take what was not flushed.

Guarding rules:

* What needs the disk as it is to be, drains first (:meth:`Staging.drain`): a flush, and whoever has shut the gate, after which
  nothing more is staged.
* Subclusters are *taken* until stable storage knows that what was staged for them has been applied, which is a while after the disk
  has it: whoever opens the journal next writes what it finds staged there, over whatever is on the disk by then. So a change of
  taken subclusters waits (:meth:`Staging.clear`).
* If the disk, or the journal, fails, everything stays staged. Whoever drains is told, nothing more is staged, and it is tried
  again.
"""

from collections.abc import Callable
from typing import Final

import trio

from replfs.block.node import Data
from replfs.block.qcow2.image import Image
from replfs.block.raw import Raw

_MOST: Final = 512  # writes staged at a time: what is not on the disk yet is in memory, too
_GATHERING: Final = 0.002  # seconds that a write may wait for others
_PAUSE: Final = 1.0  # seconds until something that has failed is tried again


class _Write:
    __slots__ = ("blocks", "data", "number", "offset")

    def __init__(self, number: int, blocks: range, offset: int, data: bytes) -> None:
        self.number = number  # of the record
        self.blocks = blocks
        self.offset = offset
        self.data = data


class Staging:
    """For one raw disk. ``unit``: bytes of a subcluster."""

    def __init__(self, disk: Raw, unit: int) -> None:
        self._disk = disk
        self._unit = unit
        self._hidden: Image | None = None  # that has all of them in its journal
        self._waiting: list[_Write] = []  # not on the disk yet
        self._applied: list[_Write] = []  # on the disk, and taken still
        self._taken: dict[int, _Write] = {}  # by the numbers of subclusters
        self._lock = trio.Lock()  # held by a round
        self._wanted = trio.Event()
        self._running = False
        self.failed = False
        """Something is on the disk neither now nor soon."""

    @property
    def has_room(self) -> bool:
        """Whether one more may be staged."""
        return self._running and not self.failed and len(self._waiting) < _MOST

    def _blocks(self, start: int, stop: int) -> range:
        return range(start // self._unit, (stop - 1) // self._unit + 1)

    def takes(self, start: int, stop: int) -> bool:
        """Whether a byte of ``start .. stop`` is taken."""
        taken = self._taken
        if not taken or start >= stop:
            return False
        blocks = self._blocks(start, stop)
        return any(block in taken for block in blocks) if len(blocks) <= len(taken) else any(block in blocks for block in taken)

    def add(self, hidden: Image, start: int, stop: int, offset: int, data: Data) -> None:
        """The last record in the journal of ``hidden`` has staged this write, to whole subclusters ``start .. stop``.

        They are free, and there is room.
        """
        assert hidden.changes.journal is not None
        if hidden is not self._hidden:
            self._hidden = hidden
            hidden.changes.drain = self.drain
        write = _Write(hidden.changes.journal.number, self._blocks(start, stop), offset, bytes(data))
        self._waiting.append(write)
        for block in write.blocks:
            self._taken[block] = write
        self._wanted.set()

    def forget(self) -> None:
        """The hidden disk is another one from now on, or none: what the old one's journal says means nothing any more."""
        self._waiting, self._applied, self._hidden, self.failed = [], [], None, False
        self._taken.clear()

    # Carrying them out

    async def run(self) -> None:
        """Carry out what is staged, until cancelled."""
        self._running = True
        try:
            while True:
                await self._wanted.wait()
                self._wanted = trio.Event()
                await trio.sleep(_PAUSE if self.failed else _GATHERING)
                try:
                    await self._until(lambda: not self._taken)
                except OSError:  # which has been counted, and is told to whoever drains
                    self._wanted.set()
        finally:
            self._running = False

    async def drain(self) -> None:
        """What has been staged so far is on the disk when this returns. Raises OSError: it cannot be put there."""
        staged = set(self._waiting)
        await self._until(lambda: staged.isdisjoint(self._waiting))

    async def settle(self, start: int, stop: int) -> None:
        """The disk has all that was staged for ``start .. stop`` when this returns. Raises OSError, as :meth:`drain`."""
        if self.takes(start, stop):
            blocks = self._blocks(start, stop)
            staged = {write for block, write in self._taken.items() if block in blocks}
            await self._until(lambda: staged.isdisjoint(self._waiting))

    async def clear(self, start: int, stop: int) -> None:
        """Nothing of ``start .. stop`` is taken when this returns, until the next await. Raises OSError, as :meth:`drain`."""
        await self._until(lambda: not self.takes(start, stop))

    async def _until(self, done: Callable[[], bool]) -> None:
        """As many rounds as it takes; there is something staged, or taken, until it is done."""
        while not done():
            async with self._lock:
                if not done():
                    await self._round()

    async def _round(self) -> None:
        """Put what waits on the disk; or else have stable storage know of what is there. Raises OSError."""
        hidden, batch = self._hidden, list(self._waiting)
        assert hidden is not None
        changes = hidden.changes
        try:
            if batch:
                await changes.harden()
            else:
                await changes.mark()
            if hidden is not self._hidden:
                return
            if batch:
                for write in batch:
                    self._disk.file.write(write.offset, write.data)
                changes.apply(batch[-1].number)
        except OSError:
            self.failed = True
            raise
        self.failed = False
        del self._waiting[: len(batch)]
        self._applied += batch
        self._release(changes.marked)

    def _release(self, marked: int) -> None:
        """Stable storage knows that everything up to record ``marked`` has been applied."""
        count = 0
        for write in self._applied:
            if write.number > marked:
                break
            count += 1
            for block in write.blocks:
                del self._taken[block]
        del self._applied[:count]
