"""Damaged and hostile qcow2 images: they are refused with one line or served as far as they are sound, and do no harm.

Most of this is a fuzzer that knows the format: it changes a few fields of images that qemu-img has made. A case that fails is kept
in the folder damaged/ and replayed from then on. Each case is bounded in time and memory, and may open no file but its own.
"""

import contextlib
import errno
import io
import itertools
import json
import os
import random
import resource
import shlex
import signal
import struct
import subprocess
import sys
import tarfile
import traceback
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import trio
from harness import run

from replfs.block.node import Node
from replfs.errors import ReplfsError
from replfs.volume.disk import open_disk

DAMAGED = Path(__file__).with_name("damaged")
CASES = 140  # for each kind of image
SECONDS = 5  # of the processor's time, lest a busy machine fails a test
WAIT = 30
ROOM = 300 << 20

COPIED = 1 << 63
COMPRESSED = 1 << 62
OFFSET = 0x00FF_FFFF_FFFF_FE00
DIRTY, CORRUPT = 1, 2  # incompatible features

HEADER = {
    "version": (4, 4),
    "backing offset": (8, 8),
    "backing length": (16, 4),
    "cluster bits": (20, 4),
    "size": (24, 8),
    "encryption": (32, 4),
    "L1 entries": (36, 4),
    "L1 offset": (40, 8),
    "refcount table offset": (48, 8),
    "refcount table clusters": (56, 4),
    "snapshots": (60, 4),
    "snapshots offset": (64, 8),
    "incompatible": (72, 8),
    "compatible": (80, 8),
    "autoclear": (88, 8),
    "refcount order": (96, 4),
    "header length": (100, 4),
    "compression": (104, 1),
}
BACKING_FORMAT, FEATURE_NAMES, BITMAPS, DATA_FILE = 0xE2792ACA, 0x6803F857, 0x23852875, 0x44415441

FILL = 'qemu-io -f qcow2 -c "write -P 1 0 40k" -c "write -P 2 100k 70k" -c "write -z 64k 16k" -c "discard 8k 8k" image.qcow2'
CREATE = "qemu-img create -q -f qcow2"
RECIPES = {
    "64k": [f"{CREATE} image.qcow2 1M", FILL],
    "512": [f"{CREATE} -o cluster_size=512 image.qcow2 256k", FILL],
    "v2": [f"{CREATE} -o compat=0.10,cluster_size=4k image.qcow2 1M", FILL, "qemu-img snapshot -c one image.qcow2", FILL],
    "extended": [f"{CREATE} -o cluster_size=16k,extended_l2=on image.qcow2 1M", FILL],
    "refcounts of 1 bit": [f"{CREATE} -o cluster_size=4k,refcount_bits=1 image.qcow2 1M", FILL],
    "refcounts of 64 bits": [f"{CREATE} -o cluster_size=1k,refcount_bits=64 image.qcow2 512k", FILL],
    "snapshots": [
        f"{CREATE} -o cluster_size=4k image.qcow2 1M",
        FILL,
        "qemu-img snapshot -c one image.qcow2",
        'qemu-io -f qcow2 -c "write -P 5 10k 30k" image.qcow2',
        "qemu-img snapshot -c two image.qcow2",
    ],
    "bitmaps": [
        f"{CREATE} -o cluster_size=4k image.qcow2 1M",
        "qemu-img bitmap --add -g 4096 image.qcow2 one",
        FILL,
        "qemu-img bitmap --add --disable image.qcow2 two",
    ],
    "zlib": [
        f"{CREATE} -o cluster_size=4k made.qcow2 1M",
        FILL.replace("image", "made"),
        "qemu-img convert -c -O qcow2 -o cluster_size=4k made.qcow2 image.qcow2",
        'qemu-io -f qcow2 -c "write -P 5 2k 4k" image.qcow2',
        "rm made.qcow2",
    ],
    "zstd": [
        f"{CREATE} made.qcow2 1M",
        FILL.replace("image", "made"),
        "qemu-img convert -c -O qcow2 -o compression_type=zstd made.qcow2 image.qcow2",
        "rm made.qcow2",
    ],
    "over raw": [
        "truncate -s 300k base.raw",
        'qemu-io -f raw -c "write -P 7 0 300k" base.raw',
        f"{CREATE} -o cluster_size=4k -b base.raw -F raw image.qcow2 1M",
        FILL,
    ],
    "over qcow2": [
        f"{CREATE} -o cluster_size=1k base.qcow2 1M",
        FILL.replace("image", "base"),
        f"{CREATE} -o cluster_size=16k,extended_l2=on -b base.qcow2 -F qcow2 image.qcow2 1M",
        'qemu-io -f qcow2 -c "write -P 8 30k 20k" -c "write -z 200k 40k" image.qcow2',
    ],
    "data file": [f"{CREATE} -o cluster_size=4k,data_file=data.raw image.qcow2 1M", FILL],
    "raw data file": [f"{CREATE} -o data_file=data.raw,data_file_raw=on image.qcow2 1M", FILL],
    "dirty": [
        f"{CREATE} -o cluster_size=4k,lazy_refcounts=on image.qcow2 1M",
        FILL.replace("qemu-io", "!qemu-io").replace(" image", " -c abort image"),
    ],
}


def prepare(folder: Path, commands: list[str]) -> None:
    """Run commands in a folder; of one that begins with ! a failure is expected."""
    for command in commands:
        done = run(*shlex.split(command.removeprefix("!")), cwd=folder, check=not command.startswith("!"))
        assert not command.startswith("!") or done.returncode != 0


def made(folder: Path, recipe: str) -> Path:
    """An image in a folder of its own, with the files it needs."""
    folder.mkdir()
    prepare(folder, RECIPES[recipe])
    return folder / "image.qcow2"


class Field(NamedTuple):
    """A big-endian number in a file."""

    offset: int
    width: int

    def get(self, content: bytes | bytearray) -> int:
        return int.from_bytes(content[self.offset : self.offset + self.width], "big")

    def put(self, content: bytearray, value: int) -> None:
        if self.offset + self.width <= len(content):
            content[self.offset : self.offset + self.width] = (value % (1 << 8 * self.width)).to_bytes(self.width, "big")


class Layout:
    """Where the metadata of a sound image lies."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        version = self.word(4, 4)
        names = list(HEADER)[: 12 if version == 2 else None]
        self.fields: dict[str, list[Field]] = {"header": [Field(*HEADER[name]) for name in names]}
        self.cluster = 1 << self.header("cluster bits")
        extended = version == 3 and self.header("incompatible") >> 4 & 1
        self.l2_width = 16 if extended else 8
        self.refcount_bits = 1 << (self.header("refcount order") if version == 3 else 4)
        self.clusters = {"header": 0}
        """Where each kind of metadata lies, one cluster of it."""
        self._extensions(self.header("header length") if version == 3 else 72)
        self.l1 = self._table("L1", self.header("L1 offset"), self.header("L1 entries"))
        self.l2 = self._l2_tables("L2", self.l1)
        table_bytes = self.header("refcount table clusters") * self.cluster
        self.refcount_table = self._table("refcount table", self.header("refcount table offset"), table_bytes // 8)
        for entry in self.refcount_table:
            if block := entry.get(content):
                self._table("refcount block", block, self.cluster // 8)
        if self.header("snapshots"):
            self._snapshots()

    def word(self, offset: int, width: int) -> int:
        return Field(offset, width).get(self.content)

    def header(self, name: str) -> int:
        return Field(*HEADER[name]).get(self.content)

    def _table(self, name: str, offset: int, count: int) -> list[Field]:
        """A table of 64-bit words. What is 0 is mostly left out of the fields, or little else would be damaged."""
        self.clusters[name] = offset & -self.cluster
        words = [Field(offset + 8 * i, 8) for i in range(count)]
        known = self.fields.setdefault(name, [])
        known += [word for i, word in enumerate(words) if word.get(self.content) or i % 64 == 9]
        return words

    def _l2_tables(self, name: str, l1: list[Field]) -> list[list[Field]]:
        tables = []
        for entry in l1:
            offset = entry.get(self.content) & OFFSET
            tables.append(self._table(name, offset, self.cluster // 8) if offset else [])
        return tables

    def entry(self, guest_cluster: int) -> Field:
        """The L2 entry of a cluster of the disk."""
        per_table = self.cluster // self.l2_width
        return self.l2[guest_cluster // per_table][guest_cluster % per_table * self.l2_width // 8]

    def refcount(self, cluster: int) -> Field:
        """The refcount of a cluster of the file (of whole bytes)."""
        width = self.refcount_bits // 8
        block, position = divmod(cluster, self.cluster // width)
        return Field(self.refcount_table[block].get(self.content) + position * width, width)

    def _extensions(self, position: int) -> None:
        known = self.fields.setdefault("extensions", [])
        while kind := self.word(position, 4):
            length = self.word(position + 4, 4)
            words = [Field(position + 8 + at, 8) for at in range(0, min(length, 64), 8)]
            known += [Field(position, 4), Field(position + 4, 4), *words]
            if kind == BITMAPS:
                self.fields["bitmap extension"] = [Field(position + 8, 4), *words[1:]]
                self._bitmaps(self.word(position + 24, 8), self.word(position + 8, 4))
            position += 8 + length + -length % 8
        known.append(Field(position, 4))

    def _bitmaps(self, position: int, count: int) -> None:
        self.clusters["bitmap directory"] = position & -self.cluster
        known = self.fields.setdefault("bitmap directory", [])
        for _ in range(count):
            known += [Field(position + at, width) for at, width in ((0, 8), (8, 4), (12, 4), (16, 1), (17, 1), (18, 2), (20, 4))]
            self._table("bitmap table", self.word(position, 8), self.word(position + 8, 4))
            length = 24 + self.word(position + 20, 4) + self.word(position + 18, 2)
            position += length + -length % 8

    def _snapshots(self) -> None:
        position = self.header("snapshots offset")
        self.clusters["snapshot table"] = position & -self.cluster
        known = self.fields.setdefault("snapshot table", [])
        for _ in range(self.header("snapshots")):
            places = ((0, 8), (8, 4), (12, 2), (14, 2), (16, 4), (20, 4), (24, 8), (32, 4), (36, 4), (40, 8), (48, 8))
            known += [Field(position + at, width) for at, width in places]
            l1 = self._table("inactive L1", self.word(position, 8), self.word(position + 8, 4))
            self._l2_tables("inactive L2", l1)
            length = 40 + sum(self.word(position + at, width) for at, width in ((36, 4), (12, 2), (14, 2)))
            position += length + -length % 8

    def damage(self, choose: random.Random) -> bytes:
        """The image with one to four changes, mostly to metadata."""
        damaged = bytearray(self.content)
        for _ in range(choose.randint(1, 4)):
            fields = self.fields[choose.choice(list(self.fields))]
            field = choose.choice(fields)
            match choose.randrange(20):
                case 0:
                    del damaged[choose.randrange(len(damaged)) :]
                case 1:
                    byte = Field(choose.randrange(min(self.cluster, 512)), 1)
                    byte.put(damaged, byte.get(damaged) ^ 1 << choose.randrange(8))
                case 2 | 3:
                    other = choose.choice(fields)
                    one, two = field.get(damaged), other.get(damaged)
                    other.put(damaged, one)
                    field.put(damaged, two)
                case 4:
                    cluster = Field(field.offset & -self.cluster, self.cluster)
                    cluster.put(damaged, choose.choice((0, -1)))
                case 5 | 6:
                    field.put(damaged, field.get(damaged) ^ 1 << choose.randrange(8 * field.width))
                case _:
                    field.put(damaged, self._value(field, choose))
        return bytes(damaged)

    def _value(self, field: Field, choose: random.Random) -> int:
        old, bits, length = field.get(self.content), 8 * field.width, len(self.content)
        places = (0, *self.clusters.values(), field.offset & -self.cluster, length - self.cluster, length, length + self.cluster)
        place = choose.choice(places)
        numbers = (0, 1, -1, old + 1, old - 1, 2 * old, old // 2, 1 << bits - 1, (1 << bits - 1) - 1, choose.getrandbits(bits))
        edges = (1 << choose.randrange(bits), (1 << 56) - self.cluster, (1 << 40) + self.cluster, choose.randrange(length))
        pointers = (place, place | COPIED, place | COPIED, place | COMPRESSED | choose.getrandbits(8) << 54, place | COPIED | 1)
        unaligned = (place + choose.choice((1, 8, 256, 512)), (place + 512) | COPIED, old + 512, old ^ COPIED, old ^ COMPRESSED)
        return choose.choice(choose.choice((numbers, edges, pointers, unaligned)))


class Harm(BaseException):
    """Not an Exception, lest what is tested catches it."""


opened: list[str] | None = None
"""Files that were opened since this was last set to a list."""


def note_open(event: str, arguments: tuple[Any, ...]) -> None:
    """O_PATH only finds a file."""
    if opened is not None and event == "open" and isinstance(arguments[0], str | bytes) and not arguments[2] & os.O_PATH:
        opened.append(os.path.realpath(os.fsdecode(arguments[0])))


sys.addaudithook(note_open)


@contextlib.contextmanager
def harmless(*files: Path) -> Iterator[None]:
    """What is done in here ends soon, takes little memory, and opens no file but these."""
    global opened

    def too_long(*_: object) -> None:
        raise Harm(f"it does not end within {SECONDS} seconds of work or {WAIT} of waiting")

    limits = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    timers = ((signal.ITIMER_PROF, signal.SIGPROF, SECONDS), (signal.ITIMER_REAL, signal.SIGALRM, WAIT))
    handlers = {number: signal.signal(number, too_long) for _, number, _ in timers}
    resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, limits[1]))
    for timer, _, seconds in timers:
        signal.setitimer(timer, seconds, 1)
    opened = []
    try:
        yield
    finally:
        seen, opened = opened, None
        for timer, number, _ in timers:
            signal.setitimer(timer, 0)
            signal.signal(number, handlers[number])
        resource.setrlimit(resource.RLIMIT_AS, limits)
    allowed = {os.path.realpath(file) for file in files}
    strangers = [path for path in seen if path not in allowed and not path.endswith((".py", ".pyc"))]
    if strangers:
        raise Harm(f"it opened {strangers}")


def held(folder: Path) -> set[str]:
    """The descriptors of files in a folder that this process has open."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one of listdir
            if os.readlink(f"/proc/self/fd/{fd}").startswith(f"{folder}/"):
                found.add(fd)
    return found


def refused(image: Path, *arguments: Any, **options: Any) -> str:
    """Why an image is refused: a ReplfsError of one line that names it, or the link of its chain that is at fault."""
    before = held(image.parent)
    with pytest.raises(ReplfsError) as caught:
        trio.run(open_disk(image, "qcow2", *arguments, **options).close)
    assert held(image.parent) == before
    message = str(caught.value)
    assert "\n" not in message
    assert str(image.parent) in message
    return message


async def request(call: Callable[..., Any], *arguments: Any) -> Any:
    """A request's answer, None if it raised OSError, which is the one thing it may raise."""
    try:
        with trio.fail_after(WAIT):
            return await call(*arguments)
    except OSError:
        return None


async def exercise(image: Path, choose: random.Random) -> None:
    """Use an image in all ways, whatever it is."""
    try:
        node = open_disk(image, "qcow2")
    except ReplfsError as error:
        if "\n" in str(error) or str(image.parent) not in str(error):
            raise AssertionError("a refusal is one line and names the file") from error
        return
    try:
        await look(node, choose)
        for _ in range(6):
            offset = choose.randrange(node.size)
            length = min(choose.choice((1, 512, 4096, 70_000)), node.size - offset)
            match choose.choice(("write", "write", "zeroes", "keep", "discard")):
                case "write":
                    await request(node.write, offset, bytes([choose.randrange(256)]) * length)
                case "zeroes":
                    await request(node.write_zeroes, offset, length)
                case "keep":
                    await request(node.write_zeroes, offset, length, False)
                case "discard":
                    await request(node.discard, offset, length)
            await read_back(node, choose)
        await look(node, choose)
        await request(node.flush)
    finally:
        await node.close()


async def read_back(node: Node, choose: random.Random) -> None:
    """What was written is there. It lies within one cluster of any size: two can share their place in a damaged image."""
    offset = choose.randrange(max(1, node.size // 512)) * 512
    data = choose.randbytes(min(512, node.size - offset))
    if await request(lambda: tell(node.write(offset, data))):
        got = await request(node.read, offset, len(data))
        assert got is None or got == data, "what was written is not read back"


async def tell(done: Any) -> bool:
    await done
    return True


async def look(node: Node, choose: random.Random) -> None:
    """Read all of a small disk, parts of a large one; the extents of both."""
    step = 40_000
    starts = list(range(0, node.size, step))
    if len(starts) > 50:
        starts = [*starts[:20], *(choose.randrange(node.size) for _ in range(20)), max(0, node.size - step)]
    for start in starts:
        length = min(step, node.size - start)
        got = await request(node.read, start, length)
        assert got is None or len(got) == length, "a read of another length than asked for"
    start = 0 if node.size <= 4 << 20 else choose.randrange(node.size - (4 << 20))
    stop = min(node.size, start + (4 << 20))
    while start < stop:
        found = await request(node.extents, start, stop - start, choose.choice((1, 2, 1000)))
        if found is None:
            break
        assert found, "no extents"
        assert all(extent.length > 0 for extent in found), "an empty extent"
        start += sum(extent.length for extent in found)
    else:
        assert start == stop, "more extents than were asked for"


def replay(folder: Path, files: dict[str, bytes], name: str) -> str | None:
    """Use damaged files; what harm it did, None if none."""
    for path in folder.iterdir():
        path.unlink()
    for file, content in files.items():
        (folder / file).write_bytes(content)
    image = folder / "image.qcow2"
    before = held(folder)
    try:
        with harmless(*(folder / file for file in files)):
            for _ in range(2):  # what the first has made of it is as harmless
                trio.run(exercise, image, random.Random(name))
        assert held(folder) == before, "a file was left open"
        after = {path.name: path for path in folder.iterdir()}
        assert after.keys() == files.keys(), f"there are other files now: {sorted(after)}"
        for file, content in files.items():
            assert file in ("image.qcow2", "data.raw") or after[file].read_bytes() == content, f"{file} was changed"
        with image.open("rb") as changed:
            assert unchanging(changed.read(512)) == unchanging(files["image.qcow2"][:512]), "the header was overwritten"
        assert image.stat().st_blocks * 512 < 32 << 20, "it takes a lot of room"
    except (Exception, Harm) as error:
        return f"{name}: {''.join(traceback.format_exception(error)[-6:])}"
    return None


def unchanging(header: bytes) -> bytes:
    """Without the place of the refcount table, and the feature bits that a writer changes."""
    content = bytearray(header)
    version = Field(*HEADER["version"]).get(content)
    features = ("incompatible", "autoclear") if version == 3 else ()
    for name in ("refcount table offset", "refcount table clusters", *features):
        Field(*HEADER[name]).put(content, 0)
    return bytes(content)


def keep(files: dict[str, bytes], name: str) -> None:
    with tarfile.open(DAMAGED / f"{name}.tar.gz", "w:gz") as archive:
        for file, content in files.items():
            member = tarfile.TarInfo(file)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_damaged_image_does_no_harm(tmp_path: Path, recipe: str) -> None:
    made(tmp_path / "made", recipe)
    sound = {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()}
    layouts = {file: Layout(content) for file, content in sound.items() if file.endswith("qcow2")}
    folder = tmp_path / "case"
    folder.mkdir()
    harm = [replay(folder, sound, recipe)]
    for seed in range(CASES):
        name = f"{recipe.replace(' ', '-')}-{seed}"
        choose = random.Random(name)
        files = dict(sound)
        for file in choose.sample(list(layouts), choose.randint(1, len(layouts))):
            files[file] = layouts[file].damage(choose)
        if choose.randrange(10) == 0:
            victim = choose.choice(list(files))
            files[victim] = files[victim][: choose.randrange(len(files[victim]) + 1)]
        if done := replay(folder, files, name):
            keep(files, name)
            harm.append(done)
    found = [report for report in harm if report]
    assert not found, f"{len(found)} of {CASES}:\n" + "\n".join(found[:5])


def test_kept_cases(tmp_path: Path) -> None:
    """Every image that once did harm."""
    harm = []
    for case in sorted(DAMAGED.glob("*.tar.gz")):
        with tarfile.open(case) as archive:
            files = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
        harm.append(replay(tmp_path, files, case.name.removesuffix(".tar.gz")))
    found = [report for report in harm if report]
    assert not found, "\n".join(found)


# Directed damage


def patch(image: Path, field: Field, value: int) -> None:
    with image.open("r+b") as file:
        file.seek(field.offset)
        file.write((value % (1 << 8 * field.width)).to_bytes(field.width, "big"))


def patch_header(image: Path, **values: int) -> None:
    for name, value in values.items():
        patch(image, Field(*HEADER[name.replace("_", " ")]), value)


def name_files(image: Path, backing: bytes = b"", backing_format: bytes | None = None, data_file: bytes | None = None) -> None:
    """Have a version 3 header name these files, and no others, as no qemu-img would."""
    content = bytearray(image.read_bytes())
    layout = Layout(bytes(content))
    start = layout.header("header length")
    extensions = b""
    for kind, data in ((BACKING_FORMAT, backing_format), (DATA_FILE, data_file)):
        if data is not None:
            extensions += struct.pack(">II", kind, len(data)) + data + bytes(-len(data) % 8)
    extensions += bytes(8)
    content[start : layout.cluster] = (extensions + backing).ljust(layout.cluster - start, b"\0")
    image.write_bytes(content)
    features = layout.header("incompatible") & ~4 | (0 if data_file is None else 4)
    patch_header(image, backing_offset=(start + len(extensions)) * bool(backing), backing_length=len(backing))
    patch_header(image, incompatible=features)


async def content_of(node: Node) -> bytes:
    return b"".join([bytes(await node.read(start, min(1 << 20, node.size - start))) for start in range(0, node.size, 1 << 20)])


def content_by_qemu(image: Path, *options: str) -> bytes:
    scratch = image.with_suffix(".content")
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", *options, image, scratch)
    content = scratch.read_bytes()
    scratch.unlink()
    return content


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    return tmp_path / "images"


SIZE = 5 << 20


@pytest.fixture
def image(folder: Path) -> Path:
    """4 KiB clusters, two L2 tables of its own, and a snapshot with others."""
    fill = 'qemu-io -f qcow2 -c "write -P {0} 0 40k" -c "write -P {0} 2M 40k" image.qcow2'
    commands = [f"{CREATE} -o cluster_size=4k image.qcow2 {SIZE}", fill.format(1), "qemu-img snapshot -c one image.qcow2"]
    prepare(folder, [*commands, fill.format(2)])
    return folder / "image.qcow2"


TABLES = ["L1", "refcount table", "refcount block", "L2", "snapshot table", "inactive L1"]
METADATA = ["header", *TABLES]

OUTSIDE: dict[str, bytes] = {
    "absolute": b"<outside>/secret.raw",
    "upwards": b"../outside/secret.raw",
    "to and fro": b"./../images/../outside/secret.raw",
    "with file:": b"file:../outside/secret.raw",
    "absolute with file:": b"file:<outside>/secret.raw",
    "link": b"link",
    "link in a row": b"link to link",
    "folder that is a link": b"folder/secret.raw",
    "device": b"/dev/zero",
    "device of QEMU's": b"host_device:/dev/zero",
    "descriptor": b"/proc/self/fd/0",
    "process": b"/proc/self/mem",
    "json": b'json:{"driver":"raw","file":{"driver":"file","filename":"<outside>/secret.raw"}}',
    "deep json": b"json:" + b"[" * 1000,
    "nbd": b"nbd://127.0.0.1:1/disk",
    "nbd of old": b"nbd:unix:<outside>/socket",
    "fat": b"fat:rw:<outside>",
    "fifo": b"fifo",
    "socket": b"socket",
    "folder itself": b".",
    "folder above": b"..",
    "image itself": b"image.qcow2",
    "image by a link": b"self",
    "image by a hard link": b"hard",
    "missing": b"missing",
    "NUL": b"inside\0.raw",
    "newline": b"in\nside",
    "not UTF-8": b"\xff\xfe\x80",
    "long": b"n" * 700,
}


@pytest.mark.parametrize("role", ["backing raw", "backing qcow2", "data file"])
@pytest.mark.parametrize("name", OUTSIDE)
def test_only_files_beside_the_image_are_opened(folder: Path, name: str, role: str) -> None:
    """What an image names may be a stranger's choice: nothing else is opened, not even to look what it is."""
    outside = folder.parent / "outside"
    outside.mkdir()
    image = folder / "image.qcow2"
    prepare(folder, [f"{CREATE} image.qcow2 1M", "truncate -s 1M inside.raw", "truncate -s 1M ../outside/secret.raw"])
    (folder / "link").symlink_to(outside / "secret.raw")
    (folder / "link to link").symlink_to("link")
    (folder / "folder").symlink_to("../outside")
    (folder / "self").symlink_to("image.qcow2")
    (folder / "hard").hardlink_to(image)
    os.mkfifo(folder / "fifo")
    os.mknod(folder / "socket", 0o140600)
    target = OUTSIDE[name].replace(b"<outside>", os.fsencode(outside))
    if role == "data file":
        name_files(image, data_file=target)
    else:
        name_files(image, target, role.removeprefix("backing ").encode())
    with harmless(image, folder / "hard", folder / "fifo", folder / "socket", folder):
        refused(image)


def test_a_file_beside_the_image_is_opened(folder: Path) -> None:
    """So that what is refused above is refused for what it names."""
    image = folder / "image.qcow2"
    prepare(folder, [f"{CREATE} image.qcow2 1M", 'qemu-img create -q -f raw "in side.raw" 1M'])
    prepare(folder, ['qemu-io -f raw -c "write -P 3 0 1M" "in side.raw"'])
    for name in (b"in side.raw", b"./in side.raw", os.fsencode(folder / "in side.raw")):
        name_files(image, name, b"raw")
        with harmless(image, folder / "in side.raw"):
            assert trio.run(read_and_close, open_disk(image, "qcow2")) == b"\3" * (1 << 20)


async def read_and_close(node: Node) -> bytes:
    content = await content_of(node)
    await node.close()
    return content


@pytest.mark.parametrize("disk_format", ["raw", "qcow2"])
def test_a_backing_file_elsewhere_is_opened_if_it_was_allowed(folder: Path, disk_format: str) -> None:
    image, elsewhere = folder / "image.qcow2", folder.parent / f"elsewhere.{disk_format}"
    prepare(folder, [f"qemu-img create -q -f {disk_format} {elsewhere} 1M", f"{CREATE} image.qcow2 1M"])
    prepare(folder, [f'qemu-io -f {disk_format} -c "write -P 3 0 1M" {elsewhere}'])
    before = elsewhere.read_bytes()
    name_files(image, b"../" + os.fsencode(elsewhere.name), disk_format.encode())
    refused(image)
    refused(image, allow_backing=(folder.parent / "other",))
    with harmless(image, elsewhere):
        assert trio.run(read_and_close, open_disk(image, "qcow2", allow_backing=(elsewhere,))) == b"\3" * (1 << 20)
    assert elsewhere.read_bytes() == before


def test_a_loop_of_backing_files_is_refused(folder: Path) -> None:
    names = ["image.qcow2", "b.qcow2", "c.qcow2"]
    prepare(folder, [f"{CREATE} {name} 1M" for name in names])
    for name, below in zip(names, ["b.qcow2", "c.qcow2", "b.qcow2"], strict=True):
        name_files(folder / name, below.encode(), b"qcow2")
    with harmless(*(folder / name for name in names)):
        refused(folder / "image.qcow2")


@pytest.mark.parametrize(("depth", "fits"), [(20, True), (201, False), (1000, False)])
def test_a_chain_of_backing_files_has_an_end(folder: Path, depth: int, fits: bool) -> None:
    image = folder / "0"
    prepare(folder, [f"{CREATE} -o cluster_size=512 0 64k"])
    template = image.read_bytes()
    for i in range(depth):
        (folder / f"{i}").write_bytes(template)
        name_files(folder / f"{i}", f"{i + 1}".encode(), b"qcow2")
    (folder / f"{depth}").write_bytes(template)
    prepare(folder, [f'qemu-io -f qcow2 -c "write -P 9 0 64k" {depth}'])
    with harmless(*(folder / f"{i}" for i in range(depth + 1))):
        if fits:
            assert trio.run(read_and_close, open_disk(image, "qcow2")) == b"\x09" * (64 << 10)
        else:
            refused(image)


def test_a_disk_of_no_bytes_is_refused_with_all_that_it_names(folder: Path) -> None:
    image = folder / "image.qcow2"
    prepare(folder, ["truncate -s 1M base.raw", "truncate -s 1M data.raw", f"{CREATE} -b base.raw -F raw image.qcow2"])
    patch_header(image, size=0)
    refused(image)
    name_files(image, data_file=b"data.raw")
    refused(image)


def test_a_backing_file_of_unknown_format_is_refused(folder: Path) -> None:
    """A raw disk's owner could write a qcow2 header into it that names any file."""
    image = folder / "image.qcow2"
    prepare(folder, [f"{CREATE} image.qcow2 1M", "truncate -s 1M base.raw"])
    name_files(image, b"base.raw", None)
    with harmless(image):
        assert "format" in refused(image)
    name_files(image, b"base.raw", b"vmdk")
    assert "vmdk" in refused(image)


def test_unknown_incompatible_features_are_refused_by_name(image: Path) -> None:
    content = image.read_bytes()
    start = Layout(content).header("header length")
    table = struct.pack(">BB46s", 0, 17, b"frobnicate") + struct.pack(">BB46s", 1, 40, b"harmless")
    patch_header(image, incompatible=1 << 17 | 1 << 40)
    with image.open("r+b") as file:
        file.seek(start)
        file.write(struct.pack(">II", FEATURE_NAMES, len(table)) + table + bytes(8))
    message = refused(image)
    assert "frobnicate" in message
    assert "40" in message
    assert "harmless" not in message  # that is the name of a compatible feature


def test_unknown_features_of_other_kinds_are_no_obstacle(image: Path) -> None:
    """Of the autoclear ones an image that is written tells no more that they hold (specification, "autoclear_features")."""
    patch_header(image, compatible=1 << 33, autoclear=1 << 33)
    expected = content_by_qemu(image)

    async def use() -> None:
        node = open_disk(image, "qcow2")
        assert await content_of(node) == expected
        await node.write(0, b"new")
        await node.close()

    trio.run(use)
    layout = Layout(image.read_bytes())
    assert (layout.header("compatible"), layout.header("autoclear")) == (1 << 33, 0)


@pytest.mark.parametrize("method", ["aes", "luks"])
def test_an_encrypted_image_is_refused(folder: Path, method: str) -> None:
    options = f"encrypt.format={method},encrypt.key-secret=s" + (",encrypt.iter-time=10" if method == "luks" else "")
    command = f"{CREATE} --object secret,id=s,data=secret -o {options} image.qcow2 1M"
    for _ in range(20):  # it measures itself, and gives up on a machine that is busy
        made = subprocess.run(shlex.split(command), cwd=folder, capture_output=True, text=True, check=False, timeout=60)
        if "accurate CPU usage" not in made.stderr:
            break
    assert made.returncode == 0, made.stderr
    assert "encrypt" in refused(folder / "image.qcow2")


def test_an_image_marked_corrupt_is_refused(image: Path) -> None:
    patch_header(image, incompatible=CORRUPT)
    before = image.read_bytes()
    assert "qemu-img check" in refused(image)
    assert image.read_bytes() == before


LIMITS: dict[str, dict[str, int]] = {
    "an L1 table over 32 MiB": {"L1_entries": (32 << 20) // 8 + 1},
    "a refcount table over 8 MiB": {"refcount_table_clusters": (8 << 20) // 65536 + 1},
    "no refcount table": {"refcount_table_clusters": 0},
    "clusters of 256 bytes": {"cluster_bits": 8},
    "clusters of 4 MiB": {"cluster_bits": 22},
    "clusters of a byte": {"cluster_bits": 0},
    "clusters beyond all numbers": {"cluster_bits": 0xFFFF_FFFF},
    "subclusters of 128 bytes": {"cluster_bits": 12, "incompatible": 1 << 4},
    "refcounts of 128 bits": {"refcount_order": 7},
    "refcounts beyond all numbers": {"refcount_order": 0xFFFF_FFFF},
    "too many snapshots": {"snapshots": 65537, "snapshots_offset": 1 << 20},
    "a snapshot table at no cluster": {"snapshots": 1, "snapshots_offset": (1 << 20) + 8},
    "a disk that its L1 table does not cover": {"size": 1 << 40},
    "a disk of 2**64 - 1 bytes": {"size": (1 << 64) - 1},
    "an L1 table at no cluster": {"L1_offset": (1 << 20) + 8},
    "an L1 table at the end of all numbers": {"L1_offset": (1 << 64) - 65536},
    "a refcount table at no cluster": {"refcount_table_offset": (1 << 20) + 8},
    "a refcount table at the end of all numbers": {"refcount_table_offset": (1 << 64) - 65536},
    "version 1": {"version": 1},
    "version 4": {"version": 4},
    "a short header": {"header_length": 96},
    "a header longer than a cluster": {"header_length": 65544},
    "a backing name of 1024 bytes": {"backing_offset": 4096, "backing_length": 1024},
    "a backing name past the first cluster": {"backing_offset": 65530, "backing_length": 100},
    "encryption that nobody knows": {"encryption": 3},
    "compression that nobody knows": {"compression": 2, "incompatible": 1 << 3},
}


@pytest.mark.parametrize("limit", LIMITS)
def test_what_qemu_would_not_open_is_refused(folder: Path, limit: str) -> None:
    image = folder / "image.qcow2"
    prepare(folder, [f"{CREATE} image.qcow2 1M"])
    patch_header(image, **LIMITS[limit])
    os.truncate(image, 80 << 20)  # what is too large for other reasons shall not be refused for being cut off
    assert run("qemu-io", "-f", "qcow2", "-c", "read 0 512", image, check=False).returncode != 0
    with harmless(image):
        refused(image)


BOMBS = {
    "zstd": struct.pack("<IBB", 0xFD2FB528, 0, 0x50) + struct.pack("<I", 0x7A << 24 | 128 << 10 << 3 | 2) * 30000,
    "zstd with a large window": struct.pack("<IBB", 0xFD2FB528, 0, 0xFF) + struct.pack("<I", 0x7A << 24 | 4096 << 3 | 3),
    "zstd with a large content": struct.pack("<IBQ", 0xFD2FB528, 0xE0, 1 << 62) + struct.pack("<I", 0x7A << 24 | 4096 << 3 | 3),
    "zstd of no content": struct.pack("<IBB", 0xFD2FB528, 0, 0x50) + b"\1\0\0",
    "zstd frames without end": struct.pack("<IBB", 0xFD2FB528, 0, 0x50) + b"\1\0\0" + struct.pack("<II", 0x184D2A50, 0) * 15000,
}


@pytest.mark.parametrize("bomb", ["zlib", *BOMBS])
async def test_a_compressed_cluster_that_explodes_takes_little_room(folder: Path, bomb: str) -> None:
    image, size = folder / "image.qcow2", 512 << 10
    compression = bomb.split()[0]
    prepare(folder, [f"{CREATE} -o cluster_size=512k,compression_type={compression} image.qcow2 8M"])
    prepare(folder, ['qemu-io -c "write -P 5 0 1M" image.qcow2'])
    packer = zlib.compressobj(9, zlib.DEFLATED, -12)
    mebibyte = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    place = image.stat().st_size
    with image.open("ab") as file:
        file.write(BOMBS.get(bomb) or mebibyte * 450)
        file.truncate(place + size)
    layout = Layout(image.read_bytes())
    patch(image, layout.entry(0), COMPRESSED | (size // 512 - 1) << 51 | place)
    patch(image, layout.refcount(place // size), 1)
    with harmless(image):
        node = open_disk(image, "qcow2")
        got = await request(node.read, 0, size)
        assert got is None or len(got) == size
        assert_same(await node.read(size, size), b"\5" * size, "the next cluster")
        await request(node.write, 512, b"new")
        await node.write(size, b"new")
        await node.close()


@pytest.mark.parametrize("extended", [False, True])
async def test_a_damaged_l2_entry_is_an_io_error_for_what_it_maps(folder: Path, extended: bool) -> None:
    image, cluster = folder / "image.qcow2", 16 << 10
    prepare(folder, [f"{CREATE} -o cluster_size=16k,extended_l2={'on' if extended else 'off'} image.qcow2 1M"])
    prepare(folder, ['qemu-io -c "write -P 1 0 16k" -c "write -P 2 16k 16k" -c "write -P 3 32k 16k" image.qcow2'])
    entry = Layout(image.read_bytes()).entry(1)
    patch(image, entry, entry.get(image.read_bytes()) | 512)
    node = open_disk(image, "qcow2")
    for offset, length in ((cluster, 4), (0, 3 * cluster), (2 * cluster - 1, 1)):
        with pytest.raises(OSError) as failed:
            await node.read(offset, length)
        assert failed.value.errno == errno.EIO
    for number in (0, 2):
        assert await node.read(number * cluster, cluster) == bytes([number + 1]) * cluster
        await node.write(number * cluster + 100, b"new")
    await node.write(4 * cluster, b"elsewhere")
    with pytest.raises(OSError) as failed:
        await node.write(cluster + 100, b"lost")
    assert failed.value.errno == errno.EIO
    for number in (0, 2):
        assert await node.read(number * cluster + 100, 4) == b"new" + bytes([number + 1])
    await node.close()
    assert image.read_bytes().count(b"lost") == 0


async def test_a_damaged_l1_entry_is_an_io_error_for_what_it_maps(image: Path) -> None:
    span = 2 << 20
    entry = Layout(image.read_bytes()).l1[1]
    patch(image, entry, entry.get(image.read_bytes()) + 512)
    node = open_disk(image, "qcow2")
    with pytest.raises(OSError) as failed:
        await node.read(span, 4)
    assert failed.value.errno == errno.EIO
    with pytest.raises(OSError) as failed:
        await node.extents(span, span, 10)
    assert failed.value.errno == errno.EIO
    assert await node.read(0, 4) == b"\2" * 4
    for offset in (0, 100 << 10, 2 * span):
        await node.write(offset, b"new")
        assert await node.read(offset, 3) == b"new"
    with pytest.raises(OSError) as failed:
        await node.write(span, b"lost")
    assert failed.value.errno == errno.EIO
    assert await node.read(2 * span, 3) == b"new"
    await node.close()


Change = Callable[[Node, int], Any]
CHANGES: dict[str, Change] = {
    "part": lambda node, offset: node.write(offset + 700, b"!" * 100),
    "cluster": lambda node, offset: node.write(offset, b"!" * 4096),
    "run": lambda node, offset: node.write(offset - 4096, b"!" * 3 * 4096),
    "zeroes in part": lambda node, offset: node.write_zeroes(offset + 512, 512),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("target", [*TABLES, "its own L2"])
async def test_a_write_into_metadata_is_stopped(image: Path, target: str, change: str) -> None:
    layout = Layout(image.read_bytes())
    place = layout.l2[0][0].offset if target == "its own L2" else layout.clusters[target]
    victim = 5 * 4096
    patch(image, layout.entry(5), place | COPIED)
    before = image.read_bytes()
    sound = content_by_qemu(image)
    node = open_disk(image, "qcow2")
    with pytest.raises(OSError) as failed:
        await CHANGES[change](node, victim)
    assert failed.value.errno == errno.EIO
    for offset in (0, victim, 1 << 20, 2 << 20, 4 << 20):
        with pytest.raises(OSError):
            await node.write(offset, b"late")
    with pytest.raises(OSError):
        await node.write_zeroes(2 << 20, 4096)
    await request(node.discard, 2 << 20, 4096)
    assert_same(await node.read(0, 4 * 4096), sound[: 4 * 4096], "before what was written")
    assert_same(await node.read(7 * 4096, SIZE - 7 * 4096), sound[7 * 4096 :], "behind what was written")
    await request(node.flush)
    await node.close()
    after = image.read_bytes()
    features = Field(*HEADER["incompatible"])
    for content in (sealed := bytearray(before), found := bytearray(after)):
        features.put(content, 0)
    assert found[place : place + 4096] == sealed[place : place + 4096]
    assert found[:4096] == sealed[:4096]
    assert b"late" not in after
    assert features.get(after) == CORRUPT
    assert json.loads(run("qemu-img", "info", "--output=json", image).stdout)["format-specific"]["data"]["corrupt"]
    assert "qemu-img check" in refused(image)


async def test_a_run_that_leads_from_data_into_metadata_is_stopped(image: Path) -> None:
    """Whole clusters that lie one behind the other are written over at once, of which only the last one is metadata."""
    layout = Layout(image.read_bytes())
    tables = {entries[0].offset for entries in layout.l2 if entries}
    place = next(offset for offset in sorted(tables) if offset - 4096 not in {*tables, *layout.clusters.values(), 0})
    for number, host in ((4, place - 4096), (5, place)):
        patch(image, layout.entry(number), host | COPIED)
    before = image.read_bytes()
    node = open_disk(image, "qcow2")
    await node.write(2 << 20, b"first")  # which is no change of a table, and all right
    with pytest.raises(OSError) as failed:
        await node.write(4 * 4096, b"!" * 2 * 4096)
    assert failed.value.errno == errno.EIO
    await node.close()
    assert image.read_bytes()[place : place + 4096] == before[place : place + 4096]


@pytest.mark.parametrize("target", ["L1", "refcount table", "refcount block"])
async def test_a_version_2_image_has_no_mark_but_is_not_written_either(folder: Path, target: str) -> None:
    image = made(folder / "v2", "v2")
    layout = Layout(image.read_bytes())
    place = layout.clusters[target]
    patch(image, layout.entry(1), place | COPIED)
    before = image.read_bytes()
    node = open_disk(image, "qcow2")
    for offset in (4096, 0, 100 << 10, 4096):
        with pytest.raises(OSError) as failed:
            await node.write(offset, b"!" * 4096)
        assert failed.value.errno == errno.EIO
    await node.close()
    assert image.read_bytes()[place : place + 4096] == before[place : place + 4096]


async def allocate_much(node: Node) -> tuple[dict[int, bytes], set[int]]:
    """Write whole clusters where little is allocated yet: what was acknowledged, and where it failed."""
    taken, failed = {}, set()
    for number in range(60):
        offset = ((1 << 20), (2 << 20), (4 << 20))[number % 3] + number * 8192
        data = bytes([200 + number % 50]) * 4096
        if await request(lambda offset=offset, data=data: tell(node.write(offset, data))):
            taken[offset] = data
        else:
            failed.add(offset)
    return taken, failed


def assert_same(got: bytes, expected: bytes, what: str) -> None:
    """Says where they differ, instead of having pytest print both."""
    assert len(got) == len(expected), what
    if got != expected:
        first = next(i for i, (one, other) in enumerate(zip(got, expected, strict=True)) if one != other)
        raise AssertionError(f"{what}: different from byte {first} on: {got[first:][:16]!r} instead of {expected[first:][:16]!r}")


def assert_metadata_intact(image: Path, layout: Layout) -> None:
    """Nothing else was put where the metadata is: what it said it says, beside what is new."""
    content = image.read_bytes()
    for offset, width in HEADER.values():
        if offset not in (48, 56, 72):  # the refcount table may move when it grows; marked corrupt
            assert Field(offset, width).get(content) == Field(offset, width).get(layout.content)
    assert Layout(content).header("refcount table offset") == layout.header("refcount table offset"), "it need not have grown"
    for table in (layout.l1, layout.refcount_table, layout.fields["inactive L1"], layout.fields["snapshot table"]):
        for entry in table:
            if old := entry.get(layout.content) & ~COPIED:
                assert entry.get(content) & ~COPIED == old
    entries = [*layout.l1, *layout.refcount_table]
    known = {entry.get(layout.content) & OFFSET for entry in entries} | set(layout.clusters.values())
    for place in (entry.get(content) & OFFSET for entry in entries if not entry.get(layout.content)):
        assert place % layout.cluster == 0
        assert not place or place not in known, "a new table lies where another is"


@pytest.mark.parametrize("target", METADATA)
async def test_metadata_that_counts_as_free_is_not_overwritten(image: Path, target: str) -> None:
    layout = Layout(image.read_bytes())
    patch(image, layout.refcount(layout.clusters[target] // 4096), 0)
    layout = Layout(image.read_bytes())
    model = bytearray(content_by_qemu(image))
    snapshot = content_by_qemu(image, "-l", "one")
    node = open_disk(image, "qcow2")
    taken, failed = await allocate_much(node)
    for offset, data in taken.items():
        model[offset : offset + 4096] = data
    by_node = await content_of(node)
    await node.close()
    assert_metadata_intact(image, layout)
    by_qemu = content_by_qemu(image)
    for offset in sorted(set(range(0, SIZE, 4096)) - failed):
        assert_same(by_node[offset : offset + 4096], bytes(model[offset : offset + 4096]), f"read from the node, at {offset}")
        assert_same(by_qemu[offset : offset + 4096], bytes(model[offset : offset + 4096]), f"read by QEMU, at {offset}")
    assert_same(content_by_qemu(image, "-l", "one"), snapshot, "the snapshot")


@pytest.mark.parametrize("target", TABLES)
async def test_metadata_is_not_freed_by_an_entry_that_points_there(image: Path, target: str) -> None:
    layout = Layout(image.read_bytes())
    patch(image, layout.entry(5), layout.clusters[target] | COPIED)
    layout = Layout(image.read_bytes())
    model = bytearray(content_by_qemu(image))
    node = open_disk(image, "qcow2")
    await request(node.discard, 5 * 4096, 4096)
    await request(node.write_zeroes, 5 * 4096, 4096)
    taken, failed = await allocate_much(node)
    await node.close()
    assert_metadata_intact(image, layout)
    for offset, data in taken.items():
        model[offset : offset + 4096] = data
    by_qemu = content_by_qemu(image)
    for offset in sorted(set(range(0, SIZE, 4096)) - failed - {5 * 4096}):
        assert_same(by_qemu[offset : offset + 4096], bytes(model[offset : offset + 4096]), f"at {offset}")


@pytest.mark.parametrize("bitmap", [1, 0xFFFF_FFFF])
async def test_no_data_lies_in_the_header(folder: Path, bitmap: int) -> None:
    """An extended L2 entry can say so: an entry without an offset, and with subclusters that are allocated."""
    image = folder / "image.qcow2"
    prepare(folder, [f"{CREATE} -o extended_l2=on image.qcow2 1M", 'qemu-io -c "write -P 1 0 128k" image.qcow2'])
    entry = Layout(image.read_bytes()).entry(0)
    patch(image, entry, COPIED)
    patch(image, Field(entry.offset + 8, 8), bitmap)
    before = image.read_bytes()[:65536]
    node = open_disk(image, "qcow2")
    for change in (node.write(0, b"!" * 512), node.write(0, b"!" * 65536), node.write_zeroes(0, 512), node.read(0, 512)):
        with pytest.raises(OSError) as failed:
            await change
        assert failed.value.errno == errno.EIO
    await request(node.discard, 0, 65536)
    await request(node.write_zeroes, 0, 65536)
    assert await node.read(65536, 65536) == b"\1" * 65536
    await node.close()
    after = bytearray(image.read_bytes()[:65536])
    Field(*HEADER["incompatible"]).put(after, Field(*HEADER["incompatible"]).get(before))
    assert_same(bytes(after), before, "the header")


@pytest.mark.parametrize("unmap", [True, False])
async def test_what_a_snapshot_shares_is_not_given_back(image: Path, unmap: bool) -> None:
    """Although an entry says, against the refcount, that the cluster is the disk's alone."""
    run("qemu-img", "snapshot", "-c", "two", image)
    content = image.read_bytes()
    layout = Layout(content)
    patch(image, layout.l1[0], layout.l1[0].get(content) | COPIED)
    patch(image, layout.entry(5), layout.entry(5).get(content) | COPIED)
    node = open_disk(image, "qcow2")
    change = node.write_zeroes if unmap else node.discard
    await request(change, 5 * 4096, 4096)
    await node.close()
    place = layout.entry(5).get(content) & OFFSET
    assert_same(image.read_bytes()[place : place + 4096], content[place : place + 4096], "the shared cluster")


# Images that are a burden


def words(*values: int) -> bytes:
    return struct.pack(f">{len(values)}Q", *values)


def place(image: Path, content: bytes) -> int:
    """Put something behind the file's end, at a cluster's beginning; returns where."""
    length = image.stat().st_size
    offset = length + -length % 65536
    with image.open("r+b") as file:
        file.seek(offset)
        file.write(content)
        file.truncate(offset + len(content) + -len(content) % 65536)
    return offset


def many_snapshots(image: Path) -> None:
    """4096 with an L1 table of 32 MiB each, which is always the same."""
    l1 = place(image, b"")
    os.truncate(image, l1 + (32 << 20))
    table = struct.pack(">QIHHIIQII", l1, 4 << 20, 0, 0, 0, 0, 0, 0, 0) * 4096
    patch_header(image, snapshots=4096, snapshots_offset=place(image, table))


def many_bitmaps(image: Path) -> None:
    """40000 with a table of 2**20 clusters each, which is always the same; and a file that could hold them all."""
    table = place(image, words(*range(1 << 20, (1 << 20) + (512 << 20), 512)))
    directory = struct.pack(">QIIBBHI", table, 1 << 20, 0, 1, 16, 0, 0) * 40000
    offset = place(image, directory)
    os.truncate(image, 1 << 40)
    patch_header(image, autoclear=1)
    with image.open("r+b") as file:
        file.seek(Layout(file.read(1 << 20)).header("header length"))
        file.write(struct.pack(">IIIIQQ", BITMAPS, 24, 40000, 0, len(directory), offset) + bytes(8))


def large_l1(image: Path) -> None:
    """The largest there is, every entry another table."""
    entries = 4 << 20
    l1 = place(image, words(*(COPIED | (1 << 30) + 512 * i for i in range(entries))))
    os.truncate(image, (1 << 30) + 512 * entries)
    patch_header(image, L1_entries=entries, L1_offset=l1, size=entries * 512 * 64)


def one_l2(image: Path) -> None:
    """An L1 table that leads to the same L2 table again and again, where every second cluster is zero."""
    content = image.read_bytes()
    layout = Layout(content)
    for entry in layout.l2[0][::2]:
        patch(image, entry, 1)
    entries = 128 << 10
    patch_header(image, L1_offset=place(image, words(*[layout.l1[0].get(content)] * entries)), L1_entries=entries, size=4 << 30)


def large_refcount_table(image: Path) -> None:
    """The largest there is, every entry another block, and every block full."""
    blocks = place(image, b"\xff" * (8 << 20))
    table = place(image, words(*(blocks + 512 * (i % (16 << 10)) for i in range(1 << 20))))
    patch_header(image, refcount_table_offset=table, refcount_table_clusters=(8 << 20) // 512)


def sparse_file(image: Path) -> None:
    """A small image in a file that takes little room and is very long."""
    os.truncate(image, 1 << 40)


BURDENS = [many_snapshots, many_bitmaps, large_l1, one_l2, large_refcount_table, sparse_file]


@pytest.mark.parametrize("dirty", [False, True], ids=["clean", "dirty"])
@pytest.mark.parametrize("burden", BURDENS)
def test_an_image_cannot_ask_for_much_time_or_room(folder: Path, burden: Callable[[Path], None], dirty: bool) -> None:
    """Not even to have its refcounts repaired: what it takes is bounded by the tables that there are, not by what they claim."""
    image = folder / "image.qcow2"
    prepare(folder, [f"{CREATE} -o cluster_size=512 image.qcow2 1M", 'qemu-io -c "write -P 1 0 64k" image.qcow2'])
    burden(image)
    if dirty and burden is not large_l1:  # there are 4 million tables to be read
        patch_header(image, incompatible=DIRTY)
    before = image.stat().st_blocks
    opens = run("qemu-img", "info", image, check=False).returncode == 0
    with harmless(image):
        trio.run(exercise, image, random.Random(1))
    assert (image.stat().st_blocks - before) * 512 < 32 << 20
    assert not opens or run("qemu-img", "info", image, check=False).returncode == 0, "it can be opened no more"


def test_a_chain_cannot_ask_for_much_room(folder: Path) -> None:
    """The largest L1 tables there are, which take no room in their files: they need not take any in memory either."""
    prepare(folder, [f"{CREATE} -o cluster_size=512 image.qcow2 64k"])
    image = folder / "image.qcow2"
    template = image.read_bytes()
    files = [image, *(folder / f"{i}.qcow2" for i in range(20))]
    for file, below in itertools.pairwise(files):
        file.write_bytes(template)
        name_files(file, below.name.encode(), b"qcow2")
        patch_header(file, L1_entries=4 << 20, L1_offset=1 << 20)
        os.truncate(file, 33 << 20)
    files[-1].write_bytes(template)
    with harmless(*files):
        trio.run(exercise, image, random.Random(1))


async def test_extents_are_not_looked_for_beyond_the_limit(folder: Path) -> None:
    image = folder / "image.qcow2"
    prepare(folder, [f"{CREATE} -o cluster_size=512 image.qcow2 1M", 'qemu-io -c "write -P 1 0 64k" image.qcow2'])
    one_l2(image)
    with harmless(image):
        node = open_disk(image, "qcow2")
        assert [extent.length for extent in await node.extents(0, node.size, 3)] == [512] * 3
        assert len(await node.extents(0, node.size, 1000)) == 1000
        await node.close()
