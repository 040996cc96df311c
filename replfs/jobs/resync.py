"""The resync: what is stale is sent again, as the disk holds it now, while everything else goes on.

Walks the stale blocks upwards, again and again until there are none. For the blocks of one step it holds the mirror's range lock
while it reads them and queues them behind all earlier changes, so the other side gets them in order, and whole.
"""

import errno
import logging
import os
from collections import deque
from typing import Final

import trio

from replfs.block.mirror import Mirror
from replfs.block.node import Node
from replfs.block.replication.forwarder import Change, Forwarder
from replfs.block.tracking import BLOCK, BLOCK_BITS

logger = logging.getLogger(__name__)

_RUN: Final = 16  # blocks of data in one step
_ZERO_RUN: Final = 1 << 14  # blocks of zeroes in one step
_UNANSWERED: Final = 8  # steps that may be on their way
_ZEROES: Final = bytes(BLOCK)
_SPEED_SECONDS: Final = 5.0


class Throttle:
    """At most ``rate`` bytes a second, 0 for no limit."""

    def __init__(self, rate: int) -> None:
        self.rate = rate
        self._free_at = 0.0

    async def spend(self, length: int) -> None:
        if self.rate:
            now = trio.current_time()
            self._free_at = max(self._free_at, now) + length / self.rate
            await trio.sleep_until(self._free_at)


async def is_zero(node: Node, start: int, stop: int) -> bool:
    """Whether the node says that a range is nothing but zeroes. Raises OSError."""
    while start < stop:
        extents = await node.extents(start, stop - start, 64)
        if not all(extent.zero for extent in extents):
            return False
        start += sum(extent.length for extent in extents)
    return True


class Resync:
    """Of a mirror's stale blocks. The counts are of bytes of the disk."""

    def __init__(self, mirror: Mirror, rate: int) -> None:
        """``rate``: bytes a second at most, 0 for no limit."""
        self.throttle = Throttle(rate)
        self.running = False
        self.sent = 0
        """Bytes of data that resyncs have sent."""
        self._mirror = mirror
        self._resumed: trio.Event | None = None
        self._total = 0
        self._marks: deque[tuple[float, int]] = deque()  # when, and how much was stale then
        self._unanswered: deque[Change] = deque()

    @property
    def paused(self) -> bool:
        return self._resumed is not None

    def pause(self) -> None:
        if self._resumed is None:
            self._resumed = trio.Event()

    def resume(self) -> None:
        if self._resumed is not None:
            self._resumed.set()
            self._resumed = None

    @property
    def _forwarder(self) -> Forwarder:
        assert self._mirror.forwarder is not None
        return self._mirror.forwarder

    def progress(self) -> dict[str, int | float | bool | None]:
        """For the status: ``rate`` in bytes a second, ``seconds-left`` None if that cannot be told."""
        tracking = self._forwarder.tracking
        left = tracking.bytes_of(tracking.stale)
        speed = self._speed(left)
        return {
            "running": self.running,
            "paused": self.paused,
            "total": max(self._total, left),
            "left": left,
            "sent": self.sent,
            "rate": round(speed),
            "seconds-left": round(left / speed, 1) if speed > 0 else None,
        }

    def _speed(self, left: int) -> float:
        if not self._marks or not self.running or self.paused:
            return 0.0
        since, before = self._marks[0]
        elapsed = trio.current_time() - since
        return max(before - left, 0) / elapsed if elapsed > 0 else 0.0

    async def run(self, remote: Node, *, compare: bool) -> None:
        """Until nothing is stale, and all that was sent is acknowledged, or lost. ``compare``: only what differs is sent.

        Raises OSError if the disk or ``remote`` cannot be read; what is left is stale still.
        """
        tracking = self._forwarder.tracking
        self._total = tracking.bytes_of(tracking.stale)
        self._marks.clear()
        self.running = True
        try:
            position = 0
            while tracking.stale:
                if self._resumed is not None:
                    await self._resumed.wait()
                    self._marks.clear()
                    continue
                position = await self._step(remote, position, compare)
                while len(self._unanswered) > _UNANSWERED:
                    await self._unanswered.popleft().wait()
            while self._unanswered:
                await self._unanswered.popleft().wait()
        finally:
            self._unanswered.clear()
            self.running = False

    def _mark(self, left: int) -> None:
        now = trio.current_time()
        if not self._marks or now - self._marks[-1][0] > _SPEED_SECONDS / 10:
            self._marks.append((now, left))
            while now - self._marks[0][0] > _SPEED_SECONDS:
                self._marks.popleft()

    async def _step(self, remote: Node, position: int, compare: bool) -> int:
        """Send some blocks; gives the position behind them."""
        tracking = self._forwarder.tracking
        self._mark(tracking.bytes_of(tracking.stale))
        if position > tracking.stale.max():
            position = 0
        first = tracking.stale.next_set_bit(position)
        last = tracking.end_of_run(first, _ZERO_RUN)
        start, stop = self._bytes(first, last)
        (extent, *_) = await self._mirror.disk.extents(start, stop - start, 1)
        if extent.zero and (extent.length >= BLOCK or extent.length == stop - start):
            last = min(
                last,
                first + -(-extent.length // BLOCK) - 1 if extent.length == stop - start else first + extent.length // BLOCK - 1,
            )
        else:
            last = min(last, first + _RUN - 1)
        start, stop = self._bytes(first, last)
        spent = 0
        async with self._mirror.locks.hold(start, stop):
            for low, high in self._still_stale(first, last):
                spent += await self._send(remote, low, high, compare)
        await self.throttle.spend(spent)
        return last + 1

    def _bytes(self, first: int, last: int) -> tuple[int, int]:
        return first << BLOCK_BITS, min(last + 1 << BLOCK_BITS, self._mirror.size)

    def _still_stale(self, first: int, last: int) -> list[tuple[int, int]]:
        """Runs of blocks: what was stale before the lock was there may have been sent since. At the end of the disk, too."""
        found: list[tuple[int, int]] = []
        stale = self._forwarder.tracking.stale
        if stale.range_cardinality(first, last + 1) == last + 1 - first:
            return [(first, last)]
        for block in range(first, last + 1):
            if block in stale:
                if found and found[-1][1] == block - 1:
                    found[-1] = found[-1][0], block
                else:
                    found.append((block, block))
        return found

    async def _send(self, remote: Node, first: int, last: int, compare: bool) -> int:
        """The caller holds their range. Gives the bytes of data that this took."""
        tracking = self._forwarder.tracking
        trusted = not tracking.is_pending(first, last)  # what the other side says is not about to change
        tracking.resend(first, last)
        left = first  # those from here on are not queued yet
        try:
            start, stop = self._bytes(first, last)
            if await is_zero(self._mirror.disk, start, stop):
                if trusted and await is_zero(remote, start, stop):
                    tracking.acknowledged(first, last)
                else:
                    step = self._forwarder.largest_zeroes >> BLOCK_BITS
                    while left <= last:
                        end = min(last, left + step - 1)
                        self._queue(left, end, None)
                        left = end + 1
                left = last + 1
                return 0
            data = memoryview(bytes(await self._mirror.disk.read(start, stop - start)))
            theirs = memoryview(bytes(await remote.read(start, stop - start))) if compare and trusted else None
            spent = 0
            for low, high, kind in self._kinds(data, theirs):
                part = data[low * BLOCK : (high + 1) * BLOCK]
                if kind == "same":
                    tracking.acknowledged(first + low, first + high)
                elif kind == "zero":
                    self._queue(first + low, first + high, None)
                else:
                    self._queue(first + low, first + high, part)
                    spent += len(part)
                left = first + high + 1
            self.sent += spent
            return len(data) if theirs is not None else spent
        finally:
            if left <= last:
                tracking.lost(left, last)

    @staticmethod
    def _kinds(data: memoryview, theirs: memoryview | None) -> list[tuple[int, int, str]]:
        """What becomes of the blocks that this is: (first, last, "same", "zero" or "data"), neighbours merged."""
        found: list[tuple[int, int, str]] = []
        for number, at in enumerate(range(0, len(data), BLOCK)):
            part = data[at : at + BLOCK]
            if theirs is not None and part == theirs[at : at + BLOCK]:
                kind = "same"
            else:
                kind = "zero" if part == _ZEROES[: len(part)] else "data"
            if found and found[-1][2] == kind:
                found[-1] = found[-1][0], number, kind
            else:
                found.append((number, number, kind))
        return found

    def _queue(self, first: int, last: int, data: memoryview | None) -> None:
        start, stop = self._bytes(first, last)
        if not self._forwarder.attached:  # the caller sees to it that they are stale again
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
        self._unanswered.append(self._forwarder.put(start, stop - start, data))
