"""The FUSE export: one file that is the view, in a root directory of its own, both with the control attributes.

Owns the mount's only two inodes and translates the kernel's requests into calls on the volume's view. The requests about the file's
content come from :mod:`replfs.export.device`, all others from pyfuse3. Guarding rule: a handler lets nothing out but FUSEError;
anything unexpected becomes EIO for that request and a traceback in the log, since pyfuse3 would end the daemon for it and the
machine's disk would vanish.

The kernel may cache what it read: the view changes through this mount alone, except when a control operation says so and calls
:meth:`FuseExport.drop_cache`. For the same reason the modification time stays as it is between these operations: one that
moved with every write would have the kernel drop its cache again and again.
"""

import errno
import functools
import logging
import os
import stat
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, Final, ParamSpec, TypeVar

import pyfuse3
import trio
from pyfuse3 import FUSEError

from replfs import control
from replfs.block.file import File
from replfs.block.node import Data
from replfs.errors import ReplfsError
from replfs.export.device import Device
from replfs.volume.base import Volume
from replfs.volume.config import MountConfig

logger = logging.getLogger(__name__)

_ROOT: Final = pyfuse3.ROOT_INODE
_FILE: Final = pyfuse3.InodeT(_ROOT + 1)
_BLOCK: Final = 4096
_ATTRIBUTE_SECONDS: Final = 60.0
_SYNC, _CACHED = 1, 2
"""File handles tell only whether each write is to be durable, since FUSE sends no FSYNC for O_SYNC on a direct_io open, and whether
the kernel may cache for them."""
_FORGETTING: Final = 4
"""Ranges that the kernel is made to forget at a time: it may wait for reads that need a worker thread themselves."""

P = ParamSpec("P")
T = TypeVar("T")


def _handler(call: Callable[P, Awaitable[T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Keep the guarding rule above."""

    @functools.wraps(call)
    async def guarded(*arguments: P.args, **keywords: P.kwargs) -> T:
        try:
            return await call(*arguments, **keywords)
        except Exception as error:
            raise FUSEError(_errno(error)) from None

    return guarded


def _errno(error: Exception) -> int:
    if isinstance(error, FUSEError):
        return int(error.errno)
    if isinstance(error, OSError | ReplfsError):
        return error.errno or errno.EIO
    logger.error("a request has failed with an unexpected exception", exc_info=error)
    return errno.EIO


@contextmanager
def _tolerating(*numbers: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in numbers:
            raise


class FuseExport(pyfuse3.Operations):
    enable_writeback_cache = False
    supports_dot_lookup = False
    device: Device
    """There while the file system is mounted."""

    def __init__(self, volume: Volume, mount: MountConfig) -> None:
        super().__init__()
        self.serve(volume)
        self._name = os.fsencode(volume.config.name)
        self._read_only = mount.read_only
        self._owner = os.getuid()
        now = time.time_ns()
        self._attributes = {
            _ROOT: self._entry(_ROOT, stat.S_IFDIR | 0o755, 0, mount, now),
            _FILE: self._entry(_FILE, stat.S_IFREG | mount.mode, self._view.size, mount, now),
        }
        self._attributes[_ROOT].st_nlink = 2
        self._cached_handles = 0
        self._cached = False
        self._forgetting = trio.CapacityLimiter(_FORGETTING)

    def serve(self, volume: Volume) -> None:
        """Serve this volume from now on, which shows the same."""
        self._volume = volume
        self._view = volume.view

    @staticmethod
    def _entry(inode: pyfuse3.InodeT, mode: int, size: int, mount: MountConfig, now: int) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_mode = pyfuse3.ModeT(mode)
        entry.st_nlink = 1
        entry.st_uid, entry.st_gid = mount.uid, mount.gid
        entry.st_size = size
        entry.st_blksize = _BLOCK
        entry.st_blocks = -(-size // 512)
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = now
        entry.attr_timeout = entry.entry_timeout = _ATTRIBUTE_SECONDS
        return entry

    async def drop_cache(self) -> None:
        """Have the kernel write back and forget what it caches of the file.

        In a worker thread: the kernel waits for requests that only this process can answer.
        """
        with _tolerating(errno.ENOENT):  # nobody has looked the file up yet
            await trio.to_thread.run_sync(self.device.invalidate, _FILE)
        self._cached = self._cached_handles > 0
        self._attributes[_FILE].st_mtime_ns = self._attributes[_FILE].st_ctime_ns = time.time_ns()

    @property
    def in_use(self) -> bool:
        """Whether the kernel may cache anything of the file: somebody has it open, or had, without O_DIRECT."""
        return self._cached

    async def drop_range(self, offset: int, length: int) -> None:
        """As :meth:`drop_cache`, of a range that has changed but through the mount."""
        with _tolerating(errno.ENOENT, errno.ENODEV, errno.ENOTCONN, errno.ECONNABORTED):  # or the mount has just ended
            await trio.to_thread.run_sync(self.device.invalidate, _FILE, offset, length, limiter=self._forgetting)

    # The two inodes

    @_handler
    async def lookup(self, parent_inode: pyfuse3.InodeT, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        if parent_inode == _ROOT and name == self._name:
            return self._attributes[_FILE]
        if parent_inode == _ROOT and name in (b".", b".."):
            return self._attributes[_ROOT]
        raise FUSEError(errno.ENOENT)

    @_handler
    async def getattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return self._attributes[inode]

    @_handler
    async def setattr(
        self,
        inode: pyfuse3.InodeT,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: pyfuse3.FileHandleT | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        """Owner, mode and times, until the unmount. The size is the disk's.

        Changing it is refused: a program that believes that it truncated the file would leave the old content in its holes.
        """
        entry = self._attributes[inode]
        if fields.update_size:
            raise FUSEError(errno.EPERM)
        if fields.update_mode:
            entry.st_mode = pyfuse3.ModeT(stat.S_IFMT(entry.st_mode) | stat.S_IMODE(attr.st_mode))
        if fields.update_uid:
            entry.st_uid = attr.st_uid
        if fields.update_gid:
            entry.st_gid = attr.st_gid
        if fields.update_atime:
            entry.st_atime_ns = attr.st_atime_ns
        if fields.update_mtime:
            entry.st_mtime_ns = attr.st_mtime_ns
        return entry

    @_handler
    async def opendir(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileHandleT:
        return pyfuse3.FileHandleT(0)

    @_handler
    async def readdir(self, fh: pyfuse3.FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        if start_id == 0:
            pyfuse3.readdir_reply(token, pyfuse3.FileNameT(self._name), self._attributes[_FILE], 1)

    @_handler
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        """A file system that its one file fills."""
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = _BLOCK
        data.f_blocks = -(-self._view.size // _BLOCK)
        data.f_bfree = data.f_bavail = 0
        data.f_files = 2
        data.f_ffree = data.f_favail = 0
        data.f_namemax = 255
        return data

    # The file's content

    @_handler
    async def open(self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        if self._read_only and flags & os.O_ACCMODE != os.O_RDONLY:
            raise FUSEError(errno.EROFS)
        if flags & os.O_TRUNC:
            raise FUSEError(errno.EPERM)  # as in setattr
        direct = bool(flags & os.O_DIRECT)
        if not direct:
            self._cached_handles += 1
            self._cached = True
        handle = pyfuse3.FileHandleT((_SYNC if flags & os.O_DSYNC else 0) | (0 if direct else _CACHED))
        return pyfuse3.FileInfo(fh=handle, direct_io=direct, keep_cache=not direct)

    def locate(self, off: int, size: int) -> tuple[File, int] | None:
        return self._view.locate(off, off + size) if off + size <= self._view.size else None

    def read_at_once(self, off: int, buffer: memoryview) -> int:
        room = self._view.size - off
        if room < len(buffer):
            if room <= 0:
                return 0
            buffer = buffer[:room]
        return len(buffer) if self._view.read_at_once(off, buffer) else -1

    def write_at_once(self, fh: int, off: int, buf: Data) -> int:
        if fh & _SYNC or self._view.size - off < len(buf):
            return -1
        return len(buf) if self._view.write_at_once(off, buf) else -1

    async def read(self, off: int, buffer: memoryview) -> int:  # type: ignore[override]
        length = min(len(buffer), self._view.size - off)
        if length <= 0:
            return 0
        await self._view.read_into(off, buffer[:length])
        return length

    async def write(self, fh: int, off: int, buf: Data) -> int:
        """As to a block device: what does not fit before its end is not written."""
        room = self._view.size - off
        if room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        data = buf if len(buf) <= room else buf[:room]
        await self._view.write(off, data)
        if fh & _SYNC:
            await self._view.flush()
        return len(data)

    async def fsync(self, fh: int, datasync: bool) -> None:
        await self._view.flush()

    def failure(self, error: Exception) -> int:
        """The errno for an exception that one of these three has raised."""
        return _errno(error)

    @_handler
    async def fsyncdir(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:
        await self._view.flush()

    @_handler
    async def flush(self, fh: pyfuse3.FileHandleT) -> None:
        """close(2) promises nothing."""

    @_handler
    async def release(self, fh: pyfuse3.FileHandleT) -> None:
        if fh & _CACHED:
            self._cached_handles -= 1

    @_handler
    async def releasedir(self, fh: pyfuse3.FileHandleT) -> None:
        """A directory's handle holds nothing."""

    async def forget(self, inode_list: object) -> None:
        """The two inodes are there as long as the mount."""

    # What a directory with one fixed file cannot do

    @_handler
    async def access(self, inode: pyfuse3.InodeT, mode: pyfuse3.ModeT, ctx: pyfuse3.RequestContext) -> bool:
        return True  # the kernel checks: the mount has default_permissions

    @_handler
    async def mknod(self, *_: Any) -> Any:
        raise FUSEError(errno.EPERM)

    create = mkdir = symlink = link = unlink = rmdir = rename = mknod  # type: ignore[assignment]

    # Control

    @_handler
    async def listxattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> list[bytes]:
        return [name.encode() for name in control.NAMES]

    @_handler
    async def getxattr(self, inode: pyfuse3.InodeT, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        return control.get(self._volume, name.decode(errors="replace"))

    @_handler
    async def setxattr(self, inode: pyfuse3.InodeT, name: bytes, value: bytes, ctx: pyfuse3.RequestContext) -> None:
        if ctx.uid not in (0, self._owner):
            raise FUSEError(errno.EACCES)
        await control.put(self._volume, name.decode(errors="replace"), value)

    @_handler
    async def removexattr(self, inode: pyfuse3.InodeT, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        raise FUSEError(errno.EOPNOTSUPP)
