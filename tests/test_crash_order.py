"""Single sequences of events that once ended in lost or wrong data: each is short, and said step by step.

A kill is here that the files are closed as they are, and opened again; a power cut, that parts of them are put back as they were.
"""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from disks import qemu_img, raw, same
from volumes import checkpoint, secondary

from replfs.block.cache import Cache
from replfs.block.file import File
from replfs.block.qcow2 import changes
from replfs.block.qcow2.image import Image
from replfs.block.qcow2.journaling import use_journal
from replfs.block.qcow2.overlay import CLUSTER, SUBCLUSTER, create_overlay, open_overlay
from replfs.block.storage import Storage
from replfs.errors import ReplfsError
from replfs.volume.disk import open_disk

SIZE = 1 << 20


async def disk(folder: Path, options: str = "") -> Image:
    """A qcow2 disk of 256 MiB, used as with --durability power; made with these options if it is not there."""
    folder.mkdir(exist_ok=True)
    if not (folder / "disk").exists():
        made = options.replace("data_file=", f"data_file={folder}/")
        qemu_img("create", "-q", "-f", "qcow2", *(["-o", made] if made else []), folder / "disk", "256M")
    image = open_disk(folder / "disk", "qcow2", allow_backing=[folder])
    assert isinstance(image, Image)
    await use_journal(Storage(), image, str(folder / "journal"), keep=True)
    return image


def dies(image: Image) -> None:
    """Close its files as they are, and those below."""
    image.release()
    if image.backing is not None:
        image.backing.release()


async def overlay(folder: Path, *, append_only: bool = False) -> Image:
    folder.mkdir(exist_ok=True)
    if not (folder / "over").exists():
        (folder / "base").write_bytes(b"o" * (32 * CLUSTER))
        create_overlay(Storage(), str(folder / "over"), 32 * CLUSTER, "./base", "raw", journal=str(folder / "journal"))
    image = open_overlay(Storage(), str(folder / "over"), raw(folder / "base", (folder / "base").read_bytes()), Cache())
    await use_journal(Storage(), image, str(folder / "journal"), keep=True, required=True, append_only=append_only)
    return image


@pytest.mark.parametrize("options", ["data_file=d.raw", "data_file=d.raw,data_file_raw=on", "cluster_size=64k"])
@pytest.mark.parametrize("how", ["discard", "zeroes", "keep"])
async def test_a_part_of_what_was_just_written_is_given_up_before_a_kill(tmp_path: Path, options: str, how: str) -> None:
    """In an external data file the hole is made at once: the record of the write is not to be dropped because of it."""
    image = await disk(tmp_path / "a", options)
    await image.write(0, b"A" * (192 << 10))
    if how == "discard":
        await image.discard(0, 64 << 10)
    else:
        await image.write_zeroes(0, 64 << 10, may_unmap=how == "zeroes")
    expected = bytes(await image.read(0, 192 << 10))
    dies(image)
    again = await disk(tmp_path / "a")
    assert same(bytes(await again.read(0, 192 << 10)), expected)
    dies(again)


async def test_a_discard_that_fails_half_way_leaves_nothing_to_be_discarded_later(tmp_path: Path) -> None:
    image = await disk(tmp_path / "a", "data_file=d.raw")
    for offset in (0, 40 << 20):
        await image.write(offset, b"A" * 65536)
    await image.flush()
    plain = image.changes.zero

    def fails(start: int, stop: int, keep: bool) -> None:
        if start >= 32 << 20:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        plain(start, stop, keep)

    image.changes.zero = fails  # type: ignore[method-assign]
    with pytest.raises(OSError, match="Input/output error"):
        await image.discard(0, 64 << 20)
    image.changes.zero = plain  # type: ignore[method-assign]
    await image.write(0, b"W" * 65536)
    await image.flush()
    assert bytes(await image.read(0, 65536)) == b"W" * 65536
    dies(image)


async def test_version_2_acknowledges_nothing_before_what_leads_to_it(tmp_path: Path) -> None:
    """A write to a cluster whose entry another write is about to commit waits for that commit, too."""
    image = await disk(tmp_path / "a", "compat=0.10")
    await image.write(1 << 20, b"x" * 4096)
    plain, go = image.file.sync, trio.Event()
    acknowledged = trio.Event()

    async def slow() -> None:
        await go.wait()
        await plain()

    async def second() -> None:
        await image.write(4096, b"2" * 4096)
        acknowledged.set()

    image.file.sync = slow  # type: ignore[method-assign]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(image.write, 0, b"1" * 4096)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(second)
        await trio.testing.wait_all_tasks_blocked()
        assert not acknowledged.is_set()
        go.set()
    dies(image)
    again = await disk(tmp_path / "a")
    assert bytes(await again.read(0, 8192)) == b"1" * 4096 + b"2" * 4096
    dies(again)


async def test_records_of_before_the_last_cut_never_come_back(tmp_path: Path) -> None:
    """A cut loses the first record of some; the next process writes and flushes; what is left of them is older than that."""
    folder = tmp_path / "a"
    image = await overlay(folder)
    await image.write(0, b"0" * (16 * CLUSTER))
    await image.flush()
    dies(image)
    image = await overlay(folder)  # all is retired, and it begins anew
    before = (folder / "journal").read_bytes()
    for i in range(16):
        await image.write((16 + i) * CLUSTER, bytes([65 + i]) * 4096)
    dies(image)
    after = (folder / "journal").read_bytes()
    first = next(i for i in range(4096, len(after), 512) if after[i : i + 512] != before[i : i + 512])
    (folder / "journal").write_bytes(after[:first] + before[first : first + 512] + after[first + 512 :])
    image = await overlay(folder)
    for i in range(8):
        await image.write((24 + i) * CLUSTER, b"N" * 4096)
    await image.flush()
    expected = bytes(await image.read(0, 32 * CLUSTER))
    dies(image)
    image = await overlay(folder)
    assert same(bytes(await image.read(0, 32 * CLUSTER)), expected)
    dies(image)


async def test_a_record_does_not_come_back_when_its_cluster_is_another_s(tmp_path: Path) -> None:
    """Saving A fails after its record; its cluster is given back: before that, the mark that the record is retired is durable."""
    folder = tmp_path / "a"
    image = await overlay(folder, append_only=True)
    await image.populate(20 * CLUSTER, b"o" * SUBCLUSTER)
    await image.harden()
    await image.flush()
    durable = (folder / "journal").read_bytes()[:512]
    plain = image.data.write

    def full(offset: int, data: Any) -> None:
        if len(data) == 2 * CLUSTER:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(offset, data)

    image.data.write = full  # type: ignore[method-assign]
    with pytest.raises(OSError, match="No space"):
        await image.populate(0, b"a" * (2 * CLUSTER))
    image.data.write = plain  # type: ignore[method-assign]
    synced: list[str] = []
    assert image.changes.journal is not None
    journal_sync = image.changes.journal.file._fdatasync

    def seen() -> None:
        synced.append((folder / "journal").read_bytes()[:512].hex())
        journal_sync()

    image.changes.journal.file._fdatasync = seen  # type: ignore[method-assign]
    await image.flush()
    assert synced
    assert synced[-1] == (folder / "journal").read_bytes()[:512].hex() != durable.hex(), "retired for good, before it is free"
    dies(image)


async def test_after_a_kill_data_is_durable_before_anything_leads_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large pre-image, whose record has but its hashes, was saved, and never put on stable storage."""
    folder = tmp_path / "a"
    image = await overlay(folder, append_only=True)
    await image.populate(20 * CLUSTER, b"o" * SUBCLUSTER)
    await image.flush()
    await image.populate(0, b"a" * (2 * CLUSTER))
    dies(image)
    synced: list[tuple[str, ...]] = []
    written: list[tuple[int, int]] = []
    plain_sync, plain_write = changes.sync, File.write

    async def sync(*files: File) -> None:
        await plain_sync(*files)
        synced.append(tuple(Path(file.path).name for file in files))

    def write(self: File, offset: int, data: Any) -> None:
        if self.path.endswith("over") and len(data) == 4096:  # a slice of a table
            written.append((len(synced), offset))
        plain_write(self, offset, data)

    monkeypatch.setattr(changes, "sync", sync)
    monkeypatch.setattr(File, "write", write)
    image = await overlay(folder, append_only=True)
    assert written
    before = [name for names in synced[: written[0][0]] for name in names]
    assert "over" in before, "the image was synced"
    assert await image.read(0, 2 * CLUSTER) == b"a" * (2 * CLUSTER)
    dies(image)


async def test_from_a_state_that_is_not_durable_on_nothing_is_overwritten(tmp_path: Path) -> None:
    """The directory cannot be synced after a checkpoint: a cut may bring the old one back, whose pre-images are elsewhere."""
    async with secondary(tmp_path, b"0" * SIZE) as volume:
        plain, seen = volume.storage.sync_directory, []

        def fails(path: str) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        async def meanwhile() -> None:
            seen.append(volume.exported.unsettled is not None and volume.view.unsettled is not None)

        while volume._spare is None:
            await trio.lowlevel.checkpoint()
        await volume.control_lock.acquire()
        volume.control_lock.release()
        volume.drop_cache = meanwhile
        volume.storage.sync_directory = fails  # type: ignore[method-assign]
        with pytest.raises(ReplfsError, match="durable"):
            await checkpoint(volume)
        assert seen == [False, True], "before the state is saved, and at the first await after"
        with pytest.raises(OSError, match="Input/output error"):
            await volume.exported.write(0, b"P" * 4096)
        with pytest.raises(OSError, match="Input/output error"):
            await volume.view.flush()
        volume.storage.sync_directory = plain  # type: ignore[method-assign]
        await volume.exported.write(0, b"P" * 4096)
        assert volume.view.unsettled is None
        assert bytes(await volume.view.read(0, 4096)) == b"0" * 4096


async def test_a_sync_that_fails_at_the_end_is_remembered(tmp_path: Path) -> None:
    async def write_and_close() -> None:
        async with secondary(tmp_path, b"0" * SIZE) as volume:
            await volume.exported.write(0, b"P" * 4096)
            file = volume.disk.file
            plain = file._fdatasync

            def fails() -> None:
                file._fdatasync = plain  # type: ignore[method-assign]
                raise OSError(errno.EIO, os.strerror(errno.EIO))

            file._fdatasync = fails  # type: ignore[method-assign]

    with pytest.raises(ReplfsError, match="cannot put everything on stable storage"):
        await write_and_close()
    async with secondary(tmp_path) as volume:
        assert volume.state.suspect
        with pytest.raises(ReplfsError, match="make the copies equal again"):
            await checkpoint(volume)


@pytest.mark.parametrize("unreadable", [False, True], ids=["", "and cannot be read"])
async def test_a_write_that_is_torn_does_not_take_what_was_there_with_it(tmp_path: Path, unreadable: bool) -> None:
    """A write over data that was not committed yet fails in the middle of a unit: all else that was acknowledged stays.

    Also if what it has left cannot be read at first: it is tried again.
    """
    folder = tmp_path / "a"
    image = await overlay(folder)
    await image.write(0, b"A" * 16384)
    plain, read_now = image.data.write, image.data.read_now

    def torn(offset: int, data: Any) -> None:
        plain(offset, data[:700])
        if unreadable:
            image.data.read_now = unread  # type: ignore[method-assign]
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def unread(offset: int, length: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    image.data.write = torn  # type: ignore[method-assign]
    with pytest.raises(OSError, match="Input/output error"):
        await image.write(2048, b"B" * 4096)
    image.data.write = plain  # type: ignore[method-assign]
    image.data.read_now = read_now  # type: ignore[method-assign]
    if unreadable:
        await image.changes.close()
    dies(image)
    image = await overlay(folder)
    assert same(bytes(await image.read(0, 16384)), b"A" * 2048 + b"B" * 700 + b"A" * (16384 - 2748))
    dies(image)


async def test_a_write_that_fails_does_not_show_what_it_did_not_write(tmp_path: Path) -> None:
    """It finds no room for new subclusters of a cluster that is there: these are as before, not the hole that it has left."""
    folder = tmp_path / "a"
    image = await overlay(folder)
    before = bytes(await image.read(0, 3 * SUBCLUSTER))
    assert any(before)
    await image.write(SUBCLUSTER, b"A" * SUBCLUSTER)
    plain = image.data.write

    def refused(offset: int, data: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    image.data.write = refused  # type: ignore[method-assign]
    with pytest.raises(OSError, match="No space"):
        await image.write(0, b"B" * 3 * SUBCLUSTER)
    image.data.write = plain  # type: ignore[method-assign]
    dies(image)
    image = await overlay(folder)
    expected = before[:SUBCLUSTER] + b"A" * SUBCLUSTER + before[2 * SUBCLUSTER :]
    assert same(bytes(await image.read(0, 3 * SUBCLUSTER)), expected)
    dies(image)


async def test_what_is_given_up_during_a_commit_is_not_given_back_by_it(tmp_path: Path) -> None:
    """The tables still lead to it, so a power cut would find a hole, or what somebody else has put there."""
    image = await disk(tmp_path / "a")
    await image.write(0, b"A" * (4 * CLUSTER))
    await image.flush()
    await image.write_zeroes(0, CLUSTER)
    plain, syncing, go = image.file.sync, trio.Event(), trio.Event()

    async def slow() -> None:
        syncing.set()
        await go.wait()
        await plain()

    image.file.sync = slow  # type: ignore[method-assign]
    file = tmp_path / "a" / "disk"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(image.flush)
        await syncing.wait()
        await image.write_zeroes(2 * CLUSTER, CLUSTER)
        go.set()
    assert file.read_bytes().count(b"A" * CLUSTER) == 3, "one is gone, and it is the first"
    image.file.sync = plain  # type: ignore[method-assign]
    await image.flush()
    assert file.read_bytes().count(b"A" * CLUSTER) == 2
    dies(image)
