"""Compressed clusters: raw deflate or zstd, each a cluster of the disk (specification, "Compressed Clusters Descriptor")."""

import errno
import io
import zlib
from typing import Final

import zstandard

_ZSTD_WINDOW: Final = 8 << 20  # a cluster is 2 MiB at most: more would only be memory that a stranger's image asks for


def descriptor(entry: int, cluster_bits: int) -> tuple[int, int]:
    """Where a compressed cluster lies in the file: (offset, length), in bytes; the length may be up to 511 bytes too many."""
    bits = 62 - (cluster_bits - 8)
    offset = entry & (1 << bits) - 1
    sectors = (entry >> bits & (1 << cluster_bits - 8) - 1) + 1
    return offset, sectors * 512 - offset % 512


def decompress(kind: int, data: bytes, size: int) -> bytes:
    """The ``size`` bytes of a cluster; ``kind`` is the header's compression type. Raises OSError (EIO): the data is damaged."""
    try:
        if kind == 0:
            plain = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size)
        else:
            plain = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).stream_reader(io.BytesIO(data)).read(size)
    except (zlib.error, zstandard.ZstdError) as error:
        raise OSError(errno.EIO, f"a compressed cluster is damaged: {error}") from error
    if len(plain) != size:
        raise OSError(errno.EIO, f"a compressed cluster holds {len(plain)} bytes, not {size}")
    return plain
