"""A file of the host's: reads and writes that do not leave the trio thread unless they would block.

Owns one file descriptor, with QEMU's image locks on it. What it promises:

* :meth:`File.read` answers from the page cache without suspending, and goes to a worker thread only for what the cache does
  not hold, so a reader must expect both.
* :meth:`File.write` and :meth:`File.read_now` never suspend. Nodes build their atomic steps on that: between a look-up and the
  last write that depends on it nothing else runs.
* :meth:`File.sync` returns after an ``fdatasync`` that began after it was called. Callers that come together share one, and a file
  that was not written since the last one needs none. Once it has failed it fails for good: the kernel drops what it could
  not write and would report the next one as a success.
"""

import ctypes
import errno
import os
import stat
from typing import Final

import trio

from replfs.block.image_locks import lock
from replfs.block.node import Data, Extent, merge

_KEEP_SIZE: Final = 1  # fallocate(2): FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE
_PUNCH_HOLE: Final = 2
_ZERO_RANGE: Final = 16
_UNSUPPORTED: Final = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV, errno.ENOTTY})
_ZERO_STEP: Final = 1 << 20
_ZEROES: Final = bytes(_ZERO_STEP)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def _fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    while _libc.fallocate(fd, mode, offset, length) != 0:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


class File:
    """An open regular file or block device, ``path`` as it was named."""

    def __init__(self, fd: int, path: str) -> None:
        self.fd = fd
        self.path = path
        self._no_wait = os.RWF_NOWAIT
        self._dirty = True  # what an earlier process wrote may not be on stable storage either
        self._sync_lock = trio.Lock()
        self._rounds_begun = 0
        self._sync_error: OSError | None = None

    @classmethod
    def open(cls, path: str, *, writable: bool, create: bool = False) -> "File":
        """Open and lock a file; ``create`` makes a new one (0600) and fails if there is one. Raises OSError, InUse, ReplfsError."""
        flags = (os.O_RDWR if writable else os.O_RDONLY) | (os.O_CREAT | os.O_EXCL if create else 0)
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOCTTY, 0o600)
        try:
            lock(fd, path, writable=writable)
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, path)

    @property
    def fixed(self) -> bool:
        """Whether it cannot grow: a block device."""
        return stat.S_ISBLK(os.fstat(self.fd).st_mode)

    def length(self) -> int:
        """Bytes up to the end of the file or device, now."""
        return os.lseek(self.fd, 0, os.SEEK_END)

    def allocated_bytes(self) -> int:
        """Bytes of room that the file takes on its file system (0 for a device)."""
        return os.fstat(self.fd).st_blocks * 512

    def read_now(self, offset: int, length: int) -> bytes:
        """Bytes from ``offset`` on, fewer only at the end of the file; waits for the device in place."""
        data = os.pread(self.fd, length, offset)
        if len(data) == length or not data:
            return data
        parts = [data]
        got = len(data)
        while got < length and (data := os.pread(self.fd, length - got, offset + got)):
            parts.append(data)
            got += len(data)
        return b"".join(parts)

    async def read(self, offset: int, length: int) -> Data:
        """Bytes from ``offset`` on, fewer only at the end of the file. Suspends only if the page cache has not got them."""
        buffer = bytearray(length)
        try:
            if os.preadv(self.fd, [buffer], offset, self._no_wait) == length:
                return buffer
        except BlockingIOError:
            pass  # the page cache has nothing of it: the worker thread below reads it
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            self._no_wait = 0  # this file system has no RWF_NOWAIT; from now on it is read in place
        return await trio.to_thread.run_sync(self.read_now, offset, length)

    def write(self, offset: int, data: Data) -> None:
        """Write all of ``data``. After an error, any part of it may have been written."""
        self._dirty = True
        written = os.pwrite(self.fd, data, offset)
        if written != len(data):
            view = memoryview(data)
            while written < len(view):
                written += os.pwrite(self.fd, view[written:], offset + written)

    def truncate(self, length: int) -> None:
        self._dirty = True
        os.ftruncate(self.fd, length)

    async def write_zeroes(self, offset: int, length: int, may_unmap: bool) -> None:
        """Zeroes, by fallocate where the file system can: a hole if ``may_unmap``, else zeroes that keep their room."""
        self._dirty = True
        await trio.to_thread.run_sync(self._write_zeroes, offset, length, may_unmap)
        self._dirty = True

    def _write_zeroes(self, offset: int, length: int, may_unmap: bool) -> None:
        for mode in (_PUNCH_HOLE | _KEEP_SIZE, _ZERO_RANGE | _KEEP_SIZE) if may_unmap else (_ZERO_RANGE | _KEEP_SIZE,):
            try:
                return _fallocate(self.fd, mode, offset, length)
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
        for start in range(offset, offset + length, _ZERO_STEP):
            self.write(start, memoryview(_ZEROES)[: min(_ZERO_STEP, offset + length - start)])

    async def discard(self, offset: int, length: int) -> None:
        """Give the room of a range back, where the file system can; it is a hint, so one that can not is no error."""
        self._dirty = True
        try:
            await trio.to_thread.run_sync(_fallocate, self.fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
        self._dirty = True

    def sync_now(self) -> None:
        """As :meth:`sync`, in place and by itself: while nobody else uses the file."""
        self._dirty = False
        os.fdatasync(self.fd)

    async def sync(self) -> None:
        """Everything written before this call is on stable storage when it returns. Raises OSError, from then on always."""
        covered_by = self._rounds_begun + 1
        async with self._sync_lock:
            if self._sync_error:
                raise OSError(self._sync_error.errno, f"{self.path}: an earlier fdatasync failed: {self._sync_error.strerror}")
            if self._rounds_begun >= covered_by or not self._dirty:
                return
            self._rounds_begun += 1
            self._dirty = False
            try:
                with trio.CancelScope(shield=True):  # others may be counting on this round
                    await trio.to_thread.run_sync(os.fdatasync, self.fd)
            except OSError as error:
                self._sync_error = error
                raise

    def extents(self, offset: int, length: int, limit: int) -> list[Extent]:
        """Data and holes as the file system tells them; where it does not, all is data."""
        found: list[Extent] = []
        position, end = offset, offset + length
        while position < end and len(found) < limit:
            try:
                data = min(os.lseek(self.fd, position, os.SEEK_DATA), end)
                hole = os.lseek(self.fd, data, os.SEEK_HOLE) if data < end else end
            except OSError as error:
                data = hole = end  # ENXIO: nothing but a hole up to the end
                if error.errno != errno.ENXIO:
                    merge(found, Extent(end - position, False, False))
                    break
            merge(found, Extent(data - position, True, True))
            merge(found, Extent(min(hole, end) - data, False, False))
            position = min(hole, end)
        return found[:limit]

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
