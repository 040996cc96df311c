"""Disks, overlays and qemu-img for the tests of the block nodes."""

import subprocess
from pathlib import Path

from replfs.block.cache import Cache
from replfs.block.node import Data, Node
from replfs.block.qcow2.image import Image
from replfs.block.qcow2.overlay import create_overlay, open_overlay
from replfs.block.raw import Raw
from replfs.block.storage import Storage


def raw(path: Path, content: bytes | int) -> Raw:
    """A raw disk with this content, or of this size and empty."""
    with path.open("wb") as file:
        file.truncate(content) if isinstance(content, int) else file.write(content)
    return Raw(Storage().open(str(path), writable=True))


def overlay(path: Path, backing: Raw | Image, cache: Cache | None = None) -> Image:
    create_overlay(Storage(), str(path), backing.size, f"./{Path(backing.file.path).name}", backing.format)
    return open_overlay(Storage(), str(path), backing, cache or Cache())


async def put(node: Node, offset: int, data: Data) -> None:
    """Write as the exports do, who first try whether it can be done at once; every other request is one that cannot."""
    if (offset + len(data) >> 9) & 1 or not node.write_at_once(offset, data):
        await node.write(offset, data)


async def get(node: Node, offset: int, length: int) -> bytes:
    """Read as the exports do, at once if that can be; what cannot be read so, or is read twice, is the same."""
    buffer = bytearray(length)
    at_once = node.read_at_once(offset, memoryview(buffer))
    content = bytes(await node.read(offset, length)) if not at_once or offset >> 9 & 1 else bytes(buffer)
    assert not at_once or buffer == content
    return content


def qemu_img(*arguments: str | Path) -> str:
    """Run the real qemu-img; an exit status other than 0 fails the test with what it printed."""
    command = ["qemu-img", *map(str, arguments)]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60
    )
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}"
    return done.stdout


def assert_sound(image: Path) -> None:
    """No error and no leaked cluster."""
    assert "No errors were found" in qemu_img("check", image)


def assert_same_as(image: Path, content: bytes, scratch: Path) -> None:
    """QEMU reads the same bytes from the image and its backing chain (qcow2 counts whole sectors: padded with zeroes)."""
    scratch.write_bytes(content.ljust(len(content) + -len(content) % 512, b"\0"))
    assert "identical" in qemu_img("compare", "-f", "qcow2", "-F", "raw", image, scratch)


def same(got: bytes | bytearray, expected: bytes | bytearray) -> bool:
    """Whether they are equal; else it says where, instead of having pytest print both."""
    if got == expected:
        return True
    first = next(
        (i for i, (one, other) in enumerate(zip(got, expected, strict=False)) if one != other), min(len(got), len(expected))
    )
    raise AssertionError(
        f"different from byte {first} on: {bytes(got[first : first + 16])!r} instead of {bytes(expected[first : first + 16])!r};"
        f" {len(got)} and {len(expected)} bytes"
    )
