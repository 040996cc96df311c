"""After a failover: the side that has taken over becomes a primary, and what was the primary comes back as its secondary.

Real daemons and mounts, on two sides A and B. Nothing is lost on the way, and only what differs is sent.
"""

import os
import random
from pathlib import Path

import pytest
from disks import same
from harness import LINK_LOST, Side, Sides, replfs, wait_for

MIB = 1 << 20
SIZE = 32 * MIB + 512
BLOCK = 64 << 10


class Pair:
    """Two sides that change their roles; ``content`` is what the machine, wherever it runs, has written."""

    def __init__(self, sides: Sides) -> None:
        self.rng = random.Random(1)
        self.content = bytearray(self.rng.randbytes(SIZE))
        self.folder = sides.folder
        self.sides: dict[str, Side] = {}
        for name in "AB":
            disk = self.folder / f"{name}.raw"
            disk.write_bytes(self.content if name == "A" else bytes(SIZE))
            side = sides.make(name, disk)
            side.expected = [*LINK_LOST, "a forwarded write failed"]
            self.sides[name] = side

    def uri(self, name: str) -> str:
        return f"nbd+unix:///disk?socket={self.folder / name}.sock"

    def secondary(self, name: str) -> Side:
        side = self.sides[name]
        side.mode, side.arguments = "secondary", ("--listen", f"unix:{self.folder / name}.sock")
        side.mount()
        return side

    def primary(self, name: str, other: str, *more: str) -> Side:
        side = self.sides[name]
        side.mode, side.arguments = "primary", ("--target", self.uri(other), "--timeout", "2", *more)
        side.mount()
        return side

    def write(self, name: str, places: int) -> None:
        with self.sides[name].file.open("r+b", buffering=0) as file:
            for _ in range(places):
                offset, length = self.rng.randrange(8 * MIB), self.rng.choice((512, 4096, 5000))
                data = self.rng.randbytes(length)
                file.seek(offset)
                assert file.write(data) == length
                self.content[offset : offset + length] = data
            os.fsync(file.fileno())

    def sent(self, name: str) -> int:
        sent: int = self.sides[name].status()["link"]["sent"]["data"]
        return sent

    def promote(self, name: str, other: str, *more: str) -> None:
        replfs("promote", self.sides[name].point, "--target", self.uri(other), *more)
        self.sides[name].mode = "primary"

    def assert_equal(self, name: str) -> None:
        assert same(self.sides[name].content(), self.content)


@pytest.mark.parametrize("how", ["killed", "unmounted"])
def test_the_round_trip(sides: Sides, how: str) -> None:
    """A to B, fail over, B to A, fail over again: nothing that was checkpointed is lost, and nothing is copied in full twice."""
    it = Pair(sides)
    b = it.secondary("B")
    a = it.primary("A", "B")
    a.until_connected()
    it.write("A", 50)
    replfs("checkpoint", a.point)
    checkpointed = bytes(it.content)
    it.write("A", 5)  # which the failover gives up
    a.kill() if how == "killed" else a.umount()
    it.content[:] = checkpointed
    replfs("failover", "--wait", b.point)
    it.assert_equal("B")
    it.write("B", 20)
    a = it.secondary("A")
    it.promote("B", "A")
    assert b.get("mode") == "primary"
    it.write("B", 20)
    b.until_connected()
    assert it.sent("B") < 16 * MIB  # the extents that were hot when A died, at most, not all of it
    if how == "unmounted":
        assert it.sent("B") <= 100 * (BLOCK + 5000)
    replfs("checkpoint", b.point)
    it.assert_equal("A")
    it.write("B", 3)
    replfs("checkpoint", b.point)
    b.kill()
    replfs("failover", "--wait", a.point)
    it.assert_equal("A")
    it.write("A", 10)
    it.assert_equal("A")
    b = it.secondary("B")
    it.promote("A", "B")
    a.until_connected()
    replfs("checkpoint", a.point)
    it.assert_equal("B")
    assert it.sent("A") < 16 * MIB
    assert same(Path(a.disk).read_bytes(), it.content)
    assert same(Path(b.disk).read_bytes(), it.content)


@pytest.mark.parametrize("why", ["its link was lost", "it was stopped"])
def test_an_old_primary_that_went_on_alone_has_diverged(sides: Sides, why: str) -> None:
    """Its machine wrote what nobody else has: that is not overwritten before somebody says so."""
    it = Pair(sides)
    b = it.secondary("B")
    a = it.primary("A", "B")
    a.until_connected()
    replfs("checkpoint", a.point)
    checkpointed = bytes(it.content)
    if why == "it was stopped":
        replfs("stop", a.point)
        it.write("A", 5)
        a.umount()
    else:
        b.umount()
        it.write("A", 5)
        wait_for(lambda: a.status()["link"]["state"] == "connecting", "the loss of the link")
        a.umount()
        b.mount()
    it.content[:] = checkpointed
    replfs("failover", "--wait", b.point)
    it.write("B", 5)
    if why == "its link was lost":
        refused = replfs("primary", a.disk, a.point, *a.arguments, check=False)
        assert "has taken over" in refused.stderr
    it.secondary("A")
    refused = replfs("promote", b.point, "--target", it.uri("A"), check=False)
    assert "have diverged" in refused.stderr
    assert "--discard-remote" in refused.stderr
    assert b.get("mode") == "secondary"
    it.assert_equal("B")
    b.expected.append("start failed")
    it.promote("B", "A", "--discard-remote")
    b.until_connected()
    assert it.sent("B") < 16 * MIB
    replfs("checkpoint", b.point)
    it.assert_equal("A")


def test_a_machine_writes_while_its_side_is_promoted(sides: Sides) -> None:
    it = Pair(sides)
    b = it.secondary("B")
    a = it.primary("A", "B")
    a.until_connected()
    replfs("checkpoint", a.point)
    a.umount()
    replfs("failover", "--wait", b.point)
    it.secondary("A")
    with b.file.open("r+b", buffering=0) as file:  # held open over the promotion
        for number in range(200):
            if number == 100:
                it.promote("B", "A")
            data = it.rng.randbytes(4096)
            file.seek(number * 100_000)
            file.write(data)
            it.content[number * 100_000 : number * 100_000 + 4096] = data
        b.until_connected()
    replfs("checkpoint", b.point)
    it.assert_equal("A")


def test_what_may_be_promoted(sides: Sides) -> None:
    it = Pair(sides)
    b = it.secondary("B")
    refused = replfs("promote", b.point, "--target", it.uri("A"), check=False)
    assert "only what has taken over can become a primary" in refused.stderr
    refused = replfs("promote", b.point, "--target", "nbd://192.0.2.1/disk", check=False)
    assert "unencrypted" in refused.stderr
    refused = replfs("promote", b.point, "--target", "http://x", check=False)
    assert refused.returncode == 2
    b.expected += ["start failed", "target failed"]
    b.umount()
    refused = replfs("primary", b.disk, b.point, "--target", it.uri("A"), check=False)
    assert "is the state of a secondary volume" in refused.stderr
    b.mount()
    replfs("failover", "--wait", b.point)
    b.umount()
    b = it.primary("B", "A", "--no-start")  # it has taken over: at a mount it may become one, too
    assert b.get("stage") == "none"


def test_a_failover_right_after_the_first_sync_is_one_to_the_whole_copy(sides: Sides) -> None:
    """Before, there is nothing to fail over to; what the secondary showed until then was never a copy of anything."""
    it = Pair(sides)
    b = it.secondary("B")
    a = it.primary("A", "B", "--resync-rate", "16M")
    wait_for(lambda: b.status()["inconsistent"], "the first sync")
    refused = replfs("failover", b.point, check=False)
    assert "never had a whole copy" in refused.stderr
    b.expected.append("failover failed")
    wait_for(lambda: not b.status()["inconsistent"], "its end")
    replfs("failover", "--wait", b.point)
    it.assert_equal("B")
    a.umount()
