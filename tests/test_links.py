"""Pairs whose link is broken in every way, and what is to become of them: the machine goes on, and the copies agree again.

Real daemons, joined through a proxy that is told what to do to the bytes between them (see proxy.py). What is sent is counted by
the primary, in its status, and by the proxy; what arrived is read from the disks.
"""

import errno
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from disks import same
from harness import SECONDS, Side, Sides, replfs, wait_for
from proxy import BACK, THERE, Proxy

MIB = 1 << 20
BLOCK = 64 << 10
SIZE = 16 * MIB
TIMEOUT = 1
"""Seconds after which a silent secondary is given up, in these tests."""

LINK = [
    "no link: ",
    "the link is lost: ",
    "the link to .* is given up: ",
    "going on alone until it is there",
    "no checkpoint after the first sync: ",
]
"""What a primary may log about a link that is disturbed."""


class Pair:
    """A primary that reaches its secondary through the proxy. Neither is mounted until it is asked for."""

    def __init__(self, sides: Sides, proxy: Proxy) -> None:
        self._sides = sides
        self.proxy = proxy
        self.near: Side
        self.far: Side

    def secondary(self, disk: bytes | int | Path, *more: str) -> Side:
        self.far = self._sides.make("secondary", disk, "--listen", f"unix:{self._sides.socket}", *more)
        self.far.mount()
        return self.far

    def primary(self, disk: bytes | int | Path, *more: str) -> Side:
        target = f"nbd+unix:///disk?socket={self.proxy.path}"
        self.near = self._sides.make("primary", disk, "--target", target, "--timeout", str(TIMEOUT), *more)
        self.near.expected += LINK
        self.near.mount()
        return self.near

    def primary_alone(self, disk: bytes | int, *more: str) -> Side:
        """One whose secondary is not there, as it is told when it is mounted."""
        self.proxy.unplug()
        target = f"nbd+unix:///disk?socket={self.proxy.path}"
        self.near = self._sides.make("primary", disk, "--target", target, "--timeout", str(TIMEOUT), *more)
        self.near.expected += LINK
        done = replfs("primary", self.near.disk, self.near.point, *self.near.arguments)
        assert "going on alone until it is there" in done.stderr
        self.near.pid = self.near.status()["pid"]
        return self.near

    @property
    def link(self) -> dict[str, Any]:
        link: dict[str, Any] = self.near.status()["link"]
        assert link["out-of-sync"] >= 0
        return link

    @property
    def sent(self) -> int:
        """Bytes of data that the primary has sent, resyncs included."""
        sent = self.link["sent"]["data"]
        assert isinstance(sent, int)
        return sent

    def until(self, state: str) -> None:
        wait_for(lambda: self.link["state"] == state, f"the link's state {state}")

    def hurry_until(self, *states: str) -> None:
        """The same for one of these, without waiting for the link's next try."""

        def met() -> bool:
            link = self.link
            if link.get("retry-in", 0) > 0.2:
                self.near.set("resync", "start")
            return link["state"] in states

        wait_for(met, f"the link's state {' or '.join(states)}")

    def agree(self) -> None:
        """Wait until both copies have all, on stable storage."""
        wait_for(lambda: self.link["state"] == "connected" and not self.link["out-of-sync"], "the copies agree")
        assert self.near.get("error") == ""

    def equal(self) -> bytes:
        """See that the disks are, byte for byte, once the copies agree; gives what is on them."""
        self.agree()
        content = self.near.disk.read_bytes()
        assert same(self.far.disk.read_bytes(), content)
        assert same(self.near.content(), content)
        return content


@pytest.fixture
def pair(sides: Sides, proxy: Proxy) -> Pair:
    return Pair(sides, proxy)


def write(side: Side, offset: int, data: bytes, *, sync: bool = False) -> None:
    fd = os.open(side.file, os.O_WRONLY | (os.O_SYNC if sync else 0))
    try:
        assert os.pwrite(fd, data, offset) == len(data)
    finally:
        os.close(fd)


class Prober:
    """Another process that writes to a primary's file, one small write after another, and tells how long each of them took.

    It writes what is there, so nothing changes. An error is an answer as well. It is what may hang; the test does not.
    """

    PROGRAM = """
import os, select, sys, time
fd = os.open(sys.argv[1], os.O_RDWR)
data = os.pread(fd, 512, 0)
while True:
    began = time.monotonic()
    try:
        os.pwrite(fd, data, 0)
    except OSError:
        pass
    print(time.monotonic() - began, flush=True)
    select.select([], [], [], 0.02)
"""

    def __init__(self, side: Side) -> None:
        self._side = side
        self._process = subprocess.Popen([sys.executable, "-c", self.PROGRAM, side.file], stdout=subprocess.PIPE, bufsize=0)

    def next(self, count: int, seconds: float) -> float:
        """As :meth:`take`: the longest."""
        return max(self.take(count, seconds))

    def take(self, count: int, seconds: float) -> list[float]:
        """The next writes' times. One that takes more than ``seconds`` fails the test, and the daemon is killed.

        Else the writer could not even be killed.
        """
        assert self._process.stdout is not None
        times = []
        for _ in range(count):
            readable, _, _ = select.select([self._process.stdout], [], [], seconds)
            if not readable:
                self._side.signal(signal.SIGKILL)
                raise AssertionError(f"a write to the primary's file took more than {seconds} seconds")
            times.append(float(self._process.stdout.readline()))
        return times

    def close(self) -> None:
        self._process.kill()
        self._process.wait(SECONDS)
        assert self._process.stdout is not None
        self._process.stdout.close()


@contextmanager
def probing(side: Side) -> Iterator[Prober]:
    prober = Prober(side)
    try:
        yield prober
    finally:
        prober.close()


def test_a_link_that_is_cut_in_a_resync_does_not_stop_the_machine(pair: Pair) -> None:
    pair.secondary(bytes(SIZE))
    pair.proxy.limit(8 * MIB)
    pair.primary(os.urandom(SIZE))
    wait_for(lambda: pair.proxy.carried(THERE) >= 3 * MIB, "a part of the resync")
    with probing(pair.near) as prober:
        prober.next(3, 5)
        pair.proxy.unplug()
        prober.next(20, 5)
    pair.proxy.go_on()
    pair.near.set("resync", "start")
    pair.equal()


@pytest.mark.parametrize("first", [True, False])
def test_a_resync_that_is_cut_goes_on_where_it_was(pair: Pair, first: bool) -> None:
    pair.secondary(bytes(SIZE))
    content = os.urandom(SIZE)
    if first:
        pair.proxy.limit(4 * MIB)
        pair.primary(content, "--timeout", "5")
    else:
        pair.primary(bytes(SIZE), "--timeout", "5")
        pair.agree()
        pair.proxy.unplug()
        write(pair.near, 0, content)
        pair.proxy.go_on()
        pair.proxy.limit(4 * MIB)
        pair.near.set("resync", "start")
    wait_for(lambda: pair.link["out-of-sync"] <= SIZE - 2 * MIB, "a part of the resync that is on stable storage there")
    pair.proxy.unplug()
    wait_for(lambda: pair.link["state"] == "connecting", "the end of the link")
    left, sent = pair.link["out-of-sync"], pair.sent
    assert left <= SIZE - 2 * MIB
    pair.proxy.go_on()
    pair.near.set("resync", "start")
    assert pair.equal() == content
    assert pair.sent - sent == left


def test_a_link_that_is_slow_is_not_silent(pair: Pair) -> None:
    """Answers come all the time; that what was asked for last takes longer than the time-out is no reason to give up."""
    pair.secondary(bytes(SIZE))
    pair.proxy.limit(6 * MIB)
    pair.primary(os.urandom(SIZE))
    pair.equal()
    assert pair.sent == SIZE


def test_a_link_that_is_lost_in_a_resync_is_shown_as_such(pair: Pair) -> None:
    pair.secondary(bytes(SIZE))
    pair.proxy.limit(6 * MIB)
    pair.primary(os.urandom(SIZE))
    wait_for(lambda: pair.proxy.carried(THERE) >= 3 * MIB, "a part of the resync")
    pair.proxy.unplug()
    wait_for(lambda: pair.near.status()["link-error"], "the end of the link")
    assert {pair.link["state"] for _ in range(20)} == {"connecting"}
    assert not pair.near.status()["connected"]


def test_none_is_said_of_what_was_there_at_the_mount_not_of_what_is_written_since(pair: Pair) -> None:
    content = os.urandom(SIZE)
    pair.primary_alone(content, "--initial-sync", "none")
    write(pair.near, 5 * BLOCK, b"new" * 100, sync=True)
    assert pair.link["out-of-sync"] == BLOCK
    pair.secondary(content)
    pair.proxy.go_on()
    pair.near.set("resync", "start")
    pair.equal()
    assert pair.sent == BLOCK


def test_a_secondary_that_hangs_in_a_checkpoint_costs_the_machine_one_time_out(pair: Pair) -> None:
    """Nothing else is under way, so only the peers' own conversation can tell."""
    content = os.urandom(SIZE)
    pair.secondary(content)
    pair.primary(content, "--initial-sync", "none", "--timeout", "3")
    pair.agree()
    pair.near.expected.append("checkpoint failed: ")
    failed: list[OSError] = []

    def checkpoint() -> None:
        try:
            pair.near.set("checkpoint")
        except OSError as error:
            failed.append(error)

    thread = threading.Thread(target=checkpoint)
    os.kill(pair.far.pid, signal.SIGSTOP)
    try:
        thread.start()
        with probing(pair.near) as prober:
            prober.next(30, 3 + 1.5)
    finally:
        os.kill(pair.far.pid, signal.SIGCONT)
        thread.join(SECONDS)
    assert [error.errno for error in failed] == [errno.EIO]
    pair.equal()


def test_a_state_that_cannot_be_saved_does_not_hang_the_machine(pair: Pair) -> None:
    """The link is lost under a write that waits for the secondary, and the new generation cannot be saved."""
    pair.secondary(bytes(SIZE))
    pair.primary(bytes(SIZE), "--protocol", "sync")
    pair.agree()
    new = pair.near.state_dir / "state.json.new"
    new.unlink()
    new.mkdir()
    pair.near.expected.append("that this side goes on alone is not saved")
    with probing(pair.near) as prober:
        prober.next(3, 5)
        pair.proxy.stall()
        wait_for(lambda: pair.link["window"]["used"], "a write that waits for the secondary")
        pair.proxy.unplug()
        try:
            prober.next(3, 5)
        finally:
            new.rmdir()
            pair.proxy.go_on()
    pair.equal()


def test_what_was_on_its_way_on_a_lost_link_does_not_arrive_behind_what_was_sent_since(pair: Pair) -> None:
    """Networks and kernels go on delivering what a connection was given that its own end has left long ago."""
    pair.secondary(bytes(SIZE))
    pair.primary(bytes(SIZE))
    pair.agree()
    pair.proxy.strand()
    for block in range(16):
        write(pair.near, block * BLOCK, b"old" * 1000)
    wait_for(lambda: pair.near.status()["link-error"], "the end of the link")
    for block in range(16):
        write(pair.near, block * BLOCK, b"new" * 1000)
    pair.near.set("resync", "start")
    pair.agree()
    connections = pair.proxy.connections
    pair.proxy.go_on()
    wait_for(lambda: pair.proxy.connections < connections, "the end of the old connections")
    wait_for(lambda: pair.far.status()["connections"] == pair.proxy.connections == 3, "the end of the old connections there")
    pair.equal()


def test_a_reply_that_is_none_ends_the_link_and_no_more(pair: Pair) -> None:
    content = os.urandom(SIZE)
    pair.secondary(content)
    pair.primary(content, "--initial-sync", "none")
    for _ in range(3):
        pair.agree()
        accepted = pair.proxy.accepted
        pair.proxy.corrupt(BACK)
        write(pair.near, 5 * BLOCK, os.urandom(3000))
        wait_for(lambda accepted=accepted: pair.proxy.accepted > accepted, "another link")
        pair.hurry_until("connected")
        pair.equal()


GREETING = 18  # bytes


@pytest.mark.parametrize("count", [0, 5, GREETING, GREETING + 5])
@pytest.mark.parametrize("first", [True, False])
def test_a_secondary_that_is_cut_off_when_it_is_met_is_not_taken_for_a_plain_server(pair: Pair, first: bool, count: int) -> None:
    """Or its generations would not be looked at, and checkpoints not be asked for."""
    if first:
        pair.primary_alone(SIZE)
        pair.secondary(SIZE)
    else:
        pair.secondary(SIZE)
        pair.primary(SIZE)
        pair.agree()
        pair.proxy.unplug()
        pair.until("connecting")
    pair.proxy.go_on()
    pair.proxy.cut_after(count, BACK)
    pair.hurry_until("connected")
    assert pair.near.status()["peer"] == pair.far.status()["node"]
    generation = int(pair.far.get("generation"))
    replfs("checkpoint", pair.near.point)
    assert int(pair.far.get("generation")) > generation


@pytest.mark.parametrize("byte", [0, 15])
def test_a_greeting_that_is_garbled_is_tried_again(pair: Pair, byte: int) -> None:
    pair.secondary(SIZE)
    pair.primary(SIZE)
    pair.agree()
    pair.proxy.unplug()
    pair.until("connecting")
    pair.proxy.go_on()
    pair.proxy.corrupt(BACK, byte)
    pair.hurry_until("connected")
    assert pair.near.status()["peer"] == pair.far.status()["node"]


def test_what_the_other_side_lacks_is_known_after_a_kill(pair: Pair) -> None:
    """At once after the write: nothing has been saved in the background since."""
    pair.secondary(SIZE)
    pair.primary(SIZE)
    for offset in (0, 5 * MIB, SIZE - 3):
        pair.agree()
        pair.proxy.unplug()
        pair.until("connecting")
        write(pair.near, offset, b"new")
        pair.near.kill()
        pair.proxy.go_on()
        pair.near.mount()
        assert pair.equal()[offset : offset + 3] == b"new"
