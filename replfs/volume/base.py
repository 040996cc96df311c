"""What both sides' volumes have in common: control operations one at a time, the saved state, the status.

Guarding rules: ``control_lock`` serialises control operations, the end of a failover's commit, and the settling before the end.
``state`` is replaced only by its holder, in :meth:`Volume._save`: on disk first, then in memory.
"""

import errno
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import trio

import replfs
from replfs.block.cache import Cache
from replfs.block.node import Node
from replfs.block.replication.rules import Mode, Operation, Stage, Verdict, check_start_mode, get_error, verdict
from replfs.block.storage import Storage
from replfs.errors import ReplfsError
from replfs.volume.config import Config
from replfs.volume.disk import describe, describe_chain, open_disk
from replfs.volume.state import NotDurable, State, StateDirectory, check_identity, identify

logger = logging.getLogger(__name__)


async def _nothing_cached() -> None:
    """Until an export says otherwise, nobody caches what the view shows."""


class Volume(ABC):
    """A disk and its replication. ``view`` is the node that the mounted file shows."""

    view: Node

    def __init__(self, config: Config, disk_format: str | None, storage: Storage | None = None) -> None:
        """Open and lock the disk and the state directory, and read the state; nothing is written yet.

        Raises ReplfsError; then nothing is left open.
        """
        self.config = config
        self.cache = Cache(config.cache_size)
        self.storage = storage or Storage()
        self.disk = open_disk(config.disk, disk_format, config.allow_backing, self.cache, self.storage)
        try:
            self.directory = StateDirectory(config.state_dir, self.storage)
            try:
                identity = identify(config.disk, self.disk.format, self.disk.size, config.state_dir)
                saved = self.directory.load()
                if saved is not None:
                    check_identity(saved, identity, config.mode, config.state_dir)
                self._saved = saved
                self.state = saved or State(1, config.mode, Stage.NONE, 0, False, identity)
            except BaseException:
                self.directory.close()
                raise
        except BaseException:
            self.disk.release()
            raise
        self.last_error = ""
        self.drop_cache: Callable[[], Awaitable[None]] = _nothing_cached
        """Makes whoever caches the view read it again; the mount sets it."""
        self.control_lock = trio.Lock()
        self.settled = False
        self._do: dict[Operation, Callable[[], Awaitable[None]]] = {
            Operation.START: self._start,
            Operation.CHECKPOINT: self._checkpoint,
            Operation.FAILOVER: self._failover,
            Operation.STOP: self._stop,
        }

    # The life of a volume: connect, begin, (control ...,) settle, close; or connect, begin that fails, abandon.

    @abstractmethod
    async def connect(self, nursery: trio.Nursery) -> None:
        """Take what the network side needs, before anything is written: an address to listen on, a target. Raises ReplfsError."""

    @abstractmethod
    async def begin(self, nursery: trio.Nursery) -> None:
        """Resume what the state says, or start; ``nursery`` keeps the background tasks. Raises ReplfsError."""

    async def settle(self) -> None:
        """Wait for the control operation that is under way, refuse new ones, stop if that is wanted at the end.

        After this the background tasks may be cancelled.
        """
        async with self.control_lock:
            self.settled = True
            self.drop_cache = _nothing_cached
            if self.config.stop_on_unmount and self.state.stage is Stage.RUNNING:
                try:
                    await self._stop()
                except (OSError, ReplfsError) as error:
                    self.failed(Operation.STOP, ReplfsError(str(error)))

    async def close(self) -> None:
        """Put everything on stable storage and close it. No background task runs any more. Raises ReplfsError."""
        try:
            try:
                await self._close()
            finally:
                await self.disk.flush()
        except OSError as error:
            raise ReplfsError(f"cannot put everything on stable storage: {error.strerror}") from error
        finally:
            await self.disk.close()
            self.directory.close()

    @abstractmethod
    async def _close(self) -> None:
        """Flush and close what the side has beyond the disk. Raises OSError or ReplfsError."""

    async def abandon(self) -> None:
        """Give up before :meth:`begin` has ended well: whatever this process has made is removed."""
        self.directory.undo()
        await self.disk.close()
        self.directory.close()

    # Control

    async def control(self, operation: Operation, start_mode: Mode | None = None) -> None:
        """Carry out a control operation. Raises ReplfsError; its message is the volume's ``last_error`` then."""
        async with self.control_lock:
            try:
                if self.settled:
                    raise ReplfsError("the volume is being unmounted", errno.ESHUTDOWN)
                if verdict(self.config.mode, operation, self.state.stage) is Verdict.DO:
                    if start_mode is not None:
                        check_start_mode(self.config.mode, start_mode)
                    await self._do[operation]()
                    logger.info(
                        "%s succeeded: the stage is %s, the generation %d", operation, self.state.stage, self.state.generation
                    )
                self.last_error = ""
            except OSError as error:
                raise self.failed(operation, ReplfsError(f"{error.strerror or error}", error.errno or errno.EIO)) from error
            except ReplfsError as error:
                raise self.failed(operation, error) from error.__cause__

    def failed(self, operation: str, error: ReplfsError) -> ReplfsError:
        """Note that a control operation failed; gives the error back."""
        self.last_error = str(error)
        logger.warning("%s failed: %s", operation, error)
        return error

    @abstractmethod
    async def _start(self) -> None: ...

    @abstractmethod
    async def _checkpoint(self) -> None: ...

    @abstractmethod
    async def _failover(self) -> None: ...

    @abstractmethod
    async def _stop(self) -> None: ...

    async def _save(self, **changes: Any) -> NotDurable | None:
        """Replace the state. Raises ReplfsError: the old one stands on disk and in memory.

        Gives an error back if the new one stands and is only not durable: to be raised when the nodes have been changed too.
        """
        new = msgspec.structs.replace(self.state, **changes)
        problem = None
        try:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self.directory.save, new)
        except NotDurable as error:
            logger.warning("%s", error)
            problem = error
        self.state = new
        return problem

    # Status

    @property
    def sticky_error(self) -> bool:
        return self.state.error

    @property
    def error(self) -> str:
        return get_error(self.state.stage, self.sticky_error)

    def status(self) -> dict[str, Any]:
        """What the status shows, ready for JSON. Sizes are in bytes."""
        return {
            "version": replfs.__version__,
            "mode": self.config.mode,
            "stage": self.state.stage,
            "error": self.error,
            "last-error": self.last_error,
            "generation": self.state.generation,
            "name": self.config.name,
            "mountpoint": str(self.config.mountpoint),
            "size": self.view.size,
            "durability": "process",  # the order of writes that outlives a power cut is not there yet
            "pid": os.getpid(),
            "state-dir": str(self.config.state_dir),
            "disk": describe(self.disk),
            **describe_chain(self.disk),
            "io-errors": self.storage.errors.counts(),
            **self._side_status(),
        }

    @abstractmethod
    def _side_status(self) -> dict[str, Any]: ...
