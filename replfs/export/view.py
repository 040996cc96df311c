"""The view beside the mount: the node that the NBD export ``view`` serves, kept coherent with the mounted file.

What is written to the mounted file reaches the view before it is acknowledged, so there is nothing to be done about that. The other
way round, the kernel may cache what it has read of the file, and hold what a mapping of it has changed. So where it may, a change
that comes this way has the kernel write back and forget the range twice: before, so that what is older does not come later, and
after, before the change is acknowledged, so that nobody reads what was there.
"""

from collections.abc import Awaitable, Callable
from typing import Protocol

from replfs.block.file import File
from replfs.block.node import Data, Extent, Node

NAME = "view"
"""The export's."""


class Cache(Protocol):
    """The kernel's, of the mounted file."""

    @property
    def in_use(self) -> bool:
        """Whether there may be anything in it."""

    async def drop_range(self, offset: int, length: int) -> None:
        """Have what it holds of a range, which is not empty, written back and forgotten. Raises OSError."""


class SharedView(Node):
    """``view`` may be replaced by another one that shows the same."""

    def __init__(self, view: Node, cache: Cache | None) -> None:
        """``cache``: None if there is no mount."""
        self.view = view
        self.size = view.size
        self._cache = cache

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        await self.view.read_into(offset, buffer)

    def locate(self, start: int, stop: int) -> tuple[File, int] | None:
        return self.view.locate(start, stop)

    async def extents(self, offset: int, length: int, limit: int) -> list[Extent]:
        return await self.view.extents(offset, length, limit)

    def write_at_once(self, offset: int, data: Data) -> bool:
        return not (self._cache is not None and self._cache.in_use) and self.view.write_at_once(offset, data)

    async def write(self, offset: int, data: Data) -> None:
        await self._change(offset, len(data), lambda: self.view.write(offset, data))

    async def write_zeroes(self, offset: int, length: int, may_unmap: bool = True) -> None:
        await self._change(offset, length, lambda: self.view.write_zeroes(offset, length, may_unmap))

    async def discard(self, offset: int, length: int) -> None:
        await self._change(offset, length, lambda: self.view.discard(offset, length))

    async def _change(self, offset: int, length: int, change: Callable[[], Awaitable[None]]) -> None:
        await self._drop_cached(offset, length)
        try:
            await change()
        finally:
            await self._drop_cached(offset, length)

    async def _drop_cached(self, offset: int, length: int) -> None:
        if self._cache is not None and self._cache.in_use and length:
            await self._cache.drop_range(offset, length)

    async def flush(self) -> None:
        await self.view.flush()

    async def close(self) -> None:
        """The view is its owner's to close."""
