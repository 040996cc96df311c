"""What both sides' volumes have in common: control operations one at a time, the saved state, the status.

Guarding rules: ``control_lock`` serialises control operations, the end of a failover's commit, and the settling before the end.
``state`` is replaced only in :meth:`Volume.save`: on disk first, then in memory. Its ``stage`` and ``generation`` change only by
the holder of ``control_lock``; what a primary's link has to remember does not wait for that.
"""

import errno
import logging
import os
import secrets
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any, Final

import msgspec
import trio

import replfs
from replfs.block.cache import Cache
from replfs.block.file import File
from replfs.block.node import Node
from replfs.block.qcow2.image import Image
from replfs.block.qcow2.journaling import use_journal
from replfs.block.replication.rules import (
    Argument,
    Mode,
    Operation,
    Stage,
    Verdict,
    check_start_mode,
    get_error,
    verdict,
)
from replfs.block.storage import Storage
from replfs.block.tracking import Tracking
from replfs.errors import ReplfsError, printable
from replfs.protocol.nbd.uri import Target
from replfs.volume.config import Config
from replfs.volume.disk import describe, describe_chain, open_disk
from replfs.volume.events import Events, Kind
from replfs.volume.state import NotDurable, State, StateDirectory, check_identity, identify, in_mode

logger = logging.getLogger(__name__)

_COMMIT_SECONDS: Final = 1.0


async def _nothing_cached() -> None:
    """Until an export says otherwise, nobody caches what the view shows."""


class Volume(ABC):
    """A disk and its replication. ``view`` is the node that the mounted file shows."""

    view: Node
    directory: StateDirectory
    state: State
    control_lock: trio.Lock
    _saved: State | None

    def __init__(
        self, config: Config, disk_format: str | None, storage: Storage | None = None, *, predecessor: "Volume | None" = None
    ) -> None:
        """Open and lock the disk and the state directory, and read the state; nothing is written yet.

        Or take all of that over from a ``predecessor``, a volume in another mode that is not used any more.

        Raises ReplfsError; then nothing is left open.
        """
        self.config = config
        if predecessor is None:
            self.cache = Cache(config.cache_size)
            self.storage = storage or Storage()
            self.disk = open_disk(config.disk, disk_format, config.allow_backing, self.cache, self.storage)
            try:
                self._open_state()
            except BaseException:
                self.disk.release()
                raise
        else:
            self.cache, self.storage, self.disk = predecessor.cache, predecessor.storage, predecessor.disk
            self.directory, self._saved, self.state = predecessor.directory, predecessor._saved, predecessor.state
        self.tracking: Tracking | None = predecessor.tracking if predecessor is not None else None
        """What the other side may lack; there from the begin on."""
        self.last_error = ""
        self.events: Events = predecessor.events if predecessor is not None else Events()
        self.drop_cache: Callable[[], Awaitable[None]] = predecessor.drop_cache if predecessor is not None else _nothing_cached
        """Makes whoever caches the view read it again; the mount sets it."""
        self.successor_target: tuple[Target, bool] | None = None
        """Where a primary in this volume's place is to replicate to, and whether what is there may be discarded."""
        self.on_succession: Callable[[Volume], None] = lambda successor: None
        """Called when another volume takes this one's place, in another mode."""
        self.exports_status: Callable[[], dict[str, Any]] = predecessor.exports_status if predecessor is not None else dict
        """What the status shows of how the view is served; whoever serves it sets it."""
        self.control_lock = predecessor.control_lock if predecessor is not None else trio.Lock()
        self._saving = trio.Lock()
        self._own_tasks = trio.CancelScope()  # of the background tasks that end with a succession
        self.settled = False
        self._commit_wanted = trio.Event()
        self._syncs_failed = trio.Event()
        self.storage.errors.on_failed_sync = self._sync_failed
        self._do: dict[Operation, Callable[[], Awaitable[None]]] = {
            Operation.START: self._start,
            Operation.CHECKPOINT: self._checkpoint,
            Operation.FAILOVER: self._failover,
            Operation.STOP: self._stop,
        }

    def _open_state(self) -> None:
        config = self.config
        self.directory = StateDirectory(config.state_dir, self.storage)
        try:
            identity = identify(config.disk, self.disk.format, self.disk.size, config.state_dir)
            saved = self.directory.load()
            if saved is not None:
                saved = in_mode(saved, config.mode)
                check_identity(saved, identity, config.mode, config.state_dir)
            self._saved = saved
            self.state = saved or State(1, config.mode, Stage.NONE, 0, False, identity)
            if not self.state.node:
                self.state = msgspec.structs.replace(self.state, node=secrets.token_hex(8))
        except BaseException:
            self.directory.close()
            raise

    # The life of a volume: connect, begin, (control ...,) settle, close; or connect, begin that fails, abandon.

    @property
    def durable(self) -> bool:
        """Whether a power cut is to be outlived, too."""
        return self.config.durability == "power"

    @abstractmethod
    async def connect(self, nursery: trio.Nursery) -> None:
        """Take what the network side needs, before anything is written: an address to listen on, a target. Raises ReplfsError."""

    @abstractmethod
    async def begin(self, nursery: trio.Nursery) -> None:
        """Resume what the state says, or start; ``nursery`` keeps the background tasks. Raises ReplfsError."""

    async def begin_disk(self) -> None:
        """Have a qcow2 disk in order before it is used: what the last process that used it had not put into its tables.

        The state directory is there. Raises OSError, ReplfsError.
        """
        if isinstance(self.disk, Image):
            await use_journal(self.storage, self.disk, str(self.directory.disk_journal), keep=self.durable)

    async def begin_tracking(self) -> None:
        """Have the tracking know what an earlier process knew. Raises ReplfsError."""
        path = str(self.directory.tracking)
        try:
            expected = bool(self.state.peer)
            self.tracking, known = await Tracking.open(self.storage, path, self.disk.size, durable=self.durable, expected=expected)
            await trio.to_thread.run_sync(self.directory.sync)
        except OSError as error:
            raise ReplfsError(f"cannot use {printable(path)}: {error.strerror}", error.errno or errno.EIO) from error
        if expected and not known:
            logger.warning("%s is gone: all of the disk is taken to be out of sync", printable(path))

    def start_tasks(self, nursery: trio.Nursery) -> None:
        """Those that every volume has in the background, until it is succeeded."""
        nursery.start_soon(self._run_tasks)

    async def _run_tasks(self) -> None:
        with self._own_tasks:
            async with trio.open_nursery() as nursery:
                for task in self._tasks():
                    nursery.start_soon(task)

    def _tasks(self) -> list[Callable[[], Awaitable[None]]]:
        return [self.commit_regularly, self.remember_failed_syncs, self._save_tracking]

    async def _save_tracking(self) -> None:
        while True:
            await trio.sleep(_COMMIT_SECONDS)
            if self.tracking is not None:
                with suppress(OSError):  # which has been counted; it is tried again
                    await self.tracking.save(self.disk.flush if self.durable else None)

    def images(self) -> list[Image]:
        """The qcow2 images that are written to."""
        return [self.disk] if isinstance(self.disk, Image) else []

    async def commit_regularly(self) -> None:
        """Put what images have changed into their tables now and then, and when their journals fill: a background task."""
        while True:
            for image in self.images():
                image.changes.wanted = self._commit_wanted.set
            with trio.move_on_after(_COMMIT_SECONDS):
                await self._commit_wanted.wait()
            self._commit_wanted = trio.Event()
            for image in self.images():
                if image.changes.due:
                    with suppress(OSError):  # which has been counted, and is told to who asks for stable storage
                        await image.changes.commit()

    def _disk_files(self) -> list[File]:
        return [self.disk.file, *([self.disk.data] if isinstance(self.disk, Image) else [])]

    def _sync_failed(self, path: str) -> None:
        if path in (file.path for file in self._disk_files()):
            self._syncs_failed.set()

    async def remember_failed_syncs(self) -> None:
        """Save that the disk may lack what was written to it, which the next process could not know: a background task."""
        while True:
            await self._syncs_failed.wait()
            async with self.control_lock:
                await self._remember_failed_sync()

    async def _remember_failed_sync(self) -> None:
        if self._syncs_failed.is_set():
            try:
                await self.save(suspect=True)
            except ReplfsError as error:
                logger.error("%s", error)
            self._syncs_failed = trio.Event()

    async def flush_disk(self, *, durably: bool = True) -> dict[str, bool]:
        """Put the disk on stable storage, if it is to be ``durably`` there; gives what is to be saved about it, too.

        Raises OSError; ReplfsError if an earlier process could not do so, since which part it was is not known any more.
        """
        if self._saved is not None and self._saved.suspect:
            raise ReplfsError(
                f"{printable(str(self.config.disk))} may have lost what was written to it: an earlier process could not put it"
                f" on stable storage: make the copies equal again, and remove {printable(str(self.config.state_dir))} to start over"
            )
        if not durably:
            for file in self._disk_files():
                file.check_suspect()
            return {}
        await self.disk.flush()
        return {"suspect": False}

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
            if self.tracking is not None:
                await self.tracking.close()
            if isinstance(self.disk, Image):
                await self.disk.end_journal()
        except OSError as error:
            raise ReplfsError(f"cannot put everything on stable storage: {error.strerror}") from error
        finally:
            if self.tracking is not None:
                self.tracking.release()  # if something has failed: what was changed last is out of sync
            await self._remember_failed_sync()
            await self.disk.close()
            self.directory.close()

    @abstractmethod
    async def _close(self) -> None:
        """Flush and close what the side has beyond the disk. Raises OSError or ReplfsError."""

    async def abandon(self) -> None:
        """Give up before :meth:`begin` has ended well: whatever this process has made is removed."""
        if self.tracking is not None:
            self.tracking.release()
        self.directory.undo()
        await self.disk.close()
        self.directory.close()

    # Control

    async def control(self, operation: Operation, argument: Argument | None = None) -> None:
        """Carry out a control operation. Raises ReplfsError; its message is the volume's ``last_error`` then.

        ``argument``: the mode to start in, if one is named; what is asked of the resync or the verification.
        """
        async with self.control_lock:
            try:
                if self.settled:
                    raise ReplfsError("the volume is being unmounted", errno.ESHUTDOWN)
                if operation is Operation.START and argument is Mode.PRIMARY and await self._promoted():
                    self.last_error = ""
                    return
                if verdict(self.config.mode, operation, self.state.stage) is Verdict.DO:
                    if isinstance(argument, Mode):
                        check_start_mode(self.config.mode, argument)
                    await self._carry_out(operation, argument)
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

    async def _promoted(self) -> bool:
        """A secondary's that has taken over, and was told of a target: it has a primary in its place now. Raises ReplfsError."""
        return False

    async def _carry_out(self, operation: Operation, argument: Argument | None) -> None:
        """Raises OSError, ReplfsError."""
        await self._do[operation]()

    async def save(self, *, durably: bool = True, **changes: Any) -> NotDurable | None:
        """Replace the state. Raises ReplfsError: the old one stands on disk and in memory.

        Not ``durably``: it outlives this process, and its directory is to be settled for it to outlive a power cut, too.

        Gives an error back if the new one stands and is only not durable: to be raised when the nodes have been changed too.
        """
        async with self._saving:
            new = msgspec.structs.replace(self.state, **changes)
            problem = None
            try:
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(partial(self.directory.save, new, durably=durably))
            except NotDurable as error:
                logger.warning("%s", error)
                problem = error
            self.replace_state(new)
            if durably:
                self._saved_durably(problem is None)
            return problem

    def replace_state(self, new: State) -> None:
        """In memory, and tell who wants to know."""
        old, self.state = self.state, new
        if (old.mode, old.stage) != (new.mode, new.stage):
            self.events.publish(Kind.STAGE, mode=new.mode, stage=new.stage, generation=new.generation)
        elif old.generation != new.generation:
            self.events.publish(Kind.CHECKPOINT, generation=new.generation)

    def _saved_durably(self, durable: bool) -> None:
        """Called with each state that is saved, before anything else runs: whether a power cut may bring the one before it back."""
        return

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
            "mountpoint": str(self.config.mountpoint) if self.config.mountpoint is not None else None,
            "size": self.view.size,
            "durability": self.config.durability,
            "pid": os.getpid(),
            "state-dir": str(self.config.state_dir),
            "disk": describe(self.disk),
            **describe_chain(self.disk),
            "io-errors": self.storage.errors.counts(),
            "node": self.state.node,
            "peer": self.state.peer,
            "generations": {"current": self.state.ids.current, "bitmap": self.state.ids.bitmap, "history": self.state.ids.history},
            **self._side_status(),
            **self.exports_status(),
        }

    @abstractmethod
    def _side_status(self) -> dict[str, Any]: ...
