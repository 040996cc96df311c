"""QEMU's image locks, so that replfs, qemu-img and virtual machines keep out of each other's files.

QEMU holds open-file-description locks on single bytes of an image: byte 100 + N says "I use permission N", byte 200 + N says
"nobody else may use permission N" (docs/system/qemu-block-drivers and block/file-posix.c in QEMU). All of them are shared locks;
a conflict is found by asking for an exclusive one afterwards. The locks end with the descriptor.
"""

import errno
import fcntl
import os
import struct
from typing import Final

from replfs.errors import InUse, ReplfsError, printable

_USED: Final = 100
_UNSHARED: Final = 200
_CONSISTENT_READ, _WRITE, _RESIZE = 0, 1, 3
_NAMES: Final = {_CONSISTENT_READ: "read", _WRITE: "write", _RESIZE: "resize"}
_FLOCK: Final = struct.Struct("hhqqi4x")


def lock(fd: int, name: str, *, writable: bool) -> None:
    """Lock an image that is open, and that errors call ``name``: nobody else writes to it, and no two of us.

    Raises InUse, or ReplfsError if it cannot be locked.
    """
    shown = printable(name, 2000)
    use = (_CONSISTENT_READ, _WRITE, _RESIZE) if writable else (_CONSISTENT_READ,)
    unshare = (_WRITE, _RESIZE)
    try:
        for byte in (*(_USED + n for n in use), *(_UNSHARED + n for n in unshare)):
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))
        for n in use:
            if _is_held(fd, _UNSHARED + n):
                raise InUse(
                    f"{shown} is in use by another process, which lets nobody else {_NAMES[n]} it: unmount or stop that one first"
                )
        for n in unshare:
            if _is_held(fd, _USED + n):
                raise InUse(f"{shown} is in use by another process, which may {_NAMES[n]} it: unmount or stop that one first")
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise InUse(f"{shown} is in use by another process: unmount or stop that one first") from None
        raise ReplfsError(
            f"{shown} cannot be locked ({error.strerror}): its file system must have open file description locks",
            error.errno or errno.EIO,
        ) from error


def _is_held(fd: int, byte: int) -> bool:
    """Whether another open file has a lock on the byte."""
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)
