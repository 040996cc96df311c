"""The power fails at any moment, and what was promised is there: every scenario on every kind of disk, cut in many places.

A scenario runs once and is recorded. Then the files are made what a power cut may have left, again and again, and the volume is
mounted on them. :mod:`crash` says what is compared. A violation's message ends with what to hand to ``explore`` to see it alone.
"""

import logging
import random
import shlex
import shutil
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import trio
from crash import SECTOR, Case, Driver, Explored, Scratch, Setup, explore, pattern, scratch_directory
from harness import run
from volumes import until_connected

from replfs.block.qcow2.overlay import SUBCLUSTER
from replfs.block.raw import Raw
from replfs.block.replication.rules import Mode, Operation, Stage
from replfs.export.nbd import NbdServer
from replfs.protocol.nbd.uri import UnixAddress

SIZE = (256 << 10) + 3 * SECTOR
WHOLE = (SUBCLUSTER, 4096)
LENGTHS = (512, 512, 700, 2048, 4096, 9000, 20_000, 65_536, 70_001)
DISKS = {
    "raw": [],
    "qcow2 64k": ["qemu-img convert -f raw -O qcow2 content disk"],
    "qcow2 4k": ["qemu-img convert -f raw -O qcow2 -o cluster_size=4k content disk"],
    "qcow2 512": ["qemu-img convert -f raw -O qcow2 -o cluster_size=512,refcount_bits=64 content disk"],
    "qcow2 over a backing file": [
        "qemu-img convert -f raw -O raw content base.raw",
        "qemu-img create -q -f qcow2 -o cluster_size=4k -b base.raw -F raw disk",
    ],
}


def content() -> bytes:
    """Some of it zeroes, in different places."""
    data = bytearray(pattern("before", 0, 0, SIZE))
    for start, stop in ((10_000, 20_000), (60_000, 135_000), (3 << 16, SIZE - 5000)):
        data[start:stop] = bytes(stop - start)
    return bytes(data)


@pytest.fixture
def root() -> Iterator[Path]:
    logging.disable(logging.CRITICAL)  # thousands of volumes say what they do
    found = scratch_directory()
    try:
        yield found
    finally:
        logging.disable(logging.NOTSET)
        shutil.rmtree(found)


def case_on(root: Path, name: str, disk: str, mode: Mode = Mode.SECONDARY, *, start: bool = True) -> Case:
    """A disk of this kind, and nothing else yet."""
    root.mkdir(exist_ok=True)
    file = "disk.qcow2" if DISKS[disk] else "disk.raw"
    (root / "content").write_bytes(content())
    for command in DISKS[disk]:
        run(*shlex.split(command.replace(" disk", f" {file}")), cwd=root)
    if DISKS[disk]:
        (root / "content").unlink()
    else:
        (root / "content").rename(root / file)
    setup = Setup(root, mode, file, "qcow2" if DISKS[disk] else "raw", start)
    return Case(f"{name}, {disk}", setup, Scratch(root), content())


# What is done


async def some(driver: Driver, seed: object, count: int, ports: tuple[str, ...], start: int = 0, stop: int = SIZE) -> None:
    """Requests one after the other, within a part of the disk: writes, again and again to the same places, zeroes, and flushes."""
    chance = random.Random(f"{seed}")
    places = [chance.randrange(start, stop) for _ in range(4)]
    for _ in range(count):
        port = chance.choice(ports)
        offset = chance.choice((chance.choice(places), chance.randrange(start, stop)))
        whole = len(ports) > 1 and chance.random() < 0.4  # subclusters of overlays, which take the shortest way
        if whole or chance.random() < 0.5:
            unit = SUBCLUSTER if whole else SECTOR
            offset = max(offset // unit * unit, start)
        length = min(chance.choice(WHOLE if whole else LENGTHS), stop - offset)
        what = chance.random()
        if what < 0.65:
            await driver.write(port, offset, length)
        elif what < 0.75:
            await driver.zeroes(port, offset, length, chance.random() < 0.5)
        else:
            await driver.flush(port)
        await trio.lowlevel.checkpoint()


BOTH = ("view", "disk")


async def side_by_side(driver: Driver, seed: object, count: int) -> None:
    """Requests of both sides at once, each task in a part of the disk of its own."""
    half = SIZE // 2 // SECTOR * SECTOR + SECTOR  # in the middle of a subcluster
    async with trio.open_nursery() as nursery:
        for number, (port, start, stop) in enumerate((port, *part) for port in BOTH for part in ((0, half), (half, SIZE))):
            nursery.start_soon(some, driver, f"{seed} {number}", count, (port,), start, stop)


async def writes(driver: Driver) -> None:
    async with driver.mounted():
        await some(driver, 1, 25, BOTH)
        await driver.check()


async def writes_side_by_side(driver: Driver) -> None:
    async with driver.mounted():
        await side_by_side(driver, 2, 10)
        await driver.check()


async def staged(driver: Driver) -> None:
    """Forwarded writes that wait for nothing, in bursts, and others over them soon afterwards."""
    chance = random.Random(21)
    async with driver.mounted():
        await driver.write("disk", 0, SECTOR)  # there is a table then
        for i in range(6):
            for _ in range(chance.randrange(1, 5)):
                await driver.write("disk", chance.randrange(20) * SUBCLUSTER, chance.choice((1, 1, 2, 3)) * SUBCLUSTER)
            if i % 2:
                for _ in range(2):
                    await driver.write("disk", (70 + i) * SUBCLUSTER, SUBCLUSTER)  # where nothing was written before
                    await driver.flush("disk")
        await driver.check()


async def checkpoints(driver: Driver) -> None:
    async with driver.mounted():
        for number in range(3):
            await some(driver, f"3 {number}", 7, BOTH)
            await driver.checkpoint()
        await some(driver, 3, 3, BOTH)
        await driver.check()


async def checkpoints_under_load(driver: Driver) -> None:
    async with driver.mounted():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(side_by_side, driver, 4, 10)
            for _ in range(2):
                await trio.lowlevel.checkpoint()
                await driver.checkpoint()
        await driver.check()


async def failover(driver: Driver) -> None:
    async with driver.mounted():
        await some(driver, 5, 12, BOTH)
        await driver.control(Operation.FAILOVER)
        await driver.until_done()
        await some(driver, 6, 8, ("view",))
        await driver.check()


async def failover_under_load(driver: Driver) -> None:
    async with driver.mounted():
        await some(driver, 7, 12, BOTH)
        async with trio.open_nursery() as nursery:
            half = SIZE // 2 // SECTOR * SECTOR + SECTOR
            nursery.start_soon(some, driver, 8, 12, ("view",), 0, half)
            nursery.start_soon(some, driver, 9, 12, ("view",), half, SIZE)
            await trio.lowlevel.checkpoint()
            await driver.control(Operation.FAILOVER)
        await driver.until_done()
        await driver.check()


async def start(driver: Driver) -> None:
    """Not with the mount, but later: what was forwarded before is part of the first view."""
    async with driver.mounted():
        await some(driver, 10, 8, ("disk",))
        await driver.control(Operation.START)
        await some(driver, 11, 8, BOTH)
        await driver.check()


async def resume(driver: Driver) -> None:
    """Closed and mounted again, twice."""
    for number in range(3):
        async with driver.mounted():
            await driver.check()
            await some(driver, f"12 {number}", 7, BOTH)
            if number == 1:
                await driver.checkpoint()
                await some(driver, 13, 3, BOTH)


async def some_staged(driver: Driver, chance: random.Random) -> None:
    """Forwarded writes, one upon the other, that are staged where there is a journal for that; and one that is too large."""
    await driver.write("disk", 0, SECTOR)  # there is a table then
    for _ in range(chance.randrange(1, 5)):
        await driver.write("disk", chance.randrange(100) * SUBCLUSTER, SUBCLUSTER)
    await driver.write("disk", chance.randrange(SIZE - 70_001), 70_001)


async def killed(driver: Driver) -> None:
    """A process that is killed puts nothing on stable storage, and the next one works with what it finds."""
    chance = random.Random(22)
    for number in range(6):

        async def use(number: int = number) -> None:
            await driver.check()
            await some_staged(driver, chance)
            await side_by_side(driver, f"23 {number}", 3)
            await driver.checkpoint()
            await some_staged(driver, chance)

        assert await driver.killed(chance.randrange(30, 150), use)
    async with driver.mounted():
        await driver.check()
        await some(driver, 24, 4, BOTH)


async def killed_as_it_saves(driver: Driver) -> None:
    """The new state is there, and nobody was told of it; it is not durable before the next process can be used."""
    for number in range(3):

        async def use(number: int = number) -> None:
            await driver.check()
            await some(driver, f"29 {number}", 4, BOTH)
            driver.storage.killed_by_replacing = "state.json"
            await driver.checkpoint()

        assert await driver.killed(10_000, use)
    async with driver.mounted():
        await driver.check()


async def killed_in_a_failover(driver: Driver) -> None:
    chance = random.Random(25)

    async def use() -> None:
        await some(driver, 26, 8, BOTH)
        await some_staged(driver, chance)
        await driver.control(Operation.FAILOVER)
        await some(driver, 27, 4, ("view",))
        await driver.until_done()

    async def go_on() -> None:
        await driver.check()
        await some(driver, f"28 {chance.random()}", 4, ("view",))
        if driver.volume.state.stage is Stage.FAILOVER:
            await driver.until_done()

    assert await driver.killed(chance.randrange(200, 300), use)
    for _ in range(2):
        await driver.killed(chance.randrange(5, 50), go_on)
    async with driver.mounted():
        await go_on()


async def killed_as_a_failover_ends(driver: Driver) -> None:
    """As :func:`killed_as_it_saves`, where the new state is that the disk holds the whole view."""

    async def use() -> None:
        await some(driver, 31, 8, BOTH)
        await driver.control(Operation.FAILOVER)
        driver.storage.killed_by_replacing = "state.json"
        await driver.until_done()

    assert await driver.killed(10_000, use)
    async with driver.mounted():
        await driver.check()
        await some(driver, 32, 4, ("view",))


async def stop(driver: Driver) -> None:
    async with driver.mounted():
        await some(driver, 14, 12, BOTH)
        await driver.control(Operation.STOP)
        await some(driver, 15, 8, ("view",))
        await driver.check()


async def primary_alone(driver: Driver) -> None:
    async with driver.mounted():
        await some(driver, 16, 20, ("view",))
    async with driver.mounted():
        async with trio.open_nursery() as nursery:
            for number in range(3):
                third = SIZE // 3 // SECTOR * SECTOR
                nursery.start_soon(some, driver, f"17 {number}", 8, ("view",), number * third, (number + 1) * third)
        await driver.check()


async def primary_killed(driver: Driver) -> None:
    chance = random.Random(29)
    for number in range(5):

        async def use(number: int = number) -> None:
            await driver.check()
            await some(driver, f"30 {number}", 12, ("view",))

        assert await driver.killed(chance.randrange(10, 60), use)
    async with driver.mounted():
        await driver.check()


async def primary_that_forwards(driver: Driver) -> None:
    """To a disk that is outside of the record."""
    with (driver.setup.root / "t.raw").open("wb") as file:
        file.write(content())
    from replfs.block.storage import Storage

    node = Raw(Storage().open(str(driver.setup.root / "t.raw"), writable=True))
    server = NbdServer(node, "disk")
    async with trio.open_nursery() as nursery:
        await server.listen(UnixAddress(str(driver.setup.root / "t.sock")))
        nursery.start_soon(server.serve)
        async with driver.mounted():
            await until_connected(driver.volume)
            await some(driver, 18, 20, ("view",))
            await driver.check()
        nursery.cancel_scope.cancel()
    node.release()


Scenario = Callable[[Driver], Awaitable[None]]
SECONDARY: list[Scenario] = [
    writes,
    writes_side_by_side,
    staged,
    checkpoints,
    checkpoints_under_load,
    failover,
    failover_under_load,
    resume,
    killed,
    killed_as_it_saves,
    killed_in_a_failover,
    killed_as_a_failover_ends,
    stop,
    start,
]
PRIMARY: list[Scenario] = [primary_alone, primary_killed, primary_that_forwards]


async def cut(case: Case, scenario: Scenario, full: bool, tally: Callable[[str, int], None], short: int, long: int) -> Explored:
    await case.record(scenario)
    case.check_images = 8 if full else 40
    found = await explore(case, long if full else short, deep=30)
    tally("power cut", len(found.states))
    return found


@pytest.mark.parametrize("disk", DISKS)
@pytest.mark.parametrize("scenario", SECONDARY, ids=lambda scenario: scenario.__name__)
async def test_a_secondary(root: Path, scenario: Scenario, disk: str, full: bool, tally: Callable[[str, int], None]) -> None:
    case = case_on(root, scenario.__name__, disk, start=scenario is not start)
    await cut(case, scenario, full, tally, 26, 400)


@pytest.mark.parametrize("disk", DISKS)
@pytest.mark.parametrize("scenario", PRIMARY, ids=lambda scenario: scenario.__name__)
async def test_a_primary(root: Path, scenario: Scenario, disk: str, full: bool, tally: Callable[[str, int], None]) -> None:
    case = case_on(root, scenario.__name__, disk, Mode.PRIMARY, start=scenario is primary_that_forwards)
    await cut(case, scenario, full, tally, 26, 400)
