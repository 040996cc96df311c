"""Opening the disk that a volume replicates."""

import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from replfs.block.cache import Cache
from replfs.block.chain import Chain
from replfs.block.qcow2.header import MAGIC
from replfs.block.qcow2.image import Image
from replfs.block.qcow2.reading import ReadOnlyImage
from replfs.block.raw import Raw
from replfs.block.storage import Storage
from replfs.errors import ReplfsError, printable

_SHOWN: Final = 8


def open_disk(
    path: Path,
    disk_format: str | None,
    allow_backing: Sequence[Path] = (),
    cache: Cache | None = None,
    storage: Storage | None = None,
) -> Raw | Image:
    """Open a disk for reading and writing, lock it, and what it names. ``disk_format`` None: raw, if it does not look like qcow2.

    ``allow_backing``: files and directories (without symbolic links) beyond the disk's own that its image may name. ``cache`` and
    ``storage``: of the volume, their own unless given. Closing the node closes all. Raises ReplfsError if the disk cannot be used,
    InUse if another process has it.
    """
    shown = printable(str(path))
    try:
        kind = path.stat().st_mode
        if not (stat.S_ISREG(kind) or stat.S_ISBLK(kind)):
            what = "a directory" if stat.S_ISDIR(kind) else "neither a file nor a block device"
            raise ReplfsError(f"{shown} is {what}: name a disk image or a block device", errno.EINVAL)
        storage = storage or Storage()
        file = storage.open(str(path), writable=True)
    except OSError as error:
        raise ReplfsError(f"cannot open the disk {shown}: {error.strerror}", error.errno or errno.EIO) from error
    try:
        if file.length() == 0:
            raise ReplfsError(f"the disk {shown} is empty: make one first, for example with truncate -s 10G", errno.EINVAL)
        if disk_format == "qcow2":
            image = Chain(storage, file, allow_backing, cache or Cache()).open()
            if image.size == 0:
                image.release()
                raise ReplfsError(f"the disk {shown} has a size of 0: make it larger with qemu-img resize", errno.EINVAL)
            return image
        if disk_format is None and file.read_now(0, len(MAGIC)) == MAGIC:
            raise ReplfsError(
                f"{shown} looks like a qcow2 image: say --format qcow2, or --format raw if its bytes are the disk's own",
                errno.EINVAL,
            )
        return Raw(file)
    except OSError as error:
        file.close()
        raise ReplfsError(f"cannot read the disk {shown}: {error.strerror or error}", error.errno or errno.EIO) from error
    except ReplfsError:
        file.close()
        raise


def describe(node: Raw | ReadOnlyImage) -> dict[str, Any]:
    """One file of a volume, for the status; ``allocated`` in bytes."""
    found: dict[str, Any] = {"path": node.file.path, "format": node.format, "allocated": node.file.allocated_bytes()}
    if isinstance(node, ReadOnlyImage):
        if node.data is not node.file:
            found["data-file"] = {"path": node.data.path, "allocated": node.data.allocated_bytes()}
        if node.damage:
            found["corrupt"] = node.damage
    return found


def describe_chain(disk: Raw | ReadOnlyImage) -> dict[str, Any]:
    """The backing files of a disk for the status, from the nearest on; of a long chain how many more there are.

    The status is an extended attribute, which can have 64 KiB.
    """
    found: list[dict[str, Any]] = []
    more = 0
    while isinstance(disk, ReadOnlyImage) and disk.backing is not None:
        disk = disk.backing
        if len(found) < _SHOWN:
            found.append(describe(disk))
        else:
            more += 1
    return {"backing": found, "more-backing": more}


def resolve(path: str) -> Path:
    """An absolute path without symbolic links, whether or not it exists."""
    return Path(os.path.realpath(path))
