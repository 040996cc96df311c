"""Links that are disturbed while writers never stop: the machine goes on, nothing is lost, and only what changed is sent again.

Owns the storm: rounds of random disturbances, each with a quiet end, when the copies agree and are equal, byte for byte.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path

import pytest
from disks import qemu_img, same
from harness import SECONDS, Sides, replfs, wait_for
from proxy import BACK, THERE
from storm import NEVER, SECTOR, Crowd, Expected, Nbd, Writer, Writes, at_random, make_disk, tagged
from test_links import BLOCK, MIB, Pair, pair, probing
from test_storms import remove_dead_mount

__all__ = ["pair"]

SIZE = 8 * MIB + 3 * SECTOR  # the last block is short

pytestmark = pytest.mark.timeout(1200)  # at full length; each wait has a bound of its own


def blocks(writes: Writes, since: int, until: int = NEVER) -> set[int]:
    """Those that were written to, perhaps, between two times."""
    found: set[int] = set()
    for change in writes.all:
        if change.acknowledged >= since and change.begun < until:
            found.update(range(change.sector * SECTOR // BLOCK, ((change.sector + change.count) * SECTOR - 1) // BLOCK + 1))
    return found


@contextmanager
def busy(pair: Pair, folder: Path, size: int, rng: random.Random) -> Iterator[Crowd]:
    """Writers that are ended, even if they hang: the daemon of a test that has failed is killed first."""
    crowd = Crowd(folder, size, rng)
    try:
        yield crowd
    except BaseException:
        if pair.near.pid:
            pair.near.signal(signal.SIGKILL)
        raise
    finally:
        crowd.__exit__()


class Storm:
    """The rounds of a pair whose machine writes all the time."""

    KINDS = ("cut", "stall", "kill_secondary", "cut_in_a_message", "strand", "kill_primary", "unplug", "drop", "stop")
    KINDS += ("limit", "refuse", "corrupt")

    def __init__(self, sides: Sides, pair: Pair, disk_format: str, protocol: str) -> None:
        self.rng = random.Random(f"{disk_format} {protocol}")
        self.folder, self.socket = sides.folder, sides.socket
        self.pair, self.proxy = pair, pair.proxy
        content = tagged(0, SIZE // SECTOR, 0)
        near, far = (make_disk(sides.folder / f"{side}.{disk_format}", content, disk_format) for side in ("primary", "secondary"))
        pair.secondary(far, "--format", disk_format)
        pair.primary(near, "--format", disk_format, "--protocol", protocol, "--initial-sync", "none", "--window", "1M")
        self.expected = Expected(content)
        self.crowd: Crowd
        self.writers: list[Writer] = []
        """All of this round."""

    def round(self, *kinds: str) -> None:
        self._start()
        try:
            for kind in kinds:
                if self.rng.random() < 0.7:
                    self.pair.hurry_until("connected", "syncing")
                at_random(self.rng, 0.2)
                getattr(self, kind)()
                self.crowd.until_busy(1)
            self.crowd.kill()
        except BaseException:
            if self.pair.near.pid:  # else writers that hang could not even be killed
                self.pair.near.signal(signal.SIGKILL)
            self.crowd.__exit__()
            raise
        self.quiet()

    def _start(self) -> None:
        self.crowd = Crowd(self.folder, SIZE, self.rng)
        self.crowd.write_through(self.pair.near.file, "direct", "buffered", "sync")
        self.writers += self.crowd.disk
        self.crowd.until_busy()

    def quiet(self) -> None:
        self.proxy.go_on()
        self.pair.hurry_until("connected")
        self.pair.agree()
        content = self.pair.near.content()
        self.expected.settle_disk(content, Writes(self.writers))
        self.writers = []
        far = Nbd(str(self.socket))
        assert same(far.content(), content)
        far.close()
        replfs("checkpoint", self.pair.near.point)
        assert same(self.pair.far.content(), content)
        assert not self.pair.link["out-of-sync"]

    def _until_lost(self) -> None:
        wait_for(lambda: self.pair.link["state"] in ("connecting", "refused"), "the end of the link")

    # The disturbances

    def cut(self) -> None:
        self.proxy.cut()

    def cut_in_a_message(self) -> None:
        accepted, way = self.proxy.accepted, self.rng.choice((THERE, BACK))
        self.pair.hurry_until("connected", "syncing")
        self.proxy.cut_after(self.rng.randrange(1, 100_000 if way is THERE else 300), way)
        wait_for(lambda: self.proxy.accepted > accepted or not self.proxy.connections, "the cut")
        self.proxy.go_on()

    def unplug(self) -> None:
        self.proxy.unplug()
        self.crowd.until_busy(self.rng.randrange(1, 20))
        self.proxy.go_on()

    def stall(self) -> None:
        self.proxy.stall(*self.rng.choice(((), (THERE,), (BACK,))))
        self._until_lost()
        self.proxy.go_on()

    def drop(self) -> None:
        self.proxy.drop(*self.rng.choice(((), (THERE,), (BACK,))))
        self._until_lost()
        self.proxy.go_on()

    def strand(self) -> None:
        """What was on its way arrives when there is a new link already."""
        self.proxy.strand()
        self._until_lost()
        self.pair.hurry_until("connected", "syncing")
        self.proxy.go_on()

    def refuse(self) -> None:
        self.proxy.refuse()
        self.crowd.until_busy(1)
        self.proxy.cut()
        self._until_lost()
        self.proxy.go_on()

    def corrupt(self) -> None:
        """The greeting of the next connection: whatever else is flipped might be data, which nobody can know."""
        self.proxy.unplug()
        self._until_lost()
        self.proxy.go_on()
        self.proxy.corrupt(BACK, self.rng.randrange(16))

    def limit(self) -> None:
        self.proxy.limit(self.rng.choice((200_000, MIB, 4 * MIB)))  # up to the next one that takes it back

    def stop(self) -> None:
        os.kill(self.pair.far.pid, signal.SIGSTOP)
        try:
            self._until_lost()
        finally:
            os.kill(self.pair.far.pid, signal.SIGCONT)

    def kill_secondary(self) -> None:
        far = self.pair.far
        far.signal(signal.SIGKILL)
        at_random(self.rng, self.rng.choice((0, 0.3)))
        remove_dead_mount(far)
        far.mount()

    def kill_primary(self) -> None:
        near = self.pair.near
        near.signal(signal.SIGKILL)
        self.crowd.ended()
        remove_dead_mount(near)
        self.proxy.go_on()  # who is greeted with nonsense when it is mounted does not go on
        replfs("primary", near.disk, near.point, *near.arguments)  # which may say that there is no secondary
        near.pid = near.status()["pid"]
        self._start()


@pytest.mark.parametrize(
    ("disk_format", "protocol", "first"), [("raw", "async", 0), ("qcow2", "sync", 3), ("raw", "sync", 6), ("qcow2", "async", 9)]
)
def test_a_link_in_a_storm(
    sides: Sides, pair: Pair, full: bool, tally: Callable[[str, int], None], disk_format: str, protocol: str, first: int
) -> None:
    """``first``: the disturbance to begin with, so that the short form has them all."""
    storm = Storm(sides, pair, disk_format, protocol)
    count, at_once = (50, 5) if full else (3, 3)
    kinds = list(islice(cycle(Storm.KINDS), first, first + count))
    if full:
        storm.rng.shuffle(kinds)
    for at in range(0, count, at_once):
        storm.round(*kinds[at : at + at_once])
    tally("link", count)


def test_after_a_pull_only_what_has_changed_is_sent(sides: Sides, pair: Pair, full: bool) -> None:
    size, seconds = 128 * MIB, 60 if full else 2
    content = random.Random(1).randbytes(MIB) * (size // MIB)
    pair.secondary(content)
    pair.primary(content, "--initial-sync", "none")
    pair.agree()
    assert pair.sent == 0
    with busy(pair, sides.folder, size // 3, random.Random(1)) as crowd:
        crowd.write_through(pair.near.file, "direct", "buffered")
        crowd.until_busy(20)
        pulled = time.monotonic_ns()
        pair.proxy.unplug()
        pair.until("connecting")
        alone, before = time.monotonic_ns(), pair.sent
        end = time.monotonic() + seconds
        wait_for(lambda: time.monotonic() >= end, "the end of the pull")
        seen, lacking = time.monotonic_ns(), pair.link["out-of-sync"]
        assert pair.sent == before
        plugged = time.monotonic_ns()
        pair.proxy.go_on()
        pair.hurry_until("connected")
        crowd.until_busy(20)
        crowd.kill()
        pair.agree()
        writes = Writes(crowd.disk)
    certain = Writes([])
    certain.all = [change for change in writes.all if change.begun > alone and change.acknowledged < seen]
    assert lacking >= len(blocks(certain, 0)) * BLOCK
    resent = len(blocks(writes, pulled - 3_000_000_000, plugged)) * BLOCK
    assert resent < size // 2, "the test would show nothing"
    since = sum(change.count * SECTOR for change in writes.all if change.acknowledged >= plugged)
    assert pair.sent - before <= resent + since + 2 * BLOCK
    assert "identical" in qemu_img("compare", "-U", "-f", "raw", "-F", "raw", pair.near.disk, pair.far.disk)


@pytest.mark.parametrize("protocol", ["async", "sync"])
def test_a_secondary_that_hangs_costs_a_writer_one_time_out(sides: Sides, pair: Pair, protocol: str) -> None:
    content = os.urandom(SIZE)
    pair.secondary(content)
    pair.primary(content, "--protocol", protocol, "--window", "1M", "--initial-sync", "none")
    pair.agree()
    with busy(pair, sides.folder, SIZE, random.Random(1)) as crowd, probing(pair.near) as prober:
        crowd.write_through(pair.near.file, "direct", "direct")
        crowd.until_busy()
        prober.next(10, 5)
        for _ in range(2):
            os.kill(pair.far.pid, signal.SIGSTOP)
            try:
                times: list[float] = []
                while not any(time > 0.5 for time in times):
                    times += prober.take(1, 5)
                accepted = pair.proxy.accepted
                while pair.proxy.accepted < accepted + 2:  # it was tried again, which takes the time-out each time
                    times += prober.take(1, 5)
            finally:
                os.kill(pair.far.pid, signal.SIGCONT)
            assert max(times) < 1 + 1
            assert sum(time > 0.5 for time in times) == 1
            pair.hurry_until("connected")
        crowd.kill()
    pair.equal()


def test_with_protocol_sync_what_was_answered_is_there(sides: Sides, pair: Pair, full: bool) -> None:
    content = tagged(0, SIZE // SECTOR, 0)
    pair.secondary(content)
    pair.primary(content, "--protocol", "sync", "--initial-sync", "none")
    pair.agree()
    rng, expected = random.Random(1), Expected(content)
    for _ in range(20 if full else 2):
        with busy(pair, sides.folder, SIZE, rng) as crowd:
            crowd.write_through(pair.near.file, "direct", "direct", "buffered")
            crowd.until_busy(10)
            at_random(rng, 0.2)
            before = time.monotonic_ns()
            pair.proxy.unplug()
            wait_for(lambda: not pair.far.status()["connections"], "the end of the link there")
            far = Nbd(str(sides.socket))  # what is staged reaches the file some milliseconds after it was answered
            content = far.content()
            far.close()
            expected.settle_disk(content, Writes(crowd.disk), before)
            assert same(pair.far.disk.read_bytes(), content)
            crowd.kill()
        pair.proxy.go_on()
        pair.hurry_until("connected")
        expected.disk = pair.equal()


def test_with_protocol_sync_an_fsync_is_the_secondarys_too(pair: Pair) -> None:
    pair.secondary(SIZE)
    pair.primary(SIZE, "--protocol", "sync")
    pair.agree()
    rng = random.Random(1)
    fd = os.open(pair.near.file, os.O_WRONLY)
    try:
        for _ in range(20):
            for _ in range(3):
                os.pwrite(fd, rng.randbytes(5000), rng.randrange(SIZE - 5000))
            assert pair.link["out-of-sync"]
            os.fsync(fd)
            assert not pair.link["out-of-sync"]
    finally:
        os.close(fd)


COUNT = """
import os, sys
fd, log = os.open(sys.argv[1], os.O_WRONLY), os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT, 0o600)
number = 0
while True:
    number += 1
    os.pwrite(fd, number.to_bytes(8, "little") * 64, number * {stride} % {places} * 4096)
    os.pwrite(log, number.to_bytes(8, "little"), 0)
"""


@pytest.mark.parametrize("protocol", ["async", "sync"])
def test_a_coordinated_checkpoint_is_a_moment_of_the_primary(tmp_path: Path, pair: Pair, full: bool, protocol: str) -> None:
    """One writer, one write after the other: whichever is in the view, all before it are."""
    places, stride = 2048, 997
    pair.secondary(places * 4096)
    pair.primary(places * 4096, "--protocol", protocol)
    pair.agree()
    log = tmp_path / "count"
    program = COUNT.format(stride=stride, places=places)
    writer = subprocess.Popen([sys.executable, "-c", program, pair.near.file, log])
    try:
        wait_for(lambda: log.exists() and log.read_bytes(), "a write")
        held, last = [0] * places, 0
        for _ in range(100 if full else 6):
            answered = int.from_bytes(log.read_bytes(), "little")
            replfs("checkpoint", pair.near.point)
            view = pair.far.content()
            seen = [int.from_bytes(view[at : at + 8], "little") for at in range(0, len(view), 4096)]
            assert max(seen) >= answered
            for number in range(last + 1, max(seen) + 1):
                held[number * stride % places] = number
            assert seen == held
            last = max(seen)
        assert last > 100
    finally:
        writer.kill()
        writer.wait(SECONDS)
    pair.equal()
