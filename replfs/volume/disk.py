"""Opening the disk that a volume replicates, and keeping it to one process."""

import errno
import fcntl
import os
import stat
from pathlib import Path

from replfs.block.file import File
from replfs.block.qcow2.header import MAGIC
from replfs.block.raw import Raw
from replfs.errors import InUse, ReplfsError, printable


def open_disk(path: Path, disk_format: str | None) -> Raw:
    """Open a disk for reading and writing, and lock it. ``disk_format`` None: raw, if it does not look like anything else.

    Raises ReplfsError if it cannot be, InUse if another process has it.
    """
    shown = printable(str(path))
    if disk_format == "qcow2":
        raise ReplfsError(
            f"cannot use {shown}: this release serves raw disks only; convert it with qemu-img convert -O raw", errno.EOPNOTSUPP
        )
    try:
        kind = path.stat().st_mode
        if not (stat.S_ISREG(kind) or stat.S_ISBLK(kind)):
            what = "a directory" if stat.S_ISDIR(kind) else "neither a file nor a block device"
            raise ReplfsError(f"{shown} is {what}: name a disk image or a block device", errno.EINVAL)
        file = File.open(str(path), writable=True)
    except OSError as error:
        raise ReplfsError(f"cannot open the disk {shown}: {error.strerror}", error.errno or errno.EIO) from error
    try:
        fcntl.flock(file.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if file.length() == 0:
            raise ReplfsError(f"the disk {shown} is empty: make one first, for example with truncate -s 10G", errno.EINVAL)
        if disk_format is None and file.read_now(0, len(MAGIC)) == MAGIC:
            raise ReplfsError(
                f"{shown} looks like a qcow2 image: say --format raw if its bytes are the disk's own all the same", errno.EINVAL
            )
        return Raw(file)
    except BlockingIOError:
        file.close()
        raise InUse(f"the disk {shown} is in use by another process: unmount or stop that one first") from None
    except OSError as error:
        file.close()
        raise ReplfsError(f"cannot read the disk {shown}: {error.strerror}", error.errno or errno.EIO) from error
    except ReplfsError:
        file.close()
        raise


def resolve(path: str) -> Path:
    """An absolute path without symbolic links, whether or not it exists."""
    return Path(os.path.realpath(path))
