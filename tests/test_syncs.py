"""Syncs without a thread: they reach the file system, tell of its errors, and give way to threads where the kernel has none."""

import errno
import os
from pathlib import Path

import pytest
import trio
from harness import Sides

from replfs.block import syncs
from replfs.block.storage import Storage
from replfs.block.syncs import fdatasync


@pytest.fixture
def asynchronous(monkeypatch: pytest.MonkeyPatch, syncs_in_threads: None) -> None:
    monkeypatch.setattr(syncs, "asynchronous", True)


@pytest.mark.usefixtures("asynchronous")
async def test_a_sync_takes_no_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = Storage().create(str(tmp_path / "f"))
    monkeypatch.setattr(os, "fdatasync", lambda fd: pytest.fail("a thread was asked"))
    for number in range(3):
        file.write(number * 4096, b"x" * 4096)
        await file.sync()
    assert syncs.asynchronous
    file.close()


@pytest.mark.usefixtures("asynchronous")
async def test_many_at_a_time(tmp_path: Path) -> None:
    done: list[bool] = []

    async def sync(fd: int) -> None:
        done.append(await fdatasync(fd))

    files = [(tmp_path / str(number)).open("wb") for number in range(20)]
    for _ in range(2):
        async with trio.open_nursery() as nursery:
            for file in files:
                file.write(os.urandom(100_000))
                nursery.start_soon(sync, file.fileno())
    assert done == [True] * 40
    assert len(syncs._idle) <= 20
    for file in files:
        file.close()


@pytest.mark.usefixtures("asynchronous")
async def test_what_the_file_system_says_is_the_outcome(sides: Sides) -> None:
    """That of a mounted file whose replication is not started: each fsync fails. Afterwards others succeed again."""
    side = sides.make("secondary", 1 << 20, "--listen", f"unix:{sides.socket}")
    side.mount("--no-start")
    fd = os.open(side.file, os.O_RDWR)
    try:
        for _ in range(2):
            with pytest.raises(OSError, match="Input/output error") as failed:
                await fdatasync(fd)
            assert failed.value.errno == errno.EIO
        await trio.to_thread.run_sync(side.set, "start", "secondary")
        assert await fdatasync(fd)
    finally:
        os.close(fd)


@pytest.mark.usefixtures("asynchronous")
async def test_who_is_cancelled_has_waited(tmp_path: Path) -> None:
    with (tmp_path / "f").open("wb") as file, trio.CancelScope() as scope:
        file.write(os.urandom(1 << 20))
        scope.cancel()
        assert await fdatasync(file.fileno())


@pytest.mark.usefixtures("asynchronous")
async def test_a_kernel_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system call that is asked for there does not exist."""
    monkeypatch.setattr(syncs, "_NUMBERS", dict.fromkeys(syncs._NUMBERS, (100_000, 100_000, 100_000)))
    monkeypatch.setattr(syncs, "_idle", [])
    file = Storage().create(str(tmp_path / "f"))
    file.write(0, b"x")
    await file.sync()
    assert not syncs.asynchronous
    file.close()


@pytest.mark.usefixtures("asynchronous")
async def test_a_closed_descriptor_is_an_error_of_its_own() -> None:
    """And no reason to use threads from then on."""
    assert not await fdatasync(-1)
    assert syncs.asynchronous


@pytest.mark.usefixtures("asynchronous")
async def test_an_end_that_the_kernel_does_not_tell_of_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is that of an earlier sync, whose end nobody has asked for."""
    monkeypatch.setattr(syncs, "_idle", [])
    with (tmp_path / "f").open("wb") as file:
        assert await fdatasync(file.fileno())
        (context,) = syncs._idle
        context.begin(file.fileno())
        context._sync += 1
        with pytest.raises(RuntimeError, match="does not tell"):
            await context.end()
        syncs._idle[:] = [context]
        context._get = 100_000
        with pytest.raises(OSError, match="does not tell"):
            await fdatasync(file.fileno())
    assert not syncs.asynchronous
    assert syncs._idle == []
