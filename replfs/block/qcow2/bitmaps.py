"""Persistent bitmaps: what replfs does not keep up, and so has to drop when it writes (specification, "Bitmaps").

Clearing their autoclear bit makes them invalid, as the specification asks. Their clusters would be leaked then, so they are freed;
but only if nothing about them is doubtful.
"""

import struct
from typing import Final

from replfs.block.file import File
from replfs.block.qcow2.header import HOST_OFFSET, BitmapDirectory
from replfs.block.qcow2.words import to_words

_ENTRY: Final = struct.Struct(">QIIBBHI")
_DIRECTORY_LIMIT: Final = 1 << 20
_CLUSTERS_LIMIT: Final = 1 << 17
_TABLE_LIMIT: Final = 1 << 17  # entries, each for a whole cluster of bits


def clusters(file: File, directory: BitmapDirectory, cluster_bits: int) -> tuple[range, list[int]] | None:
    """The clusters of the directory, and those of the bitmaps' tables and data; None if it is doubtful. Raises OSError."""
    if directory.length > _DIRECTORY_LIMIT:
        return None
    size = 1 << cluster_bits
    raw = file.read_now(directory.offset, directory.length)
    length = file.length()
    found: list[int] = []
    position = 0
    for _ in range(directory.count):
        if position + _ENTRY.size > len(raw):
            return None
        table, entries, _, _, _, name_length, extra = _ENTRY.unpack_from(raw, position)
        position += _ENTRY.size + extra + name_length
        position += -position % 8
        if table % size or entries > _TABLE_LIMIT or table + entries * 8 > length or len(found) > _CLUSTERS_LIMIT:
            return None
        found += range(table >> cluster_bits, -(-(table + entries * 8) >> cluster_bits))
        for entry in to_words(file.read_now(table, entries * 8)):
            if entry & HOST_OFFSET:
                if entry & HOST_OFFSET & size - 1:
                    return None
                found.append((entry & HOST_OFFSET) >> cluster_bits)
    return range(directory.offset >> cluster_bits, -(-(directory.offset + directory.length) >> cluster_bits)), found
