"""Power cuts: what one may leave of recorded files, and whether a volume that comes up from it has kept its promises.

Three parts. :class:`Replay` follows a record (:mod:`faults`) and knows at each event what is on stable storage for certain, and
what may be: any subset of the 512-byte sectors that were not synced, each in any of the versions that it had since, and of the
changes to names. :class:`Model` follows what was asked of the volume and acknowledged, and knows what each sector of the view and
of the disk may hold afterwards. :func:`explore` makes the files what a cut may leave, mounts the volume, and compares.

What a disk is taken to do: sectors are whole; a sync makes what was written before it began durable once it has ended; a durable
write its own range alone; the making, renaming and deleting of names is durable when a sync of the directory that began afterwards
has ended.
"""

import itertools
import os
import random
import shutil
import subprocess
import tempfile
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final, NamedTuple

import trio
from disks import put
from faults import (
    Create,
    DirectorySyncBegin,
    DirectorySyncEnd,
    Event,
    FaultyStorage,
    Inodes,
    Killed,
    Length,
    Log,
    MakeDirectory,
    Mark,
    Replace,
    SyncBegin,
    SyncEnd,
    Unlink,
    Write,
    Zero,
)
from volumes import config

from replfs.block.node import Node
from replfs.block.replication.rules import Mode, Operation, Stage
from replfs.block.tracking import BLOCK
from replfs.errors import ReplfsError
from replfs.protocol.nbd.uri import Target, UnixAddress
from replfs.volume.primary import PrimaryVolume
from replfs.volume.secondary import SecondaryVolume

SECTOR: Final = 512
ZERO: Final = bytes(SECTOR)
PIECE: Final = 32
SMALL: Final = 4096
"""Bytes of a write that is probably one to a table."""

DIRECTORY: Final = -1  # what a name stands for that is no file's
_POOL: Final = ".pool"
_SECONDS: Final = 20
_BEFORE: Final = -1  # in place of a write's number: what was there before


class Violation(AssertionError):
    """A promise was not kept."""


# What the files may hold


class Contents:
    """A file: its length, and the sectors that are not zero."""

    __slots__ = ("length", "sectors")

    def __init__(self, sectors: dict[int, bytes], length: int) -> None:
        self.sectors = sectors
        self.length = length

    @classmethod
    def of(cls, path: str) -> "Contents":
        data = Path(path).read_bytes()
        found = {at // SECTOR: data[at : at + SECTOR].ljust(SECTOR, b"\0") for at in range(0, len(data), SECTOR)}
        return cls({sector: content for sector, content in found.items() if content != ZERO}, len(data))

    def copy(self) -> "Contents":
        return Contents(dict(self.sectors), self.length)

    def apply(self, event: Write | Zero | Length) -> list[tuple[int, bytes]]:
        """Change it as the event says; gives the sectors that this concerns, as they are then."""
        if isinstance(event, Length):
            return self._resize(max(self.length, event.length) if event.at_least else event.length)
        changed = self._pieces(event.offset, event.data if isinstance(event, Write) else bytes(event.length))
        for sector, content in changed:
            self._put(sector, content)
        if isinstance(event, Write):
            self.length = max(self.length, event.offset + len(event.data))
        return changed

    def _pieces(self, offset: int, data: bytes) -> list[tuple[int, bytes]]:
        found = []
        stop = offset + len(data)
        for sector in range(offset // SECTOR, -(-stop // SECTOR)):
            low = sector * SECTOR
            first, last = max(offset, low), min(stop, low + SECTOR)
            content = data[first - offset : last - offset]
            if len(content) != SECTOR:
                old = self.sectors.get(sector, ZERO)
                content = old[: first - low] + content + old[last - low :]
            found.append((sector, content))
        return found

    def _resize(self, length: int) -> list[tuple[int, bytes]]:
        gone: list[tuple[int, bytes]] = []
        if length < self.length:
            gone = [(sector, ZERO) for sector in self.sectors if sector * SECTOR >= length]
            if length % SECTOR and length // SECTOR in self.sectors:
                gone.append((length // SECTOR, self.sectors[length // SECTOR][: length % SECTOR].ljust(SECTOR, b"\0")))
            for sector, content in gone:
                self._put(sector, content)
        self.length = length
        return gone

    def _put(self, sector: int, content: bytes) -> None:
        if content == ZERO:
            self.sectors.pop(sector, None)
        else:
            self.sectors[sector] = content


class Version(NamedTuple):
    """What a sector was made at an event, by a change of ``size`` bytes."""

    event: int
    content: bytes
    size: int
    digest: int


def digest_of(sector: int, content: bytes) -> int:
    """Digests of sectors are added up to that of a file."""
    return int.from_bytes(blake2b(content, digest_size=16, key=sector.to_bytes(8)).digest()) if content != ZERO else 0


class Choice(NamedTuple):
    """Which version of a sector is there after the cut, None for the durable one; and which of the lengths of a file."""

    version: Callable[[list[Version]], Version | None]
    length: Callable[[list[tuple[int, int]]], int | None]


class FileHistory:
    """What is durable of a file, and what was changed since."""

    def __init__(self, contents: Contents) -> None:
        self.current = contents.copy()
        self.durable = contents.copy()
        self.pending: dict[int, list[Version]] = {}
        self.lengths: list[tuple[int, int]] = []  # event, length
        self._doomed: set[int] = set()  # events that no sync makes durable any more: one has failed for them
        self._digests = {sector: digest_of(sector, content) for sector, content in contents.sectors.items()}
        self._digest = sum(self._digests.values())

    def change(self, number: int, event: Write | Zero | Length) -> None:
        before = self.current.length
        size = len(event.data) if isinstance(event, Write) else 0
        for sector, content in self.current.apply(event):
            versions = self.pending.get(sector)
            if not self._doomed and content == (versions[-1].content if versions else self.durable.sectors.get(sector, ZERO)):
                continue  # what is there anyway
            version = Version(number, content, size, digest_of(sector, content))
            self.pending.setdefault(sector, []).append(version)
        if self.current.length != before:
            self.lengths.append((number, self.current.length))
        if isinstance(event, Write) and event.durable:
            for sector in range(event.offset // SECTOR, -(-(event.offset + size) // SECTOR)):
                for version in self.pending.pop(sector, [])[-1:]:
                    self._settle(sector, version)
            if event.offset + size > self.durable.length:  # a file has one length: that of now
                self.durable.length = self.current.length
                self.lengths.clear()

    def _settle(self, sector: int, version: Version) -> None:
        self._digest += version.digest - self._digests.pop(sector, 0)
        if version.digest:
            self._digests[sector] = version.digest
            self.durable.sectors[sector] = version.content
        else:
            self.durable.sectors.pop(sector, None)

    def synced(self, begin: int, ok: bool) -> None:
        if not ok:
            self._doomed.update(version.event for versions in self.pending.values() for version in versions)
            return
        for sector, versions in list(self.pending.items()):
            covered = [version for version in versions if version.event < begin]
            if covered and covered[-1].event not in self._doomed:
                self._settle(sector, covered[-1])
                if len(covered) == len(versions):
                    del self.pending[sector]
                else:
                    self.pending[sector] = versions[len(covered) :]
        lengths = [entry for entry in self.lengths if entry[0] < begin]
        if lengths:
            self.durable.length = lengths[-1][1]
            self.lengths = self.lengths[len(lengths) :]

    def choose(self, choice: Choice) -> tuple[Contents, int]:
        """What the file holds after the cut, and its digest."""
        found, total = self.durable.copy(), self._digest
        for sector, versions in self.pending.items():
            version = choice.version(versions)
            if version is not None:
                found._put(sector, version.content)
                total += version.digest - self._digests.get(sector, 0)
        length = choice.length(self.lengths)
        if length is not None:
            found.length = length
        last = found.length // SECTOR
        if any(found.sectors.get(last, ZERO)[found.length % SECTOR :]):
            # What is there of a sector is there as a whole: the length that made it so is, too.
            found.length = next((longer for _, longer in self.lengths if longer >= (last + 1) * SECTOR), self.current.length)
        for sector in [sector for sector in found.sectors if (sector + 1) * SECTOR > found.length]:
            content = found.sectors[sector]
            kept = content[: max(found.length - sector * SECTOR, 0)].ljust(SECTOR, b"\0")
            if kept != content:
                found._put(sector, kept)
                total += digest_of(sector, kept) - digest_of(sector, content)
        return found, total

    @property
    def events(self) -> list[int]:
        return sorted({version.event for versions in self.pending.values() for version in versions})


def apply_to_names(names: dict[str, int], event: Event) -> None:
    match event:
        case Create(_, name, file):
            names[name] = file
        case MakeDirectory(_, name):
            names[name] = DIRECTORY
        case Replace(_, source, target):
            names[target] = names.pop(source)
        case Unlink(_, name):
            del names[name]


def touched(event: Event) -> set[str]:
    return {event.source, event.target} if isinstance(event, Replace) else {event.name}  # type: ignore[union-attr]


class FolderHistory:
    """What is durable of a directory's names, and the changes since."""

    def __init__(self, names: dict[str, int]) -> None:
        self.durable = dict(names)
        self.pending: list[tuple[int, Event]] = []

    def synced(self, begin: int) -> None:
        while self.pending and self.pending[0][0] < begin:
            apply_to_names(self.durable, self.pending.pop(0)[1])

    def choose(self, kept: list[Event]) -> dict[str, int]:
        names = dict(self.durable)
        for event in kept:
            apply_to_names(names, event)
        return names


class Names(NamedTuple):
    """Which changes to names are there after the cut."""

    kept: Callable[[list[Event]], list[Event]]


class State(NamedTuple):
    """What a power cut leaves: the names in each directory, and the files that they stand for. ``key`` is the same for the same."""

    names: dict[str, dict[str, int]]
    files: dict[int, Contents]
    key: int


class Snapshot(NamedTuple):
    """As a State: where a record begins."""

    names: dict[str, dict[str, int]]
    files: dict[int, Contents]


class Replay:
    """The files at one event of a record."""

    def __init__(self, start: Snapshot) -> None:
        self.files = {number: FileHistory(contents) for number, contents in start.files.items()}
        self.folders = {folder: FolderHistory(names) for folder, names in start.names.items()}

    def step(self, number: int, event: Event) -> None:
        match event:
            case Write(file) | Zero(file) | Length(file):
                self.files[file].change(number, event)
            case SyncEnd(file, begin, ok):
                self.files[file].synced(begin, ok)
            case Create(folder):
                self.files[event.file] = FileHistory(Contents({}, 0))
                self.folders[folder].pending.append((number, event))
            case MakeDirectory(folder, name):
                self.folders[os.path.join(folder, name)] = FolderHistory({})
                self.folders[folder].pending.append((number, event))
            case Replace(folder) | Unlink(folder):
                self.folders[folder].pending.append((number, event))
            case DirectorySyncEnd(folder, begin):
                self.folders[folder].synced(begin)
            case SyncBegin() | DirectorySyncBegin() | Mark():
                pass

    def state(self, kept: Callable[[list[Event]], list[Event]], choice: Callable[[int], Choice]) -> State:
        names: dict[str, dict[str, int]] = {}
        files: dict[int, Contents] = {}
        key: list[tuple[str | int, ...]] = []
        for folder in sorted(self.folders, key=len):
            parent, name = os.path.split(folder)
            if parent in self.folders and name not in names.get(parent, ()):
                continue  # the directory itself is lost
            history = self.folders[folder]
            names[folder] = history.choose(kept([event for _, event in history.pending]))
            for name, file in sorted(names[folder].items()):
                if file == DIRECTORY:
                    key.append((folder, name))
                else:
                    files[file], digest = self.files[file].choose(choice(file))
                    key.append((folder, name, digest, files[file].length))
        return State(names, files, int.from_bytes(blake2b(repr(key).encode(), digest_size=16).digest()))

    # The variants of a cut

    def variants(self, seed: str, most: int) -> Iterator[tuple[str, State]]:
        """Different choices, by name: the extremes, what an order of writes that is not kept does, and then any, by chance."""
        unsynced = [file for file, history in self.files.items() if history.pending or history.lengths]
        names = any(history.pending for history in self.folders.values())
        chosen = ["nothing", "everything"] if unsynced or names else ["nothing"]
        if unsynced:
            chance = random.Random(f"{seed} variants")
            more = ["small writes", "large writes", *(f"{what} file {file}" for file in unsynced for what in ("only", "all but"))]
            events = [(file, event) for file in unsynced for event in self.files[file].events]
            for file, event in chance.sample(events, min(len(events), max(most // 2, 2))):
                more.append(f"{chance.choice(['all but', 'all but', 'only', 'up to'])} write {event} of {file}")
            chosen += chance.sample(more, min(len(more), max(most * 2 // 3, 2)))
        if unsynced or names:
            chosen += [f"chance {number}" for number in range(max(most - len(chosen), 1))]
        for name in chosen[: max(most, 2)]:
            yield name, self.variant(f"{seed} {name}", name)

    def variant(self, seed: str, name: str) -> State:
        chance = random.Random(seed)
        words = name.split()
        match words:
            case ["nothing"]:
                return self.state(lambda events: [], lambda file: LOST)
            case ["everything"]:
                return self.state(lambda events: events, lambda file: KEPT)
            case ["small", _]:
                return self.state(self._some_names(chance), lambda file: of_size(range(1, SMALL + 1)))
            case ["large", _]:
                return self.state(self._some_names(chance), lambda file: of_size(range(SMALL + 1, 1 << 60)))
            case ["only", "file", number]:
                return self.state(self._some_names(chance), lambda file: KEPT if file == int(number) else LOST)
            case ["all", "but", "file", number]:
                return self.state(self._some_names(chance), lambda file: LOST if file == int(number) else KEPT)
            case ["all", "but", "write", event, "of", _]:
                return self.state(self._some_names(chance), lambda file: without(int(event)))
            case ["only", "write", event, "of", _]:
                return self.state(self._some_names(chance), lambda file: with_only(int(event)))
            case ["up", "to", "write", event, "of", _]:
                return self.state(self._some_names(chance), lambda file: up_to(int(event)))
        likely = chance.choice((0.05, 0.3, 0.5, 0.7, 0.95))
        by_file: dict[int, Choice] = {}

        def choose(file: int) -> Choice:
            if file not in by_file:
                mine = chance.choice((likely, likely, likely, 0.0, 1.0))
                by_file[file] = by_chance(random.Random(f"{seed} {file}"), mine)
            return by_file[file]

        return self.state(self._some_names(chance), choose)

    def _some_names(self, chance: random.Random) -> Callable[[list[Event]], list[Event]]:
        """A prefix of the changes, as a journal keeps them, or any subset that has the changes to each name in order."""
        how = chance.choice(("all", "none", "prefix", "subset"))

        def kept(events: list[Event]) -> list[Event]:
            if how == "all" or how == "none":
                return events if how == "all" else []
            if how == "prefix":
                return events[: chance.randint(0, len(events))]
            found: list[Event] = []
            lost: set[str] = set()
            for event in events:
                if lost & touched(event) or chance.random() < 0.4:
                    lost |= touched(event)
                else:
                    found.append(event)
            return found

        return kept


def last_length(lengths: list[tuple[int, int]]) -> int | None:
    return lengths[-1][1] if lengths else None


def longest(lengths: list[tuple[int, int]]) -> int | None:
    return max(length for _, length in lengths) if lengths else None


LOST: Final = Choice(lambda versions: None, lambda lengths: None)
KEPT: Final = Choice(lambda versions: versions[-1], last_length)


def of_size(sizes: range) -> Choice:
    return Choice(lambda versions: next((version for version in versions[::-1] if version.size in sizes), None), last_length)


def without(event: int) -> Choice:
    return Choice(lambda versions: next((version for version in versions[::-1] if version.event != event), None), last_length)


def with_only(event: int) -> Choice:
    return Choice(lambda versions: next((version for version in versions if version.event == event), None), last_length)


def up_to(event: int) -> Choice:
    """What was written later is lost."""
    return Choice(
        lambda versions: next((version for version in versions[::-1] if version.event <= event), None),
        lambda lengths: last_length([entry for entry in lengths if entry[0] <= event]),
    )


def by_chance(chance: random.Random, likely: float) -> Choice:
    def length(lengths: list[tuple[int, int]]) -> int | None:
        return chance.choice(lengths)[1] if lengths and chance.random() < likely else None

    return Choice(
        lambda versions: (versions[-1] if len(versions) == 1 else chance.choice(versions)) if chance.random() < likely else None,
        length,
    )


# Real files


class Scratch:
    """A directory whose files are made what a state says, again and again: only what differs is written.

    Those that are there at first keep their inodes (a volume knows its disk by that).
    """

    def __init__(self, root: Path) -> None:
        self.root = os.path.realpath(root)
        self.known = Inodes()
        self.paths: dict[int, str] = {}
        self._actual: dict[int, Contents] = {}
        self._fds: dict[int, int] = {}
        weakref.finalize(self, _close_all, self._fds)
        self._inodes: dict[int, int] = {}
        os.mkdir(self._pool())

    def _pool(self, *file: int) -> str:
        return os.path.join(self.root, _POOL, *map(str, file))

    def snapshot(self) -> Snapshot:
        """What is there now, by others' hands; it is known from then on."""
        names: dict[str, dict[str, int]] = {}
        files: dict[int, Contents] = {}
        for folder, folders, entries in os.walk(self.root):
            if _POOL in folders:
                folders.remove(_POOL)
            names[folder] = dict.fromkeys(folders, DIRECTORY)
            for name in entries:
                path = os.path.join(folder, name)
                number = self._adopt(path)
                names[folder][name] = number
                files[number] = self._actual[number].copy()
        return Snapshot(names, files)

    def _adopt(self, path: str) -> int:
        info = os.stat(path)
        if (info.st_dev, info.st_ino) not in self.known:
            number = self.known.note_new(info)
            self.paths[number] = os.path.relpath(path, self.root)
            self._actual[number] = Contents.of(path)
            self._fds[number] = os.open(path, os.O_RDWR)
            self._inodes[number] = info.st_ino
            os.link(path, self._pool(number))
        return self.known[info.st_dev, info.st_ino]

    def storage(self, log: Log) -> FaultyStorage:
        log.paths.update(self.paths)
        return FaultyStorage(self.root, log, self.known)

    def changed_by(self, log: Log) -> None:
        """What a volume has done since, by the log that it has written."""
        for event in log.events:
            if isinstance(event, Write | Zero | Length) and event.file in self._actual:
                self._actual[event.file].apply(event)

    def put(self, state: State | Snapshot) -> None:
        for number, contents in state.files.items():
            self._put_file(number, contents)
        for folder in sorted(state.names, key=len):
            self._put_names(folder, state.names[folder])

    def _put_names(self, folder: str, names: dict[str, int]) -> None:
        os.makedirs(folder, exist_ok=True)
        found = {entry.name: entry for entry in os.scandir(folder) if entry.name != _POOL}
        for name, entry in found.items():
            path = os.path.join(folder, name)
            if name not in names:
                shutil.rmtree(path) if entry.is_dir(follow_symlinks=False) else os.unlink(path)
        for name, number in names.items():
            if number != DIRECTORY and (name not in found or found[name].inode() != self._inodes[number]):
                path = os.path.join(folder, name)
                if name in found:
                    os.unlink(path)
                os.link(self._pool(number), path)

    def _put_file(self, number: int, contents: Contents) -> None:
        if number not in self._fds:
            fd = self._fds[number] = os.open(self._pool(number), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            info = os.fstat(fd)
            self._inodes[number] = info.st_ino
            self.known[info.st_dev, info.st_ino] = number
            self._actual[number] = Contents({}, 0)
        fd, actual = self._fds[number], self._actual[number]
        if actual.length != contents.length:
            os.ftruncate(fd, contents.length)
            actual.apply(Length(number, contents.length))
        different = [sector for sector, content in contents.sectors.items() if actual.sectors.get(sector) is not content]
        different += [sector for sector in actual.sectors if sector not in contents.sectors]
        for first, last in runs(sorted(different)):
            data = b"".join([contents.sectors.get(sector, ZERO) for sector in range(first, last)])
            os.pwrite(fd, data[: contents.length - first * SECTOR], first * SECTOR)
        self._actual[number] = contents.copy()

    def forget(self, keep: set[int]) -> None:
        """Files that no state will name any more."""
        for number in [number for number in self._fds if number not in keep]:
            os.close(self._fds.pop(number))
            os.unlink(self._pool(number))
            del self._actual[number], self._inodes[number]

    def numbers(self) -> set[int]:
        return set(self._fds)


def _close_all(fds: dict[int, int]) -> None:
    for fd in fds.values():
        os.close(fd)


def runs(sectors: list[int]) -> Iterator[tuple[int, int]]:
    """Neighbours together: (first, last + 1)."""
    start = None
    for position, sector in enumerate(sectors):
        if start is None:
            start = sector
        if position + 1 == len(sectors) or sectors[position + 1] != sector + 1:
            yield start, sector + 1
            start = None


# What the volume may hold


class Entry:
    """One value that a sector may have by a write. One that covers it in part may make it more than one, if an earlier may be lost.

    ``acked``: it is that at least, unless the cut takes it back.
    """

    __slots__ = ("acked", "maybe", "value", "write")

    def __init__(self, value: bytes, write: int, acked: bool, maybe: bool) -> None:
        self.value = value
        self.write = write
        self.acked = acked
        self.maybe = maybe


def acknowledged(entries: list[Entry]) -> int:
    """Where what was acknowledged last begins."""
    last = next(entry.write for entry in reversed(entries) if entry.acked)
    return next(i for i, entry in enumerate(entries) if entry.write == last)


class Versions:
    """What each sector of one disk may hold after a cut: what was flushed last, and all that it was to become since."""

    def __init__(self, content: bytes) -> None:
        self.content = bytearray(content)
        self.lists: dict[int, list[Entry]] = {}  # the first of each is what is durable
        self.writing: dict[int, tuple[int, bytes, list[Entry]]] = {}
        self.written: set[int] = set()
        """Sectors that were written since :meth:`since_acknowledged`."""

    def _entries(self, sector: int) -> list[Entry]:
        low = sector * SECTOR
        return self.lists.setdefault(sector, [Entry(bytes(self.content[low : low + SECTOR]), _BEFORE, True, False)])

    def begin(self, write: int, offset: int, data: bytes, maybe: bool = False) -> None:
        """``maybe``: that it ends does not mean that it was done here."""
        made: list[Entry] = []
        stop = offset + len(data)
        for sector in range(offset // SECTOR, -(-stop // SECTOR)):
            low = sector * SECTOR
            first, last = max(offset, low), min(stop, low + SECTOR)
            part = data[first - offset : last - offset]
            entries = self._entries(sector)
            self.written.add(sector)
            if len(part) == len(entries[0].value):
                values = [part]
            else:
                values = []
                for entry in entries[acknowledged(entries) :]:
                    values.append(entry.value[: first - low] + part + entry.value[last - low :])
            for value in dict.fromkeys(values):
                made.append(Entry(value, write, False, maybe))
                entries.append(made[-1])
        self.writing[write] = offset, data, made

    def end(self, write: int) -> None:
        for entry in self.writing.pop(write, (0, b"", []))[2]:
            entry.acked = not entry.maybe

    def fail(self, write: int) -> None:
        """It was done in part, or not at all."""
        for entry in self.writing.pop(write, (0, b"", []))[2]:
            entry.maybe = True

    def flush_begin(self) -> dict[int, int]:
        """What a flush that begins now is going to cover: by sector, a write."""
        return {sector: entries[acknowledged(entries)].write for sector, entries in self.lists.items()}

    def flush_end(self, covered: dict[int, int]) -> None:
        for sector, write in covered.items():
            entries = self.lists.get(sector, [])
            first = next((i for i, entry in enumerate(entries) if entry.write == write), 0)
            del entries[:first]
            if len(entries) == 1:
                self._settle(sector, entries[0].value)

    def _settle(self, sector: int, value: bytes) -> None:
        self.content[sector * SECTOR : sector * SECTOR + len(value)] = value
        self.lists.pop(sector, None)

    def since_acknowledged(self) -> "Versions":
        """What may be there if all that was acknowledged is."""
        found = Versions(bytes(self.content))
        for sector, entries in self.lists.items():
            first, *rest = entries[acknowledged(entries) :]
            found._settle(sector, first.value)
            if rest:
                found._entries(sector).extend(Entry(entry.value, entry.write, False, True) for entry in rest)
        return found

    def observed(self, got: bytes) -> None:
        """What was read is what there is, but where writes were under way."""
        for sector in [sector for sector in self.lists if sector not in self.written]:
            self._settle(sector, got[sector * SECTOR : (sector + 1) * SECTOR])

    def check(self, got: bytes, what: str, other: "Versions | None" = None) -> None:
        """Raises Violation. ``other``: each sector may as well be one of these."""
        expected = bytearray(self.content)
        for sector in self.lists:
            self._take(expected, got, sector)
        if got == expected:
            return
        if len(got) != len(expected):
            raise Violation(f"{what} has {len(got)} bytes instead of {len(expected)}")
        for at in range(0, len(got), SECTOR):
            part = got[at : at + SECTOR]
            allowed = self.allowed(at // SECTOR) + (other.allowed(at // SECTOR) if other is not None else [])
            if part not in allowed:
                raise Violation(
                    f"{what}: sector {at // SECTOR} is {shown(part)} instead of {' or '.join(dict.fromkeys(map(shown, allowed)))}"
                )

    def _take(self, expected: bytearray, got: bytes, sector: int) -> None:
        part = got[sector * SECTOR : (sector + 1) * SECTOR]
        if any(entry.value == part for entry in self.lists[sector]):
            expected[sector * SECTOR : (sector + 1) * SECTOR] = part

    def allowed(self, sector: int) -> list[bytes]:
        if sector in self.lists:
            return [entry.value for entry in self.lists[sector]]
        return [bytes(self.content[sector * SECTOR : (sector + 1) * SECTOR])]

    def assert_now(self, got: bytes, what: str) -> None:
        """Without a cut: each sector as it was acknowledged last, or as a request wanted that failed or is under way."""
        self.since_acknowledged().check(got, what)


def shown(sector: bytes) -> str:
    """What a sector consists of, in pieces of those of :func:`pattern`."""
    pieces = [sector[at : at + PIECE] for at in range(0, len(sector), PIECE)]
    found = [
        f"{len(list(same))} x {'zeroes' if not any(piece) else repr(piece.rstrip(b'.'))[1:]}"
        for piece, same in itertools.groupby(pieces)
    ]
    return f"({', '.join(found)})"


World = tuple[Stage, int]
"""The saved stage and generation, as a restart finds them."""


def _sectors(offset: int, data: bytes) -> range:
    return range(offset // SECTOR, -(-(offset + len(data)) // SECTOR))


class Model:
    """What was asked of a volume, and what of it was acknowledged; so, what may be found after a cut.

    ``worlds``: for each saved stage and generation that there may be, what the view may hold; None: what the disk holds.
    Its methods are what :class:`faults.Mark` names.
    """

    def __init__(self, disk: bytes, now: World, view: Versions | None = None) -> None:
        self.disk = Versions(disk)
        self.now = now
        self.worlds: dict[World, Versions | None] = {now: view}
        self.version = 0
        """Changes when fewer results are allowed than before."""
        self.copy: bytes | None = None
        """What a primary's copy held when it was linked, until the primary is closed: what differs from that is out of sync."""
        self._fresh: list[Versions] = []  # views that are not in use yet, as far as is known
        self._mixed = False  # a failover is under way: the disk becomes the view
        self._flushes: dict[int, list[tuple[Versions, dict[int, int]]]] = {}
        self._saving: list[tuple[Versions, dict[int, int]]] = []

    @property
    def view(self) -> Versions:
        return self.worlds[self.now] or self.disk

    def _views(self) -> list[tuple[Versions, bool]]:
        """What a request of the machine's may reach: (versions, whether only maybe)."""
        found = {id(versions or self.disk): versions or self.disk for versions in self.worlds.values()}
        return [(versions, any(versions is fresh for fresh in self._fresh)) for versions in found.values()]

    def found(self, saved: World) -> None:
        """So it is, by what a process that begins has read, without a cut."""
        if saved not in self.worlds:
            raise Violation(f"the saved stage and generation are {saved} instead of {list(self.worlds)}")
        stage, generation = self.now = saved
        self._fresh = []
        self._mixed = stage in (Stage.FAILOVER, Stage.FAILOVER_FAILED)
        if stage is Stage.FAILOVER:  # which goes on, and ends
            self.worlds[Stage.DONE, generation] = self.worlds[saved]
        elif stage is Stage.DONE:  # where it has ended just now, it may come back
            self._mixed = (Stage.FAILOVER, generation) in self.worlds

    def begun(self) -> None:
        """The process that has found it can be used: an older state does not come back any more."""
        stage, generation = self.now
        if stage is Stage.DONE:
            return self.done()
        self.version += 1
        kept = [self.now, (Stage.DONE, generation)] if stage is Stage.FAILOVER else [self.now]
        self.worlds = {world: self.worlds[world] for world in kept}

    def undecided(self) -> None:
        """What was begun has failed: it may have been done, or not."""
        self._fresh = []

    # Requests. ``port``: view or disk

    def begin(self, port: str, write: int, offset: int, data: bytes) -> None:
        if port == "view":
            for versions, maybe in self._views():
                versions.begin(write, offset, data, maybe)
        else:
            self.disk.begin(write, offset, data)
            for versions in self._fresh:
                if versions is not self.disk:
                    versions.begin(write, offset, data, True)
                    # What is read after the checkpoint tells whether this is in the view, but where the machine is writing, too.
                    versions.written.difference_update(set(_sectors(offset, data)) - self._under_way())

    def _under_way(self) -> set[int]:
        """The sectors that the machine is writing to."""
        return {sector for offset, data, _ in self.view.writing.values() for sector in _sectors(offset, data)}

    def _all(self) -> list[Versions]:
        return [self.disk, *(versions for versions, _ in self._views() if versions is not self.disk)]

    def end(self, write: int) -> None:
        for versions in self._all():
            versions.end(write)

    def fail(self, write: int) -> None:
        for versions in self._all():
            versions.fail(write)

    def flush_begin(self, port: str, flush: int) -> None:
        found = [versions for versions, _ in self._views()] if port == "view" else [self.disk]
        self._flushes[flush] = [(versions, versions.flush_begin()) for versions in found]

    def flush_end(self, flush: int) -> None:
        self.version += 1
        for versions, covered in self._flushes.pop(flush):
            versions.flush_end(covered)

    def flush_fail(self, flush: int) -> None:
        del self._flushes[flush]

    # Control

    def control_begin(self, operation: Operation) -> None:
        generation = self.now[1]
        self._saving = []
        match operation:
            case Operation.CHECKPOINT | Operation.START:
                new = self.disk.since_acknowledged()
                for write, (offset, data, _) in self.view.writing.items():
                    if self.view is not self.disk:
                        new.begin(write, offset, data, True)
                self._saving = [(self.disk, self.disk.flush_begin())]
                self.worlds[Stage.RUNNING, generation + (operation is Operation.CHECKPOINT)] = new
                self._fresh = [new]
            case Operation.FAILOVER:
                self.worlds[Stage.FAILOVER, generation] = self.worlds[Stage.DONE, generation] = self.worlds[self.now]
                self._mixed = True
            case Operation.STOP:
                self.worlds[Stage.DONE, generation] = None
                self._fresh = [self.disk]

    def control_end(self, operation: Operation) -> None:
        self.version += 1
        generation = self.now[1]
        match operation:
            case Operation.CHECKPOINT | Operation.START:
                self.now = Stage.RUNNING, generation + (operation is Operation.CHECKPOINT)
                self.worlds = {self.now: self.worlds[self.now]}
                for versions, covered in self._saving:
                    versions.flush_end(covered)
            case Operation.FAILOVER:
                self.worlds.pop(self.now)
                self.worlds.pop((Stage.RUNNING, generation), None)
                self.now = Stage.FAILOVER, generation
            case Operation.STOP:
                self.now = Stage.DONE, generation
                self.worlds = {self.now: None}
        self._fresh = []

    def control_fail(self, now: World) -> None:
        """It has failed, and the volume says that this is its stage and generation."""
        if now == self.now:
            self.worlds = {now: self.worlds[now]}
            self._mixed = now[0] is Stage.FAILOVER_FAILED
        else:  # it stands, and is only not durable
            self.now = now
        self._fresh = []

    def observed(self, view: bytes) -> None:
        """Right after a checkpoint the view was this."""
        self.version += 1
        self.view.observed(view)

    def forwarding(self, generation: int = 0) -> None:
        """A primary is about to forward: from now on it may say so."""
        self.worlds[Stage.RUNNING, generation] = self.worlds[self.now]

    def forwards(self) -> None:
        self.version += 1
        self.worlds = {(Stage.RUNNING, 0): self.worlds[self.now]}
        self.now = Stage.RUNNING, 0
        self.copy = bytes(self.disk.content)

    def closing(self) -> None:
        """The volume is about to be closed well."""
        self.copy = None

    def commit_failed(self) -> None:
        self.worlds[Stage.FAILOVER_FAILED, self.now[1]] = self.worlds[self.now]
        self.now = Stage.FAILOVER_FAILED, self.now[1]
        self.worlds.pop((Stage.DONE, self.now[1]), None)

    def done(self) -> None:
        """The commit has ended."""
        self.version += 1
        view = self.view
        self.now = Stage.DONE, self.now[1]
        self.worlds = {self.now: None}
        self.disk = view
        self._mixed = False

    def resumed(self) -> None:
        """What was under way before the restart has ended."""
        self.version += 1
        self.worlds = {self.now: self.worlds[self.now]}
        self._mixed = False

    # After a cut

    def check(self, found: "Outcome") -> None:
        if found.saved[0] is Stage.FAILOVER_FAILED and (Stage.FAILOVER, found.saved[1]) in self.worlds:
            self.worlds.setdefault(found.saved, self.worlds[Stage.FAILOVER, found.saved[1]])  # it may fail at any time
        if found.saved not in self.worlds:
            stages = " or ".join(f"{stage} {generation}" for stage, generation in self.worlds)
            raise Violation(f"the saved stage and generation are {found.saved[0]} {found.saved[1]} instead of {stages}")
        if self.copy is not None and found.saved[0] is Stage.RUNNING:
            for block, start in enumerate(range(0, len(self.copy), BLOCK)):
                if self.copy[start : start + BLOCK] != found.disk[start : start + BLOCK] and block not in found.stale:
                    raise Violation(f"block {block} of the primary was changed, and is not out of sync")
        view = self.worlds[found.saved]
        if found.saved[0] in (Stage.FAILOVER, Stage.FAILOVER_FAILED, Stage.DONE) and found.disk != found.view:
            raise Violation("after a failover or stop the disk is not the view")
        if view is not None:
            view.check(found.view, "the view")
        elif found.view != found.disk:
            raise Violation("the view is not the disk")
        if not self._mixed:
            self.disk.check(found.disk, "the disk")


@dataclass(frozen=True)
class Outcome:
    """What a restart found. ``disk``: when it was at rest."""

    saved: World
    stale: frozenset[int]
    view: bytes
    disk: bytes


# Driving a volume


@dataclass(frozen=True)
class Setup:
    """A volume in a directory: how to mount it."""

    root: Path
    mode: Mode = Mode.SECONDARY
    disk: str = "secondary.raw"
    disk_format: str | None = "raw"
    start: bool = True
    changes: dict[str, Any] = field(default_factory=dict)

    def volume(self, storage: FaultyStorage, start: bool | None = None) -> SecondaryVolume | PrimaryVolume:
        target = Target(UnixAddress(str(self.root / "t.sock")), "disk")
        side = {"target": target, "initial_sync": "none"} if self.mode is Mode.PRIMARY else {}
        settings = config(
            self.root,
            self.mode,
            disk=self.root / self.disk,
            state_dir=self.root / f"{self.disk}.replfs",
            start=self.start if start is None else start,
            **{**side, **self.changes},
        )
        kind = SecondaryVolume if self.mode is Mode.SECONDARY else PrimaryVolume
        return kind(settings, self.disk_format, storage)


@asynccontextmanager
async def mounted(volume: SecondaryVolume | PrimaryVolume, storage: FaultyStorage) -> AsyncIterator[None]:
    """From its begin to its close. After a problem in between its files are closed, as they are, and it is raised."""
    problem: Exception | None = None
    try:
        async with trio.open_nursery() as nursery:
            try:
                await volume.connect(nursery)
                await volume.begin(nursery)
                yield
                await volume.settle()
            except Exception as error:  # as itself, not in a group
                problem = error
            nursery.cancel_scope.cancel()
        if problem is not None:
            raise problem
        await volume.close()
        if storage.opened:
            raise Violation(f"left open: {sorted(file.path for file in storage.opened)}")
    finally:
        await release(volume, storage)


async def release(volume: SecondaryVolume | PrimaryVolume, storage: FaultyStorage) -> None:
    """What the end of a process does."""
    storage.abandon()
    volume.directory.close()
    if isinstance(volume, SecondaryVolume):
        with trio.CancelScope(shield=True):
            await volume.server.close()


async def everything(node: Node) -> bytes:
    return bytes(await node.read(0, node.size))


def pattern(port: str, write: int, offset: int, length: int) -> bytes:
    """Bytes that say which write they are of, and where they belong."""
    first, last = offset // SECTOR, -(-(offset + length) // SECTOR)
    whole = b"".join(
        f"[{port} {write} at {sector}]".encode().ljust(PIECE, b".") * (SECTOR // PIECE) for sector in range(first, last)
    )
    return whole[offset - first * SECTOR :][:length]


class Driver:
    """Sends a volume requests as its exports do, and says so in the log; ``model`` follows along."""

    def __init__(self, setup: Setup, storage: FaultyStorage, model: Model) -> None:
        self.setup = setup
        self.storage = storage
        self.log = storage.log
        self.model = model
        self._volume: SecondaryVolume | PrimaryVolume | None = None
        self._count = 0

    @property
    def volume(self) -> Any:
        assert self._volume is not None
        return self._volume

    def mark(self, method: str, *arguments: Any) -> None:
        self.log.mark(method, *arguments)
        getattr(self.model, method)(*arguments)

    def number(self) -> int:
        self._count += 1
        return self._count

    def node(self, port: str) -> Node:
        found = self.volume.view if port == "view" else self.volume.exported
        assert isinstance(found, Node)
        return found

    @asynccontextmanager
    async def mounted(self) -> AsyncIterator[None]:
        """Raises ReplfsError if it cannot be mounted, or not be closed well."""
        volume = self._volume = self.setup.volume(self.storage)
        self.mark("found", (volume.state.stage, volume.state.generation))
        starts = self.setup.start and (self.model.now[0] is Stage.NONE or self.setup.mode is Mode.PRIMARY)
        if starts:
            self.mark("forwarding") if self.setup.mode is Mode.PRIMARY else self.mark("control_begin", Operation.START)
        begun = False
        try:
            async with mounted(volume, self.storage):
                begun = True
                if starts:
                    await self._started()
                else:
                    self.mark("begun")
                yield
                self.mark("closing")
                flushes = self.number(), self.number()
                self.mark("flush_begin", "view", flushes[0])
                self.mark("flush_begin", "disk", flushes[1])
        except (ReplfsError, BaseExceptionGroup):
            if not begun:
                self.mark("undecided")
            raise
        for flush in flushes:
            self.mark("flush_end", flush)

    async def killed(self, events: int, use: Callable[[], Awaitable[None]]) -> bool:
        """Mount and use it, as a process that is killed as soon as it has made so many more events (:mod:`faults`).

        Whether it was: it may have come to its end before.
        """
        killed = False
        self.storage.killed_at = len(self.log.events) + events
        try:
            async with self.mounted():
                await use()
        except* Killed:
            killed = True
        finally:
            self.storage.killed_at = None
        return killed

    async def _started(self) -> None:
        if self.setup.mode is Mode.PRIMARY:
            self.mark("forwards")
        else:
            self.mark("control_end", Operation.START)
            self.mark("observed", await everything(self.volume.view))

    async def write(self, port: str, offset: int, length: int) -> None:
        write = self.number()
        data = pattern(port, write, offset, length)
        await self._change(port, write, offset, data, put(self.node(port), offset, data))

    async def zeroes(self, port: str, offset: int, length: int, may_unmap: bool = True) -> None:
        request = self.node(port).write_zeroes(offset, length, may_unmap)
        await self._change(port, self.number(), offset, bytes(length), request)

    async def _change(self, port: str, write: int, offset: int, data: bytes, request: Any) -> None:
        self.mark("begin", port, write, offset, data)
        try:
            await request
        except (OSError, Killed, trio.Cancelled):
            self.mark("fail", write)
            raise
        self.mark("end", write)

    async def flush(self, port: str) -> None:
        flush = self.number()
        self.mark("flush_begin", port, flush)
        try:
            await self.node(port).flush()
        except (OSError, Killed, trio.Cancelled):
            self.mark("flush_fail", flush)
            raise
        self.mark("flush_end", flush)

    async def control(self, operation: Operation) -> None:
        self.mark("control_begin", operation)
        try:
            await self.volume.control(operation)
        except ReplfsError:
            self.mark("control_fail", (self.volume.state.stage, self.volume.state.generation))
            raise
        self.mark("control_end", operation)
        if operation in (Operation.CHECKPOINT, Operation.START):
            self.mark("observed", await everything(self.volume.view))

    async def checkpoint(self) -> None:
        await self.control(Operation.CHECKPOINT)

    async def until_done(self) -> None:
        """Until the commit of a failover has ended, well or not."""
        with trio.fail_after(_SECONDS):
            while self.volume.state.stage is Stage.FAILOVER:
                await trio.lowlevel.checkpoint()
        self.mark("done" if self.volume.state.stage is Stage.DONE else "commit_failed")

    async def check(self) -> None:
        """While nothing is under way: the view, and the disk, are what was acknowledged."""
        if (self.volume.state.stage, self.volume.state.generation) != self.model.now:
            raise Violation(f"{self.volume.state} is not {self.model.now}")
        if self.model.now[0] is not Stage.NONE or self.setup.mode is Mode.PRIMARY:
            self.model.view.assert_now(await everything(self.volume.view), "the view, in use")
        if not self.model._mixed:
            if isinstance(self.volume, SecondaryVolume):
                await self.volume.exported.drain()
            self.model.disk.assert_now(await everything(self.volume.disk), "the disk, in use")


# Cutting the power


Scenario = Callable[[Driver], Any]


class Case:
    """A scenario that was recorded, from the files that were there when it began."""

    def __init__(self, name: str, setup: Setup, scratch: Scratch, before: bytes) -> None:
        """``before``: what the disk holds."""
        self.name = name
        self.setup = setup
        self.scratch = scratch
        self.start: Snapshot = scratch.snapshot()
        self.log = Log()
        self.make_model: Callable[[], Model] = lambda: Model(before, (Stage.NONE, 0))
        self.prepare: Callable[[FaultyStorage], None] = lambda storage: None
        """Has the storage lie, in the scenario and after each restart."""
        self.check_images = 0
        """Of so many states, the images of one are given to qemu-img check. 0: of none."""
        self.again = 4
        """Of so many states, one is restarted twice."""
        self.used = 8
        """Of so many states, one is used after the restart."""

    def storage(self, log: Log) -> FaultyStorage:
        found = self.scratch.storage(log)
        self.prepare(found)
        return found

    async def record(self, scenario: Scenario, turns: int = 2) -> None:
        """Run a scenario, which mounts the volume itself and closes it."""
        storage = self.storage(self.log)
        storage.turns = turns
        keep = self.scratch.numbers()
        driver = Driver(self.setup, storage, self.make_model())
        await scenario(driver)
        self.scratch.changed_by(self.log)
        self.scratch.forget(keep)


@dataclass
class Explored:
    states: set[int] = field(default_factory=set)
    """Keys of those that passed."""
    restarts: int = 0
    cuts: int = 0


def points_of(events: list[Event], seed: str, most: int) -> set[int]:
    """Numbers of events to cut the power after; those where a promise is made are likelier."""
    chance = random.Random(seed)
    promises = [n for n, event in enumerate(events) if isinstance(event, SyncEnd | DirectorySyncEnd | Mark | Replace)]
    others = [n for n, event in enumerate(events) if isinstance(event, Write | Zero | Length | Create | Unlink)]
    found = set(chance.sample(promises, min(len(promises), most // 2)))
    found |= set(chance.sample(others, min(len(others), most - len(found))))
    rest = sorted(set(promises) - found)
    return found | set(chance.sample(rest, min(len(rest), most - len(found))))


async def explore(
    case: Case, states: int, seed: int = 0, *, only: tuple[int, str] | None = None, deep: int = 0, per_point: int = 8
) -> Explored:
    """Cut the power in about so many different ways. Raises Violation.

    ``only``: (event, variant) of one to be done again, as the message of a violation names them. ``deep``: of so many states, one
    has the power cut again during the restart and after it. 0: of none.
    """
    explored = Explored()
    events = case.log.events
    points = points_of(events, f"{seed} points", max(states // per_point * 3 // 2, 1)) if only is None else {only[0]}
    replay, model = Replay(case.start), case.make_model()
    seen: set[tuple[int, int]] = set()
    for number, event in enumerate(events):
        if isinstance(event, Mark):
            getattr(model, event.method)(*event.arguments)
        replay.step(number, event)
        if number not in points:
            continue
        found = (
            replay.variants(f"{seed} {number}", per_point)
            if only is None
            else iter([(only[1], replay.variant(f"{seed} {number} {only[1]}", only[1]))])
        )
        for variant, state in found:
            explored.cuts += 1
            if (state.key, model.version) in seen:
                continue
            seen.add((state.key, model.version))
            count = explored.restarts = explored.restarts + 1
            try:
                await examine(case, state, model, count, bool(deep and count % deep == 0), seed, explored)
            except AssertionError as problem:
                raise Violation(
                    f"{case.name}: power cut after event {number} of {len(events)} ({described(case, event)}), variant"
                    f" {variant!r} [only=({number}, {variant!r}), seed={seed}]: {problem}"
                ) from problem
            explored.states.add(state.key)
            if len(explored.states) >= states:
                return explored
    return explored


def described(case: Case, event: Event) -> str:
    """An event in short."""
    if isinstance(event, Mark):
        return f"{event.method} {' '.join(str(argument) for argument in event.arguments if not isinstance(argument, bytes))}"
    file = case.log.paths.get(getattr(event, "file", 0), "the disk")
    fields = {name: len(value) if isinstance(value, bytes) else value for name, value in event._asdict().items() if name != "file"}
    return f"{type(event).__name__} {file} {fields}"


async def examine(case: Case, state: State | Snapshot, model: Model, count: int, deep: bool, seed: int, explored: Explored) -> None:
    """Restart from what a cut has left. Raises Violation, or another AssertionError."""
    case.scratch.put(state)
    use = bool(case.used and count % case.used == 0)
    found, log, inner = await restart(case, use or deep, count)
    model.check(found)
    if case.check_images and count % case.check_images == 0:
        check_images(case)
    if case.again and count % case.again == 0 and not use and not deep:
        again, _, _ = await restart(case, False, count)
        if again.view != found.view or again.saved[1] != found.saved[1]:
            raise Violation("a second restart shows another view")
    if deep:
        inner_case = nested(case, Snapshot(state.names, state.files), log, inner)
        below = await explore(inner_case, 12, seed, per_point=4)
        explored.states |= below.states
        explored.restarts += below.restarts
        case.scratch.forget(case_numbers(case))


def case_numbers(case: Case) -> set[int]:
    """The files that a case's states may name."""
    return {*case.start.files, *(event.file for event in case.log.events if isinstance(event, Create))}


def nested(case: Case, start: Snapshot, log: Log, make_model: Callable[[], Model]) -> Case:
    """The case of a restart."""
    found = object.__new__(Case)
    found.__dict__.update(case.__dict__)
    found.name, found.start, found.log, found.make_model = f"{case.name}, restart", start, log, make_model
    found.used = found.check_images = 0
    return found


async def restart(case: Case, use: bool, seed: int) -> tuple[Outcome, Log, Callable[[], Model]]:
    """Mount the volume, look, perhaps use it, and close it. Gives also the record of it all, and the model that it begins with."""
    log = Log()
    storage = case.storage(log)
    try:
        with trio.fail_after(_SECONDS):
            outcome, make_model = await _restart(case.setup, storage, use, seed)
    except (ReplfsError, OSError, trio.TooSlowError, ExceptionGroup) as problem:
        raise Violation(f"the volume does not come up, or cannot be used: {problem!r}") from problem
    finally:
        case.scratch.changed_by(log)
    return outcome, log, make_model


async def _restart(setup: Setup, storage: FaultyStorage, use: bool, seed: int) -> tuple[Outcome, Callable[[], Model]]:
    volume = setup.volume(storage, setup.mode is Mode.SECONDARY)
    saved = volume.state.stage, volume.state.generation
    async with mounted(volume, storage):
        assert volume.tracking is not None
        stale = frozenset(volume.tracking.stale)
        view = await everything(volume.view)
        if isinstance(volume, SecondaryVolume) and saved[0] in (Stage.FAILOVER, Stage.FAILOVER_FAILED):
            if saved[0] is Stage.FAILOVER_FAILED:
                await volume.control(Operation.FAILOVER)  # which nobody but the user asks for again
            while volume.state.stage is Stage.FAILOVER:
                await trio.lowlevel.checkpoint()
            if volume.state.stage is not Stage.DONE or await everything(volume.view) != view:
                raise Violation(f"the failover went on to {volume.state.stage}, and has changed the view")
        disk = await everything(volume.disk)
        now = volume.state.stage, volume.state.generation

        def make_model() -> Model:
            """For what was under way at the cut there is one answer by now: the one that was just seen."""
            model = Model(disk, now, Versions(view) if now[0] is Stage.RUNNING and setup.mode is Mode.SECONDARY else None)
            model.worlds[saved] = model.worlds[now] if saved[0] is not Stage.NONE else None
            if saved[0] is Stage.FAILOVER:
                model.disk = Versions(view)
                model.worlds[saved] = model.disk
                model._mixed = True
            return model

        if use and not volume.state.suspect:  # else it takes no checkpoints any more
            driver = Driver(setup, storage, make_model())
            driver._volume = volume
            driver.mark("resumed")
            await use_again(driver, seed)
    return Outcome(saved, stale, view, disk), make_model


async def use_again(driver: Driver, seed: int) -> None:
    """It can still be written, flushed, and, where it is running, have a checkpoint."""
    chance = random.Random(seed)
    size = driver.volume.view.size
    both = driver.setup.mode is Mode.SECONDARY and driver.volume.state.stage is Stage.RUNNING
    ports = ("view", "disk") if both else ("view",)
    for port in ports:
        for _ in range(2):
            length = chance.choice((300, 512, 4096, 5000, 20_000))
            offset = chance.randrange(size - length)
            await driver.write(port, offset - offset % 2048 if length == 4096 else offset, length)
        await driver.flush(port)
    await driver.check()
    if both:
        await driver.checkpoint()
        await driver.check()


def check_images(case: Case) -> None:
    """qemu-img finds no errors in the images that are there; leaks are allowed."""
    root = Path(case.scratch.root)
    images = [*root.glob("*.replfs/*.qcow2"), *([root / case.setup.disk] if case.setup.disk_format == "qcow2" else [])]
    for image in images:
        command = ["qemu-img", "check", "-q", "-U", "-f", "qcow2", str(image)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, stdin=subprocess.DEVNULL)
        if done.returncode not in (0, 3):
            raise Violation(f"{image.name}: qemu-img check: {done.stdout}{done.stderr}")


def scratch_directory() -> Path:
    """Where files are in memory, if there is such a place. The caller removes it."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    return Path(os.path.realpath(tempfile.mkdtemp(prefix="replfs-", dir=place)))
