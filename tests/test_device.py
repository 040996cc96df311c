"""The kernel's end of the mount, where a real mount cannot be brought to show it."""

import errno
import os
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from replfs.block.file import File
from replfs.export.device import limited
from replfs.export.splice import LARGEST, Pipe

INIT = struct.Struct("=IiQIIIIHHIIH")
REST = bytes(range(30))


def answer(largest_write: int, pages: int) -> bytes:
    """What libfuse says when a file system is mounted: fuse_out_header and fuse_init_out."""
    return INIT.pack(INIT.size + len(REST), 0, 1, 7, 38, 131072, 1 << 5, 12, 9, largest_write, 1, pages) + REST


def test_no_request_is_agreed_on_that_is_larger_than_a_buffer() -> None:
    assert limited(answer(4 << 20, 1024)) == answer(512 << 10, 128)


def test_what_is_small_enough_is_left_as_it_is() -> None:
    assert limited(answer(128 << 10, 32)) == answer(128 << 10, 32)


def test_a_refusal_is_handed_on() -> None:
    refusal = struct.pack("=IiQ", 16, -71, 1)
    assert limited(refusal) == refusal


# Replies that are spliced. Another pipe stands for the kernel's device, from which can be read what it was given.


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    made = Pipe()
    yield made
    made.close()


@pytest.fixture
def device() -> Iterator[tuple[int, int]]:
    ends = Pipe()
    yield ends._out, ends._in
    with suppress(OSError):
        ends.close()


@pytest.fixture
def file(tmp_path: Path) -> Iterator[File]:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(LARGEST + 9000))
    opened = File(os.open(path, os.O_RDWR), str(path))
    yield opened
    opened.close()


@pytest.mark.parametrize(("position", "length"), [(0, LARGEST), (4095, LARGEST), (8999, LARGEST), (5, 1), (4095, 2)])
def test_a_spliced_reply_is_the_header_and_the_bytes(
    pipe: Pipe, device: tuple[int, int], file: File, position: int, length: int
) -> None:
    assert pipe.answer(device[1], b"header", file, position, length)
    assert os.read(device[0], 1 << 20) == b"header" + os.pread(file.fd, length, position)


def test_what_the_page_cache_has_not_got_is_not_waited_for(pipe: Pipe, device: tuple[int, int], file: File) -> None:
    os.fdatasync(file.fd)
    os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_DONTNEED)
    assert not pipe.answer(device[1], b"header", file, 0, LARGEST)
    with pytest.raises(BlockingIOError):
        os.read(device[0], 1)


def test_nothing_is_left_of_a_reply_that_was_not_to_be(pipe: Pipe, device: tuple[int, int], file: File) -> None:
    os.ftruncate(file.fd, 10_000)
    assert not pipe.answer(device[1], b"header", file, 8192, 4096)  # the page is there, and the file ends within it
    assert pipe.answer(device[1], b"header", file, 0, 4096)
    assert os.read(device[0], 1 << 20) == b"header" + os.pread(file.fd, 4096, 0)


def test_nothing_is_left_of_a_reply_that_nobody_wants(pipe: Pipe, device: tuple[int, int], file: File) -> None:
    ended = os.pipe()
    os.close(ended[0])
    with pytest.raises(OSError, match=os.strerror(errno.EPIPE)):
        pipe.answer(ended[1], b"header", file, 0, 4096)
    os.close(ended[1])
    assert pipe.answer(device[1], b"next", file, 4096, 4096)
    assert os.read(device[0], 1 << 20) == b"next" + os.pread(file.fd, 4096, 4096)


def test_where_the_kernel_does_not_tell_what_is_cached_nothing_is_spliced(pipe: Pipe, device: tuple[int, int], file: File) -> None:
    pipe.usable = False
    assert not pipe.answer(device[1], b"header", file, 0, 4096)
