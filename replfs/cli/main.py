"""The commands: arguments into a volume's configuration, or into a control attribute, and errors into one line.

Control commands know nothing of volumes: they set and get extended attributes, as setfattr and getfattr do.
"""

import errno
import grp
import os
import pwd
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

import click
import msgspec

import replfs
from replfs.block.replication.rules import Mode, Stage
from replfs.cli.status import show
from replfs.errors import ReplfsError, printable
from replfs.protocol.nbd.uri import Address, Target, UnixAddress, is_local, parse_address, parse_uri
from replfs.volume.config import Config, MountConfig
from replfs.volume.disk import resolve

_FUSE_OPTIONS = frozenset(
    (
        *("allow_other", "allow_root", "ro", "rw", "suid", "nosuid", "dev", "nodev", "exec", "noexec", "atime", "noatime"),
        *("sync", "async", "dirsync", "default_permissions"),
    )
)
_FUSE_OPTIONS_WITH_VALUE = frozenset(("max_read", "fsname", "subtype", "context"))
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SMALLEST_CACHE = 1 << 20
_POLL_SECONDS = 0.1
_DEAD = (errno.ENOTCONN, errno.ECONNABORTED)  # what a mount answers once, and right when, its process has ended


def main() -> NoReturn:
    """The entry point: exit status 0 done, 1 failed, 2 wrong usage."""
    _have_standard_streams()
    try:
        _commands.main(prog_name="replfs", standalone_mode=False)
    except click.exceptions.Exit as end:
        sys.exit(end.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.ctx.get_help() if error.ctx else "", file=sys.stderr)
        sys.exit(2)
    except click.ClickException as error:
        where = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "replfs"
        message = error.format_message().replace("\n", " ").rstrip(".")
        _fail(f"{message} (see {where} --help)", 2)
    except ReplfsError as error:
        _fail(str(error), 1)
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    sys.exit(0)


def _have_standard_streams() -> None:
    """Those that were closed when the process started go nowhere: else the next file that is opened would take their place."""
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.dup2(os.open(os.devnull, os.O_RDWR), fd)
            setattr(sys, name, open(fd, "r" if fd == 0 else "w", closefd=False))  # noqa: SIM115 - for good


def _fail(message: str, status: int) -> NoReturn:
    print(f"replfs: error: {printable(message, 2000)}", file=sys.stderr)
    sys.exit(status)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(replfs.__version__, message="%(prog)s %(version)s")
def _commands() -> None:
    """A disk image that is replicated while it is in use, as QEMU's COLO does it, mounted as a file.

    On the machine that takes over, `replfs secondary` serves its copy of the disk; on the machine that runs, `replfs primary`
    mounts the disk and forwards every write. Point a virtual machine (or any program) at the file in each mount.

    Each control command does no more than set an extended attribute, so that
    `setfattr -n user.replfs.checkpoint -v 1 MOUNTPOINT` is the same as `replfs checkpoint MOUNTPOINT`.
    """


# Volumes


class _Parsed(click.ParamType[Any]):
    """A parameter that a function of the package parses; its ReplfsError is wrong usage."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value)
        except (ReplfsError, ValueError) as error:
            self.fail(str(error), param, ctx)
        except KeyError:
            self.fail(f"there is no {self.name} {value!r}", param, ctx)


def _file_name(text: str) -> str:
    if not text or "/" in text or text in (".", "..") or len(os.fsencode(text)) > 255:
        raise ReplfsError(f"{text!r} cannot be a file's name")
    return text


def _mode_bits(text: str) -> int:
    bits = int(text, 8) if text.isdigit() and text.isascii() and not set(text) & set("89") else -1
    if not 0 <= bits <= 0o777:
        raise ReplfsError(f"{text!r} is not a mode like 0600")
    return bits


def _size(text: str) -> int:
    number, factor = (text[:-1], _UNITS[text[-1]]) if text[-1:] in _UNITS else (text, 1)
    if not (number.isdigit() and number.isascii() and len(number) < 16):
        raise ReplfsError(f"{text!r} is not a size like 64M")
    if int(number) * factor < _SMALLEST_CACHE:
        raise ReplfsError(f"{text} is less than 1M")
    return int(number) * factor


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
                type=_Parsed("size", _size),
                default="32M",
                show_default=True,
                help="Memory for the metadata of qcow2 images, the overlays' too. Takes K, M, G, T.",
            ),
            click.option(
                "--name",
                type=_Parsed("name", _file_name),
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
                type=_Parsed("user", _identifier(lambda name: pwd.getpwnam(name).pw_uid)),
                help="The file's owner. Default: you.",
            ),
            click.option(
                "--gid",
                type=_Parsed("group", _identifier(lambda name: grp.getgrnam(name).gr_gid)),
                help="The file's group. Default: yours.",
            ),
            click.option(
                "--mode", "file_mode", type=_Parsed("mode", _mode_bits), default="0600", show_default=True, help="The file's mode."
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
                "--plaintext", is_flag=True, help="Allow an address beyond this machine, without TLS: for networks that you trust."
            ),
        )
    ):
        command = option(command)
    return command


@_commands.command("secondary", short_help="Mount the copy of a disk that takes over.")
@_volume_options
@click.option(
    "--listen",
    type=_Parsed("address", parse_address),
    default="127.0.0.1:10809",
    show_default=True,
    metavar="ADDRESS",
    help="Where the primary connects to: HOST:PORT, [IPV6]:PORT or unix:PATH.",
)
@click.option(
    "--export", default="disk", show_default=True, metavar="NAME", help="The NBD export's name; the empty name answers too."
)
def _secondary(listen: Address, export: str, plaintext: bool, **options: Any) -> None:
    """Mount DISK, this machine's copy, at MOUNTPOINT, and listen for the primary's writes.

    The file shows the disk as it was at the last checkpoint, plus what is written to the file itself. What the primary forwards
    goes into DISK, and shows at the next checkpoint. After a failover the file goes on as it is, and DISK becomes the same.
    """
    if len(export.encode()) > 4096:
        raise click.BadParameter("an export's name has at most 4096 bytes", param_hint="'--export'")
    _check_local(listen, plaintext, "--listen")
    _serve(Mode.SECONDARY, listen=_absolute(listen), export=export, **options)


@_commands.command("primary", short_help="Mount the disk that is in use, and forward its writes.")
@_volume_options
@click.option(
    "--target",
    type=_Parsed("NBD-URI", parse_uri),
    required=True,
    metavar="NBD-URI",
    help="The secondary: nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH.",
)
def _primary(target: Target, plaintext: bool, **options: Any) -> None:
    """Mount DISK at MOUNTPOINT; what is written to the file goes to DISK and to the secondary.

    Both disks must have the same size and content before the first start.
    """
    _check_local(target.address, plaintext, "--target")
    _serve(Mode.PRIMARY, target=Target(_absolute(target.address), target.export), **options)


def _check_local(address: Address, plaintext: bool, option: str) -> None:
    if not plaintext and not is_local(address):
        raise click.BadParameter(
            f"{address} is beyond this machine, and the data would go there unencrypted: use a tunnel, or add --plaintext",
            param_hint=f"'{option}'",
        )


def _absolute(address: Address) -> Address:
    """The daemon has another working directory."""
    return UnixAddress(str(resolve(address.path))) if isinstance(address, UnixAddress) else address


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
    **side: Any,
) -> None:
    from replfs import daemon  # with pyfuse3, which control commands can do without

    options = _options(fuse_options)
    path = resolve(disk)
    if state_dir is None:
        if path.is_block_device():
            raise click.UsageError("a block device needs --state-dir", click.get_current_context())
        state_dir = f"{path}.replfs"
    for text in (path, resolve(mountpoint), resolve(state_dir), name, side.get("listen", "")):
        if any("\udc80" <= character <= "\udcff" for character in str(text)):
            raise click.UsageError(f"{str(text)!r} is not UTF-8, which the status could not show", click.get_current_context())
    config = Config(
        mode=mode,
        disk=path,
        mountpoint=resolve(mountpoint),
        state_dir=resolve(state_dir),
        name=name,
        start=not no_start,
        stop_on_unmount=stop_on_unmount,
        durability=durability,
        allow_backing=tuple(resolve(allowed) for allowed in allow_backing),
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


# Control


def _refused(mountpoint: str, error: OSError) -> ReplfsError:
    """What a failed attribute call means."""
    shown = printable(mountpoint)
    if error.errno in _DEAD:
        return ReplfsError(
            f"{shown}: its replfs has died; unmount it with replfs umount, then mount again: nothing it answered is lost"
        )
    if error.errno in (errno.ENODATA, errno.EOPNOTSUPP):
        return ReplfsError(f"{shown} is not a mount of replfs")
    return ReplfsError(f"{shown}: {error.strerror}")


def _get(mountpoint: str, name: str) -> str:
    try:
        return os.getxattr(mountpoint, f"user.replfs.{name}").decode()
    except OSError as error:
        raise _refused(mountpoint, error) from error


def _set(mountpoint: str, name: str, value: str) -> None:
    _get(mountpoint, "mode")
    try:
        os.setxattr(mountpoint, f"user.replfs.{name}", value.encode())
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM):
            raise ReplfsError(f"{printable(mountpoint)}: only the mount's owner and root may do this") from error
        raise ReplfsError(_get(mountpoint, "last-error") or str(_refused(mountpoint, error))) from error


_mountpoint = click.argument("mountpoint", type=click.Path(path_type=str))


@_commands.command("start")
@_mountpoint
def _start(mountpoint: str) -> None:
    """Start replication, after --no-start."""
    _set(mountpoint, "start", _get(mountpoint, "mode"))


@_commands.command("checkpoint")
@_mountpoint
def _checkpoint(mountpoint: str) -> None:
    """Take a checkpoint: the secondary's file shows what its disk holds. Returns when it holds."""
    _set(mountpoint, "checkpoint", "1")


@_commands.command("failover")
@_mountpoint
@click.option("--wait", is_flag=True, help="Return when the commit has ended, not when it has started.")
def _failover(mountpoint: str, wait: bool) -> None:
    """Take over: the secondary's disk becomes what its file shows, in the background, while the file is in use."""
    _set(mountpoint, "failover", "1")
    while wait and (stage := _get(mountpoint, "stage")) != Stage.DONE:
        if stage == Stage.FAILOVER_FAILED:
            raise ReplfsError(f"{printable(mountpoint)}: the commit failed; its log says why, and failover may be asked for again")
        time.sleep(_POLL_SECONDS)


@_commands.command("stop")
@_mountpoint
def _stop(mountpoint: str) -> None:
    """Stop replication without a failover.

    The secondary's file then shows what its disk holds: what its own machine wrote since the last checkpoint is gone.
    """
    _set(mountpoint, "stop", "1")


@_commands.command("status")
@_mountpoint
@click.option("--json", "as_json", is_flag=True, help="Print the whole status as one JSON object.")
def _status(mountpoint: str, as_json: bool) -> None:
    """Show how replication is doing."""
    text = _get(mountpoint, "status")
    click.echo(text if as_json else show(msgspec.json.decode(text)))


@_commands.command("umount")
@_mountpoint
def _umount(mountpoint: str) -> None:
    """Unmount, and wait until everything is on stable storage. Replication resumes at the next mount."""
    process = -1
    try:
        process = os.pidfd_open(int(msgspec.json.decode(os.getxattr(mountpoint, "user.replfs.status"))["pid"]))
    except OSError as error:
        if error.errno not in (*_DEAD, errno.ESRCH):
            raise _refused(mountpoint, error) from error
    command = (
        ["umount", mountpoint] if os.geteuid() == 0 or shutil.which("fusermount3") is None else ["fusermount3", "-u", mountpoint]
    )
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode != 0:
        raise ReplfsError(f"cannot unmount {printable(mountpoint)}: {' '.join(done.stderr.split()) or 'it failed'}")
    if process >= 0:
        select.select([process], [], [])
