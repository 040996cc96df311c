"""Mounting: what must be so beforehand, and what libfuse has to say about it, in one line."""

import errno
import os
import shutil
import sys
import tempfile
from contextlib import suppress

import pyfuse3
import trio

from replfs.errors import InUse, ReplfsError, printable
from replfs.export.device import Device
from replfs.export.fuse import FuseExport
from replfs.protocol.nbd.uri import UnixAddress
from replfs.volume.config import Config, MountConfig


def check(config: Config) -> None:
    """Raises ReplfsError if the mount point cannot be one, or what the volume needs would lie under it."""
    path = config.mountpoint
    if path is None:
        return
    shown = printable(str(path))
    try:
        if not path.is_dir():
            os.stat(path)
            raise ReplfsError(f"the mount point {shown} is not a directory", errno.ENOTDIR)
        if os.path.ismount(path):
            os.statvfs(path)  # unlike stat it is never answered from the kernel's cache: ENOTCONN if the mount is dead
            raise InUse(f"the mount point {shown} is busy: something is mounted there already")
    except OSError as error:
        dead = ": what was mounted there is dead, unmount it first with replfs umount" if error.errno == errno.ENOTCONN else ""
        raise ReplfsError(f"cannot use the mount point {shown}: {error.strerror}{dead}", error.errno or errno.EIO) from error
    needed = {"disk": str(config.disk), "state directory": str(config.state_dir)}
    for address in (config.listen, config.view_listen, config.qmp):
        if isinstance(address, UnixAddress):
            needed[f"socket {address.path}"] = address.path
    for what, inside in needed.items():
        if os.path.commonpath((path, inside)) == str(path):
            raise ReplfsError(f"the {what} {printable(inside)} lies under the mount point, which would hide it", errno.EINVAL)
    if not os.path.exists("/dev/fuse"):
        raise ReplfsError("there is no /dev/fuse: load the fuse module, or give this container the device", errno.ENOENT)
    if os.geteuid() != 0 and shutil.which("fusermount3") is None:
        raise ReplfsError(
            "there is no fusermount3, which an ordinary user needs for mounting: install the package fuse3", errno.ENOENT
        )


def mount(export: FuseExport, config: Config, settings: MountConfig) -> None:
    """Mount, with what libfuse and fusermount3 print turned into one line. Raises ReplfsError.

    The option ``ro`` is not the kernel's to know: it would refuse the control attributes too.
    """
    source = str(config.disk).encode("ascii", "replace").decode().replace("\\", "\\\\").replace(",", "\\,")
    options = {*pyfuse3.default_options, *settings.options, f"fsname={source}", "subtype=replfs"} - {"ro"}
    sys.stderr.flush()
    stderr = os.dup(2)
    before = _open_devices()
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            pyfuse3.init(export, str(config.mountpoint), options)
        except RuntimeError as error:
            said.seek(0)
            lines = said.read(4096).decode(errors="replace").split("\n")
            why = "; ".join(printable(line) for line in lines if line) or str(error)
            raise ReplfsError(f"cannot mount at {printable(str(config.mountpoint))}: {why}") from error
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
    (libfuse_fd,) = _open_devices() - before
    export.device = Device(export, libfuse_fd)


def _open_devices() -> set[int]:
    """Where this process has /dev/fuse open; libfuse does not tell where it has."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            if os.readlink(f"/proc/self/fd/{name}") == "/dev/fuse":
                found.add(int(name))
    return found


async def serve(export: FuseExport) -> None:
    """Until the unmount, or :meth:`Device.end`. Raises ConnectionAbortedError after a forced unmount."""
    device = export.device
    async with trio.open_nursery() as answers:
        answers.start_soon(device.serve_libfuse)
        async with trio.open_nursery() as libfuse:
            libfuse.start_soon(pyfuse3.main)
            await device.serve()
            pyfuse3.terminate()
        device.hand_back()
        answers.cancel_scope.cancel()


def close(export: FuseExport, *, unmount: bool) -> None:
    """The end of the mount, which is ``unmount``-ed unless it has been already."""
    export.device.give_back()
    pyfuse3.close(unmount=unmount)
