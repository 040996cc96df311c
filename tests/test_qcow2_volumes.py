"""qcow2 images as the disks of both sides, mounted: replication, kills, locks against QEMU's own programs, and memory."""

import itertools
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
from disks import qemu_img
from harness import LINK_LOST, Side, Sides, replfs, run, wait_for
from volumes import config

from replfs.block.replication.rules import Mode
from replfs.volume.secondary import SecondaryVolume

SIZE = 4 << 20
KIB = 1024


def content(seed: int) -> bytes:
    """Data that compresses, with a quarter of zeroes."""
    words = random.Random(seed).randbytes(SIZE // 32)
    return bytes(SIZE // 4) + b"".join(words[i : i + 8] * 2 for i in range(0, len(words), 8))[: SIZE // 16] * 12


def compressed_over_a_base(path: Path, data: bytes) -> Path:
    """A compressed image over a raw backing file, as cloud images and their copies are."""
    base, whole = path.with_suffix(".base"), path.with_suffix(".whole")
    base.write_bytes(data[: SIZE // 2] + content(99)[SIZE // 2 : -KIB])
    whole.write_bytes(data)
    qemu_img("convert", "-c", "-O", "qcow2", "-B", base, "-F", "raw", whole, path)
    whole.unlink()
    return path


def on_disk(image: Path) -> bytes:
    """What QEMU reads from an image that may be in use."""
    raw = image.with_suffix(".read")
    qemu_img("convert", "-U", "-f", "qcow2", "-O", "raw", image, raw)
    return raw.read_bytes()


def write(side: Side, offset: int, data: bytes) -> None:
    with side.file.open("r+b", buffering=0) as file:
        file.seek(offset)
        assert file.write(data) == len(data)
        os.fsync(file.fileno())


def secondary(sides: Sides, disk: Path, *, mounted: bool = True) -> Side:
    side = sides.make("secondary", disk, "--listen", f"unix:{sides.socket}", "--format", "qcow2")
    if mounted:
        side.mount()
    return side


def primary(sides: Sides, disk: Path) -> Side:
    """Linked: what it answers is on both sides."""
    target = f"nbd+unix:///disk?socket={sides.socket}"
    side = sides.make("primary", disk, "--target", target, "--format", "qcow2", "--protocol", "sync", "--initial-sync", "none")
    side.mount()
    side.until_connected()
    return side


def nbdsh(sides: Sides, script: str, *, check: bool = True) -> str:
    """Have libnbd's shell write to the secondary, as a primary does. What it said on standard error."""
    plain = {**os.environ, "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}  # its own Python, which has the module nbd
    return run("nbdsh", "-u", f"nbd+unix:///disk?socket={sides.socket}", "-c", script, check=check, env=plain).stderr


@pytest.fixture
def pair(sides: Sides) -> tuple[Side, Side]:
    """A primary and a secondary of equal content, each a compressed image over a backing file."""
    data = content(1)
    far, near = (compressed_over_a_base(sides.folder / f"{name}.qcow2", data) for name in ("far", "near"))
    second = secondary(sides, far)
    return primary(sides, near), second


def test_both_sides_replicate_qcow2_images(pair: tuple[Side, Side]) -> None:
    near, far = pair
    model = bytearray(content(1))
    write(near, 100_000, b"n" * 70_000)
    model[100_000:170_000] = b"n" * 70_000
    assert far.content() == content(1)
    assert on_disk(far.disk) == bytes(model)
    far.set("checkpoint")
    assert far.content() == near.content() == bytes(model)
    write(far, 3_000_000, b"f" * 5000)
    write(near, 1000, b"later")
    view = bytearray(model)
    view[3_000_000:3_005_000] = b"f" * 5000
    assert far.content() == bytes(view)
    active = far.status()["overlays"]["active"]["path"]
    assert on_disk(Path(active)) == bytes(view)
    near.expected += LINK_LOST
    far.set("failover")
    far.until_stage("done")
    assert far.content() == on_disk(far.disk) == bytes(view)
    near.umount()
    far.umount()
    for side in pair:
        assert "No errors were found" in qemu_img("check", side.disk)


def test_a_killed_secondary_resumes_over_a_qcow2_image(sides: Sides) -> None:
    far = secondary(sides, compressed_over_a_base(sides.folder / "far.qcow2", content(1)))
    write(far, 12_345, b"v" * 100_000)
    view = far.content()
    far.kill()
    far.mount("--format", "qcow2")
    assert far.content() == view
    far.set("failover")
    far.until_stage("done")
    assert on_disk(far.disk) == view


def test_the_status_tells_every_file_with_its_format_and_room(sides: Sides) -> None:
    far = secondary(sides, compressed_over_a_base(sides.folder / "far.qcow2", content(1)))
    write(far, 0, b"x" * 100_000)
    status = far.status()
    files = [status["disk"], *status["backing"], *status["overlays"].values()]
    assert [file["format"] for file in files] == ["qcow2", "raw", "qcow2", "qcow2"]
    assert [Path(file["path"]).name for file in files] == ["far.qcow2", "far.base", "active.0.qcow2", "hidden.0.qcow2"]
    for file in files:
        assert file["allocated"] == Path(file["path"]).stat().st_blocks * 512
    shown = replfs("status", far.point).stdout
    assert re.search(r"^backing: +\S+far\.base, raw, [\d.]+ MiB allocated$", shown, re.MULTILINE)
    assert re.search(r"^disk: +\S+far\.qcow2, qcow2, [\d.]+ .iB allocated$", shown, re.MULTILINE)


def test_all_images_of_a_volume_share_one_cache(sides: Sides) -> None:
    """So that --cache-size is what it says: the disk's tables and the overlays' are counted together."""
    disk = compressed_over_a_base(sides.folder / "far.qcow2", content(1))
    settings = config(sides.folder, Mode.SECONDARY, disk=disk, state_dir=sides.folder / "state")
    volume = SecondaryVolume(settings, "qcow2")
    assert volume.cache.used == 0
    assert trio.run(volume.disk.read, SIZE // 2, 512) == content(1)[SIZE // 2 :][:512]
    assert volume.cache.used > 0
    volume.disk.release()
    volume.directory.close()
    assert volume.cache.used == 0


def test_an_external_data_file_is_shown(sides: Sides) -> None:
    disk = sides.folder / "far.qcow2"
    qemu_img("create", "-f", "qcow2", "-o", f"data_file={sides.folder / 'far.data'}", disk, str(SIZE))
    far = secondary(sides, disk)
    assert Path(far.status()["disk"]["data-file"]["path"]).name == "far.data"
    assert "data in" in replfs("status", far.point).stdout


@pytest.mark.parametrize("cluster", ["4k", "64k", "2M"])
def test_forwarded_zeroes_give_room_back(sides: Sides, cluster: str) -> None:
    disk, whole = sides.folder / "far.qcow2", sides.folder / "whole"
    whole.write_bytes(content(1))
    qemu_img("convert", "-O", "qcow2", "-o", f"cluster_size={cluster}", whole, disk)
    far = secondary(sides, disk)
    before = disk.stat().st_blocks
    nbdsh(sides, f"h.zero({SIZE}, 0); h.flush()")
    assert before - disk.stat().st_blocks >= SIZE * 3 // 4 // 512 - 64, "but for what the file system needs to remember holes"
    assert on_disk(disk) == bytes(SIZE)
    assert far.content() == content(1)


# Locks


def test_qemu_does_not_write_to_what_replfs_has_open_and_reads_it_when_told(pair: tuple[Side, Side]) -> None:
    for side in pair:
        for file in (side.disk, side.disk.with_suffix(".base")):
            kind = "raw" if file.suffix == ".base" else "qcow2"
            refused = run("qemu-io", "-f", kind, "-c", "write 0 512", file, check=False)
            assert refused.returncode != 0
            assert 'Failed to get "write" lock' in refused.stderr or 'Failed to get shared "write" lock' in refused.stderr
        qemu_img("info", "-U", side.disk)
    overlay = pair[1].status()["overlays"]["hidden"]["path"]
    assert "lock" in run("qemu-io", "-c", "write 0 512", overlay, check=False).stderr


@contextmanager
def held_by_qemu(image: Path, *options: str) -> Iterator[None]:
    """QEMU has the image open."""
    command = ["qemu-io", "-f", "qcow2", *options, str(image)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=0) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("length\n")
        assert wait_for(lambda: process.stdout.read(8), "qemu-io's answer")
        yield
        process.stdin.write("quit\n")
        process.communicate(timeout=60)


def test_replfs_does_not_open_what_qemu_writes_to(sides: Sides) -> None:
    disk = compressed_over_a_base(sides.folder / "far.qcow2", content(1))
    side = secondary(sides, disk, mounted=False)
    with held_by_qemu(disk):
        refused = replfs("secondary", disk, side.point, *side.arguments, check=False)
        assert re.fullmatch(rf"replfs: error: {disk} is in use by another process[^\n]+\n", refused.stderr)
        assert refused.returncode == 1
    side.mount()


def test_readers_of_one_backing_file_do_not_disturb_each_other(sides: Sides) -> None:
    disk = compressed_over_a_base(sides.folder / "far.qcow2", content(1))
    other = sides.folder / "other.qcow2"
    qemu_img("create", "-f", "qcow2", "-b", disk.with_suffix(".base"), "-F", "raw", other)
    far = secondary(sides, disk)
    with held_by_qemu(other):
        assert far.content() == content(1)
    run("qemu-io", "-c", "write 0 512", other)


def test_a_disk_that_is_a_backing_file_of_qemu_s_is_not_written_to(sides: Sides) -> None:
    disk = compressed_over_a_base(sides.folder / "far.qcow2", content(1))
    over = sides.folder / "over.qcow2"
    qemu_img("create", "-f", "qcow2", "-b", disk, "-F", "qcow2", over)
    side = secondary(sides, disk, mounted=False)
    with held_by_qemu(over):
        refused = replfs("secondary", disk, side.point, *side.arguments, check=False)
        assert "is in use by another process, which lets nobody else write it" in refused.stderr
    side.mount()


def test_a_backing_file_that_qemu_writes_to_is_not_opened(sides: Sides) -> None:
    disk = compressed_over_a_base(sides.folder / "far.qcow2", content(1))
    side = secondary(sides, disk, mounted=False)
    base = disk.with_suffix(".base")
    with held_by_qemu(base, "-f", "raw"):
        assert (
            f"{disk}: its backing file {base} is in use"
            in replfs("secondary", disk, side.point, *side.arguments, check=False).stderr
        )
    side.mount()


# What an image may name


def test_a_backing_file_elsewhere_needs_to_be_allowed(sides: Sides) -> None:
    elsewhere = sides.folder / "elsewhere"
    elsewhere.mkdir()
    base = elsewhere / "base.raw"
    base.write_bytes(content(5))
    place = sides.folder / "place"
    place.mkdir()
    disk = place / "far.qcow2"
    qemu_img("create", "-f", "qcow2", "-b", base, "-F", "raw", disk)
    side = secondary(sides, disk, mounted=False)
    refused = replfs("secondary", disk, side.point, *side.arguments, check=False)
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1
    assert f"say --allow-backing {base}" in refused.stderr
    assert not side.state_dir.exists()
    for allowed in (base, elsewhere):
        side.mount("--allow-backing", "/tmp/", "--allow-backing", allowed, "--cache-size", "1M")
        assert side.content() == content(5)
        side.umount()


@pytest.mark.parametrize("name", ["below/base.raw", ".base.raw", "link.raw"])
def test_what_is_hidden_or_below_needs_to_be_allowed_too(sides: Sides, name: str) -> None:
    """Or an image in a home directory could have the guest read what is in .netrc, and write to .bashrc as its data file."""
    (sides.folder / "below").mkdir()
    (sides.folder / "link.raw").symlink_to(".base.raw")
    for base in ("below/base.raw", ".base.raw"):
        (sides.folder / base).write_bytes(content(5))
    disks = [sides.folder / "over.qcow2", sides.folder / "data.qcow2"]
    qemu_img("create", "-f", "qcow2", "-b", name, "-F", "raw", disks[0])
    qemu_img("create", "-f", "qcow2", "-o", f"data_file={sides.folder / name},data_file_raw=on", disks[1], str(SIZE))
    point = sides.folder / "mnt"
    point.mkdir()
    for disk in disks:
        refused = replfs("secondary", disk, point, "--listen", f"unix:{sides.socket}", "--format", "qcow2", check=False)
        assert "say --allow-backing" in refused.stderr


def test_a_long_chain_has_a_status_that_can_be_read(sides: Sides) -> None:
    names = [f"{'n' * 240}{i}" for i in range(190)]
    qemu_img("create", "-f", "raw", sides.folder / names[0], "1M")
    for below, name in itertools.pairwise(names):
        kind = "raw" if below is names[0] else "qcow2"
        qemu_img("create", "-u", "-f", "qcow2", "-b", below, "-F", kind, sides.folder / name, "1M")
    top = sides.folder / "top"
    (sides.folder / names[-1]).rename(top)
    far = secondary(sides, top)
    status = far.status()
    assert (len(status["backing"]), status["more-backing"]) == (8, 181)
    assert "and 181 more backing files" in replfs("status", far.point).stdout


def test_a_disk_that_was_resized_is_told_so(sides: Sides) -> None:
    disk = compressed_over_a_base(sides.folder / "far.qcow2", content(1))
    far = secondary(sides, disk)
    far.umount()
    qemu_img("resize", disk, "+1M")
    refused = replfs("secondary", disk, far.point, *far.arguments, check=False)
    assert f"the disk's size has changed from {SIZE} to {SIZE + (1 << 20)} bytes" in refused.stderr


def test_an_image_with_damage_is_served_and_says_so(sides: Sides) -> None:
    """An L2 entry leads to the L1 table: writing there ends all writing, reading goes on, and the next mount is refused."""
    disk = sides.folder / "far.qcow2"
    whole = sides.folder / "whole"
    whole.write_bytes(content(1))
    qemu_img("convert", "-O", "qcow2", whole, disk)
    with disk.open("r+b") as file:
        file.seek(40)
        l1 = int.from_bytes(file.read(8))
        file.seek(l1)
        l2 = int.from_bytes(file.read(8)) & (1 << 56) - 1
        file.seek(l2 + 8 * (SIZE // 65536 - 2))
        file.write((1 << 63 | l1).to_bytes(8))
    far = secondary(sides, disk, mounted=False)
    far.expected += ["corrupt", "forwarded write failed", "connection"]
    far.mount()
    position = SIZE - 2 * 65536
    assert "Input/output error" in nbdsh(sides, f"h.pwrite(b'x' * 512, {position})", check=False)
    assert "overwrite the L1 table" in far.status()["disk"]["corrupt"]
    assert "CORRUPT" in replfs("status", far.point).stdout
    assert far.content()[: SIZE // 2] == content(1)[: SIZE // 2]
    far.umount()
    info = json.loads(qemu_img("info", "--output=json", disk))
    assert info["format-specific"]["data"]["corrupt"]
    again = replfs("secondary", disk, far.point, *far.arguments, check=False)
    assert "is marked corrupt: repair it with qemu-img check -r all" in again.stderr


def test_an_image_left_dirty_is_repaired_at_the_mount(sides: Sides) -> None:
    disk = sides.folder / "far.qcow2"
    qemu_img("create", "-f", "qcow2", "-o", "lazy_refcounts=on", disk, str(SIZE))
    run("qemu-io", "-c", "write -P 7 64k 1M", "-c", "abort", disk, check=False)
    assert json.loads(qemu_img("info", "--output=json", disk))["dirty-flag"]
    far = secondary(sides, disk, mounted=False)
    far.expected.append("left dirty")
    assert "far.qcow2 was left dirty" in replfs("secondary", disk, far.point, *far.arguments).stderr
    assert far.content()[64 * KIB : 1088 * KIB] == b"\7" * (1024 * KIB)
    assert "far.qcow2 was left dirty" in (far.state_dir / "replfs.log").read_text()
    far.umount()
    assert "No errors were found" in qemu_img("check", disk)
    assert not json.loads(qemu_img("info", "--output=json", disk))["dirty-flag"]


def test_a_qcow2_image_on_another_format_s_state_is_refused(sides: Sides) -> None:
    disk = compressed_over_a_base(sides.folder / "far.qcow2", content(1))
    far = secondary(sides, disk)
    far.umount()
    refused = replfs("secondary", disk, far.point, *far.arguments, "--format", "raw", check=False)
    assert "is the state of another disk" in refused.stderr


# Memory

_WRITER = r"""
import random, re, sys
from pathlib import Path
import trio
import replfs.daemon
from replfs.volume.disk import open_disk

def mib():
    # the most so far; getrusage would also count what the process was before
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) >> 10

node = open_disk(Path(sys.argv[1]), "qcow2")
print(mib())

async def main():
    places = random.Random(1)
    for _ in range(int(sys.argv[2])):
        await node.write(places.randrange(node.size >> 12) << 12, b"x" * 4096)
    await node.close()

trio.run(main)
print(mib())
"""


def test_a_16_tib_image_takes_little_memory(tmp_path: Path) -> None:
    """The caches are full long before that many writes; five times as many take no more."""
    disk = tmp_path / "large.qcow2"
    qemu_img("create", "-f", "qcow2", disk, "16T")
    opened, written = map(int, run(sys.executable, "-c", _WRITER, disk, "20000").stdout.split())
    assert opened < 100
    assert written < 200
    assert "No errors were found" in qemu_img("check", disk)
    disk.unlink()  # several GB that look it, and 1 GB that is
