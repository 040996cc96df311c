"""What replication does on both sides: QEMU's thirteen scenarios, its table of operations, and where replfs does better."""

import errno
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from disks import assert_sound, put, qemu_img, same
from volumes import checkpoint, content, on_disk, primary, secondary, until_connected, until_stage

from replfs.block.node import Data, Node
from replfs.block.qcow2.overlay import CLUSTER
from replfs.block.replication.rules import Mode, Operation, Stage
from replfs.errors import ReplfsError
from replfs.protocol.nbd.uri import Target
from replfs.volume.primary import PrimaryVolume
from replfs.volume.secondary import SecondaryVolume

KIB = 1024
IMAGE = 64 * KIB * 16
NOT_RUNNING = "Block replication is not running"
RUNNING_OR_DONE = "Block replication is running or done"
CANCELLED = "Backup job was cancelled unexpectedly"
OK = ""


class Faulty(Node):
    """A node whose calls fail while ``error`` is set, and are passed on otherwise."""

    def __init__(self, below: Node) -> None:
        self.below = below
        self.size = below.size
        self.error = 0
        self.reached: list[str] = []

    def _check(self, what: str) -> None:
        self.reached.append(what)
        if self.error:
            raise OSError(self.error, os.strerror(self.error))

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        await self.below.read_into(offset, buffer)

    async def write(self, offset: int, data: Data) -> None:
        self._check("write")
        await self.below.write(offset, data)

    async def write_zeroes(self, offset: int, length: int, may_unmap: bool = True) -> None:
        self._check("write_zeroes")
        await self.below.write_zeroes(offset, length, may_unmap)

    async def discard(self, offset: int, length: int) -> None:
        self._check("discard")
        await self.below.discard(offset, length)

    async def flush(self) -> None:
        self._check("flush")
        await self.below.flush()

    async def extents(self, offset: int, length: int, limit: int) -> Any:
        return await self.below.extents(offset, length, limit)

    async def close(self) -> None:
        await self.below.close()


class TakingTurns(Faulty):
    """A node whose changes give every other task a turn before and after."""

    async def write(self, offset: int, data: Data) -> None:
        await trio.lowlevel.checkpoint()
        await super().write(offset, data)
        await trio.lowlevel.checkpoint()

    async def write_zeroes(self, offset: int, length: int, may_unmap: bool = True) -> None:
        await trio.lowlevel.checkpoint()
        await super().write_zeroes(offset, length, may_unmap)
        await trio.lowlevel.checkpoint()


@asynccontextmanager
async def pair(folder: Path, before: bytes | int = IMAGE, **changes: Any) -> AsyncIterator[tuple[PrimaryVolume, SecondaryVolume]]:
    """Linked, if the primary is to start; what is written is on both sides when that is answered."""
    start = before if isinstance(before, bytes) else bytes(before)
    changes = {"protocol": "sync", "initial_sync": "none", **changes}
    async with secondary(folder, start) as far, primary(folder, Target(far.config.listen, "disk"), start, **changes) as near:
        if near.config.start:
            await until_connected(near)
        yield near, far


async def outcome(volume: SecondaryVolume | PrimaryVolume, operation: Operation, mode: Mode | None = None) -> str:
    """The message of a control operation, empty if it succeeded."""
    message = OK
    try:
        await volume.control(operation, mode or volume.config.mode)
    except ReplfsError as error:
        message = str(error)
    assert volume.last_error == message
    return message


async def raises(code: int, call: Any) -> None:
    with pytest.raises(OSError) as failed:
        await call
    assert failed.value.errno == code


# QEMU's tests/unit/test-replication.c, by the names it gives them


async def test_primary_read(tmp_path: Path) -> None:
    async with pair(tmp_path) as (near, _):
        assert same(await content(near), bytes(IMAGE))


async def test_primary_write(tmp_path: Path) -> None:
    async with pair(tmp_path, start=False) as (near, far):
        await near.view.write(0, b"\x11" * 512)
        assert (await on_disk(far))[:512] == bytes(512)
        assert await outcome(near, Operation.START) == OK
        await until_connected(near)
        await near.view.write(512, b"\x22" * 512)
        assert (await on_disk(far))[512:1024] == b"\x22" * 512
        assert (await on_disk(near))[:1024] == b"\x11" * 512 + b"\x22" * 512


async def test_primary_start(tmp_path: Path) -> None:
    async with pair(tmp_path, start=False) as (near, _):
        wrong = "The parameter mode's value is invalid, needs 0, but got 1"
        assert await outcome(near, Operation.START, Mode.SECONDARY) == wrong
        assert near.state.stage is Stage.NONE
        assert await outcome(near, Operation.START) == OK
        assert await outcome(near, Operation.START) == RUNNING_OR_DONE


async def test_primary_stop(tmp_path: Path) -> None:
    async with pair(tmp_path, start=False) as (near, far):
        assert await outcome(near, Operation.STOP) == NOT_RUNNING
        assert await outcome(near, Operation.START) == OK
        assert await outcome(near, Operation.STOP) == OK
        assert await outcome(near, Operation.STOP) == OK
        assert near.state.stage is Stage.DONE
        await near.view.write(0, b"own")
        assert (await on_disk(near))[:3] == b"own"
        assert (await on_disk(far))[:3] == bytes(3)


async def test_primary_do_checkpoint(tmp_path: Path) -> None:
    """QEMU's does nothing."""
    async with pair(tmp_path, start=False) as (near, far):
        assert await outcome(near, Operation.CHECKPOINT) == OK
        assert await outcome(near, Operation.START) == OK
        await until_connected(near)
        await near.view.write(0, b"seen there, too")
        assert await outcome(near, Operation.CHECKPOINT) == OK
        assert near.state.generation == 1
        assert same(await content(far), await on_disk(near))


async def test_primary_get_error_all(tmp_path: Path) -> None:
    async with pair(tmp_path, start=False) as (near, _):
        assert near.error == NOT_RUNNING
        assert await outcome(near, Operation.START) == OK
        assert near.error == OK


async def test_secondary_read(tmp_path: Path) -> None:
    async with secondary(tmp_path, bytes(IMAGE), start=False) as far:
        await raises(errno.EIO, far.view.read(0, 512))
        assert await outcome(far, Operation.START) == OK
        assert bytes(await far.view.read(0, 512)) == bytes(512)


async def test_secondary_write(tmp_path: Path) -> None:
    async with secondary(tmp_path, bytes(IMAGE), start=False) as far:
        await raises(errno.EIO, far.view.write(0, b"\x11" * 512))
        assert await outcome(far, Operation.START) == OK
        await far.view.write(0, b"\x11" * 512)
        await far.exported.write(0, b"\x22" * 512)
        assert bytes(await far.view.read(0, 512)) == b"\x11" * 512
        assert (await on_disk(far))[:512] == b"\x22" * 512


async def test_secondary_start(tmp_path: Path) -> None:
    async with secondary(tmp_path, bytes(IMAGE), start=False) as far:
        wrong = "The parameter mode's value is invalid, needs 1, but got 0"
        assert await outcome(far, Operation.START, Mode.PRIMARY) == wrong
        await far.exported.write(0, b"plain")  # in stage none nothing is saved
        assert await outcome(far, Operation.START) == OK
        assert bytes(await far.view.read(0, 5)) == b"plain"
        half = IMAGE // 2
        await far.exported.write(half, b"\x22" * 512)
        assert bytes(await far.view.read(half, 512)) == bytes(512)
        assert await outcome(far, Operation.START) == RUNNING_OR_DONE


async def test_secondary_stop(tmp_path: Path) -> None:
    """QEMU's test fails over under this name; here stop stops, and the next test fails over."""
    async with secondary(tmp_path, bytes(IMAGE)) as far:
        await far.exported.write(512, b"\x22" * 512)
        await far.view.write(0, b"\x11" * 512)
        assert await outcome(far, Operation.STOP) == OK
        assert far.error == OK
        assert far.state.stage is Stage.DONE
        assert same(await content(far), bytes(512) + b"\x22" * 512 + bytes(IMAGE - 1024))
        await far.view.write(0, b"\x33" * 512)
        assert (await on_disk(far))[:512] == b"\x33" * 512


async def test_secondary_continuous_replication(tmp_path: Path) -> None:
    async with secondary(tmp_path, bytes(IMAGE)) as far:
        half = IMAGE // 2
        await far.exported.write(half, b"\x22" * half)
        await far.view.write(0, b"\x11" * half)
        assert same(await content(far), b"\x11" * half + bytes(half))
        assert await outcome(far, Operation.FAILOVER) == OK
        assert same(await content(far), b"\x11" * half + bytes(half))
        await far.view.write(0, b"\x33" * 512)  # while the commit is under way
        await until_stage(far, Stage.DONE)
        expected = b"\x33" * 512 + b"\x11" * (half - 512) + bytes(half)
        assert same(await content(far), expected)
        assert same(await on_disk(far), expected)
        assert far.error == OK


async def test_secondary_do_checkpoint(tmp_path: Path) -> None:
    async with secondary(tmp_path, bytes(IMAGE), start=False) as far:
        assert await outcome(far, Operation.CHECKPOINT) == CANCELLED
        assert await outcome(far, Operation.START) == OK
        await far.exported.write(0, b"\x22" * 512)
        await far.view.write(512, b"\x11" * 512)
        await checkpoint(far)
        assert same(await content(far), b"\x22" * 512 + bytes(IMAGE - 512))
        assert far.state.generation == 1


async def test_secondary_get_error_all(tmp_path: Path) -> None:
    async with secondary(tmp_path, bytes(IMAGE), start=False) as far:
        assert far.error == NOT_RUNNING
        assert await outcome(far, Operation.START) == OK
        assert far.error == OK


# Every operation in every stage

START, OTHER, CHECKPOINT, FAILOVER, STOP = "start", "start in the other mode", "checkpoint", "failover", "stop"
SECONDARY_TABLE = {  # operation: per stage, (message, stage afterwards)
    START: {
        "none": (OK, "running"),
        "running": (RUNNING_OR_DONE, "running"),
        "failover": (OK, "failover"),
        "failover-failed": (RUNNING_OR_DONE, "failover-failed"),
        "done": (OK, "done"),
    },
    OTHER: {
        "none": ("The parameter mode's value is invalid, needs 1, but got 0", "none"),
        "running": (RUNNING_OR_DONE, "running"),
        "failover": (OK, "failover"),
        "failover-failed": (RUNNING_OR_DONE, "failover-failed"),
        "done": (OK, "done"),
    },
    CHECKPOINT: {
        "none": (CANCELLED, "none"),
        "running": (OK, "running"),
        "failover": (OK, "failover"),
        "failover-failed": (CANCELLED, "failover-failed"),
        "done": (OK, "done"),
    },
    FAILOVER: {
        "none": (NOT_RUNNING, "none"),
        "running": (OK, "failover"),
        "failover": (OK, "failover"),
        "failover-failed": (OK, "failover"),
        "done": (OK, "done"),
    },
    STOP: {
        "none": (NOT_RUNNING, "none"),
        "running": (OK, "done"),
        "failover": (OK, "failover"),
        "failover-failed": (NOT_RUNNING, "failover-failed"),
        "done": (OK, "done"),
    },
}
PRIMARY_TABLE = {
    START: {"none": (OK, "running"), "running": (RUNNING_OR_DONE, "running"), "done": (OK, "done")},
    OTHER: {
        "none": ("The parameter mode's value is invalid, needs 0, but got 1", "none"),
        "running": (RUNNING_OR_DONE, "running"),
        "done": (OK, "done"),
    },
    CHECKPOINT: {"none": (OK, "none"), "running": (OK, "running"), "done": (OK, "done")},
    FAILOVER: {"none": (NOT_RUNNING, "none"), "running": (OK, "done"), "done": (OK, "done")},
    STOP: {"none": (NOT_RUNNING, "none"), "running": (OK, "done"), "done": (OK, "done")},
}


@asynccontextmanager
async def in_stage(folder: Path, stage: Stage, before: bytes = bytes(IMAGE)) -> AsyncIterator[SecondaryVolume]:
    """A secondary in this stage, with something in both overlays (but for none and done). A commit, if any, is held up."""
    async with AsyncExitStack() as stack:
        far = await stack.enter_async_context(secondary(folder, before, start=stage is not Stage.NONE))
        if stage is not Stage.NONE:
            await far.view.write(CLUSTER, b"A" * 5000)
            await far.exported.write(2 * CLUSTER, b"N" * 5000)
        if stage is Stage.FAILOVER_FAILED:
            faulty = Faulty(far.disk)
            far.view.disk = faulty
            faulty.error = errno.EIO
            assert await outcome(far, Operation.FAILOVER) == OK
            await until_stage(far, Stage.FAILOVER_FAILED)
            faulty.error = 0
        elif stage is Stage.DONE:
            assert await outcome(far, Operation.FAILOVER) == OK
            await until_stage(far, Stage.DONE)
        if stage is not Stage.DONE:
            await stack.enter_async_context(far.view.locks.hold(0, 1))  # a commit that starts now waits here
        if stage is Stage.FAILOVER:
            assert await outcome(far, Operation.FAILOVER) == OK
        yield far


@pytest.mark.parametrize("stage", list(Stage))
@pytest.mark.parametrize("operation", SECONDARY_TABLE)
async def test_secondary_operations(tmp_path: Path, operation: str, stage: Stage) -> None:
    message, after = SECONDARY_TABLE[operation][stage]
    async with in_stage(tmp_path, stage) as far:
        mode = Mode.PRIMARY if operation == OTHER else Mode.SECONDARY
        assert await outcome(far, Operation.START if operation == OTHER else Operation(operation), mode) == message
        assert far.state.stage == after
        assert far.view.stage == after


@pytest.mark.parametrize("stage", [Stage.NONE, Stage.RUNNING, Stage.DONE])
@pytest.mark.parametrize("operation", PRIMARY_TABLE)
async def test_primary_operations(tmp_path: Path, operation: str, stage: Stage) -> None:
    message, after = PRIMARY_TABLE[operation][stage]
    async with pair(tmp_path, start=stage is not Stage.NONE) as (near, _):
        if stage is Stage.DONE:
            assert await outcome(near, Operation.STOP) == OK
        mode = Mode.SECONDARY if operation == OTHER else Mode.PRIMARY
        assert await outcome(near, Operation.START if operation == OTHER else Operation(operation), mode) == message
        assert near.state.stage == after


# Where bytes go in every stage


async def test_where_writes_go_after_a_failed_commit(tmp_path: Path) -> None:
    """Where an overlay holds the block into active, else into the disk; and all is in the disk once a commit ends well."""
    before = os.urandom(IMAGE)
    async with in_stage(tmp_path, Stage.FAILOVER_FAILED, before) as far:
        assert far.error == "I/O error occurred"
        view = bytearray(await content(far))
        assert bytes(view[CLUSTER : CLUSTER + 5000]) == b"A" * 5000
        assert bytes(view[2 * CLUSTER : 2 * CLUSTER + 5000]) == before[2 * CLUSTER : 2 * CLUSTER + 5000]
        for offset in (CLUSTER + 100, 2 * CLUSTER + 100, 8 * CLUSTER):
            await far.view.write(offset, b"X" * 300)
            view[offset : offset + 300] = b"X" * 300
        disk = await on_disk(far)
        assert disk[CLUSTER + 100 : CLUSTER + 400] == before[CLUSTER + 100 : CLUSTER + 400]
        assert disk[2 * CLUSTER + 100 : 2 * CLUSTER + 400] == b"N" * 300
        assert disk[8 * CLUSTER : 8 * CLUSTER + 300] == b"X" * 300
        await far.view.write(CLUSTER - 1000, b"Y" * CLUSTER)  # both kinds in one write
        view[CLUSTER - 1000 : 2 * CLUSTER - 1000] = b"Y" * CLUSTER
        assert same(await content(far), bytes(view))
    async with secondary(tmp_path) as far:  # the state is resumed as it was
        assert far.state.stage is Stage.FAILOVER_FAILED
        assert same(await content(far), bytes(view))
        assert await outcome(far, Operation.FAILOVER) == OK
        await until_stage(far, Stage.DONE)
        assert same(await on_disk(far), bytes(view))
        assert far.error == OK


async def test_a_write_behind_the_commit_reaches_the_disk(tmp_path: Path) -> None:
    async with secondary(tmp_path, os.urandom(20 << 20)) as far:
        await far.view.write(0, b"a" * CLUSTER)
        await far.view.write(13 << 20, b"a" * CLUSTER)
        async with far.view.locks.hold(11 << 20, (11 << 20) + 1):  # the commit stops in its third window of 4 MiB
            assert await outcome(far, Operation.FAILOVER) == OK
            with trio.fail_after(60):
                while far.view.committed < 8 << 20:
                    await trio.lowlevel.checkpoint()
            await far.view.write(100, b"late")
            assert (await on_disk(far))[100:104] == b"late"
            await far.view.write((13 << 20) + 100, b"early")
            assert (await on_disk(far))[(13 << 20) + 100 :][:5] != b"early"
            view = await content(far)
        await until_stage(far, Stage.DONE)
        assert same(await on_disk(far), view)
        assert same(await content(far), view)


async def test_a_disk_error_behind_the_commit_makes_it_fail_and_a_retry_mends_it(tmp_path: Path) -> None:
    async with secondary(tmp_path, bytes(12 << 20)) as far:
        faulty = Faulty(far.disk)
        far.view.disk = faulty
        await far.view.write(0, b"a" * CLUSTER)
        await far.view.write(10 << 20, b"a" * CLUSTER)
        async with far.view.locks.hold(11 << 20, (11 << 20) + 1):
            assert await outcome(far, Operation.FAILOVER) == OK
            with trio.fail_after(60):
                while far.view.committed < 8 << 20:
                    await trio.lowlevel.checkpoint()
            faulty.error = errno.EIO
            await raises(errno.EIO, far.view.write(0, b"b" * 100))
            faulty.error = 0
        await until_stage(far, Stage.FAILOVER_FAILED)
        view = await content(far)
        assert await outcome(far, Operation.FAILOVER) == OK
        await until_stage(far, Stage.DONE)
        assert same(await on_disk(far), view)


@pytest.mark.parametrize("change", ["write", "write_zeroes", "discard"])
async def test_every_forwarded_change_saves_what_it_overwrites(tmp_path: Path, change: str) -> None:
    before = os.urandom(3 << 20)
    async with secondary(tmp_path, before) as far:
        offset, length = 12345, (1 << 20) + 7777
        if change == "write":
            await far.exported.write(offset, b"n" * length)
        else:
            await getattr(far.exported, change)(offset, length)
        await far.exported.flush()
        assert same(await content(far), before)
        assert await on_disk(far) != before
        await checkpoint(far)
        assert same(await content(far), await on_disk(far))


async def test_a_pre_image_that_cannot_be_saved_fails_the_forwarded_write(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = os.urandom(IMAGE)
    async with secondary(tmp_path, before) as far:
        assert far.exported.hidden is not None
        at_once, later = far.exported.hidden.populate_at_once, far.exported.hidden.populate

        def full(offset: int, data: Data) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        far.exported.hidden.populate_at_once = far.exported.hidden.populate = full  # type: ignore[assignment, method-assign]
        await raises(errno.ENOSPC, far.exported.write(100, b"n" * 100))
        await raises(errno.ENOSPC, far.exported.write_zeroes(100, 100))
        assert same(await on_disk(far), before)
        assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
            "a forwarded write failed, so this side's disk is not what the primary's is: [Errno 28] No space left on device"
        ]
        far.exported.hidden.populate_at_once, far.exported.hidden.populate = at_once, later  # type: ignore[method-assign]
        await far.exported.write(100, b"n" * 100)
        assert same(await content(far), before)


async def test_copy_before_write_copies_little_more_than_it_must(tmp_path: Path) -> None:
    async with secondary(tmp_path, os.urandom(IMAGE)) as far:
        assert far.exported.hidden is not None
        await far.exported.write(CLUSTER + 512, b"n" * 512)
        assert far.exported.hidden.missing(CLUSTER, 2 * CLUSTER) == [(CLUSTER + 2048, 2 * CLUSTER)]


# Where QEMU gets it wrong


async def test_a_stopped_secondary_mounts_again_as_it_was(tmp_path: Path) -> None:
    async with secondary(tmp_path, bytes(IMAGE), stop_on_unmount=True) as far:
        await far.exported.write(0, b"theirs")
        await far.view.write(0, b"ours")
    assert sorted(os.listdir(tmp_path / "secondary.raw.replfs")) == ["state.json", "state.json.new", "tracking"]
    async with secondary(tmp_path) as far:
        assert far.state.stage is Stage.DONE
        assert bytes(await far.view.read(0, 6)) == b"theirs"
        with pytest.raises(PermissionError, match="the secondary has taken over"):
            await far.exported.write(0, b"late")


async def test_a_clean_unmount_and_mount_resumes_the_very_view(tmp_path: Path) -> None:
    before = os.urandom(IMAGE)
    async with secondary(tmp_path, before) as far:
        await far.exported.write(0, b"theirs" * 1000)
        await checkpoint(far)
        await far.exported.write(CLUSTER, b"later" * 1000)
        await far.view.write(3 * CLUSTER, b"ours" * 1000)
        view, generation = await content(far), far.state.generation
    folder = tmp_path / "secondary.raw.replfs"
    assert {1} <= generations(folder) <= {1, 2}  # and the next checkpoint's
    for name in ("active", "hidden"):
        assert_sound(folder / f"{name}.1.qcow2")
    (tmp_path / "view").write_bytes(view)
    assert "identical" in qemu_img("compare", "-f", "qcow2", "-F", "raw", folder / "active.1.qcow2", tmp_path / "view")
    async with secondary(tmp_path) as far:
        assert (far.state.stage, far.state.generation) == (Stage.RUNNING, generation)
        assert same(await content(far), view)
        await checkpoint(far)
        assert same(await content(far), await on_disk(far))


async def test_an_interrupted_failover_goes_on_at_the_next_mount(tmp_path: Path) -> None:
    async with in_stage(tmp_path, Stage.FAILOVER, os.urandom(IMAGE)) as far:
        view = await content(far)
    async with secondary(tmp_path) as far:
        await until_stage(far, Stage.DONE)
        assert same(await on_disk(far), view)


async def test_an_unfinished_failover_is_not_forgotten_by_no_start(tmp_path: Path) -> None:
    async with in_stage(tmp_path, Stage.FAILOVER) as far:
        view = await content(far)
    with pytest.raises(ReplfsError, match="unfinished failover"):
        async with secondary(tmp_path, start=False):
            pass
    async with secondary(tmp_path) as far:
        assert same(await content(far), view)


async def test_no_start_over_a_running_secondary_drops_its_overlays(tmp_path: Path) -> None:
    async with secondary(tmp_path, bytes(IMAGE)) as far:
        await far.view.write(0, b"ours")
        await far.exported.write(0, b"theirs")
    async with secondary(tmp_path, start=False) as far:
        assert far.state.stage is Stage.NONE
        assert await outcome(far, Operation.START) == OK
        assert bytes(await far.view.read(0, 6)) == b"theirs"


async def test_a_failed_checkpoint_leaves_the_old_one_and_can_be_tried_again(tmp_path: Path) -> None:
    before = os.urandom(IMAGE)
    async with secondary(tmp_path, before) as far:
        await far.exported.write(0, b"theirs")
        await far.view.write(CLUSTER, b"ours")
        view = await content(far)
        new = tmp_path / "secondary.raw.replfs" / "state.json.new"
        new.unlink()
        new.mkdir()  # the next state cannot be written
        assert "cannot save the state" in await outcome(far, Operation.CHECKPOINT)
        assert far.state.generation == 0
        assert same(await content(far), view)
        await far.exported.write(8 * CLUSTER, b"more")
        assert same(await content(far), view)
        new.rmdir()
        assert await outcome(far, Operation.CHECKPOINT) == OK
        assert same(await content(far), await on_disk(far))


async def test_a_start_can_fail_and_be_repeated(tmp_path: Path) -> None:
    async with secondary(tmp_path, bytes(IMAGE), start=False) as far:
        new = tmp_path / "secondary.raw.replfs" / "state.json.new"
        new.unlink()
        new.mkdir()
        for _ in range(3):
            assert "cannot save the state" in await outcome(far, Operation.START)
            assert far.state.stage is Stage.NONE
        await raises(errno.EIO, far.view.read(0, 1))
        new.rmdir()
        assert await outcome(far, Operation.START) == OK


def generations(state_dir: Path) -> set[int]:
    """Those that have overlays."""
    return {int(path.name.split(".")[1]) for path in state_dir.glob("*.qcow2")}


async def test_checkpoints_leave_one_pair_and_a_spare(tmp_path: Path) -> None:
    async with secondary(tmp_path, bytes(IMAGE)) as far:
        for i in range(5):
            await far.exported.write(i * 100, bytes([i + 1]) * 100)
            await far.view.write(i * 100, b"x" * 50)
            await checkpoint(far)
            assert same(await content(far), await on_disk(far))
        with trio.fail_after(60):
            # A journal is set aside as well, where the last pair was dropped after the next one had been made.
            while len({*os.listdir(tmp_path / "secondary.raw.replfs")} - {"hidden.spare.journal"}) != 11:
                await trio.lowlevel.checkpoint()
    assert {5} <= generations(tmp_path / "secondary.raw.replfs") <= {5, 6}


async def test_the_old_primary_is_fenced(tmp_path: Path) -> None:
    async with pair(tmp_path) as (near, far):
        await near.view.write(0, b"before")
        assert await outcome(far, Operation.FAILOVER) == OK
        assert far.server.connections == 0
        await raises(errno.EPERM, far.exported.write(0, b"fenced"))
        await until_stage(far, Stage.DONE)
        with trio.fail_after(60):
            await near.view.write(0, b"after!")
        assert near.error == "I/O error occurred"
        assert (await on_disk(near))[:6] == b"after!"
        assert (await on_disk(far))[:6] == bytes(6)
        assert await outcome(near, Operation.STOP) == OK
        assert near.error == OK


async def test_a_forward_that_fails_is_an_error_until_it_was_sent_again(tmp_path: Path) -> None:
    async with pair(tmp_path) as (near, far):
        faulty = Faulty(far.exported.disk)
        far.exported.disk = faulty
        faulty.error = errno.ENOSPC
        await near.view.write(0, b"kept")
        assert near.error == "I/O error occurred"
        assert near.status()["link"]["out-of-sync"] == 64 * KIB
        assert "No space left on device" in near.link.error
        assert near.state.ids.bitmap, "it goes on alone"
        faulty.error = 0
        await until_connected(near)
        assert near.error == OK
        assert near.status()["link"]["out-of-sync"] == 0
        assert same(await on_disk(near), await on_disk(far))


async def test_the_primary_disks_own_error_reaches_the_caller_and_what_it_has_left_is_sent(tmp_path: Path) -> None:
    async with pair(tmp_path) as (near, far):
        faulty = Faulty(near.view.disk)
        near.view.disk = faulty
        faulty.error = errno.EIO
        await raises(errno.EIO, near.view.write(0, b"lost"))
        await raises(errno.EIO, near.view.flush())
        faulty.error = 0
        (tmp_path / "primary.raw").write_bytes(b"half of it" + bytes(IMAGE - 10))
        with trio.fail_after(60):
            while (await on_disk(far))[:10] != b"half of it":
                await trio.lowlevel.checkpoint()
        await until_connected(near)
        assert near.error == OK


async def test_what_a_primary_writes_reaches_the_secondary_in_the_same_order(tmp_path: Path) -> None:
    async with pair(tmp_path, 64 * KIB) as (near, far):
        near.view.disk = TakingTurns(near.disk)
        async with trio.open_nursery() as nursery:
            for i in range(200):
                offset = (i * 7919) % (8 * KIB)
                nursery.start_soon(near.view.write, offset, bytes([i]) * (1 + i * 37 % 4000))
                if i % 3 == 0:
                    nursery.start_soon(near.view.write_zeroes, offset // 2, 3000)
        assert same(await on_disk(near), await on_disk(far))
        await near.view.discard(100, 10000)
        await near.view.flush()
        assert same(await on_disk(near), await on_disk(far))


async def test_a_secondary_of_another_size_is_refused_with_both_sizes(tmp_path: Path) -> None:
    async with secondary(tmp_path, bytes(IMAGE)) as far:
        with pytest.raises(ReplfsError, match=f"{IMAGE + 512} bytes.* has {IMAGE}"):
            async with primary(tmp_path, Target(far.config.listen, "disk"), bytes(IMAGE + 512)):
                pass
    assert not (tmp_path / "primary.raw.replfs").exists()


@pytest.mark.parametrize("size", [1, 511, 2047, 5 * CLUSTER + 777])
async def test_disks_of_any_size(tmp_path: Path, size: int) -> None:
    before = os.urandom(size)
    async with secondary(tmp_path, before) as far:
        await far.exported.write(size - 1, b"t")
        await far.view.write(0, b"o")
        assert (await content(far))[-1:] == (before[-1:] if size > 1 else b"o")
        assert await outcome(far, Operation.FAILOVER) == OK
        await until_stage(far, Stage.DONE)
        assert same(await on_disk(far), b"o" + before[1:])


async def test_a_write_of_nothing_changes_nothing(tmp_path: Path) -> None:
    async with secondary(tmp_path, b"o" * CLUSTER) as volume:
        for node in (volume.exported, volume.view):
            for offset in (0, 1000, CLUSTER):
                await put(node, offset, b"")
        assert bytes(await volume.view.read(0, CLUSTER)) == bytes(await volume.exported.read(0, CLUSTER)) == b"o" * CLUSTER
        assert volume.view.layers is not None
        assert volume.view.layers.hidden.missing(0, CLUSTER) == [(0, CLUSTER)]


async def test_nothing_is_done_at_once_where_somebody_else_is_at_work(tmp_path: Path) -> None:
    data = b"x" * 4096
    async with secondary(tmp_path, b"o" * 2 * CLUSTER, durability="process") as volume:
        for node in (volume.exported, volume.view):
            assert node.read_at_once(0, memoryview(bytearray(4096)))
            async with volume.gate.shut():
                assert not node.write_at_once(0, data)
                assert not node.read_at_once(0, memoryview(bytearray(4096)))
        reading, cached = volume.disk.read_into, volume.disk.read_at_once
        under_way: list[bool] = []

        async def read_into(offset: int, buffer: memoryview) -> None:
            under_way.extend(volume.exported.write_at_once(place, b"n" * 512) for place in (512, CLUSTER))
            await reading(offset, buffer)

        volume.disk.read_into = read_into  # type: ignore[method-assign]
        volume.disk.read_at_once = lambda offset, buffer: offset > 0 and cached(offset, buffer)  # type: ignore[method-assign]
        await volume.exported.write(0, b"n" * 512)
        assert under_way == [False, True]  # in the subcluster that is being saved, and elsewhere
        assert same(await content(volume), b"o" * 2 * CLUSTER)
        volume.exported.fenced = True
        assert not volume.exported.write_at_once(CLUSTER, b"f" * 512)


async def test_a_primary_does_nothing_at_once_where_somebody_else_is_at_work(tmp_path: Path) -> None:
    async with pair(tmp_path, 2 * CLUSTER, protocol="async") as (near, far):
        await near.view.write(0, b"x" * 4096)  # from now on the extent is hot
        assert near.view.write_at_once(0, b"x" * 4096)
        async with near.view.gate.shut():
            assert not near.view.write_at_once(0, b"x" * 4096)
        async with near.view.locks.hold(8192, 8193):
            assert not near.view.write_at_once(4096, b"x" * 8192)
            assert near.view.write_at_once(12288, b"x" * 4096)
        changing = bytearray(b"1" * 4096)
        assert near.view.write_at_once(0, changing)
        changing[:] = b"2" * 4096  # it is the caller's again
        await near.link.drain()
        assert (await on_disk(far))[:4096] == b"1" * 4096


@pytest.mark.parametrize("saved", [False, True])
async def test_a_read_that_waits_for_the_disk_is_overtaken_by_a_forwarded_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: bool
) -> None:
    """It shows what was there, which is in the hidden disk by then. ``saved``: that has a table for it already."""
    async with secondary(tmp_path, b"o" * IMAGE, durability="process") as volume, trio.open_nursery() as nursery:
        if saved:
            await put(volume.exported, 0, b"f" * 4 * KIB)
        gate, plain = trio.Event(), volume.disk.read_into

        async def read_into(offset: int, buffer: memoryview) -> None:
            await gate.wait()
            await plain(offset, buffer)

        monkeypatch.setattr(volume.disk, "read_into", read_into)
        got: list[bytes] = []

        async def read() -> None:
            got.append(bytes(await volume.view.read(8 * KIB, 4 * KIB)))

        nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        assert volume.exported.write_at_once(8 * KIB, b"new!" * KIB)
        gate.set()
        while not got:
            await trio.lowlevel.checkpoint()
        assert got == [b"o" * 4 * KIB]
