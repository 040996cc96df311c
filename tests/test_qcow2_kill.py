"""A writer of a qcow2 image is killed: at worst clusters have leaked, and what was acknowledged is there.

A sequence of requests runs once for each call in it that changes a file, and dies at that call: nothing after it happens. A process
that dies loses what it has in memory and nothing else, so the files are looked at as they are. The same sequence shows what becomes
of an image when such a call fails and the process goes on.
"""

import errno
import functools
import os
import random
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import trio
from harness import SECONDS, run

from replfs.block.file import File
from replfs.block.node import Node
from replfs.block.qcow2.image import Image
from replfs.block.qcow2.journaling import use_journal
from replfs.block.storage import Storage
from replfs.volume.disk import open_disk

SECTOR = 512
PAGE = 4096
AT_MOST = 100  # kills of one sequence


class Step(NamedTuple):
    """One request. ``seed`` tells the bytes of a write."""

    name: str
    offset: int
    length: int
    seed: int = 0

    def data(self) -> bytes:
        return random.Random(self.seed).randbytes(self.length) if self.name == "write" else bytes(self.length)

    async def perform(self, node: Node) -> None:
        match self.name:
            case "write":
                await node.write(self.offset, self.data())
            case "zeroes":
                await node.write_zeroes(self.offset, self.length)
            case "keep":
                await node.write_zeroes(self.offset, self.length, False)
            case "discard":
                await node.discard(self.offset, self.length)
            case "flush":
                await node.flush()


class Disk:
    """What a disk holds: the requests that were acknowledged, and those under way, which may have been done in part."""

    def __init__(self, content: bytes, journaled: bool = False) -> None:
        self.journaled = journaled
        self.content = bytearray(content)
        self.under_way: list[Step] = []

    def acknowledge(self, step: Step, now: bytes | None = None) -> None:
        """``now`` is what was read there afterwards: discarded sectors are zeroes or as before."""
        old = self.content[step.offset : step.offset + step.length]
        new = step.data()
        if step.name == "discard":
            assert now is not None
            for border in range(-(step.offset % SECTOR), step.length, SECTOR):
                part = slice(max(border, 0), border + SECTOR)
                if now[part] not in (old[part], new[part]):
                    raise AssertionError(f"{step} left something else at {part.start}: {now[part][:16]!r}")
            new = now
        self.content[step.offset : step.offset + step.length] = new
        self.under_way.remove(step)

    def settle(self, got: bytes) -> None:
        """The requests that were under way are no more, whatever they have done: this is what the disk holds now."""
        self.assert_is(got)
        self.content[:] = got
        self.under_way.clear()

    def assert_is(self, got: bytes) -> None:
        """Every sector is as acknowledged, or as the request that is under way makes it."""
        if got == self.content:
            return
        assert len(got) == len(self.content)
        new = bytearray(self.content)
        for step in self.under_way:
            new[step.offset : step.offset + step.length] = step.data()
        for at in range(0, len(got), SECTOR):
            sector = slice(at, at + SECTOR)
            if got[sector] not in (self.content[sector], new[sector]):
                old, made = bytes(self.content[sector]), bytes(new[sector])
                raise AssertionError(f"wrong at {at}: {got[sector][:16]!r} instead of {old[:16]!r} or {made[:16]!r}")


class Killed(BaseException):
    """The process is gone."""


class Calls:
    """Counts the calls that change files. From number ``last`` on all of them raise an error, Killed mostly, and change nothing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begin(sys.maxsize)
        for name in ("pwrite", "pwritev", "ftruncate", "truncate", "posix_fallocate", "write", "copy_file_range"):
            monkeypatch.setattr(os, name, self._counted(getattr(os, name)))
        monkeypatch.setattr(File, "_fallocate", self._counted(File._fallocate))

    def begin(self, last: int, torn: bool = False) -> None:
        """``torn``: the write that is killed is done in part, up to the end of a page, as the kernel does it."""
        self.number, self.last, self.torn = 0, last, torn
        self.error: BaseException = Killed()
        self.once = False
        self.counting = False
        self.large: set[int] = set()
        """Writes of more than a page."""

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def counted(fd: int, *arguments: Any) -> Any:
            if not self.counting:
                return call(fd, *arguments)
            first_end = 0
            if call.__name__ == "pwrite":
                data, offset = memoryview(arguments[0]).cast("B"), arguments[1]
                first_end = (offset + len(data) // 2) // PAGE * PAGE - offset
                if first_end > 0:
                    self.large.add(self.number)
            if self.number >= self.last:
                if self.once:
                    self.last = sys.maxsize
                if self.number == self.last and self.torn and first_end > 0:
                    call(fd, data[:first_end], offset)
                self.number += 1
                raise self.error
            self.number += 1
            return call(fd, *arguments)

        return counted


def sequence(cluster: int, size: int) -> list[Step]:
    """Allocates, writes in place, in part and over borders, frees, and uses what was freed."""
    half = size // 2 // cluster * cluster
    return [
        Step("write", cluster + 100, 300, 1),
        Step("write", 3 * cluster, 2 * cluster, 2),
        Step("write", 3 * cluster + 50, cluster, 3),
        Step("write", half - 700, 1400, 4),
        Step("flush", 0, 0),
        Step("zeroes", 3 * cluster, cluster),
        Step("write", 3 * cluster + 1000 % cluster, 200, 5),
        Step("keep", 4 * cluster, cluster),
        Step("write", 4 * cluster + 7, 20, 6),
        Step("discard", 0, 2 * cluster),
        Step("write", half + 3 * cluster, 2 * cluster + 10, 7),
        Step("zeroes", half + cluster // 2, 4 * cluster),
        Step("discard", 2 * cluster + 1, 3 * cluster),
        Step("flush", 0, 0),
        Step("write", 0, 5 * cluster, 8),
        Step("write", size - 700, 700, 9),
    ]


class Kind(NamedTuple):
    commands: list[str]
    steps: list[Step]
    snapshot: bool = False


CREATE = "qemu-img create -q -f qcow2"
FILL = 'qemu-io -f qcow2 -c "write -P 1 0 20k" -c "write -P 2 120k 30k" image.qcow2'
GROWING = [Step("write", 2_000_000 + number * 20_000, 20_000, number) for number in range(4)]
KINDS = {
    "64k": Kind([f"{CREATE} image.qcow2 1M", FILL], sequence(65536, 1 << 20)),
    "preallocated": Kind([f"{CREATE} -o cluster_size=4k,preallocation=metadata image.qcow2 256k"], sequence(4096, 256 << 10)),
    "512": Kind([f"{CREATE} -o cluster_size=512 image.qcow2 256k", FILL], sequence(512, 256 << 10)),
    "512, a second refcount block": Kind(
        [f"{CREATE} -o cluster_size=512 image.qcow2 256k", 'qemu-io -f qcow2 -c "write -P 1 0 110k" image.qcow2'],
        [Step("write", 120_000, 20_000, 1), *sequence(512, 256 << 10)],
    ),
    "512, a larger refcount table": Kind(
        [f"{CREATE} -o cluster_size=512,refcount_bits=64 image.qcow2 3M", 'qemu-io -f qcow2 -c "write -P 1 0 1920k" image.qcow2'],
        [*GROWING, Step("discard", 0, 40_000), Step("write", 2_500_000, 30_000, 8)],
    ),
    "extended": Kind([f"{CREATE} -o cluster_size=16k,extended_l2=on image.qcow2 1M", FILL], sequence(16384, 1 << 20)),
    "snapshot": Kind(
        [f"{CREATE} -o cluster_size=4k image.qcow2 3M", FILL, "qemu-img snapshot -c one image.qcow2"], sequence(4096, 3 << 20), True
    ),
    "snapshot in 512": Kind(
        [f"{CREATE} -o cluster_size=512 image.qcow2 256k", FILL, "qemu-img snapshot -c one image.qcow2"],
        sequence(512, 256 << 10),
        True,
    ),
    "compressed": Kind(
        [
            f"{CREATE} -o cluster_size=4k made.qcow2 256k",
            FILL.replace("image", "made"),
            "qemu-img convert -c -O qcow2 -o cluster_size=4k made.qcow2 image.qcow2",
            "rm made.qcow2",
        ],
        sequence(4096, 256 << 10),
    ),
    "backing": Kind(
        [
            "truncate -s 200k base.raw",
            'qemu-io -f raw -c "write -P 3 0 200k" base.raw',
            f"{CREATE} -o cluster_size=4k -b base.raw -F raw image.qcow2 256k",
            FILL,
        ],
        sequence(4096, 256 << 10),
    ),
    "extended over backing": Kind(
        [
            "truncate -s 512k base.raw",
            'qemu-io -f raw -c "write -P 3 0 512k" base.raw',
            f"{CREATE} -o cluster_size=16k,extended_l2=on -b base.raw -F raw image.qcow2",
            FILL,
        ],
        sequence(16384, 512 << 10),
    ),
    "v2": Kind([f"{CREATE} -o compat=0.10,cluster_size=4k image.qcow2 256k", FILL], sequence(4096, 256 << 10)),
    "bitmaps": Kind(
        [f"{CREATE} -o cluster_size=4k image.qcow2 256k", "qemu-img bitmap --add -g 4096 image.qcow2 one", FILL],
        sequence(4096, 256 << 10),
    ),
    "data file": Kind([f"{CREATE} -o cluster_size=4k,data_file=data.raw image.qcow2 256k", FILL], sequence(4096, 256 << 10)),
    "dirty": Kind(
        [
            f"{CREATE} -o cluster_size=4k,lazy_refcounts=on image.qcow2 256k",
            "!" + FILL.replace(" image", " -c abort image"),
        ],
        sequence(4096, 256 << 10),
    ),
}


def make(folder: Path, kind: Kind) -> Path:
    folder.mkdir()
    for command in kind.commands:
        done = run(*shlex.split(command.removeprefix("!")), cwd=folder, check=not command.startswith("!"))
        assert not command.startswith("!") or done.returncode != 0
    return folder / "image.qcow2"


def content_by_qemu(image: Path, *options: str) -> bytes:
    scratch = image.parent.with_suffix(".content")
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", *options, image, scratch, cwd=image.parent)  # where data files are
    return scratch.read_bytes()


def header_bits(image: Path, offset: int) -> int:
    """A field of feature bits; version 2 has none."""
    start = image.read_bytes()[:104]
    return int.from_bytes(start[offset : offset + 8], "big") if start[7] == 3 else 0


INCOMPATIBLE, AUTOCLEAR = 72, 88
DIRTY = BITMAPS = 1


def check(image: Path) -> int:
    """The exit status of qemu-img check: 0 for a sound image, 3 if clusters have leaked, 2 for errors."""
    done = run("qemu-img", "check", "-f", "qcow2", image, check=False, cwd=image.parent)
    check.report = done.stdout + done.stderr  # type: ignore[attr-defined]
    return done.returncode


def assert_no_errors(image: Path, leaks: bool = True) -> None:
    status = check(image)
    assert status in ((0, 3) if leaks else (0,)), check.report  # type: ignore[attr-defined]


async def opened(image: Path, disk: Disk) -> Image:
    """The image, with what its journal has, if it has one."""
    node = open_disk(image, "qcow2")
    assert isinstance(node, Image)
    await use_journal(Storage(), node, str(image.with_name("journal")), keep=disk.journaled)
    return node


async def perform(image: Path, steps: list[Step], disk: Disk, failed: Callable[[], None] | None = None) -> None:
    """``failed`` is called when a request fails, if it may; the others are performed all the same."""
    node = await opened(image, disk)
    for step in steps:
        disk.under_way.append(step)
        try:
            await step.perform(node)
        except OSError:
            if failed is None:
                raise
            failed()
            disk.settle(bytes(await node.read(0, node.size)))
        else:
            disk.acknowledge(step, bytes(await node.read(step.offset, step.length)) if step.name == "discard" else None)
    disk.assert_is(bytes(await node.read(0, node.size)))
    await node.end_journal()
    await node.close()


def abandon(folder: Path) -> None:
    """Close the files of a process that is dead, and with them its locks."""
    for fd in os.listdir("/proc/self/fd"):
        try:
            path = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:  # the one of listdir
            continue
        if path.startswith(f"{folder}/"):
            os.close(int(fd))


def killed(error: BaseException) -> bool:
    return isinstance(error, Killed) or (isinstance(error, BaseExceptionGroup) and all(map(killed, error.exceptions)))


def perform_and_die(
    folder: Path, disk: Disk, calls: Calls, last: int, torn: bool = False, *, perform: Callable[..., Any] = perform, what: Any
) -> None:
    calls.begin(last, torn)
    calls.counting = True
    try:
        trio.run(perform, folder / "image.qcow2", what, disk)
    except BaseException as error:
        if not killed(error):
            raise
    finally:
        calls.counting = False
        abandon(folder)


async def use_again(image: Path, disk: Disk) -> None:
    """It holds what it should, and is written in use and unused places alike."""
    node = await opened(image, disk)
    disk.settle(bytes(await node.read(0, node.size)))
    for step in (Step("write", 5000, 9000, 20), Step("write", node.size - 30_000, 20_001, 21), Step("zeroes", 20_000, 9000)):
        disk.under_way.append(step)
        await step.perform(node)
        disk.acknowledge(step)
    disk.assert_is(bytes(await node.read(0, node.size)))
    await node.end_journal()
    await node.close()


def sample(numbers: list[int], most: int = AT_MOST) -> list[int]:
    every = -(-len(numbers) // most) or 1
    return numbers[::every]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    return Calls(monkeypatch)


@pytest.mark.parametrize("journaled", [False, True], ids=["immediate", "journaled"])
@pytest.mark.parametrize("name", KINDS)
def test_killed_at_every_change(tmp_path: Path, calls: Calls, name: str, journaled: bool) -> None:
    kind = KINDS[name]
    made = make(tmp_path / "made", kind)
    before = content_by_qemu(made)
    snapshot = content_by_qemu(made, "-l", "one") if kind.snapshot else b""
    folder = tmp_path / "case"
    shutil.copytree(made.parent, folder)
    disk = Disk(before, journaled)
    perform_and_die(folder, disk, calls, sys.maxsize, what=kind.steps)
    assert not disk.under_way
    assert_no_errors(folder / "image.qcow2", leaks=name == "bitmaps")
    assert_same(content_by_qemu(folder / "image.qcow2"), bytes(disk.content))
    count, large = calls.number, calls.large
    assert count > len(kind.steps), "most of the calls that change files are not seen"
    cases = [(last, False) for last in sample(list(range(count)))] + [(last, True) for last in sample(sorted(large))]
    for last, torn in cases:
        shutil.rmtree(folder)
        shutil.copytree(made.parent, folder)
        disk = Disk(before, journaled)
        perform_and_die(folder, disk, calls, last, torn, what=kind.steps)
        try:
            examine(folder / "image.qcow2", kind, disk, before, snapshot if last % 5 == 0 else b"")
        except BaseException as error:
            error.add_note(f"killed at change {last} of {count}{', which was torn' if torn else ''}: {disk.under_way}")
            raise


FULL = (
    "64k",
    "512, a second refcount block",
    "512, a larger refcount table",
    "extended over backing",
    "snapshot in 512",
)


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "for a request"])
@pytest.mark.parametrize("name", FULL)
def test_no_room_at_every_change(tmp_path: Path, calls: Calls, name: str, lasting: bool) -> None:
    """Whether one call fails, or all until the request has failed, so that nothing can be taken back: the next ones go on."""
    kind = KINDS[name]
    made = make(tmp_path / "made", kind)
    before = content_by_qemu(made)
    snapshot = content_by_qemu(made, "-l", "one") if kind.snapshot else b""
    folder = tmp_path / "case"
    shutil.copytree(made.parent, folder)
    perform_and_die(folder, Disk(before), calls, sys.maxsize, what=kind.steps)

    def goes_on() -> None:
        calls.last = sys.maxsize

    for last in sample(list(range(calls.number)), 30):
        shutil.rmtree(folder)
        shutil.copytree(made.parent, folder)
        disk = Disk(before)
        calls.begin(last)
        calls.error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        calls.counting, calls.once = True, not lasting
        try:
            trio.run(perform, folder / "image.qcow2", kind.steps, disk, goes_on)
            calls.counting = False
            examine(folder / "image.qcow2", kind, disk, before, snapshot if last % 5 == 0 else b"")
        except BaseException as error:
            error.add_note(f"failed at change {last}: {disk.under_way}")
            raise
        finally:
            calls.counting = False
            abandon(folder)


def examine(image: Path, kind: Kind, disk: Disk, before: bytes, snapshot: bytes) -> None:
    """What a killed writer leaves is sound, before and after it is used again."""
    dirty = header_bits(image, INCOMPATIBLE) & DIRTY
    if not dirty:
        assert_no_errors(image)
    if snapshot:
        if not disk.journaled:
            disk.assert_is(content_by_qemu(image))
        assert_same(content_by_qemu(image, "-l", "one"), snapshot)
    if header_bits(image, AUTOCLEAR) & BITMAPS:
        assert content_by_qemu(image) == before, "its bitmaps are said to be right, and do not know of a change"
    trio.run(use_again, image, disk)
    assert not header_bits(image, INCOMPATIBLE) & DIRTY
    assert_no_errors(image, leaks=not dirty)
    if snapshot:
        assert_same(content_by_qemu(image), bytes(disk.content))
        assert_same(content_by_qemu(image, "-l", "one"), snapshot)


def assert_same(got: bytes, expected: bytes) -> None:
    Disk(expected).assert_is(got)


def random_steps(
    seed: int, start: int, stop: int, kinds: Sequence[str] = ("write", "write", "write", "zeroes", "keep")
) -> Iterator[Step]:
    choose = random.Random(seed)
    while True:
        offset = choose.randrange(start, stop)
        length = min(choose.choice((1, 300, 512, 4096, 10_000, 70_000)), stop - offset)
        yield Step(choose.choice(kinds), offset, length, choose.getrandbits(32))


async def perform_side_by_side(image: Path, seed: int, disk: Disk) -> None:
    """Three that write, each to sectors of its own, but not to clusters of its own."""
    node = await opened(image, disk)
    third = node.size // 3 // SECTOR * SECTOR

    async def perform_some(number: int) -> None:
        for _, step in zip(range(25), random_steps(seed * 3 + number, number * third, (number + 1) * third, MIXED), strict=False):
            disk.under_way.append(step)
            await step.perform(node)
            disk.acknowledge(step, bytes(await node.read(step.offset, step.length)) if step.name == "discard" else None)

    async with trio.open_nursery() as nursery:
        for number in range(3):
            nursery.start_soon(perform_some, number)
    disk.assert_is(bytes(await node.read(0, node.size)))
    await node.end_journal()
    await node.close()


MIXED = ("write", "write", "zeroes", "keep", "discard", "discard")


@pytest.mark.parametrize("name", ["512", "snapshot", "extended over backing", "compressed"])
def test_killed_amid_requests_side_by_side(tmp_path: Path, calls: Calls, name: str) -> None:
    kind = KINDS[name]
    made = make(tmp_path / "made", kind)
    before = content_by_qemu(made)
    folder = tmp_path / "case"
    ended = 0
    for seed in range(40):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(made.parent, folder)
        disk = Disk(before)
        perform_and_die(folder, disk, calls, random.Random(seed).randrange(150), perform=perform_side_by_side, what=seed)
        ended += not disk.under_way
        try:
            examine(folder / "image.qcow2", kind, disk, before, b"")
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
    assert ended < 20, "most were not killed"


# A real process


def write_for_ever(image: str, seed: int) -> None:
    """What the process does that is killed: a byte on standard output acknowledges each request."""

    async def write() -> None:
        node = open_disk(Path(image), "qcow2")
        for step in random_steps(seed, 0, node.size):
            await step.perform(node)
            os.write(1, b".")

    trio.run(write)


CHILD = "import sys, test_qcow2_kill as test; test.write_for_ever(sys.argv[1], int(sys.argv[2]))"


@pytest.mark.parametrize(("name", "seed"), [("512", 1), ("64k", 2), ("snapshot in 512", 3), ("extended over backing", 4)])
def test_a_process_that_is_killed_loses_nothing_it_acknowledged(tmp_path: Path, name: str, seed: int) -> None:
    kind = KINDS[name]
    image = make(tmp_path / "case", kind)
    disk = Disk(content_by_qemu(image))
    snapshot = content_by_qemu(image, "-l", "one") if kind.snapshot else b""
    wanted = random.Random(seed).randrange(5, 200)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", CHILD, str(image), str(seed)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        acknowledged = process.stdout.read(wanted)
        process.kill()
        acknowledged += process.stdout.read()
        report = process.stderr.read().decode()
        process.wait(SECONDS)
    assert len(acknowledged) >= wanted, report
    steps = random_steps(seed, 0, len(disk.content))
    for _ in acknowledged:
        disk.under_way.append(next(steps))
        disk.acknowledge(disk.under_way[0])
    disk.under_way.append(next(steps))
    disk.assert_is(content_by_qemu(image))
    examine(image, kind, disk, b"", snapshot)
