"""The snapshot table: read only, to know which clusters internal snapshots use (specification, "Snapshots")."""

import errno
import struct
from typing import Final, NamedTuple

from replfs.block.file import File
from replfs.block.qcow2.header import Header
from replfs.errors import ReplfsError, printable

_ENTRY: Final = struct.Struct(">QIHHIIQII")
_L1_LIMIT: Final = 32 << 20
_EXTRA_LIMIT: Final = 1024
_TABLE_LIMIT: Final = 64 << 20
_PIECE: Final = 1 << 20


class Snapshot(NamedTuple):
    """Where the L1 table of a snapshot lies: its offset in bytes, and its number of entries."""

    l1_offset: int
    l1_entries: int


def read(file: File, header: Header) -> tuple[list[Snapshot], int]:
    """The image's snapshots, and the length of their table in bytes. Raises ReplfsError if the table is damaged, OSError."""
    found: list[Snapshot] = []
    position = header.snapshots_offset
    length = file.length()
    raw, base = b"", position
    for number in range(header.snapshots):
        if position + _ENTRY.size - base > len(raw):
            raw, base = file.read_now(position, _PIECE), position
        if position + _ENTRY.size - base > len(raw):
            raise _damaged(file, f"entry {number} is cut off")
        l1_offset, l1_entries, id_length, name_length, _, _, _, _, extra = _ENTRY.unpack_from(raw, position - base)
        if l1_offset % header.cluster or l1_entries * 8 > _L1_LIMIT or l1_offset + l1_entries * 8 > length:
            raise _damaged(file, f"the L1 table of entry {number} is not where it can be")
        if extra > _EXTRA_LIMIT or position - header.snapshots_offset > _TABLE_LIMIT:
            raise _damaged(file, f"entry {number} is larger than it can be")
        found.append(Snapshot(l1_offset, l1_entries))
        position += _ENTRY.size + extra + id_length + name_length
        position += -position % 8
    return found, position - header.snapshots_offset


def _damaged(file: File, why: str) -> ReplfsError:
    return ReplfsError(
        f"{printable(file.path)}: its snapshot table is damaged: {why}: repair it with qemu-img check -r all", errno.EINVAL
    )
