"""qcow2 overlays, after the specification that QEMU ships as docs/interop/qcow2.txt ("the specification" in this package).

An overlay is version 3 with 64 KiB clusters, extended L2 entries (32 subclusters of 2 KiB) and 16-bit refcounts. Clusters are only
ever appended: nothing moves and nothing is freed until the file is dropped whole. The parts, from the bottom:

* :mod:`~replfs.block.qcow2.header`: the first cluster as a value;
* :mod:`~replfs.block.qcow2.refcounts`: which clusters are in use; gives out new ones;
* :mod:`~replfs.block.qcow2.l2`: where a guest cluster lies; a bounded cache of L2 tables;
* :mod:`~replfs.block.qcow2.image`: the node, which reads and writes;
* :mod:`~replfs.block.qcow2.create`: makes an empty overlay.

**The order of writes** keeps the image free of errors when the process is killed between any two of them: refcounts first, then
what lies in the new clusters, then the entry that points there. At worst clusters are counted and not used (leaked).

**The await-point rule**: from looking an entry up to writing it back nothing suspends, so all metadata I/O is done in place.
Whoever suspends (to read the backing file) looks up again afterwards.
"""
