"""The host's files, for all that replfs keeps in them: what it opens, makes, renames and deletes goes through here.

One :class:`Storage` belongs to a volume. It counts what fails, by file and kind, and hands out :class:`~replfs.block.file.File`
objects; whatever else stands in for the host's storage (one that records, loses, tears or refuses, in the tests) needs no more than
to be another Storage with other files.

That a file was made, replaced or deleted is on stable storage when a :meth:`Storage.sync_directory` that begins afterwards returns.
"""

import logging
import os
import time
from collections import Counter
from collections.abc import Callable
from typing import Final

from replfs.block.file import File
from replfs.block.image_locks import lock
from replfs.errors import printable

logger = logging.getLogger(__name__)

_QUIET_SECONDS: Final = 30.0
"""For so long after an error is logged, others of its file and kind are only counted."""


class IoErrors:
    """I/O errors by file and kind: counted, and logged now and then."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()
        self.on_failed_sync: Callable[[str], None] = lambda path: None
        """Called with the path of a file whose content may not be what was written to it."""
        self._logged: dict[tuple[str, str], tuple[float, int]] = {}  # when, and the count then

    def note(self, path: str, kind: str, error: OSError) -> None:
        """An operation on a file has failed. ``kind``: read, write, discard, sync, and full for one that found no room."""
        key = path, kind
        self._counts[key] += 1
        if kind == "sync":
            self.on_failed_sync(path)
        now = time.monotonic()
        since, count = self._logged.get(key, (-_QUIET_SECONDS, 0))
        if now - since >= _QUIET_SECONDS:
            self._logged[key] = now, self._counts[key]
            more = self._counts[key] - count - 1
            suffix = f" ({more} more like this since the last line)" if more else ""
            logger.error("%s: %s failed: %s%s", printable(path), _WHAT[kind], error.strerror, suffix)

    def counts(self) -> dict[str, dict[str, int]]:
        """How many there were, by path and kind."""
        found: dict[str, dict[str, int]] = {}
        for (path, kind), count in sorted(self._counts.items()):
            found.setdefault(path, {})[kind] = count
        return found


_WHAT: Final = {
    "read": "a read",
    "write": "a write",
    "discard": "giving room back",
    "sync": "putting what was written on stable storage",
    "full": "a write that needs room",
}


class Storage:
    def __init__(self) -> None:
        self.errors = IoErrors()

    def adopt(self, fd: int, path: str) -> File:
        """A file that is open already; it is the File's to close from now on."""
        return File(fd, path, self.errors.note)

    def open(self, path: str, *, writable: bool) -> File:
        """Open and lock an image or a disk. Raises OSError, InUse, ReplfsError."""
        fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NOCTTY)
        try:
            lock(fd, path, writable=writable)
        except BaseException:
            os.close(fd)
            raise
        return self.adopt(fd, path)

    def create(self, path: str) -> File:
        """Make a new file (0600), which is not locked. Raises OSError, also if there is one of that name."""
        return self.adopt(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), path)

    def open_own(self, path: str) -> File:
        """Open a file in a directory that is locked, so that it needs no lock, or make it (0600). Raises OSError."""
        return self.adopt(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600), path)

    def make_directory(self, path: str) -> None:
        """Make a directory (0700). Raises OSError, also if there is one of that name."""
        os.mkdir(path, 0o700)

    def replace(self, source: str, target: str) -> None:
        """Give a file another's name, in one step. Raises OSError."""
        os.replace(source, target)

    def unlink(self, path: str) -> None:
        os.unlink(path)

    def sync_directory(self, path: str) -> None:
        """Put the names in a directory on stable storage. Raises OSError."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
