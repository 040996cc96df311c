"""A host's storage that keeps a record of all that is done to it, and that can refuse, run full, lie and lose its power.

It takes the place of :class:`replfs.block.storage.Storage`, with real files underneath. One :class:`Log` says what was done, in
order, to which file; a file is known by its inode, whatever it is called by then. :mod:`crash` works out from the log what a power
cut may leave. Nothing is really synced: a sync is an event, no more.

``root`` is the directory that all recorded files are in, or below.
"""

import errno
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import trio

from replfs.block.file import File
from replfs.block.node import Data
from replfs.block.storage import Storage

PAGE: Final = 4096
SECTOR: Final = 512
ALWAYS: Final = 1 << 60

_PUNCH_HOLE: Final = 2  # fallocate(2)
_KINDS: Final = {  # what the volume counts an operation's failure as
    "read": "read",
    "write": "write",
    "durable": "write",
    "truncate": "write",
    "reserve": "write",
}


class Killed(BaseException):
    """The process is not there any more."""


# What happens to the files. ``file`` is a number that stands for an inode, ``folder`` a directory's path.


class Write(NamedTuple):
    file: int
    offset: int
    data: bytes
    durable: bool = False


class Zero(NamedTuple):
    """A hole that was punched, or a range that was zeroed."""

    file: int
    offset: int
    length: int


class Length(NamedTuple):
    """It is cut off, or grows: ``at_least`` only that."""

    file: int
    length: int
    at_least: bool = False


class SyncBegin(NamedTuple):
    file: int


class SyncEnd(NamedTuple):
    """``begin``: the number of the event that it began with. ``ok`` False: it failed."""

    file: int
    begin: int
    ok: bool = True


class Create(NamedTuple):
    folder: str
    name: str
    file: int


class MakeDirectory(NamedTuple):
    folder: str
    name: str


class Replace(NamedTuple):
    folder: str
    source: str
    target: str


class Unlink(NamedTuple):
    folder: str
    name: str


class DirectorySyncBegin(NamedTuple):
    folder: str


class DirectorySyncEnd(NamedTuple):
    folder: str
    begin: int


class Mark(NamedTuple):
    """What the one who drives the volume says: a method of the model (see :class:`crash.Model`), and its arguments."""

    method: str
    arguments: tuple[Any, ...] = ()


Event = (
    Write
    | Zero
    | Length
    | SyncBegin
    | SyncEnd
    | Create
    | MakeDirectory
    | Replace
    | Unlink
    | DirectorySyncBegin
    | DirectorySyncEnd
    | Mark
)


class Log:
    """All events, in order. An operation is done and noted in one step, whichever thread it is in: ``lock`` is held over both."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.lock = threading.RLock()
        self.paths: dict[int, str] = {}
        """What a file was called first, for messages."""

    def add(self, event: Event) -> int:
        with self.lock:
            self.events.append(event)
            return len(self.events) - 1

    def mark(self, method: str, *arguments: Any) -> None:
        self.add(Mark(method, arguments))


@dataclass
class Fault:
    """Operations that fail: those whose kind and path the patterns are found in, ``times`` of them after the first ``after``.

    Kinds: read, write, durable, truncate, reserve, fallocate, sync, create, open, replace, unlink, directory (its sync).
    """

    kind: str = ""
    path: str = ""
    error: int = errno.EIO
    after: int = 0
    times: int = 1
    torn: bool = False
    """A write that fails is done in part."""
    seen: int = 0
    hit: list[tuple[str, str]] = field(default_factory=list)
    """What it made fail: kinds and paths."""

    def hits(self, kind: str, path: str) -> bool:
        if not (re.search(self.kind, kind) and re.search(self.path, path)):
            return False
        self.seen += 1
        found = self.after < self.seen <= self.after + self.times
        if found:
            self.hit.append((kind, path))
        return found


@dataclass
class Lie:
    """Syncs that report success and do nothing. ``kind``: sync, durable, directory. ``which`` of a file's, from 0; None: all."""

    kind: str
    path: str
    which: int | None = None
    told: Counter[int | str] = field(default_factory=Counter)

    def is_told(self, kind: str, path: str, file: int | str) -> bool:
        if kind != self.kind or not re.search(self.path, path):
            return False
        self.told[file] += 1
        return self.which is None or self.told[file] == self.which + 1


class Inodes(dict[tuple[int, int], int]):
    """The numbers of files, by (device, inode)."""

    def __init__(self) -> None:
        super().__init__()
        self._count = 0

    def note_new(self, info: os.stat_result) -> int:
        """A file that was just made: the inode may have been another's before."""
        self._count += 1
        self[info.st_dev, info.st_ino] = self._count
        return self._count


class FaultyStorage(Storage):
    """``known``: the files that are there already; it is kept up to date."""

    def __init__(self, root: str, log: Log, known: Inodes) -> None:
        super().__init__()
        self.root = os.path.realpath(root)
        self.log = log
        self.known = known
        self.folders = {folder for folder, _, _ in os.walk(self.root)}
        """Directories whose making is recorded, or was before the record began."""
        self.faults: list[Fault] = []
        self.lies: list[Lie] = []
        self.operations: Counter[str] = Counter()
        """How many there were, by kind; those that failed too."""
        self.failed = 0
        """How many a fault has hit."""
        self.killed_at: int | None = None
        """The process is killed when so many events have been recorded: what it has written is there, and no more."""
        self.killed_by_replacing = ""
        """The process is killed when it has put a file in the place of one of this name: right after that."""
        self.room: int | None = None
        """Bytes that can still be allocated; None: there is no end to them."""
        self.turns = 0
        """How many turns the other tasks get while a file is synced."""
        self.at_once = ""
        """Files that lose nothing: a pattern; what is written to them is on stable storage at once."""
        self.directories_at_once = False
        """A directory that is made is there after a power cut, without a sync of its parent."""
        self.opened: set[FaultyFile] = set()
        self._allocated: dict[int, set[int]] = {}  # pages, by file
        self._making = threading.local()  # the path of the file that this thread is making

    # Faults

    def check(self, kind: str, path: str) -> None:
        """Before an operation is done. Raises Killed, or the OSError that a fault asks for."""
        if self.killed_at is not None and len(self.log.events) >= self.killed_at:
            raise Killed
        self.operations[kind] += 1
        for fault in self.faults:
            if fault.hits(kind, path):
                self.failed += 1
                raise OSError(fault.error, os.strerror(fault.error), path)

    def lied(self, kind: str, path: str, file: int | str) -> bool:
        told = [lie.is_told(kind, path, file) for lie in self.lies]  # each of them counts
        return any(told)

    def tears(self, kind: str, path: str) -> bool:
        return any(fault.torn and re.search(fault.kind, kind) and re.search(fault.path, path) for fault in self.faults)

    def take_room(self, file: int, offset: int, length: int) -> int:
        """Give a range of a file its pages. Gives back how many bytes of it there was room for."""
        if self.room is None:
            return length
        pages = self._allocated.setdefault(file, set())
        for page in range(offset // PAGE, (offset + length + PAGE - 1) // PAGE):
            if page not in pages:
                if self.room < PAGE:
                    return max(page * PAGE - offset, 0)
                self.room -= PAGE
                pages.add(page)
        return length

    def give_room(self, file: int, offset: int, length: int) -> None:
        pages = self._allocated.get(file)
        if self.room is not None and pages:
            gone = {page for page in pages if offset <= page * PAGE and (page + 1) * PAGE <= offset + length}
            pages -= gone
            self.room += len(gone) * PAGE

    def limit_room(self, room: int) -> None:
        """From now on there is room for so many bytes more than what is there already."""
        for folder, _, names in os.walk(self.root):
            for path in (os.path.join(folder, name) for name in names):
                info = os.lstat(path)
                number = self.known.get((info.st_dev, info.st_ino))
                if number is not None:
                    self._allocated[number] = set(_pages_of(path))
        self.room = room

    # The interface

    def adopt(self, fd: int, path: str) -> File:
        if getattr(self._making, "path", None) == path:
            self._made(path)
        file = FaultyFile(self, fd, path)
        self.opened.add(file)
        return file

    def abandon(self) -> None:
        """Close all files, as the end of the process does."""
        for file in list(self.opened):
            file.close()

    def number_of(self, fd: int, path: str) -> int:
        info = os.fstat(fd)
        number = self.known.get((info.st_dev, info.st_ino))
        if number is None:
            raise AssertionError(f"{path} was not there when the record began, and was not made through the storage")
        return number

    def open(self, path: str, *, writable: bool) -> File:
        self.check("open", path)
        return super().open(path, writable=writable)

    def _made(self, path: str) -> None:
        folder, name = self._place(path)
        number = self.known.note_new(os.lstat(path))
        self.log.paths[number] = os.path.relpath(path, self.root)
        self.log.add(Create(folder, name, number))

    def _place(self, path: str) -> tuple[str, str]:
        folder, name = os.path.split(path)
        folder = os.path.realpath(folder)
        self._note_folder(folder)
        return folder, name

    def _note_folder(self, folder: str) -> None:
        """A directory that is new, whoever has made it."""
        if folder not in self.folders:
            self.folders.add(folder)
            parent, made = os.path.split(folder)
            self.log.add(MakeDirectory(parent, made))
            if self.directories_at_once:
                self.log.add(DirectorySyncEnd(parent, self.log.add(DirectorySyncBegin(parent))))

    def make_directory(self, path: str) -> None:
        with self.log.lock:
            self.check("create", path)
            super().make_directory(path)
            self.folders.discard(os.path.realpath(path))
            self._note_folder(os.path.realpath(path))

    def create(self, path: str) -> File:
        return self._opened(path, super().create, False)

    def open_own(self, path: str) -> File:
        return self._opened(path, super().open_own, os.path.lexists(path))

    def _opened(self, path: str, call: Callable[[str], File], there: bool) -> File:
        with self.log.lock:
            self.check("open" if there else "create", path)
            self._making.path = None if there else path
            try:
                return call(path)
            finally:
                self._making.path = None

    def replace(self, source: str, target: str) -> None:
        with self.log.lock:
            self.check("replace", target)
            super().replace(source, target)
            folder, name = self._place(source)
            assert self._place(target)[0] == folder
            self.log.add(Replace(folder, name, os.path.basename(target)))
            if os.path.basename(target) == self.killed_by_replacing:
                self.killed_by_replacing = ""
                self.killed_at = 0

    def unlink(self, path: str) -> None:
        with self.log.lock:
            self.check("unlink", path)
            with suppress(FileNotFoundError):
                info = os.lstat(path)
                number = self.known.get((info.st_dev, info.st_ino))
                if number is not None and info.st_nlink == 1:
                    self.give_room(number, 0, ALWAYS)
            super().unlink(path)
            self.log.add(Unlink(*self._place(path)))

    def sync_directory(self, path: str) -> None:
        folder = os.path.realpath(path)
        with self.log.lock:
            self.check("directory", path)
            begin = self.log.add(DirectorySyncBegin(folder))
        if not self.lied("directory", path, folder):
            self.log.add(DirectorySyncEnd(folder, begin))


def _pages_of(path: str) -> Iterator[int]:
    """Where a file has data."""
    with open(path, "rb") as file, suppress(OSError):
        position = 0
        while True:
            position = os.lseek(file.fileno(), position, os.SEEK_DATA)
            end = os.lseek(file.fileno(), position, os.SEEK_HOLE)
            yield from range(position // PAGE, -(-end // PAGE))
            position = end


class FaultyFile(File):
    def __init__(self, storage: FaultyStorage, fd: int, path: str) -> None:
        super().__init__(fd, path, storage.errors.note)
        self._storage = storage
        self._log = storage.log
        self.number = storage.number_of(fd, path)

    @contextmanager
    def _step(self, kind: str) -> Iterator[None]:
        """One operation that changes the file, and its note in the log."""
        with self._log.lock:
            try:
                self._storage.check(kind, self.path)
            except OSError as error:
                raise self._failed(_KINDS[kind], error) from None
            yield

    def _full(self) -> OSError:
        self._storage.failed += 1
        return self._failed("write", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))

    def _at_once(self) -> bool:
        return bool(self._storage.at_once and re.search(self._storage.at_once, self.path))

    def read_now(self, offset: int, length: int) -> bytes:
        with self._step("read"):
            return super().read_now(offset, length)

    def read_cached(self, offset: int, buffer: memoryview) -> bool:
        with self._step("read"):
            pass
        return super().read_cached(offset, buffer)

    def _write(self, kind: str, offset: int, data: Data, durable: bool) -> None:
        data = bytes(data)
        torn = self._storage.tears(kind, self.path)
        try:
            with self._step(kind):
                fits = self._storage.take_room(self.number, offset, len(data))
                if fits < len(data):
                    torn = fits > 0
                    data = data[:fits]
                    raise self._full()
                super().write_durably(offset, data) if kind == "durable" else super().write(offset, data)
                self._log.add(Write(self.number, offset, data, durable))
        except OSError:
            if torn:
                middle = (offset + len(data) // 2) // SECTOR * SECTOR  # sectors are never torn
                data = data[: max(middle - offset, 0)]
                super().write(offset, data)
                self._log.add(Write(self.number, offset, data))
            raise

    def write(self, offset: int, data: Data) -> None:
        self._write("write", offset, data, self._at_once())

    def _copy_inside(self, file: File, position: int, offset: int, length: int) -> int:
        return 0  # but by a read and a write, which are recorded

    def write_durably(self, offset: int, data: Data) -> None:
        self._write("durable", offset, data, not self._storage.lied("durable", self.path, self.number))

    def truncate(self, length: int) -> None:
        with self._step("truncate"):
            super().truncate(length)
            self._log.add(Length(self.number, length))
            self._settle()

    def reserve(self, length: int) -> None:
        with self._step("reserve"):
            if self._storage.take_room(self.number, 0, length) < length:
                raise self._full()
            super().reserve(length)
            self._log.add(Length(self.number, length, at_least=True))
            self._settle()

    def _fallocate(self, mode: int, offset: int, length: int) -> None:
        with self._log.lock:
            self._storage.check("fallocate", self.path)
            super()._fallocate(mode, offset, length)
            if mode & _PUNCH_HOLE:
                self._storage.give_room(self.number, offset, length)
            self._log.add(Zero(self.number, offset, min(length, max(self.length() - offset, 0))))
            self._settle()

    def _settle(self) -> None:
        if self._at_once():
            self._log.add(SyncEnd(self.number, self._log.add(SyncBegin(self.number))))

    def close(self) -> None:
        super().close()
        self._storage.opened.discard(self)

    def _fdatasync(self) -> None:
        begin = self._log.add(SyncBegin(self.number))
        try:
            self._storage.check("sync", self.path)
        except OSError:
            self._log.add(SyncEnd(self.number, begin, ok=False))
            raise
        for _ in range(self._storage.turns):
            try:
                trio.from_thread.run(trio.lowlevel.checkpoint)
            except RuntimeError:  # in the trio thread itself, or in a thread that trio knows nothing of
                break
        if not self._storage.lied("sync", self.path, self.number):
            self._log.add(SyncEnd(self.number, begin))
