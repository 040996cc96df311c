"""The qcow2 header and its extensions as a value; bytes from strangers are checked field by field.

Source: the specification, "Header", "Header extensions", "Feature name table", "Bitmaps extension". The limits are QEMU's.
"""

import errno
import struct
from dataclasses import dataclass
from typing import Final

from replfs.errors import ReplfsError, printable

MAGIC: Final = b"QFI\xfb"
SECTOR: Final = 512
LARGEST_CLUSTER: Final = 2 << 20
HOST_OFFSET: Final = 0x00FF_FFFF_FFFF_FE00
"""The bits of an L1 or L2 entry that are an offset in the file."""

DIRTY: Final = 1 << 0
CORRUPT: Final = 1 << 1
DATA_FILE: Final = 1 << 2
COMPRESSION: Final = 1 << 3
EXTENDED_L2: Final = 1 << 4
AUTOCLEAR_BITMAPS: Final = 1 << 0
AUTOCLEAR_RAW_DATA: Final = 1 << 1
AUTOCLEAR_JOURNAL: Final = 1 << 63
"""replfs's own: a journal may have changes that are not in the tables. Whoever else writes to the image clears it, unknowingly."""
JOURNAL_NAME: Final = 0x7FFF_FFFF << 32
"""Bits that say which journal that is, with the one above. An overlay's are zero: its journal is known by the file's name."""

BACKING_NAME_LIMIT: Final = 1023  # the specification's own bound
INCOMPATIBLE_AT: Final = 72
AUTOCLEAR_AT: Final = 88
REFCOUNT_TABLE_AT: Final = 48

_V2: Final = struct.Struct(">4sIQIIQIIQQIIQ")
_V3: Final = struct.Struct(">QQQII")
_V3_LENGTH: Final = 104
_LENGTH_WITH_COMPRESSION: Final = 112
_EXTENSION: Final = struct.Struct(">II")
_BITMAPS: Final = struct.Struct(">IIQQ")
_FEATURE: Final = struct.Struct(">BB46s")
_BACKING_FORMAT: Final = 0xE2792ACA
_FEATURE_NAMES: Final = 0x6803F857
_BITMAPS_EXTENSION: Final = 0x23852875
_DATA_FILE_NAME: Final = 0x44415441

_ENCRYPTION: Final = {1: "AES", 2: "LUKS"}
L1_LIMIT: Final = 32 << 20
REFCOUNT_TABLE_LIMIT: Final = 8 << 20
_SNAPSHOT_LIMIT: Final = 65536
_BITMAP_LIMIT: Final = 65535


@dataclass(frozen=True)
class BitmapDirectory:
    """Where the directory of the persistent bitmaps lies: offset and length in bytes, number of bitmaps."""

    offset: int
    length: int
    count: int


@dataclass(frozen=True, kw_only=True)
class Header:
    """An image's header. Sizes and offsets are in bytes unless the name says otherwise; ``size`` is the virtual disk's."""

    version: int
    size: int
    cluster_bits: int
    l1_offset: int
    l1_entries: int
    refcount_table_offset: int
    refcount_table_clusters: int
    refcount_order: int
    snapshots_offset: int = 0
    snapshots: int = 0
    incompatible: int = 0
    autoclear: int = 0
    compression: int = 0
    backing_file: str = ""
    backing_format: str = ""
    data_file: str = ""
    bitmaps: BitmapDirectory | None = None

    @property
    def cluster(self) -> int:
        return 1 << self.cluster_bits

    @property
    def extended(self) -> bool:
        return bool(self.incompatible & EXTENDED_L2)

    @property
    def l2_bits(self) -> int:
        """An L2 table has ``1 << l2_bits`` entries."""
        return self.cluster_bits - (4 if self.extended else 3)

    @property
    def span_bits(self) -> int:
        """An L2 table maps ``1 << span_bits`` bytes of the disk."""
        return self.cluster_bits + self.l2_bits

    @property
    def raw_data_file(self) -> bool:
        return bool(self.incompatible & DATA_FILE and self.autoclear & AUTOCLEAR_RAW_DATA)

    def to_bytes(self) -> bytes:
        """The first bytes of a new image of version 3 with a backing file; they fit in one cluster."""
        extensions = b"".join(
            _EXTENSION.pack(kind, len(data)) + data + bytes(-len(data) % 8)
            for kind, data in (
                (_BACKING_FORMAT, self.backing_format.encode()),
                (_FEATURE_NAMES, _FEATURE.pack(0, 4, b"extended L2 entries")),
                (0, b""),
            )
        )
        name = self.backing_file.encode(errors="surrogateescape")
        return (
            _V2.pack(
                *(MAGIC, 3, _LENGTH_WITH_COMPRESSION + len(extensions), len(name), self.cluster_bits, self.size, 0),
                *(self.l1_entries, self.l1_offset, self.refcount_table_offset, self.refcount_table_clusters, 0, 0),
            )
            + _V3.pack(self.incompatible, 0, self.autoclear, self.refcount_order, _LENGTH_WITH_COMPRESSION)
            + bytes(_LENGTH_WITH_COMPRESSION - _V3_LENGTH)
            + extensions
            + name
        )

    @classmethod
    def parse(cls, start: bytes, file_length: int, path: str) -> "Header":
        """Read a header from the first :data:`LARGEST_CLUSTER` bytes of a file, or all it has.

        Raises ReplfsError for one that is damaged, or of an image that replfs cannot serve.
        """
        return _Parser(start, file_length, printable(path)).header()


class _Parser:
    def __init__(self, start: bytes, file_length: int, shown: str) -> None:
        self._start = start
        self._file_length = file_length
        self._shown = shown

    def _damaged(self, why: str) -> ReplfsError:
        return ReplfsError(f"{self._shown}: its qcow2 header is damaged: {printable(why)}", errno.EINVAL)

    def _unsupported(self, what: str) -> ReplfsError:
        return ReplfsError(f"{self._shown}: this qcow2 image cannot be used: {printable(what)}", errno.EOPNOTSUPP)

    def header(self) -> Header:
        start = self._start
        if start[:4] != MAGIC:
            raise ReplfsError(f"{self._shown} is not a qcow2 image: if it is a raw disk, say --format raw", errno.EINVAL)
        if len(start) < _V2.size:
            raise self._damaged("the file ends within it")
        _, version, backing_offset, backing_length, cluster_bits, size, encryption, *rest = _V2.unpack_from(start)
        l1_entries, l1_offset, table_offset, table_clusters, snapshots, snapshots_offset = rest
        if version not in (2, 3):
            raise self._unsupported(f"its version is {version}, and 2 and 3 are known")
        if not 9 <= cluster_bits <= 21:
            raise self._damaged(f"clusters of 2 to the {cluster_bits} bytes")
        incompatible = autoclear = compression = 0
        order, length = 4, _V2.size
        if version == 3:
            if len(start) < _V3_LENGTH:
                raise self._damaged("the file ends within it")
            incompatible, _, autoclear, order, length = _V3.unpack_from(start, _V2.size)
            if not _V3_LENGTH <= length <= min(1 << cluster_bits, len(start)):
                raise self._damaged(f"a header of {length} bytes")
            compression = start[_V3_LENGTH] if length > _V3_LENGTH else 0
        if backing_offset and not (
            length <= backing_offset and backing_offset + backing_length <= min(1 << cluster_bits, len(start))
        ):
            raise self._damaged("the backing file's name is not in the first cluster")
        if backing_offset and backing_length > BACKING_NAME_LIMIT:
            raise self._damaged(f"a backing file's name of {backing_length} bytes")
        extensions = self._extensions(length, min(backing_offset or 1 << cluster_bits, len(start)))
        self._check_features(incompatible, extensions.get(_FEATURE_NAMES, b""))
        if encryption:
            raise self._unsupported(
                f"it is encrypted ({_ENCRYPTION.get(encryption, f'method {encryption}')}); decrypt it with qemu-img convert"
            )
        if order > 6:
            raise self._damaged(f"refcounts of 2 to the {order} bits")
        if compression > 1 or bool(incompatible & COMPRESSION) != bool(compression):
            raise self._unsupported(f"its compression type is {compression}")
        if incompatible & EXTENDED_L2 and cluster_bits < 14:
            raise self._damaged("extended L2 entries with clusters of less than 16 KiB")
        header = Header(
            version=version,
            size=size,
            cluster_bits=cluster_bits,
            l1_offset=l1_offset,
            l1_entries=l1_entries,
            refcount_table_offset=table_offset,
            refcount_table_clusters=table_clusters,
            refcount_order=order,
            snapshots_offset=snapshots_offset,
            snapshots=snapshots,
            incompatible=incompatible,
            autoclear=autoclear,
            compression=compression,
            backing_file=start[backing_offset : backing_offset + backing_length].decode(errors="surrogateescape")
            if backing_offset
            else "",
            backing_format=extensions.get(_BACKING_FORMAT, b"").decode(errors="replace"),
            data_file=extensions.get(_DATA_FILE_NAME, b"").decode(errors="surrogateescape") if incompatible & DATA_FILE else "",
            bitmaps=self._bitmaps(extensions, autoclear, cluster_bits),
        )
        self._check_tables(header)
        return header

    def _extensions(self, position: int, end: int) -> dict[int, bytes]:
        found: dict[int, bytes] = {}
        while position + _EXTENSION.size <= end:
            kind, length = _EXTENSION.unpack_from(self._start, position)
            position += _EXTENSION.size
            if kind == 0:
                break
            if length > end - position:
                raise self._damaged("a header extension is cut off")
            found[kind] = self._start[position : position + length]
            position += length + -length % 8
        return found

    def _check_features(self, incompatible: int, table: bytes) -> None:
        unknown = incompatible & ~(DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2)
        names = []
        for bit in range(64):
            if unknown >> bit & 1:
                name = next(
                    (text for kind, number, text in _FEATURE.iter_unpack(table[: len(table) - len(table) % _FEATURE.size])
                     if (kind, number) == (0, bit)), b""
                )  # fmt: skip
                names.append(name.rstrip(b"\0").decode(errors="replace") or f"incompatible feature bit {bit}")
        if names:
            raise self._unsupported(f"it has features that replfs does not know: {', '.join(names)}")

    def _bitmaps(self, extensions: dict[int, bytes], autoclear: int, cluster_bits: int) -> BitmapDirectory | None:
        data = extensions.get(_BITMAPS_EXTENSION)
        if data is None or not autoclear & AUTOCLEAR_BITMAPS:
            return None
        if len(data) != _BITMAPS.size:
            raise self._damaged(f"a bitmaps extension of {len(data)} bytes")
        count, _, length, offset = _BITMAPS.unpack(data)
        if not 0 < count <= _BITMAP_LIMIT or not offset or offset % (1 << cluster_bits) or offset + length > self._file_length:
            raise self._damaged("the directory of the bitmaps is not where it can be")
        return BitmapDirectory(offset, length, count)

    def _check_tables(self, header: Header) -> None:
        if header.size % SECTOR:
            raise self._damaged(f"a disk of {header.size} bytes, which is not a multiple of {SECTOR}")
        if header.l1_entries * 8 > L1_LIMIT or header.size >= 1 << 63:
            raise self._unsupported(f"a disk of {header.size} bytes with an L1 table of {header.l1_entries} entries is too large")
        if header.l1_entries < -(-header.size >> header.span_bits):
            raise self._damaged(f"an L1 table of {header.l1_entries} entries is too small for a disk of {header.size} bytes")
        if header.refcount_table_clusters << header.cluster_bits > REFCOUNT_TABLE_LIMIT:
            raise self._unsupported(f"its refcount table of {header.refcount_table_clusters} clusters is too large")
        if header.snapshots > _SNAPSHOT_LIMIT:
            raise self._unsupported(f"it has {header.snapshots} snapshots")
        for name, offset, length in (
            ("L1 table", header.l1_offset, header.l1_entries * 8),
            ("refcount table", header.refcount_table_offset, header.refcount_table_clusters << header.cluster_bits),
            ("snapshot table", header.snapshots_offset, header.snapshots),
        ):
            if length and (not offset or offset % header.cluster or offset + length > self._file_length):
                raise self._damaged(f"the {name} at {offset} is not where it can be")
        if not header.refcount_table_clusters:
            raise self._damaged("it has no refcount table")
        if header.incompatible & DATA_FILE and not header.data_file:
            raise self._damaged("its external data file is not named")
        if header.incompatible & DATA_FILE and header.snapshots:
            raise self._damaged("snapshots together with an external data file")
