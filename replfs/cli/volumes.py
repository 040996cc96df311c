"""The commands that mount: arguments into a volume's configuration."""

import grp
import os
import pwd
from collections.abc import Callable
from typing import Any

import click

from replfs.block.replication.rules import Mode
from replfs.cli.arguments import Parsed, absolute, absolute_address, size
from replfs.control import NOWHERE
from replfs.errors import ReplfsError
from replfs.protocol.nbd.uri import Address, Target, is_local, parse_address, parse_uri
from replfs.volume.config import Config, MountConfig
from replfs.volume.disk import resolve

_FUSE_OPTIONS = frozenset(
    (
        *("allow_other", "allow_root", "ro", "rw", "suid", "nosuid", "dev", "nodev", "exec", "noexec", "atime", "noatime"),
        *("sync", "async", "dirsync", "default_permissions"),
    )
)
_FUSE_OPTIONS_WITH_VALUE = frozenset(("fsname", "subtype", "context"))
_NO_MOUNT = "none"


def _file_name(text: str) -> str:
    if not text or "/" in text or text in (".", "..") or len(os.fsencode(text)) > 255:
        raise ReplfsError(f"{text!r} cannot be a file's name")
    return text


def _mode_bits(text: str) -> int:
    bits = int(text, 8) if text.isdigit() and text.isascii() and not set(text) & set("89") else -1
    if not 0 <= bits <= 0o777:
        raise ReplfsError(f"{text!r} is not a mode like 0600")
    return bits


def _seconds(text: str) -> float:
    found = float(text)
    if not 0.1 <= found <= 86400:
        raise ReplfsError(f"{text} is not between 0.1 and 86400")
    return found


def _identifier(look_up: Callable[[str], int]) -> Callable[[str], int]:
    def parse(text: str) -> int:
        number = int(text) if text.isdigit() and text.isascii() else look_up(text)
        if number >= 1 << 32:
            raise ReplfsError(f"{text} is too large")
        return number

    return parse


def _options(values: tuple[str, ...]) -> tuple[str, ...]:
    options = tuple(option for value in values for option in value.split(",") if option)
    for option in options:
        name, equals, _ = option.partition("=")
        if name not in (_FUSE_OPTIONS_WITH_VALUE if equals else _FUSE_OPTIONS):
            raise click.BadParameter(f"{option!r} is not a FUSE mount option that replfs knows", param_hint="'-o'")
    return options


def _volume_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that both sides have."""
    for option in reversed(
        (
            click.argument("disk", type=click.Path(path_type=str)),
            click.argument("mountpoint", type=click.Path(path_type=str)),
            click.option(
                "--format",
                "disk_format",
                type=click.Choice(["raw", "qcow2"]),
                help="The disk's format. Default: raw, but a disk that looks like qcow2 is refused until a format is named.",
            ),
            click.option(
                "--allow-backing",
                multiple=True,
                type=click.Path(exists=True, path_type=str),
                metavar="PATH",
                help="A file, or a directory with all below it, that a qcow2 DISK may name as its backing or data file."
                " It may name those in its own directory anyway, but for hidden ones. Repeatable.",
            ),
            click.option(
                "--cache-size",
                type=Parsed("size", size),
                default="32M",
                show_default=True,
                help="Memory for the metadata of qcow2 images, the overlays' too. Takes K, M, G, T.",
            ),
            click.option(
                "--name",
                type=Parsed("name", _file_name),
                default="disk.img",
                show_default=True,
                help="The file's name in the mount.",
            ),
            click.option(
                "--state-dir",
                metavar="DIR",
                help="Where the volume's state lives, and a secondary's two overlays; each can grow to the size of the disk."
                " Default: DISK.replfs; a block device needs it named.",
            ),
            click.option("-f", "--foreground", is_flag=True, help="Stay in the foreground and log to standard error."),
            click.option(
                "-o", "fuse_options", multiple=True, metavar="OPT[,OPT...]", help="FUSE mount options: allow_other, ro, and others."
            ),
            click.option(
                "--uid",
                type=Parsed("user", _identifier(lambda name: pwd.getpwnam(name).pw_uid)),
                help="The file's owner. Default: you.",
            ),
            click.option(
                "--gid",
                type=Parsed("group", _identifier(lambda name: grp.getgrnam(name).gr_gid)),
                help="The file's group. Default: yours.",
            ),
            click.option(
                "--mode", "file_mode", type=Parsed("mode", _mode_bits), default="0600", show_default=True, help="The file's mode."
            ),
            click.option(
                "--no-start",
                is_flag=True,
                help="Mount with stage none. A secondary that was running forgets its overlays, and with them what its own machine"
                " wrote since the last checkpoint; a primary does not forward, and forgets its error: make the copies equal before"
                " the next start. Default: start, or resume what was going on at the last unmount.",
            ),
            click.option(
                "--stop-on-unmount",
                is_flag=True,
                help="Stop replication at unmount, as QEMU does. Default: keep the state, and resume it at the next mount.",
            ),
            click.option(
                "--durability",
                type=click.Choice(["power", "process"]),
                default="power",
                show_default=True,
                help="What is promised after a crash. power: what was flushed or checkpointed outlives a power cut. process: only"
                " killing the process loses nothing.",
            ),
            click.option(
                "--view-listen",
                type=Parsed("address", parse_address),
                metavar="ADDRESS",
                help="Serve what the file shows over NBD, too, as the export view: with discards, zeroing and block status."
                " It needs no mount: none as MOUNTPOINT.",
            ),
            click.option(
                "--qmp",
                type=Parsed("address", parse_address),
                metavar="ADDRESS",
                help="Speak QEMU's machine protocol there, for a COLO manager. Whoever can connect can control: use a unix socket.",
            ),
            click.option(
                "--plaintext", is_flag=True, help="Allow an address beyond this machine, without TLS: for networks that you trust."
            ),
        )
    ):
        command = option(command)
    return command


@click.command("secondary", short_help="Mount the copy of a disk that takes over.")
@_volume_options
@click.option(
    "--listen",
    type=Parsed("address", lambda text: None if text == NOWHERE else parse_address(text)),
    default="127.0.0.1:10809",
    show_default=True,
    metavar="ADDRESS",
    help="Where the primary connects to: HOST:PORT, [IPV6]:PORT or unix:PATH; or none, until user.replfs.listen or QMP says where.",
)
@click.option(
    "--export", default="disk", show_default=True, metavar="NAME", help="The NBD export's name; the empty name answers too."
)
def secondary(listen: Address | None, export: str, plaintext: bool, **options: Any) -> None:
    """Mount DISK, this machine's copy, at MOUNTPOINT, and listen for the primary's writes.

    The file shows the disk as it was at the last checkpoint, plus what is written to the file itself. What the primary forwards
    goes into DISK, and shows at the next checkpoint. After a failover the file goes on as it is, and DISK becomes the same.
    """
    if len(export.encode()) > 4096:
        raise click.BadParameter("an export's name has at most 4096 bytes", param_hint="'--export'")
    _serve(Mode.SECONDARY, plaintext=plaintext, listen=_local(listen, plaintext, "--listen"), export=export, **options)


@click.command("primary", short_help="Mount the disk that is in use, and forward its writes.")
@_volume_options
@click.option(
    "--target",
    type=Parsed("NBD-URI", parse_uri),
    required=True,
    metavar="NBD-URI",
    help="The secondary: nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH. Any NBD server can be one.",
)
@click.option(
    "--protocol",
    type=click.Choice(["async", "sync"]),
    default="async",
    show_default=True,
    help="async: a write is answered when DISK has it. sync: when the secondary has it, too, as long as there is a link; and an"
    " fsync is answered when it is on stable storage on both sides.",
)
@click.option(
    "--timeout",
    type=Parsed("number of seconds", _seconds),
    default="10",
    show_default=True,
    metavar="SECONDS",
    help="How long the secondary may be silent before the link is given up, and tried anew.",
)
@click.option(
    "--window",
    type=Parsed("size", size),
    default="64M",
    show_default=True,
    help="How much may be on its way to the secondary before writers have to wait. Takes K, M, G, T.",
)
@click.option(
    "--resync-rate",
    type=Parsed("size", size),
    default=0,
    metavar="SIZE",
    help="Bytes a second that a resync may take. Default: no limit.",
)
@click.option(
    "--initial-sync",
    type=click.Choice(["full", "verify", "none"]),
    default="full",
    show_default=True,
    help="How a secondary that is new gets its content. full: all that is not zero is sent. verify: both disks are read, and what"
    " differs is sent. none: nothing; they are the same, you say. One that is known gets what it lacks.",
)
@click.option(
    "--discard-remote",
    is_flag=True,
    help="Overwrite the secondary's disk even if it is newer than this one, has diverged from it, or was never a copy of it.",
)
@click.option(
    "--checkpoint-every",
    type=Parsed("number of seconds", _seconds),
    default=0.0,
    metavar="SECONDS",
    help="Have the secondary take a checkpoint so often. Default: only when it is asked for.",
)
@click.option(
    "--checkpoint-before",
    metavar="COMMAND",
    default="",
    help="A shell command that is run before each checkpoint, to freeze the guest's file system for example. If it fails, there is"
    " no checkpoint.",
)
@click.option(
    "--checkpoint-after",
    metavar="COMMAND",
    default="",
    help="A shell command that is run after each checkpoint, also a failed one.",
)
def primary(target: Target, plaintext: bool, **options: Any) -> None:
    """Mount DISK at MOUNTPOINT; what is written to the file goes to DISK and to the secondary.

    Both disks must have the same size. What the secondary lacks is sent, at first and after each time that there was no link.
    """
    _check_local(target.address, plaintext, "--target")
    _serve(Mode.PRIMARY, plaintext=plaintext, target=absolute(target), **options)


def _check_local(address: Address, plaintext: bool, option: str) -> None:
    if not plaintext and not is_local(address):
        raise click.BadParameter(
            f"{address} is beyond this machine, and the data would go there unencrypted: use a tunnel, or add --plaintext",
            param_hint=f"'{option}'",
        )


def _local(address: Address | None, plaintext: bool, option: str) -> Address | None:
    """An address that may be listened on, as the daemon finds it."""
    if address is None:
        return None
    _check_local(address, plaintext, option)
    return absolute_address(address)


def _serve(
    mode: Mode,
    *,
    disk: str,
    mountpoint: str,
    disk_format: str | None,
    name: str,
    state_dir: str | None,
    foreground: bool,
    fuse_options: tuple[str, ...],
    uid: int | None,
    gid: int | None,
    file_mode: int,
    no_start: bool,
    stop_on_unmount: bool,
    durability: str,
    allow_backing: tuple[str, ...],
    view_listen: Address | None,
    qmp: Address | None,
    plaintext: bool,
    **side: Any,
) -> None:
    from replfs import daemon  # with pyfuse3, which control commands can do without

    options = _options(fuse_options)
    point = resolve(mountpoint) if mountpoint != _NO_MOUNT else None
    if point is None and view_listen is None:
        raise click.UsageError(f"{_NO_MOUNT} as MOUNTPOINT needs --view-listen", click.get_current_context())
    if point is None and options:
        raise click.UsageError("-o needs a mount", click.get_current_context())
    view_listen = _local(view_listen, plaintext, "--view-listen")
    qmp = _local(qmp, plaintext, "--qmp")
    addresses = [address for address in (side.get("listen"), view_listen, qmp) if address is not None]
    for address in addresses:
        if addresses.count(address) > 1 and getattr(address, "port", -1) != 0:
            raise click.UsageError(f"{address} is to be listened on for two things", click.get_current_context())
    path = resolve(disk)
    if state_dir is None:
        if path.is_block_device():
            raise click.UsageError("a block device needs --state-dir", click.get_current_context())
        state_dir = f"{path}.replfs"
    for text in (path, point, resolve(state_dir), name, side.get("listen"), view_listen, qmp):
        if any("\udc80" <= character <= "\udcff" for character in str(text)):
            raise click.UsageError(f"{str(text)!r} is not UTF-8, which the status could not show", click.get_current_context())
    config = Config(
        mode=mode,
        disk=path,
        mountpoint=point,
        state_dir=resolve(state_dir),
        name=name,
        start=not no_start,
        stop_on_unmount=stop_on_unmount,
        durability=durability,
        allow_backing=tuple(resolve(allowed) for allowed in allow_backing),
        view_listen=view_listen,
        qmp=qmp,
        plaintext=plaintext,
        **side,
    )
    mount = MountConfig(
        options=options,
        uid=os.getuid() if uid is None else uid,
        gid=os.getgid() if gid is None else gid,
        mode=file_mode,
        read_only="ro" in options,
    )
    daemon.run(config, disk_format, mount, foreground=foreground)
