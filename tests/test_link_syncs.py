"""What a primary sends to a secondary that is new, what it refuses, how that is counted, and plain NBD servers as targets."""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from disks import same
from harness import SECONDS, Sides, replfs, run, wait_for
from proxy import BACK
from test_links import BLOCK, MIB, SIZE, Pair, pair, probing, write

__all__ = ["pair"]


# First syncs


def test_holes_stay_holes_and_zeroes_are_sent_as_such(pair: Pair, tmp_path: Path) -> None:
    """Where the secondary has data, they are needed. The disk ends within a block."""
    size = SIZE + 1000
    near, far = tmp_path / "near.raw", tmp_path / "far.raw"
    far.write_bytes(os.urandom(3 * BLOCK))
    near.write_bytes(bytes(BLOCK) + os.urandom(BLOCK))
    for disk in (near, far):
        os.truncate(disk, size)
    with near.open("r+b") as file:
        file.seek(size - 10)
        file.write(b"x" * 10)
    pair.secondary(far)
    pair.primary(near)
    pair.equal()
    assert pair.sent == BLOCK + 1000
    assert pair.link["sent"]["zeroes"] >= 2 * BLOCK
    assert far.stat().st_blocks <= near.stat().st_blocks == (2 * BLOCK + 4096) // 512


def test_verify_sends_what_differs(pair: Pair) -> None:
    content = bytearray(os.urandom(SIZE + 1000))
    content[3 * BLOCK : 5 * BLOCK] = bytes(2 * BLOCK)
    there = bytearray(content)
    for offset in (0, 3 * BLOCK, 7 * BLOCK + 1, 8 * BLOCK, SIZE + 999):
        there[offset] ^= 1
    pair.secondary(bytes(there))
    pair.primary(bytes(content), "--initial-sync", "verify")
    assert pair.equal() == content
    assert pair.sent == 3 * BLOCK + 1000
    assert pair.link["sent"]["zeroes"] <= 2 * BLOCK


def test_none_sends_nothing(pair: Pair) -> None:
    content = os.urandom(SIZE)
    pair.secondary(bytes(SIZE))
    pair.primary(content, "--initial-sync", "none")
    pair.agree()
    assert pair.link["sent"] == {"data": 0, "zeroes": 0}
    assert same(pair.far.disk.read_bytes(), bytes(SIZE))
    write(pair.near, 100, b"new")
    pair.agree()
    assert pair.far.disk.read_bytes()[100:103] == b"new"
    assert pair.sent == 3


def test_what_a_first_sync_lasts(pair: Pair) -> None:
    """No checkpoints, the old view, and it waits when it is told to."""
    old, new = os.urandom(SIZE), os.urandom(SIZE)
    pair.secondary(old)
    pair.primary(new, "--resync-rate", "8M")
    pair.near.expected.append("checkpoint failed: ")
    pair.far.expected.append("checkpoint failed: ")
    wait_for(lambda: pair.link["out-of-sync"] <= SIZE - 2 * MIB, "a part of the resync")
    done = replfs("resync", "--pause", "--wait", pair.near.point, check=False)
    assert (done.returncode, "the resync is paused" in done.stderr) == (1, True)
    for side in (pair.near, pair.far):
        refused = replfs("checkpoint", side.point, check=False)
        assert refused.returncode == 1
        assert ("between two states" if side is pair.far else "the copies do not agree") in refused.stderr
    wait_for(lambda: pair.link["window"]["used"] == 0, "the end of what was on its way")
    left = pair.link["out-of-sync"]
    assert 0 < left < SIZE
    assert same(pair.far.content(), old)
    assert pair.far.get("generation") == "0"
    assert pair.link["state"] == "paused"
    replfs("resync", "--resume", "--wait", pair.near.point)
    assert pair.link["out-of-sync"] == 0
    assert pair.equal() == new
    wait_for(lambda: pair.far.get("generation") == "1", "the checkpoint of the first sync")
    assert same(pair.far.content(), new)
    assert pair.sent == SIZE


# What is refused


@pytest.mark.parametrize(
    ("size", "why"), [(SIZE + 512, f"has {SIZE} bytes, .* has {SIZE + 512}: make them the same size"), (SIZE, "has taken over")]
)
def test_a_mount_that_is_refused(pair: Pair, sides: Sides, size: int, why: str) -> None:
    pair.secondary(size)
    if size == SIZE:
        replfs("failover", "--wait", pair.far.point)
    near = sides.make("primary", SIZE, "--target", f"nbd+unix:///disk?socket={pair.proxy.path}")
    refused = replfs("primary", near.disk, near.point, *near.arguments, check=False)
    assert refused.returncode == 1
    assert re.search(why, refused.stderr)
    assert not near.file.exists()
    assert near.disk.stat().st_blocks == pair.far.disk.stat().st_blocks == 0


def test_a_secondary_that_takes_over_is_left_alone(pair: Pair) -> None:
    """By a primary that is alive: its machine goes on."""
    content = os.urandom(SIZE)
    pair.secondary(content)
    pair.primary(content, "--initial-sync", "none")
    pair.agree()
    pair.near.expected += ["a change could not be written there", "has taken over"]
    with probing(pair.near) as prober:
        prober.next(3, 5)
        replfs("failover", "--wait", pair.far.point)
        pair.hurry_until("refused")
        prober.next(20, 5)
    write(pair.near, 0, b"alone")
    assert "has taken over" in pair.near.status()["link-error"]
    assert pair.link["out-of-sync"] > 0
    assert pair.near.get("error") == "I/O error occurred"
    assert same(pair.far.content(), content)
    waiting = replfs("resync", "--wait", pair.near.point, check=False)
    assert (waiting.returncode, "has taken over" in waiting.stderr) == (1, True)


# What the status says


@pytest.mark.parametrize("protocol", ["async", "sync"])
def test_what_is_out_of_sync_is_counted_exactly(pair: Pair, protocol: str) -> None:
    size = SIZE + 1000
    pair.secondary(size)
    pair.primary(size, "--timeout", "20", "--protocol", protocol)
    pair.agree()
    pair.proxy.stall(BACK)  # no answer: nobody knows that it is there
    process = subprocess.Popen([sys.executable, "-c", SCATTER, pair.near.file, str(size)])
    try:
        if protocol == "async":
            process.wait(SECONDS)
        wait_for(lambda: pair.link["out-of-sync"] == (BLOCK if protocol == "sync" else 3 * BLOCK + 1000), "what is on its way")
        assert pair.link["state"] == "connected"
        pair.proxy.unplug()
        pair.until("connecting")
        process.wait(SECONDS)
        assert pair.link["out-of-sync"] == 3 * BLOCK + 1000
    finally:
        process.kill()
        process.wait(SECONDS)
    pair.proxy.go_on()
    pair.near.set("resync", "start")
    pair.equal()


SCATTER = """
import os, sys
fd, size = os.open(sys.argv[1], os.O_WRONLY), int(sys.argv[2])
for offset in (10, 5 << 16, (6 << 16) - 5, size - 10):
    os.pwrite(fd, b"0123456789", offset)
"""


# Plain NBD servers


@contextmanager
def serving(path: Path, *command: str | Path) -> Iterator[subprocess.Popen[bytes]]:
    """A plain NBD server that has a socket which listens from the start."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.fspath(path))
        listening.listen()
        fd = listening.fileno()
        activated = f'LISTEN_PID=$$ LISTEN_FDS=1 exec "$@" 3<&{fd}'
        process = subprocess.Popen(["bash", "-c", activated, "bash", *command], stdin=subprocess.DEVNULL, pass_fds=[fd])
    try:
        yield process
    finally:
        process.kill()
        process.wait(SECONDS)
        path.unlink(missing_ok=True)


def test_a_server_without_zero_writes_gets_large_holes_too(pair: Pair, tmp_path: Path) -> None:
    """They go out as data then, which no server takes in pieces of any size."""
    size = 128 * MIB
    target = tmp_path / "target.raw"
    with target.open("wb") as file:
        file.write(b"old" * MIB)
        file.truncate(size)
    with serving(tmp_path / "s.sock", "nbdkit", "-f", "--filter=nozero", "--filter=noextents", "file", target):
        pair.primary(size)
        pair.agree()
    assert same(target.read_bytes(), bytes(size))


@pytest.mark.parametrize("protocol", ["async", "sync"])
def test_qemu_nbd_that_is_killed_gets_what_it_lacks(pair: Pair, sides: Sides, tmp_path: Path, protocol: str) -> None:
    content = os.urandom(SIZE)
    target = tmp_path / "target.raw"
    target.write_bytes(bytes(SIZE))
    server = (sides.socket, "qemu-nbd", "-f", "raw", "-x", "disk", "-t", "-e", "8", target)
    with serving(*server):
        pair.primary(content, "--protocol", protocol)
        pair.agree()
        write(pair.near, 3 * BLOCK + 7, b"one")
    pair.until("connecting")
    with probing(pair.near) as prober:
        prober.next(10, 5)
    write(pair.near, 30 * BLOCK - 1, b"two")
    before = pair.sent
    with serving(*server):
        pair.hurry_until("connected")
        pair.agree()
        assert pair.sent - before <= 4 * BLOCK
        assert same(target.read_bytes(), pair.near.content())


FILTERS: dict[str, tuple[str | Path, ...]] = {
    "some errors": ("--filter=error", "memory", str(SIZE), "error=EIO", "error-rate=10%", "error-file={folder}/errors"),
    "only errors": ("--filter=error", "memory", str(SIZE), "error=ENOSPC", "error-rate=100%", "error-file={folder}/errors"),
    "delay": ("--filter=delay", "memory", str(SIZE), "wdelay=20ms"),
    "rate": ("--filter=rate", "memory", str(SIZE), "rate=100M"),
}


@pytest.mark.parametrize("name", FILTERS)
def test_servers_that_are_slow_or_fail(pair: Pair, sides: Sides, tmp_path: Path, name: str) -> None:
    errors = tmp_path / "errors"
    with serving(sides.socket, "nbdkit", "-f", *(str(word).format(folder=tmp_path) for word in FILTERS[name])):
        pair.primary(os.urandom(SIZE), "--timeout", "5")
        pair.agree()
        if "errors" in name:
            errors.touch()
        lost = "errors" not in name
        with probing(pair.near) as prober:
            while not lost:
                prober.next(1, 5)
                lost = bool(pair.near.status()["link-error"])
            prober.next(10, 5)
            write(pair.near, 5 * BLOCK - 5, os.urandom(3 * BLOCK))
            if "errors" in name:
                assert pair.near.get("error") == "I/O error occurred"
                errors.unlink()
        pair.hurry_until("connected")
        pair.agree()
        copy = tmp_path / "copy"
        run("nbdcopy", f"nbd+unix:///?socket={sides.socket}", copy)
        assert same(copy.read_bytes(), pair.near.content())
