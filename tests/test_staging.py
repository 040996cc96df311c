"""Staged writes: acknowledged before what they overwrite is on stable storage, and lost by nothing but a power cut."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from test_flush import SIZE, synced
from volumes import content, kill, on_disk, secondary, until_stage

from replfs.block.replication.rules import Operation, Stage
from replfs.errors import ReplfsError
from replfs.volume.secondary import SecondaryVolume

__all__ = ["synced"]  # a fixture


async def test_a_staged_write_reaches_the_disk_when_its_pre_image_is_durable(tmp_path: Path, synced: list[str]) -> None:
    async with secondary(tmp_path, b"o" * SIZE) as volume:
        await volume.exported.write(SIZE - 512, b"x" * 512)  # so that there is a table
        plain, seen = volume.disk.file.write, []

        def write(offset: int, data: Any) -> None:
            seen.append((offset, list(synced)))
            plain(offset, data)

        volume.disk.file.write = write  # type: ignore[method-assign]
        synced.clear()
        for offset in (0, 1 << 16, 1 << 17):
            assert volume.exported.write_at_once(offset, b"x" * 4096), "acknowledged"
        assert (seen, synced) == ([], []), "with nothing waited for"
        assert not volume.exported.read_at_once(0, memoryview(bytearray(4096)))
        assert await volume.exported.read(0, 4096) == b"x" * 4096, "who reads it waits"
        assert seen == [(offset, ["hidden.0.journal"]) for offset in (0, 1 << 16, 1 << 17)], "one sync for all"
        assert not volume.exported.write_at_once(0, b"y" * 4096), "until it is known to be there, it is not written over"
        await volume.exported.write(0, b"y" * 4096)
        assert synced.count("hidden.0.journal") == 2
        assert volume.exported.write_at_once(0, b"z" * 4096)
        assert (await on_disk(volume))[:4096] == b"z" * 4096


async def test_a_flush_covers_what_is_staged(tmp_path: Path, synced: list[str]) -> None:
    async with secondary(tmp_path, b"o" * SIZE) as volume:
        await volume.exported.write(SIZE - 512, b"x" * 512)
        synced.clear()
        assert volume.exported.write_at_once(0, b"x" * 4096)
        await volume.exported.flush()
        assert Path(volume.disk.file.path).read_bytes()[:4096] == b"x" * 4096
        assert synced[:1] == ["hidden.0.journal"]
        assert "secondary.raw" in synced


async def test_what_is_staged_outlives_a_kill(tmp_path: Path) -> None:
    async with secondary(tmp_path, b"o" * SIZE) as volume:
        await volume.exported.write(SIZE - 512, b"x" * 512)
        for i, letter in enumerate(b"abc"):
            assert volume.exported.write_at_once(i * 5000, bytes([letter]) * 3000)
        kill(volume)
        assert Path(volume.disk.file.path).read_bytes() == b"o" * (SIZE - 512) + b"x" * 512
    expected = bytearray(b"o" * (SIZE - 512) + b"x" * 512)
    for i, letter in enumerate(b"abc"):
        expected[i * 5000 : i * 5000 + 3000] = bytes([letter]) * 3000
    async with secondary(tmp_path) as volume:
        assert Path(volume.disk.file.path).read_bytes() == expected
        assert await content(volume) == b"o" * SIZE
        await volume.exported.write(0, b"later")
        kill(volume)
    async with secondary(tmp_path) as volume:  # and is not written again
        assert Path(volume.disk.file.path).read_bytes() == b"later" + expected[5:]
        assert await content(volume) == b"o" * SIZE


async def test_what_a_mount_finds_staged_is_durable_before_it_is_forgotten(tmp_path: Path, synced: list[str]) -> None:
    """A second power cut must not take back what has been seen after the first."""
    async with secondary(tmp_path, b"o" * SIZE) as volume:
        await volume.exported.write(SIZE - 512, b"x" * 512)
        assert volume.exported.write_at_once(0, b"x" * 4096)
        kill(volume)
    synced.clear()
    async with secondary(tmp_path):
        assert "secondary.raw" in synced


async def test_a_commit_forgets_nothing_that_is_staged(tmp_path: Path) -> None:
    async with secondary(tmp_path, b"o" * SIZE) as volume:
        await volume.exported.write(SIZE - 512, b"x" * 512)
        assert volume.exported.write_at_once(0, b"x" * 4096)
        for image in volume.images():
            await image.changes.commit()
        kill(volume)
    async with secondary(tmp_path) as volume:
        assert Path(volume.disk.file.path).read_bytes()[:4096] == b"x" * 4096
        assert await content(volume) == b"o" * SIZE


@pytest.mark.parametrize("changes", [{"durability": "process"}, {"start": False}], ids=["process", "no-start"])
async def test_what_is_staged_is_on_the_disk_however_it_is_mounted_next(tmp_path: Path, changes: dict[str, Any]) -> None:
    async with secondary(tmp_path, b"o" * SIZE) as volume:
        await volume.exported.write(SIZE - 512, b"x" * 512)
        assert volume.exported.write_at_once(0, b"x" * 4096)
        kill(volume)
    async with secondary(tmp_path, **changes) as volume:
        assert Path(volume.disk.file.path).read_bytes() == b"x" * 4096 + b"o" * (SIZE - 4608) + b"x" * 512


async def test_a_failover_takes_back_what_is_staged(tmp_path: Path) -> None:
    async with secondary(tmp_path, b"o" * SIZE) as volume:
        await volume.exported.write(SIZE - 512, b"x" * 512)
        assert volume.exported.write_at_once(0, b"x" * 4096)
        await volume.control(Operation.FAILOVER)
        await until_stage(volume, Stage.DONE)
        assert Path(volume.disk.file.path).read_bytes() == b"o" * SIZE


async def test_a_disk_that_has_no_room_yet_is_not_staged_for(tmp_path: Path) -> None:
    """What has been acknowledged could not be written."""
    async with secondary(tmp_path, bytes(SIZE)) as volume:
        await volume.exported.write(SIZE - 512, b"x" * 512)
        assert not volume.exported.write_at_once(0, b"x" * 4096)


@contextmanager
def failing(volume: SecondaryVolume) -> Iterator[None]:
    """Nothing can be written to the disk."""

    def write(offset: int, data: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(volume.disk.file, "write", write)
        yield


async def test_what_is_staged_waits_for_a_disk_that_fails(tmp_path: Path) -> None:
    async with secondary(tmp_path, b"o" * SIZE) as volume:
        await volume.exported.write(SIZE - 512, b"x" * 512)
        assert volume.exported.write_at_once(0, b"x" * 4096)
        with failing(volume):
            for attempt in (volume.exported.flush, partial(volume.exported.read, 0, 512), partial(volume.exported.write, 0, b"y")):
                with pytest.raises(OSError, match="Input/output error"):
                    await attempt()
            for operation in (Operation.CHECKPOINT, Operation.STOP):
                with pytest.raises(ReplfsError, match="Input/output error"):
                    await volume.control(operation)
            assert not volume.exported.write_at_once(8192, b"x" * 4096), "nothing more is staged"
        await volume.control(Operation.CHECKPOINT)
        assert (await content(volume))[:8192] == b"x" * 4096 + b"o" * 4096


async def test_a_failover_does_not_wait_for_what_is_staged(tmp_path: Path) -> None:
    async with secondary(tmp_path, b"o" * SIZE) as volume:
        await volume.exported.write(SIZE - 512, b"x" * 512)
        assert volume.exported.write_at_once(0, b"x" * 4096)
        with failing(volume):
            with pytest.raises(OSError, match="Input/output error"):
                await volume.exported.flush()
            await volume.control(Operation.FAILOVER)
        await until_stage(volume, Stage.DONE)
        assert Path(volume.disk.file.path).read_bytes() == b"o" * SIZE


async def fill(volume: SecondaryVolume, count: int) -> int:
    """Stage writes until there is no room for another one: how many."""
    staged = 0
    while volume.exported.write_at_once(staged << 15, b"x" * (32 << 10)):
        staged += 1
    assert staged > count
    return staged


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is staged is carried out when somebody needs it, and not before."""
    monkeypatch.setattr("replfs.block.staging._GATHERING", 3600)


async def test_a_journal_full_of_what_is_staged_is_emptied(tmp_path: Path, patient: None) -> None:
    async with secondary(tmp_path, b"o" * SIZE) as volume:
        await volume.exported.write(SIZE - 512, b"x" * 512)
        staged = await fill(volume, 4)
        await volume.exported.write(staged << 15, b"x" * (32 << 10))
        assert (await on_disk(volume)).count(b"x") == (staged + 1) * (32 << 10) + 512
        assert await content(volume) == b"o" * SIZE


async def test_a_journal_full_of_what_the_disk_does_not_take_is_an_error_and_not_a_wait(tmp_path: Path, patient: None) -> None:
    async with secondary(tmp_path, b"o" * SIZE) as volume:
        await volume.exported.write(SIZE - 512, b"x" * 512)
        staged = await fill(volume, 4)
        with failing(volume), pytest.raises(OSError, match="Input/output error"):
            await volume.exported.write(staged << 15, b"x" * (32 << 10))
        await volume.exported.flush()
        assert (await on_disk(volume)).count(b"x") == staged * (32 << 10) + 512
        assert await content(volume) == b"o" * SIZE


async def test_an_end_puts_what_is_staged_on_the_disk(tmp_path: Path, patient: None) -> None:
    async with secondary(tmp_path, b"o" * SIZE) as volume:
        await volume.exported.write(SIZE - 512, b"x" * 512)
        assert volume.exported.write_at_once(0, b"x" * 4096)
    assert (tmp_path / "secondary.raw").read_bytes()[:4096] == b"x" * 4096


@pytest.mark.parametrize("operation", [Operation.CHECKPOINT, Operation.STOP])
async def test_what_comes_while_the_disk_is_flushed_is_in_a_checkpoint_too(
    tmp_path: Path, patient: None, operation: Operation, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with secondary(tmp_path, b"o" * SIZE) as volume:
        await volume.exported.write(SIZE - 512, b"x" * 512)
        plain = volume.disk.flush
        staged = False

        async def flush() -> None:
            nonlocal staged
            await plain()
            if not staged:
                staged = True
                assert volume.exported.write_at_once(0, b"x" * 4096)

        monkeypatch.setattr(volume.disk, "flush", flush)
        await volume.control(operation)
        assert staged
        assert (await content(volume))[:8192] == b"x" * 4096 + b"o" * 4096


async def test_a_journal_that_cannot_be_read_does_not_keep_anybody_from_starting_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with secondary(tmp_path, b"o" * SIZE) as volume:
        await volume.exported.write(SIZE - 512, b"x" * 512)
        kill(volume)
    (tmp_path / "secondary.raw.replfs" / "hidden.0.journal").write_bytes(b"damaged")
    with pytest.raises(ReplfsError, match="journal is damaged"):
        async with secondary(tmp_path):
            pass
    async with secondary(tmp_path, start=False) as volume:
        assert volume.state.stage is Stage.NONE
    assert "may be missing on the disk" in caplog.text


async def test_a_journal_that_could_not_be_synced_does_not_keep_what_is_staged_from_the_disk(
    tmp_path: Path, synced: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with secondary(tmp_path, b"o" * SIZE) as volume:
        await volume.exported.write(SIZE - 512, b"x" * 512)
        hidden = volume.exported.hidden
        assert hidden is not None
        assert hidden.changes.journal is not None
        plain = hidden.changes.journal.file._fdatasync

        def fails() -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        assert volume.exported.write_at_once(0, b"x" * 4096)
        hidden.changes.journal.file._fdatasync = fails  # type: ignore[method-assign]
        with pytest.raises(OSError, match="Input/output error"):
            await volume.exported.flush()
        assert Path(volume.disk.file.path).read_bytes()[:4096] == b"o" * 4096
        hidden.changes.journal.file._fdatasync = plain  # type: ignore[method-assign]
        write, before = volume.disk.file.write, []

        def written(offset: int, data: Any) -> None:
            before.append(synced.count("hidden.0.qcow2"))
            write(offset, data)

        monkeypatch.setattr(volume.disk.file, "write", written)
        synced.clear()
        await volume.exported.flush()
        assert before == [2], "the pre-image is durable, and then the tables that lead to it"
        assert Path(volume.disk.file.path).read_bytes()[:4096] == b"x" * 4096
        assert await content(volume) == b"o" * SIZE
        await volume.control(Operation.CHECKPOINT)
        assert (await content(volume))[:8192] == b"x" * 4096 + b"o" * 4096


async def test_a_checkpoint_takes_the_journal_of_an_earlier_one(tmp_path: Path) -> None:
    """To make one for every checkpoint would be to write all of its room each time."""
    folder = tmp_path / "secondary.raw.replfs"

    async def until(condition: Callable[[], bool]) -> None:
        with trio.fail_after(60):
            while not condition():
                await trio.lowlevel.checkpoint()

    async with secondary(tmp_path, b"o" * SIZE) as volume:
        earlier = 0
        for generation in range(4):
            await volume.exported.write(0, b"%d" % generation)
            await until(lambda: volume._spare is not None)
            await volume.control(Operation.CHECKPOINT)
            await until(lambda: volume._spare is not None and (folder / "hidden.spare.journal").exists())
            spare = (folder / "hidden.spare.journal").stat().st_ino
            if earlier:
                assert (folder / f"hidden.{generation + 2}.journal").stat().st_ino == earlier
            earlier = spare
        assert (await content(volume))[:1] == b"3"
    async with secondary(tmp_path) as volume:
        assert (await content(volume))[:1] == b"3"
        await volume.control(Operation.STOP)
    assert "hidden.spare.journal" not in os.listdir(folder)
