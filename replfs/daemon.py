"""The process that serves one volume: from the checks to the mount, through its service, to the end.

What it promises: nothing is written, created or left mounted if it cannot start; a SIGTERM, SIGINT or unmount ends it with
everything on stable storage; a defect that ends it leaves the mount point dead (ENOTCONN), never an empty directory that a machine
would mistake for its disk.
"""

import ctypes
import errno
import logging
import logging.handlers
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import trio

from replfs.block import storage
from replfs.block.replication.rules import Mode
from replfs.errors import ReplfsError, printable
from replfs.export import mount, view
from replfs.export.fuse import FuseExport
from replfs.export.nbd import NbdServer
from replfs.export.qmp import QmpServer
from replfs.export.view import SharedView
from replfs.export.watchdog import Watchdog
from replfs.protocol.nbd.uri import Address
from replfs.volume.base import Volume
from replfs.volume.config import Config, MountConfig
from replfs.volume.primary import PrimaryVolume
from replfs.volume.secondary import SecondaryVolume

logger = logging.getLogger(__name__)

_VOLUMES: dict[Mode, type[SecondaryVolume | PrimaryVolume]] = {Mode.PRIMARY: PrimaryVolume, Mode.SECONDARY: SecondaryVolume}
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_LOG_FILE = "replfs.log"
_LOG_BYTES = 1 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # mallopt(3)


def run(config: Config, disk_format: str | None, settings: MountConfig, *, foreground: bool) -> None:
    """Serve a volume until it ends. In the background, the calling process returns once the file can be used.

    Raises ReplfsError if it could not start, or could not end well.
    """
    logging.basicConfig(level=logging.INFO, format="replfs: %(levelname)s: %(message)s", force=True)
    if not foreground:
        logging.root.handlers[0].setLevel(logging.WARNING)
        logging.root.handlers[0].addFilter(lambda record: record.name != storage.__name__)  # the error that it leads to is enough
        logging.root.addHandler(_until_detached)
    if foreground:
        _serve(config, disk_format, settings, lambda: None)
    elif _fork():
        try:
            _serve(config, disk_format, settings, lambda: _detach(config.state_dir))
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


def _serve(config: Config, disk_format: str | None, settings: MountConfig, on_ready: Callable[[], None]) -> None:
    _keep_memory()
    watchdog = Watchdog()
    try:
        trio.run(serve, config, disk_format, settings, watchdog, on_ready)
    finally:
        watchdog.dismiss()


def _keep_memory() -> None:
    """Have the memory of large requests used again: giving it back and asking for it anew takes longer than using it."""
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_M_MMAP_THRESHOLD, 32 << 20)
    mallopt(_M_TRIM_THRESHOLD, 64 << 20)


_until_detached = logging.handlers.MemoryHandler(capacity=1000, flushLevel=logging.CRITICAL + 1)
"""Keeps for the log what is said before there is one."""

_ready_pipe = -1
"""In the daemon, until it is ready: where it tells so."""


def _fork() -> bool:
    """Split off the daemon, in a session of its own: True there. Returns False in the calling process once it is ready.

    Raises SystemExit in the calling process if the daemon ends instead, which has told why, and KeyboardInterrupt when it is
    interrupted, and has ended the daemon.
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

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        if os.read(reader, 1):
            return False
    except KeyboardInterrupt:
        os.kill(child, signal.SIGTERM)
        os.waitpid(child, 0)
        raise
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        raise ReplfsError(f"the daemon was killed by signal {os.WTERMSIG(status)} before the file could be used")
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


async def serve(
    config: Config, disk_format: str | None, settings: MountConfig, watchdog: Watchdog, on_ready: Callable[[], None]
) -> None:
    """Open, mount, serve, close. Raises ReplfsError."""
    mount.check(config)
    volume = _VOLUMES[config.mode](config, disk_format)
    service = _Service(volume, config, settings, watchdog, on_ready)
    for number in _SIGNALS:  # what applies when they are not received any more: a second one is no order to die
        signal.signal(number, signal.SIG_IGN)
    with trio.open_signal_receiver(*_SIGNALS) as signals:
        async with trio.open_nursery() as receiving:
            receiving.start_soon(service.end_on_signal, signals)
            async with trio.open_nursery() as background:
                await service.run(background)
                background.cancel_scope.cancel()
            try:
                if service.begun:
                    await service.volume.close()
                    state = service.volume.state
                    logger.info("ended: the stage is %s, the generation %d", state.stage, state.generation)
                else:
                    await service.volume.abandon()
            except ReplfsError as error:
                service.failure = error
            receiving.cancel_scope.cancel()
    if service.failure is not None:
        raise service.failure


async def _serve_mount(export: FuseExport) -> None:
    """Until the unmount, also a forced one."""
    try:
        await mount.serve(export)
    except* ConnectionAbortedError:
        logger.warning("the mount was aborted, by umount -f or the like: the service ends")


class _Service:
    """From the connection to the end of the mount."""

    def __init__(
        self, volume: Volume, config: Config, settings: MountConfig, watchdog: Watchdog, on_ready: Callable[[], None]
    ) -> None:
        self.begun = False
        self.failure: ReplfsError | None = None
        self.volume: Volume = volume
        self._config = config
        self._mount = FuseExport(volume, settings) if config.mountpoint is not None else None
        self._shared_view = SharedView(volume.view, self._mount)
        self._view_server = NbdServer(self._shared_view, view.NAME, read_only=settings.read_only, option="--view-listen")
        self._view_address: Address | None = None  # where it listens
        self._serving_view, self._served_view = trio.CancelScope(), trio.Event()
        self._qmp_server = QmpServer(volume, self._quit)
        self._qmp_address: Address | None = None
        self._background: trio.Nursery
        self._ended = trio.Event()  # where there is no mount
        self._settings = settings
        self._watchdog = watchdog
        self._on_ready = on_ready
        self._beginning = trio.CancelScope()
        self._ending = False

    async def run(self, background: trio.Nursery) -> None:
        """Until the unmount or a signal. What a person is to be told is in ``failure`` afterwards."""
        mounted = False
        self._background = background
        try:
            with self._beginning:
                await self.volume.connect(background)
                if self._config.qmp is not None:
                    self._qmp_address = await self._qmp_server.listen(self._config.qmp)
                if self._config.view_listen is not None:
                    self._view_address = await self._view_server.listen(self._config.view_listen)
                if self._mount is not None:
                    assert self._config.mountpoint is not None
                    mount.mount(self._mount, self._config, self._settings)
                    mounted = True
                    self._watchdog.guard(self._config.mountpoint)
                await self.volume.begin(background)
                if self._mount is not None:
                    self.volume.drop_cache = self._mount.drop_cache
                self.volume.exports_status = self._status
                self.volume.on_succession = self._succeed
                if self._view_address is not None:
                    background.start_soon(self._serve_view)
                else:
                    self._served_view.set()
                if self._qmp_address is not None:
                    background.start_soon(self._qmp_server.serve)
                self._on_ready()
                self.begun = True
            if self.begun:
                if not self._beginning.cancel_called:  # which may have come too late to end the start
                    await self._serve()
                await self._end_view()
                await self.volume.settle()
            else:
                self.failure = ReplfsError("interrupted before the file could be used", errno.EINTR)
        except ReplfsError as error:
            self.failure = error
        except BaseException as error:
            if self.begun or not isinstance(error, OSError):
                if mounted:
                    self._close_mount(unmount=False)
                raise
            where = f"{printable(str(error.filename))}: " if error.filename else ""  # a File's errors name it themselves
            self.failure = ReplfsError(f"cannot start: {where}{error.strerror}", error.errno or errno.EIO)
        if mounted:
            self._close_mount(unmount=True)
        if not self.begun:
            await self._view_server.close()
            await self._qmp_server.close()

    async def _serve(self) -> None:
        if self._mount is not None:
            await _serve_mount(self._mount)
        else:
            await self._ended.wait()

    async def _serve_view(self) -> None:
        try:
            with self._serving_view:
                await self._view_server.serve()
        finally:
            self._served_view.set()

    async def _end_view(self) -> None:
        """While the mount is there: its requests may wait for the kernel, which waits for the mount's."""
        self._serving_view.cancel()
        await self._served_view.wait()

    def _close_mount(self, *, unmount: bool) -> None:
        assert self._mount is not None
        mount.close(self._mount, unmount=unmount)

    def _status(self) -> dict[str, Any]:
        status: dict[str, Any] = {}
        if self._view_address is not None:
            connections = self._view_server.connections
            status["view"] = {"listen": str(self._view_address), "export": view.NAME, "connections": connections}
        if self._qmp_address is not None:
            status["qmp"] = {"listen": str(self._qmp_address), "connections": self._qmp_server.connections}
        return status

    def _succeed(self, successor: Volume) -> None:
        self.volume = self._qmp_server.volume = successor
        self._shared_view.view = successor.view
        if self._mount is not None:
            self._mount.serve(successor)

    async def end_on_signal(self, signals: AsyncIterator[int]) -> None:
        """SIGTERM and SIGINT: give the start up, or end the service, but never during a control operation.

        That may need the kernel's requests served. So does having the kernel write back what mappings have changed.
        """
        async for _ in signals:
            if not self.begun:
                self._ending = True
                self._beginning.cancel()
            elif not self._ending:
                await self._end("host-signal")

    def _quit(self) -> None:
        if not self._ending:
            self._background.start_soon(self._end, "host-qmp-quit")

    async def _end(self, why: str) -> None:
        self._ending = True
        async with self.volume.control_lock:
            try:
                await self.volume.drop_cache()
            except OSError as error:
                logger.warning("what mappings have changed could not be written back: %s", error)
        await self._end_view()
        await self.volume.settle()
        await self._qmp_server.shut_down(why)
        self._ended.set()
        if self._mount is not None:
            self._mount.device.end()
