"""The replication filter, for both modes, after QEMU's block/replication.c."""
