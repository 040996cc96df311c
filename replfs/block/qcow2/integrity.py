"""What keeps a damaged image from getting worse: which clusters of the file are metadata, and the corrupt bit.

The guest's data is only ever written to clusters that are not metadata. Where a table says otherwise the image is damaged: that is
logged, the corrupt bit is set as QEMU does, and from then on nothing is written to the image any more. Reading goes on.

Known metadata is all that the header leads to but the L2 tables of snapshots and the contents of bitmaps, as in QEMU's default.
"""

import errno
import logging
import struct
from typing import Final

from pyroaring import BitMap64

from replfs.block.file import File
from replfs.block.qcow2.header import AUTOCLEAR_AT, CORRUPT, INCOMPATIBLE_AT, Header
from replfs.errors import printable

logger = logging.getLogger(__name__)

_BITS: Final = struct.Struct(">Q")


class Integrity:
    """Of one image that is open for writing. Clusters are counted from the start of the file."""

    def __init__(self, file: File, header: Header) -> None:
        self._file = file
        self._bits = header.cluster_bits
        self._version = header.version
        self._incompatible = header.incompatible
        self._autoclear = header.autoclear
        self._all = BitMap64()
        self._kinds: dict[str, BitMap64] = {}
        self._suspicion = ""  # damage that opening has found
        self.damage = ""
        """Why nothing may be written any more, empty if all may."""

    # Metadata

    def survey(self, kind: str, offset: int, length: int) -> None:
        """Note metadata that the image has when it is opened, in bytes. Where it overlaps, the first attempt to write will tell."""
        self._note(kind, _clusters(range(offset >> self._bits, -(-(offset + length) >> self._bits))))

    def survey_table(self, kind: str, offsets: list[int], *, shared: bool = False) -> None:
        """Note the clusters at these offsets, as a table has them: one that is 0, not aligned, or behind the file's end is none.

        ``shared``: they are copied before they are written to, so they may be used elsewhere too.
        """
        size, end = 1 << self._bits, self._file.length()
        new = [offset >> self._bits for offset in offsets if offset and not offset & size - 1 and offset < end]
        clusters = BitMap64(new)
        if shared:
            clusters -= self._all
        elif len(clusters) != len(new) and not self._suspicion:
            self._suspicion = f"one {kind} overlaps another"
        self._note(kind, clusters)

    def _note(self, kind: str, new: BitMap64) -> None:
        if not self._suspicion and not new.isdisjoint(self._all):
            self._suspicion = f"the {kind} overlaps the {self._kind(min(new & self._all))}"
        self._all |= new
        self._kinds.setdefault(kind, BitMap64()).update(new)

    def add(self, kind: str, clusters: range) -> None:
        """Note that clusters are metadata. Raises OSError (EIO): some are already, so the image is damaged."""
        new = _clusters(clusters)
        if not new.isdisjoint(self._all):
            raise self.damaged(f"the {kind} overlaps the {self._kind(min(new & self._all))}")
        self._all |= new
        self._kinds.setdefault(kind, BitMap64()).update(new)

    def remove(self, kind: str, clusters: range) -> None:
        """Note that clusters are no longer metadata of this kind. Those that are of another stay what they are."""
        old = _clusters(clusters) & self._kinds[kind]
        self._all -= old
        self._kinds[kind] -= old

    def is_metadata(self, cluster: int) -> bool:
        return cluster in self._all

    def forbids(self, cluster: int, count: int = 1) -> bool:
        """Whether data may not be written to the clusters: what :meth:`check_writable` and :meth:`check_data` raise for."""
        metadata = cluster in self._all if count == 1 else self._all.range_cardinality(cluster, cluster + count)
        return bool(metadata or self.damage or self._suspicion)

    def check_data(self, cluster: int, count: int) -> None:
        """Raises OSError (EIO), and the image is marked corrupt, if one of the clusters is metadata."""
        if (cluster in self._all) if count == 1 else self._all.range_cardinality(cluster, cluster + count):
            first = next(c for c in range(cluster, cluster + count) if c in self._all)
            raise self.damaged(f"data would overwrite the {self._kind(first)}")

    def _kind(self, cluster: int) -> str:
        return next(kind for kind, clusters in self._kinds.items() if cluster in clusters)

    # Health

    def damaged(self, why: str) -> OSError:
        """Set the corrupt bit; gives back the error that whoever found the damage is to raise."""
        if not self.damage:
            self.damage = why
            logger.error(
                "%s is corrupt: %s; nothing is written to it any more: unmount it and repair it with qemu-img check -r all",
                printable(self._file.path),
                why,
            )
            if self._version >= 3:
                try:
                    self._file.write(INCOMPATIBLE_AT, _BITS.pack(self._incompatible | CORRUPT))
                except OSError as error:
                    logger.error("%s could not be marked corrupt: %s", printable(self._file.path), error)
        return OSError(errno.EIO, f"{self._file.path} is corrupt: {why}")

    def check_writable(self) -> None:
        """Raises OSError (EIO) once the image is known to be corrupt."""
        if self._suspicion and not self.damage:
            raise self.damaged(self._suspicion)
        if self.damage:
            raise OSError(errno.EIO, f"{self._file.path} is corrupt and read-only: {self.damage}")

    def set_autoclear(self, bits: int) -> None:
        """Set the autoclear bits, on stable storage: what the others vouch for is not kept up from now on. Raises OSError."""
        if self._autoclear != bits:
            self._file.write_durably(AUTOCLEAR_AT, _BITS.pack(bits))
            self._autoclear = bits


def _clusters(clusters: range) -> BitMap64:
    found = BitMap64()
    found.add_range(clusters.start, clusters.stop)
    return found
