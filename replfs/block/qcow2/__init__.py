"""qcow2 images, after the specification that QEMU ships as docs/interop/qcow2.txt ("the specification" in this package).

The parts, from the bottom:

* :mod:`~replfs.block.qcow2.header`: the first cluster as a value;
* :mod:`~replfs.block.qcow2.integrity`: which clusters are metadata; the corrupt bit;
* :mod:`~replfs.block.qcow2.refcounts`: which clusters are in use; gives out new ones;
* :mod:`~replfs.block.qcow2.entries`: what an L2 entry says;
* :mod:`~replfs.block.qcow2.l2`: where a cluster of the disk lies; a bounded cache of L2 tables;
* :mod:`~replfs.block.qcow2.compression`, ``snapshots``, ``bitmaps``: what else an image may hold;
* :mod:`~replfs.block.qcow2.repair`: refcounts for an image that was left dirty;
* :mod:`~replfs.block.qcow2.image`: the node, which reads and writes;
* :mod:`~replfs.block.qcow2.overlay`: makes and opens a secondary's overlays.

**The order of writes** keeps the image free of errors when the process is killed between any two of them: refcounts that grow
first, then what lies in the new clusters, then the entry that points there, refcounts that shrink last. At worst clusters are
counted and not used (leaked).

**The await-point rule**: from looking an entry up to writing it back nothing suspends, so all metadata I/O is done in place.
Whoever suspends looks up again afterwards.
"""
