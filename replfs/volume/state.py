"""The state directory: what a volume remembers, and its overlays' files.

The state is one small JSON file that is only ever replaced as a whole, and that is how a checkpoint is one step: ``generation``
says which pair of overlays counts (active.N.qcow2, hidden.N.qcow2), and any other pair in the directory is a leftover.
The directory is locked by the process that uses it.
"""

import errno
import fcntl
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec

from replfs.block.replication.lineage import Ids
from replfs.block.replication.rules import Mode, Stage
from replfs.block.storage import Storage
from replfs.errors import InUse, ReplfsError, printable

_VERSION: Final = 1
_FILE: Final = "state.json"
_NEW: Final = "state.json.new"
_OVERLAY: Final = re.compile(r"(active|hidden)\.(\d+|spare)\.(qcow2|journal)")
_LIMIT: Final = 1 << 20
_BLOCK: Final = 4096


class DiskIdentity(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """By what a disk is known again. ``path`` as seen from the state directory; ``inode`` 0 for a device; ``size`` in bytes."""

    path: str
    size: int
    inode: int
    format: str = "raw"


class State(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A volume's state. ``error``: the sticky error is set, or, on a primary, may be: it was not closed.

    ``suspect``: a sync of the disk has failed, and not all that it was about has been written and synced again since. ``node`` is
    this volume's own name, ``peer`` that of the one that it is replicated to or from. ``inconsistent``: a secondary's disk is
    between two states of its primary's.
    """

    version: int
    mode: Mode
    stage: Stage
    generation: int
    error: bool
    disk: DiskIdentity
    suspect: bool = False
    node: str = ""
    peer: str = ""
    ids: Ids = Ids()
    inconsistent: bool = False


class NotDurable(ReplfsError):
    """The new state stands, but a power cut may bring the old one back."""


class StateDirectory:
    """The directory, locked while this object is open. Nothing is written before :meth:`make`."""

    def __init__(self, path: Path, storage: Storage) -> None:
        """Raises InUse, or ReplfsError if the directory is there and cannot be used."""
        self.path = path
        self._storage = storage
        self._fd = -1
        self._made = False
        if path.is_dir():
            self._lock()
        elif os.path.lexists(path):
            raise ReplfsError(f"{printable(str(path))} is not a directory: name another with --state-dir", errno.ENOTDIR)

    def _lock(self) -> None:
        try:
            self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise InUse(
                f"the state directory {printable(str(self.path))} is in use by another replfs: unmount that one first"
            ) from None
        except OSError as error:
            raise self._problem(error) from error

    def _problem(self, error: OSError) -> ReplfsError:
        return ReplfsError(
            f"the state directory {printable(str(self.path))} cannot be used: {error.strerror}", error.errno or errno.EIO
        )

    def make(self) -> None:
        """Create the directory (0700) if it is not there. Raises ReplfsError."""
        if self._fd < 0:
            try:
                self._storage.make_directory(str(self.path))
                self._made = True
                self._storage.sync_directory(str(self.path.parent))
            except OSError as error:
                raise self._problem(error) from error
            self._lock()

    def undo(self) -> None:
        """Remove the directory and all in it, if this process has made it."""
        if self._made:
            shutil.rmtree(self.path)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def load(self) -> State | None:
        """The saved state, None if there is none. Raises ReplfsError if it is damaged or from another version of replfs."""
        if self._fd < 0:
            return None
        path = self.path / _FILE
        try:
            with path.open("rb") as file:
                state = msgspec.json.decode(file.read(_LIMIT), type=State)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._problem(error) from error
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise ReplfsError(
                f"the state file {printable(str(path))} is damaged ({printable(str(error))}): restore it, or remove the"
                " state directory to start over with what the disk itself holds",
                errno.EINVAL,
            ) from error
        if state.version != _VERSION or state.generation < 0:
            raise ReplfsError(
                f"the state file {printable(str(path))} is of version {state.version}, and this replfs knows {_VERSION}",
                errno.EINVAL,
            )
        return state

    def save(self, state: State, *, durably: bool = True) -> None:
        """Replace the saved state and put it on stable storage; not ``durably``, :meth:`settle` does. Waits for the device.

        Raises ReplfsError if it could not be replaced: the old one stands. Raises NotDurable if it was replaced, and only
        making that durable failed.
        """
        new = str(self.path / _NEW)
        data = msgspec.json.format(msgspec.json.encode(state))
        data = data.ljust(len(data) + _BLOCK - len(data) % _BLOCK, b"\n")
        try:
            file = self._storage.open_own(new)
            try:
                file.write(0, data)
                file.truncate(len(data))
                if durably:
                    file.sync_now()
            finally:
                file.close()
            self._storage.replace(new, str(self.path / _FILE))
        except OSError as error:
            raise ReplfsError(
                f"cannot save the state in {printable(str(self.path))}: {error.strerror}", error.errno or errno.EIO
            ) from error
        try:
            if durably:
                self.sync()
        except OSError as error:
            raise NotDurable(
                f"cannot make {printable(str(self.path))} durable: {error.strerror}", error.errno or errno.EIO
            ) from error
        finally:
            self._reserve(len(data))

    def _reserve(self, length: int) -> None:
        """Have room for the next state: a checkpoint or a failover must not fail because the overlays have taken all there was.

        Where that fails, the next save has to find room when it comes.
        """
        with suppress(OSError):
            file = self._storage.open_own(str(self.path / _NEW))
            try:
                file.reserve(length)
            finally:
                file.close()

    def sync(self) -> None:
        """Put the directory's entries on stable storage. Raises OSError."""
        self._storage.sync_directory(str(self.path))

    def settle(self) -> None:
        """Put the saved state on stable storage, whoever has saved it. Raises OSError."""
        file = self._storage.open_own(str(self.path / _FILE))
        try:
            file.sync_now()
        finally:
            file.close()
        self.sync()

    def overlay(self, layer: str, generation: int) -> Path:
        """The path of a generation's ``active`` or ``hidden`` overlay."""
        return self.path / f"{layer}.{generation}.qcow2"

    def journal(self, layer: str, generation: int) -> Path:
        """The path of an overlay's journal."""
        return self.path / f"{layer}.{generation}.journal"

    @property
    def _spare_journal(self) -> Path:
        return self.path / "hidden.spare.journal"

    def set_aside(self, journal: Path) -> None:
        """Keep the journal of a hidden disk that is gone: to make one takes longer than to empty one. Raises OSError."""
        self._storage.replace(str(journal), str(self._spare_journal))

    def take_spare(self, journal: Path) -> None:
        """Have a journal that was set aside be where a new one is to be made, if there is one. Raises OSError."""
        with suppress(FileNotFoundError):
            self._storage.replace(str(self._spare_journal), str(journal))

    def remove_spare(self) -> None:
        """Raises OSError."""
        self.remove(self._spare_journal)

    @property
    def tracking(self) -> Path:
        """The path of what is known of the other side's copy."""
        return self.path / "tracking"

    @property
    def disk_journal(self) -> Path:
        """The path of the journal of a qcow2 disk."""
        return self.path / "disk.journal"

    def remove_leftovers(self, *keep: int) -> None:
        """Delete the files of every generation but these. Raises OSError."""
        kept = {f"{layer}.{generation}" for layer in ("active", "hidden") for generation in keep}
        for entry in os.listdir(self.path):
            if _OVERLAY.fullmatch(entry) and entry.rpartition(".")[0] not in kept:
                self._storage.unlink(str(self.path / entry))

    def remove(self, *paths: Path) -> None:
        """Delete files that may be there. Raises OSError."""
        for path in paths:
            with suppress(FileNotFoundError):
                self._storage.unlink(str(path))


def identify(disk: Path, disk_format: str, size: int, state_dir: Path) -> DiskIdentity:
    """What a disk will be known by, as seen from its state directory."""
    info = disk.stat()
    regular = (info.st_mode & 0o170000) == 0o100000
    path = os.path.relpath(disk, state_dir) if regular else str(disk)
    return DiskIdentity(path if "/" in path else f"./{path}", size, info.st_ino if regular else 0, disk_format)


def in_mode(state: State, mode: Mode) -> State:
    """A state as a volume in another mode may take it over, in stage none; else as it is.

    A primary's disk may become a secondary: whether its content may be overwritten is told when the sides meet. A secondary's may
    become a primary when it has taken over: before that its overlays are a part of what it holds.
    """
    taken_over = state.mode is Mode.SECONDARY and mode is Mode.PRIMARY and state.stage is Stage.DONE
    if taken_over or (state.mode is Mode.PRIMARY and mode is Mode.SECONDARY):
        return msgspec.structs.replace(state, mode=mode, stage=Stage.NONE, error=False, inconsistent=False)
    return state


def check_identity(state: State, disk: DiskIdentity, mode: Mode, state_dir: Path) -> None:
    """Raises ReplfsError if the state is another disk's, or another mode's."""
    if state.mode is not mode:
        raise ReplfsError(
            f"{printable(str(state_dir))} is the state of a {state.mode} volume: mount it with replfs {state.mode}, or name"
            " another --state-dir (or remove this one) to start over",
            errno.EINVAL,
        )
    if state.disk != disk:
        if disk == msgspec.structs.replace(state.disk, size=disk.size):
            raise ReplfsError(
                f"the disk's size has changed from {state.disk.size} to {disk.size} bytes since {printable(str(state_dir))} was"
                " written: make it what it was, or remove that directory to start over with what the disk itself holds",
                errno.EINVAL,
            )
        was, now = (
            f"{printable(known.path)}, {known.format}, {known.size} bytes, inode {known.inode}" for known in (state.disk, disk)
        )
        raise ReplfsError(
            f"{printable(str(state_dir))} is the state of another disk ({was}; this is {now}): name another --state-dir,"
            " or remove this one to start over with what the disk itself holds",
            errno.EINVAL,
        )
