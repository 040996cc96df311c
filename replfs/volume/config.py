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
    mountpoint: Path | None
    """None: there is no mount."""
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
    view_listen: Address | None = None
    """Where the view is served over NBD."""
    qmp: Address | None = None
    """Where QMP is spoken."""
    plaintext: bool = False
    """Addresses beyond this machine are allowed."""
    target: Target | None = None
    protocol: str = "async"
    timeout: float = 10.0
    """Seconds after which a silent other side is given up."""
    window: int = 64 << 20
    """Bytes that may be on their way to the other side before writers wait."""
    resync_rate: int = 0
    """Bytes a second, 0 for no limit."""
    initial_sync: str = "full"
    discard_remote: bool = False
    checkpoint_every: float = 0.0
    """Seconds, 0 for never."""
    checkpoint_before: str = ""
    checkpoint_after: str = ""


@dataclass(frozen=True, kw_only=True)
class MountConfig:
    """How the file is mounted: FUSE options, and the file's owner and permission bits."""

    options: tuple[str, ...]
    uid: int
    gid: int
    mode: int
    read_only: bool
