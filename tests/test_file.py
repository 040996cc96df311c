"""A file of the host's: copying from others, and what a sync that fails meanwhile means."""

import errno
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from replfs.block.file import File
from replfs.block.node import Piece

SIZE = 3 << 20


def opened(path: Path, content: bytes) -> File:
    path.write_bytes(content)
    return File(os.open(path, os.O_RDWR), str(path))


@pytest.fixture
def files(tmp_path: Path) -> tuple[File, File]:
    return opened(tmp_path / "from", os.urandom(SIZE)), opened(tmp_path / "to", os.urandom(SIZE))


@pytest.mark.parametrize("refused", [None, errno.EXDEV, errno.EINVAL, errno.EIO])
async def test_pieces_are_copied_by_the_kernel_or_where_it_does_not_by_a_read_and_a_write(
    files: tuple[File, File], monkeypatch: pytest.MonkeyPatch, refused: int | None
) -> None:
    source, target = files
    expected = bytearray(target.read_now(0, SIZE))
    content = source.read_now(0, SIZE)
    pieces = [Piece(source, 4096, 0, 8192), Piece(source, 5, 1 << 20, (1 << 20) + 77), Piece(source, SIZE - 1, 9000, 1)]
    for _, position, offset, length in pieces:
        expected[offset : offset + length] = content[position : position + length]
    if refused is not None:

        def refuse(*_: object) -> int:
            raise OSError(refused, os.strerror(refused))

        monkeypatch.setattr(os, "copy_file_range", refuse)
    await target.copy(pieces)
    assert target.read_now(0, SIZE) == expected


async def test_what_is_not_there_cannot_be_copied(files: tuple[File, File]) -> None:
    source, target = files
    with pytest.raises(OSError, match=f"{source.path} has not got the 4096 bytes from {SIZE - 4095} on") as failed:
        await target.copy([Piece(source, SIZE - 4095, 0, 4096)])
    assert failed.value.errno == errno.EIO


def copy(source: File, target: File) -> Awaitable[None]:
    return target.copy([Piece(source, 0, 0, 8192)])


def zero(_: File, target: File) -> Awaitable[None]:
    return target.write_zeroes(0, 8192, False)


@pytest.mark.parametrize("change", [copy, zero])
async def test_what_a_sync_may_have_lost_while_it_was_written_is_not_taken_for_good(
    files: tuple[File, File], change: Callable[[File, File], Awaitable[None]]
) -> None:
    """The sync fails when the bytes are written, and before that is known: the kernel may have dropped them."""
    source, target = files
    await target.sync()
    sync = target._fdatasync

    async def failing_sync() -> None:
        with pytest.raises(OSError, match="Input/output error"):
            await target.sync()

    def fails() -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    target._fdatasync = fails  # type: ignore[method-assign]

    def and_then(plain: Callable[..., None]) -> Callable[..., None]:
        def both(*arguments: object) -> None:
            plain(*arguments)
            trio.from_thread.run(failing_sync)

        return both

    for name in ("_copy", "_write_zeroes"):
        setattr(target, name, and_then(getattr(target, name)))
    await change(source, target)
    target._fdatasync = sync  # type: ignore[method-assign]
    with pytest.raises(OSError, match="an earlier fdatasync failed"):
        await target.sync()
    target.write(0, bytes(8192))
    await target.sync()
