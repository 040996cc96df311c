"""Every kind of image that qemu-img makes: QEMU and replfs write to it by turns, and both read what a bytearray holds."""

import errno
import itertools
import logging
import random
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing
from disks import get, put, qemu_img, same
from hypothesis import given, settings
from hypothesis import strategies as st
from images import KINDS, NAME, filling, info, make, open_options, qemu, qemu_io

from replfs.block.cache import Cache
from replfs.block.file import File
from replfs.block.node import Data, Node
from replfs.block.qcow2.image import Image
from replfs.block.qcow2.journaling import use_journal
from replfs.block.storage import Storage
from replfs.errors import ReplfsError
from replfs.volume.disk import open_disk

SMALL_CACHE = 8 << 10
SNAPSHOTS = [name for name, kind in KINDS.items() if kind.snapshots]
BITMAPS = [name for name in KINDS if name.startswith("bitmap")]
RAW_DATA_FILES = [name for name, kind in KINDS.items() if "data_file_raw" in kind.top.options]

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Make an image in this folder; each kind is made once only, and copied where it does not name its files by absolute paths."""
    made: dict[str, Path] = {}

    def image(name: str, folder: Path) -> Path:
        if KINDS[name].elsewhere:
            folder.mkdir()
            return make(name, folder, KINDS[name].size)
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            make(name, made[name], KINDS[name].size)
        shutil.copytree(made[name], folder)
        return folder / NAME

    return image


class Guest:
    """A disk in use, and beside it the bytes that it has to hold.

    ``journaled``: it is used as with --durability power, once :meth:`use_journal` is called, and a restart is a kill.
    """

    def __init__(
        self, name: str, image: Path, *, cache: int = 32 << 20, content: bytes | None = None, journaled: bool = False
    ) -> None:
        self.journaled = journaled
        self.kind = KINDS[name]
        self.image = image
        self.cache = cache
        self.options = open_options(name, image)
        self.below = below(image)
        self.model = bytearray(filling(name, self.kind.size) if content is None else content)
        self.open()

    def open(self) -> None:
        node = open_disk(self.image, "qcow2", **self.options, cache=Cache(self.cache))
        assert isinstance(node, Image)
        self.node = node
        assert self.node.size == len(self.model)

    async def use_journal(self) -> None:
        if self.journaled:
            await use_journal(Storage(), self.node, str(self.image.with_name("journal")), keep=True)

    async def reopen(self) -> None:
        if self.journaled:
            self.node.release()
        else:
            await self.node.close()
        self.open()
        await self.use_journal()

    async def write(self, offset: int, data: Data) -> None:
        await put(self.node, offset, data)
        self.model[offset : offset + len(data)] = data

    async def write_zeroes(self, offset: int, length: int, may_unmap: bool) -> None:
        await self.node.write_zeroes(offset, length, may_unmap)
        self.model[offset : offset + length] = bytes(length)

    async def discard(self, offset: int, length: int) -> None:
        """Whole clusters read as zeroes, whole subclusters may, and the rest is as before. So is in version 2 all that lies over
        a backing file, for which it has no zero clusters."""
        await self.node.discard(offset, length)
        stop = offset + length
        got = bytes(await self.node.read(offset, length))
        old = bytes(self.model[offset:stop])
        kept = self.kind.below_size if self.kind.version_2 else 0
        unit, cluster = self.kind.subcluster, self.kind.cluster
        for start in range(offset // unit * unit, stop, unit):
            end = min(start + unit, len(self.model))
            now, before = got[max(start - offset, 0) : end - offset], old[max(start - offset, 0) : end - offset]
            if start < max(offset, kept) or stop < end:
                assert same(now, before)
                continue
            first = start // cluster * cluster
            if (offset <= first and first + cluster <= stop) or now != before:
                assert same(now, bytes(len(now)))
        self.model[offset:stop] = got

    async def step(self, random_: random.Random, *, discard: bool = True) -> None:
        """Anything that a guest does, anywhere; sometimes a restart."""
        offset, length = self.anywhere(random_)
        what = random_.choice(["write"] * 5 + ["zeroes", "keep", "discard" if discard else "zeroes", "read", "flush", "reopen"])
        if what == "write":
            data = random_.randbytes(length) if random_.random() < 0.5 else b"data" * (length // 4) + b"data"[: length % 4]
            await self.write(offset, data)
        elif what in ("zeroes", "keep"):
            await self.write_zeroes(offset, length, what == "zeroes")
        elif what == "discard":
            await self.discard(offset, length)
        elif what == "flush":
            await self.node.flush()
        elif what == "reopen":
            await self.reopen()
        start, stop = max(0, offset - self.kind.cluster), min(len(self.model), offset + length + self.kind.cluster)
        assert same(await get(self.node, start, stop - start), self.model[start:stop]), what

    def anywhere(self, random_: random.Random) -> tuple[int, int]:
        """A range of the disk: odd or made of whole clusters or subclusters, short or long, sometimes up to the end."""
        size = len(self.model)
        unit = random_.choice([1, 1, 512, self.kind.subcluster, self.kind.cluster])
        offset = random_.randrange(0, size, unit)
        count = random_.choice([1, random_.randint(1, 9), random_.randint(1, max(1, 3 * self.kind.cluster // unit))])
        length = size - offset if random_.random() < 0.05 else min(count * unit, size - offset)
        return offset, length

    async def check(self) -> None:
        """Close the disk; QEMU finds no fault with the image, and both read what they have to."""
        assert same(await self.node.read(0, len(self.model)), self.model)
        await check_extents(self.node, self.model)
        if self.journaled:
            await self.node.end_journal()
        await self.node.close()
        check_by_qemu(self.image, self.model)
        assert below(self.image) == self.below
        self.open()
        assert same(await self.node.read(0, len(self.model)), self.model)
        await self.node.close()


def below(image: Path) -> list[bytes]:
    """The backing files."""
    return [path.read_bytes() for path in sorted(image.parent.glob("below*"))]


def check_by_qemu(image: Path, content: bytes | bytearray) -> None:
    assert "No errors were found" in qemu(image.parent, "qemu-img", "check", image.name)
    (image.parent / "model").write_bytes(content)
    assert "identical" in qemu(image.parent, "qemu-img", "compare", "-f", "qcow2", "-F", "raw", image.name, "model")


def content_of(image: Path, *options: str) -> bytes:
    """What QEMU reads."""
    qemu(image.parent, "qemu-img", "convert", *options, "-f", "qcow2", "-O", "raw", image.name, "converted")
    content = (image.parent / "converted").read_bytes()
    (image.parent / "converted").unlink()
    return content


def write_by_qemu(image: Path, model: bytearray, random_: random.Random, count: int = 8) -> list[str]:
    """Commands for qemu-io that write data and zeroes anywhere; the model is changed as if they had run."""
    commands = []
    for _ in range(count):
        offset = random_.randrange(len(model))
        length = random_.randint(1, min(150_000, len(model) - offset))
        number = random_.randrange(256)
        how = random_.choice([f"-P {number}"] * 3 + ["-z", "-z -u"])
        commands += ["-c", f"write -q {how} {offset} {length}"]
        model[offset : offset + length] = bytes([number if "-P" in how else 0]) * length
    return commands


async def check_extents(node: Node, model: bytes | bytearray) -> None:
    """They make up the disk, however few are asked for, and what they call zero is."""
    for limit, step in ((1, 1 << 40), (3, 100_000), (1000, 1 << 40)):
        position = 0
        while position < node.size:
            length = min(step, node.size - position)
            extents = await node.extents(position, length, limit)
            assert 1 <= len(extents) <= limit
            assert sum(extent.length for extent in extents) <= length
            for extent in extents:
                assert extent.length > 0
                if extent.zero:
                    assert same(model[position : position + extent.length], bytes(extent.length))
                position += extent.length
        assert position == node.size


@pytest.mark.parametrize("name", KINDS)
async def test_what_qemu_wrote_is_read(templates: Make, tmp_path: Path, name: str) -> None:
    image = templates(name, tmp_path / "image")
    before = {path.name: path.read_bytes() for path in image.parent.iterdir()}
    content = filling(name, KINDS[name].size)
    check_by_qemu(image, content)
    guest = Guest(name, image, cache=SMALL_CACHE)
    assert same(await guest.node.read(0, len(content)), content)
    random_ = random.Random(name)
    for _ in range(30):
        offset, length = guest.anywhere(random_)
        assert same(await get(guest.node, offset, length), content[offset : offset + length])
    for offset in (0, len(content)):
        assert bytes(await guest.node.read(offset, 0)) == b""
    await check_extents(guest.node, content)
    await guest.node.close()
    for path, data in before.items():
        assert same((image.parent / path).read_bytes(), data), path


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.elsewhere])
async def test_files_elsewhere_are_opened_only_if_that_is_allowed(templates: Make, tmp_path: Path, name: str) -> None:
    image = templates(name, tmp_path / "image")
    for allowed in ((), (tmp_path / "image",), (tmp_path / "image.else",)):
        with pytest.raises(ReplfsError) as refused:
            open_disk(image, "qcow2", allow_backing=allowed)
        assert "\n" not in str(refused.value)
        assert str(tmp_path / "image.elsewhere") in str(refused.value)
    [folder] = open_options(name, image)["allow_backing"]
    for allow in (folder, *folder.iterdir()):  # the folder, or just the file
        await open_disk(image, "qcow2", allow_backing=[allow]).close()


async def test_nobody_writes_to_a_backing_image(tmp_path: Path) -> None:
    below, image = tmp_path / "below.qcow2", tmp_path / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", below, "1M")
    qemu_img("create", "-q", "-f", "qcow2", "-b", below, "-F", "qcow2", image)
    before = below.read_bytes()
    node = open_disk(image, "qcow2")
    assert isinstance(node, Image)
    assert node.backing is not None
    for change in (node.backing.write(0, b"x"), node.backing.write_zeroes(0, 512), node.backing.discard(0, 512)):
        with pytest.raises(OSError, match=r"below.qcow2 is only read") as refused:
            await change
        assert refused.value.errno == errno.EROFS
    await node.write(0, b"x")
    await node.close()
    assert below.read_bytes() == before


@pytest.mark.parametrize("name", [name for name in KINDS if name.startswith(("zeroes", "backed", "zlib", "converted", "metadata"))])
async def test_what_qemu_knows_to_be_zero_is_an_extent_of_zeroes(templates: Make, tmp_path: Path, name: str) -> None:
    image = templates(name, tmp_path / "image")
    pattern = r'"start": (\d+), "length": (\d+), "depth": \d+, "present": (?:true|false), "zero": true, "data": false'
    zero = re.findall(pattern, qemu(image.parent, "qemu-img", "map", "--output=json", NAME))
    guest = Guest(name, image)
    for start, length in zero:
        position, end = int(start), int(start) + int(length)
        while position < end:
            extents = await guest.node.extents(position, end - position, 10)
            assert all(extent.zero for extent in extents), (position, extents)
            position += sum(extent.length for extent in extents)
    await guest.node.close()


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", KINDS)
async def test_what_replfs_writes_both_read_and_the_image_is_sound(templates: Make, tmp_path: Path, name: str, seed: int) -> None:
    random_ = random.Random(f"{name} {seed}")
    guest = Guest(name, templates(name, tmp_path / "image"), cache=SMALL_CACHE if seed else 32 << 20, journaled=seed > 0)
    await guest.use_journal()
    for _ in range(25):
        await guest.step(random_)
    await guest.check()


@pytest.mark.parametrize("name", KINDS)
async def test_qemu_and_replfs_write_by_turns(templates: Make, tmp_path: Path, name: str) -> None:
    random_ = random.Random(f"turns {name}")
    image = templates(name, tmp_path / "image")
    guest = Guest(name, image)
    for _ in range(2):
        for _ in range(8):
            await guest.step(random_)
        await guest.node.close()
        commands = write_by_qemu(image, guest.model, random_)
        qemu_io(image.parent, "-f", "qcow2", *commands, NAME)
        assert "No errors were found" in qemu(image.parent, "qemu-img", "check", NAME)
        guest.open()
        assert same(await guest.node.read(0, len(guest.model)), guest.model)
    await guest.step(random_)
    await guest.check()


@pytest.mark.parametrize("name", KINDS)
async def test_discarded_clusters_read_as_zeroes_and_the_rest_as_before(templates: Make, tmp_path: Path, name: str) -> None:
    guest = Guest(name, templates(name, tmp_path / "image"))
    cluster, size = guest.kind.cluster, len(guest.model)
    await guest.discard(cluster // 2 + 3, cluster // 2 - 7)  # within one cluster
    await guest.discard(cluster - 1, cluster + 2)
    await guest.discard(size // cluster * cluster - 1, size - size // cluster * cluster + 1)
    await guest.write(cluster + 1, b"data")
    await guest.discard(cluster, cluster)
    if not (guest.kind.version_2 and guest.kind.below_size):
        assert same(await guest.node.read(cluster, cluster), bytes(cluster))
    await guest.check()


@st.composite
def operations(draw: st.DrawFn) -> tuple[str, bool, list[tuple[str, int, int, int]]]:
    name = draw(st.sampled_from(["zlib_1k", "snapshots_compressed", "backed_extended", "snapshots_backed_v2", "extended_16k",
                                 "chain_of_5", "zeroes_allocated", "data_file_raw_512", "snapshots_512_refcount_64"]))  # fmt: skip
    kind = KINDS[name]
    borders = [0, 1, kind.subcluster - 1, kind.subcluster, kind.cluster - 1, kind.cluster, 7 * kind.cluster, kind.size - 1]
    offset = st.one_of(st.integers(0, kind.size), st.sampled_from(borders))
    length = st.one_of(st.integers(0, 3 * kind.cluster), st.sampled_from([1, 512, kind.subcluster, kind.cluster, kind.size]))
    step = st.sampled_from(["write", "write", "write", "zeroes", "keep", "discard", "reopen"])
    steps = draw(st.lists(st.tuples(step, offset, length, st.integers(0, 255)), max_size=10))
    return name, draw(st.booleans()), [(what, at, min(count, kind.size - at), seed) for what, at, count, seed in steps]


@settings(max_examples=40)
@given(drawn=operations())
async def test_any_operations_in_any_order(
    templates: Make, tmp_path_factory: pytest.TempPathFactory, drawn: tuple[str, bool, list[tuple[str, int, int, int]]]
) -> None:
    name, journaled, steps = drawn
    folder = tmp_path_factory.mktemp("image") / "image"
    guest = Guest(name, templates(name, folder), cache=SMALL_CACHE, journaled=journaled)
    await guest.use_journal()
    for what, offset, length, seed in steps:
        if what == "write":
            await guest.write(offset, bytes((i * 7 + seed * 31 + (i >> 8)) % 255 + 1 for i in range(length)))
        elif what in ("zeroes", "keep"):
            await guest.write_zeroes(offset, length, what == "zeroes")
        elif what == "discard":
            await guest.discard(offset, length)
        else:
            await guest.reopen()
    await guest.check()
    shutil.rmtree(folder)


# Snapshots


@pytest.mark.parametrize("name", SNAPSHOTS)
async def test_internal_snapshots_keep_what_they_hold(templates: Make, tmp_path: Path, name: str) -> None:
    random_ = random.Random(f"snapshots {name}")
    image = templates(name, tmp_path / "image")
    snapshots = KINDS[name].snapshots
    held = {snapshot: content_of(image, "-l", snapshot) for snapshot in snapshots}
    guest = Guest(name, image, cache=SMALL_CACHE)
    for _ in range(20):
        await guest.step(random_)
    for offset in range(0, len(guest.model), 300_000):  # everywhere
        await guest.write(offset, random_.randbytes(min(200_000, len(guest.model) - offset)))
    await guest.check()
    assert [entry["name"] for entry in info(image)["snapshots"]] == snapshots
    for snapshot in snapshots:
        assert same(content_of(image, "-l", snapshot), held[snapshot]), snapshot
    for snapshot in snapshots:
        copy = shutil.copytree(image.parent, tmp_path / f"copy {snapshot}") / NAME
        for bitmap in info(copy)["format-specific"]["data"].get("bitmaps", []):
            qemu(copy.parent, "qemu-img", "bitmap", "--remove", NAME, bitmap["name"])
        for other in snapshots:  # a refcount of two bits does not get further than 3
            if other != snapshot:
                qemu(copy.parent, "qemu-img", "snapshot", "-d", other, NAME)
        qemu(copy.parent, "qemu-img", "snapshot", "-a", snapshot, NAME)
        restored = content_of(copy)  # it has the size that it had when the snapshot was made
        assert same(restored, held[snapshot][: len(restored)]), snapshot
    for snapshot in snapshots:
        qemu(image.parent, "qemu-img", "snapshot", "-d", snapshot, NAME)
    check_by_qemu(image, guest.model)
    guest = Guest(name, image, content=bytes(guest.model))
    for _ in range(5):
        await guest.step(random_)
    await guest.check()


@pytest.mark.parametrize("name", ["snapshots", "snapshots_512_refcount_64", "snapshots_refcount_4", "snapshots_extended"])
async def test_snapshots_made_and_dropped_between_writes(templates: Make, tmp_path: Path, name: str) -> None:
    random_ = random.Random(f"more snapshots {name}")
    image = templates(name, tmp_path / "image")
    guest = Guest(name, image)
    held: dict[str, bytes] = {}
    for turn in range(3):
        for _ in range(6):
            await guest.step(random_)
        await guest.node.close()
        qemu(image.parent, "qemu-img", "snapshot", "-c", f"turn{turn}", NAME)
        held[f"turn{turn}"] = bytes(guest.model)
        if turn == 1:
            qemu(image.parent, "qemu-img", "snapshot", "-d", "one", NAME)
            qemu(image.parent, "qemu-img", "snapshot", "-a", "turn0", NAME)
            guest.model[:] = held["turn0"]
        guest.open()
    await guest.step(random_)
    await guest.check()
    for snapshot, content in held.items():
        assert same(content_of(image, "-l", snapshot), content), snapshot


# Side by side


@pytest.mark.parametrize(
    "name",
    ["plain", "zlib_4k", "zlib_512", "zlib_extended", "zstd_extended", "snapshots", "snapshots_512_refcount_64", "snapshots_2m",
     "snapshots_compressed", "backed_raw", "backed_v2_512", "backed_extended_2m", "backed_shorter_extended", "chain_of_5",
     "compressed_over_raw", "snapshots_backed_extended", "data_file_backed", "data_file_raw_extended", "metadata_extended"],
)  # fmt: skip
@pytest.mark.parametrize("seed", range(2))
async def test_requests_side_by_side_that_share_clusters(
    templates: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, seed: int
) -> None:
    """The parts of the disk belong to one task each, and those of a cluster to several. Every read from a file gives way first."""
    random_ = random.Random(f"side by side {name} {seed}")
    read_into = File.read_into

    async def slow_read(self: File, offset: int, buffer: memoryview) -> int:
        for _ in range(random_.randrange(4)):
            await trio.lowlevel.checkpoint()
        return await read_into(self, offset, buffer)

    monkeypatch.setattr(File, "read_into", slow_read)
    guest = Guest(name, templates(name, tmp_path / "image"), cache=SMALL_CACHE)
    size = len(guest.model)
    middle = random_.randrange(0, size, guest.kind.cluster)
    near = [random_.randrange(max(0, middle - guest.kind.cluster), min(size, middle + guest.kind.cluster)) for _ in range(15)]
    cuts = sorted({0, size, *near, *(random_.randrange(size) for _ in range(15))})
    parts = list(itertools.pairwise(cuts))

    async def work(parts: list[tuple[int, int]]) -> None:
        for _ in range(10):
            start, stop = random_.choice(parts)
            offset = random_.randrange(start, stop)
            length = random_.randint(1, stop - offset)
            what = random_.choice(["write", "write", "zeroes", "keep", "discard", "flush", "read"])
            if what == "write":
                await guest.write(offset, random_.randbytes(length))
            elif what in ("zeroes", "keep"):
                await guest.write_zeroes(offset, length, what == "zeroes")
            elif what == "discard":
                await guest.discard(offset, length)
            elif what == "flush":
                await guest.node.flush()
            await trio.lowlevel.checkpoint()
            assert same(await guest.node.read(start, stop - start), guest.model[start:stop]), what

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            for first in range(5):
                nursery.start_soon(work, parts[first::5])
    await guest.check()


@pytest.mark.parametrize("name", ["zlib", "zstd_2m", "snapshots", "backed_raw", "backed_extended_2m", "snapshots_compressed"])
async def test_writers_that_share_one_cluster_do_not_lose_each_other(
    templates: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    read_into = File.read_into

    async def slow_read(self: File, offset: int, buffer: memoryview) -> int:
        await trio.lowlevel.checkpoint()
        return await read_into(self, offset, buffer)

    monkeypatch.setattr(File, "read_into", slow_read)
    guest = Guest(name, templates(name, tmp_path / "image"))
    step = guest.kind.cluster // 16
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            for number, offset in enumerate(range(7, len(guest.model) - step, step)):
                if number % 3:
                    nursery.start_soon(guest.write, offset, bytes([number % 251 + 1]) * (step // 2 + 5))
                else:
                    nursery.start_soon(guest.write_zeroes, offset, step // 2 + 5, bool(number % 2))
    await guest.check()


async def test_a_read_of_a_compressed_cluster_whose_room_was_used_meanwhile_looks_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a thread is about to read it, others overwrite the rest of the cluster, and then fill the room that it had."""
    cluster = 4096
    model = bytearray(b"compressible\n" * (16 * cluster // 13 + 1))[: 16 * cluster]
    (tmp_path / "source").write_bytes(model)
    options = f"cluster_size={cluster},refcount_bits=1"  # compressed clusters share no room
    qemu(tmp_path, "qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, "source", NAME)
    node = open_disk(tmp_path / NAME, "qcow2")
    read_now, trio_thread = File.read_now, threading.current_thread()
    reading, overtaken = threading.Event(), threading.Event()

    def slow_read_now(self: File, offset: int, length: int) -> bytes:
        if threading.current_thread() is not trio_thread and not reading.is_set():
            reading.set()
            assert overtaken.wait(20)
        return read_now(self, offset, length)

    monkeypatch.setattr(File, "read_now", slow_read_now)
    got: list[Data] = []

    async def read() -> None:
        got.append(await node.read(0, 10))

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await trio.to_thread.run_sync(reading.wait)
            for offset, length in ((10, cluster - 10), (5 * cluster, 4 * cluster)):
                data = random.Random(offset).randbytes(length)
                await node.write(offset, data)
                model[offset : offset + length] = data
            overtaken.set()
    assert bytes(got[0]) == model[:10]
    assert same(await node.read(0, len(model)), model)
    await node.close()
    check_by_qemu(tmp_path / NAME, model)


@pytest.mark.parametrize("how", ["zeroes", "discard"])
@pytest.mark.parametrize("options", ["", "data_file=disk.data", "data_file=disk.data,data_file_raw=on"])
async def test_a_write_while_the_room_of_its_cluster_is_given_back_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str, how: str
) -> None:
    """The last subcluster with data in a cluster becomes zero; while the hole for it is made, another one is written to."""
    joined = ",".join(filter(None, ["extended_l2=on", options]))
    qemu(tmp_path, "qemu-img", "create", "-q", "-f", "qcow2", "-o", joined, NAME, "1M")
    node = open_disk(tmp_path / NAME, "qcow2")
    subcluster = 2048
    await node.write(0, b"old!" * (subcluster // 4))
    await node.write_zeroes(subcluster, 31 * subcluster)
    discard, may_go_on = File.discard, trio.Event()

    async def slow_discard(self: File, offset: int, length: int) -> None:
        await may_go_on.wait()
        await discard(self, offset, length)

    async def in_place(function: Callable[..., object], *arguments: object, **_: object) -> object:
        return function(*arguments)  # or a task that waits for a thread would pass for one that is blocked

    monkeypatch.setattr(trio.to_thread, "run_sync", in_place)
    monkeypatch.setattr(File, "discard", slow_discard)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(node.write_zeroes if how == "zeroes" else node.discard, 0, subcluster)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(node.write, 3 * subcluster + 5, b"new!" * 500)
            await trio.testing.wait_all_tasks_blocked()
            may_go_on.set()
    model = bytes(3 * subcluster + 5) + b"new!" * 500
    model = model.ljust(1 << 20, b"\0")
    assert same(await node.read(0, 1 << 20), model)
    await node.close()
    check_by_qemu(tmp_path / NAME, model)


# Bitmaps


@pytest.mark.parametrize("name", BITMAPS)
async def test_bitmaps_stay_valid_until_the_disk_is_written(templates: Make, tmp_path: Path, name: str) -> None:
    image = templates(name, tmp_path / "image")
    before = info(image)["format-specific"]["data"]["bitmaps"]
    assert before
    guest = Guest(name, image)
    assert same(await guest.node.read(0, len(guest.model)), guest.model)
    await guest.node.flush()
    await guest.check()
    assert info(image)["format-specific"]["data"]["bitmaps"] == before
    assert "warning" not in qemu(image.parent, "qemu-img", "info", NAME).lower()


@pytest.mark.parametrize("change", ["write", "zeroes", "discard"])
@pytest.mark.parametrize("name", BITMAPS)
async def test_bitmaps_are_not_valid_after_a_write_and_leak_nothing(
    templates: Make, tmp_path: Path, name: str, change: str
) -> None:
    image = templates(name, tmp_path / "image")
    guest = Guest(name, image)
    await guest.write(0, b"data" * 20_000)  # so that there is something to zero and to discard
    if change == "write":
        await guest.write(1000, b"new")
    elif change == "zeroes":
        await guest.write_zeroes(0, 2 * guest.kind.cluster, True)
    else:
        await guest.discard(0, 2 * guest.kind.cluster)
    await guest.check()
    bitmaps = info(image)["format-specific"]["data"].get("bitmaps", [])
    assert all("in-use" in bitmap["flags"] for bitmap in bitmaps)
    qemu(image.parent, "qemu-img", "bitmap", "--add", NAME, "another")
    check_by_qemu(image, guest.model)


# Images that QEMU left dirty


@pytest.mark.parametrize(
    "options",
    ["", "cluster_size=512", "refcount_bits=1", "refcount_bits=64", "cluster_size=512,refcount_bits=64", "extended_l2=on",
     "cluster_size=512,refcount_bits=1", "cluster_size=2M", "data_file=disk.data,cluster_size=4k"],
)  # fmt: skip
@pytest.mark.parametrize("snapshots", [False, True])
async def test_an_image_that_qemu_left_dirty_is_repaired(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, options: str, snapshots: bool
) -> None:
    if snapshots and ("refcount_bits=1" in options or "data_file" in options):  # QEMU has no snapshots there
        options = "compression_type=zstd"
    random_ = random.Random(f"dirty {options} {snapshots}")
    size = 6 << 20 if "2M" in options else 300 << 10
    model = bytearray(random_.randbytes(size // 2).ljust(size, b"\0"))  # the second half has to be allocated
    image = tmp_path / NAME
    (tmp_path / "source").write_bytes(model)
    extra = ["-c"] if "zstd" in options else []
    joined = ",".join(filter(None, ["lazy_refcounts=on", options]))
    qemu(tmp_path, "qemu-img", "convert", *extra, "-f", "raw", "-O", "qcow2", "-o", joined, "source", NAME)
    if snapshots:
        qemu(tmp_path, "qemu-img", "snapshot", "-c", "one", NAME)
    held = bytes(model)
    commands = write_by_qemu(image, model, random_, 12)
    commands += ["-c", f"write -q -P 7 {size - 70_000} 70000"]
    model[size - 70_000 :] = b"\7" * 70_000
    done = subprocess.run(
        ["qemu-io", "-f", "qcow2", *commands, "-c", "flush", "-c", "sigraise 9", NAME],
        cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=60,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL
    assert info(image)["dirty-flag"] is True
    caplog.set_level(logging.INFO)
    node = open_disk(image, "qcow2")
    assert any(str(image) in record.getMessage() for record in caplog.records if record.levelno >= logging.INFO)
    assert same(await node.read(0, size), model)
    await node.close()
    assert info(image)["dirty-flag"] is False
    check_by_qemu(image, model)
    node = open_disk(image, "qcow2")
    data = random_.randbytes(200_000)
    await node.write(77, data)
    model[77 : 77 + len(data)] = data
    await node.close()
    check_by_qemu(image, model)
    if snapshots:
        assert same(content_of(image, "-l", "one"), held)


# Room


def blocks(path: Path) -> int:
    return path.stat().st_blocks * 512


SPACE = {
    "plain": "",
    "v2": "compat=0.10",
    "512": "cluster_size=512",
    "4k": "cluster_size=4k,refcount_bits=1",
    "2m": "cluster_size=2M",
    "extended": "extended_l2=on",
}


@pytest.mark.parametrize("how", ["zeroes", "discard"])
@pytest.mark.parametrize("options", SPACE.values(), ids=SPACE)
async def test_room_is_given_back(tmp_path: Path, options: str, how: str) -> None:
    size = 4 << 20
    image = tmp_path / NAME
    qemu(tmp_path, "qemu-img", "create", "-q", "-f", "qcow2", *(["-o", options] if options else []), NAME, str(size))
    node = open_disk(image, "qcow2")
    for offset in range(0, size, 100_000):
        await node.write(offset, random.Random(offset).randbytes(min(100_000, size - offset)))
    await node.flush()
    full = blocks(image)
    assert full >= size
    await (node.write_zeroes(0, size) if how == "zeroes" else node.discard(0, size))
    await node.flush()
    await node.close()
    assert blocks(image) <= full - size * 3 // 4
    check_by_qemu(image, bytes(size))


@pytest.mark.parametrize("how", ["zeroes", "discard"])
@pytest.mark.parametrize("options", ["", "cluster_size=4k", "extended_l2=on,compression_type=zstd"])
async def test_room_of_compressed_clusters_is_given_back(tmp_path: Path, options: str, how: str) -> None:
    size = 4 << 20
    (tmp_path / "source").write_bytes(random.Random(1).randbytes(size // 2).hex().encode())
    command = ["qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", *(["-o", options] if options else []), "source", NAME]
    qemu(tmp_path, *command)
    node = open_disk(tmp_path / NAME, "qcow2")
    full = blocks(tmp_path / NAME)
    assert full >= size // 2
    await (node.write_zeroes(0, size) if how == "zeroes" else node.discard(0, size))
    await node.flush()
    await node.close()
    assert blocks(tmp_path / NAME) <= full - size // 2 * 3 // 4
    check_by_qemu(tmp_path / NAME, bytes(size))


@pytest.mark.parametrize("how", ["zeroes", "discard"])
@pytest.mark.parametrize("options", SPACE.values(), ids=SPACE)
async def test_freed_clusters_are_used_again(tmp_path: Path, options: str, how: str) -> None:
    size = 4 << 20
    image = tmp_path / NAME
    qemu(tmp_path, "qemu-img", "create", "-q", "-f", "qcow2", *(["-o", options] if options else []), NAME, str(size))
    random_ = random.Random(f"again {options}")
    piece = 2 << 20 if "2M" in options else 1 << 18
    lengths = []
    node = open_disk(image, "qcow2")
    for turn in range(24):
        offset = random_.randrange(0, size, piece)
        await node.write(offset, random_.randbytes(piece))
        await node.flush()
        await (node.write_zeroes(offset, piece) if how == "zeroes" else node.discard(offset, piece))
        await node.flush()
        lengths.append(image.stat().st_size)
        if turn % 8 == 7:
            await node.close()
            node = open_disk(image, "qcow2")
    await node.close()
    # tables and other metadata come one by one as other places are written to
    assert lengths[-1] <= lengths[3] + piece // 2 + (8 << 16), lengths
    check_by_qemu(image, bytes(size))


@pytest.mark.parametrize("options", SPACE.values(), ids=SPACE)
async def test_zeroes_that_are_to_keep_their_room_keep_it(tmp_path: Path, options: str) -> None:
    size = 4 << 20
    image = tmp_path / NAME
    qemu(tmp_path, "qemu-img", "create", "-q", "-f", "qcow2", *(["-o", options] if options else []), NAME, str(size))
    node = open_disk(image, "qcow2")
    await node.write(0, random.Random(1).randbytes(size))
    await node.flush()
    full = blocks(image)
    await node.write_zeroes(0, size, may_unmap=False)
    await node.flush()
    assert blocks(image) >= full
    length = image.stat().st_size
    await node.write(100, random.Random(1).randbytes(size - 200))
    await node.close()
    assert image.stat().st_size == length
    check_by_qemu(image, bytes(100) + random.Random(1).randbytes(size - 200) + bytes(100))


async def test_overwriting_what_snapshots_and_compressed_clusters_share_takes_room_once(templates: Make, tmp_path: Path) -> None:
    for name in ("snapshots", "zlib_4k", "snapshots_compressed"):
        guest = Guest(name, templates(name, tmp_path / name))
        lengths = []
        for turn in range(4):
            await guest.write(0, random.Random(turn).randbytes(len(guest.model)))
            await guest.node.flush()
            lengths.append(guest.image.stat().st_size)
        assert lengths[1:] == lengths[:1] * 3
        await guest.check()


@pytest.mark.parametrize("how", ["zeroes", "discard"])
async def test_a_raw_disk_gives_room_back(tmp_path: Path, how: str) -> None:
    disk = tmp_path / "disk.raw"
    size = 4 << 20
    content = bytearray(random.Random(1).randbytes(size))
    disk.write_bytes(content)
    node = open_disk(disk, "raw")
    await node.flush()
    full = blocks(disk)
    offset, length = 1 << 20, 2 << 20
    if how == "zeroes":
        await node.write_zeroes(offset, length)
        content[offset : offset + length] = bytes(length)
        await node.write_zeroes(3 << 20, 1 << 20, may_unmap=False)
        content[3 << 20 :] = bytes(1 << 20)
    else:
        await node.discard(offset, length)
        content[offset : offset + length] = await node.read(offset, length)
        assert not any(content[offset : offset + length])
    await node.flush()
    assert full - length - 65536 <= blocks(disk) <= full - length + 65536
    assert [extent.zero for extent in await node.extents(0, 3 << 20, 10)] == [False, True]
    await node.close()
    assert same(disk.read_bytes(), content)


# Large and growing images


@pytest.mark.parametrize("options", ["refcount_bits=64", "refcount_bits=1", "compat=0.10", "refcount_bits=64,lazy_refcounts=on"])
async def test_refcount_blocks_and_their_table_grow(tmp_path: Path, options: str) -> None:
    size = 5 << 20  # of clusters of 512 bytes: one refcount table cluster counts 2 MiB of them if refcounts are 64 bits wide
    qemu(tmp_path, "qemu-img", "create", "-q", "-f", "qcow2", "-o", f"cluster_size=512,{options}", NAME, str(size))
    random_ = random.Random(options)
    model = bytearray(size)
    node = open_disk(tmp_path / NAME, "qcow2", cache=Cache(SMALL_CACHE))
    parts = list(range(0, size, 70_001))
    random_.shuffle(parts)
    for number, offset in enumerate(parts):
        data = random_.randbytes(min(70_001, size - offset))
        await node.write(offset, data)
        model[offset : offset + len(data)] = data
        if number % 25 == 24:
            await node.close()
            node = open_disk(tmp_path / NAME, "qcow2", cache=Cache(SMALL_CACHE))
    assert same(await node.read(0, size), model)
    await node.close()
    check_by_qemu(tmp_path / NAME, model)
    qemu_io(tmp_path, "-f", "qcow2", "-c", "write -q -P 9 1000 2M", NAME)
    model[1000 : 1000 + (2 << 20)] = b"\x09" * (2 << 20)
    check_by_qemu(tmp_path / NAME, model)


FAR = {
    "plain": ("", 512 << 20),
    "v2": ("compat=0.10", 512 << 20),
    "extended": ("extended_l2=on", 256 << 20),
    "4k": ("cluster_size=4k", 2 << 20),
    "2m": ("cluster_size=2M", 512 << 30),
    "data_file": ("data_file=disk.data,extended_l2=on", 256 << 20),
}


@pytest.mark.parametrize("name", FAR)
async def test_requests_across_the_borders_of_l2_tables(tmp_path: Path, name: str) -> None:
    options, span = FAR[name]
    size = 4 * span + 512
    qemu(tmp_path, "qemu-img", "create", "-q", "-f", "qcow2", *(["-o", options] if options else []), NAME, str(size))
    model = tmp_path / "model"
    with model.open("wb") as file:
        file.truncate(size)
    raw, node = open_disk(model, "raw"), open_disk(tmp_path / NAME, "qcow2")
    data = random.Random(name).randbytes(5 << 20)
    for disk in (raw, node):
        for border in (span, 2 * span, 4 * span):
            offset = border - (3 << 18) - 5
            await disk.write(offset, data[: min(len(data), size - offset)])
        await disk.write_zeroes(span - 70_000, 200_001)
        await disk.write_zeroes(2 * span - 3, 6, may_unmap=False)
        await disk.discard(3 * span - (1 << 20), 2 << 20)
        await disk.write_zeroes(4 * span - 100, 300)
    if size < 8 << 30:  # elsewhere QEMU compares: it would take long to read all the zeroes
        for border in (span, 2 * span, 3 * span, 4 * span):
            offset = border - (2 << 20)
            length = min(7 << 20, size - offset)
            assert same(await node.read(offset, length), await raw.read(offset, length))
    position = 0
    while position < size:
        extents = await node.extents(position, size - position, 4)
        assert extents
        position += sum(extent.length for extent in extents)
    assert position == size
    await raw.close()
    await node.close()
    assert "No errors were found" in qemu(tmp_path, "qemu-img", "check", NAME)
    assert "identical" in qemu(tmp_path, "qemu-img", "compare", "-f", "qcow2", "-F", "raw", NAME, "model")


# External data files


@pytest.mark.parametrize("name", RAW_DATA_FILES)
async def test_a_raw_data_file_is_the_disk_itself(templates: Make, tmp_path: Path, name: str) -> None:
    random_ = random.Random(f"raw data {name}")
    image = templates(name, tmp_path / "image")
    guest = Guest(name, image)
    data = image.parent / "disk.data"

    def disk_of(data: Path) -> bytes:
        content = data.read_bytes()
        assert not any(content[guest.kind.size :])  # QEMU lets it end with a cluster
        return content[: guest.kind.size]

    for _ in range(5):
        for _ in range(8):
            await guest.step(random_)
        await guest.node.flush()
        assert same(disk_of(data), guest.model)
    await guest.discard(0, len(guest.model))
    assert same(disk_of(data), guest.model)
    await guest.write(5, b"data" * 25_000)
    await guest.write_zeroes(100, 50_000, False)
    assert same(disk_of(data), guest.model)
    await guest.check()
    assert same(disk_of(data), guest.model)
    assert info(image)["format-specific"]["data"]["data-file-raw"] is True


async def test_a_data_file_gives_room_back(tmp_path: Path) -> None:
    size = 4 << 20
    for options in ("data_file=one.data", "data_file=two.data,data_file_raw=on"):
        data = tmp_path / re.findall(r"data_file=([^,]+)", options)[0]
        image = tmp_path / f"{data.stem}.qcow2"
        qemu(tmp_path, "qemu-img", "create", "-q", "-f", "qcow2", "-o", options, image.name, str(size))
        for how in ("zeroes", "discard"):
            node = open_disk(image, "qcow2")
            await node.write(0, random.Random(1).randbytes(size))
            await node.flush()
            assert blocks(data) >= size
            await (node.write_zeroes(0, size) if how == "zeroes" else node.discard(0, size))
            await node.flush()
            await node.close()
            assert blocks(data) <= size // 10, (options, how)
            check_by_qemu(image, bytes(size))
