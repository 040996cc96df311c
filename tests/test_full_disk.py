"""A file system that is full, down to the page: what needs room fails with ENOSPC, and everything else goes on.

Owns small file systems whose room is counted: the state directory lies in one, or the disk, or both. With so many pages left, both
ports are written to until they have found no room several times; then all that was acknowledged must be there, and what needs no
room must work. When there is room again everything must, with nothing mounted anew.
"""

import errno
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from disks import same
from harness import LINK_LOST, Sides, replfs, run, wait_for
from storm import SECTOR, Nbd, forget_state, is_mounted, make_disk, soundness, tagged

SIZE = (16 << 20) + 3 * SECTOR
PAGE = 4096
NO_ROOM = ["No space left on device"]
WHERE = ["state", "disk", "both"]

pytestmark = pytest.mark.timeout(600)  # at full length; each wait has a bound of its own


class Room:
    """A file system of ``size`` bytes, with ballast in it."""

    def __init__(self, folder: Path, size: int = 40 << 20) -> None:
        self.path = folder / "room"
        self.path.mkdir()
        self._ballast = self.path / "ballast"
        run("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", self.path)

    def leave(self, pages: int) -> None:
        """So many pages are free now; where there are fewer already, those."""
        with self._ballast.open("ab") as file:
            held = file.tell()
            free = os.statvfs(self.path).f_bfree - pages
            if free > 0:
                os.posix_fallocate(file.fileno(), held, free * PAGE)

    def free(self) -> None:
        self._ballast.unlink(missing_ok=True)

    def remove(self) -> None:
        run("umount", "-l", self.path)


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Room]:
    """To be named before ``sides``, so that it goes away after them."""
    made = Room(tmp_path)
    yield made
    made.remove()


def half_filled() -> bytes:
    """The content of a disk: every second MiB of it is nothing."""
    content = bytearray(tagged(0, SIZE // SECTOR, 1))
    for start in range(1 << 20, SIZE, 2 << 20):
        content[start : start + (1 << 20)] = bytes(1 << 20)
    return bytes(content)


def needs_room(error: OSError) -> None:
    assert error.errno == errno.ENOSPC, error


class Port:
    """The mounted file or the export, and what it is known to hold."""

    def __init__(self, content: bytes, write: Callable[[int, bytes], int], read: Callable[[int, int], bytes]) -> None:
        self.content = bytearray(content)
        self._write = write
        self._read = read
        self.refused = 0

    def write(self, sector: int, data: bytes, *, unchanged: bool = False) -> bool:
        """Returns whether there was room. If not, each sector is as before or as written, or all are ``unchanged``."""
        start, end = sector * SECTOR, sector * SECTOR + len(data)
        while start < end:
            rest = data[start - end :]
            try:
                written = self._write(start, rest)
            except OSError as error:
                needs_room(error)
                self._settle(start, rest, unchanged)
                self.refused += 1
                return False
            self.content[start : start + written] = rest[:written]
            start += written
        return True

    def _settle(self, start: int, data: bytes, unchanged: bool) -> None:
        got = self._read(start, len(data))
        before = self.content[start : start + len(data)]
        for at in range(0, len(data), SECTOR):
            sector = slice(at, at + SECTOR)
            assert got[sector] == before[sector] or (not unchanged and got[sector] == data[sector]), f"sector {start // SECTOR}"
        self.content[start : start + len(data)] = got


class Cramped:
    """A secondary that is about to find no room."""

    def __init__(self, sides: Sides, room: Room, where: str, disk_format: str, rng: random.Random) -> None:
        self.rng = rng
        self._tag = 0
        self._sides = sides
        self.room = room
        self.where = where
        disk = (sides.folder if where == "state" else room.path) / f"disk.{disk_format}"
        content = half_filled()
        make_disk(disk, content, disk_format)
        self.state_dir = (sides.folder if where == "disk" else room.path) / "state"
        self.side = sides.make(
            "secondary", disk, "--listen", f"unix:{sides.socket}", "--format", disk_format, "--state-dir", self.state_dir
        )
        self.side.state_dir = self.state_dir
        self.side.expected = [*NO_ROOM, "start failed"]
        self.view = Port(content, self._write_file, self._read_file)
        self.disk = Port(content, self._write_nbd, lambda start, length: self._nbd.read(start, length))

    def mount(self) -> None:
        self.side.mount()
        self.reconnect()

    def reconnect(self) -> None:
        self._nbd = Nbd(str(self._sides.socket))

    def stop(self, end: str) -> None:
        self.disconnect()
        if end == "killed":
            self.side.signal(signal.SIGKILL)
        replfs("umount", self.side.point)
        self.side.pid = 0

    def disconnect(self) -> None:
        self._nbd.close()

    def _write_file(self, start: int, data: bytes) -> int:
        """How much was written: the kernel sends what is not in whole pages in several requests."""
        fd = os.open(self.side.file, os.O_WRONLY | self.rng.choice((0, os.O_SYNC)))
        try:
            return os.pwrite(fd, data, start)
        finally:
            os.close(fd)

    def _write_nbd(self, start: int, data: bytes) -> int:
        if data == bytes(len(data)):
            self._nbd.write_zeroes(start, len(data))
        else:
            self._nbd.write(start, data)
        return len(data)

    def _read_file(self, start: int, length: int) -> bytes:
        """From the daemon, not from the page cache."""
        fd = os.open(self.side.file, os.O_RDONLY | os.O_DIRECT)
        try:
            return os.pread(fd, length, start)
        finally:
            os.close(fd)

    def prepared(self) -> None:
        """Wait until the next checkpoint's overlays are there: what it needs is known to be there then."""
        wait_for(lambda: len(list(self.state_dir.glob("*.qcow2"))) == 4, "the spare overlays")
        with suppress(OSError):
            self.side.set("start", "secondary")  # refused, once they have been made

    def write(self, port: Port) -> bool:
        self._tag += 1
        sector = self.rng.randrange(SIZE // SECTOR - 40)
        count = self.rng.choice((1, 2, 8, 8, 17, 40))
        zeroes = port is self.disk and self.rng.random() < 0.1
        data = bytes(count * SECTOR) if zeroes else tagged(sector, count, self._tag)
        return port.write(sector, data, unchanged=port is self.disk and self.where == "state")

    def fill(self) -> None:
        """Write until each port that can find no room has found none several times."""
        wanted = [port for port in (self.view, self.disk) if port is self.disk or self.where != "disk"]
        start = {port: port.refused for port in wanted}
        for _ in range(2000):
            self.write(self.rng.choice((self.view, self.disk)))
            if all(port.refused >= start[port] + 3 for port in wanted):
                return
        raise AssertionError(f"there was always room: {[port.refused - start[port] for port in wanted]}")

    def rewrite(self) -> None:
        """What is held already needs no room: write it once with, and again without any."""
        sector = self.rng.randrange(SIZE // SECTOR // 8) * 8  # two subclusters
        for port in (self.view, self.disk):
            assert port.write(sector, tagged(sector, 8, self._tag + 1))
        self.room.leave(0)
        for port in (self.view, self.disk):
            assert port.write(sector, tagged(sector, 8, self._tag + 2)), "what is held already needs no room"
        self._tag += 2

    def check(self) -> None:
        assert same(self.side.content(), self.view.content)
        assert same(self._nbd.content(), self.disk.content)

    def control(self, operation: str) -> bool:
        """Returns whether there was room; if not, nothing has changed."""
        before = self.side.get("stage"), self.side.get("generation")
        try:
            self.side.set(operation)
        except OSError as error:
            needs_room(error)
            assert "No space left on device" in self.side.get("last-error")
            assert (self.side.get("stage"), self.side.get("generation")) == before
            return False
        if operation == "checkpoint":
            self.view.content[:] = self.disk.content
        return True

    def work_goes_on(self) -> None:
        """There is room again."""
        self.room.free()
        for _ in range(10):
            for port in (self.view, self.disk):
                assert self.write(port), "there is room again"
        self.check()

    def end(self) -> None:
        self.stop("unmounted")
        images = [path for path in (*self.state_dir.glob("*.qcow2"), self.side.disk) if path.suffix == ".qcow2"]
        problems = soundness(images)
        assert not any(problems.values()), problems


@contextmanager
def opened(file: Path) -> Iterator[int]:
    fd = os.open(file, os.O_RDWR)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def cramped(sides: Sides, room: Room, where: str, disk_format: str, seed: str = "") -> Iterator[Cramped]:
    made = Cramped(sides, room, where, disk_format, random.Random(f"{where} {disk_format} {seed}"))
    made.mount()
    try:
        yield made
        made.end()
    finally:
        made.disconnect()


@pytest.mark.parametrize("disk_format", ["raw", "qcow2"])
@pytest.mark.parametrize("where", WHERE)
def test_writes_that_find_no_room_fail_and_nothing_else_does(
    room: Room, sides: Sides, full: bool, tally: Callable[[str, int], None], where: str, disk_format: str
) -> None:
    """With 0 pages left, 1, 2 ... A checkpoint in between, some in a file system that is still full: it has been made room for."""
    with cramped(sides, room, where, disk_format) as it:
        cases = range(40) if full else range(6)
        for pages in cases:
            it.prepared()
            it.rewrite()
            room.free()
            room.leave(pages)
            it.fill()
            it.check()
            if pages % 2:
                assert it.control("checkpoint"), "its overlays have been made"
                it.check()
            it.work_goes_on()
            assert it.control("checkpoint")
        tally("full disk", len(cases) * (1 if where == "disk" else 2))


@pytest.mark.parametrize("disk_format", ["raw", "qcow2"])
@pytest.mark.parametrize("where", WHERE)
def test_a_failover_that_finds_no_room_fails_and_can_be_asked_for_again(
    room: Room, sides: Sides, full: bool, tally: Callable[[str, int], None], where: str, disk_format: str
) -> None:
    """It begins however little room there is. What it needs then is what the disk lacks."""
    cases = (0, 1, 2, 7, 30) if full else (0, 3)
    for pages in cases:
        with cramped(sides, room, where, disk_format, str(pages)) as it:
            it.side.expected += ["failover: the commit failed"]
            for _ in range(40):
                assert it.write(it.view)
                assert it.write(it.disk)
            it.prepared()
            room.leave(pages)
            it.fill()
            assert it.control("failover"), "the state has room of its own"
            it.disconnect()  # as the secondary does
            wait_for(lambda: it.side.get("stage") != "failover", "the end of the commit")
            assert it.side.get("stage") == ("done" if where == "state" else "failover-failed")
            assert same(it.side.content(), it.view.content)
            if where != "state":
                assert it.side.get("error") == "I/O error occurred"
                for _ in range(10):
                    it.write(it.view)
                assert same(it.side.content(), it.view.content)
                room.free()
                assert it.write(it.view), "there is room again"
                assert it.control("failover")
                it.side.until_stage("done")
            assert it.write(it.view)
            assert same(it.side.content(), it.view.content)
            it.reconnect()
            it.disk.content = it.view.content
            it.check()
        tear_down(it)
    tally("full disk", len(cases))


def tear_down(it: Cramped) -> None:
    """Make room for another one."""
    it.room.free()
    forget_state(it.side)
    it.side.disk.unlink()
    it.side.point.rmdir()


@pytest.mark.parametrize("end", ["unmounted", "killed"])
@pytest.mark.parametrize("where", ["state", "both"])
def test_a_mount_where_there_is_no_room_resumes_and_takes_checkpoints(
    room: Room, sides: Sides, full: bool, tally: Callable[[str, int], None], where: str, end: str
) -> None:
    """What the next checkpoint needs was there before the end: nobody can have taken its room meanwhile."""
    cases = (0, 1, 2, 3, 8, 40) if full else (0, 2)
    for pages in cases:
        with cramped(sides, room, where, "raw", f"{end} {pages}") as it:
            for _ in range(10):
                it.write(it.view)
                it.write(it.disk)
            it.prepared()
            room.leave(pages)
            it.fill()
            it.stop(end)
            room.leave(pages)
            it.mount()
            it.check()
            assert it.control("checkpoint"), "it resumed, and finds no room for a checkpoint"
            it.check()
            it.work_goes_on()
        tear_down(it)
    tally("full disk", len(cases))


def test_a_first_mount_without_room_leaves_nothing_behind(
    room: Room, sides: Sides, full: bool, tally: Callable[[str, int], None]
) -> None:
    """The state directory is made wholly or not at all, and a mount works as soon as there is room."""
    it = Cramped(sides, room, "state", "raw", random.Random(0))
    cases = range(0, 1200, 20) if full else range(4)
    refused = 0
    for pages in cases:
        room.leave(pages)
        done = replfs(it.side.mode, it.side.disk, it.side.point, *it.side.arguments, check=False)
        if done.returncode != 0:
            refused += 1
            assert "No space left on device" in done.stderr
            assert sorted(os.listdir(room.path)) == ["ballast"]
            assert not is_mounted(it.side.point)
        else:
            it.side.pid = it.side.status()["pid"]
            assert it.side.get("stage") == "running"
            it.side.umount()
            shutil.rmtree(it.state_dir)
        room.free()
    assert refused
    assert refused < 60
    it.mount()
    it.check()
    it.end()
    tally("full disk", len(cases))


@pytest.mark.parametrize("disk_format", ["raw", "qcow2"])
def test_a_primary_whose_own_disk_is_full(
    room: Room, sides: Sides, full: bool, tally: Callable[[str, int], None], disk_format: str
) -> None:
    """Its machine is told; what a write that failed has left is on both sides."""
    rng = random.Random(disk_format)
    content = half_filled()
    far = sides.secondary(content)
    disk = make_disk(room.path / f"disk.{disk_format}", content, disk_format)
    near = sides.make(
        "primary",
        disk,
        "--target",
        f"nbd+unix:///disk?socket={sides.socket}",
        "--format",
        disk_format,
        "--state-dir",
        sides.folder / "p",
    )
    near.state_dir = sides.folder / "p"
    near.expected = NO_ROOM
    near.mount()
    near.until_connected()
    cases = range(30) if full else range(4)
    with opened(near.file) as fd:
        port = Port(content, lambda start, data: os.pwrite(fd, data, start), lambda start, length: os.pread(fd, length, start))
        tag = 1
        for pages in cases:
            room.leave(pages)
            refused = port.refused
            while port.refused < refused + 3:
                tag += 1
                sector, count = rng.randrange(SIZE // SECTOR - 40), rng.choice((1, 8, 17, 40))
                port.write(sector, tagged(sector, count, tag))
            room.free()
            assert port.write(SIZE // SECTOR // 2, tagged(SIZE // SECTOR // 2, 50, tag + 1)), "there is room again"
            assert same(near.content(), port.content)
            wait_for(lambda: near.status()["link"]["out-of-sync"] == 0, "the end of the resync")
            assert same(far.disk.read_bytes(), port.content)
    tally("full disk", len(cases))


def test_a_primary_whose_secondary_is_full(room: Room, sides: Sides, tally: Callable[[str, int], None]) -> None:
    """It goes on, and says so; the secondary's view is what it was, and can be failed over to."""
    content = half_filled()
    with cramped(sides, room, "both", "raw") as it:
        near = sides.primary(content)
        near.expected = LINK_LOST
        it.prepared()
        room.leave(5)
        run("dd", "if=/dev/urandom", f"of={near.file}", "bs=64k", "count=100", "conv=notrunc", "status=none")
        assert near.get("error") == "I/O error occurred"
        run("cmp", near.file, near.disk)
        assert same(it.side.content(), content)
        near.umount()
        room.free()
        assert it.control("failover")
        it.disconnect()
        it.side.until_stage("done")
        it.reconnect()
        it.disk.content = it.view.content
        it.check()
    tally("full disk", 1)
