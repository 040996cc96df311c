"""The process that serves one volume: from the checks to the mount, through its service, to the end.

What it promises: nothing is written, created or left mounted if it cannot start; a SIGTERM, SIGINT or unmount ends it with
everything on stable storage; a defect that ends it leaves the mount point dead (ENOTCONN), never an empty directory that a machine
would mistake for its disk.
"""

import errno
import logging
import logging.handlers
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pyfuse3
import trio

from replfs.block.replication.rules import Mode
from replfs.errors import InUse, ReplfsError, printable
from replfs.export.fuse import FuseExport
from replfs.volume.base import Volume
from replfs.volume.config import Config, MountConfig
from replfs.volume.primary import PrimaryVolume
from replfs.volume.secondary import SecondaryVolume

logger = logging.getLogger(__name__)

_VOLUMES: dict[Mode, type[SecondaryVolume | PrimaryVolume]] = {Mode.PRIMARY: PrimaryVolume, Mode.SECONDARY: SecondaryVolume}
_LOG_FILE = "replfs.log"
_LOG_BYTES = 1 << 20


def run(config: Config, disk_format: str | None, mount: MountConfig, *, foreground: bool) -> None:
    """Serve a volume until it ends. In the background, the calling process returns once the file can be used.

    Raises ReplfsError if it could not start, or could not end well.
    """
    logging.basicConfig(level=logging.INFO, format="replfs: %(levelname)s: %(message)s", force=True)
    if not foreground:
        logging.root.handlers[0].setLevel(logging.WARNING)
        logging.root.addHandler(_until_detached)
    if foreground:
        trio.run(serve, config, disk_format, mount, lambda: None)
    elif _fork():
        try:
            trio.run(serve, config, disk_format, mount, lambda: _detach(config.state_dir))
        except ReplfsError as error:
            if _ready_pipe < 0:
                logger.error("%s", error)
            else:
                print(f"replfs: error: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        except BaseException:
            logger.exception("an unexpected exception ended this process")
            os._exit(1)
        os._exit(0)


_until_detached = logging.handlers.MemoryHandler(capacity=1000, flushLevel=logging.CRITICAL + 1)
"""Keeps for the log what is said before there is one."""

_ready_pipe = -1
"""In the daemon, until it is ready: where it tells so."""


def _fork() -> bool:
    """Split off the daemon, in a session of its own: True there. Returns False in the calling process once it is ready.

    Raises SystemExit in the calling process if the daemon ends instead, which has told why.
    """
    global _ready_pipe
    reader, _ready_pipe = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        os.setsid()
        os.chdir("/")
        return True
    os.close(_ready_pipe)
    if os.read(reader, 1):
        return False
    os.waitpid(child, 0)
    raise SystemExit(1)


def _detach(state_dir: Path) -> None:
    """The file can be used: log to the state directory from now on, let go of the terminal, and let the caller return."""
    global _ready_pipe
    handler = logging.handlers.RotatingFileHandler(state_dir / _LOG_FILE, maxBytes=_LOG_BYTES, backupCount=2)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s: %(message)s"))
    _until_detached.setTarget(handler)
    _until_detached.close()
    logging.root.handlers[:] = [handler]
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    os.write(_ready_pipe, b"+")
    os.close(_ready_pipe)
    _ready_pipe = -1


async def serve(config: Config, disk_format: str | None, mount: MountConfig, on_ready: Callable[[], None]) -> None:
    """Open, mount, serve, close. Raises ReplfsError."""
    _check_mountpoint(config.mountpoint)
    volume = _VOLUMES[config.mode](config, disk_format)
    begun = False
    failure: ReplfsError | None = None
    async with trio.open_nursery() as background:
        try:
            await volume.connect(background)
            export = FuseExport(volume, mount)
            _mount(export, config, mount)
            unmount = False
            try:
                try:
                    await volume.begin(background)
                except ReplfsError:
                    unmount = True
                    raise
                except OSError as error:
                    unmount = True
                    where = printable(str(error.filename or config.state_dir))
                    raise ReplfsError(f"cannot start: {where}: {error.strerror}", error.errno or errno.EIO) from error
                begun = True
                volume.drop_cache = export.drop_cache
                on_ready()
                background.start_soon(_end_on_signal, volume)
                await pyfuse3.main()
                await volume.settle()
                unmount = True
            finally:
                pyfuse3.close(unmount=unmount)
        except ReplfsError as error:
            failure = error
        background.cancel_scope.cancel()
    if begun:
        await volume.close()
        logger.info("ended: the stage is %s, the generation %d", volume.state.stage, volume.state.generation)
    else:
        await volume.abandon()
    if failure is not None:
        raise failure


async def _end_on_signal(volume: Volume) -> None:
    """SIGTERM and SIGINT end the service, but never during a control operation: it may need the kernel's requests served."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            await volume.settle()
            pyfuse3.terminate()
            return


def _check_mountpoint(path: Path) -> None:
    shown = printable(str(path))
    try:
        if not path.is_dir():
            os.stat(path)
            raise ReplfsError(f"the mount point {shown} is not a directory", errno.ENOTDIR)
        if os.path.ismount(path):
            os.statvfs(path)  # unlike stat it is never answered from the kernel's cache: ENOTCONN if the mount is dead
            raise InUse(f"the mount point {shown} is busy: something is mounted there already")
    except OSError as error:
        dead = ": what was mounted there is dead, unmount it first with umount" if error.errno == errno.ENOTCONN else ""
        raise ReplfsError(f"cannot use the mount point {shown}: {error.strerror}{dead}", error.errno or errno.EIO) from error
    if not os.path.exists("/dev/fuse"):
        raise ReplfsError("there is no /dev/fuse: load the fuse module, or give this container the device", errno.ENOENT)
    if os.geteuid() != 0 and shutil.which("fusermount3") is None:
        raise ReplfsError(
            "there is no fusermount3, which an ordinary user needs for mounting: install the package fuse3", errno.ENOENT
        )


def _mount(export: FuseExport, config: Config, mount: MountConfig) -> None:
    """Mount, with what libfuse and fusermount3 print turned into one line. Raises ReplfsError."""
    source = str(config.disk).replace("\\", "\\\\").replace(",", "\\,")
    options = {*pyfuse3.default_options, *mount.options, f"fsname={source}", "subtype=replfs"}
    sys.stderr.flush()
    stderr = os.dup(2)
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
