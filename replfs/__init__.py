"""replfs: the replication of QEMU's COLO, for any disk image, as a mounted file."""

__version__ = "0.1.0"
