"""Storms of SIGKILLs: whichever side is killed, and whenever, nothing that was acknowledged is lost.

Owns the rounds. In each of them processes write to both ports of a secondary, or to a pair, often with checkpoints or a failover
beside them; at a random instant a daemon is killed, perhaps again and again while it resumes; then it is mounted, which is all that
a user does, and every sector of its view and its disk is compared with what the logs of the writers allow (see storm.py).
"""

import random
import signal
import time
from collections.abc import Callable
from itertools import cycle, islice

import pytest
from disks import same
from harness import LINK_LOST, SECONDS, Side, Sides, replfs, wait_for
from storm import SECTOR, Crowd, Expected, Secondary, Writes, at_random, in_foreground, is_mounted, make_disk

SIZE = (16 << 20) + 5 * SECTOR  # four windows of a commit, and a piece
REFUSED = (1,)  # EPERM: a forwarded write that came after a failover

pytestmark = pytest.mark.timeout(1200)  # at full length; each wait has a bound of its own


def remove_dead_mount(side: Side) -> None:
    if is_mounted(side.point):
        replfs("umount", side.point)


def kill_while_it_resumes(side: Side, rng: random.Random) -> None:
    """Somewhere between its start and shortly after the file can be used."""
    process = in_foreground(side)
    try:
        if rng.random() < 0.3:
            at_random(rng, 0.6)
        else:
            wait_for(lambda: is_mounted(side.point) or process.poll() is not None, "the mount")
            at_random(rng, 0.1)
    finally:
        process.kill()
        said, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == -signal.SIGKILL, said
    remove_dead_mount(side)


class Storm:
    """The rounds of a secondary."""

    def __init__(self, sides: Sides, disk_format: str, durability: str, seed: str) -> None:
        self.rng = random.Random(seed)
        self.secondary = Secondary(sides, disk_format, SIZE, "--durability", durability)
        self.side = self.secondary.side
        self.side.mount()
        self.kills = 0

    def round(self, aim: str) -> None:
        with self.secondary.writers(self.rng) as crowd:
            self.secondary.reach(crowd, aim, self.rng)
            self.side.signal(signal.SIGKILL)
            self.kills += 1
            crowd.ended(expected=REFUSED)
            self.secondary.look_at_images()
            remove_dead_mount(self.side)
            for _ in range(self.rng.choice((1, 1, 2, 3)) if aim == "resume" else self.rng.random() < 0.1):
                kill_while_it_resumes(self.side, self.rng)
                self.kills += 1
            self.side.mount()
            self.secondary.settle(crowd)


AIMS = ["failover", "checkpoint", "done", "resume", "writes", "checkpoint"]


@pytest.mark.parametrize(
    ("disk_format", "durability", "first"),
    [("raw", "power", 0), ("qcow2", "power", 3), ("raw", "process", 1), ("qcow2", "process", 5)],
)
def test_a_secondary_in_a_storm(
    sides: Sides, full: bool, tally: Callable[[str, int], None], disk_format: str, durability: str, first: int
) -> None:
    """``first``: the aim to begin with, so that the short form has them all."""
    storm = Storm(sides, disk_format, durability, f"{disk_format} {durability}")
    for aim in islice(cycle(AIMS), first, first + (50 if full else 2)):
        storm.round(aim)
    tally("kill", storm.kills)


class PairStorm:
    """The rounds of a pair: the machine writes to the primary, and the secondary's to its own file; both daemons are killed."""

    def __init__(self, sides: Sides, disk_format: str) -> None:
        self.rng = random.Random(disk_format)
        self.folder = sides.folder
        self.secondary = Secondary(sides, disk_format, SIZE)
        self.expected = Expected(self.secondary.expected.disk)
        disk = make_disk(sides.folder / f"primary.{disk_format}", self.expected.disk, disk_format)
        target = f"nbd+unix:///disk?socket={sides.socket}"
        self.primary = sides.make(
            "primary", disk, "--target", target, "--format", disk_format, "--protocol", "sync", "--initial-sync", "none"
        )
        self.primary.expected = LINK_LOST
        self.secondary.side.mount()
        self.primary.mount()
        self.primary.until_connected()
        self.kills = 0

    def round(self, first: Side, second: Side) -> None:
        with Crowd(self.folder, SIZE, self.rng) as crowd:
            crowd.write_through(self.primary.file, "direct", self.rng.choice(("buffered", "sync")))
            crowd.write_view(self.secondary.side.file, "direct")
            crowd.until_busy()
            crowd.take_checkpoints(self.secondary.side.file, self.rng.choice((0, 1, 1000)))
            at_random(self.rng, 0.3)
            cut = time.monotonic_ns()
            first.signal(signal.SIGKILL)
            at_random(self.rng, self.rng.choice((0, 0.1)))
            second.signal(signal.SIGKILL)
            crowd.ended()
            self._mount(self.secondary.side)
            assert self.secondary.settle(crowd, cut) == "running"
            self._mount(self.primary)
            self.expected.settle_disk(self.primary.content(), Writes(crowd.disk))
        self._agree()

    def _mount(self, side: Side) -> None:
        remove_dead_mount(side)
        if self.rng.random() < 0.3:
            kill_while_it_resumes(side, self.rng)
            self.kills += 1
        side.mount()
        self.kills += 1

    def _agree(self) -> None:
        """The secondary gets what it lacks, and then it takes a checkpoint of that."""
        self.primary.until_connected()
        replfs("checkpoint", self.primary.point)
        assert same(self.primary.content(), self.expected.disk)
        assert same(self.secondary.side.content(), self.expected.disk)
        assert self.secondary.disk_content() == self.expected.disk
        self.secondary.expected.view = self.secondary.expected.disk = self.expected.disk
        self.secondary.generation += 1


@pytest.mark.parametrize("disk_format", ["raw", "qcow2"])
def test_a_pair_in_a_storm(sides: Sides, full: bool, tally: Callable[[str, int], None], disk_format: str) -> None:
    storm = PairStorm(sides, disk_format)
    orders = [(storm.primary, storm.secondary.side), (storm.secondary.side, storm.primary)]
    for first, second in islice(cycle(orders), 20) if full else [orders[disk_format == "raw"]]:
        storm.round(first, second)
    tally("kill", storm.kills)
