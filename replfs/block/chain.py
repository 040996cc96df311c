"""Opening an image with everything that it names: backing files, and theirs, and an external data file.

An image must not be able to name any file of the host. What it names is opened only from the disk's own directory (not below it,
and no hidden file), and from where the user has allowed; what a name leads to is looked at after all links, on an open
descriptor, so nothing can be put in its place in between. Backing files are opened for reading only.
"""

import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from replfs.block.cache import Cache
from replfs.block.file import File
from replfs.block.image_locks import lock
from replfs.block.qcow2.header import LARGEST_CLUSTER, Header
from replfs.block.qcow2.image import Image
from replfs.block.qcow2.reading import ReadOnlyImage
from replfs.block.raw import Raw
from replfs.block.storage import Storage
from replfs.errors import ReplfsError, printable

_DEPTH_LIMIT: Final = 200


class Chain:
    """Opens one disk's files. ``allowed``: files and directories beyond the disk's own directory, without symbolic links."""

    def __init__(self, storage: Storage, file: File, allowed: Sequence[Path], cache: Cache) -> None:
        """``file`` is the disk's, open for writing. A block device has no directory of its own."""
        self._allowed = [str(path) for path in allowed]
        self._own = os.path.dirname(os.path.realpath(file.path)) if not file.fixed else None
        self._cache = cache
        self._storage = storage
        self._files = [file]

    def open(self) -> Image:
        """The disk's image over its backing files. Raises ReplfsError or OSError; then all is closed but the disk's own file."""
        try:
            return self._image(self._files[0])
        except BaseException:
            for file in self._files[1:]:
                file.close()
            raise

    def _image(self, top: File) -> Image:
        links: list[tuple[File, Header, File | None]] = []
        file, backing = top, None
        while True:
            header = Header.parse(file.read_now(0, LARGEST_CLUSTER), file.length(), file.path)
            data = self._named(file, header.data_file, "external data file", not links) if header.data_file else None
            links.append((file, header, data))
            if not header.backing_file:
                break
            if len(links) > _DEPTH_LIMIT:
                raise ReplfsError(f"{printable(top.path)}: its chain of backing files is longer than {_DEPTH_LIMIT}", errno.ELOOP)
            if not header.backing_format:
                raise ReplfsError(
                    f"{printable(file.path)}: it does not say of what format its backing file is: if it is qcow2, say so with"
                    f" qemu-img rebase -u -F qcow2 -b {printable(header.backing_file)} {printable(file.path)}",
                    errno.EINVAL,
                )
            if header.backing_format not in ("raw", "qcow2"):
                raise ReplfsError(
                    f"{printable(file.path)}: its backing file is of the format {printable(header.backing_format)!r}; raw and"
                    " qcow2 can be used: copy it to one of them with qemu-img convert, and name that with qemu-img rebase -u",
                    errno.EOPNOTSUPP,
                )
            file = self._named(file, header.backing_file, "backing file", False)
            if header.backing_format == "raw":
                backing = Raw(file)
                break
        node: ReadOnlyImage | Raw | None = backing
        for file, header, data in reversed(links[1:]):
            node = ReadOnlyImage(file, header, node, self._cache, data=data, owns_backing=True)
        file, header, data = links[0]
        return Image(file, header, node, self._cache, data=data, owns_backing=True)

    def _named(self, image: File, name: str, what: str, writable: bool) -> File:
        """Open the file that an image names as its ``what``. Raises ReplfsError."""
        shown = f"{printable(image.path)}: its {what} {printable(name)}"
        plain = name.removeprefix("file:")
        if ":" in plain.split("/")[0] or not plain or "\0" in plain:
            raise ReplfsError(
                f"{shown} is not a plain file name, and only those can be used: name the file itself with qemu-img rebase -u",
                errno.EOPNOTSUPP,
            )
        path = os.path.join(os.path.dirname(image.path), plain)
        try:
            probe = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError as error:
            raise ReplfsError(f"{shown} cannot be opened: {error.strerror}", error.errno or errno.EIO) from error
        try:
            return self._open(probe, path, shown, writable)
        except OSError as error:
            raise ReplfsError(f"{shown} cannot be opened: {error.strerror}", error.errno or errno.EIO) from error
        finally:
            os.close(probe)

    def _open(self, probe: int, path: str, shown: str, writable: bool) -> File:
        real = os.readlink(f"/proc/self/fd/{probe}")
        info = os.fstat(probe)
        if not self._may_open(real, stat.S_ISBLK(info.st_mode)):
            raise ReplfsError(
                f"{shown} is {printable(real)}, which is not in the disk's own directory, or hidden: if the image may use it, say"
                f" --allow-backing {printable(real)}",
                errno.EPERM,
            )
        if not (stat.S_ISREG(info.st_mode) or stat.S_ISBLK(info.st_mode)):
            raise ReplfsError(f"{shown} is neither a file nor a block device", errno.EINVAL)
        for file in self._files:
            if os.path.samestat(info, os.fstat(file.fd)):
                raise ReplfsError(f"{shown} is part of the same chain already: the chain is a loop", errno.ELOOP)
        fd = os.open(f"/proc/self/fd/{probe}", (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NOCTTY)
        try:
            lock(fd, shown, writable=writable)
        except BaseException:
            os.close(fd)
            raise
        file = self._storage.adopt(fd, path)
        self._files.append(file)
        return file

    def _may_open(self, real: str, device: bool) -> bool:
        if real in self._allowed:
            return True
        if device:
            return False
        folder, name = os.path.split(real)
        return (folder == self._own and not name.startswith(".")) or any(
            real.startswith(place.rstrip("/") + "/") for place in self._allowed
        )
