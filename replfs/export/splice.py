"""Answering a read without its bytes passing through this process: from the page cache to a pipe, and from there to the reader.

A pipe takes references to pages, and the only copy is the one into the reader's memory. The pages are a file's own, so nobody may
write to them before they are copied: both steps are done in one stretch, without an await, and no worker thread writes to what a
node's tables lead to.
"""

import ctypes
import fcntl
import os
from typing import Final

from replfs.block.file import File

LARGEST: Final = 512 << 10
"""Bytes of one request: the pages of a read, not aligned to the file's, and its header fit a pipe as large as anybody's may be."""

_F_SETPIPE_SZ: Final = 1031  # fcntl(2)
_PIPE_BYTES: Final = 1 << 20
_CACHESTAT: Final = 451  # the same number on every architecture, since Linux 6.5

_PAGE: Final = os.sysconf("SC_PAGESIZE")


class Pipe:
    def __init__(self) -> None:
        """Raises OSError."""
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._range = (ctypes.c_uint64 * 2)()
        self._found = (ctypes.c_uint64 * 5)()
        self.usable = True
        self._open()

    def _open(self) -> None:
        self._out, self._in = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            self.usable = self.usable and fcntl.fcntl(self._in, _F_SETPIPE_SZ, _PIPE_BYTES) >= _PIPE_BYTES
        except OSError:  # this user has too many pipes
            self.usable = False

    def close(self) -> None:
        os.close(self._in)
        os.close(self._out)

    def answer(self, device: int, header: bytes, file: File, position: int, length: int) -> bool:
        """Write the header and ``length`` bytes of a file to ``device``; False if they are not all in the page cache, or not there.

        Raises the OSError of the device.
        """
        if not self._is_cached(file.fd, position, length):
            return False
        try:
            os.write(self._in, header)
            spliced = os.splice(file.fd, self._in, length, offset_src=position)
        except OSError:
            spliced = -1
        if spliced != length:
            self._empty()
            return False
        try:
            os.splice(self._out, device, len(header) + length)
        except OSError:
            self._empty()
            raise
        return True

    def _empty(self) -> None:
        self.close()
        self._open()

    def _is_cached(self, fd: int, position: int, length: int) -> bool:
        """Whether reading need not wait: splice(2) cannot be told not to."""
        if not self.usable:
            return False
        self._range[0], self._range[1] = position, length
        if self._libc.syscall(_CACHESTAT, fd, self._range, self._found, 0):
            self.usable = False  # an older kernel
            return False
        return self._found[0] == (position + length - 1) // _PAGE - position // _PAGE + 1
