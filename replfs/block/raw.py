"""A raw disk: the bytes of a regular file or block device as they are."""

import errno
from collections.abc import Sequence

from replfs.block.file import File
from replfs.block.node import Data, Extent, Node, Piece


class Raw(Node):
    """Owns ``file``; the disk's size is what it was when it was opened."""

    format = "raw"

    def __init__(self, file: File) -> None:
        self.file = file
        self.size = file.length()

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        if await self.file.read_into(offset, buffer) != len(buffer):
            raise OSError(errno.EIO, f"{self.file.path} has become shorter than {self.size} bytes")

    def locate(self, start: int, stop: int) -> tuple[File, int] | None:
        return self.file, start

    def write_at_once(self, offset: int, data: Data) -> bool:
        self.file.write(offset, data)
        return True

    async def write(self, offset: int, data: Data) -> None:
        self.file.write(offset, data)

    async def copy(self, pieces: Sequence[Piece]) -> None:
        await self.file.copy(pieces)

    async def write_zeroes(self, offset: int, length: int, may_unmap: bool = True) -> None:
        if length:
            await self.file.write_zeroes(offset, length, may_unmap)

    async def discard(self, offset: int, length: int) -> None:
        if length:
            await self.file.discard(offset, length)

    async def flush(self) -> None:
        await self.file.sync()

    async def extents(self, offset: int, length: int, limit: int) -> list[Extent]:
        return self.file.extents(offset, length, limit)

    async def close(self) -> None:
        self.release()

    def release(self) -> None:
        """As :meth:`close`, for those who cannot await."""
        self.file.close()
