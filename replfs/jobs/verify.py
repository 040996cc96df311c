"""The verification: both sides are read and compared, while everything else goes on.

It takes no lock where they are the same. What seems to differ is looked at again, block by block, with the mirror's range lock and
nothing on its way: that is what is reported. It counts as out of sync from then on, and is sent only if that is asked for, or when
the link is made anew.
"""

import logging
from typing import Any, Final

from pyroaring import BitMap64

from replfs.block.mirror import Mirror
from replfs.block.node import Node
from replfs.block.tracking import BLOCK, BLOCK_BITS
from replfs.jobs.resync import Throttle, is_zero

logger = logging.getLogger(__name__)

_STEP: Final = 1 << 20
_SHOWN: Final = 100
"""Ranges that the status tells at most."""


class Verify:
    """One run over the whole disk. ``rate``: bytes a second that are read on each side at most, 0 for no limit."""

    def __init__(self, mirror: Mirror, rate: int, *, repair: bool) -> None:
        self.running = False
        self.ended = ""
        """How it has ended, once it has: one line, empty for well."""
        self.differing = BitMap64()
        self._mirror = mirror
        self._repair = repair
        self._throttle = Throttle(rate)
        self._done = 0

    async def run(self, remote: Node) -> None:
        """Raises OSError if a side cannot be read."""
        assert self._mirror.forwarder is not None
        tracking = self._mirror.forwarder.tracking
        self.running, self.ended = True, "the link was lost, or it was stopped"
        try:
            for start in range(0, self._mirror.size, _STEP):
                stop = min(start + _STEP, self._mirror.size)
                for block in await self._compare(remote, start, stop):
                    if await self._differs(remote, block):
                        self.differing.add(block)
                        (tracking.stale if self._repair else tracking.differing).add(block)
                        if self._repair:
                            tracking.on_stale()
                self._done = stop
            self.ended = ""
            logger.info("verify: %d bytes differ", tracking.bytes_of(self.differing))
        finally:
            self.running = False

    async def _compare(self, remote: Node, start: int, stop: int) -> list[int]:
        """Blocks that seem to differ, and are not known to."""
        if await is_zero(self._mirror.disk, start, stop) and await is_zero(remote, start, stop):
            return []
        await self._throttle.spend(stop - start)
        ours = memoryview(bytes(await self._mirror.disk.read(start, stop - start)))
        theirs = memoryview(bytes(await remote.read(start, stop - start)))
        return [
            (start + at) >> BLOCK_BITS for at in range(0, stop - start, BLOCK) if ours[at : at + BLOCK] != theirs[at : at + BLOCK]
        ]

    async def _differs(self, remote: Node, block: int) -> bool:
        forwarder = self._mirror.forwarder
        assert forwarder is not None
        start, stop = block << BLOCK_BITS, min(block + 1 << BLOCK_BITS, self._mirror.size)
        async with self._mirror.locks.hold(start, stop):
            while forwarder.tracking.is_pending(block, block) and forwarder.attached:
                await forwarder.progress()
            if block in forwarder.tracking.stale or not forwarder.attached:
                return False  # it is known, and will be sent
            ours = bytes(await self._mirror.disk.read(start, stop - start))
            return ours != bytes(await remote.read(start, stop - start))

    def status(self) -> dict[str, Any]:
        """For the status; sizes in bytes, ``ranges`` as offset and length."""
        ranges: list[list[int]] = []
        for block in self.differing:
            start, stop = block << BLOCK_BITS, min(block + 1 << BLOCK_BITS, self._mirror.size)
            if ranges and sum(ranges[-1]) == start:
                ranges[-1][1] = stop - ranges[-1][0]
            elif len(ranges) == _SHOWN:
                break
            else:
                ranges.append([start, stop - start])
        assert self._mirror.forwarder is not None
        return {
            "running": self.running,
            "error": "" if self.running else self.ended,
            "done": self._done,
            "total": self._mirror.size,
            "differing": self._mirror.forwarder.tracking.bytes_of(self.differing),
            "ranges": ranges,
            "repair": self._repair,
        }
