"""The qcow2 overlay against a bytearray, and against qemu-img."""

import errno
import json
import os
import resource
import struct
import tempfile
from pathlib import Path

import pytest
import trio
from disks import assert_same_as, assert_sound, get, overlay, put, qemu_img, raw, same
from hypothesis import given, settings
from hypothesis import strategies as st

from replfs.block.cache import Cache
from replfs.block.node import Extent
from replfs.block.qcow2.image import Image
from replfs.block.qcow2.overlay import CLUSTER, SPAN, SUBCLUSTER, create_overlay, open_overlay
from replfs.block.storage import Storage
from replfs.errors import ReplfsError

SIZE = 5 * CLUSTER + 777  # neither whole clusters, subclusters nor sectors


def pattern(length: int, seed: int) -> bytes:
    return bytes((i * 7 + seed * 31 + (i >> 8)) % 255 + 1 for i in range(length))


@st.composite
def operations(draw: st.DrawFn) -> list[tuple[str, int, int, int]]:
    borders = st.sampled_from([0, 1, 511, SUBCLUSTER - 1, SUBCLUSTER, CLUSTER - 1, CLUSTER, 3 * CLUSTER, SIZE - 1, SIZE])
    offset = st.one_of(st.integers(0, SIZE), borders)
    length = st.one_of(st.integers(0, 2 * CLUSTER), st.sampled_from([1, 512, SUBCLUSTER, 4096, CLUSTER, SIZE]))
    kind = st.sampled_from(["write", "write", "write_zeroes", "discard", "reopen"])
    steps = draw(st.lists(st.tuples(kind, offset, length, st.integers(0, 255)), max_size=12))
    return [(name, at, min(count, SIZE - at), seed) for name, at, count, seed in steps]


@settings(max_examples=60)
@given(operations())
async def test_an_overlay_is_a_disk_and_qemu_agrees(steps: list[tuple[str, int, int, int]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        model = bytearray(pattern(SIZE, 1))
        below = bytes(model)
        disk = raw(folder / "disk.raw", below)
        image = overlay(folder / "over.qcow2", disk)
        for name, offset, length, seed in steps:
            if name == "reopen":
                await image.close()
                image = open_overlay(Storage(), str(folder / "over.qcow2"), disk, Cache())
            elif name == "write":
                data = pattern(length, seed)
                await put(image, offset, data)
                model[offset : offset + length] = data
            elif name == "write_zeroes":
                await image.write_zeroes(offset, length)
                model[offset : offset + length] = bytes(length)
            else:  # whole subclusters read as zeroes, the rest as before
                await image.discard(offset, length)
                first, last = -(-offset // SUBCLUSTER) * SUBCLUSTER, (offset + length) // SUBCLUSTER * SUBCLUSTER
                last = SIZE if offset + length == SIZE else last
                if first < last:
                    model[first:last] = bytes(last - first)
            assert await get(image, offset, length) == bytes(model[offset : offset + length])
        assert same(bytes(await image.read(0, SIZE)), bytes(model))
        await check_extents(image, bytes(model))
        await image.close()
        await disk.close()
        assert same((folder / "disk.raw").read_bytes(), below)
        assert_sound(folder / "over.qcow2")
        assert_same_as(folder / "over.qcow2", bytes(model), folder / "model.raw")


async def check_extents(image: Image, model: bytes) -> None:
    position = 0
    while position < image.size:
        for extent in await image.extents(position, image.size - position, 3):
            if extent.zero:
                assert model[position : position + extent.length] == bytes(extent.length)
            position += extent.length
    assert position == image.size


async def test_a_small_write_takes_little_room(tmp_path: Path) -> None:
    disk = raw(tmp_path / "disk.raw", pattern(8 * CLUSTER, 3))
    image = overlay(tmp_path / "over.qcow2", disk)
    await image.write(3 * CLUSTER + 512, b"x" * 512)
    assert image.missing(3 * CLUSTER, 4 * CLUSTER) == [(3 * CLUSTER + SUBCLUSTER, 4 * CLUSTER)]
    before = image.file.allocated_bytes()
    await image.write_zeroes(0, 2 * CLUSTER)
    await image.write_zeroes(4 * CLUSTER, 2 * CLUSTER)
    assert image.file.allocated_bytes() == before
    assert await image.extents(0, image.size, 1) == [Extent(2 * CLUSTER, True, True)]
    assert same(bytes(await image.read(0, 2 * CLUSTER)), bytes(2 * CLUSTER))


async def test_populate_saves_only_what_is_missing_and_zeroes_for_free(tmp_path: Path) -> None:
    disk = raw(tmp_path / "disk.raw", bytes(CLUSTER) + pattern(CLUSTER + 100, 3))
    image = overlay(tmp_path / "over.qcow2", disk)
    await image.populate(0, await disk.read(0, CLUSTER))
    assert image.file.length() < 8 * CLUSTER
    end = 2 * CLUSTER
    await image.populate(end, await disk.read(end, 100))
    assert image.missing(0, image.size) == [(CLUSTER, end)]
    await disk.write(0, b"n" * image.size)
    assert same(bytes(await image.read(0, image.size)), bytes(CLUSTER) + b"n" * CLUSTER + pattern(CLUSTER + 100, 3)[CLUSTER:])


@pytest.mark.parametrize("at_once", [False, True])
async def test_a_read_that_waited_for_the_disk_looks_again(tmp_path: Path, at_once: bool) -> None:
    """While the disk is read for a subcluster, its old content is saved here and the disk is overwritten: the old is read."""
    disk = raw(tmp_path / "disk.raw", b"o" * CLUSTER)
    image = overlay(tmp_path / "over.qcow2", disk)
    await image.write(CLUSTER - SUBCLUSTER, b"x" * SUBCLUSTER)
    plain_read = disk.read_into

    async def overtaken(offset: int, buffer: memoryview) -> None:
        if image.missing(0, SUBCLUSTER):
            if not at_once or not image.populate_at_once(0, b"o" * SUBCLUSTER):
                await image.populate(0, b"o" * SUBCLUSTER)
            await disk.write(0, b"n" * CLUSTER)
        await plain_read(offset, buffer)

    disk.read_into = overtaken  # type: ignore[method-assign]
    assert bytes(await image.read(0, 100)) == b"o" * 100


async def test_a_partial_write_that_waited_keeps_what_came_meanwhile(tmp_path: Path) -> None:
    disk = raw(tmp_path / "disk.raw", b"o" * CLUSTER)
    image = overlay(tmp_path / "over.qcow2", disk)
    plain_read = disk.read_into

    async def overtaken(offset: int, buffer: memoryview) -> None:
        disk.read_into = plain_read  # type: ignore[method-assign]
        await image.write(1000, b"2" * 100)
        await plain_read(offset, buffer)

    disk.read_into = overtaken  # type: ignore[method-assign]
    await image.write(0, b"1" * 100)
    assert bytes(await image.read(0, 1200)) == b"1" * 100 + b"o" * 900 + b"2" * 100 + b"o" * 100


@pytest.mark.parametrize("offset", [0, 1000, SUBCLUSTER - 100])
async def test_a_partial_write_that_waited_sees_zeroes_that_came_meanwhile(tmp_path: Path, offset: int) -> None:
    disk = raw(tmp_path / "disk.raw", b"o" * CLUSTER)
    image = overlay(tmp_path / "over.qcow2", disk)
    plain_read = disk.read_into

    async def overtaken(offset: int, buffer: memoryview) -> None:
        disk.read_into = plain_read  # type: ignore[method-assign]
        await image.write_zeroes(0, SUBCLUSTER)
        await plain_read(offset, buffer)

    disk.read_into = overtaken  # type: ignore[method-assign]
    await image.write(offset, b"1" * 100)
    expected = bytearray(SUBCLUSTER)
    expected[offset : offset + 100] = b"1" * 100
    assert same(bytes(await image.read(0, SUBCLUSTER)), expected)


async def test_the_borders_of_l2_tables(tmp_path: Path) -> None:
    disk = raw(tmp_path / "disk.raw", 3 * SPAN)
    image = overlay(tmp_path / "over.qcow2", disk)
    data = pattern(3 * CLUSTER, 9)
    await image.write(SPAN - CLUSTER - 5, data)
    await image.write_zeroes(2 * SPAN - CLUSTER, 2 * CLUSTER)
    assert bytes(await image.read(SPAN - CLUSTER - 5, len(data))) == data
    await image.close()
    assert_sound(tmp_path / "over.qcow2")
    assert json.loads(qemu_img("map", "--output=json", tmp_path / "over.qcow2"))[1]["data"]


async def test_more_data_than_one_refcount_block_counts(tmp_path: Path) -> None:
    """A refcount block counts 2 GiB: sparse clusters get there at once, since the file is not filled but ended further on."""
    disk = raw(tmp_path / "disk.raw", 8 << 30)
    image = overlay(tmp_path / "over.qcow2", disk)
    block_end = (2 << 30) - 3 * CLUSTER
    while image._refcounts.end < block_end // CLUSTER:
        image._refcounts.allocate(block_end // CLUSTER - image._refcounts.end)
    image.file.truncate(block_end)
    for i in range(8):
        await image.write(i * CLUSTER, bytes([i + 1]) * CLUSTER)
    await image.close()
    image = open_overlay(Storage(), str(tmp_path / "over.qcow2"), disk, Cache())
    assert same(bytes(await image.read(0, 8 * CLUSTER)), b"".join(bytes([i + 1]) * CLUSTER for i in range(8)))
    await image.write(9 * CLUSTER, b"x")
    await image.close()
    qemu_img("check", "-r", "leaks", tmp_path / "over.qcow2")  # the clusters that were skipped
    assert_sound(tmp_path / "over.qcow2")
    image = open_overlay(Storage(), str(tmp_path / "over.qcow2"), disk, Cache())
    assert bytes(await image.read(9 * CLUSTER, 2)) == b"x\0"


async def test_a_16_tib_disk_opens_small(tmp_path: Path) -> None:
    disk = raw(tmp_path / "disk.raw", (16 << 40) - (1 << 20))  # ext4's largest file is a little less than 16 TiB
    image = overlay(tmp_path / "over.qcow2", disk)
    assert image.file.allocated_bytes() < 4 << 20
    await image.write(disk.size - 4096, b"end!" * 1024)
    assert bytes(await image.read(disk.size - 4, 4)) == b"end!"
    await image.close()
    assert_sound(tmp_path / "over.qcow2")


async def test_the_cache_of_tables_is_bounded_for_all_images_together(tmp_path: Path) -> None:
    cache = Cache(20 << 10)
    disk = raw(tmp_path / "disk.raw", 5 * SPAN)
    images = [overlay(tmp_path / name, disk, cache) for name in ("one.qcow2", "two.qcow2")]
    for turn in range(2):
        for i in range(5):
            for image in images:
                await image.write(i * SPAN + turn * 4096, bytes([i + 1]) * 4096)
                assert cache.used <= cache.limit + (68 << 10)  # at most the one refcount block that is in use
    for image in images:
        for i in range(5):
            assert bytes(await image.read(i * SPAN, 8192)) == bytes([i + 1]) * 8192
        await image.close()
    assert cache.used == 0


async def test_a_full_file_system_fails_the_write_and_nothing_else(tmp_path: Path) -> None:
    disk = raw(tmp_path / "disk.raw", pattern(64 * CLUSTER, 2))
    image = overlay(tmp_path / "over.qcow2", disk)
    await image.write(0, b"a" * CLUSTER)
    model = bytearray(await image.read(0, image.size))
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (image.file.length() + CLUSTER + 1000, old[1]))
        failed = 0
        for i in range(20):
            try:
                await image.write(i * 2 * CLUSTER + 5, b"b" * 3000)
                model[i * 2 * CLUSTER + 5 : i * 2 * CLUSTER + 3005] = b"b" * 3000
            except OSError as error:
                assert error.errno == errno.EFBIG  # noqa: PT017
                failed += 1
        assert failed > 10
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert same(bytes(await image.read(0, image.size)), bytes(model))
    await image.write(50 * CLUSTER, b"c" * 100)
    model[50 * CLUSTER : 50 * CLUSTER + 100] = b"c" * 100
    await image.close()
    assert_sound(tmp_path / "over.qcow2")
    assert_same_as(tmp_path / "over.qcow2", bytes(model), tmp_path / "model.raw")


async def test_an_overlay_in_use_is_read_by_qemu_too(tmp_path: Path) -> None:
    disk = raw(tmp_path / "disk.raw", pattern(4 * CLUSTER, 2))
    hidden = overlay(tmp_path / "hidden.qcow2", disk)
    active = overlay(tmp_path / "active.qcow2", hidden)
    await active.write(100, b"view")
    await hidden.populate(CLUSTER, await disk.read(CLUSTER, CLUSTER))
    model = bytes(await active.read(0, active.size))
    chain = json.loads(qemu_img("info", "-U", "--backing-chain", "--output=json", tmp_path / "active.qcow2"))
    assert [(link["format"], link.get("backing-filename-format")) for link in chain] == [
        ("qcow2", "qcow2"),
        ("qcow2", "raw"),
        ("raw", None),
    ]
    (tmp_path / "model.raw").write_bytes(model)
    assert "identical" in qemu_img("compare", "-U", "-f", "qcow2", "-F", "raw", tmp_path / "active.qcow2", tmp_path / "model.raw")


@pytest.mark.parametrize("position", range(0, 112, 4))
async def test_a_damaged_header_is_refused_with_one_line(tmp_path: Path, position: int) -> None:
    disk = raw(tmp_path / "disk.raw", 4 * CLUSTER)
    path = tmp_path / "over.qcow2"
    await overlay(path, disk).close()
    content = bytearray(path.read_bytes())
    content[position : position + 4] = b"\xff\xfe\xfd\xfc"
    path.write_bytes(content)
    if position in (64, 68, 80, 84, 88, 92, 108):  # where no snapshots are, features that need not be known, padding
        await open_overlay(Storage(), str(path), disk, Cache()).close()
        return
    with pytest.raises(ReplfsError) as refused:
        open_overlay(Storage(), str(path), disk, Cache())
    assert "\n" not in str(refused.value)
    assert str(path) in str(refused.value)


async def test_a_damaged_entry_is_an_io_error_for_what_it_maps(tmp_path: Path) -> None:
    disk = raw(tmp_path / "disk.raw", 4 * CLUSTER)
    path = tmp_path / "over.qcow2"
    image = overlay(path, disk)
    await image.write(0, b"good")
    await image.write(CLUSTER, b"lost")
    await image.close()
    content = path.read_bytes()
    l1 = int.from_bytes(content[40:48])
    table = int.from_bytes(content[l1 : l1 + 8]) & (1 << 56) - 1
    with path.open("r+b") as file:
        file.seek(table + 16)
        file.write(struct.pack(">Q", 12345))
    image = open_overlay(Storage(), str(path), disk, Cache())
    assert bytes(await image.read(0, 4)) == b"good"
    with pytest.raises(OSError) as failed:
        await image.read(CLUSTER, 4)
    assert failed.value.errno == errno.EIO


async def test_an_overlay_is_never_made_over_a_file(tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        create_overlay(Storage(), str(tmp_path / "precious"), CLUSTER, "./disk.raw", "raw")
    assert (tmp_path / "precious").read_bytes() == b"precious"
    with pytest.raises(ReplfsError, match="1023 bytes"):
        create_overlay(Storage(), str(tmp_path / "over.qcow2"), CLUSTER, "./" + "d" * 1030, "raw")
    assert os.listdir(tmp_path) == ["precious"]


async def test_writers_side_by_side_do_not_lose_each_other(tmp_path: Path) -> None:
    disk = raw(tmp_path / "disk.raw", b"o" * 2 * CLUSTER)
    image = overlay(tmp_path / "over.qcow2", disk)
    async with trio.open_nursery() as nursery:
        for i in range(0, 2 * CLUSTER, 300):
            nursery.start_soon(image.write, i, bytes([i % 251]) * min(100, 2 * CLUSTER - i))
    model = bytearray(b"o" * 2 * CLUSTER)
    for i in range(0, 2 * CLUSTER, 300):
        model[i : i + 100] = bytes([i % 251]) * min(100, 2 * CLUSTER - i)
    assert same(bytes(await image.read(0, 2 * CLUSTER)), bytes(model))
    await image.close()
    assert_sound(tmp_path / "over.qcow2")
