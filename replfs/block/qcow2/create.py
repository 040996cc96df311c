"""Making an empty overlay.

The file's layout: header | refcount table | refcount blocks | L1 table. The refcount table is made as large as the overlay can
ever need, so that it never has to move; that is one cluster for each 16 TiB.
"""

import os
import struct

from replfs.block.qcow2.header import BACKING_NAME_LIMIT, CLUSTER, SECTOR, SPAN, Header
from replfs.block.qcow2.refcounts import PER_BLOCK
from replfs.errors import ReplfsError


def create(path: str, size: int, backing_file: str, backing_format: str) -> None:
    """Make ``path`` an empty overlay for a disk of ``size`` bytes, on stable storage; its directory is not synced.

    qcow2 counts whole sectors, so a size that is not a multiple of 512 is rounded up. ``backing_file`` goes into the header as it
    is. Raises OSError, also if there is such a file, and ReplfsError for a name that is too long; then no file is left behind.
    """
    if len(backing_file.encode(errors="surrogateescape")) > BACKING_NAME_LIMIT:
        raise ReplfsError(
            f"{path}: the backing file's name has more than {BACKING_NAME_LIMIT} bytes, which qcow2 cannot hold: {backing_file}"
        )
    size += -size % SECTOR
    l1_clusters = -(-(-(-size // SPAN) * 8) // CLUSTER)
    data_clusters = -(-size // CLUSTER)
    at_most = 1 + l1_clusters + data_clusters + -(-size // SPAN)  # with every cluster of the disk written once
    blocks_at_most = -(-at_most // (PER_BLOCK - 1)) + 1
    table_clusters = -(-blocks_at_most * 8 // CLUSTER)
    first_block = 1 + table_clusters
    blocks = 1
    while first_block + blocks + l1_clusters > blocks * PER_BLOCK:
        blocks += 1
    used = first_block + blocks + l1_clusters
    header = Header(size, (first_block + blocks) * CLUSTER, CLUSTER, table_clusters, backing_file, backing_format)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, used * CLUSTER)
        os.pwrite(fd, b"".join(struct.pack(">Q", (first_block + i) * CLUSTER) for i in range(blocks)), CLUSTER)
        os.pwrite(fd, b"\0\1" * used, first_block * CLUSTER)
        os.pwrite(fd, header.to_bytes(), 0)
        os.fsync(fd)
    except BaseException:
        os.unlink(path)
        raise
    finally:
        os.close(fd)
