"""The commands that control a mounted volume: they set and get extended attributes, as setfattr and getfattr do, and no more."""

import errno
import os
import select
import shutil
import subprocess
import sys
import time
from typing import Any

import click
import msgspec

from replfs.block.replication.rules import Mode, Stage
from replfs.cli.arguments import Parsed, absolute, size
from replfs.cli.status import show
from replfs.errors import ReplfsError, printable
from replfs.protocol.nbd.uri import Target, parse_uri

_POLL_SECONDS = 0.1
_DEAD = (errno.ENOTCONN, errno.ECONNABORTED)  # what a mount answers once, and right when, its process has ended


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


@click.command("start")
@_mountpoint
def start(mountpoint: str) -> None:
    """Start replication, after --no-start."""
    _set(mountpoint, "start", _get(mountpoint, "mode"))


@click.command("checkpoint")
@_mountpoint
def checkpoint(mountpoint: str) -> None:
    """Take a checkpoint: the secondary's file shows what its disk holds. Returns when it holds."""
    _set(mountpoint, "checkpoint", "1")


@click.command("failover")
@_mountpoint
@click.option("--wait", is_flag=True, help="Return when the commit has ended, not when it has started.")
def failover(mountpoint: str, wait: bool) -> None:
    """Take over: the secondary's disk becomes what its file shows, in the background, while the file is in use."""
    _set(mountpoint, "failover", "1")
    while wait and (stage := _get(mountpoint, "stage")) != Stage.DONE:
        if stage == Stage.FAILOVER_FAILED:
            raise ReplfsError(f"{printable(mountpoint)}: the commit failed; its log says why, and failover may be asked for again")
        time.sleep(_POLL_SECONDS)


@click.command("stop")
@_mountpoint
def stop(mountpoint: str) -> None:
    """Stop replication without a failover.

    The secondary's file then shows what its disk holds: what its own machine wrote since the last checkpoint is gone.
    """
    _set(mountpoint, "stop", "1")


@click.command("resync")
@_mountpoint
@click.option("--pause", "what", flag_value="pause", help="Send nothing more for now of what the secondary lacks.")
@click.option("--resume", "what", flag_value="resume", help="Go on.")
@click.option(
    "--discard-remote",
    "what",
    flag_value="discard-remote",
    help="Overwrite the secondary's disk although it is newer than this one, or has diverged from it, or is something else.",
)
@click.option("--wait", is_flag=True, help="Return when the copies agree, or when that needs somebody's decision.")
def resync(mountpoint: str, what: str | None, wait: bool) -> None:
    """On a primary: send what the secondary lacks now, rather than when the link is tried again.

    Returns at once; the status shows how far it is.
    """
    _set(mountpoint, "resync", what or "start")
    while wait and (status := msgspec.json.decode(_get(mountpoint, "status")))["link"]["state"] != "connected":
        if status["link"]["state"] in ("refused", "paused", "off"):
            raise ReplfsError(status["link-error"] or f"{printable(mountpoint)}: the resync is {status['link']['state']}")
        time.sleep(_POLL_SECONDS)


@click.command("verify")
@_mountpoint
@click.option("--repair", "what", flag_value="repair", help="Send what differs.")
@click.option("--stop", "what", flag_value="stop", help="End the verification that is under way.")
@click.option(
    "--rate", type=Parsed("size", size), default=0, metavar="SIZE", help="Bytes a second to read at most. Default: no limit."
)
def verify(mountpoint: str, what: str | None, rate: int) -> None:
    """On a primary: read both sides, and tell what differs. Both go on meanwhile.

    Prints offset and length of each range that differs. The exit status is 1 if there are any, unless they are repaired.
    """
    _set(mountpoint, "verify", f"{what or 'start'}{f' {rate}' if rate else ''}")
    if what == "stop":
        return
    while (found := _verification(mountpoint))["running"]:
        if sys.stderr.isatty():
            print(f"\r{found['done'] * 100 // max(found['total'], 1)} %", end="", file=sys.stderr, flush=True)
        time.sleep(_POLL_SECONDS)
    if sys.stderr.isatty():
        print("\r", end="", file=sys.stderr)
    for offset, length in found["ranges"]:
        click.echo(f"{offset} {length}")
    shown = printable(mountpoint)
    if found["error"]:
        raise ReplfsError(f"{shown}: the verification did not end: {found['error']}")
    if found["differing"] and what != "repair":
        raise ReplfsError(f"{shown}: {found['differing']} bytes differ (replfs verify --repair sends them)")


def _verification(mountpoint: str) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.json.decode(_get(mountpoint, "status"))["link"]["verify"]
    return found


@click.command("promote")
@_mountpoint
@click.option(
    "--target",
    type=Parsed("NBD-URI", parse_uri),
    required=True,
    metavar="NBD-URI",
    help="The new secondary: nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH.",
)
@click.option("--discard-remote", is_flag=True, help="Overwrite the new secondary's disk, whatever it holds.")
def promote(mountpoint: str, target: Target, discard_remote: bool) -> None:
    """After a failover: make the side that has taken over a primary, while its machine runs on.

    Its new secondary may be the old primary's disk, mounted with `replfs secondary`: it gets only what differs.
    """
    if _get(mountpoint, "mode") != Mode.SECONDARY:
        raise ReplfsError(f"{printable(mountpoint)} is a primary already")
    _set(mountpoint, "target", f"{absolute(target)}{' discard-remote' * discard_remote}")
    _set(mountpoint, "start", "primary")


@click.command("status")
@_mountpoint
@click.option("--json", "as_json", is_flag=True, help="Print the whole status as one JSON object.")
def status(mountpoint: str, as_json: bool) -> None:
    """Show how replication is doing."""
    text = _get(mountpoint, "status")
    click.echo(text if as_json else show(msgspec.json.decode(text)))


@click.command("umount")
@_mountpoint
def umount(mountpoint: str) -> None:
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


COMMANDS = (start, checkpoint, failover, stop, resync, verify, promote, status, umount)
