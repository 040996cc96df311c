"""What is on stable storage, and when: which files are synced before an answer is given."""

import errno
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pyfuse3
import pytest
import trio
from test_replication import Faulty, pair
from volumes import checkpoint, primary, secondary

from replfs.block.storage import Storage
from replfs.errors import ReplfsError
from replfs.export.fuse import FuseExport
from replfs.protocol.nbd.uri import Target, UnixAddress
from replfs.volume.base import Volume
from replfs.volume.config import MountConfig

MOUNT = MountConfig(options=(), uid=0, gid=0, mode=0o600, read_only=False)
SIZE = 1 << 20


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were put on stable storage, in order."""
    names: list[str] = []
    plain = os.fdatasync

    def fdatasync(fd: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{fd}")).name
        if ".1." not in name:  # the next generation's, which are made in the background
            names.append(name)
        plain(fd)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    return names


def export(volume: Volume) -> Any:
    return FuseExport(volume, MOUNT)


async def opened(file: Any, flags: int) -> Any:
    return (await file.open(2, flags, pyfuse3.RequestContext())).fh


@pytest.mark.parametrize("flags", [os.O_SYNC, os.O_DSYNC, os.O_SYNC | os.O_DIRECT])
async def test_a_synchronous_descriptor_syncs_each_write(tmp_path: Path, synced: list[str], flags: int) -> None:
    async with secondary(tmp_path, bytes(SIZE)) as volume:
        file = export(volume)
        handle = await opened(file, os.O_RDWR | flags)
        for _ in range(2):
            synced.clear()
            await file.write(handle, 0, b"x" * 512)
            assert "active.0.qcow2" in synced
        assert file.write_at_once(handle, 0, b"x" * 512) < 0  # it has to wait for that
        plain = await opened(file, os.O_RDWR)
        assert file.write_at_once(plain, 0, b"x" * 512) == 512
        assert file.write_at_once(plain, SIZE - 256, b"x" * 512) < 0  # which ends behind the disk
        synced.clear()
        await file.write(plain, 0, b"x" * 512)
        assert synced == []


@pytest.mark.parametrize(
    ("durability", "layers"),
    [("power", ["active.0.journal", "active.0.qcow2"]), ("process", ["active.0.qcow2", "hidden.0.qcow2", "secondary.raw"])],
)
async def test_fsync_covers_every_layer_of_the_view(tmp_path: Path, synced: list[str], durability: str, layers: list[str]) -> None:
    """With power, what is below active is durable anyway: the disk since the checkpoint, hidden since it was written."""
    async with secondary(tmp_path, bytes(SIZE), durability=durability) as volume:
        file = export(volume)
        await volume.exported.write(0, b"x")
        await volume.view.write(4096, b"x")
        synced.clear()
        await file.fsync(await opened(file, os.O_RDWR), True)
        assert sorted(set(synced)) == layers
        synced.clear()
        await file.fsync(await opened(file, os.O_RDWR), True)
        assert synced == []  # nothing was written since


async def test_a_flush_over_nbd_covers_both_sides(tmp_path: Path, synced: list[str]) -> None:
    async with pair(tmp_path, SIZE) as (near, _):
        await near.view.write(0, b"x" * 512)
        await near.link.flush()
        await near.view.write(0, b"x" * 512)
        synced.clear()
        await near.view.flush()
        assert synced == ["primary.raw", "secondary.raw"]


async def test_a_pre_image_is_durable_before_the_disk_is_overwritten(tmp_path: Path, synced: list[str]) -> None:
    async with secondary(tmp_path, b"o" * SIZE) as volume:
        plain, seen = volume.disk.write, []

        async def write(offset: int, data: Any) -> None:
            seen.append(set(synced))
            await plain(offset, data)

        volume.disk.write = write  # type: ignore[method-assign]
        for offset, length in ((0, 512), (0, 512), (1 << 16, 512), (1 << 17, 1 << 17)):
            synced.clear()
            await volume.exported.write(offset, b"x" * length)
        journal, both = {"hidden.0.journal"}, {"hidden.0.journal", "hidden.0.qcow2"}
        # A table is made first; what was saved before is not saved again; what is small has its pre-image in the journal.
        assert seen == [both, set(), journal, both]


async def test_one_barrier_serves_the_writes_that_come_together(tmp_path: Path, synced: list[str]) -> None:
    async with secondary(tmp_path, bytes(SIZE)) as volume:
        synced.clear()
        async with trio.open_nursery() as nursery:
            for i in range(16):
                nursery.start_soon(volume.exported.write, i << 16, b"x" * 512)
        assert 1 <= synced.count("hidden.0.journal") <= 2


async def test_without_power_nothing_waits_for_stable_storage(tmp_path: Path, synced: list[str]) -> None:
    async with secondary(tmp_path, bytes(SIZE), durability="process") as volume:
        synced.clear()
        await volume.exported.write(0, b"x" * 512)
        await volume.view.write(0, b"y" * 512)
        assert synced == []


async def test_a_checkpoint_puts_the_disk_on_stable_storage_before_it_is_saved(tmp_path: Path, synced: list[str]) -> None:
    async with secondary(tmp_path, bytes(SIZE)) as volume:
        await volume.exported.write(0, b"x" * 512)
        synced.clear()
        state_at_sync = []
        plain = volume.directory.save

        def save(state: Any, *, durably: bool) -> None:
            assert durably
            state_at_sync.append(list(synced))
            plain(state)

        volume.directory.save = save  # type: ignore[method-assign]
        await checkpoint(volume)
        assert state_at_sync == [["secondary.raw"]]


async def test_without_power_a_checkpoint_does_not_wait_for_stable_storage_but_gets_there(tmp_path: Path) -> None:
    async with secondary(tmp_path, bytes(SIZE), durability="process") as volume:
        plain, may_settle, began = volume.directory.settle, threading.Event(), trio.Event()
        token = trio.lowlevel.current_trio_token()

        def settle() -> None:
            token.run_sync_soon(began.set)
            assert may_settle.wait(30)
            plain()

        volume.directory.settle = settle  # type: ignore[method-assign]
        old = volume.directory.overlay("hidden", 0)
        try:
            await volume.exported.write(0, b"x" * 512)
            await checkpoint(volume)
            assert bytes(await volume.view.read(0, 512)) == b"x" * 512
            await began.wait()
            for _ in range(50):  # in which it would be gone
                await trio.to_thread.run_sync(time.sleep, 0)
            assert old.exists(), "a power cut may bring the state back that names it"
        finally:
            may_settle.set()
        while old.exists():
            await trio.lowlevel.checkpoint()


async def test_without_power_a_checkpoint_fails_too_if_the_disk_has_lost_something(tmp_path: Path) -> None:
    async with secondary(tmp_path, bytes(SIZE), durability="process") as volume:
        await volume.exported.write(0, b"x" * 512)
        file = volume.disk.file
        plain = file._fdatasync

        def fails() -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        file._fdatasync = fails  # type: ignore[method-assign]
        with pytest.raises(OSError, match="Input/output error"):
            await volume.disk.flush()
        file._fdatasync = plain  # type: ignore[method-assign]
        with pytest.raises(ReplfsError, match="an earlier fdatasync failed"):
            await checkpoint(volume)
        assert volume.state.generation == 0
        await volume.exported.write(0, b"x" * 4096)
        await checkpoint(volume)


async def test_a_checkpoint_fails_if_the_disk_cannot_be_made_durable(tmp_path: Path) -> None:
    async with secondary(tmp_path, bytes(SIZE)) as volume:
        faulty = Faulty(volume.disk)
        await volume.exported.write(0, b"x" * 512)
        plain, volume.disk = volume.disk, faulty  # type: ignore[assignment]
        faulty.error = errno.EIO
        with pytest.raises(Exception, match="Input/output error"):
            await checkpoint(volume)
        volume.disk = plain
        assert volume.state.generation == 0
        assert bytes(await volume.view.read(0, 512)) == bytes(512)


async def test_a_primary_whose_disk_cannot_be_synced_was_not_closed_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = os.fdatasync

    def fdatasync(fd: int) -> None:
        if os.readlink(f"/proc/self/fd/{fd}").endswith("primary.raw"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        plain(fd)

    async def write_and_close(far: Volume) -> None:
        async with primary(tmp_path, Target(far.config.listen, "disk"), bytes(SIZE)) as near:
            await near.view.write(0, b"x" * 512)
            monkeypatch.setattr(os, "fdatasync", fdatasync)

    async with secondary(tmp_path, bytes(SIZE)) as far:
        with pytest.raises(ReplfsError, match="stable storage"):
            await write_and_close(far)
        monkeypatch.undo()
    async with primary(tmp_path, Target(UnixAddress(str(tmp_path / "nobody")), "disk"), start=False) as near:
        assert near.status()["link"]["out-of-sync"] == SIZE


async def test_syncs_that_come_together_share_one_and_none_comes_too_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = Storage().create(str(tmp_path / "f"))
    runs: list[bytes] = []
    monkeypatch.setattr(os, "fdatasync", lambda fd: runs.append(os.pread(fd, 100, 0)))
    file.write(0, b"1")
    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(file.sync)
    assert len(runs) == 1
    file.write(1, b"2")
    await file.sync()
    await file.sync()
    assert runs == [b"1", b"12"]
    file.close()


async def test_what_a_failed_sync_was_to_make_durable_is_not_until_it_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = Storage().create(str(tmp_path / "f"))
    file.write(0, bytes(64 << 10))
    await file.sync()

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    file.write(8192, b"x" * 8192)
    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(OSError, match="f: Input/output error"):
        await file.sync()
    monkeypatch.undo()
    for offset, length in ((0, 8192), (8192, 4096), (12288, 4095), (12289, 4095), (16384, 4096)):
        file.write(offset, b"y" * length)
        with pytest.raises(OSError, match=r"an earlier fdatasync failed, and (8192|4096) bytes from (8192|12288) on"):
            await file.sync()
    file.write(12288, b"y" * 4096)
    await file.sync()
    file.close()


async def test_a_sync_that_fails_may_have_lost_what_was_written_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = Storage().create(str(tmp_path / "f"))
    file.write(0, b"x" * 4096)

    def fail(fd: int) -> None:
        trio.from_thread.run_sync(file.write, 4096, b"x" * 4096)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        await file.sync()
    monkeypatch.undo()
    file.write(0, b"x" * 4096)
    with pytest.raises(OSError, match="4096 bytes from 4096 on"):
        await file.sync()
    file.close()


async def test_a_disk_that_could_not_be_synced_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process knows what has to be written again. The next one does not, and the kernel would tell it that all is well."""
    plain = os.fdatasync

    def fdatasync(fd: int) -> None:
        if os.readlink(f"/proc/self/fd/{fd}").endswith("secondary.raw"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        plain(fd)

    async with secondary(tmp_path, bytes(SIZE)) as volume:
        await volume.exported.write(0, b"x" * 4096)
        monkeypatch.setattr(os, "fdatasync", fdatasync)
        with pytest.raises(OSError, match="Input/output error"):
            await volume.exported.flush()
        monkeypatch.undo()
        with pytest.raises(ReplfsError, match="an earlier fdatasync failed"):
            await checkpoint(volume)
        assert volume.state.generation == 0
        assert volume.status()["io-errors"] == {str(tmp_path / "secondary.raw"): {"sync": 1}}
        with trio.fail_after(60):
            while not volume.state.suspect:
                await trio.lowlevel.checkpoint()
        copy = tmp_path / "killed"  # as if it were killed here: the state stays as it is
        shutil.copytree(tmp_path / "secondary.raw.replfs", copy)
        await volume.exported.write(0, b"y" * 4096)
        await checkpoint(volume)
        assert not volume.state.suspect
        assert bytes(await volume.view.read(0, 4096)) == b"y" * 4096
    shutil.rmtree(tmp_path / "secondary.raw.replfs")
    copy.rename(tmp_path / "secondary.raw.replfs")
    async with secondary(tmp_path) as volume:
        with pytest.raises(ReplfsError, match=r"make the copies equal again, and remove .*secondary\.raw\.replfs"):
            await checkpoint(volume)
        assert bytes(await volume.view.read(0, 4096)) == bytes(4096)
