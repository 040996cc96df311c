"""Saving the state: it is replaced as a whole or not at all, and what went wrong is told apart."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from replfs.block.replication.rules import Mode, Stage
from replfs.block.storage import Storage
from replfs.errors import InUse, ReplfsError
from replfs.volume.state import DiskIdentity, NotDurable, State, StateDirectory

OLD = State(1, Mode.SECONDARY, Stage.RUNNING, 4, False, DiskIdentity("../d.raw", 512, 7))
NEW = State(1, Mode.SECONDARY, Stage.RUNNING, 5, False, DiskIdentity("../d.raw", 512, 7))


@pytest.fixture
def directory(tmp_path: Path) -> Any:
    made = StateDirectory(tmp_path / "state", Storage())
    made.make()
    made.save(OLD)
    yield made
    made.close()


def test_what_was_saved_is_loaded(directory: StateDirectory) -> None:
    assert directory.load() == OLD
    assert oct(directory.path.stat().st_mode) == "0o40700"
    assert oct((directory.path / "state.json").stat().st_mode) == "0o100600"


@pytest.mark.parametrize("step", ["open", "pwrite", "fdatasync", "replace"])
def test_a_save_that_fails_leaves_the_old_state(directory: StateDirectory, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(ReplfsError, match="cannot save the state") as failed:
        directory.save(NEW)
    monkeypatch.undo()
    assert failed.value.errno == errno.ENOSPC
    assert not isinstance(failed.value, NotDurable)
    assert directory.load() == OLD
    directory.save(NEW)
    assert directory.load() == NEW


def test_a_short_write_is_continued(directory: StateDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: plain(fd, data[:10], offset))
    directory.save(NEW)
    assert directory.load() == NEW


def test_a_state_whose_successor_finds_no_room_is_saved_all_the_same(
    directory: StateDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", fail)
    directory.save(NEW)
    assert directory.load() == NEW


def test_a_state_that_stands_but_is_not_durable_is_told_so(directory: StateDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(directory, "sync", fail)
    with pytest.raises(NotDurable):
        directory.save(NEW)
    assert directory.load() == NEW


def test_a_directory_is_one_process_s(directory: StateDirectory) -> None:
    with pytest.raises(InUse):
        StateDirectory(directory.path, Storage())


def test_leftovers_are_overlays_and_nothing_else(directory: StateDirectory) -> None:
    for name in ("active.4.qcow2", "hidden.4.qcow2", "active.5.qcow2", "hidden.3.qcow2", "notes.txt", "active.x.qcow2"):
        (directory.path / name).touch()
    directory.remove_leftovers(4)
    assert sorted(os.listdir(directory.path)) == [
        "active.4.qcow2",
        "active.x.qcow2",
        "hidden.4.qcow2",
        "notes.txt",
        "state.json",
        "state.json.new",
    ]


def test_only_what_was_made_here_is_undone(tmp_path: Path, directory: StateDirectory) -> None:
    directory.close()
    again = StateDirectory(directory.path, Storage())
    again.make()
    again.undo()
    again.close()
    assert directory.path.exists()
    made = StateDirectory(tmp_path / "new", Storage())
    made.make()
    made.save(OLD)
    made.undo()
    made.close()
    assert not (tmp_path / "new").exists()
