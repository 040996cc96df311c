"""The overlays of a secondary: empty images over another disk, of a layout that makes small writes cheap.

Version 3, 64 KiB clusters, extended L2 entries (subclusters of 2 KiB), 16-bit refcounts. The file's layout when it is made:
header | refcount table | refcount blocks | L1 table. The refcount table is made as large as the overlay can ever need, so that it
never has to move; that is one cluster for each 16 TiB.
"""

import errno
import struct
from typing import Final

from replfs.block.cache import Cache
from replfs.block.qcow2.header import AUTOCLEAR_JOURNAL, BACKING_NAME_LIMIT, EXTENDED_L2, L1_LIMIT, LARGEST_CLUSTER, SECTOR, Header
from replfs.block.qcow2.image import Image
from replfs.block.qcow2.journal import Journal, half_for
from replfs.block.raw import Raw
from replfs.block.storage import Storage
from replfs.errors import ReplfsError, printable

CLUSTER_BITS: Final = 16
CLUSTER: Final = 1 << CLUSTER_BITS
SUBCLUSTER: Final = CLUSTER // 32
SPAN: Final = CLUSTER // 16 * CLUSTER
"""Bytes of the disk that one L2 table maps."""

_REFCOUNT_ORDER: Final = 4
_PER_BLOCK: Final = CLUSTER // 2


def create_overlay(
    storage: Storage,
    path: str,
    size: int,
    backing_file: str,
    backing_format: str,
    *,
    journal: str | None = None,
    append_only: bool = False,
) -> None:
    """Make ``path`` an empty overlay for a disk of ``size`` bytes, on stable storage; its directory is not synced.

    qcow2 counts whole sectors, so a size that is not a multiple of 512 is rounded up. ``backing_file`` goes into the header as it
    is. ``journal``: the path of a journal that is made for it, and fits what it is to do. Raises OSError, also if there is such a
    file, and ReplfsError for a name that is too long; then no file is left behind.
    """
    length, content = _blank(path, size, backing_file, backing_format, journal is not None)
    file = storage.create(path)
    try:
        file.truncate(length)
        for offset, data in content:
            file.write(offset, data)
        file.sync_now()
        if journal is not None:
            Journal.create(storage, journal, AUTOCLEAR_JOURNAL, half_for(size, append_only=append_only)).file.close()
    except BaseException:
        storage.unlink(path)
        raise
    finally:
        file.close()


def is_blank_overlay(
    storage: Storage,
    path: str,
    size: int,
    backing_file: str,
    backing_format: str,
    *,
    journal: str | None = None,
    append_only: bool = False,
) -> bool:
    """Whether ``path`` is what :meth:`create_overlay` makes, byte for byte; it is on stable storage then."""
    length, content = _blank(path, size, backing_file, backing_format, journal is not None)
    expected = bytearray(length)
    for offset, data in content:
        expected[offset : offset + len(data)] = data
    try:
        file = storage.open(path, writable=True)
        try:
            if file.length() != length or file.read_now(0, length) != expected:
                return False
            file.sync_now()
        finally:
            file.close()
        half = half_for(size, append_only=append_only)
        return journal is None or Journal.is_blank(storage, journal, AUTOCLEAR_JOURNAL, half)
    except (OSError, ReplfsError):
        return False


def _blank(path: str, size: int, backing_file: str, backing_format: str, journaled: bool) -> tuple[int, list[tuple[int, bytes]]]:
    """An empty overlay: (length of the file, [(offset, bytes)]), zeroes elsewhere. Raises ReplfsError."""
    if len(backing_file.encode(errors="surrogateescape")) > BACKING_NAME_LIMIT:
        raise ReplfsError(
            f"{path}: the backing file's name has more than {BACKING_NAME_LIMIT} bytes, which qcow2 cannot hold: {backing_file}"
        )
    size += -size % SECTOR
    l1_entries = -(-size // SPAN)
    if l1_entries * 8 > L1_LIMIT:
        raise ReplfsError(f"a disk of {size} bytes is too large for an overlay, which can be of {L1_LIMIT // 8 * SPAN} bytes")
    l1_clusters = -(-l1_entries * 8 // CLUSTER)
    at_most = 1 + l1_clusters + -(-size // CLUSTER) + l1_entries  # with every cluster of the disk written once
    blocks_at_most = -(-at_most // (_PER_BLOCK - 1)) + 1
    table_clusters = -(-blocks_at_most * 8 // CLUSTER)
    first_block = 1 + table_clusters
    blocks = 1
    while first_block + blocks + l1_clusters > blocks * _PER_BLOCK:
        blocks += 1
    used = first_block + blocks + l1_clusters
    header = Header(
        version=3,
        size=size,
        cluster_bits=CLUSTER_BITS,
        l1_offset=(first_block + blocks) * CLUSTER,
        l1_entries=l1_entries,
        refcount_table_offset=CLUSTER,
        refcount_table_clusters=table_clusters,
        refcount_order=_REFCOUNT_ORDER,
        incompatible=EXTENDED_L2,
        autoclear=AUTOCLEAR_JOURNAL if journaled else 0,
        backing_file=backing_file,
        backing_format=backing_format,
    )
    return used * CLUSTER, [
        (CLUSTER, b"".join(struct.pack(">Q", (first_block + i) * CLUSTER) for i in range(blocks))),
        (first_block * CLUSTER, b"\0\1" * used),
        (header.l1_offset, bytes(l1_entries * 8)),  # with room of its own: a commit is to need none
        (0, header.to_bytes()),
    ]


def open_overlay(storage: Storage, path: str, backing: Raw | Image, cache: Cache) -> Image:
    """Open an overlay over ``backing``, whose size it has (its header's is that, in whole sectors). Raises ReplfsError."""
    try:
        file = storage.open(path, writable=True)
        try:
            header = Header.parse(file.read_now(0, LARGEST_CLUSTER), file.length(), path)
            if header.cluster_bits != CLUSTER_BITS or header.incompatible & ~EXTENDED_L2 != 0 or not header.extended:
                raise ReplfsError(f"{printable(path)} is not an overlay that replfs has made, or is damaged")
            if header.size != backing.size + -backing.size % SECTOR:
                raise ReplfsError(f"{printable(path)} is for a disk of {header.size} bytes, and the disk has {backing.size}")
            return Image(file, header, backing, cache, size=backing.size)
        except BaseException:
            file.close()
            raise
    except OSError as error:
        raise ReplfsError(f"cannot open the overlay {printable(path)}: {error.strerror}", error.errno or errno.EIO) from error
