"""Staged writes: acknowledged before what they overwrite is on stable storage, and lost by nothing but a power cut."""

import errno
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from test_flush import SIZE, synced
from volumes import content, kill, on_disk, secondary, until_stage

from replfs.block.replication.rules import Operation, Stage
from replfs.errors import ReplfsError

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


async def test_a_commit_does_not_retire_what_is_staged(tmp_path: Path) -> None:
    async with secondary(tmp_path, b"o" * SIZE) as volume:
        await volume.exported.write(SIZE - 512, b"x" * 512)
        assert volume.exported.write_at_once(0, b"x" * 4096)
        for image in volume.images():
            assert image.changes is not None
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


async def test_what_is_staged_waits_for_a_disk_that_fails(tmp_path: Path) -> None:
    async with secondary(tmp_path, b"o" * SIZE) as volume:
        await volume.exported.write(SIZE - 512, b"x" * 512)
        plain = volume.disk.file.write

        def fails(offset: int, data: Any) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        assert volume.exported.write_at_once(0, b"x" * 4096)
        volume.disk.file.write = fails  # type: ignore[method-assign]
        for attempt in (volume.exported.flush, partial(volume.exported.read, 0, 512), partial(volume.exported.write, 0, b"y")):
            with pytest.raises(OSError, match="Input/output error"):
                await attempt()
        with pytest.raises(ReplfsError, match="Input/output error"):
            await volume.control(Operation.CHECKPOINT)
        assert not volume.exported.write_at_once(8192, b"x" * 4096), "nothing more is staged"
        volume.disk.file.write = plain  # type: ignore[method-assign]
        await volume.control(Operation.CHECKPOINT)
        assert (await content(volume))[:8192] == b"x" * 4096 + b"o" * 4096


async def test_a_journal_full_of_what_the_disk_does_not_take_is_an_error_and_not_a_wait(tmp_path: Path) -> None:
    async with secondary(tmp_path, b"o" * SIZE) as volume:
        await volume.exported.write(SIZE - 512, b"x" * 512)
        plain = volume.disk.file.write

        def fails(offset: int, data: Any) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        volume.disk.file.write = fails  # type: ignore[method-assign]
        staged = 0
        while volume.exported.write_at_once(staged << 16, b"x" * (32 << 10)):
            staged += 1
        with pytest.raises(OSError, match=r"journal is full|Input/output error"):  # whichever is noticed first
            await volume.exported.write(staged << 16, b"x" * (32 << 10))
        assert staged > 1
        volume.disk.file.write = plain  # type: ignore[method-assign]
        await volume.exported.flush()
        assert (await on_disk(volume)).count(b"x") == staged * (32 << 10) + 512
        assert await content(volume) == b"o" * SIZE


async def test_a_journal_that_could_not_be_synced_does_not_keep_what_is_staged_from_the_disk(tmp_path: Path) -> None:
    async with secondary(tmp_path, b"o" * SIZE) as volume:
        await volume.exported.write(SIZE - 512, b"x" * 512)
        hidden = volume.exported.hidden
        assert hidden is not None
        assert hidden.changes is not None
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
        await volume.exported.flush()  # the tables lead to the pre-image now
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
