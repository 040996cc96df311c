"""What a primary sends: changes in the order they were made, with a bound on how much is on its way.

Owns a queue of changes and the connections that they go out on. :meth:`Forwarder.put` never suspends; a change goes out at once
if no earlier one that is still unanswered touches the same pages, else it waits, and those behind it wait as well. So an older
change never overtakes a newer one on the same bytes, whatever the server does at a time.

What becomes of a change is told to the tracking: acknowledged, or lost, when the link ended before its answer. An answer that is an
error ends the link: ``failed`` is called with why. Nothing is retried here: what is lost is stale, and the resync's.

Guarding rule: nothing here suspends but :meth:`room`, :meth:`drained` and :meth:`Change.wait`.
"""

from collections import deque
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Final

import trio
from pyroaring import BitMap64

from replfs.block.nbd import Call, NbdTarget
from replfs.block.node import Data
from replfs.block.tracking import BLOCK, Tracking
from replfs.protocol.nbd import wire

_PAGE_BITS: Final = 12
_PAGE: Final = 1 << _PAGE_BITS
_LARGE: Final = 1 << 20
"""A change of more bytes than this is sent while nothing else is."""

_LARGEST_ZEROES: Final = 32 << 20
_DEPTH: Final = 64
"""Changes that one connection has under way."""


class Change(Call):
    """A change that is to be sent: data, or zeroes if ``data`` is None."""

    __slots__ = ("_forwarder", "cost", "first", "large", "last", "over", "waiting")

    def __init__(self, forwarder: "Forwarder", offset: int, length: int, data: Data | None, may_unmap: bool) -> None:
        if data is not None:
            super().__init__(wire.NBD_CMD_WRITE, offset, length, 0, data)
            self.cost = length
        else:
            super().__init__(wire.NBD_CMD_WRITE_ZEROES, offset, length, 0 if may_unmap else wire.NBD_CMD_FLAG_NO_HOLE)
            self.cost = _PAGE
        self._forwarder = forwarder
        self.first = offset >> _PAGE_BITS
        self.last = offset + length - 1 >> _PAGE_BITS
        self.large = length > _LARGE
        self.over = False
        self.waiting: trio.Event | None = None  # made by the first who waits

    def answered(self) -> None:
        self._forwarder.answered(self)

    async def wait(self) -> None:
        """Until it is acknowledged, or lost and :meth:`end` is called."""
        if not self.over:
            if self.waiting is None:
                self.waiting = trio.Event()
            await self.waiting.wait()

    def end(self) -> None:
        """Whoever waits goes on."""
        self.over = True
        if self.waiting is not None:
            self.waiting.set()


class Forwarder:
    """Sends while :meth:`attach` has given it connections. ``window``: bytes that may be on their way."""

    def __init__(self, tracking: Tracking, window: int, failed: Callable[[OSError], None]) -> None:
        self.tracking = tracking
        self.window = window
        self.sent = 0
        """Bytes of data that were handed to connections."""
        self.zeroed = 0
        """Bytes that were sent as zeroes."""
        self.held = 0
        """Bytes of the changes on their way, queued or unanswered."""
        self.largest_zeroes = _LARGEST_ZEROES
        """Bytes that one change to zeroes may be about, in whole blocks."""
        self._failed = failed
        self._links: Sequence[NbdTarget] = ()
        self._zeroes = False  # the other side has a request for them
        self._turns: cycle[NbdTarget] = cycle(())
        self._queue: deque[Change] = deque()
        self._unanswered: set[Change] = set()
        self._pages = BitMap64()  # those of the unanswered changes; a page has one
        self._exclusive = False  # a large change is unanswered
        self._waiting = trio.lowlevel.ParkingLot()  # for room, or for all to be answered

    @property
    def attached(self) -> bool:
        return bool(self._links)

    def attach(self, links: Sequence[NbdTarget]) -> None:
        """Send from now on; the first of the connections is asked for flushes."""
        self._links = links
        self._turns = cycle(links)
        self._zeroes = all(link.zeroes for link in links)
        largest = min(link.largest for link in links) if self._zeroes else _LARGE
        self.largest_zeroes = max(min(largest, _LARGEST_ZEROES) & -BLOCK, BLOCK)

    def detach(self) -> list[Change]:
        """The link has ended: everything on its way is lost. Gives it back; the caller is to :meth:`Change.end` it."""
        self._links = ()
        lost = [*self._unanswered, *self._queue]
        self._queue.clear()
        self._unanswered.clear()
        self._pages.clear()
        self._exclusive = False
        self.held = 0
        for change in lost:
            self.tracking.lost(*self.tracking.span(change.offset, change.length))
        self.tracking.disconnected()
        self._waiting.unpark_all()
        return lost

    def put(self, offset: int, length: int, data: Data | None, may_unmap: bool = True) -> Change:
        """Have a change sent that the tracking knows is under way; ``data`` must stay as it is. While attached only.

        One to zeroes is of :attr:`largest_zeroes` bytes at most.
        """
        if data is None and not self._zeroes:
            data = bytes(length)
        change = Change(self, offset, length, data, may_unmap)
        self.held += change.cost
        self._queue.append(change)
        if len(self._queue) == 1:
            self._dispatch()
        return change

    def _dispatch(self) -> None:
        queue, unanswered, pages = self._queue, self._unanswered, self._pages
        while queue and len(unanswered) < _DEPTH * len(self._links) and not self._exclusive:
            change = queue[0]
            if change.large:
                if unanswered:
                    return
                self._exclusive = True
            elif change.first == change.last:
                if change.first in pages:
                    return
                pages.add(change.first)
            elif pages.range_cardinality(change.first, change.last + 1):
                return
            else:
                pages.add_range(change.first, change.last + 1)
            queue.popleft()
            unanswered.add(change)
            if change.kind == wire.NBD_CMD_WRITE:
                self.sent += change.length
            else:
                self.zeroed += change.length
            try:
                next(self._turns).submit(change)
            except OSError as error:  # given up just now
                self._failed(error)
                return

    def answered(self, change: Change) -> None:
        """A link says so."""
        if change not in self._unanswered:
            return None  # the link was taken away before
        failure = change.failure()
        if failure is not None:
            return self._failed(failure)  # which takes the link away, and this change with it
        self._unanswered.remove(change)
        if change.large:
            self._exclusive = False
        elif change.first == change.last:
            self._pages.remove(change.first)
        else:
            self._pages.remove_range(change.first, change.last + 1)
        self.tracking.acknowledged(*self.tracking.span(change.offset, change.length))
        self.held -= change.cost
        change.end()
        if self._queue:
            self._dispatch()
        if self._waiting and self.held <= self.window:
            self._waiting.unpark_all()
        return None

    async def room(self, limit: int | None = None) -> None:
        """Wait until no more than the window, or ``limit`` bytes, are on their way."""
        while self.held > (self.window if limit is None else limit):
            await self._waiting.park()

    async def progress(self) -> None:
        """Wait until something was answered, or lost."""
        await self._waiting.park()

    async def drained(self) -> None:
        """Wait until nothing is on its way any more."""
        while self._queue or self._unanswered:
            await self._waiting.park()
