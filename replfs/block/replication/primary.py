"""The filter on the primary: it forwards changes to the secondary, and never reads.

A forward that fails does not fail the change, which the primary's own disk has by then: it is kept as the sticky error. In the
stages none and done the filter answers EIO and leaves the sticky error alone.
"""

import errno
import logging
from collections.abc import Awaitable, Callable

from replfs.block.node import Data, Extent, Node
from replfs.block.replication.rules import Stage

logger = logging.getLogger(__name__)


class PrimaryFilter(Node):
    """``target`` is set in stage running, and replaced only in the others."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.target: Node | None = None
        self.stage = Stage.NONE
        self.sticky_error = False

    @property
    def forwarding(self) -> bool:
        return self.stage is Stage.RUNNING

    async def read(self, offset: int, length: int) -> Data:
        raise OSError(errno.EIO, "the primary's filter only forwards writes")

    async def extents(self, offset: int, length: int, limit: int) -> list[Extent]:
        raise OSError(errno.EIO, "the primary's filter only forwards writes")

    async def write(self, offset: int, data: Data) -> None:
        await self._forward(lambda target: target.write(offset, data))

    async def write_zeroes(self, offset: int, length: int, may_unmap: bool = True) -> None:
        await self._forward(lambda target: target.write_zeroes(offset, length, may_unmap))

    async def discard(self, offset: int, length: int) -> None:
        await self._forward(lambda target: target.discard(offset, length))

    async def flush(self) -> None:
        await self._forward(lambda target: target.flush())

    async def _forward(self, request: Callable[[Node], Awaitable[None]]) -> None:
        if not self.forwarding or self.target is None:
            raise OSError(errno.EIO, "replication is not running")
        try:
            await request(self.target)
        except OSError as error:
            self.failed(error)

    def failed(self, error: OSError) -> None:
        """The secondary may lack something that the primary's disk has."""
        if self.forwarding and not self.sticky_error:
            self.sticky_error = True
            logger.warning("a change or flush could not be forwarded, so the secondary's copy may differ from now on: %s", error)

    async def close(self) -> None:
        """The target is its owner's to close."""
