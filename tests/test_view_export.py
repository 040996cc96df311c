"""The view over NBD, beside the mount or without one: real clients, and both faces at once."""

import errno
import json
import mmap
import os
import random
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from harness import LINK_LOST, REPLFS, Side, Sides, replfs, run, wait_for
from libnbd import Nbd
from test_mount import mapped

SIZE = (8 << 20) + 512
PAGE = 4096


def uri(side: Side) -> str:
    return f"nbd+unix:///view?socket={side.point.parent}/{side.mode}.view"


def mounted(sides: Sides, disk: bytes, *more: str | Path) -> Side:
    return sides.secondary(disk, "--view-listen", f"unix:{sides.folder}/secondary.view", *more)


@contextmanager
def connected(side: Side) -> Iterator[Nbd]:
    client = Nbd(uri(side))
    try:
        yield client
    finally:
        client.close()


def test_it_is_an_export_with_all_that_nbd_has(sides: Sides) -> None:
    side = mounted(sides, b"s" * SIZE)
    info = json.loads(run("nbdinfo", "--json", uri(side)).stdout)["exports"][0]
    assert info["export-name"] == "view"
    assert info["export-size"] == SIZE
    assert not info["is_read_only"]
    for ability in ("can_flush", "can_fua", "can_trim", "can_zero", "can_multi_conn"):
        assert info[ability], ability
    assert "base:allocation" in info["contexts"]
    assert f"unix:{sides.folder}/secondary.view, export 'view', 0 connections" in replfs("status", side.point).stdout
    view = side.status()["view"]
    assert view == {"listen": f"unix:{sides.folder}/secondary.view", "export": "view", "connections": 0}


def test_what_one_face_writes_the_other_reads_at_once(sides: Sides) -> None:
    """Also what the kernel has cached, and what is read ahead; and neither reaches the disk."""
    side = mounted(sides, b"s" * SIZE)
    with connected(side) as client, side.file.open("r+b", buffering=0) as file:
        assert file.read() == b"s" * SIZE  # all of it is cached now
        client.write(5000, b"n" * 1000)
        assert os.pread(file.fileno(), 3000, 4000) == b"s" * 1000 + b"n" * 1000 + b"s" * 1000
        client.write(SIZE - 10, b"f" * 10, fua=True)
        assert os.pread(file.fileno(), 20, SIZE - 20) == b"s" * 10 + b"f" * 10
        client.write_zeroes(1 << 20, PAGE)
        assert os.pread(file.fileno(), PAGE + 1, 1 << 20) == bytes(PAGE) + b"s"
        client.trim(2 << 20, 1 << 16)
        assert os.pread(file.fileno(), 1 << 16, 2 << 20) == bytes(1 << 16)
        os.pwrite(file.fileno(), b"m" * 100, 5500)
        assert client.read(5000, 1000) == b"n" * 500 + b"m" * 100 + b"n" * 400
        assert client.read(2 << 20, 1 << 16) == bytes(1 << 16)
    assert side.disk.read_bytes() == b"s" * SIZE


def test_what_a_mapping_has_changed_does_not_come_later_than_what_was_written_after_it(sides: Sides) -> None:
    """The kernel writes whole pages back, which may be long after they were changed."""
    side = mounted(sides, b"s" * SIZE)
    with mapped(side.file) as mapping, connected(side) as client:
        mapping.ask("write", 0, 10, ord("M"))  # not synced: the page is dirty
        client.write(5, b"n" * 10)
        assert client.read(0, 20) == b"M" * 5 + b"n" * 10 + b"s" * 5
        assert mapping.ask("read", 0, 20) == b"M" * 5 + b"n" * 10 + b"s" * 5
    assert side.content()[:20] == b"M" * 5 + b"n" * 10 + b"s" * 5


def test_two_faces_and_several_connections_are_one_disk(sides: Sides) -> None:
    """Random requests by either face, each read by the other one, against bytes in memory; with checkpoints between."""
    side = mounted(sides, b"s" * SIZE)
    chance = random.Random(7)
    model, disk = bytearray(b"s" * SIZE), bytearray(b"s" * SIZE)
    with connected(side) as one, connected(side) as two, side.file.open("r+b", buffering=0) as file:
        direct = os.open(side.file, os.O_RDWR | os.O_DIRECT)
        page = mmap.mmap(-1, PAGE)
        for _ in range(400):
            start = chance.randrange(SIZE)
            length = min(chance.choice((1, 512, 3000, 70_000)), SIZE - start)
            data = chance.randbytes(length)
            kind = chance.choice(("one", "two", "file", "direct", "zero", "trim", "read", "read", "read", "checkpoint"))
            if kind == "checkpoint" and chance.random() < 0.3:
                side.set("checkpoint")
                model[:] = disk
            elif kind in ("one", "two"):
                (one if kind == "one" else two).write(start, data)
                model[start : start + length] = data
            elif kind == "file":
                os.pwrite(file.fileno(), data, start)
                model[start : start + length] = data
            elif kind == "direct":
                start = start // PAGE * PAGE
                length = min(PAGE, SIZE - start)
                page[:length] = content = chance.randbytes(length)
                if length == PAGE:
                    os.pwrite(direct, page, start)
                    model[start : start + length] = content
            elif kind == "zero":
                one.write_zeroes(start, length)
                model[start : start + length] = bytes(length)
            elif kind == "trim":
                one.flush()
                two.trim(start, length)
                model[start : start + length] = one.read(start, length)
            expected = bytes(model[start : start + length])
            assert one.read(start, length) == expected
            assert two.read(start, length) == expected
            assert os.pread(file.fileno(), length, start) == expected
        os.close(direct)
        assert side.content() == bytes(model)


def test_readers_of_the_file_and_writers_over_nbd_at_the_same_time(sides: Sides) -> None:
    """Each block always holds one whole version, and never an older one than a reader has seen."""
    side = mounted(sides, bytes(SIZE))
    blocks, rounds, seen, wrong = 16, 40, [0] * 16, []
    ended = threading.Event()

    def read() -> None:
        with side.file.open("rb", buffering=0) as file:
            while not ended.is_set():
                for block in range(blocks):
                    content = os.pread(file.fileno(), PAGE, block * PAGE)
                    if len(set(content)) != 1 or content[0] < seen[block]:
                        wrong.append((block, seen[block], content[:10]))
                    seen[block] = content[0]

    reader = threading.Thread(target=read)
    reader.start()
    try:
        with connected(side) as client:
            for version in range(1, rounds + 1):
                for block in range(blocks):
                    client.write(block * PAGE, bytes([version]) * PAGE)
                with side.file.open("rb", buffering=0) as file:
                    for block in range(blocks):
                        assert os.pread(file.fileno(), 1, block * PAGE) == bytes([version])
    finally:
        ended.set()
        reader.join()
    assert not wrong


@pytest.mark.parametrize("how", [signal.SIGTERM, "umount -f"])
def test_it_ends_in_good_order_while_both_faces_are_in_use(sides: Sides, how: Any) -> None:
    """What was acknowledged over NBD is there afterwards, and nobody waits for anybody for ever."""
    side = mounted(sides, bytes(SIZE))
    side.expected += ["the mount was aborted"]
    acknowledged = [0] * 8

    def write(block: int) -> None:
        with connected(side) as client, suppress(OSError, AssertionError):
            for version in range(1, 1 << 20):
                client.write(block * PAGE, version.to_bytes(4, "big") * (PAGE // 4))
                acknowledged[block] = version

    program = "import os, sys\nfile = os.open(sys.argv[1], os.O_RDONLY)\nwhile True: os.pread(file, 1 << 20, 0)"
    writers = [threading.Thread(target=write, args=(block,), daemon=True) for block in range(8)]
    with subprocess.Popen([sys.executable, "-c", program, side.file], stderr=subprocess.DEVNULL) as reader:
        daemon = os.pidfd_open(side.pid)
        try:
            for writer in writers:
                writer.start()
            wait_for(lambda: min(acknowledged) > 5, "some writes")
            if how is signal.SIGTERM:
                signal.pidfd_send_signal(daemon, how)
            else:
                run("umount", "-f", side.point, check=False)
            wait_for(lambda: not any(writer.is_alive() for writer in writers), "the connections to be closed")
            reader.kill()  # as long as it has the file open, the mount is busy
            assert select.select([daemon], [], [], 60)[0], "the daemon did not end"
        finally:
            if not select.select([daemon], [], [], 0)[0]:
                signal.pidfd_send_signal(daemon, signal.SIGKILL)
            os.close(daemon)
            reader.kill()
    run("umount", "-l", side.point, check=False)
    side.mount()
    content = side.content()
    for block in range(8):
        found = int.from_bytes(content[block * PAGE : block * PAGE + 4], "big")
        assert found >= acknowledged[block] > 5


def test_real_clients_copy_and_convert_it(sides: Sides, tmp_path: Path) -> None:
    content = random.Random(3).randbytes(1 << 20) + bytes((4 << 20) + 512)
    side = mounted(sides, content)
    out = tmp_path / "out"
    run("nbdcopy", uri(side), out)
    assert out.read_bytes() == content
    converted = tmp_path / "out.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", uri(side), converted)
    run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", converted, side.disk)
    run("qemu-io", "-f", "raw", "-d", "unmap", "-c", "write -P 7 64k 128k", "-c", "discard 64k 64k", "-c", "flush", uri(side))
    assert side.content()[128 << 10 : 192 << 10] == b"\7" * (64 << 10)
    extents = json.loads(run("nbdinfo", "--map", "--json", uri(side)).stdout)
    assert sum(extent["length"] for extent in extents) == len(content)
    assert {extent["description"] for extent in extents} <= {"data", "zero", "hole,zero", "hole"}
    assert any(extent["offset"] <= 64 << 10 < extent["offset"] + extent["length"] and extent["type"] & 2 for extent in extents)


def test_a_primary_forwards_what_is_written_to_its_view_over_nbd(sides: Sides) -> None:
    far = sides.secondary(bytes(SIZE))
    near = sides.primary(bytes(SIZE), "--view-listen", f"unix:{sides.folder}/primary.view")
    with connected(near) as client:
        client.write(1000, b"p" * 5000)
        client.flush()
    assert near.content()[1000:6000] == b"p" * 5000
    far.set("checkpoint")
    assert far.content()[1000:6000] == b"p" * 5000


def test_connections_stay_through_a_failover_and_a_promotion(sides: Sides) -> None:
    side = mounted(sides, b"s" * SIZE)
    (sides.folder / "far").mkdir()
    far = Side(sides.folder / "far", "secondary", SIZE, "--listen", f"unix:{sides.folder}/far.sock")
    sides.all.append(far)
    side.expected += LINK_LOST
    far.mount()
    with connected(side) as client:
        client.write(0, b"r" * 10)
        replfs("failover", "--wait", side.point)
        client.write(10, b"d" * 10)
        replfs("promote", side.point, "--target", f"nbd+unix:///disk?socket={sides.folder}/far.sock")
        client.write(20, b"p" * 10)
        replfs("resync", "--wait", side.point)
        replfs("checkpoint", side.point)
        assert client.read(0, 31) == b"r" * 10 + b"d" * 10 + b"p" * 10 + b"s"
    assert side.disk.read_bytes() == far.content() == b"r" * 10 + b"d" * 10 + b"p" * 10 + b"s" * (SIZE - 30)


def test_a_read_only_mount_has_a_read_only_view(sides: Sides) -> None:
    side = mounted(sides, bytes(SIZE), "-o", "ro")
    with connected(side) as client:
        assert client.is_read_only
        assert client.read(0, 10) == bytes(10)


def test_a_stage_without_a_view_has_none_over_nbd_either(sides: Sides) -> None:
    side = mounted(sides, bytes(SIZE), "--no-start")
    with connected(side) as client:
        with pytest.raises(OSError) as refused:
            client.read(0, 10)
        assert refused.value.errno == errno.EIO


# Without a mount


class Unmounted:
    """A volume that nothing but its view over NBD shows."""

    def __init__(self, folder: Path, disk: bytes) -> None:
        self.mode = "secondary"
        self.point = folder / "none"
        self.disk = folder / "disk.raw"
        self.disk.write_bytes(disk)
        self.command = (
            "secondary",
            self.disk,
            "none",
            "--listen",
            f"unix:{folder}/s",
            "--view-listen",
            f"unix:{folder}/secondary.view",
        )

    def start(self) -> subprocess.Popen[str]:
        process = subprocess.Popen([REPLFS, *map(str, self.command), "--foreground"], stderr=subprocess.PIPE, text=True)
        socket = self.disk.parent / "secondary.view"
        wait_for(lambda: process.poll() is not None or socket.exists(), "the view's socket")
        return process


def test_without_a_mount_it_is_served_until_a_signal(tmp_path: Path) -> None:
    side: Any = Unmounted(tmp_path, b"s" * SIZE)
    for written in (b"s" * 10, b"n" * 10):
        with side.start() as process:
            with connected(side) as client:
                assert client.read(0, 10) == written
                client.write(0, b"n" * 10)
            process.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=60)
        assert process.returncode == 0, said
        assert "ended: the stage is running" in said
    assert not (tmp_path / "secondary.view").exists()


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("none",), "none as MOUNTPOINT needs --view-listen"),
        (("none", "--view-listen", "unix:v", "-o", "allow_other"), "-o needs a mount"),
        (("m", "--view-listen", "192.0.2.1:10"), "192.0.2.1:10 is beyond this machine"),
        (("m", "--view-listen", "unix:v", "--listen", "unix:./v"), "v is to be listened on for two things"),
        (("m", "--view-listen", "127.0.0.1:9", "--qmp", "127.0.0.1:9"), "127.0.0.1:9 is to be listened on for two things"),
    ],
)
def test_wrong_usage(tmp_path: Path, arguments: tuple[str, ...], why: str) -> None:
    (tmp_path / "disk").write_bytes(bytes(SIZE))
    done = replfs("secondary", "disk", *arguments, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert why in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk"]


def test_an_address_that_is_taken_is_named_with_its_option(sides: Sides) -> None:
    side = mounted(sides, bytes(SIZE))
    (sides.folder / "other").write_bytes(bytes(SIZE))
    (sides.folder / "other.mnt").mkdir()
    taken = f"unix:{sides.folder}/secondary.view"
    done = replfs(
        *("secondary", sides.folder / "other", sides.folder / "other.mnt", "--listen", f"unix:{sides.folder}/o"),
        *("--view-listen", taken),
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == f"replfs: error: {taken} is in use by another server: stop it or choose another --view-listen\n"
    assert not (sides.folder / "other.replfs").exists()
    with connected(side) as client:
        assert client.read(0, 1) == b"\0"
