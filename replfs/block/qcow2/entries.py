"""What L2 entries say, and which ones say what: the format of one entry, without any I/O.

An entry is one 64-bit word, or with extended L2 entries a word and a bitmap (specification, "Standard Cluster Descriptor",
"Extended L2 Entries"). The unit of being held in an image is the *subcluster*: a 32nd of a cluster with extended entries, else
the whole cluster. Here an entry is always two numbers, its word and its bitmap; the second is 0 if there is none.
"""

import array
import enum
import errno
from typing import Final, NamedTuple

from replfs.block.qcow2.compression import descriptor
from replfs.block.qcow2.header import HOST_OFFSET, Header

COPIED: Final = 1 << 63  # "the refcount is exactly one", so it may be written in place
COMPRESSED: Final = 1 << 62
ZERO: Final = 1  # of an entry without a bitmap: "reads as all zeroes"
PLACE: Final = COPIED | COMPRESSED | HOST_OFFSET
"""The bits of an entry that say where its bytes are, and whose they are."""

_ALL_ALLOCATED: Final = 0xFFFF_FFFF
_ALL_ZERO: Final = 0xFFFF_FFFF << 32

NOT_HELD: Final = -1
NOT_SIMPLE: Final = -2


class Kind(enum.Enum):
    """Where a subcluster's bytes are."""

    BACKING = enum.auto()
    ZERO = enum.auto()
    DATA = enum.auto()
    COMPRESSED = enum.auto()


class Range(NamedTuple):
    """Bytes ``start .. stop`` of the disk that are of one kind.

    ``host`` is where DATA lies in the data file, the L2 entry of COMPRESSED, and for ZERO not 0 if it has room kept for it.
    """

    kind: Kind
    start: int
    stop: int
    host: int


class Entries:
    """The entries of one image. ``external``: its clusters lie in a data file, where offset 0 is one like any other."""

    def __init__(self, header: Header, path: str, *, external: bool) -> None:
        self._path = path
        self._version = header.version
        self._external = external
        self._bits = header.cluster_bits
        self._cluster = header.cluster
        self.words: Final = 2 if header.extended else 1
        """64-bit words of an entry in the tables."""
        self.subcluster: Final = header.cluster >> (5 if header.extended else 0)
        """Bytes."""
        self._subcluster_bits = self.subcluster.bit_length() - 1

    # Reading them

    def damaged(self, position: int) -> OSError:
        return OSError(errno.EIO, f"{self._path}: the L2 entry of byte {position} is damaged")

    def split(self, found: list[Range], entry: int, bitmap: int, start: int, stop: int) -> None:
        """Append what an entry says of ``start .. stop``, its cluster or a part of it. Raises OSError (EIO) if it is damaged."""
        host, mask = entry & HOST_OFFSET, self._cluster - 1
        if entry & COMPRESSED:
            if self._external or entry & COPIED or bitmap:
                raise self.damaged(start)
            return found.append(Range(Kind.COMPRESSED, start, stop, entry))
        if host & mask:
            raise self.damaged(start)
        if self.words == 2:
            return self._split_bitmap(found, entry, bitmap, start, stop)
        if entry & ZERO:
            if self._version < 3:
                raise self.damaged(start)
            return extend(found, Kind.ZERO, start, stop, host)
        if host or (self._external and entry & COPIED):
            return extend(found, Kind.DATA, start, stop, host + (start & mask))
        extend(found, Kind.BACKING, start, stop, 0)

    def _split_bitmap(self, found: list[Range], entry: int, bitmap: int, start: int, stop: int) -> None:
        """Bits 0-31 say allocated, 32-63 zero, neither: backing."""
        if not bitmap:
            return extend(found, Kind.BACKING, start, stop, 0)
        base, host = start & -self._cluster, entry & HOST_OFFSET
        if bitmap == _ALL_ZERO:
            return extend(found, Kind.ZERO, start, stop, host)
        has_room = host or (self._external and entry & COPIED)
        if entry & ZERO or bitmap & bitmap >> 32 or (bitmap & _ALL_ALLOCATED and not has_room):
            raise self.damaged(start)
        if bitmap == _ALL_ALLOCATED:
            return extend(found, Kind.DATA, start, stop, host + start - base)
        while start < stop:
            bit = start - base >> self._subcluster_bits
            until = min(stop, base + (bit + 1 << self._subcluster_bits))
            if bitmap >> bit & 1:
                extend(found, Kind.DATA, start, until, host + start - base)
            elif bitmap >> (bit + 32) & 1:
                extend(found, Kind.ZERO, start, until, host)
            else:
                extend(found, Kind.BACKING, start, until, 0)
            start = until

    def alike(self, table: "array.array[int]", at: int, most: int) -> int:
        """How many entries from ``at`` on, ``most`` at most and one at least, say the same of their clusters.

        Which is that all of each is data, one behind the other, or zero, or the backing node's: :meth:`split` may take them as one.
        """
        entry, words = table[at], self.words
        bitmap = table[at + 1] if words == 2 else 0
        if entry & COMPRESSED or (words == 2 and bitmap not in (0, _ALL_ALLOCATED, _ALL_ZERO)):
            return 1
        host = entry & HOST_OFFSET
        step = self._cluster if host or self._external else 0
        most = min(most, (HOST_OFFSET - host >> self._bits) + 1)  # or the next one would not be what it looks like
        count = 1
        while count < most:
            at += words
            entry += step
            if table[at] != entry or (words == 2 and table[at + 1] != bitmap):
                break
            count += 1
        return count

    def place(self, entry: int, bitmap: int, start: int, stop: int) -> int:
        """Where ``start .. stop``, within one cluster, lies in the data file if it is data, and nothing else.

        :data:`NOT_HELD` if the backing node has all of it, :data:`NOT_SIMPLE` if it is anything else, or damaged.
        """
        host = entry & HOST_OFFSET
        if entry & COMPRESSED or host & self._cluster - 1:
            return NOT_SIMPLE
        if self.words == 2:
            if entry & ZERO or bitmap & bitmap >> 32 or (bitmap & _ALL_ALLOCATED and not host):
                return NOT_SIMPLE
            wanted = self.bits(start, stop)
            told = bitmap & (wanted | wanted << 32)
            if told != wanted:
                return NOT_SIMPLE if told else NOT_HELD
        elif entry & ZERO:
            return NOT_SIMPLE
        if host:
            return host + (start & self._cluster - 1)
        return NOT_SIMPLE if entry or bitmap else NOT_HELD

    def bits(self, start: int, stop: int) -> int:
        """The bits of the subclusters that ``start .. stop``, within one cluster, touches."""
        mask, shift = self._cluster - 1, self._subcluster_bits
        return (1 << ((stop - 1 & mask) >> shift) + 1) - (1 << ((start & mask) >> shift))

    def own(self, entry: int) -> bool:
        """Whether an entry has a cluster that is this image's alone."""
        return entry & (COPIED | COMPRESSED) == COPIED and bool(entry & HOST_OFFSET or self._external)

    def leads_to(self, entry: int) -> tuple[int, int]:
        """The clusters of the file that an entry uses: (the first, how many)."""
        if entry & COMPRESSED:
            offset, length = descriptor(entry, self._bits)
            first = offset >> self._bits
            return first, (offset + length - 1 >> self._bits) - first + 1
        return (entry & HOST_OFFSET) >> self._bits, bool(entry & HOST_OFFSET)

    def unit(self, entry: int, bitmap: int, position: int) -> int:
        """Bytes that a write into a part of this byte's cluster has to be made whole to: 1 if it can be done in place."""
        if entry & COMPRESSED:
            return self._cluster
        own = self.own(entry)
        if self.words == 1:
            return 1 if own and not entry & ZERO else self._cluster
        if entry & HOST_OFFSET and not own and bitmap & _ALL_ALLOCATED:
            return self._cluster
        return 1 if own and bitmap >> (position >> self._subcluster_bits & 31) & 1 else self.subcluster

    def holds(self, entry: int, bitmap: int, start: int, stop: int) -> bool:
        """Whether ``start .. stop``, within one cluster, is data that may simply be written over."""
        if entry & (COPIED | COMPRESSED | ZERO) != COPIED or not entry & HOST_OFFSET or entry & HOST_OFFSET & self._cluster - 1:
            return False
        wanted = self.bits(start, stop) if self.words == 2 else 0
        return bitmap & (wanted | wanted << 32) == wanted

    # Making them

    def _bitmap(self, cluster: int, start: int, stop: int) -> int:
        """As :meth:`bits`, of the part of ``start .. stop`` that lies in this cluster."""
        base = cluster << self._bits
        return self.bits(max(start, base), min(stop, base + self._cluster))

    def held(self, old: "array.array[int]", cluster: int, host: int, start: int, stop: int) -> "array.array[int]":
        """What the ``old`` entries, from the disk's ``cluster`` on, become when ``start .. stop`` is data from ``host`` on."""
        size = self._cluster
        if self.words == 1:
            return array.array("Q", [host + i * size | COPIED for i in range(len(old))])
        new = array.array("Q")
        for i in range(0, len(old), 2):
            bits = self._bitmap(cluster + i // 2, start, stop)
            new.append(host + i // 2 * size | COPIED)
            new.append(bits if old[i] & COMPRESSED else (old[i + 1] | bits) & ~(bits << 32))
        return new

    def zeroed(self, old: "array.array[int]", cluster: int, start: int, stop: int, backed: int, keep: bool) -> "array.array[int]":
        """What the ``old`` entries, from the disk's ``cluster`` on, become when ``start .. stop``, in whole subclusters, is zero.

        ``backed``: bytes from the start of the disk that the backing node has; behind it an empty entry says zero already.
        ``keep``: what is this image's alone keeps its room.
        """
        new = old[:]
        for i in range(0, len(old), self.words):
            entry = old[i]
            kept = keep and self.own(entry)
            here = cluster + i // self.words
            unbacked = here << self._bits >= backed
            if self.words == 1:
                if kept:
                    new[i] = entry | ZERO
                elif entry or not unbacked:
                    new[i] = ZERO if self._version >= 3 else 0
            elif entry or old[i + 1] or not unbacked:
                bits = self._bitmap(here, start, stop)
                new[i + 1] = old[i + 1] & ~bits | bits << 32
                if entry & COMPRESSED or not (new[i + 1] & _ALL_ALLOCATED or kept):
                    new[i] = 0
        return new


def extend(found: list[Range], kind: Kind, start: int, stop: int, host: int) -> None:
    """Append a range, or lengthen the last one if it goes on in the same way."""
    if found:
        last = found[-1]
        if last.kind is kind and (last.host + start - last.start == host if kind is Kind.DATA else bool(last.host) == bool(host)):
            found[-1] = Range(kind, last.start, stop, last.host)
            return
    found.append(Range(kind, start, stop, host))
