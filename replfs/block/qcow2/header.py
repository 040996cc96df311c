"""The qcow2 header and its extensions as a value; bytes from strangers are checked field by field."""

import errno
import struct
from dataclasses import dataclass
from typing import Final

from replfs.errors import ReplfsError, printable

MAGIC: Final = b"QFI\xfb"
CLUSTER_BITS: Final = 16
CLUSTER: Final = 1 << CLUSTER_BITS
SUBCLUSTER_BITS: Final = CLUSTER_BITS - 5
SUBCLUSTER: Final = 1 << SUBCLUSTER_BITS
SECTOR: Final = 512
L2_ENTRIES: Final = CLUSTER // 16
SPAN: Final = L2_ENTRIES * CLUSTER
"""Bytes of the disk that one L2 table maps."""

INCOMPATIBLE_EXTENDED_L2: Final = 1 << 4
REFCOUNT_ORDER: Final = 4  # 16-bit refcounts
BACKING_NAME_LIMIT: Final = 1023  # the specification's own bound

_FIELDS: Final = struct.Struct(">4sIQIIQIIQQIIQQQQIIB7x")
_EXTENSION: Final = struct.Struct(">II")
_BACKING_FORMAT: Final = 0xE2792ACA
_FEATURE_NAMES: Final = 0x6803F857


@dataclass(frozen=True)
class Header:
    """An overlay's header. Sizes and offsets are in bytes unless the name says otherwise; ``size`` is the virtual disk's."""

    size: int
    l1_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    backing_file: str
    backing_format: str

    @property
    def l1_entries(self) -> int:
        return -(-self.size // SPAN)

    def to_bytes(self) -> bytes:
        """The bytes from the start of the file on, which fit in one cluster."""
        extensions = b"".join(
            _EXTENSION.pack(kind, len(data)) + data + bytes(-len(data) % 8)
            for kind, data in (
                (_BACKING_FORMAT, self.backing_format.encode()),
                (_FEATURE_NAMES, struct.pack(">BB46s", 0, 4, b"extended L2 entries")),
                (0, b""),
            )
        )
        name = self.backing_file.encode(errors="surrogateescape")
        fields = _FIELDS.pack(
            *(MAGIC, 3, _FIELDS.size + len(extensions), len(name), CLUSTER_BITS, self.size, 0),
            *(self.l1_entries, self.l1_offset, self.refcount_table_offset, self.refcount_table_clusters, 0, 0),
            *(INCOMPATIBLE_EXTENDED_L2, 0, 0, REFCOUNT_ORDER, _FIELDS.size, 0),
        )
        return fields + extensions + name

    @classmethod
    def parse(cls, start: bytes, file_length: int, path: str) -> "Header":
        """Read an overlay's header from the first cluster of its file. Raises ReplfsError for anything but a sound one of ours."""

        def refuse(why: str) -> ReplfsError:
            return ReplfsError(f"{path}: not an overlay that replfs can use: {printable(why)}", errno.EINVAL)

        if len(start) < _FIELDS.size or start[:4] != MAGIC:
            raise refuse("it has no qcow2 header")
        fields = _FIELDS.unpack_from(start)
        _, version, backing_offset, backing_size, cluster_bits, size, encryption, l1_entries, l1_offset = fields[:9]
        table_offset, table_clusters = fields[9:11]
        wanted = (0, 0, INCOMPATIBLE_EXTENDED_L2, 0, 0, REFCOUNT_ORDER, _FIELDS.size, 0)  # from the snapshots' number on
        if (version, cluster_bits, encryption, *fields[11:]) != (3, CLUSTER_BITS, 0, *wanted):
            raise refuse("it has options that overlays made by replfs do not have")
        if size == 0 or size % SECTOR or l1_entries != -(-size // SPAN):
            raise refuse(f"its size, {size} bytes, or its L1 table's, {l1_entries} entries, is wrong")
        for name, offset, clusters in (
            ("L1", l1_offset, -(-l1_entries * 8 // CLUSTER)),
            ("refcount", table_offset, table_clusters),
        ):
            if offset == 0 or offset % CLUSTER or clusters == 0 or offset + clusters * CLUSTER > file_length:
                raise refuse(f"its {name} table at {offset} is not where it can be")
        if not _FIELDS.size < backing_offset <= len(start) - backing_size or backing_size > BACKING_NAME_LIMIT or not backing_size:
            raise refuse("it names no backing file")
        backing_file = start[backing_offset : backing_offset + backing_size].decode(errors="surrogateescape")
        return cls(size, l1_offset, table_offset, table_clusters, backing_file, _backing_format(start[:backing_offset]))


def _backing_format(start: bytes) -> str:
    position = _FIELDS.size
    while position + _EXTENSION.size <= len(start):
        kind, length = _EXTENSION.unpack_from(start, position)
        position += _EXTENSION.size
        if kind == _BACKING_FORMAT:
            return start[position : position + length].decode(errors="replace")
        if kind == 0:
            break
        position += length + -length % 8
    return ""
