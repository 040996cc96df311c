"""The kernel's end of the mount, where a real mount cannot be brought to show it."""

import struct

from replfs.export.device import limited

INIT = struct.Struct("=IiQIIIIHHIIH")
REST = bytes(range(30))


def answer(largest_write: int, pages: int) -> bytes:
    """What libfuse says when a file system is mounted: fuse_out_header and fuse_init_out."""
    return INIT.pack(INIT.size + len(REST), 0, 1, 7, 38, 131072, 1 << 5, 12, 9, largest_write, 1, pages) + REST


def test_no_request_is_agreed_on_that_is_larger_than_a_buffer() -> None:
    assert limited(answer(4 << 20, 1024)) == answer(1 << 20, 256)


def test_what_is_small_enough_is_left_as_it_is() -> None:
    assert limited(answer(128 << 10, 32)) == answer(128 << 10, 32)


def test_a_refusal_is_handed_on() -> None:
    refusal = struct.pack("=IiQ", 16, -71, 1)
    assert limited(refusal) == refusal
