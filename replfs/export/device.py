"""The kernel's end of the mount: reads, writes and fsyncs are answered here, everything else by libfuse.

libfuse mounts, and is then given one end of a socket pair in place of /dev/fuse. What the kernel asks for arrives here. The three
requests that make up nearly all of a machine's life are carried out in a few steps; any other one is handed to libfuse as it is,
and its answer back. So the data's path has no system call that only waits, and no copy but the kernel's own: a read goes
into the very buffer that is the reply, and a write comes out of the one that it was received in. Large reads do not even pass
through here (:mod:`replfs.export.splice`).

All workers do the same: one receives a request and carries it out; before that it sees to it that another one is awake (the
standby), which goes on receiving if the request has to wait.

Guarding rule: only the worker that has set ``_receiving`` reads from the device; its buffer is its own.

The messages are those of the kernel's ``include/uapi/linux/fuse.h``, in the machine's byte order: ``fuse_in_header`` and
``fuse_out_header`` with ``fuse_read_in``, ``fuse_write_in``, ``fuse_write_out`` and ``fuse_notify_inval_inode_out``.
"""

import errno
import mmap
import os
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Final, Protocol

import trio

from replfs.arrivals import Arrivals, do_not_spin
from replfs.block.file import File
from replfs.block.node import Data
from replfs.export.splice import LARGEST, Pipe

_READ: Final = 15
_WRITE: Final = 16
_FSYNC: Final = 20
_INIT: Final = 26
_INTERRUPT: Final = 36
_NOTIFY_INVAL_INODE: Final = 2

_REQUEST: Final = struct.Struct("=IIQQIIIIQQI")
"""fuse_in_header (length, opcode, unique, node, uid, gid, pid, extensions), and what a read and a write begin with alike: file
handle, offset, size. An fsync has a file handle there, too."""
_DATA_AT: Final = 80
_REPLY: Final = struct.Struct("=IiQ")  # length, error, unique
_WRITTEN: Final = struct.Struct("=IiQII")  # the same, and size, padding
_AGREED: Final = struct.Struct("=IiQIIIIHHIIH")
"""A reply with what fuse_init_out begins with: versions, readahead, flags, two limits of requests in the background, largest write,
granularity of times, most pages of a request."""
_INVALIDATE: Final = struct.Struct("=IiQQqq")  # the same, and node, offset, length

_SPLICED: Final = 64 << 10  # bytes of a read that are worth it
_WORKERS: Final = 32
_TURNS: Final = 32  # requests that are answered before other tasks get a turn, should none of them have to wait
_CONTROL_BYTES: Final = 1 << 20


class Content(Protocol):
    """Who answers the requests about the file's content; what they raise is turned into an errno by :meth:`failure`."""

    def locate(self, off: int, size: int) -> tuple[File, int] | None:
        """Where all of a range lies, see :meth:`replfs.block.node.Node.locate`."""

    def read_at_once(self, off: int, buffer: memoryview) -> int:
        """As :meth:`read`, if that need not wait, else -1."""

    def write_at_once(self, fh: int, off: int, buf: Data) -> int:
        """As :meth:`write`, if that need not wait, else -1."""

    async def read(self, off: int, buffer: memoryview) -> int:
        """Put what is there into the buffer: how many bytes."""

    async def write(self, fh: int, off: int, buf: Data) -> int:
        """How many bytes were written. ``buf`` is somebody else's when this has returned."""

    async def fsync(self, fh: int, datasync: bool) -> None: ...

    def failure(self, error: Exception) -> int:
        """The errno for an exception."""


class Device:
    """Owns /dev/fuse until :meth:`give_back`."""

    def __init__(self, content: Content, libfuse_fd: int) -> None:
        """``libfuse_fd``: where libfuse has /dev/fuse open, just mounted."""
        self._content = content
        self._libfuse_fd = libfuse_fd
        self._fd = os.dup(libfuse_fd)
        os.set_inheritable(self._fd, False)
        self._libfuse, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            os.dup2(theirs.fileno(), libfuse_fd, inheritable=False)
        self._libfuse.setblocking(False)
        os.set_blocking(self._fd, False)
        self._init = -1  # the request that opens the conversation, until it is answered
        self._ended = False
        self._receiving = False
        self._idle = trio.lowlevel.ParkingLot()  # workers without work
        self._standby = False  # one of them has been woken and did not run yet
        self._turn = 0
        self._arrivals = Arrivals(self._fd)
        self._pipe = Pipe()

    def give_back(self) -> None:
        """Let libfuse have /dev/fuse again, so that it finds out by itself whether there is anything to unmount."""
        os.dup2(self._fd, self._libfuse_fd, inheritable=False)
        os.close(self._fd)
        self._libfuse.close()
        self._pipe.close()

    def invalidate(self, inode: int, offset: int = 0, length: int = 0) -> None:
        """Have the kernel write back and forget what it caches of a file, or of ``length`` bytes of it, and its attributes.

        For a worker thread: this returns when requests that it leads to have been served. Raises OSError.
        """
        os.write(self._fd, _INVALIDATE.pack(_INVALIDATE.size, _NOTIFY_INVAL_INODE, 0, inode, offset, length))

    # Serving

    async def serve(self) -> None:
        """Until the unmount, or :meth:`end`. Raises ConnectionAbortedError after a forced unmount."""
        async with trio.open_nursery() as workers:
            for _ in range(_WORKERS):
                workers.start_soon(self._work)

    def end(self) -> None:
        """Receive no more; what has been received is still answered."""
        self._ended = True
        trio.lowlevel.notify_closing(self._fd)
        self._idle.unpark_all()

    async def _work(self) -> None:
        """A worker: whatever changes something does so while awake, and looks here again before it parks."""
        buffer: mmap.mmap | None = None
        while not self._ended:
            if self._receiving:
                await self._idle.park()
                self._standby = False
                continue
            if buffer is None:
                # With all of its memory there: a process that is killed while the kernel has to find some for a request leaves that
                # request an I/O error, in place of the end of the connection.
                buffer = mmap.mmap(-1, _DATA_AT + LARGEST, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
                view, attempt = memoryview(buffer), partial(os.readv, self._fd, [buffer])
            try:
                length = attempt()  # in fewer steps than :meth:`_receive`, which sees to all that is no request
            except OSError:
                self._receiving = True
                try:
                    length = await self._receive(attempt)
                finally:
                    self._receiving = False
            if not length:
                self._ended = True
                break
            request = _REQUEST.unpack_from(buffer)
            if not self._answer_at_once(request, view):
                if self._idle and not self._standby:
                    self._standby = True
                    self._idle.unpark()
                do_not_spin()  # what has been begun comes first
                await self._answer(request, view, length)
            self._turn += 1
            if self._turn % _TURNS == 0:
                await trio.lowlevel.checkpoint()
        self._idle.unpark_all()

    async def _receive(self, attempt: Callable[[], int]) -> int:
        """The next request: its length in bytes, 0 if there will not be any."""
        while True:
            try:
                return await self._arrivals.take(attempt)
            except FileNotFoundError:
                pass  # a request that was taken back meanwhile
            except trio.ClosedResourceError:
                return 0
            except OSError as error:
                if error.errno == errno.ENODEV:  # the file system has been unmounted
                    return 0
                raise

    def _answer_at_once(self, request: tuple[int, ...], view: memoryview) -> bool:
        """As :meth:`_answer`, if that need not wait."""
        _, opcode, unique, _, _, _, _, _, handle, offset, size = request
        try:
            if opcode == _READ:
                if size >= _SPLICED and self._splice(unique, offset, size):
                    return True
                if (got := self._content.read_at_once(offset, view[_REPLY.size : _REPLY.size + size])) < 0:
                    return False
                _REPLY.pack_into(view, 0, _REPLY.size + got, 0, unique)
                self._reply(view[: _REPLY.size + got])
            elif opcode == _WRITE:
                if (written := self._content.write_at_once(handle, offset, view[_DATA_AT : _DATA_AT + size])) < 0:
                    return False
                self._reply(_WRITTEN.pack(_WRITTEN.size, 0, unique, written, 0))
            else:
                return False
        except Exception as error:
            self._reply(_REPLY.pack(_REPLY.size, -self._content.failure(error), unique))
        return True

    def _splice(self, unique: int, offset: int, size: int) -> bool:
        found = self._content.locate(offset, size)
        if found is None:
            return False
        try:
            return self._pipe.answer(self._fd, _REPLY.pack(_REPLY.size + size, 0, unique), *found, size)
        except OSError as error:
            self._not_replied(error)
            return True

    async def _answer(self, request: tuple[int, ...], view: memoryview, length: int) -> None:
        """Carry a request out, or have it carried out. The buffer has all of it, unless it is a read: then the reply is there."""
        _, opcode, unique, _, _, _, _, _, handle, offset, size = request
        try:
            if opcode == _READ:
                got = await self._content.read(offset, view[_REPLY.size : _REPLY.size + size])
                _REPLY.pack_into(view, 0, _REPLY.size + got, 0, unique)
                self._reply(view[: _REPLY.size + got])
            elif opcode == _WRITE:
                written = await self._content.write(handle, offset, view[_DATA_AT : _DATA_AT + size])
                self._reply(_WRITTEN.pack(_WRITTEN.size, 0, unique, written, 0))
            elif opcode == _FSYNC:
                await self._content.fsync(handle, True)
                self._reply(_REPLY.pack(_REPLY.size, 0, unique))
            elif opcode != _INTERRUPT:  # which nothing here takes so long that it would have to heed
                if opcode == _INIT:
                    self._init = unique
                await self._to_libfuse(view[:length])
        except Exception as error:
            self._reply(_REPLY.pack(_REPLY.size, -self._content.failure(error), unique))

    def _reply(self, message: Data) -> None:
        try:
            os.write(self._fd, message)
        except OSError as error:
            self._not_replied(error)

    @staticmethod
    def _not_replied(error: OSError) -> None:
        """Raises the error, unless nobody waits for the reply any more, or the mount has ended, as who receives finds out."""
        if error.errno not in (errno.ENOENT, errno.ENODEV, errno.ECONNABORTED):
            raise error

    # libfuse

    async def _to_libfuse(self, message: memoryview) -> None:
        while True:
            try:
                self._libfuse.send(message)
                return
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._libfuse)

    async def serve_libfuse(self) -> None:
        """Hand its answers back, until cancelled."""
        while True:
            self.hand_back()
            await trio.lowlevel.wait_readable(self._libfuse)

    def hand_back(self) -> None:
        """The answers that libfuse has given so far."""
        with suppress(BlockingIOError):
            while True:
                message = self._libfuse.recv(_CONTROL_BYTES)
                if _REPLY.unpack_from(message)[2] == self._init:
                    self._init = -1
                    message = limited(message)
                self._reply(message)


def limited(message: bytes) -> bytes:
    """libfuse's answer to INIT, with requests that are no larger than the buffers of a :class:`Device`."""
    if len(message) < _AGREED.size:
        return message  # it has refused
    fields = list(_AGREED.unpack_from(message))
    fields[9] = min(fields[9], LARGEST)
    fields[11] = min(fields[11], LARGEST // os.sysconf("SC_PAGESIZE"))
    return _AGREED.pack(*fields) + message[_AGREED.size :]
