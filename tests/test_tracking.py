"""What is known to be out of sync: exact while the process lives, and never too little after a kill or a power cut.

The model at the end has what the tracking is about: what the local disk holds, what the other side was given, and what of that it
has on stable storage. The tracking's file lies on a medium that keeps a list of what was not synced, and a power cut takes any of
the sectors in it away.
"""

import os
import random
import time
from collections.abc import Callable, Coroutine, Generator
from contextlib import suppress
from itertools import count
from pathlib import Path
from types import coroutine
from typing import Any

import pytest
import trio
from faults import Fault, FaultyStorage, Inodes, Log, SyncEnd, Write
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from pyroaring import BitMap64
from trio.testing import wait_all_tasks_blocked
from volumes import _running as running
from volumes import config, primary

from replfs.block import tracking as tracking_module
from replfs.block.file import File
from replfs.block.replication.rules import Mode
from replfs.block.storage import Storage
from replfs.block.tracking import BLOCK, EXTENT_BITS, HOT_LIMIT, Tracking
from replfs.protocol.nbd.uri import Target, UnixAddress
from replfs.volume import base as base_module
from replfs.volume.primary import PrimaryVolume

EXTENT = 1 << EXTENT_BITS
PER_EXTENT = EXTENT // BLOCK
SIZE = 5 * EXTENT + 3 * BLOCK + 100  # a short last extent, and a short last block in it
BLOCKS = 5 * PER_EXTENT + 4
LOG = 4096
BITMAP = 8192
TIB = 1 << 40


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "tracking")


async def opened(path: str, size: int = SIZE, *, durable: bool = False, storage: Storage | None = None) -> Tracking:
    return (await Tracking.open(storage or Storage(), path, size, durable=durable))[0]


async def change(tracking: Tracking, *blocks: int) -> None:
    """As the mirror begins one."""
    for block in blocks:
        if not tracking.is_hot(block * BLOCK, 1):
            await tracking.heat(block * BLOCK, 1)
        tracking.begin(block, block)


async def make_stale(tracking: Tracking, *blocks: int) -> None:
    await change(tracking, *blocks)
    for block in blocks:
        tracking.lost(block, block)


def extents(*numbers: int, blocks: int = BLOCKS) -> set[int]:
    """All blocks of them."""
    return {block for number in numbers for block in range(number * PER_EXTENT, min((number + 1) * PER_EXTENT, blocks))}


# A block


async def test_a_block_is_out_of_sync_from_before_its_change_until_it_is_flushed_there(path: str) -> None:
    tracking = await opened(path)
    assert tracking.clean
    await change(tracking, 7)
    assert set(tracking.dirty()) == {7}
    assert tracking.is_pending(6, 7)
    assert not tracking.is_pending(8, 9)
    tracking.acknowledged(7, 7)
    assert set(tracking.dirty()) == {7}
    assert not tracking.is_pending(7, 7)
    assert tracking.begin_flush()
    assert set(tracking.dirty()) == {7}
    tracking.flushed()
    assert tracking.clean
    assert not tracking.begin_flush()
    tracking.release()


async def test_what_is_acknowledged_after_a_flush_began_waits_for_the_next_one(path: str) -> None:
    tracking = await opened(path)
    await change(tracking, 1, 2)
    tracking.acknowledged(1, 1)
    assert tracking.begin_flush()
    tracking.acknowledged(2, 2)
    await change(tracking, 1)  # changed again meanwhile
    tracking.acknowledged(1, 1)
    tracking.flushed()
    assert set(tracking.dirty()) == {1, 2}
    assert tracking.begin_flush()
    tracking.flushed()
    assert tracking.clean
    tracking.release()


async def test_of_two_changes_of_a_block_each_has_to_arrive(path: str) -> None:
    tracking = await opened(path)
    await change(tracking, 3)
    await change(tracking, 3)
    tracking.acknowledged(3, 3)
    assert tracking.begin_flush()
    tracking.flushed()
    assert set(tracking.dirty()) == {3}
    tracking.lost(3, 3)
    assert set(tracking.stale) == {3}
    tracking.resend(3, 3)
    assert not tracking.is_stale(3, 3)
    assert set(tracking.dirty()) == {3}
    tracking.acknowledged(3, 3)
    tracking.begin_flush()
    tracking.flushed()
    assert tracking.clean
    tracking.release()


async def test_what_was_not_flushed_is_stale_when_the_link_ends(path: str) -> None:
    tracking = await opened(path)
    await change(tracking, 1, 2, 3)
    tracking.acknowledged(1, 1)
    tracking.begin_flush()
    tracking.acknowledged(2, 2)
    tracking.disconnected()
    assert set(tracking.stale) == {1, 2}
    tracking.flushed()  # too late: it says nothing of them
    assert set(tracking.stale) == {1, 2}
    tracking.lost(3, 3)
    assert tracking.is_stale(3, 9)
    assert not tracking.is_stale(4, 9)
    assert not tracking.is_pending(1, 3)
    tracking.release()


@pytest.mark.parametrize("size", [1, 511, BLOCK, BLOCK + 1, EXTENT - 1, EXTENT, EXTENT + 1, SIZE, 16 << 30, (16 << 30) + 1])
async def test_out_of_sync_is_exact_to_the_byte(path: str, size: int) -> None:
    tracking = await opened(path, size)
    last = tracking.blocks - 1
    assert Tracking.span(0, size) == (0, last)
    assert Tracking.span(size - 1, 1) == (last, last)
    assert tracking.out_of_sync == 0
    await change(tracking, last)
    assert tracking.out_of_sync == size - last * BLOCK
    tracking.lost(last, last)
    tracking.mark_all()
    assert tracking.out_of_sync == size
    if last:
        tracking.resend(0, 0)
        assert tracking.bytes_of(tracking.stale) == size - BLOCK
        tracking.lost(0, 0)
    tracking.forget()
    assert (tracking.out_of_sync, tracking.clean) == (0, True)
    tracking.mark(BitMap64([last]))
    await tracking.close()
    again, known = await Tracking.open(Storage(), path, size, durable=False)
    assert known
    assert set(again.stale) == {last}
    again.release()


async def test_the_largest_disk_takes_no_time(path: str) -> None:
    """16 TiB: a bitmap of 32 MiB, which is nowhere gone through bit by bit."""
    began = time.process_time()
    size = 16 * TIB - 1
    tracking = await opened(path, size)
    tracking.mark_all()
    assert tracking.out_of_sync == size
    await tracking.save()
    tracking.resend(1000, 1000 + (1 << 14))
    tracking.acknowledged(1000, 1000)  # the rest is under way
    await tracking.save()
    tracking.release()
    again = await opened(path, size)
    assert again.out_of_sync == size
    scattered = BitMap64(random.Random(1).sample(range(again.blocks), 5000))
    again.forget()
    again.mark(scattered)
    await again.close()
    last = await opened(path, size)
    assert last.stale == scattered
    last.release()
    os.unlink(path)
    assert time.process_time() - began < 60, "far more than it takes on any machine"


# The file


async def test_after_a_close_it_knows_exactly_what_is_out_of_sync(path: str) -> None:
    dirty = {0, 5, PER_EXTENT, BLOCKS - 1}
    tracking = await opened(path)
    await make_stale(tracking, *dirty)
    await make_stale(tracking, 2 * PER_EXTENT)
    tracking.resend(2 * PER_EXTENT, 2 * PER_EXTENT)
    tracking.acknowledged(2 * PER_EXTENT, 2 * PER_EXTENT)
    tracking.begin_flush()
    tracking.flushed()
    await tracking.close()
    for _ in range(2):  # the second time nothing was hot at all
        tracking, known = await Tracking.open(Storage(), path, SIZE, durable=True)
        assert known
        assert set(tracking.dirty()) == dirty
        await tracking.close()


@pytest.mark.parametrize("durable", [False, True])
async def test_after_a_kill_the_hot_extents_are_stale_and_what_the_bitmap_had(path: str, durable: bool) -> None:
    tracking = await opened(path, durable=durable)
    await make_stale(tracking, 5, 2 * PER_EXTENT + 1)
    await tracking.close()
    tracking = await opened(path, durable=durable)
    await make_stale(tracking, 4 * PER_EXTENT)
    await change(tracking, BLOCKS - 1)
    tracking.acknowledged(BLOCKS - 1, BLOCKS - 1)
    tracking.release()
    tracking, known = await Tracking.open(Storage(), path, SIZE, durable=durable)
    assert known
    assert set(tracking.stale) == {5, 2 * PER_EXTENT + 1} | extents(4, 5)
    tracking.release()
    tracking = await opened(path, durable=durable)
    assert set(tracking.stale) == {5, 2 * PER_EXTENT + 1} | extents(4, 5), "and it is all in the bitmap now"
    tracking.release()


async def test_a_range_over_several_extents_is_hot_when_all_of_them_are(path: str) -> None:
    tracking = await opened(path)
    await tracking.heat(EXTENT, 1)
    assert tracking.is_hot(EXTENT, EXTENT)
    assert not tracking.is_hot(EXTENT - 1, 2)
    assert not tracking.is_hot(2 * EXTENT - 1, 2)
    await tracking.heat(EXTENT - 1, EXTENT + 2)
    assert tracking.is_hot(0, 3 * EXTENT)
    assert not tracking.is_hot(0, 3 * EXTENT + 1)
    await tracking.heat(SIZE - 1, 1)
    tracking.release()
    again = await opened(path)
    assert set(again.stale) == extents(0, 1, 2, 5)
    again.release()


def damaged(path: str, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x40]))


@pytest.mark.parametrize("at", [0, 7, 8, 15, 16, 23, 24, 28, 32, 39])
async def test_a_file_with_a_damaged_header_counts_as_unknown(path: str, at: int, caplog: pytest.LogCaptureFixture) -> None:
    tracking = await opened(path)
    await make_stale(tracking, 5)
    await tracking.close()
    damaged(path, at)
    tracking, known = await Tracking.open(Storage(), path, SIZE, durable=False)
    assert not known
    assert tracking.clean
    assert "damaged" in caplog.text
    tracking.release()


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"replfs-t", random.Random(1).randbytes(100_000)])
async def test_what_is_no_tracking_file_counts_as_unknown_and_becomes_one(path: str, content: bytes) -> None:
    Path(path).write_bytes(content)
    tracking, known = await Tracking.open(Storage(), path, SIZE, durable=False)
    assert (known, tracking.clean) == (False, True)
    await make_stale(tracking, 5)
    await tracking.close()
    tracking, known = await Tracking.open(Storage(), path, SIZE, durable=False)
    assert (known, set(tracking.stale)) == (True, {5})
    tracking.release()


async def test_another_disk_s_file_counts_as_unknown(path: str) -> None:
    await (await opened(path, SIZE + 1)).close()
    tracking, known = await Tracking.open(Storage(), path, SIZE, durable=False)
    assert not known
    tracking.release()


@pytest.mark.parametrize("length", [4096, LOG + 10, BITMAP, BITMAP + 20])
async def test_a_file_that_was_cut_off_counts_as_unknown(path: str, length: int) -> None:
    """What is missing would be taken for zeroes: in sync."""
    tracking = await opened(path)
    await make_stale(tracking, BLOCKS - 1)
    await tracking.close()
    os.truncate(path, length)
    tracking, known = await Tracking.open(Storage(), path, SIZE, durable=False)
    assert not known
    tracking.release()


# Cooling down


async def test_an_extent_that_is_not_used_for_a_while_cools_down(path: str) -> None:
    tracking = await opened(path, durable=True)
    await make_stale(tracking, 0, PER_EXTENT)
    await change(tracking, 2 * PER_EXTENT)  # which stays under way
    for _ in range(40):
        assert tracking.is_hot(PER_EXTENT * BLOCK, 1)
        await tracking.save()
    assert not tracking.is_hot(0, 1)
    assert tracking.is_hot(2 * EXTENT, 1), "as long as a change is under way"
    tracking.release()
    again = await opened(path)
    assert set(again.stale) == {0} | extents(1, 2)
    again.release()


async def test_no_more_extents_than_the_limit_stay_hot(path: str) -> None:
    size = 2000 * EXTENT
    tracking = await opened(path, size)
    await tracking.heat(0, (HOT_LIMIT + 200) * EXTENT)
    for _ in range(4):
        assert tracking.is_hot(0, EXTENT * 10)  # these are in use
        await tracking.save()
    assert tracking.is_hot(0, EXTENT * 10)
    tracking.release()
    again = await opened(path, size)
    hot = len(again.stale) // PER_EXTENT
    assert HOT_LIMIT // 2 <= hot <= HOT_LIMIT
    assert set(again.stale) >= extents(*range(10), blocks=again.blocks)
    again.release()


class SlowSyncs(Storage):
    """Each sync of a file waits until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.slow = False
        self.waiting: list[trio.Event] = []

    def adopt(self, fd: int, path: str) -> File:
        return _SlowFile(self, fd, path)


class _SlowFile(File):
    def __init__(self, storage: SlowSyncs, fd: int, path: str) -> None:
        super().__init__(fd, path)
        self._storage = storage

    async def sync(self) -> None:
        if self._storage.slow:
            self._storage.waiting.append(trio.Event())
            await self._storage.waiting[-1].wait()


async def test_an_extent_does_not_cool_down_while_it_is_being_heated(path: str) -> None:
    """A change over two extents: one was not used for long, and cools down just while the other one becomes hot."""
    storage = SlowSyncs()
    tracking = await opened(path, durable=True, storage=storage)
    await tracking.heat(EXTENT, 1)
    for _ in range(30):
        await tracking.save()
    assert not tracking.is_hot(EXTENT - 1, 2)
    storage.slow = True
    async with trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(tracking.save)
            await wait_all_tasks_blocked()
            if storage.waiting:
                break
        nursery.start_soon(tracking.heat, EXTENT - 1, 2)
        await wait_all_tasks_blocked()
        for event in storage.waiting:  # the one of save() first
            event.set()
            await wait_all_tasks_blocked()
    assert len(storage.waiting) == 2
    tracking.begin(PER_EXTENT - 1, PER_EXTENT)
    tracking.release()
    again = await opened(path)
    assert set(again.stale) == extents(0, 1)
    again.release()


# Errors


def faulty(tmp_path: Path) -> FaultyStorage:
    return FaultyStorage(str(tmp_path), Log(), Inodes())


async def test_a_bitmap_that_was_written_in_part_is_brought_up_to_date_by_the_next_save(path: str, tmp_path: Path) -> None:
    """Two parts of the bitmap change, and the second write fails. The first part must not be taken for what it was before."""
    storage = faulty(tmp_path)
    far = 1 << 15  # another sector of the bitmap, not next to the first one's
    tracking = await opened(path, 4 * far * BLOCK, storage=storage)
    await make_stale(tracking, 0, 3 * far)
    await tracking.save()
    tracking.resend(0, 0)
    tracking.acknowledged(0, 0)
    tracking.resend(3 * far, 3 * far)
    tracking.acknowledged(3 * far, 3 * far)
    tracking.begin_flush()
    tracking.flushed()
    storage.faults = [Fault("write", "tracking", after=1)]
    with pytest.raises(OSError, match="Input/output"):
        await tracking.save()  # says that 0 is in sync, and fails to say it of the other
    await make_stale(tracking, 0)
    for _ in range(40):
        await tracking.save()
    assert not tracking.is_hot(0, 1)
    tracking.release()
    again = await opened(path, 4 * far * BLOCK, storage=storage)
    assert 0 in again.stale
    again.release()


async def test_after_a_sync_that_failed_the_next_save_does_it(path: str, tmp_path: Path) -> None:
    """One error must not have every write into a cold extent fail for ever."""
    storage = faulty(tmp_path)
    tracking = await opened(path, durable=True, storage=storage)
    await make_stale(tracking, 0)
    storage.faults = [Fault("sync", "tracking")]
    with pytest.raises(OSError, match="Input/output"):
        await tracking.heat(EXTENT, 1)
    assert not tracking.is_hot(EXTENT, 1)
    await tracking.save()
    await tracking.heat(EXTENT, 1)
    await tracking.heat(2 * EXTENT, 1)
    tracking.release()


@pytest.mark.parametrize("after", range(8))
async def test_a_file_that_cannot_be_made_does_not_count_later(path: str, tmp_path: Path, after: int) -> None:
    storage = faulty(tmp_path)
    storage.faults = [Fault("write|sync|truncate|reserve", "tracking", after=after)]
    try:
        tracking, _ = await Tracking.open(storage, path, SIZE, durable=True)
        tracking.release()
    except OSError:
        assert not storage.opened
        _, known = await Tracking.open(storage, path, SIZE, durable=True)
        assert not known or after >= 6  # only then all of it was there, but for the last sync
    storage.abandon()


# On a primary


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_module, "_COMMIT_SECONDS", 0.01)
    monkeypatch.setattr(tracking_module, "_IDLE_ROUNDS", 2)


async def until(condition: Callable[[], Any], seconds: float = 20) -> None:
    with trio.fail_after(seconds):
        while not condition():
            await trio.lowlevel.checkpoint()


async def test_an_extent_cools_down_when_the_disk_has_its_changes_on_stable_storage(tmp_path: Path, hasty: None) -> None:
    """Else a power cut takes a change away here that the other side has kept, and nobody knows that the copies differ."""
    (tmp_path / "primary.raw").write_bytes(bytes(1 << 20))
    info = os.stat(tmp_path / "primary.raw")
    log, known = Log(), Inodes()
    disk = known.note_new(info)
    storage = FaultyStorage(str(tmp_path), log, known)
    target = Target(UnixAddress(str(tmp_path / "nobody.sock")), "disk")
    volume = PrimaryVolume(config(tmp_path, Mode.PRIMARY, target=target), None, storage)
    async with running(volume):
        tracking = volume.view.forwarder.tracking
        await volume.view.write(0, b"x" * 4096)
        written = len(log.events)
        await until(lambda: not tracking._hot)
        synced = [event for event in log.events[written:] if isinstance(event, SyncEnd) and event.file == disk and event.ok]
        assert any(isinstance(event, Write) and event.file == disk for event in log.events[:written])
        assert synced, "it cooled down before the disk was synced"


async def test_a_disk_whose_tracking_is_gone_is_out_of_sync_even_if_the_next_process_dies_soon(tmp_path: Path) -> None:
    """A primary finds that its tracking is lost, and is killed before the first regular save."""
    target = Target(UnixAddress(str(tmp_path / "nobody.sock")), "disk")
    async with primary(tmp_path, target, bytes(1 << 20)) as volume:
        await volume.save(peer="somebody")
        path = str(volume.directory.tracking)
    os.unlink(path)
    async with primary(tmp_path, target) as volume:
        assert volume.view.forwarder.tracking.out_of_sync == 1 << 20
        as_killed = Path(path).read_bytes()
    Path(path).write_bytes(as_killed)
    tracking, known = await Tracking.open(Storage(), path, 1 << 20, durable=True)
    assert not known or tracking.out_of_sync == 1 << 20
    tracking.release()


@pytest.mark.parametrize("what", ["all", "some"])
async def test_what_is_marked_outlives_a_power_cut_when_it_is_saved(what: str) -> None:
    """A link saves what it has marked before it tells its state that the other side is known."""
    medium = Medium()
    tracking, _ = ended(Tracking.open(medium, "t", SIZE, durable=True))
    if what == "all":
        tracking.mark_all()
    else:
        tracking.mark(BitMap64([3, 4 * PER_EXTENT]))
    marked = tracking.dirty()
    ended(tracking.save())
    medium.cut(lambda: False)
    again, _ = ended(Tracking.open(medium, "t", SIZE, durable=True))
    assert again.dirty() >= marked


# The model


class Died(BaseException):
    """The process is gone, in the middle of something."""


class Medium(Storage):
    """Holds one file. Sectors that were written and not synced may be there after a power cut or not, each by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.content = bytearray()
        self.dies_after = -1
        """Changes until the process dies; negative: it does not."""
        self._durable = bytearray()
        self._unsynced: list[tuple[int, int, bytes]] = []  # number, offset and content of a sector each
        self._numbers = count()

    def open_own(self, path: str) -> "MediumFile":  # type: ignore[override]
        return MediumFile(self, path)

    def write(self, offset: int, data: bytes) -> None:
        self.step()
        assert offset % 512 == 0
        self.content[offset : offset + len(data)] = data
        self._unsynced += [(next(self._numbers), offset + at, data[at : at + 512]) for at in range(0, len(data), 512)]

    def resize(self, length: int) -> None:
        """At once, as far as this model goes."""
        self.step()
        for content in (self.content, self._durable):
            del content[length:]
            content += bytes(length - len(content))

    def step(self) -> None:
        if self.dies_after == 0:
            raise Died
        self.dies_after -= 1

    def begin_sync(self) -> int:
        self.step()
        return next(self._numbers)

    def end_sync(self, covered: int) -> None:
        """What was written before it began is on stable storage, unless a power cut came first."""
        for number, offset, data in self._unsynced:
            if number < covered:
                self._durable[offset : offset + len(data)] = data
        self._unsynced = [sector for sector in self._unsynced if sector[0] >= covered]

    def cut(self, is_kept: Callable[[], bool]) -> None:
        """The power goes."""
        for _, offset, data in self._unsynced:
            if is_kept():
                self._durable[offset : offset + len(data)] = data
        self._unsynced = []
        self.content = bytearray(self._durable)


@coroutine
def pause() -> Generator[None, None, None]:
    yield


class MediumFile:
    """As much of a File as the tracking uses. A sync gives the others a turn."""

    def __init__(self, medium: Medium, path: str) -> None:
        self.path = path
        self._medium = medium

    def length(self) -> int:
        return len(self._medium.content)

    def read_now(self, offset: int, length: int) -> bytes:
        return bytes(self._medium.content[offset : offset + length])

    def write(self, offset: int, data: bytes) -> None:
        self._medium.write(offset, bytes(data))

    def truncate(self, length: int) -> None:
        self._medium.resize(length)

    def reserve(self, length: int) -> None:
        if length > self.length():
            self._medium.resize(length)

    async def sync(self) -> None:
        covered = self._medium.begin_sync()
        await pause()
        self._medium.end_sync(covered)

    def close(self) -> None:
        pass


class Task:
    """A coroutine that goes on when it is told to, up to its next sync."""

    def __init__(self, work: Coroutine[Any, Any, Any]) -> None:
        self._work = work
        self.over = False
        self.result: Any = None
        self.go_on()

    def go_on(self) -> None:
        try:
            self._work.send(None)
        except StopIteration as end:
            self.over, self.result = True, end.value

    def to_end(self) -> Any:
        while not self.over:
            self.go_on()
        return self.result

    def drop(self) -> None:
        self._work.close()


def ended(work: Coroutine[Any, Any, Any]) -> Any:
    return Task(work).to_end()


def test_a_power_cut_at_any_moment_of_an_open_loses_nothing() -> None:
    """What was hot goes to the bitmap, and only then out of the log."""
    for steps in range(6):
        for seed in range(12):
            medium = Medium()
            tracking, _ = ended(Tracking.open(medium, "t", SIZE, durable=True))
            ended(tracking.heat(0, 1))
            medium.cut(lambda: False)
            medium.dies_after = steps
            with suppress(Died):
                ended(Tracking.open(medium, "t", SIZE, durable=True))
            choose = random.Random(seed)
            medium.cut(lambda choose=choose: choose.random() < 0.5)
            medium.dies_after = -1
            again, known = ended(Tracking.open(medium, "t", SIZE, durable=True))
            assert known
            assert set(again.stale) == extents(0)


MODEL_SIZE = 20 * (1 << 30) + 2 * BLOCK + 7  # two sectors of the log, and many of the bitmap
LAST = MODEL_SIZE // BLOCK
FAR = 4096 * PER_EXTENT  # the first block of the log's second sector
POOL = [0, 1, PER_EXTENT - 1, PER_EXTENT, 2 * PER_EXTENT, 4095, 4096, FAR - 1, FAR, LAST - 1, LAST]
RANGES = [(block, block) for block in POOL] + [
    (0, 1),
    (PER_EXTENT - 1, PER_EXTENT),
    (4095, 4096),
    (FAR - 1, FAR),
    (LAST - 1, LAST),
    (PER_EXTENT - 1, 2 * PER_EXTENT),
]
ranges = st.sampled_from(RANGES)
chance = st.integers(0, 1 << 32).map(random.Random)
Content = frozenset[int]
NOTHING: Content = frozenset()


class Sent:
    """On its way to the other side: one change, by its number, or whole blocks as they were."""

    def __init__(self, first: int, last: int, number: int | None, whole: dict[int, Content]) -> None:
        self.first, self.last, self.number, self.whole = first, last, number, whole

    def overlaps(self, other: "Sent") -> bool:
        return self.first <= other.last and other.first <= self.last


class Disk:
    """The other side's: a block holds the changes that have reached it."""

    def __init__(self) -> None:
        self.durable: dict[int, Content] = {}
        self.unflushed: list[Sent] = []

    @staticmethod
    def _apply(content: dict[int, Content], sent: Sent) -> None:
        for block in range(sent.first, sent.last + 1):
            content[block] = content.get(block, NOTHING) | {sent.number} if sent.number is not None else sent.whole[block]

    def flush(self, count: int) -> None:
        for sent in self.unflushed[:count]:
            self._apply(self.durable, sent)
        del self.unflushed[:count]

    def cut(self, is_kept: Callable[[], bool]) -> None:
        for sent in self.unflushed:
            for block in range(sent.first, sent.last + 1):
                if is_kept():
                    whole = {block: sent.whole.get(block, NOTHING)}
                    self._apply(self.durable, Sent(block, block, sent.number, whole))
        self.unflushed = []


class Replication(RuleBasedStateMachine):
    """A primary's disk, its tracking, a link, and the other side's disk.

    The local disk itself loses nothing here; that it is synced before an extent cools down is its owner's business.
    """

    def __init__(self) -> None:
        super().__init__()
        self.saved_limits = tracking_module._IDLE_ROUNDS, tracking_module.HOT_LIMIT
        tracking_module._IDLE_ROUNDS, tracking_module.HOT_LIMIT = 2, 4  # type: ignore[misc]
        self.medium = Medium()
        self.local: dict[int, Content] = {}
        self.remote = Disk()
        self.changes = 0
        self.linked = True
        self.flying: list[Sent] = []
        self.flushing: int | None = None  # how much of what is unflushed there it covers
        self.heating: list[tuple[Task, int, int]] = []
        self.saving: Task | None = None
        self.bitmap: set[int] = set()  # what it had when it was written last
        self.heated: set[int] = set()  # extents, since the file was opened
        self.tracking: Tracking
        self.open()

    def open(self) -> None:
        self.tracking, self.known = ended(Tracking.open(self.medium, "tracking", MODEL_SIZE, durable=True))
        self.bitmap, self.heated = set(self.tracking.stale), set()

    def teardown(self) -> None:
        try:
            self.becomes_clean()
        finally:
            tracking_module._IDLE_ROUNDS, tracking_module.HOT_LIMIT = self.saved_limits  # type: ignore[misc]

    @invariant()
    def nothing_that_the_other_side_lacks_is_taken_for_in_sync(self) -> None:
        dirty = self.tracking.dirty()
        lacking = {block for block, content in self.local.items() if self.remote.durable.get(block, NOTHING) != content}
        assert lacking <= set(dirty), f"taken for in sync: {sorted(lacking - set(dirty))}"
        assert self.tracking.out_of_sync == sum(min(BLOCK, MODEL_SIZE - block * BLOCK) for block in dirty)
        assert self.tracking.clean == (not dirty)

    # Changes

    @rule(which=ranges, asks=st.booleans(), waits=st.booleans())
    def changes_something(self, which: tuple[int, int], asks: bool, waits: bool) -> None:
        """The mirror need not ask whether it is hot before it heats (after the link was lost, it does not)."""
        first, last = which
        if asks and self.tracking.is_hot(first * BLOCK, (last - first) * BLOCK + 1):
            return self.change(first, last)
        task = Task(self.tracking.heat(first * BLOCK, (last - first) * BLOCK + 1))
        self.heated |= set(range(first // PER_EXTENT, last // PER_EXTENT + 1))
        if waits and not task.over:
            self.heating.append((task, first, last))
        else:
            task.to_end()
            self.change(first, last)
        return None

    @precondition(lambda self: self.heating)
    @rule(choose=chance)
    def has_heated(self, choose: random.Random) -> None:
        task, first, last = self.heating.pop(choose.randrange(len(self.heating)))
        task.to_end()
        self.change(first, last)

    def change(self, first: int, last: int) -> None:
        self.tracking.begin(first, last)
        self.changes += 1
        for block in range(first, last + 1):
            self.local[block] = self.local.get(block, NOTHING) | {self.changes}
        if self.linked and not self.tracking.is_stale(first, last):
            self.flying.append(Sent(first, last, self.changes, {}))
        else:
            self.tracking.lost(first, last)

    @precondition(lambda self: self.linked and self.tracking.stale)
    @rule(choose=chance, more=st.integers(1, 3))
    def sends_stale_blocks_again(self, choose: random.Random, more: int) -> None:
        stale = self.tracking.stale
        first = choose.choice([block for block in POOL if block in stale] or [stale.min()])
        last = first
        while last + 1 in stale and last - first < more:
            last += 1
        self.resend(first, last)

    def resend(self, first: int, last: int) -> None:
        self.tracking.resend(first, last)
        whole = {block: self.local.get(block, NOTHING) for block in range(first, last + 1)}
        self.flying.append(Sent(first, last, None, whole))

    @precondition(lambda self: self.flying)
    @rule(choose=chance, count=st.integers(1, 5))
    def is_answered(self, choose: random.Random, count: int) -> None:
        """In any order, but for those that overlap."""
        for _ in range(min(count, len(self.flying))):
            ready = [sent for i, sent in enumerate(self.flying) if not any(sent.overlaps(before) for before in self.flying[:i])]
            sent = choose.choice(ready)
            self.flying.remove(sent)
            self.remote.unflushed.append(sent)
            self.tracking.acknowledged(sent.first, sent.last)

    # Flushes

    @precondition(lambda self: self.linked and self.flushing is None)
    @rule()
    def begins_a_flush(self) -> None:
        if self.tracking.begin_flush():
            self.flushing = len(self.remote.unflushed)

    @precondition(lambda self: self.flushing is not None)
    @rule()
    def has_flushed(self) -> None:
        assert self.flushing is not None
        self.remote.flush(self.flushing)
        self.flushing = None
        self.tracking.flushed()

    # Cuts

    def unlink(self, choose: random.Random) -> None:
        """What is on its way may arrive still, and nobody hears of it."""
        if self.flushing is not None and choose.random() < 0.5:
            self.remote.flush(self.flushing)
        self.remote.unflushed += [sent for sent in self.flying if choose.random() < 0.5]
        self.flushing, self.linked = None, False

    @precondition(lambda self: self.linked)
    @rule(choose=chance)
    def loses_the_link(self, choose: random.Random) -> None:
        self.unlink(choose)
        for sent in self.flying:
            self.tracking.lost(sent.first, sent.last)
        self.flying = []
        self.tracking.disconnected()

    @rule(choose=chance)
    def the_other_side_loses_its_power(self, choose: random.Random) -> None:
        if self.linked:
            self.loses_the_link(choose)
        self.remote.cut(lambda: choose.random() < 0.5)

    @precondition(lambda self: not self.linked)
    @rule()
    def has_a_link_again(self) -> None:
        self.linked = True

    def die(self, choose: random.Random) -> tuple[set[int], set[int]]:
        """Gives what it knew to be out of sync, and what it may say besides."""
        self.unlink(choose)
        self.flying = []
        for task, _, _ in self.heating:
            task.drop()
        if self.saving is not None:
            self.saving.drop()
        self.heating, self.saving = [], None
        hot = {block for extent in self.heated for block in range(extent * PER_EXTENT, min((extent + 1) * PER_EXTENT, LAST + 1))}
        return set(self.tracking.dirty()), hot | self.bitmap

    def come_back(self, dirty: set[int], more: set[int]) -> None:
        self.medium.dies_after = -1
        self.open()
        assert self.known
        found = set(self.tracking.stale)
        assert dirty <= found
        assert found <= dirty | more, "what was neither out of sync nor in the bitmap nor hot"

    @rule(choose=chance)
    def is_killed(self, choose: random.Random) -> None:
        self.come_back(*self.die(choose))

    @rule(choose=chance)
    def loses_its_power(self, choose: random.Random) -> None:
        dirty, more = self.die(choose)
        self.medium.cut(lambda: choose.random() < 0.5)
        self.come_back(dirty, more)

    @precondition(lambda self: not self.heating and self.saving is None)
    @rule(choose=chance, steps=st.integers(0, 6), cut=st.booleans(), what=st.sampled_from(["save", "close", "open"]))
    def dies_in_the_middle(self, choose: random.Random, steps: int, cut: bool, what: str) -> None:
        dirty, more = self.die(choose)
        if what == "close":
            for sent in self.flying:
                self.tracking.lost(sent.first, sent.last)
        self.medium.dies_after = steps
        try:
            if what == "open":
                ended(Tracking.open(self.medium, "tracking", MODEL_SIZE, durable=True))
            else:
                ended(self.tracking.save() if what == "save" else self.tracking.close())
        except Died:
            pass
        if cut:
            self.medium.cut(lambda: choose.random() < 0.5)
        self.come_back(dirty, more | dirty)

    # The file

    @precondition(lambda self: self.saving is None)
    @rule(times=st.sampled_from([1, 1, 3, 6]), waits=st.booleans())
    def saves(self, times: int, waits: bool) -> None:
        for _ in range(times):
            task = Task(self.tracking.save())
            self.bitmap |= set(self.tracking.dirty())
            if waits and not task.over:
                self.saving = task
                return
            task.to_end()

    @precondition(lambda self: self.saving is None)
    @rule(which=ranges, asks=st.booleans(), waits=st.booleans(), choose=chance)
    def something_changes_while_extents_cool_down(
        self, which: tuple[int, int], asks: bool, waits: bool, choose: random.Random
    ) -> None:
        self.saves(3, False)
        self.saves(1, True)
        self.changes_something(which, asks, waits)
        self.is_answered(choose, 100)
        if self.saving is not None:
            self.has_saved()

    @precondition(lambda self: self.saving is not None)
    @rule()
    def has_saved(self) -> None:
        assert self.saving is not None
        self.saving.to_end()
        self.saving = None

    @precondition(lambda self: not self.heating and self.saving is None)
    @rule(choose=chance)
    def is_closed_and_opened(self, choose: random.Random) -> None:
        if self.linked:
            self.loses_the_link(choose)
        dirty = set(self.tracking.dirty())
        ended(self.tracking.close())
        self.open()
        assert self.known
        assert set(self.tracking.stale) == dirty, "exactly what was out of sync"

    # At the end

    def becomes_clean(self) -> None:
        if self.saving is not None:
            self.has_saved()
        for task, first, last in self.heating:
            task.to_end()
            self.change(first, last)
        self.heating, self.linked = [], True
        while self.tracking.stale:
            first = self.tracking.stale.min()
            last = first
            while last + 1 in self.tracking.stale:
                last += 1
            self.resend(first, last)
        for sent in self.flying:
            self.remote.unflushed.append(sent)
            self.tracking.acknowledged(sent.first, sent.last)
        self.flying = []
        if self.flushing is not None:
            self.has_flushed()
        self.begins_a_flush()
        if self.flushing is not None:
            self.has_flushed()
        assert self.tracking.clean
        assert self.tracking.out_of_sync == 0
        self.nothing_that_the_other_side_lacks_is_taken_for_in_sync()
        ended(self.tracking.close())
        self.open()
        assert self.known
        assert self.tracking.clean


TestReplication = Replication.TestCase
TestReplication.settings = settings(max_examples=200, stateful_step_count=40)
