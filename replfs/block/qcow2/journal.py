"""The journal of an image: changes of its tables that are acknowledged, and not in the tables yet.

A file of its own: a header of one sector, and two halves that are filled in turn with *records*, each numbered one higher than the
one before. A record says what :class:`Change` can say, and carries hashes of the data that it makes visible, or the data itself; so
it proves itself. Whatever a kill or a power cut has left of the journal and of the image, those records count that are whole, and
whose data is there. Nothing has to be known about which of the two it was.

A journal whose records carry data has larger halves, and all of it has been written before it is used: what is written over
something is sooner on stable storage than what needs new blocks.

The header says up to which number the records are *retired*: their changes are in the tables, and never made again. A half is
used again when all of its records are retired. It also has the journal's *name*, by which its image knows it, and up to which
number what is *staged* is where it was to go.

Layout, little-endian. Header, 4 KiB: magic, version, name, numbers of the last retired and of the last applied record, xxh3-64 of
all that. Record: xxh3-64 of the rest, its length in bytes, kind, number, three values, and either xxh3-64 of each unit of data, or
the data (SAVED), or the data, an offset and other data (STAGED). All after the header is the two halves.
"""

import enum
import errno
import struct
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from xxhash import xxh3_64_intdigest

from replfs.block.file import File
from replfs.block.node import Data
from replfs.block.storage import Storage
from replfs.errors import ReplfsError, printable

_MAGIC: Final = b"replfs-j"
_VERSION: Final = 3
_SECTOR: Final = 512
_START: Final = 4096
HALF: Final = 256 << 10
"""Bytes of records in one half, where they carry no data."""
_LARGEST_HALF: Final = 8 << 20
_PIECE: Final = 1 << 20
_ZEROES: Final = bytes(_PIECE)

_HEADER: Final = struct.Struct("<8sQQQQ")
_CHECKSUM: Final = struct.Struct("<Q")
_RECORD: Final = struct.Struct("<IIQQQQ")
_FIXED: Final = _CHECKSUM.size + _RECORD.size
_PLACE: Final = struct.Struct("<Q")
_NO_CHECKSUM: Final = bytes(_CHECKSUM.size)


class Full(Exception):
    """There is no room for the record before earlier ones are retired."""


class Change(enum.IntEnum):
    """What a record says."""

    DATA = 1
    """Bytes ``first .. second`` of the disk are data, from ``third`` on in the data file; in whole units, with their hashes."""
    ZERO = 2
    """Bytes ``first .. second`` of the disk read as zeroes; ``third``: they keep their room."""
    TABLE = 3
    """L1 entry ``first`` leads to a new L2 table at ``second``, which was empty, or whose content was durable, before this."""
    CONTENT = 4
    """Bytes ``first .. second`` of the disk, which are data at ``third`` if they are data there, may have these hashes, too."""
    SAVED = 5
    """As DATA, with the data itself: it counts, wherever else that may be."""
    STAGED = 6
    """As SAVED; and when that is on stable storage, ``data`` is to be written to the backing node, from ``offset`` on."""


class Record(NamedTuple):
    change: Change
    first: int
    second: int
    third: int
    hashes: tuple[int, ...]
    content: bytes = b""
    offset: int = 0
    data: bytes = b""


class Journal:
    """Owns its file. Nothing but :meth:`File.sync <replfs.block.file.File.sync>` of ``file`` puts it on stable storage."""

    def __init__(self, file: File, name: int, retired: int, applied: int) -> None:
        """``file`` has all of its length."""
        self.file = file
        self.name: Final = name
        self.half: Final = (file.length() - _START) // 2
        """Bytes of records in one half."""
        self.retired = retired
        """The number of the last record that is in the tables."""
        self.applied = applied
        """The number of the last record of which, and of all before it, what was staged has been written."""
        self.number = retired
        """The number of the last record that was written."""
        self.used = False
        """Whether :meth:`records` has found that it is not as it was made."""
        self.filled = 0
        """Bytes written since records were last retired."""
        self._half = 0
        self._position = 0  # in the half
        self._last = [retired, retired]  # the number of the last record in each half
        self._staged: deque[int] = deque()  # the numbers of those that are not applied

    @classmethod
    def create(cls, storage: Storage, path: str, name: int, half: int = HALF) -> "Journal":
        """Make an empty journal, on stable storage but for its directory. Raises OSError; then there is no file left behind.

        It has all of its room from the start: what needs no room in the image must not need any in the journal. ``half``: bytes of
        each of its halves. What is left of another one of that size does, once it is emptied.
        """
        file = storage.open_own(path)
        length = _START + 2 * half
        try:
            fresh = file.length() != length
            if fresh:
                file.truncate(0)
            if fresh and half == HALF:
                file.reserve(length)
            else:
                for at in range(0, length, _PIECE):
                    if fresh or not _is_zero(file, at, min(at + _PIECE, length)):
                        file.write(at, _ZEROES[: length - at])
            file.write(0, _header(name, 0, 0))
            file.sync_now()
            journal = cls(file, name, 0, 0)
        except BaseException:
            file.close()
            storage.unlink(path)
            raise
        return journal

    @classmethod
    def open(cls, storage: Storage, path: str) -> "Journal":
        """Open the journal that is there. Raises ReplfsError if it is none, or damaged, OSError if it cannot be read."""
        file = storage.open_own(path)
        try:
            header = file.read_now(0, _HEADER.size + _CHECKSUM.size)
            if len(header) < _HEADER.size + _CHECKSUM.size or header[_HEADER.size :] != _checksum(header[: _HEADER.size]):
                raise ReplfsError(f"{printable(path)}: the journal is damaged, or not of version {_VERSION}", errno.EINVAL)
            magic, version, name, retired, applied = _HEADER.unpack_from(header)
            if magic != _MAGIC or version != _VERSION:
                raise ReplfsError(f"{printable(path)} is not a journal of version {_VERSION}", errno.EINVAL)
            return cls(file, name, retired, applied)
        except BaseException:
            file.close()
            raise

    @classmethod
    def is_blank(cls, storage: Storage, path: str, name: int, half: int = HALF) -> bool:
        """Whether this is a journal that was never used; it is on stable storage then. Raises OSError."""
        file = storage.open_own(path)
        try:
            length = _START + 2 * half
            if file.length() != length or file.allocated_bytes() < length or file.read_now(0, _SECTOR) != _header(name, 0, 0):
                return False
            if not _is_zero(file, _SECTOR, length):
                return False
            file.sync_now()
            return True
        finally:
            file.close()

    # Reading it, once, before anything is written to it

    def records(self) -> list[Record]:
        """Those that are whole and not retired, in their order; what is written from now on comes after them.

        Waits for the device. What a record has staged is left out if it is applied.
        """
        found: list[tuple[int, Record]] = []
        for half in (0, 1):
            start = _START + half * self.half
            if not _is_zero(self.file, start, start + self.half):
                self.used = True
                found += self._scan(self.file.read_now(start, self.half))
        found.sort()
        self._staged.extend(number for number, record in found if record.data)
        if self.used:
            # Numbers that a lost record may have had are not used again: what is left of it must not look like a new one's
            # successor. So all up to here are to be retired before anything is written.
            self.number = max([self.retired, *(number for number, _ in found)]) + 2 * self.half // _FIXED
            self._last = [self.number, self.number]
            self._position = self.half
        return [record for _, record in found]

    def _scan(self, raw: bytes) -> Iterator[tuple[int, Record]]:
        """The records of a half, as far as they are whole."""
        position, expected = 0, None
        while position + _FIXED <= len(raw):
            length, kind, number, first, second, third = _RECORD.unpack_from(raw, position + _CHECKSUM.size)
            body = raw[position + _CHECKSUM.size : position + length]
            if not _FIXED <= length <= len(raw) - position or raw[position : position + _CHECKSUM.size] != _checksum(body):
                break
            if expected is not None and number != expected:
                break
            if number > self.retired:
                change, rest = Change(kind), body[_RECORD.size :]
                if change in (Change.SAVED, Change.STAGED):
                    content, data = rest[: second - first], rest[second - first :]
                    offset = 0
                    if data:
                        (offset,), data = _PLACE.unpack_from(data), data[_PLACE.size :]
                    yield number, Record(change, first, second, third, (), content, offset, data if number > self.applied else b"")
                else:
                    yield number, Record(change, first, second, third, struct.unpack(f"<{len(rest) // 8}Q", rest))
            position, expected = position + length, number + 1

    # Writing

    def append(
        self,
        change: Change,
        first: int,
        second: int,
        third: int,
        *,
        hashes: Sequence[int] = (),
        content: Data = b"",
        offset: int = 0,
        data: Data = b"",
    ) -> None:
        """Add a record, with what its kind has. Raises Full, or OSError; then it is not there."""
        length = _FIXED + 8 * len(hashes) + len(content) + (_PLACE.size + len(data) if data else 0)
        if self._position + length > self.half:
            other = 1 - self._half
            if self._last[other] > self.retired:
                raise Full
            self._half, self._position = other, 0
        values = _RECORD.pack(length, change, self.number + 1, first, second, third)
        if not content:
            parts: tuple[Data, ...] = (_NO_CHECKSUM, values, struct.pack(f"<{len(hashes)}Q", *hashes))
        elif not data:
            parts = (_NO_CHECKSUM, values, content)
        else:
            parts = (_NO_CHECKSUM, values, content, _PLACE.pack(offset), data)
        record = bytearray().join(parts)
        _CHECKSUM.pack_into(record, 0, xxh3_64_intdigest(memoryview(record)[_CHECKSUM.size :]))
        self.file.write(_START + self._half * self.half + self._position, record)
        self.number += 1
        self._position += length
        self.filled += length
        self._last[self._half] = self.number
        if data:
            self._staged.append(self.number)

    def retire(self, number: int) -> None:
        """The changes up to this record are in the tables; what is staged stays until it is applied. Raises OSError."""
        if self._staged:
            number = min(number, self._staged[0] - 1)
        self.file.write(0, _header(self.name, number, self.applied))
        self.retired = number
        self.filled = 0

    def apply(self, number: int) -> None:
        """What was staged up to this record has been written. Raises OSError."""
        self.file.write(0, _header(self.name, self.retired, number))
        self.applied = number
        while self._staged and self._staged[0] <= number:
            self._staged.popleft()


def hashes(data: Data, unit: int) -> list[int]:
    """Of each ``unit`` bytes of what is whole units long."""
    if len(data) == unit:
        return [xxh3_64_intdigest(data)]
    view = memoryview(data)
    return [xxh3_64_intdigest(view[at : at + unit]) for at in range(0, len(view), unit)]


def half_for(size: int, *, append_only: bool) -> int:
    """Bytes of a half of the journal of an image of ``size`` bytes: more where its records carry data, but not for a small one."""
    return max(HALF, min(_LARGEST_HALF, size // 64 & -_START)) if append_only else HALF


def _is_zero(file: File, start: int, stop: int) -> bool:
    """Whether these bytes of a file are all zero, and there. Raises OSError."""
    return all(file.read_now(at, min(_PIECE, stop - at)) == _ZEROES[: min(_PIECE, stop - at)] for at in range(start, stop, _PIECE))


def _header(name: int, retired: int, applied: int) -> bytes:
    header = _HEADER.pack(_MAGIC, _VERSION, name, retired, applied)
    return (header + _checksum(header)).ljust(_SECTOR, b"\0")


def _checksum(data: bytes) -> bytes:
    return _CHECKSUM.pack(xxh3_64_intdigest(data))
