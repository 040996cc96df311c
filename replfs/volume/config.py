"""What the command line asks of a volume."""

from dataclasses import dataclass
from pathlib import Path

from replfs.block.replication.rules import Mode
from replfs.protocol.nbd.uri import Address, Target


@dataclass(frozen=True, kw_only=True)
class Config:
    """One volume's settings; paths are absolute."""

    mode: Mode
    disk: Path
    mountpoint: Path
    state_dir: Path
    name: str
    start: bool
    stop_on_unmount: bool
    durability: str
    cache_size: int
    """Bytes of metadata that are kept in memory."""
    allow_backing: tuple[Path, ...] = ()
    listen: Address | None = None
    export: str = "disk"
    target: Target | None = None


@dataclass(frozen=True, kw_only=True)
class MountConfig:
    """How the file is mounted: FUSE options, and the file's owner and permission bits."""

    options: tuple[str, ...]
    uid: int
    gid: int
    mode: int
    read_only: bool
