"""What orders requests across await points: locks on byte ranges, and a gate that can be shut.

Between two awaits nothing else runs, so neither needs more than plain Python objects.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


class RangeLocks:
    """Exclusive locks on byte ranges, first come, first served among those that overlap.

    ``async with locks.hold(start, stop)`` does not suspend if nobody holds or awaits a byte of ``start .. stop``.
    """

    __slots__ = ("_ranges",)

    def __init__(self) -> None:
        self._ranges: list[_Held] = []  # held and awaited ones, in the order of their coming

    def free(self, start: int, stop: int) -> bool:
        """Whether nobody holds or awaits a byte of ``start .. stop``: then they may be used until the next await."""
        return not self._ranges or all(stop <= held._start or held._stop <= start for held in self._ranges)

    def hold(self, start: int, stop: int) -> "_Held":
        return _Held(self._ranges, start, stop)


class _Held:
    __slots__ = ("_ranges", "_released", "_start", "_stop")

    def __init__(self, ranges: list["_Held"], start: int, stop: int) -> None:
        self._ranges = ranges
        self._start = start
        self._stop = stop
        self._released: trio.Event | None = None  # made by the first who waits for it

    async def __aenter__(self) -> None:
        start, stop = self._start, self._stop
        before = [other for other in self._ranges if other._start < stop and start < other._stop]
        self._ranges.append(self)
        try:
            for other in before:
                if other in self._ranges:
                    if other._released is None:
                        other._released = trio.Event()
                    await other._released.wait()
        except BaseException:
            self._release()
            raise

    async def __aexit__(self, *_: object) -> None:
        self._release()

    def _release(self) -> None:
        self._ranges.remove(self)
        if self._released is not None:
            self._released.set()


class Gate:
    """Requests pass it; whoever shuts it has the place to himself.

    ``async with gate`` is a request's passage: it waits while the gate is shut. ``async with gate.shut()`` waits until every
    request inside has left and keeps new ones waiting. A request must not enter twice: it would wait for itself.
    """

    def __init__(self) -> None:
        self.shutting = False
        """Whether somebody shuts it; a request that does not suspend needs no passage otherwise."""
        self._inside = 0
        self._open = trio.Event()
        self._open.set()
        self._empty: trio.Event | None = None
        self._shutting = trio.Lock()

    async def __aenter__(self) -> None:
        while not self._open.is_set():
            await self._open.wait()
        self._inside += 1

    async def __aexit__(self, *_: object) -> None:
        self._inside -= 1
        if self._empty is not None and self._inside == 0:
            self._empty.set()

    @asynccontextmanager
    async def shut(self) -> AsyncIterator[None]:
        async with self._shutting:
            self._open = trio.Event()
            self.shutting = True
            try:
                if self._inside:
                    self._empty = trio.Event()
                    await self._empty.wait()
                yield
            finally:
                self._empty = None
                self.shutting = False
                self._open.set()
