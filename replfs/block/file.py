"""A file of the host's: reads and writes that do not leave the trio thread unless they would block.

Owns one file descriptor. What it promises:

* :meth:`File.read_into` answers from the page cache without suspending, and goes to a worker thread only for what the cache does
  not hold, so a reader must expect both; :meth:`File.read_cached` does only the former.
* :meth:`File.write` and :meth:`File.read_now` never suspend. Nodes build their atomic steps on that: between a look-up and the
  last write that depends on it nothing else runs.
* :meth:`File.sync` returns after an ``fdatasync`` that began after it was called. Callers that come together share one, and a file
  that was not written since the last one needs none.
* After an ``fdatasync`` that failed nothing is assumed clean: the kernel may have dropped what it could not write, and would report
  the next one as a success. So the pages that were written since the last one that succeeded are *suspect*, and every sync fails
  until each of them has been written again.
"""

import ctypes
import errno
import os
import stat
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Final

import trio
from pyroaring import BitMap64

from replfs.block import syncs
from replfs.block.node import Data, Extent, Piece, merge

_KEEP_SIZE: Final = 1  # fallocate(2): FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE
_PUNCH_HOLE: Final = 2
_ZERO_RANGE: Final = 16
_BEGIN_WRITING: Final = 2  # sync_file_range(2): SYNC_FILE_RANGE_WRITE
_UNSUPPORTED: Final = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV, errno.ENOTTY})
_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
_ZERO_STEP: Final = 1 << 20
_COPY_STEP: Final = 1 << 20
_ZEROES: Final = bytes(_ZERO_STEP)
_PAGE_BITS: Final = 12
_PAGE: Final = 1 << _PAGE_BITS

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]


def _note_nothing(path: str, kind: str, error: OSError) -> None:
    """Where nobody counts errors."""


class File:
    """An open regular file or block device, ``path`` as it was named. Every OSError that it raises names it."""

    def __init__(self, fd: int, path: str, note: Callable[[str, str, OSError], None] = _note_nothing) -> None:
        """``note`` is told of every operation that fails: path, kind (see :class:`replfs.block.storage.IoErrors`), error."""
        self.fd = fd
        self.path = path
        self._note = note
        self._no_wait = os.RWF_NOWAIT
        self._inherited = True  # what an earlier process wrote may not be on stable storage either
        self._unsynced = BitMap64()  # pages that were written since the last sync began
        self._suspect = BitMap64()  # pages that an earlier sync could not make durable
        self._sync_lock = trio.Lock()
        self._rounds_begun = 0
        self._rounds_failed = 0
        self._writing_back = False  # a thread is about to have the kernel do so

    def _failed(self, kind: str, error: OSError) -> OSError:
        self._note(self.path, "full" if error.errno in _NO_ROOM else kind, error)
        return OSError(error.errno, f"{self.path}: {error.strerror}")

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

    # Reading

    def read_now(self, offset: int, length: int) -> bytes:
        """Bytes from ``offset`` on, fewer only at the end of the file; waits for the device in place."""
        try:
            data = os.pread(self.fd, length, offset)
            if len(data) == length or not data:
                return data
            parts = [data]
            got = len(data)
            while got < length and (data := os.pread(self.fd, length - got, offset + got)):
                parts.append(data)
                got += len(data)
            return b"".join(parts)
        except OSError as error:
            raise self._failed("read", error) from None

    def read_cached(self, offset: int, buffer: memoryview) -> bool:
        """Fill the buffer with bytes from ``offset`` on, if the page cache has them all. Never suspends."""
        try:
            return os.preadv(self.fd, (buffer,), offset, self._no_wait) == len(buffer)
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                self._no_wait = 0  # this file system has no RWF_NOWAIT; from now on it is read in place
            return False  # of an error a read that may wait has more to say

    async def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fill the buffer with bytes from ``offset`` on; how many there were, fewer only at the end of the file.

        Suspends only if the page cache has not got them.
        """
        if self.read_cached(offset, buffer):
            return len(buffer)
        return await trio.to_thread.run_sync(self._fill, offset, buffer)

    def _fill(self, offset: int, buffer: memoryview) -> int:
        """As :meth:`read_into`, waiting for the device in place."""
        got = 0
        try:
            while got < len(buffer) and (more := os.preadv(self.fd, (buffer[got:],), offset + got)):
                got += more
        except OSError as error:
            raise self._failed("read", error) from None
        return got

    # Writing

    def _changing(self, offset: int, length: int) -> None:
        self._unsynced.add_range(offset >> _PAGE_BITS, (offset + length + _PAGE - 1) >> _PAGE_BITS)

    def _changed(self, offset: int, length: int) -> None:
        """Whole pages that were written again are as good as any."""
        end = offset + length
        last = end + _PAGE - 1 if end >= self.length() else end
        self._suspect.remove_range((offset + _PAGE - 1) >> _PAGE_BITS, last >> _PAGE_BITS)

    @asynccontextmanager
    async def _changing_aside(self, ranges: Sequence[tuple[int, int]]) -> AsyncIterator[None]:
        """While a worker thread writes to ranges (offset, length): a sync meanwhile covers any part of it, or nothing."""
        failed = self._rounds_failed
        for offset, length in ranges:
            self._changing(offset, length)
        try:
            yield
        finally:
            for offset, length in ranges:
                self._changing(offset, length)
        if self._suspect and failed == self._rounds_failed:  # else what was written may be what that sync has lost
            for offset, length in ranges:
                self._changed(offset, length)

    def write(self, offset: int, data: Data) -> None:
        """Write all of ``data``. After an error, any part of it may have been written."""
        length = len(data)
        self._unsynced.add_range(offset >> _PAGE_BITS, (offset + length + _PAGE - 1) >> _PAGE_BITS)
        try:
            written = os.pwrite(self.fd, data, offset)
            if written != length:
                view = memoryview(data)
                while written < length:
                    written += os.pwrite(self.fd, view[written:], offset + written)
        except OSError as error:
            raise self._failed("write", error) from None
        if self._suspect:
            self._changed(offset, length)

    async def copy(self, pieces: Sequence[Piece]) -> None:
        """Write what other files hold, in a worker thread; then it is on its way to stable storage, so that a sync has less to do.

        After an error, any part of it may have been written. Raises OSError.
        """
        async with self._changing_aside([(piece.offset, piece.length) for piece in pieces]):
            await trio.to_thread.run_sync(self._copy, pieces)
        self.begin_writing_back()

    def begin_writing_back(self) -> None:
        """Have what was written on its way to stable storage, so that a sync has less to do. Does not wait."""
        if not self._writing_back:
            self._writing_back = True
            trio.lowlevel.start_thread_soon(self._begin_writing_back, self._has_begun_writing_back)

    def _begin_writing_back(self) -> None:
        _libc.sync_file_range(self.fd, 0, 0, _BEGIN_WRITING)  # a hint: what goes wrong, a sync will tell

    def _has_begun_writing_back(self, _: object) -> None:
        self._writing_back = False

    def _copy(self, pieces: Sequence[Piece]) -> None:
        for file, position, offset, length in pieces:
            copied = 0
            while copied < length and (more := self._copy_inside(file, position + copied, offset + copied, length - copied)):
                copied += more
            while copied < length:
                data = file.read_now(position + copied, min(length - copied, _COPY_STEP))
                if not data:
                    raise file.too_short(position, length)
                self.write(offset + copied, data)
                copied += len(data)

    def _copy_inside(self, file: "File", position: int, offset: int, length: int) -> int:
        """Have the file system copy: how many bytes, 0 if it does not, for whatever reason."""
        try:
            return os.copy_file_range(file.fd, self.fd, length, position, offset)
        except OSError:
            return 0

    def too_short(self, position: int, length: int) -> OSError:
        """What to raise where bytes are missing that have to be there."""
        return OSError(errno.EIO, f"{self.path} has not got the {length} bytes from {position} on that it should")

    def write_durably(self, offset: int, data: Data) -> None:
        """As :meth:`write`, and these bytes are on stable storage when it returns, before anything else that was written.

        For a few bytes, and rarely: it waits for the device in place.
        """
        self._changing(offset, len(data))
        view = memoryview(data)
        try:
            while view:
                written = os.pwritev(self.fd, [view], offset, os.RWF_DSYNC)
                view, offset = view[written:], offset + written
        except OSError as error:
            raise self._failed("write", error) from None

    def truncate(self, length: int) -> None:
        """Cut the file off or let it grow; what is new reads as zeroes."""
        self._changing(max(length - 1, 0), 1)
        try:
            os.ftruncate(self.fd, length)
        except OSError as error:
            raise self._failed("write", error) from None

    def reserve(self, length: int) -> None:
        """Have room for the first ``length`` bytes, and be as long at least. Raises OSError."""
        self._changing(max(length - 1, 0), 1)
        try:
            os.posix_fallocate(self.fd, 0, length)
        except OSError as error:
            raise self._failed("write", error) from None

    def _fallocate(self, mode: int, offset: int, length: int) -> None:
        while _libc.fallocate(self.fd, mode, offset, length) != 0:
            code = ctypes.get_errno()
            if code != errno.EINTR:
                raise OSError(code, os.strerror(code))

    async def write_zeroes(self, offset: int, length: int, may_unmap: bool) -> None:
        """Zeroes, by fallocate where the file system can: a hole if ``may_unmap``, else zeroes that keep their room."""
        async with self._changing_aside([(offset, length)]):
            await trio.to_thread.run_sync(self._write_zeroes, offset, length, may_unmap)

    def _write_zeroes(self, offset: int, length: int, may_unmap: bool) -> None:
        for mode in (_PUNCH_HOLE | _KEEP_SIZE, _ZERO_RANGE | _KEEP_SIZE) if may_unmap else (_ZERO_RANGE | _KEEP_SIZE,):
            try:
                return self._fallocate(mode, offset, length)
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise self._failed("write", error) from None
        for start in range(offset, offset + length, _ZERO_STEP):
            self.write(start, memoryview(_ZEROES)[: min(_ZERO_STEP, offset + length - start)])

    async def discard(self, offset: int, length: int) -> None:
        """Give the room of a range back, where the file system can; it is a hint, so one that can not is no error."""
        self._changing(offset, length)
        try:
            await trio.to_thread.run_sync(self._fallocate, _PUNCH_HOLE | _KEEP_SIZE, offset, length)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise self._failed("discard", error) from None
        self._changing(offset, length)

    # Stable storage

    def _fdatasync(self) -> None:
        os.fdatasync(self.fd)

    def sync_now(self) -> None:
        """As :meth:`sync`, in place and by itself: while nobody else uses the file."""
        unsynced = self._begin_round()
        try:
            self._fdatasync()
        except OSError as error:
            raise self._round_failed(unsynced, error) from None
        self.check_suspect()

    async def sync(self) -> None:
        """Everything written before this call is on stable storage when it returns. Raises OSError."""
        if not (self._unsynced or self._inherited or self._sync_lock.locked()):
            return self.check_suspect()
        covered_by = self._rounds_begun + 1
        async with self._sync_lock:
            if self._rounds_begun < covered_by and (self._unsynced or self._inherited):
                unsynced = self._begin_round()
                try:
                    with trio.CancelScope(shield=True):  # others may be counting on this round
                        if not await syncs.fdatasync(self.fd):
                            await trio.to_thread.run_sync(self._fdatasync)
                except OSError as error:
                    raise self._round_failed(unsynced, error) from None
            self.check_suspect()

    def _begin_round(self) -> BitMap64:
        self._rounds_begun += 1
        unsynced, self._unsynced = self._unsynced, BitMap64()
        if self._inherited:
            unsynced.add_range(0, (self.length() >> _PAGE_BITS) + 1)
            self._inherited = False
        return unsynced

    def _round_failed(self, unsynced: BitMap64, error: OSError) -> OSError:
        self._rounds_failed += 1
        self._suspect |= unsynced | self._unsynced  # what was written meanwhile may be what has failed
        return self._failed("sync", error)

    @property
    def suspect(self) -> bool:
        """Whether :meth:`check_suspect` raises."""
        return bool(self._suspect)

    def check_suspect(self) -> None:
        """Raises OSError (EIO) if an earlier sync has failed for what was not written since."""
        if self._suspect:
            first = self._suspect.min() << _PAGE_BITS
            raise OSError(
                errno.EIO,
                f"{self.path}: an earlier fdatasync failed, and {len(self._suspect) << _PAGE_BITS} bytes from {first} on, which it"
                " was to make durable, were not written again since",
            )

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
