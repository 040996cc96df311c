"""fdatasync(2) without a worker thread: the kernel does it aside, and an eventfd tells when.

To wake a thread, and then to be woken by it, takes about as long as a fast device needs for the sync itself. Linux's asynchronous
I/O (io_submit(2), with IOCB_CMD_FDSYNC) needs neither. Where the kernel has none of it, or has no more to give, a thread has to do.

Owns the contexts that this takes: one for each sync that is under way at a time, kept for the next one.
"""

import ctypes
import errno
import os
import platform
import struct
from typing import Final

import trio

_NUMBERS: Final = {"x86_64": (206, 209, 208), "aarch64": (0, 2, 4)}
"""Of the system calls io_setup, io_submit and io_getevents, which the C library does not wrap."""

_IOCB: Final = struct.Struct("=QIIHhIQQqQII")
"""struct iocb of include/uapi/linux/aio_abi.h: data, key, flags of the I/O, operation, priority, descriptor, buffer, bytes, offset,
reserved, flags, eventfd."""
_IOCB_CMD_FDSYNC: Final = 3
_IOCB_FLAG_RESFD: Final = 1
_EVENT: Final = struct.Struct("=QQqq")  # struct io_event: data, iocb, result, second result

_libc = ctypes.CDLL(None, use_errno=True)

asynchronous = platform.machine() in _NUMBERS
"""Whether the kernel can, as far as is known."""


class _NotBegun(OSError):
    """The kernel does not take it."""


def _not_begun() -> _NotBegun:
    code = ctypes.get_errno()
    return _NotBegun(code, os.strerror(code))


class _Context:
    """For one sync at a time."""

    def __init__(self) -> None:
        """Raises _NotBegun."""
        setup, self._submit, self._get = _NUMBERS[platform.machine()]
        self._number = ctypes.c_ulong(0)
        if _libc.syscall(setup, 1, ctypes.byref(self._number)) < 0:
            raise _not_begun()
        self._done = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._request = ctypes.create_string_buffer(_IOCB.size)
        self._requests = (ctypes.c_void_p * 1)(ctypes.addressof(self._request))
        self._event = ctypes.create_string_buffer(_EVENT.size)
        self._sync = 0  # which one is under way, or was the last

    def begin(self, fd: int) -> None:
        """Raises _NotBegun."""
        self._sync += 1
        values = (self._sync, 0, 0, _IOCB_CMD_FDSYNC, 0, fd & 0xFFFF_FFFF, 0, 0, 0, 0, _IOCB_FLAG_RESFD, self._done)
        _IOCB.pack_into(self._request, 0, *values)
        if _libc.syscall(self._submit, self._number, 1, self._requests) < 0:
            raise _not_begun()

    async def end(self) -> None:
        """Raises the OSError of the sync."""
        while True:
            try:
                os.eventfd_read(self._done)
                break
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._done)
        got = _libc.syscall(self._get, self._number, 1, 1, self._event, None)
        sync, _, result, _ = _EVENT.unpack(self._event.raw)
        if got != 1 or sync != self._sync:
            raise RuntimeError("the kernel does not tell what has become of a sync")
        if result < 0:
            raise OSError(-result, os.strerror(-result))


_idle: Final[list[_Context]] = []


async def fdatasync(fd: int) -> bool:
    """As fdatasync(2), unless that takes a thread: then False, and nothing has been done. Cannot be cancelled. Raises OSError.

    A context that somebody has left before the end is not used again: what it would tell of is an earlier sync.
    """
    global asynchronous
    if not asynchronous:
        return False
    try:
        context = _idle.pop() if _idle else _Context()
        context.begin(fd)
    except _NotBegun as error:
        if error.errno not in (errno.EAGAIN, errno.EBADF):  # which are about this moment, or this file
            asynchronous = False
        return False
    try:
        with trio.CancelScope(shield=True):
            await context.end()
    except RuntimeError as error:
        asynchronous = False
        raise OSError(errno.EIO, str(error)) from None
    except OSError:
        _idle.append(context)
        raise
    _idle.append(context)
    return True
