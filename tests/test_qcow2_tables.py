"""Refcount blocks of every width against a list, and the cache that tables share."""

import errno
import os
from pathlib import Path

import pytest
from disks import assert_same_as, assert_sound, qemu_img
from hypothesis import given
from hypothesis import strategies as st

from replfs.block.cache import Cache, Shelf
from replfs.block.file import File
from replfs.block.node import Data
from replfs.block.qcow2.header import Header
from replfs.block.qcow2.image import Image
from replfs.block.qcow2.refcounts import Block
from replfs.volume.disk import open_disk

BYTES = 32
SIZE = 6 << 20


@pytest.mark.parametrize("order", range(7))
@given(data=st.data())
def test_a_refcount_block_is_a_list_of_numbers(order: int, data: st.DataObject) -> None:
    count = BYTES * 8 >> order
    model = [0] * count
    block = Block(bytearray(BYTES), order)
    values = st.one_of(st.sampled_from([0, 1, (1 << (1 << order)) - 1]), st.integers(0, (1 << (1 << order)) - 1))
    for _ in range(data.draw(st.integers(1, 5))):
        position = data.draw(st.integers(0, count - 1))
        new = data.draw(st.lists(values, min_size=1, max_size=count - position))
        before = bytes(block.raw)
        at, raw = block.changed(position, new)
        assert bytes(block.raw) == before
        block.raw[at : at + len(raw)] = raw
        model[position : position + len(new)] = new
        assert [block.get(i) for i in range(count)] == model
        assert len(block.raw) == BYTES
        for start in range(count + 1):
            assert block.find_free(start) == next((i for i in range(start, count) if not model[i]), None)


@pytest.mark.parametrize(("order", "raw"), [(0, b"\x05"), (1, b"\x24"), (2, b"\x41"), (3, b"\x07"), (4, b"\x01\x02")])
def test_narrow_refcounts_begin_at_the_lowest_bit(order: int, raw: bytes) -> None:
    """Specification, "Refcount table and refcount blocks": a width of less than a byte counts from the least significant bit."""
    expected = {0: [1, 0, 1, 0, 0, 0, 0, 0], 1: [0, 1, 2, 0], 2: [1, 4], 3: [7], 4: [0x102]}[order]
    block = Block(bytearray(raw), order)
    assert [block.get(i) for i in range(len(expected))] == expected


class Device(File):
    """A file that behaves as a block device does: it has an end."""

    fixed = True  # type: ignore[assignment]

    def write(self, offset: int, data: Data) -> None:
        if offset + len(data) > SIZE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().write(offset, data)

    def truncate(self, length: int) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


async def test_an_image_on_a_block_device_uses_all_of_it_and_is_full_then(tmp_path: Path) -> None:
    path = tmp_path / "device"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=512,refcount_bits=64", path, "16M")
    os.truncate(path, SIZE)
    file = Device(os.open(path, os.O_RDWR), str(path))
    image = Image(file, Header.parse(file.read_now(0, 512), SIZE, str(path)), None, Cache())
    written = 0
    try:
        while True:
            await image.write(written * 512, b"d" * 512)
            written += 1
    except OSError as error:
        assert error.errno == errno.ENOSPC  # noqa: PT017 - how far it came is what matters
    assert written > SIZE // 512 * 0.9  # the tables take the rest; the refcount table had to be replaced
    await image.discard(0, 512 * 64)
    for offset in range(0, 512 * 64, 512):
        await image.write(offset, b"e" * 512)
    assert bytes(await image.read(0, written * 512)) == b"e" * 512 * 64 + b"d" * 512 * (written - 64)
    await image.close()
    assert path.stat().st_size == SIZE
    assert_sound(path)


@pytest.mark.parametrize("what", ["data", "table"])
async def test_an_image_that_qemu_has_repaired_is_written_to(tmp_path: Path, what: str) -> None:
    """It may leave a cluster that is a table and something else too, and is counted twice: what is not COPIED is copied first."""
    path, disk = tmp_path / "image", tmp_path / "disk"
    disk.write_bytes(b"d" * (4 << 16))
    qemu_img("convert", "-O", "qcow2", "-o", "cluster_size=512", disk, path)
    with path.open("r+b") as file:
        l1 = int.from_bytes(file.read(48)[40:48])
        file.seek(l1)
        first = file.read(8)
        if what == "table":  # two L1 entries lead to one L2 table
            file.seek(l1 + 8)
            file.write(first)
        else:  # an L2 entry leads to the L1 table
            file.seek(int.from_bytes(first) & (1 << 56) - 1)
            file.write((1 << 63 | l1).to_bytes(8))
    qemu_img("check", "-r", "all", path)
    assert_sound(path)
    image = open_disk(path, "qcow2")
    model = bytearray(await image.read(0, image.size))
    for offset in (100, 64 * 512 + 700):
        await image.write(offset, b"w" * 50)
        model[offset : offset + 50] = b"w" * 50
    assert bytes(await image.read(0, image.size)) == bytes(model)
    await image.close()
    assert_same_as(path, bytes(model), disk)
    if what == "data":  # else what shared the table is alone now and could be COPIED again, which nobody knows without a repair
        assert_sound(path)


async def test_a_table_that_is_said_to_be_shared_is_not_given_back_if_it_is_another(tmp_path: Path) -> None:
    """An L1 entry without COPIED leads to the L1 table itself: to write there would copy that table, and free the old one."""
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", path, "1M")
    with path.open("r+b") as file:
        l1 = int.from_bytes(file.read(48)[40:48])
        file.seek(l1)
        file.write(l1.to_bytes(8))
    image = open_disk(path, "qcow2")
    with pytest.raises(OSError, match="corrupt"):
        await image.write(40 * 512, b"w" * 512)  # what the L1 table holds for it, read as an L2 table, is nothing
    for cluster in range(64, 256):
        with pytest.raises(OSError, match="corrupt"):
            await image.write(cluster * 512, b"w" * 512)
    await image.close()
    with path.open("rb") as file:
        file.seek(l1 + 8)
        assert file.read(8 * 31) == bytes(8 * 31)


async def test_an_image_of_64_tib_is_written_at_both_ends(tmp_path: Path) -> None:
    path = tmp_path / "large.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "64T")
    image = open_disk(path, "qcow2")
    for offset in (0, image.size // 2, image.size - 4096):
        await image.write(offset, b"here" * 1024)
    for offset in (0, image.size // 2, image.size - 4096):
        assert bytes(await image.read(offset, 4096)) == b"here" * 1024
    await image.close()
    assert_sound(path)


def test_what_was_used_last_stays_and_the_limit_is_everybody_s() -> None:
    cache = Cache(10 * 1200)
    small: Shelf[int] = Shelf(cache, 1000)
    other: Shelf[int] = Shelf(cache, 1000)
    for i in range(10):
        small.put(i, i)
    assert small.get(0) == 0
    other.put(7, 7)
    assert cache.used == 12_000
    assert (small.get(0), small.get(1), other.get(7)) == (0, None, 7)
    small.put(0, 100)
    assert small.get(0) == 100
    assert cache.used == 12_000
    other.close()
    other.close()
    assert cache.used == 9 * 1200


def test_an_entry_larger_than_the_cache_is_kept_while_it_is_the_newest() -> None:
    cache = Cache(100)
    shelf: Shelf[str] = Shelf(cache, 1000)
    for i in range(3):
        shelf.put(i, f"table {i}")
        assert shelf.get(i) == f"table {i}"
        assert len(shelf) == 1
