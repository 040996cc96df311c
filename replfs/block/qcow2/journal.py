"""The journal of an image: changes of its tables that are acknowledged, and not in the tables yet.

A file of its own: a header of one sector, and two halves that are filled in turn with *records*, each numbered one higher than the
one before. A record says what :class:`Change` can say, and carries hashes of the data that it makes visible; so it proves itself.
Whatever a kill or a power cut has left of the journal and of the image, those records count that are whole, and whose data is
there. Nothing has to be known about which of the two it was.

The header says up to which number the records are *retired*: their changes are in the tables, and never applied again. A half is
used again when all of its records are retired. It also has the journal's *name*, by which its image knows it.

Layout, little-endian. Header: magic, version, name, number of the last retired record, xxh3-64 of all
that. Record: xxh3-64 of the rest,
its length in bytes, kind, number, three values, xxh3-64 of each unit of data.
"""

import enum
import errno
import struct
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from xxhash import xxh3_64_intdigest

from replfs.block.file import File
from replfs.block.node import Data
from replfs.block.storage import Storage
from replfs.errors import ReplfsError, printable

_MAGIC: Final = b"replfs-j"
_VERSION: Final = 2
_SECTOR: Final = 512
_START: Final = 4096
HALF: Final = 256 << 10
"""Bytes of records in one half."""

_HEADER: Final = struct.Struct("<8sQQQ")
_CHECKSUM: Final = struct.Struct("<Q")
_RECORD: Final = struct.Struct("<IIQQQQ")
_FIXED: Final = _CHECKSUM.size + _RECORD.size


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


class Record(NamedTuple):
    change: Change
    first: int
    second: int
    third: int
    hashes: tuple[int, ...]


class Journal:
    """Owns its file. Nothing but :meth:`File.sync <replfs.block.file.File.sync>` of ``file`` puts it on stable storage."""

    def __init__(self, file: File, name: int, retired: int) -> None:
        self.file = file
        self.name: Final = name
        self.retired = retired
        """The number of the last record that is in the tables."""
        self.number = retired
        """The number of the last record that was written."""
        self.used = False
        """Whether :meth:`records` has found that it is not as it was made."""
        self.filled = 0
        """Bytes written since records were last retired."""
        self._half = 0
        self._position = 0  # in the half
        self._last = [retired, retired]  # the number of the last record in each half

    @classmethod
    def create(cls, storage: Storage, path: str, name: int) -> "Journal":
        """Make an empty journal, on stable storage but for its directory. Raises OSError; then there is no file left behind.

        It has all of its room from the start: what needs no room in the image must not need any in the journal.
        """
        file = storage.open_own(path)
        try:
            file.truncate(0)
            file.reserve(_START + 2 * HALF)
            journal = cls(file, name, 0)
            file.write(0, _header(name, 0))
            file.sync_now()
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
                raise ReplfsError(f"{printable(path)}: the journal is damaged", errno.EINVAL)
            magic, version, name, retired = _HEADER.unpack_from(header)
            if magic != _MAGIC or version != _VERSION:
                raise ReplfsError(f"{printable(path)} is not a journal of version {_VERSION}", errno.EINVAL)
            return cls(file, name, retired)
        except BaseException:
            file.close()
            raise

    @classmethod
    def is_blank(cls, storage: Storage, path: str, name: int) -> bool:
        """Whether this is a journal that was never used; it is on stable storage then. Raises OSError."""
        file = storage.open_own(path)
        try:
            length = _START + 2 * HALF
            if file.read_now(0, length + 1) != _header(name, 0).ljust(length, b"\0") or file.allocated_bytes() < length:
                return False
            file.sync_now()
            return True
        finally:
            file.close()

    # Reading it, once, before anything is written to it

    def records(self) -> list[Record]:
        """Those that are whole and not retired, in their order. What is written from now on comes after them."""
        found: list[tuple[int, Record]] = []
        for half in (0, 1):
            raw = self.file.read_now(_START + half * HALF, HALF)
            found += self._scan(raw)
            self.used |= any(raw)
        found.sort()
        if self.used:
            # Numbers that a lost record may have had are not used again: what is left of it must not look like a new one's
            # successor. So all up to here are to be retired before anything is written.
            self.number = max([self.retired, *(number for number, _ in found)]) + 2 * HALF // _FIXED
            self._last = [self.number, self.number]
            self._position = HALF
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
                hashes = struct.unpack_from(f"<{(length - _FIXED) // 8}Q", body, _RECORD.size)
                yield number, Record(Change(kind), first, second, third, hashes)
            position, expected = position + length, number + 1

    # Writing

    def append(self, change: Change, first: int, second: int, third: int, hashes: Sequence[int] = ()) -> None:
        """Add a record. Raises Full, or OSError; then it is not there."""
        length = _FIXED + 8 * len(hashes)
        if self._position + length > HALF:
            other = 1 - self._half
            if self._last[other] > self.retired:
                raise Full
            self._half, self._position = other, 0
        body = _RECORD.pack(length, change, self.number + 1, first, second, third)
        body += struct.pack(f"<{len(hashes)}Q", *hashes)
        self.file.write(_START + self._half * HALF + self._position, _checksum(body) + body)
        self.number += 1
        self._position += length
        self.filled += length
        self._last[self._half] = self.number

    def retire(self, number: int) -> None:
        """The changes up to this record are in the tables. Raises OSError."""
        self.file.write(0, _header(self.name, number))
        self.retired = number
        self.filled = 0


def hashes(data: Data, unit: int) -> list[int]:
    """Of each ``unit`` bytes of what is whole units long."""
    if len(data) == unit:
        return [xxh3_64_intdigest(data)]
    view = memoryview(data)
    return [xxh3_64_intdigest(view[at : at + unit]) for at in range(0, len(view), unit)]


def _header(name: int, retired: int) -> bytes:
    header = _HEADER.pack(_MAGIC, _VERSION, name, retired)
    return (header + _checksum(header)).ljust(_SECTOR, b"\0")


def _checksum(data: bytes) -> bytes:
    return _CHECKSUM.pack(xxh3_64_intdigest(data))
