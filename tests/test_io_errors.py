"""Every operation on the host's files fails in turn, and there is room for less and less: the volume never says what is not so.

Requests fail or do what they say; the view and the disk are what was acknowledged; the stage and the generation are what is in
force. When the fault is gone all goes on, but for what a sync that failed may have lost: nothing that depends on it is called
durable. Then the volume is mounted again, without faults, and must say the same.
"""

import errno
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from crash import Case, Driver, Model, explore
from faults import ALWAYS, Fault, FaultyStorage, Log
from test_power_cut import BOTH, SIZE, case_on, content, root

from replfs.block.replication.rules import Mode, Operation, Stage
from replfs.errors import ReplfsError

__all__ = ["root"]  # a fixture

COUNTED = {"read": "read", "write": "write", "durable": "write", "truncate": "write", "reserve": "write", "sync": "sync"}
"""What the status calls a failure, by the kind of operation."""


class Outcomes:
    """Requests that may fail."""

    def __init__(self) -> None:
        self.failed: list[str] = []

    async def attempt(self, request: Awaitable[None]) -> bool:
        try:
            await request
        except (OSError, ReplfsError) as error:
            self.failed.append(f"{error}")
            return False
        return True


def ports(driver: Driver) -> tuple[str, ...]:
    if driver.setup.mode is Mode.PRIMARY or driver.volume.state.stage is not Stage.RUNNING:
        return ("view",)
    return BOTH


async def requests(driver: Driver, outcomes: Outcomes, seed: int, count: int) -> None:
    """Whichever of them fail."""
    chance = random.Random(seed)
    places = [chance.randrange(SIZE - 70_000) for _ in range(5)]
    for _ in range(count):
        port = chance.choice(ports(driver))
        offset, length = chance.choice(places), chance.choice((512, 3000, 4096, 20_000, 66_000))
        what = chance.random()
        if what < 0.7:
            await outcomes.attempt(driver.write(port, offset, length))
        elif what < 0.85:
            await outcomes.attempt(driver.zeroes(port, offset, length, chance.random() < 0.5))
        else:
            await outcomes.attempt(driver.flush(port))


async def replicate(driver: Driver, outcomes: Outcomes) -> None:
    await requests(driver, outcomes, 1, 8)
    if driver.setup.mode is Mode.SECONDARY:
        await outcomes.attempt(driver.checkpoint())
        await requests(driver, outcomes, 2, 5)
        await outcomes.attempt(driver.flush("disk"))
    await outcomes.attempt(driver.flush("view"))


async def fail_over(driver: Driver, outcomes: Outcomes) -> None:
    await requests(driver, outcomes, 3, 8)
    if await outcomes.attempt(driver.control(Operation.FAILOVER)) or driver.volume.state.stage is Stage.FAILOVER:
        await requests(driver, outcomes, 4, 3)
        await driver.until_done()


async def stop(driver: Driver, outcomes: Outcomes) -> None:
    await requests(driver, outcomes, 5, 8)
    await outcomes.attempt(driver.control(Operation.STOP))
    await requests(driver, outcomes, 6, 3)


Use = Callable[[Driver, Outcomes], Awaitable[None]]
USES: list[tuple[str, Mode, Use]] = [
    ("raw", Mode.SECONDARY, replicate),
    ("qcow2 over a backing file", Mode.SECONDARY, replicate),
    ("raw", Mode.SECONDARY, fail_over),
    ("qcow2 4k", Mode.SECONDARY, fail_over),
    ("raw", Mode.SECONDARY, stop),
    ("raw", Mode.PRIMARY, replicate),
    ("qcow2 over a backing file", Mode.PRIMARY, replicate),
]
on_each = pytest.mark.parametrize(("disk", "mode", "use"), USES, ids=[f"{mode} {use.__name__} {disk}" for disk, mode, use in USES])


@asynccontextmanager
async def fresh(case: Case) -> AsyncIterator[tuple[Driver, FaultyStorage]]:
    """The files as they were at first, and a driver; what was done is undone at the end."""
    keep = case.scratch.numbers()
    case.scratch.put(case.start)
    log = Log()
    storage = case.scratch.storage(log)
    try:
        yield Driver(case.setup, storage, Model(content(), (Stage.NONE, 0))), storage
    finally:
        storage.abandon()
        case.scratch.changed_by(log)
        case.scratch.forget(keep)


async def live(
    driver: Driver, use: Use, storage: FaultyStorage, spoil: Callable[[], None], repair: Callable[[], None], again: bool = True
) -> Outcomes:
    """Use a volume while something is wrong, and then, when it is not. Raises AssertionError if it says what is not so.

    ``again``: mount it once more at the end.
    """
    outcomes = Outcomes()
    spoil()
    for _ in range(3):  # it may be that it cannot be mounted at once
        try:
            async with driver.mounted():
                await use(driver, outcomes)
                repair()
                await driver.check()
                await go_on(driver, storage)
        except (ReplfsError, OSError) as error:
            outcomes.failed.append(f"{error}")
            if "stable storage" in str(error):
                break
        else:
            break
        finally:
            repair()
    if again:
        async with driver.mounted():
            if driver.volume.state.stage is Stage.FAILOVER:
                await driver.until_done()
            await driver.check()
            await go_on(driver, storage)
    return outcomes


def sync_failed(storage: FaultyStorage) -> bool:
    return any(kind in ("sync", "directory") for fault in storage.faults for kind, _ in fault.hit)


async def go_on(driver: Driver, storage: FaultyStorage) -> None:
    """Nothing is wrong any more: only what a failed sync may have lost is not flushed."""
    outcomes = Outcomes()
    for port in ports(driver):
        await driver.write(port, 1000, 5000)
        await outcomes.attempt(driver.flush(port))
    if driver.setup.mode is Mode.SECONDARY and driver.volume.state.stage is Stage.RUNNING:
        await outcomes.attempt(driver.checkpoint())
    elif driver.volume.state.stage is Stage.FAILOVER_FAILED and await outcomes.attempt(driver.control(Operation.FAILOVER)):
        await driver.until_done()
        assert driver.volume.state.stage is Stage.DONE or sync_failed(storage)
    await driver.check()
    assert not outcomes.failed or sync_failed(storage), outcomes.failed


def assert_counted(storage: FaultyStorage, fault: Fault) -> None:
    counts = storage.errors.counts()
    for kind, path in fault.hit:
        if kind in COUNTED:
            expected = "full" if fault.error == errno.ENOSPC else COUNTED[kind]
            assert counts.get(path, {}).get(expected), f"the failure of a {kind} of {path} is not counted: {counts}"


async def lives_with(case: Case, use: Use, fault: Fault, what: str) -> None:
    """It says what is so, while something fails, and when that is repaired."""
    async with fresh(case) as (driver, storage):
        storage.faults = [fault]

        def repair() -> None:
            fault.times = 0

        try:
            await live(driver, use, storage, lambda: None, repair)
            assert_counted(storage, fault)
        except BaseException as error:
            error.add_note(f"{what}, {fault}: {fault.hit}")
            raise


async def operations(case: Case, use: Use) -> int:
    """How many there are to fail."""
    async with fresh(case) as (driver, storage):
        outcomes = await live(driver, use, storage, lambda: None, lambda: None)
        assert not outcomes.failed
        return sum(storage.operations.values())


def new_case(root: Path, use: Use, disk: str, mode: Mode) -> Case:
    case = case_on(root, use.__name__, disk, mode, start=mode is Mode.SECONDARY)
    return case


@pytest.mark.parametrize("times", [1, 4], ids=["once", "for a while"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC], ids=["EIO", "ENOSPC"])
@on_each
async def test_an_operation_fails(
    root: Path, use: Use, disk: str, mode: Mode, code: int, times: int, full: bool, tally: Callable[[str, int], None]
) -> None:
    case = new_case(root, use, disk, mode)
    count = await operations(case, use)
    tried = range(count) if full else sorted(random.Random(count).sample(range(count), min(count, 13)))
    for number in tried:
        fault = Fault(after=number, times=times, error=code, torn=number % 2 == 0)
        await lives_with(case, use, fault, f"operation {number} of {count}")
    tally("I/O error", len(tried))


@pytest.mark.parametrize(
    "kind",
    [
        "^write",
        "^read$",
        "^sync$",
        "^fallocate$",
        "^(truncate|reserve)$",
        "^(create|open)$",
        "^unlink$",
        "^replace$",
        "^directory$",
    ],
)
@pytest.mark.parametrize("path", [r"/disk\.(raw|qcow2)$", r"/active\.", r"/hidden\.", r"/state\.json|\.replfs$"])
async def test_one_kind_fails_on_one_file_until_it_is_repaired(
    root: Path, kind: str, path: str, tally: Callable[[str, int], None]
) -> None:
    tried = 0
    for disk, mode, use in USES[:4]:
        case = new_case(root / f"{tried}", use, disk, mode)
        for after in (0, 2, 5):
            await lives_with(case, use, Fault(kind, path, after=after, times=ALWAYS), case.name)
            tried += 1
    tally("I/O error", tried)


@on_each
async def test_the_host_has_no_room(
    root: Path, use: Use, disk: str, mode: Mode, full: bool, tally: Callable[[str, int], None]
) -> None:
    """Less and less of it, from the start or from the mount on; and then there is room again."""
    case = new_case(root, use, disk, mode)
    rooms = range(0, 2 << 20, 16 << 10 if full else 160 << 10)
    for room in rooms:
        async with fresh(case) as (driver, storage):

            def spoil(storage: FaultyStorage = storage, room: int = room) -> None:
                storage.limit_room(room)

            def repair(storage: FaultyStorage = storage) -> None:
                storage.room = None

            try:
                outcomes = await live(driver, use, storage, spoil, repair)
                assert not outcomes.failed or any("full" in kinds for kinds in storage.errors.counts().values())
            except BaseException as error:
                error.add_note(f"room for {room} bytes")
                raise
    tally("full disk", len(rooms))


@pytest.mark.parametrize("file", [r"/disk\.(raw|qcow2)$", r"/active\.", r"/hidden\.", r"/state\.json"])
@on_each
async def test_a_sync_fails_and_later_the_power(
    root: Path, use: Use, disk: str, mode: Mode, file: str, full: bool, tally: Callable[[str, int], None]
) -> None:
    """What the sync was to make durable may be lost at any time, whatever a later sync says: no promise is built on it.

    Not by the process that saw it fail; one that comes later cannot know.
    """
    states = 0
    for after in range(6 if full else 2):
        place = root / f"{after}"
        case = new_case(place, use, disk, mode)
        faults = [Fault("^sync$", file, after=after)]
        storages: list[FaultyStorage] = []

        def prepare(storage: FaultyStorage, faults: list[Fault] = faults, storages: list[FaultyStorage] = storages) -> None:
            storage.faults = [] if storages else faults  # none after the restart
            storages.append(storage)

        case.prepare = prepare

        async def scenario(driver: Driver, storages: list[FaultyStorage] = storages) -> None:
            await live(driver, use, storages[0], lambda: None, lambda: None, again=False)

        await case.record(scenario)
        found = await explore(case, 60 if full else 15)
        states += len(found.states)
    tally("power cut", states)


async def test_thousands_of_errors_are_few_lines(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.disable(logging.NOTSET)
    case = new_case(root, replicate, "raw", Mode.SECONDARY)
    async with fresh(case) as (driver, storage):
        outcomes = Outcomes()
        async with driver.mounted():
            storage.faults = [Fault("^write$", times=ALWAYS)]
            for number in range(1500):
                await outcomes.attempt(driver.volume.view.write(number * 10, b"x" * 512))
                await outcomes.attempt(driver.volume.exported.write(number * 10, b"x" * 512))
            storage.faults[0].times = 0
        assert len(outcomes.failed) == 3000
        assert sum(kinds.get("write", 0) for kinds in storage.errors.counts().values()) >= 3000
        assert len(caplog.records) < 20


async def test_the_status_says_which_files_have_failed(root: Path) -> None:
    case = new_case(root, replicate, "raw", Mode.SECONDARY)
    async with fresh(case) as (driver, storage), driver.mounted():
        assert driver.volume.status()["io-errors"] == {}
        storage.faults = [Fault("^write$", r"/disk\.raw$", times=2)]
        for _ in range(3):
            await Outcomes().attempt(driver.write("disk", 0, 512))
        assert driver.volume.status()["io-errors"] == {str(root / "disk.raw"): {"write": 2}}
